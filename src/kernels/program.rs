//! Elementwise programs: what fusion puts behind a kernel's sums, or what makes up a kernel of its own.

use std::fmt::{self, Write};

use super::{Binding, View};
use crate::gpu::{Access, Layout};
use crate::types::{BinaryOp, Broadcast, DType, UnaryOp};

/// A value that a program loads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Operand {
    pub layout: Layout,
    pub broadcast: Broadcast,
}

/// Which elements are dropped: see [`Op::Dropout`](crate::graph::Op::Dropout).
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Dropout {
    pub rate: f32,
    pub stream: u32,
}

/// One step; yields register number = its position.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Instruction {
    /// What the kernel computed at this place.
    Sum,
    /// Operand by number.
    Load(usize),
    /// What result number i holds before this kernel stores it: sums over several dispatches. The kernel must yield every place once.
    Present(usize),
    Constant(f32),
    Unary(UnaryOp, usize),
    Binary(BinaryOp, usize, usize),
    /// Of a register, by the counter in the first lane of another.
    Dropout(Dropout, usize, usize),
}

/// A function of every `vec4` of a rows × cols domain, computed in f32, with any number of loads and stores.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Program {
    pub rows: usize,
    pub cols: usize,
    pub operands: Vec<Operand>,
    pub instructions: Vec<Instruction>,
    /// Registers to store, and how.
    pub results: Vec<(usize, Layout)>,
}

impl Program {
    /// `vec4`s from one row to the next of the widest result: the columns a kernel has to cover, padding included.
    pub fn width(&self) -> usize {
        self.results
            .iter()
            .map(|(_, layout)| layout.row_stride() / 4)
            .max()
            .unwrap_or(0)
    }

    pub fn flops(&self) -> f64 {
        let steps = self.instructions.iter().filter(|instruction| {
            matches!(
                instruction,
                Instruction::Unary(..) | Instruction::Binary(..) | Instruction::Dropout(..)
            )
        });
        (steps.count() * self.rows * self.cols) as f64
    }

    pub fn read_bindings(&self) -> impl Iterator<Item = Binding> {
        self.operands.iter().enumerate().map(|(i, operand)| {
            let view = match operand.broadcast {
                Broadcast::Rows | Broadcast::Scalar => View::Scalar,
                _ => View::Vec4,
            };
            Binding::new(format!("p{i}"), operand.layout, view, Access::Read)
        })
    }

    pub fn write_bindings(&self) -> impl Iterator<Item = Binding> {
        self.results.iter().enumerate().map(|(i, (_, layout))| {
            Binding::new(format!("q{i}"), *layout, View::Vec4, Access::ReadWrite)
        })
    }

    /// Whether `finish_pair` can store the only result 16 bytes at a time.
    pub fn stores_pairs(&self) -> bool {
        let present = |step: &Instruction| matches!(step, Instruction::Present(_));
        matches!(&*self.results, [(_, layout)] if layout.dtype() == DType::F16)
            && !self.instructions.iter().any(present)
    }

    /// `finish(row, col, sum)`: `col` counts `vec4`s and may lie in the padding, which becomes zero.
    pub fn wgsl(&self) -> String {
        let used = self.cols.div_ceil(4);
        let width = self.width();
        let mut body = self.registers();
        let masked = !self.cols.is_multiple_of(4);
        let mut padding = String::new();
        for (i, (register, layout)) in self.results.iter().enumerate() {
            let at = format!("row * q{i}_stride + col");
            let value = match masked {
                true => format!("select(vec4<f32>(), r{register}, valid)"),
                false => format!("r{register}"),
            };
            let _ = writeln!(body, "    q{i}_store({at}, {value});");
            let stride = layout.row_stride() / 4;
            if stride == width {
                let _ = writeln!(padding, "        q{i}_store({at}, vec4<f32>());");
            } else if stride > used {
                let _ = writeln!(
                    padding,
                    "        if (col < q{i}_stride) {{ q{i}_store({at}, vec4<f32>()); }}"
                );
            }
        }
        let padding = match width > used {
            true => format!("    if (col >= {used}u) {{\n{padding}        return;\n    }}\n"),
            false => String::new(),
        };
        let functions = self.functions();
        format!("{functions}fn finish(row: u32, col: u32, sum: vec4<f32>) {{\n{padding}{body}}}\n")
    }

