//! Knowledge-distillation loss and cross entropy.

use super::{ALONE, BLOCK, Kernel, Program, Target, View, row_lanes};
use crate::gpu::Layout;
use crate::types::DType;

const SIZE: usize = 64;

/// y, t [B, E] → rows [B, 4].
pub(crate) fn kd_rows(y: Layout, t: Layout, rows: Layout, target: Target) -> Kernel {
    let used = y.cols().div_ceil(4);
    let (lanes, each) = row_lanes(used, y.rows(), target);
    Kernel::new("kd_loss")
        .items(y.rows() * lanes, each * lanes)
        .with("lanes", lanes)
        .with("rows", y.rows())
        .with("cols", y.cols())
        .with("used", used)
        .with("block", BLOCK)
        .read("y", y, View::Vec4)
        .read("t", t, View::Vec4)
        .write("rows", rows, View::Vec4)
        .flops(9.0 * y.len() as f64)
}

/// How the rows of a loss are shared out for their sum.
#[derive(Clone, Copy, Debug)]
struct Shares {
    /// Number of invocations per workgroup.
    lanes: usize,
    /// Number of rows per workgroup.
    each: usize,
    groups: usize,
}

impl Shares {
    fn new(rows: usize, lanes: usize, target: Target) -> Self {
        let lanes = if target.barrier_free { 1 } else { lanes };
        let groups = rows.div_ceil(lanes * BLOCK * BLOCK);
        let each = rows.div_ceil(groups);
        Self {
            lanes,
            each,
            groups,
        }
    }

    fn kernel(self, template: &'static str, rows: usize) -> Kernel {
        Kernel::new(template)
            .groups(self.groups)
            .with("lanes", self.lanes)
            .with("size", self.lanes)
            .with("each", self.each)
            .with("groups", self.groups)
            .with("block", BLOCK)
            .with("rows", rows)
            .with("cols", 4)
    }
}

/// Mean cosine and mean squared error, from the rows that [`kd_rows`] computes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KdTotal {
    /// Number of samples, B.
    pub samples: usize,
    /// Number of columns, E.
    pub width: usize,
    pub alpha: f32,
    pub beta: f32,
}

/// Invocations that share the rows of a distillation loss, and of a cross entropy.
const KD_LANES: usize = 64;
const ENTROPY_LANES: usize = 256;

impl KdTotal {
    /// Number of partial sums that a first pass computes. With 1, a single pass is enough.
    pub fn parts(&self, target: Target) -> usize {
        Shares::new(self.samples, KD_LANES, target).groups
    }

    /// The first of two passes. rows [B, 4] → `sums` [parts, 4].
    pub fn first(&self, rows: Layout, sums: Layout, target: Target) -> Kernel {
        let shares = Shares::new(self.samples, KD_LANES, target);
        self.kernel(shares, rows, false)
            .write("parts", sums, View::Vec4)
    }

    /// rows [B, 4], or, with `from_parts`, the sum `[4]` of the first pass → loss, cosine, mse.
    pub fn last(
        &self,
        rows: Layout,
        from_parts: bool,
        scalars: [Layout; 3],
        target: Target,
    ) -> Kernel {
        let rest = if from_parts { 1 } else { self.samples };
        let shares = Shares::new(rest, KD_LANES, target);
        self.kernel(shares, rows, from_parts)
            .write("loss", scalars[0], View::Vec4)
            .write("cosine", scalars[1], View::Vec4)
            .write("mse", scalars[2], View::Vec4)
    }

    fn kernel(&self, shares: Shares, rows: Layout, from_parts: bool) -> Kernel {
        shares
            .kernel("kd_loss_total", rows.rows())
            .with("from_parts", from_parts)
            .with("samples", self.samples)
            .with("elements", self.samples * self.width)
            .with("alpha", f64::from(self.alpha))
            .with("beta", f64::from(self.beta))
            .read("rows", rows, View::Vec4)
    }
}

/// y, t, rows, dloss → program(dy).
pub(crate) fn kd_grad(
    [y, t, rows, dloss]: [Layout; 4],
    [alpha, beta]: [f32; 2],
    program: Program,
) -> Kernel {
    let width = program.width();
    Kernel::new("kd_loss_grad")
        .items(y.rows() * width, SIZE)
        .with("rows", y.rows())
        .with("used", y.cols().div_ceil(4))
        .with("width", width)
        .with("elements", y.len())
        .with("alpha", f64::from(alpha))
        .with("beta", f64::from(beta))
        .read("y", y, View::Vec4)
        .read("t", t, View::Vec4)
        .read("rows", rows, View::Vec4)
        .read("dloss", dloss, View::Scalar)
        .flops(8.0 * y.len() as f64)
        .finish(program)
}

