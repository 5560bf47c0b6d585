//! Sums over rows, columns, groups of rows and everything. Fixed order, no atomics.

use super::{
    BLOCK, Instruction, Kernel, MAX_BINDINGS, Operand, Program, Target, View, elementwise,
    row_lanes,
};
use crate::gpu::Layout;
use crate::types::{BinaryOp, Broadcast};

const SIZE: usize = 64;
/// Columns of a matrix and how their sums are shared out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ColumnSums {
    /// Number of `vec4`s of columns per workgroup.
    across: usize,
    /// Number of invocations that share the rows of a `vec4` of columns.
    down: usize,
}

impl ColumnSums {
    /// For matrices of `cols` columns.
    pub fn new(cols: usize, target: Target) -> Self {
        if target.barrier_free {
            return Self {
                across: SIZE,
                down: 1,
            };
        }
        // 16 neighbours read a whole cache line, in f16, too.
        let across = cols.div_ceil(4).next_power_of_two().min(16);
        Self {
            across,
            down: 256 / across,
        }
    }

    /// Upper bound on the parts that one invocation of [`sum_parts`](super::parts::sum_parts) adds up.
    pub const MOST: usize = 64;

    /// Number of runs of rows whose sums [`sum_parts`](super::parts::sum_parts) adds up. With 1 there is nothing to add. A number above
    /// [`Self::MOST`] is a multiple of it: then `MOST` neighbours at a time are added up first, as often as it takes.
    pub fn chunks(&self, rows: usize, cols: usize) -> usize {
        /// Number of workgroups that keep a large GPU busy.
        const BUSY: usize = 1024;
        let wanted = match self.down {
            1 => rows.div_ceil(64),
            down => {
                let tiles = cols.div_ceil(4 * self.across);
                let most = BUSY.div_ceil(tiles).min(Self::MOST);
                // An invocation with less than four rows waits more than it adds.
                let few = rows.div_ceil(4 * down).min(most);
                // Blocks of blocks of four rows each are enough.
                few.max(rows.div_ceil(4 * down * BLOCK * BLOCK))
            }
        };
        let (mut last, mut each) = (wanted, 1);
        while last > Self::MOST {
            last = last.div_ceil(Self::MOST);
            each *= Self::MOST;
        }
        last * each
    }

    /// x → y: sums over runs of rows, with one row of y per run.
    pub fn sums(&self, x: Layout, y: Layout) -> Kernel {
        self.kernel(x, y, y.rows())
            .read("x", x, View::Vec4)
            .write("y", y, View::Vec4)
    }

    /// dy, x, statistics → y: for each run of rows, Σ dy in the first half of y and Σ dy·x̂ in the second.
    pub fn layer_norm_params(&self, [dy, x, stats]: [Layout; 3], y: Layout) -> Kernel {
        self.kernel(x, y, y.rows() / 2)
            .with("param_grad", true)
            .read("x", dy, View::Vec4)
            .read("input", x, View::Vec4)
            .read("stats", stats, View::Scalar)
            .write("y", y, View::Vec4)
            .flops(4.0 * x.len() as f64)
    }

    fn kernel(&self, x: Layout, y: Layout, chunks: usize) -> Kernel {
        let rows = x.rows();
        let width = y.row_stride() / 4;
        let tiles = width.div_ceil(self.across);
        Kernel::new("column_sums")
            .groups(chunks * tiles)
            .with("across", self.across)
            .with("down", self.down)
            .with("tiles", tiles)
            .with("rows", rows)
            .with("cols", x.cols())
            .with("used", x.cols().div_ceil(4))
            .with("width", width)
            .with("chunks", chunks)
            .with("chunk", rows.div_ceil(chunks))
            .with("block", BLOCK)
            .with("param_grad", false)
            .flops(x.len() as f64)
    }
}

/// How the rows of a matrix are shared out for their sums.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowSums {
    /// Number of invocations that share a piece.
    lanes: usize,
    /// Number of pieces per workgroup.
    together: usize,
    /// Number of `vec4`s per piece.
    each: usize,
    /// Number of pieces per row. If there are several, their sums are added up in another pass.
    pub pieces: usize,
}

impl RowSums {
    /// For matrices with the layout of `x`.
    pub fn new(x: Layout, target: Target) -> Self {
        let used = x.cols().div_ceil(4);
        let (lanes, together, most) = match target.barrier_free {
            true => (1, 16, BLOCK * BLOCK),
            false => {
                let (lanes, together) = row_lanes(used, x.rows(), target);
                (lanes, together, 4 * BLOCK * lanes)
            }
        };
        let pieces = used.div_ceil(most);
        Self {
            lanes,
            together,
            each: used.div_ceil(pieces),
            pieces,
        }
    }