    /// `finish_pair(row, i, a, b)`: two neighbouring `vec4`s, numbers 2i and 2i + 1, of a program that
    /// [stores pairs](Self::stores_pairs).
    pub fn pair_wgsl(&self) -> String {
        let used = self.cols.div_ceil(4);
        let register = self.results.first().map_or(0, |(register, _)| *register);
        let padding = match self.width() > used {
            true => format!("    if (col >= {used}u) {{ return vec4<f32>(); }}\n"),
            false => String::new(),
        };
        let value = match self.cols.is_multiple_of(4) {
            true => format!("r{register}"),
            false => format!("select(vec4<f32>(), r{register}, valid)"),
        };
        format!(
            "{}fn finished(row: u32, col: u32, sum: vec4<f32>) -> vec4<f32> {{\n{padding}{}    return {value};\n}}\n\
             fn finish_pair(row: u32, i: u32, a: vec4<f32>, b: vec4<f32>) {{\n    \
             q0_pair(row * q0_stride + i, finished(row, 2u * i, a), finished(row, 2u * i + 1u, b));\n}}\n",
            self.functions(),
            self.registers(),
        )
    }

    /// The instructions, a register each, and `valid`, the lanes that are no padding, where there may be some.
    fn registers(&self) -> String {
        let mut body = String::new();
        // Writing to a String cannot fail.
        for (r, instruction) in self.instructions.iter().enumerate() {
            let value = match *instruction {
                Instruction::Sum => "sum".to_owned(),
                Instruction::Load(i) => self.load(i),
                Instruction::Present(i) => format!("q{i}_load(row * q{i}_stride + col)"),
                Instruction::Constant(number) => format!("vec4<f32>({})", literal(number)),
                Instruction::Unary(op, x) => unary(op, &format!("r{x}")),
                Instruction::Binary(op, a, b) => binary(op, &format!("r{a}"), &format!("r{b}")),
                Instruction::Dropout(dropout, x, counter) => self.dropout(dropout, x, counter),
            };
            let _ = writeln!(body, "    let r{r} = {value};");
        }
        if !self.cols.is_multiple_of(4) {
            let _ = writeln!(
                body,
                "    let valid = vec4<u32>(0u, 1u, 2u, 3u) + 4u * col < vec4<u32>({}u);",
                self.cols
            );
        }
        body
    }

    fn load(&self, i: usize) -> String {
        match self.operands[i].broadcast {
            Broadcast::Same => format!("p{i}_load(row * p{i}_stride + col)"),
            Broadcast::Cols => format!("p{i}_load(col)"),
            Broadcast::Rows => format!("vec4<f32>(p{i}_at(row))"),
            Broadcast::Scalar => format!("vec4<f32>(p{i}_at(0u))"),
            Broadcast::Groups { period } => {
                format!("p{i}_load(row / {period}u * p{i}_stride + col)")
            }
        }
    }

    fn dropout(&self, Dropout { rate, stream }: Dropout, x: usize, counter: usize) -> String {
        let vectors = self.cols.div_ceil(4);
        // Exact but for the last rounding: rate < 1 has 24 bits.
        let threshold = (f64::from(rate) * 2f64.powi(32)).round() as u32;
        let scale = literal((1.0 / (1.0 - f64::from(rate))) as f32);
        format!(
            "select(vec4<f32>(), {scale} * r{x}, pcg4d(vec4<u32>(row * {vectors}u + col, {stream}u, u32(r{counter}.x), 0u)) >= vec4<u32>({threshold}u))"
        )
    }

    /// Helper functions that the instructions call.
    fn functions(&self) -> String {
        let uses = |wanted: UnaryOp| {
            self.instructions
                .iter()
                .any(|instruction| match instruction {
                    Instruction::Unary(op, _) => *op == wanted,
                    Instruction::Binary(BinaryOp::UnaryGrad(op), ..) => *op == wanted,
                    _ => false,
                })
        };
        let mut text = String::new();
        if uses(UnaryOp::GeluTanh) {
            text.push_str(GELU_TANH);
        }
        if uses(UnaryOp::GeluErf) {
            text.push_str(GELU_ERF);
        }
        let drops = |step: &Instruction| matches!(step, Instruction::Dropout(..));
        if self.instructions.iter().any(drops) {
            text.push_str(PCG4D);
        }
        text
    }
}

