//! Sums over rows, columns, groups of rows and everything. Fixed order, no atomics.

use super::{BLOCK, Kernel, MAX_BINDINGS, Program, Target, View, row_lanes};
use crate::gpu::Layout;

const SIZE: usize = 64;
/// Columns of a matrix and how their sums are shared out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ColumnSums {
    /// `vec4`s of columns a workgroup.
    across: usize,
    /// Invocations that share the rows of a `vec4` of columns.
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

    /// Parts that one invocation of [`sum_parts`](super::parts::sum_parts) adds up.
    pub const MOST: usize = 64;

    /// Runs of rows whose sums are added up by [`sum_parts`](super::parts::sum_parts); with 1 there is nothing to add. More than
    /// [`Self::MOST`] are a multiple of it: sums of so many neighbours come first, as often as it takes.
    pub fn chunks(&self, rows: usize, cols: usize) -> usize {
        /// Workgroups that keep a large GPU busy.
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

    /// x → y: sums over runs of rows, one row of y a run.
    pub fn sums(&self, x: Layout, y: Layout) -> Kernel {
        self.kernel(x, y, y.rows())
            .read("x", x, View::Vec4)
            .write("y", y, View::Vec4)
    }

    /// dy, x, statistics → y: per run of rows Σ dy in the first half of y, Σ dy·x̂ in the second.
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
    /// Invocations that share a piece.
    lanes: usize,
    /// Pieces a workgroup.
    together: usize,
    /// `vec4`s of a piece.
    each: usize,
    /// Pieces of a row. With several, sums of the pieces are summed again.
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
                (lanes, together, 2 * BLOCK * lanes)
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

/// A vector `[n]` of a single [piece](RowSums::pieces) → `[1]`: its sum, or the root of it.
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

/// x [rows·period, C] → program([rows, C]): sums over runs of rows.
pub(crate) fn group_sums(x: Layout, period: usize, program: Program, target: Target) -> Kernel {
    groups(x, period, false, program, target)
}

/// x [B·L, C], mask [B·L] → program([B, C]).
pub(crate) fn masked_mean(
    [x, mask]: [Layout; 2],
    period: usize,
    program: Program,
    target: Target,
) -> Kernel {
    let kernel = groups(x, period, true, program, target);
    kernel.read("mask", mask, View::Scalar)
}

fn groups(x: Layout, period: usize, masked: bool, program: Program, target: Target) -> Kernel {
    let width = program.width();
    let across = width.next_power_of_two().min(16);
    let down = match target.barrier_free {
        true => 1,
        // Four rows each, or there is more waiting than adding.
        false => period.div_ceil(4).next_power_of_two().min(256 / across),
    };
    let tiles = width.div_ceil(across);
    Kernel::new("group_sums")
        .groups(program.rows * tiles)
        .with("across", across)
        .with("down", down)
        .with("tiles", tiles)
        .with("rows", program.rows)
        .with("used", program.cols.div_ceil(4))
        .with("width", width)
        .with("period", period)
        .with("masked", masked)
        .read("x", x, View::Vec4)
        .flops(2.0 * x.len() as f64)
        .finish(program)
}

/// dy [B, C], mask [B·L] → program([B·L, C]).
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
        .read("dy", dy, View::Vec4)
        .read("mask", mask, View::Scalar)
        .flops(program.rows as f64 * program.cols as f64)
        .finish(program)
}

/// Scalars that one dispatch of [`stack`] takes.
pub(crate) const STACKED: usize = MAX_BINDINGS - 1;

/// At most [`STACKED`] scalars side by side, as elements `first`.. of y; the others are left as they are, but for what follows the last.
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
