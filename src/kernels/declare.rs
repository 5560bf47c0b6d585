//! Bindings of a kernel and the WGSL that declares them: typed loads and stores that hide the storage format.

use std::fmt;

use super::Target;
use crate::gpu::{Access, Layout};
use crate::types::DType;

/// How a kernel addresses a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum View {
    /// Four neighbouring columns at a time: `NAME_load(i)`, `NAME_store(i, value)`.
    Vec4,
    /// One element at a time: `NAME_at(i)`, `NAME_put(i, value)`.
    Scalar,
    /// 16 bytes at a time: one `vec4` of f32 or two of f16.
    ///
    /// A reader gets `NAME[i]`, a block that stays packed in its registers, `NAME_part0(block)` and `NAME_part1(block)`, which unpack it, and
    /// `NAME_at(i)` for single elements. A writer of f16 gets `NAME_pair(i, a, b)`. A kernel that reads and writes f32 gets the functions of a
    /// reader and `NAME_store(i, value)`.
    Block,
}

/// One storage buffer of a kernel. Besides the functions of its view, the source gets `NAME_stride`, the distance between rows in units of
/// the view.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Binding {
    pub name: String,
    pub layout: Layout,
    pub view: View,
    pub access: Access,
    /// Number of bytes from its start that the kernel may touch. This is the size of the layout, unless only a part of the value is bound.
    pub needs: u64,
}

impl Binding {
    pub fn new(name: impl Into<String>, layout: Layout, view: View, access: Access) -> Self {
        Self {
            name: name.into(),
            layout,
            view,
            access,
            needs: layout.size_bytes(),
        }
    }

    pub fn bytes(&self) -> f64 {
        (self.layout.len() * self.layout.dtype().size()) as f64
    }

    fn declare(&self, index: usize, target: Target) -> String {
        if self.view == View::Block {
            return self.declare_blocks(index, target);
        }
        let name = &self.name;
        let f16 = if target.f16 { "f16" } else { "u32" };
        let (element, load, store) = match (self.view, self.layout.dtype()) {
            (View::Vec4, DType::F32) => ("vec4<f32>".to_owned(), format!("{name}[i]"), "value"),
            (View::Vec4, DType::F16) if target.f16 => (
                "vec4<f16>".to_owned(),
                format!("vec4<f32>({name}[i])"),
                "vec4<f16>(value)",
            ),
            (View::Vec4, DType::F16) => (
                "vec2<u32>".to_owned(),
                format!("vec4<f32>(unpack2x16float({name}[i].x), unpack2x16float({name}[i].y))"),
                "packed_halves(value)",
            ),
            (View::Vec4, DType::U32) => ("vec4<u32>".to_owned(), format!("{name}[i]"), "value"),
            (View::Scalar, DType::F16) if target.f16 => {
                (f16.to_owned(), format!("f32({name}[i])"), "f16(value)")
            }
            // No single half can be stored without `SHADER_F16`; kernels store halves as vec4 only.
            (View::Scalar, DType::F16) => (
                f16.to_owned(),
                format!("unpack2x16float({name}[i >> 1u])[i & 1u]"),
                "",
            ),
            (_, dtype) => (dtype.to_string(), format!("{name}[i]"), "value"),
        };
        let number = match (self.view, self.layout.dtype()) {
            (View::Vec4, DType::U32) => "vec4<u32>",
            (_, DType::U32) => "u32",
            (View::Vec4, _) => "vec4<f32>",
            _ => "f32",
        };
        let (get, put, stride) = match self.view {
            View::Vec4 => ("load", "store", self.layout.row_stride() / 4),
            _ => ("at", "put", self.layout.row_stride()),
        };
        let access = match self.access {
            Access::Read => "read",
            Access::ReadWrite => "read_write",
        };
        let mut text = format!(
            "@group(0) @binding({index}) var<storage, {access}> {name}: array<{element}>;\n\
             const {name}_stride: u32 = {stride}u;\n\
             fn {name}_{get}(i: u32) -> {number} {{ return {load}; }}\n"
        );
        if self.access == Access::ReadWrite && !store.is_empty() {
            text.push_str(&format!(
                "fn {name}_{put}(at: u32, value: {number}) {{ {name}[at] = {store}; }}\n"
            ));
        }
        text
    }