/// (1 + tanh u)/2 = 1/(1 + exp(−2u)), which does not cancel for negative x. The exponent is clamped to what f32 holds; beyond
/// ±10 the second term of the derivative is zero, which x³ must not turn into NaN.
const GELU_TANH: &str = "\
fn gelu_tanh_gate(x: vec4<f32>) -> vec4<f32> {
    return 1.0 / (1.0 + exp(clamp(-1.5957691216 * (x + 0.044715 * x * x * x), vec4<f32>(-88.0), vec4<f32>(88.0))));
}
fn gelu_tanh(x: vec4<f32>) -> vec4<f32> {
    return x * gelu_tanh_gate(x);
}
fn gelu_tanh_grad(x: vec4<f32>) -> vec4<f32> {
    let s = gelu_tanh_gate(x);
    let c = clamp(x, vec4<f32>(-10.0), vec4<f32>(10.0));
    return s + c * s * (1.0 - s) * 1.5957691216 * (1.0 + 0.134145 * c * c);
}
";

/// erf by Abramowitz & Stegun 7.1.26, absolute error at most 1.5e-7.
const GELU_ERF: &str = "\
fn erf(x: vec4<f32>) -> vec4<f32> {
    let a = min(abs(x), vec4<f32>(6.0));
    let t = 1.0 / (1.0 + 0.3275911 * a);
    let p = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
    return sign(x) * (1.0 - p * exp(-a * a));
}
fn gelu_erf(x: vec4<f32>) -> vec4<f32> {
    return 0.5 * x * (1.0 + erf(0.7071067812 * x));
}
fn gelu_erf_grad(x: vec4<f32>) -> vec4<f32> {
    return 0.5 * (1.0 + erf(0.7071067812 * x)) + 0.3989422804 * x * exp(-0.5 * min(x * x, vec4<f32>(160.0)));
}
";

/// Four numbers hashed into four: Jarzynski & Olano, Hash Functions for GPU Rendering, JCGT 9(3), 2020.
const PCG4D: &str = "\
fn pcg4d(numbers: vec4<u32>) -> vec4<u32> {
    var v = numbers * 1664525u + 1013904223u;
    v.x += v.y * v.w;
    v.y += v.z * v.x;
    v.z += v.x * v.y;
    v.w += v.y * v.z;
    v ^= v >> vec4<u32>(16u);
    v.x += v.y * v.w;
    v.y += v.z * v.x;
    v.z += v.x * v.y;
    v.w += v.y * v.z;
    return v;
}
";

/// A WGSL f32 literal; infinities and NaN, which WGSL cannot write, come from their bits.
fn literal(number: f32) -> String {
    if number.is_finite() {
        format!("f32({number:?})")
    } else {
        format!("bitcast<f32>({}u)", number.to_bits())
    }
}

fn unary(op: UnaryOp, x: &str) -> String {
    match op {
        UnaryOp::Identity => x.to_owned(),
        UnaryOp::Affine { scale, offset } => {
            let scaled = match scale {
                1.0 => x.to_owned(),
                scale => format!("{} * {x}", literal(scale)),
            };
            match offset {
                0.0 => scaled,
                offset => format!("{scaled} + {}", literal(offset)),
            }
        }
        UnaryOp::Clamp { min, max } => format!(
            "clamp({x}, vec4<f32>({}), vec4<f32>({}))",
            literal(min),
            literal(max)
        ),
        UnaryOp::Abs => format!("abs({x})"),
        UnaryOp::Square => format!("{x} * {x}"),
        UnaryOp::Sqrt => format!("sqrt({x})"),
        UnaryOp::Rsqrt => format!("inverseSqrt({x})"),
        UnaryOp::Recip => format!("1.0 / {x}"),
        UnaryOp::Exp => format!("exp({x})"),
        UnaryOp::Log => format!("log({x})"),
        UnaryOp::Cos => format!("cos({x})"),
        UnaryOp::Tanh => format!("tanh(clamp({x}, vec4<f32>(-10.0), vec4<f32>(10.0)))"),
        UnaryOp::Sigmoid => sigmoid(x),
        UnaryOp::Relu => format!("max({x}, vec4<f32>())"),
        UnaryOp::GeluTanh => format!("gelu_tanh({x})"),
        UnaryOp::GeluErf => format!("gelu_erf({x})"),
        // From the bits: compilers may assume that floats are finite.
        UnaryOp::IsFinite => format!(
            "select(vec4<f32>(), vec4<f32>(1.0), (bitcast<vec4<u32>>({x}) & vec4<u32>(0x7f800000u)) != vec4<u32>(0x7f800000u))"
        ),
    }
}