    /// x [.., C] → y: `[rows]`, or [rows, pieces] if there are several.
    pub fn sums(&self, x: Layout, y: Layout) -> Kernel {
        let tasks = x.rows() * self.pieces;
        Kernel::new("row_sums")
            .items(tasks * self.lanes, self.together * self.lanes)
            .with("lanes", self.lanes)
            .with("pieces", self.pieces)
            .with("each", self.each)
            .with("block", BLOCK)
            .with("rows", x.rows())
            .with("cols", x.cols())
            .with("used", x.cols().div_ceil(4))
            .read("x", x, View::Vec4)
            .write("y", y, View::Scalar)
            .flops(x.len() as f64)
    }
}

/// x [.., C] → the largest element of each row `[rows]`, and its column `[rows]`.
pub(crate) fn row_max(x: Layout, max: Layout, at: Layout, target: Target) -> Kernel {
    let used = x.cols().div_ceil(4);
    let (lanes, together) = row_lanes(used, x.rows(), target);
    Kernel::new("row_max")
        .items(x.rows() * lanes, together * lanes)
        .with("lanes", lanes)
        .with("rows", x.rows())
        .with("cols", x.cols())
        .with("used", used)
        .read("x", x, View::Vec4)
        .write("largest", max, View::Scalar)
        .write("place", at, View::Scalar)
        .flops(x.len() as f64)
}

/// A vector `[n]` that is a single [piece](RowSums::pieces) → `[1]`: its sum, or the square root of the sum.
pub(crate) fn total(x: Layout, y: Layout, root: bool, target: Target) -> Kernel {
    let lanes = if target.barrier_free { 1 } else { 256 };
    Kernel::new("total")
        .with("lanes", lanes)
        .with("size", lanes)
        .with("block", BLOCK)
        .with("cols", x.cols())
        .with("used", x.cols().div_ceil(4))
        .with("root", root)
        .read("x", x, View::Vec4)
        .write("y", y, View::Vec4)
        .flops(x.len() as f64)
}

/// Sums over each run of `period` rows, or means of the rows that a mask counts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GroupSums {
    pub period: usize,
    pub mask: Mask,
}

/// Whether a sum over runs of rows has a mask.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Mask {
    /// There is none: sums of all rows.
    None,
    /// Means of the rows, each weighted with its element of this vector.
    Weighs(Layout),
    /// Means from rows that are sums already. This vector holds the number of rows in each.
    Counts(Layout),
}

impl GroupSums {
    /// Number of invocations that share columns, and number of those that share rows.
    fn shares(width: usize, period: usize, target: Target) -> (usize, usize) {
        let across = width.next_power_of_two().min(16);
        let down = match target.barrier_free {
            true => 1,
            // Four rows each, or there is more waiting than adding.
            false => period.div_ceil(4).next_power_of_two().min(256 / across),
        };
        (across, down)
    }

    /// Number of pieces of each run that a first pass sums, for a matrix of `cols` columns. 1 if one pass is enough.
    pub fn pieces(&self, cols: usize, target: Target) -> usize {
        let (_, down) = Self::shares(cols.div_ceil(4), self.period, target);
        let most = match target.barrier_free {
            true => 4 * BLOCK * BLOCK,
            false => 4 * down * 4 * BLOCK,
        };
        self.period.div_ceil(most)
    }

    /// The first of two passes. x [rows·period, C] → `sums` [rows·pieces, C], f32, and with a mask the `counts` `[rows·pieces]`.
    pub fn first(&self, x: Layout, sums: Layout, counts: Option<Layout>, target: Target) -> Kernel {
        let pieces = sums.rows() / (x.rows() / self.period);
        let program = Program {
            rows: sums.rows(),
            cols: sums.cols(),
            operands: Vec::new(),
            instructions: vec![Instruction::Sum],
            results: vec![(0, sums)],
        };
        let kernel = self.kernel(x, pieces, program, target).with("leaves", true);
        match counts {
            Some(counts) => kernel.write("counts", counts, View::Scalar),
            None => kernel,
        }
    }

    /// The last pass, or the only one. x [rows·period, C] → program([rows, C]).
    pub fn last(&self, x: Layout, program: Program, target: Target) -> Kernel {
        self.kernel(x, 1, program, target).with("leaves", false)
    }

