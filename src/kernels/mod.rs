//! From a static description to WGSL, with one module per kernel family: the twin of `wgsl/`.
//!
//! Shapes are constants in the source, so that the driver compiles for exactly these shapes. A kernel's key is its whole description.
//!
//! # Why no kernel leaves its memory
//!
//! Kernels run without bounds checks. So every index of a load or store must be inside its binding, even if the loaded value is not used.
//! Each template says why its indices are (*Inside*), from these facts:
//!
//! - A binding holds its layout: rows times stride, padding included. Row r < rows and column c < stride are inside. In `vec4`s, `used` is
//!   what carries data, ⌈cols / 4⌉, and `width` the widest stride of the results; `used` ≤ stride of every operand of the same columns.
//! - [`Kernel::items`], [`Kernel::groups`] and [`Kernel::tiles`] start enough workgroups. A folded grid has surplus ones, and the last
//!   workgroup surplus invocations: they leave by comparing their number, whole workgroups before the first barrier, or repeat the
//!   last row and store nothing.
//! - `finish(row, col, …)` is called for a row and a column of the program, col < `width`. It loads operands for col < `used` only, and
//!   stores a result where col is below that result's stride.
//! - No index wraps: a layout has at most 2³² bytes, so 2³⁰ elements of f32 and 2²⁸ `vec4`s.
//! - Ids are checked on the host before they are uploaded. Kernels clamp or compare them all the same.
//!
//! The module `checked` executes the text of every kernel at awkward shapes, for every tier, and fails where an access is outside.

pub(crate) mod attention;
#[cfg(test)]
mod attention_tests;
pub(crate) mod conv;
mod declare;
pub(crate) mod decode;
pub(crate) mod elementwise;
pub(crate) mod embedding;
mod functions;
pub(crate) mod gemm;
mod gemm_choice;
mod gemm_conv;
mod gemm_cooperative;
pub(crate) mod gemm_windows;
pub(crate) mod layer_norm;
pub(crate) mod loss;
pub(crate) mod optimizer;
pub(crate) mod parts;
mod program;
pub(crate) mod reduce;
pub(crate) mod softmax;
pub(crate) mod templates;
pub(crate) mod top_k;

use std::collections::BTreeMap;

pub(crate) use declare::{Binding, View};
pub(crate) use program::{Dropout, Instruction, Operand, Program};

use crate::error::Result;
use crate::gpu::{Access, Capabilities, Layout, MatrixUnits, TrustedSource};

/// Storage buffers that a kernel may bind: WebGPU's baseline limit.
pub(crate) const MAX_BINDINGS: usize = 8;
const MAX_GRID: u32 = 65_535;

/// Number of terms that are added to one register in a row. Every addition rounds, and with equal terms always to the same side. So longer
/// sums are sums of such blocks: 16 terms lose at most 3e-7 and blocks of blocks little more, but 16 384 terms in a row lose up to 2e-4.
pub(crate) const BLOCK: usize = 16;

/// Widest row, in `vec4`s, that one invocation computes alone in barrier-free kernels. Mesa's software driver ends the loops of an invocation
/// after 65 535 iterations in total, without an error, so wider rows need more invocations. An invocation takes at most two iterations per
/// `vec4`, for LayerNorm an eighth more. Within the bound, 256 invocations read rows of 128 MB in f32.
const ALONE: usize = 16_384;

/// Properties of the adapter that change the generated source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Target {
    /// The device has `SHADER_F16`; without it f16 storage goes through `pack2x16float`.
    pub f16: bool,
    /// Use variants without barriers and workgroup memory, which cost more than repeated loads on software adapters.
    pub barrier_free: bool,
    /// Matrix units for products of f16 operands, and of f32 operands if they support them.
    pub matrix_units: Option<MatrixUnits>,
    /// Upper bound on the invocations per workgroup.
    pub invocations: u32,
    /// Number of cores that run workgroups at once.
    pub cores: usize,
}

impl Target {
    pub fn new(capabilities: &Capabilities) -> Self {
        let limits = &capabilities.limits;
        Self {
            f16: capabilities.f16,
            barrier_free: capabilities.barrier_free,
            matrix_units: capabilities.matrix_units,
            invocations: limits
                .max_compute_invocations_per_workgroup
                .min(limits.max_compute_workgroup_size_x),
            cores: capabilities.cores,
        }
    }
}