/// What the kernels of a cross entropy have in common.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CrossEntropyKernel {
    pub ignore: Option<u32>,
    pub smoothing: f32,
}

/// The number of counted targets.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Count {
    /// A constant, positive.
    Known(usize),
    /// A value `[1]`.
    Value(Layout),
}

impl CrossEntropyKernel {
    fn ignoring(self, kernel: Kernel) -> Kernel {
        kernel.with("ignore", self.ignore.map_or(-1, i64::from))
    }

    /// A kernel over logits [N, V].
    fn kernel(self, template: &'static str, logits: Layout) -> Kernel {
        self.ignoring(Kernel::new(template))
            .with("rows", logits.rows())
            .with("cols", logits.cols())
            .with("smoothing", f64::from(self.smoothing))
    }

    /// logits [N, V], targets `[N]` → rows [2, N].
    pub fn rows(self, logits: Layout, targets: Layout, rows: Layout, target: Target) -> Kernel {
        let used = logits.cols().div_ceil(4);
        let (lanes, each) = row_lanes(used, logits.rows(), target);
        self.kernel("cross_entropy", logits)
            .items(logits.rows() * lanes, each * lanes)
            .with("lanes", lanes)
            .with("used", used)
            .with("pad", padding(logits, rows))
            .with("block", 4 * BLOCK)
            .read("logits", logits, View::Vec4)
            .read("targets", targets, View::Scalar)
            .write_part("rows", rows, View::Scalar, rows_bytes(logits, rows))
            .flops(5.0 * logits.len() as f64)
    }

    /// Number of partial sums that a first pass over this many targets computes. With 1, a single pass is enough.
    pub fn parts(self, targets: usize, target: Target) -> usize {
        Shares::new(targets, ENTROPY_LANES, target).groups
    }

    /// The first of two passes of the total. rows [2, N], targets `[N]` → `sums` [parts, 4].
    pub fn total_parts(
        self,
        [rows, targets]: [Layout; 2],
        sums: Layout,
        vocabulary: usize,
        target: Target,
    ) -> Kernel {
        self.over_rows([rows, targets], vocabulary, target)
            .write("parts", sums, View::Vec4)
    }

    /// The last of two passes of the total. The sum `[4]` of the first → loss, count.
    pub fn total_of_parts(self, sum: Layout, scalars: [Layout; 2], target: Target) -> Kernel {
        let kernel = Shares::new(1, ENTROPY_LANES, target).kernel("cross_entropy_total", 1);
        self.ignoring(kernel)
            .with("from_parts", true)
            .with("vocabulary", 0)
            .read("parts", sum, View::Vec4)
            .write("loss", scalars[0], View::Vec4)
            .write("count", scalars[1], View::Vec4)
    }

    /// rows, targets → loss, count, in a single pass.
    pub fn total(
        self,
        rows: Layout,
        targets: Layout,
        scalars: [Layout; 2],
        vocabulary: usize,
        target: Target,
    ) -> Kernel {
        self.over_rows([rows, targets], vocabulary, target)
            .write("loss", scalars[0], View::Vec4)
            .write("count", scalars[1], View::Vec4)
    }

    fn over_rows(self, [rows, targets]: [Layout; 2], vocabulary: usize, target: Target) -> Kernel {
        let shares = Shares::new(targets.cols(), ENTROPY_LANES, target);
        self.ignoring(shares.kernel("cross_entropy_total", targets.cols()))
            .with("from_parts", false)
            .with("vocabulary", vocabulary)
            .read("rows", rows, View::Scalar)
            .read("targets", targets, View::Scalar)
    }

    /// targets → count: `[1]`, or [parts, 1] if there are several parts. If no target is ignored, the count is N, and no kernel is needed.
    pub fn count(self, targets: Layout, count: Layout, target: Target) -> Kernel {
        let shares = Shares::new(targets.cols(), ENTROPY_LANES, target);
        self.ignoring(shares.kernel("cross_entropy_count", targets.cols()))
            .read("targets", targets, View::Scalar)
            .write("count", count, View::Vec4)
    }

