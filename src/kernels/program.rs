//! Elementwise programs: what fusion adds after a kernel's sums, or a kernel of its own.

use std::fmt::{self, Write};

use super::functions::{binary, library, literal, unary};
use super::{Binding, View};
use crate::gpu::{Access, Layout};
use crate::types::{BinaryOp, Broadcast, DType, UnaryOp};

/// A value that a program loads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Operand {
    pub layout: Layout,
    pub broadcast: Broadcast,
}

/// Which elements are dropped, as the operation `Dropout` of graphs describes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Dropout {
    pub rate: f32,
    pub stream: u32,
}

/// One instruction. Instruction number i yields register number i.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Instruction {
    /// The value that the kernel computed at this place.
    Sum,
    /// Loads the operand of this index.
    Load(usize),
    /// Loads what result number i holds before this kernel stores it, for sums over several dispatches. The kernel must yield every place
    /// once.
    Present(usize),
    Constant(f32),
    Unary(UnaryOp, usize),
    Binary(BinaryOp, usize, usize),
    /// Dropout of a register, with the counter in the first lane of another.
    Dropout(Dropout, usize, usize),
}

/// A function of every `vec4` of a rows × cols domain, computed in f32, with any number of loads and stores.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Program {
    pub rows: usize,
    pub cols: usize,
    pub operands: Vec<Operand>,
    pub instructions: Vec<Instruction>,
    /// Registers to store, each with the layout of its result.
    pub results: Vec<(usize, Layout)>,
}

impl Program {
    /// Row stride of the widest result in `vec4`s: the columns that a kernel has to cover, padding included.
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

    /// WGSL of `finish(row, col, sum)`. `col` counts `vec4`s and may lie in the padding, which becomes zero.
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
        let functions = library(&body);
        format!("{functions}fn finish(row: u32, col: u32, sum: vec4<f32>) {{\n{padding}{body}}}\n")
    }

    /// WGSL of `finish_pair(row, i, a, b)`, which takes the neighbouring `vec4`s 2i and 2i + 1, for a program that
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
        let registers = self.registers();
        format!(
            "{}fn finished(row: u32, col: u32, sum: vec4<f32>) -> vec4<f32> {{\n{padding}{}    return {value};\n}}\n\
             fn finish_pair(row: u32, i: u32, a: vec4<f32>, b: vec4<f32>) {{\n    \
             q0_pair(row * q0_stride + i, finished(row, 2u * i, a), finished(row, 2u * i + 1u, b));\n}}\n",
            library(&registers),
            registers,
        )
    }

    /// WGSL of the instructions, one register per instruction, and of `valid`, the lanes outside the padding, if a row may have padding.
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
                Instruction::Binary(op, a, b) => self.binary(op, a, b),
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

    /// Compilers may replace a − a and 0·a by zero and a/a by one, also if a is NaN or infinite. Where the program shows such a case, the
    /// source computes the result from the bits of a.
    fn binary(&self, op: BinaryOp, a: usize, b: usize) -> String {
        let is_zero = |r: usize| self.instructions[r] == Instruction::Constant(0.0);
        let same = self.instructions[a] == self.instructions[b];
        let vanishing = |r: usize| format!("or_undefined(vec4<f32>(), r{r})");
        match op {
            BinaryOp::Sub if same => vanishing(a),
            BinaryOp::Div if same => format!(
                "or_undefined(vec4<f32>(1.0), select(r{a}, vec4<f32>({}), r{a} == vec4<f32>()))",
                literal(f32::INFINITY)
            ),
            BinaryOp::Mul if is_zero(b) => vanishing(a),
            BinaryOp::Mul if is_zero(a) => vanishing(b),
            _ => binary(op, &format!("r{a}"), &format!("r{b}")),
        }
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
            Broadcast::Tiles { period } => {
                format!("p{i}_load(row % {period}u * p{i}_stride + col)")
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