/// Amount of work of one dispatch, for bounds and profiles.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Cost {
    /// Floating-point operations, a multiply-add counted as two.
    pub flops: f64,
    /// Bytes of every operand, each counted once.
    pub bytes: f64,
}

/// A kernel for exactly one static shape.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    template: &'static str,
    numbers: BTreeMap<&'static str, minijinja::Value>,
    reads: Vec<Binding>,
    writes: Vec<Binding>,
    program: Option<Program>,
    /// Uses matrix units.
    cooperative: bool,
    /// The program takes two `vec4`s at a time and stores them as one [`View::Block`].
    pairs: bool,
    /// The operand that result 0 of the program overwrites.
    over: Option<&'static str>,
    workgroups: [u32; 3],
    flops: f64,
}

impl Kernel {
    fn new(template: &'static str) -> Self {
        Self {
            template,
            numbers: BTreeMap::new(),
            reads: Vec::new(),
            writes: Vec::new(),
            program: None,
            cooperative: false,
            pairs: false,
            over: None,
            workgroups: [1, 1, 1],
            flops: 0.0,
        }
    }

    /// Sets a variable of the template.
    fn with(mut self, name: &'static str, number: impl Into<minijinja::Value>) -> Self {
        self.numbers.insert(name, number.into());
        self
    }

    fn read(mut self, name: &'static str, layout: Layout, view: View) -> Self {
        self.reads
            .push(Binding::new(name, layout, view, Access::Read));
        self
    }

    fn write(mut self, name: &'static str, layout: Layout, view: View) -> Self {
        self.writes
            .push(Binding::new(name, layout, view, Access::ReadWrite));
        self
    }

    /// As [`Kernel::read`], for a kernel that touches only the first `needs` bytes of the binding.
    fn read_part(mut self, name: &'static str, layout: Layout, view: View, needs: u64) -> Self {
        let binding = Binding::new(name, layout, view, Access::Read);
        self.reads.push(Binding { needs, ..binding });
        self
    }

    /// As [`Kernel::write`], for a kernel that touches only the first `needs` bytes of the binding.
    fn write_part(mut self, name: &'static str, layout: Layout, view: View, needs: u64) -> Self {
        let binding = Binding::new(name, layout, view, Access::ReadWrite);
        self.writes.push(Binding { needs, ..binding });
        self
    }

    /// Sets the program that every `vec4` of the result goes through.
    fn finish(mut self, program: Program) -> Self {
        self.program = Some(program);
        self
    }

    fn cooperative(mut self) -> Self {
        self.cooperative = true;
        self
    }

    /// As [`Kernel::finish`], with two neighbouring `vec4`s at a time, for a program that [stores pairs](Program::stores_pairs).
    fn finish_pairs(mut self, program: Program) -> Self {
        self.program = Some(program);
        self.pairs = true;
        self
    }

    /// As [`Kernel::finish`], with result 0 of the program stored over operand `name`, element by element. Both share a binding.
    fn finish_over(mut self, name: &'static str, program: Program) -> Self {
        for binding in self.reads.iter_mut().filter(|read| read.name == name) {
            binding.access = Access::ReadWrite;
        }
        self.over = Some(name);
        self.finish(program)
    }

    fn flops(mut self, flops: f64) -> Self {
        self.flops = flops;
        self
    }

    /// Starts one workgroup per tile, for a number of columns, rows and layers of tiles. A grid that is too long in a dimension is folded
    /// into two dimensions. The template finds its tile with `shared/tile`.
    fn tiles(mut self, [columns, rows, layers]: [usize; 3]) -> Self {
        if [columns, rows, layers]
            .iter()
            .all(|&n| n <= MAX_GRID as usize)
        {
            self.workgroups = [columns, rows, layers].map(|n| n as u32);
            return self.with("folded", false);
        }
        self.groups(columns * rows * layers)
            .with("folded", true)
            .with("grid_columns", columns)
            .with("grid_rows", rows)
            .with("grid_layers", layers)
    }