fn sigmoid(x: &str) -> String {
    format!("1.0 / (1.0 + exp(clamp(-{x}, vec4<f32>(-88.0), vec4<f32>(88.0))))")
}

fn binary(op: BinaryOp, a: &str, b: &str) -> String {
    match op {
        BinaryOp::Add => format!("{a} + {b}"),
        BinaryOp::Sub => format!("{a} - {b}"),
        BinaryOp::Mul => format!("{a} * {b}"),
        BinaryOp::Div => format!("{a} / {b}"),
        BinaryOp::Max => format!("max({a}, {b})"),
        BinaryOp::Min => format!("min({a}, {b})"),
        BinaryOp::Greater => format!("select(vec4<f32>(), vec4<f32>(1.0), {a} > {b})"),
        BinaryOp::UnaryGrad(op) => format!("{b} * ({})", derivative(op, a)),
    }
}

fn derivative(op: UnaryOp, x: &str) -> String {
    match op {
        UnaryOp::Identity => "vec4<f32>(1.0)".to_owned(),
        UnaryOp::Affine { scale, .. } => format!("vec4<f32>({})", literal(scale)),
        UnaryOp::Clamp { min, max } => format!(
            "select(vec4<f32>(), vec4<f32>(1.0), {x} >= vec4<f32>({})) * select(vec4<f32>(), vec4<f32>(1.0), {x} <= vec4<f32>({}))",
            literal(min),
            literal(max)
        ),
        UnaryOp::Abs => format!("sign({x})"),
        UnaryOp::Square => format!("2.0 * {x}"),
        UnaryOp::Sqrt => format!("0.5 * inverseSqrt({x})"),
        UnaryOp::Rsqrt => format!("-0.5 * inverseSqrt({x}) / {x}"),
        UnaryOp::Recip => format!("-1.0 / ({x} * {x})"),
        UnaryOp::Exp => format!("exp({x})"),
        UnaryOp::Log => format!("1.0 / {x}"),
        UnaryOp::Cos => format!("-sin({x})"),
        UnaryOp::Tanh => {
            let y = unary(UnaryOp::Tanh, x);
            format!("1.0 - {y} * {y}")
        }
        UnaryOp::Sigmoid => {
            let y = sigmoid(x);
            format!("({y}) * (1.0 - {y})")
        }
        UnaryOp::Relu => format!("select(vec4<f32>(), vec4<f32>(1.0), {x} > vec4<f32>())"),
        UnaryOp::GeluTanh => format!("gelu_tanh_grad({x})"),
        UnaryOp::GeluErf => format!("gelu_erf_grad({x})"),
        UnaryOp::IsFinite => "vec4<f32>()".to_owned(),
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}:", self.rows, self.cols)?;
        for (r, instruction) in self.instructions.iter().enumerate() {
            match instruction {
                Instruction::Sum => write!(f, " r{r}=sum")?,
                Instruction::Load(i) => {
                    write!(f, " r{r}=load p{i} {:?}", self.operands[*i].broadcast)?;
                }
                Instruction::Present(i) => write!(f, " r{r}=present q{i}")?,
                Instruction::Constant(number) => write!(f, " r{r}={number:?}")?,
                Instruction::Unary(op, x) => write!(f, " r{r}={op:?}(r{x})")?,
                Instruction::Binary(op, a, b) => write!(f, " r{r}={op:?}(r{a},r{b})")?,
                Instruction::Dropout(Dropout { rate, stream }, x, counter) => {
                    write!(f, " r{r}=Dropout {rate:?} {stream:08x}(r{x},r{counter})")?;
                }
            }
        }
        for (i, (register, _)) in self.results.iter().enumerate() {
            write!(f, " q{i}=r{register}")?;
        }
        Ok(())
    }
}