    /// logits, targets, rows, count, dloss → program(dlogits).
    pub fn grad(
        self,
        [logits, targets, rows, count, dloss]: [Layout; 5],
        program: Program,
    ) -> Kernel {
        let width = program.width();
        self.kernel("cross_entropy_grad", logits)
            .items(logits.rows() * width, SIZE)
            .with("used", logits.cols().div_ceil(4))
            .with("width", width)
            .read("logits", logits, View::Vec4)
            .read("targets", targets, View::Scalar)
            .read_part("rows", rows, View::Scalar, rows_bytes(logits, rows))
            .read("count", count, View::Scalar)
            .read("dloss", dloss, View::Scalar)
            .flops(4.0 * logits.len() as f64)
            .finish(program)
    }

    /// Whether the program's result can take the place of the logits.
    pub fn fits_over(logits: Layout, program: &Program) -> bool {
        logits.dtype() == DType::F32 && matches!(&*program.results, [(_, one)] if *one == logits)
    }

    /// logits, targets, count, dloss → rows, program(dlogits), with every logit read once.
    /// With `over`, the program's result overwrites the logits, which it must [fit](Self::fits_over).
    pub fn value_grad(
        self,
        [logits, targets, rows, dloss]: [Layout; 4],
        count: Count,
        program: Program,
        over: bool,
        target: Target,
    ) -> Kernel {
        // A block of 16 bytes is one `vec4` of f32, two of f16.
        let parts = 4 / logits.dtype().size();
        let width = program.width();
        let cover = width.div_ceil(parts);
        let (lanes, steps) = blocks(cover, logits.rows(), target);
        let pairs = parts == 2 && program.stores_pairs();
        let kernel = self.kernel("cross_entropy_value_grad", logits);
        let kernel = match lanes {
            1 => kernel.items(logits.rows(), 16),
            _ => kernel.groups(logits.rows()).with("size", lanes),
        };
        let kernel = kernel
            .with("lanes", lanes)
            .with("steps", steps)
            .with("block", 4 * BLOCK)
            .with("parts", parts)
            .with("pairs", pairs)
            .with("stride", logits.row_bytes() / 16)
            .with("width", width)
            .with("cover", cover)
            .with("pad", padding(logits, rows))
            .with("over", over)
            .read("logits", logits, View::Block)
            .read("targets", targets, View::Scalar);
        let kernel = match count {
            Count::Value(count) => kernel.with("count", 0).read("count", count, View::Scalar),
            Count::Known(count) => kernel.with("count", count),
        };
        let kernel = kernel
            .read("dloss", dloss, View::Scalar)
            .write_part("rows", rows, View::Scalar, rows_bytes(logits, rows))
            .flops(9.0 * logits.len() as f64);
        match (over, pairs) {
            (true, _) => kernel.finish_over("logits", program),
            (false, true) => kernel.finish_pairs(program),
            (false, false) => kernel.finish(program),
        }
    }
}

/// Number of bytes of `rows` [2, N] that a kernel reads or writes. The binding begins at the first of its rows of logits. If these are only
/// a chunk of the logits, the kernel touches their elements in both rows of `rows`, and the last of these lies before the end of the value.
fn rows_bytes(logits: Layout, rows: Layout) -> u64 {
    match logits.rows() == rows.cols() {
        true => rows.size_bytes(),
        false => ((rows.row_stride() + logits.rows()) * rows.dtype().size()) as u64,
    }
}

/// Number of elements after each row of `rows` that the kernel sets to zero. None for a chunk of the logits, because a chunk may end before
/// the row does.
fn padding(logits: Layout, rows: Layout) -> usize {
    match logits.rows() == rows.cols() {
        true => rows.row_stride() - rows.cols(),
        false => 0,
    }
}

/// Number of invocations that share a row of this many 16-byte blocks, and number of blocks that each keeps in registers, 0 if they would
/// not fit.
fn blocks(row: usize, rows: usize, target: Target) -> (usize, usize) {
    /// Blocks per invocation for few rows, so that there are enough invocations, and for many, so that several workgroups fit a core.
    const FEW: usize = 8;
    const SOME: usize = 16;
    /// A block takes four registers. With 512 invocations this many blocks take three quarters of the register file of current GPUs.
    const MOST: usize = 24;
    if target.barrier_free && row <= ALONE {
        return (1, 0);
    }
    let most_lanes = (target.invocations as usize).min(512);
    let wanted = if rows < 512 { FEW } else { SOME };
    let lanes = row
        .div_ceil(wanted)
        .next_power_of_two()
        .clamp(32, most_lanes);
    match row.div_ceil(lanes) {
        steps if steps <= MOST => (lanes, steps),
        _ => (lanes, 0),
    }
}