    /// Starts enough workgroups of `size` invocations for `items`, folded into two dimensions. The template finds the number of its
    /// workgroup as `group_id(wid)`.
    fn items(self, items: usize, size: usize) -> Self {
        self.groups(items.div_ceil(size)).with("size", size)
    }

    /// Starts this many workgroups, folded into two dimensions. No kernel has as many as 2³¹: a layout has at most 2²⁸ `vec4`s, each row
    /// has at least 4, and at most 8 times as many invocations share a row.
    fn groups(mut self, groups: usize) -> Self {
        debug_assert!(groups < 1 << 31, "{groups} workgroups");
        let groups = groups as u32;
        let x = groups.min(MAX_GRID);
        self.workgroups = [x, groups.div_ceil(x), 1];
        self.with("grid_x", x)
    }

    /// Bindings in `@binding` order: the kernel's reads, the program's operands, the kernel's writes, and the program's results except one
    /// that overwrites an operand.
    pub fn bindings(&self) -> Vec<Binding> {
        let mut all = self.reads.clone();
        if let Some(program) = &self.program {
            all.extend(program.read_bindings());
        }
        all.extend(self.writes.iter().cloned());
        if let Some(program) = &self.program {
            let results = program
                .write_bindings()
                .skip(usize::from(self.over.is_some()));
            all.extend(results.map(|binding| match self.pairs {
                true => Binding {
                    view: View::Block,
                    ..binding
                },
                false => binding,
            }));
        }
        all
    }

    /// Workgroups per dimension.
    pub fn workgroups(&self) -> [u32; 3] {
        self.workgroups
    }

    /// Name of the template: family and variant.
    pub fn name(&self) -> &'static str {
        self.template
    }

    /// The whole description. Kernels with equal keys have equal sources.
    pub fn key(&self, target: Target) -> String {
        use std::fmt::Write;
        let mut key = self.template.to_owned();
        // Writing to a String cannot fail.
        for (name, number) in &self.numbers {
            let _ = write!(key, " {name}={number}");
        }
        for binding in self.bindings() {
            let _ = write!(key, " {binding}");
        }
        if let Some(program) = &self.program {
            let _ = write!(key, " {{ {program} }}");
        }
        let _ = write!(key, " f16={}", target.f16);
        key
    }

    /// The WGSL source and its bindings.
    pub fn source(&self, target: Target) -> Result<TrustedSource> {
        let bindings = self.bindings();
        let mut header = declare::header(&bindings, target, self.cooperative);
        if let Some(name) = self.over {
            header.push_str(&format!(
                "const q0_stride: u32 = {name}_stride;\n\
                 fn q0_store(at: u32, value: vec4<f32>) {{ {name}_store(at, value); }}\n"
            ));
        }
        if let Some(program) = &self.program {
            header.push_str(&match self.pairs {
                true => program.pair_wgsl(),
                false => program.wgsl(),
            });
        }
        let wgsl = templates::render(self.template, &header, &self.numbers)?;
        let needs = |binding: &Binding| (binding.access, binding.needs);
        let bindings = bindings.iter().map(needs).collect();
        Ok(TrustedSource { wgsl, bindings })
    }

    /// Operations and bytes of one dispatch.
    pub fn cost(&self) -> Cost {
        // What is overwritten is read and written.
        let over = self
            .reads
            .iter()
            .filter(|read| Some(&*read.name) == self.over);
        let bytes = self.bindings().iter().chain(over).map(Binding::bytes).sum();
        let flops = self.flops + self.program.as_ref().map_or(0.0, Program::flops);
        Cost { flops, bytes }
    }
}

/// Number of invocations that share a row of `width` `vec4`s, and number of rows per workgroup.
fn row_lanes(width: usize, rows: usize, target: Target) -> (usize, usize) {
    if target.barrier_free {
        return if width <= ALONE { (1, 16) } else { (256, 1) };
    }
    // Few rows: spread each over more invocations, so that the GPU is not idle.
    let most = if rows < 1024 { 256 } else { 64 };
    let lanes = width.next_power_of_two().clamp(8, most);
    (lanes, (128 / lanes).max(1))
}