    /// f16 values are read as pairs in u32, which every device can unpack. So a block takes one load and four registers.
    fn declare_blocks(&self, index: usize, target: Target) -> String {
        let name = &self.name;
        let stride = self.layout.row_bytes() / 16;
        let half = self.layout.dtype() == DType::F16;
        if self.access == Access::Read || !half {
            let (element, parts, at) = match half {
                true => (
                    "vec4<u32>",
                    [("x", "y"), ("z", "w")].map(|(low, high)| {
                        format!("vec4<f32>(unpack2x16float(b.{low}), unpack2x16float(b.{high}))")
                    }),
                    format!("unpack2x16float({name}[i >> 3u][(i >> 1u) & 3u])[i & 1u]"),
                ),
                false => (
                    "vec4<f32>",
                    ["b".to_owned(), "vec4<f32>()".to_owned()],
                    format!("{name}[i >> 2u][i & 3u]"),
                ),
            };
            let [part0, part1] = parts;
            let (access, store) = match self.access {
                Access::Read => ("read", String::new()),
                Access::ReadWrite => (
                    "read_write",
                    format!(
                        "fn {name}_store(at: u32, value: vec4<f32>) {{ {name}[at] = value; }}\n"
                    ),
                ),
            };
            return format!(
                "@group(0) @binding({index}) var<storage, {access}> {name}: array<{element}>;\n\
                 const {name}_stride: u32 = {stride}u;\n\
                 fn {name}_part0(b: {element}) -> vec4<f32> {{ return {part0}; }}\n\
                 fn {name}_part1(b: {element}) -> vec4<f32> {{ return {part1}; }}\n\
                 fn {name}_at(i: u32) -> f32 {{ return {at}; }}\n\
                 {store}"
            );
        }
        let (element, value) = match target.f16 {
            true => ("vec4<f16>", ["vec4<f16>(a)", "vec4<f16>(b)"]),
            false => ("vec2<u32>", ["packed_halves(a)", "packed_halves(b)"]),
        };
        let [a, b] = value;
        format!(
            "struct {name}_block {{ a: {element}, b: {element} }}\n\
             @group(0) @binding({index}) var<storage, read_write> {name}: array<{name}_block>;\n\
             const {name}_stride: u32 = {stride}u;\n\
             fn {name}_pair(at: u32, a: vec4<f32>, b: vec4<f32>) {{ {name}[at] = {name}_block({a}, {b}); }}\n"
        )
    }
}

impl fmt::Display for Binding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}:{}[{}x{}/{}]{}{}",
            self.name,
            self.layout.dtype(),
            self.layout.rows(),
            self.layout.cols(),
            self.layout.row_bytes(),
            match self.view {
                View::Vec4 => "v",
                View::Scalar => "s",
                View::Block => "b",
            },
            match self.access {
                Access::Read => "r",
                Access::ReadWrite => "w",
            }
        )
    }
}

/// A value that is too large for f16 is stored as infinity, as with `SHADER_F16`. WGSL leaves open what `pack2x16float` does with it, and
/// truncation would give 65504, which no check for overflow would notice.
const PACKED_HALVES: &str = "\
fn packed_halves(value: vec4<f32>) -> vec2<u32> {
    let v = select(value, value * 3.4e38, abs(value) >= vec4<f32>(65520.0));
    return vec2<u32>(pack2x16float(v.xy), pack2x16float(v.zw));
}
";

pub(super) fn header(bindings: &[Binding], target: Target, cooperative: bool) -> String {
    let mut text = String::new();
    if cooperative {
        text.push_str("enable wgpu_cooperative_matrix;\n");
    }
    if target.f16 && bindings.iter().any(|b| b.layout.dtype() == DType::F16) {
        text.push_str("enable f16;\n");
    }
    let packs = |b: &Binding| b.layout.dtype() == DType::F16 && b.access == Access::ReadWrite;
    if !target.f16 && bindings.iter().any(packs) {
        text.push_str(PACKED_HALVES);
    }
    for (index, binding) in bindings.iter().enumerate() {
        text.push_str(&binding.declare(index, target));
    }
    text
}