    fn kernel(&self, x: Layout, pieces: usize, program: Program, target: Target) -> Kernel {
        let width = program.width();
        let (across, down) = Self::shares(width, self.period, target);
        let tiles = width.div_ceil(across);
        let kernel = Kernel::new("group_sums")
            .groups(program.rows * tiles)
            .with("across", across)
            .with("down", down)
            .with("tiles", tiles)
            .with("rows", program.rows)
            .with("used", program.cols.div_ceil(4))
            .with("width", width)
            .with("period", self.period)
            .with("pieces", pieces)
            .with("each", self.period.div_ceil(pieces))
            .with("block", BLOCK)
            .with("masked", !matches!(self.mask, Mask::None))
            .with("carried", matches!(self.mask, Mask::Counts(_)))
            .read("x", x, View::Vec4)
            .flops(2.0 * x.len() as f64)
            .finish(program);
        match self.mask {
            Mask::None => kernel,
            Mask::Weighs(mask) | Mask::Counts(mask) => kernel.read("mask", mask, View::Scalar),
        }
    }
}

/// Largest number of steps per sample for which every invocation of [`masked_mean_grad`] counts the mask itself.
pub(crate) const COUNTED: usize = BLOCK * BLOCK;

/// `counts` [B·n] → y `[B·pieces]`: sums of n / pieces neighbours. A sum takes at most [`COUNTED`] of them.
pub(crate) fn mask_counts(x: Layout, y: Layout, period: usize, target: Target) -> Kernel {
    let samples = x.cols() / period;
    let pieces = y.cols() / samples;
    let (lanes, together) = match target.barrier_free {
        true => (1, 16),
        false => (64, 2),
    };
    Kernel::new("mask_counts")
        .items(y.cols() * lanes, together * lanes)
        .with("lanes", lanes)
        .with("cols", 4)
        .with("tasks", y.cols())
        .with("period", period)
        .with("pieces", pieces)
        .with("each", period.div_ceil(pieces))
        .with("block", BLOCK)
        .read("x", x, View::Scalar)
        .write("y", y, View::Scalar)
        .flops(x.len() as f64)
}

/// dy, counts `[B]` → y [B, C], f32: dy / max(count, 1).
pub(crate) fn over_counts(dy: Layout, counts: Layout, y: Layout, target: Target) -> Kernel {
    let operand = |layout, broadcast| Operand { layout, broadcast };
    let program = Program {
        rows: y.rows(),
        cols: y.cols(),
        operands: vec![
            operand(dy, Broadcast::Same),
            operand(counts, Broadcast::Rows),
        ],
        instructions: vec![
            Instruction::Load(0),
            Instruction::Load(1),
            Instruction::Constant(1.0),
            Instruction::Binary(BinaryOp::Max, 1, 2),
            Instruction::Binary(BinaryOp::Div, 0, 3),
        ],
        results: vec![(4, y)],
    };
    elementwise::elementwise(program, target)
}

/// dy [B, C], mask [B·L] → program([B·L, C]). For more than [`COUNTED`] steps, dy must be [divided by its counts](over_counts) already.
pub(crate) fn masked_mean_grad(dy: Layout, mask: Layout, program: Program) -> Kernel {
    let time = program.rows / dy.rows();
    let steps = 8;
    let runs = time.div_ceil(steps);
    let width = program.width();
    Kernel::new("masked_mean_grad")
        .items(dy.rows() * runs * width, SIZE)
        .with("samples", dy.rows())
        .with("used", program.cols.div_ceil(4))
        .with("width", width)
        .with("time", time)
        .with("steps", steps)
        .with("runs", runs)
        .with("counts", time <= COUNTED)
        .with("block", BLOCK)
        .read("dy", dy, View::Vec4)
        .read("mask", mask, View::Scalar)
        .flops(program.rows as f64 * program.cols as f64)
        .finish(program)
}

/// Upper bound on the scalars per dispatch of [`stack`].
pub(crate) const STACKED: usize = MAX_BINDINGS - 1;

/// Stores at most [`STACKED`] scalars side by side, as the elements of y from `first` on. It leaves the elements before them as they are and
/// sets those after the last scalar to zero.
pub(crate) fn stack(scalars: &[Layout], first: usize, y: Layout) -> Kernel {
    const NAMES: [&str; STACKED] = ["s0", "s1", "s2", "s3", "s4", "s5", "s6"];
    let mut kernel = Kernel::new("stack")
        .with("count", scalars.len())
        .with("first", first)
        .with("last", first + scalars.len() == y.cols());
    for (name, layout) in NAMES.into_iter().zip(scalars) {
        kernel = kernel.read(name, *layout, View::Scalar);
    }
    kernel.write("y", y, View::Scalar)
}
