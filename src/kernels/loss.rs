//! Knowledge-distillation loss and cross entropy.

use super::{Kernel, Program, Target, View, row_lanes};
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
        .read("y", y, View::Vec4)
        .read("t", t, View::Vec4)
        .write("rows", rows, View::Vec4)
        .flops(9.0 * y.len() as f64)
}

/// rows [B, 4] → loss, cosine, mse; `width` is E.
pub(crate) fn kd_total(
    rows: Layout,
    scalars: [Layout; 3],
    width: usize,
    [alpha, beta]: [f32; 2],
    target: Target,
) -> Kernel {
    let lanes = if target.barrier_free { 1 } else { 64 };
    Kernel::new("kd_loss_total")
        .with("lanes", lanes)
        .with("size", lanes)
        .with("rows", rows.rows())
        .with("cols", 4)
        .with("elements", rows.rows() * width)
        .with("alpha", f64::from(alpha))
        .with("beta", f64::from(beta))
        .read("rows", rows, View::Vec4)
        .write("loss", scalars[0], View::Vec4)
        .write("cosine", scalars[1], View::Vec4)
        .write("mse", scalars[2], View::Vec4)
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
    /// Known beforehand, positive.
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
            .read("logits", logits, View::Vec4)
            .read("targets", targets, View::Scalar)
            .write("rows", rows, View::Scalar)
            .flops(5.0 * logits.len() as f64)
    }

    /// rows, targets → loss, count.
    pub fn total(
        self,
        rows: Layout,
        targets: Layout,
        scalars: [Layout; 2],
        vocabulary: usize,
        target: Target,
    ) -> Kernel {
        self.single("cross_entropy_total", targets, target)
            .with("vocabulary", vocabulary)
            .read("rows", rows, View::Scalar)
            .read("targets", targets, View::Scalar)
            .write("loss", scalars[0], View::Vec4)
            .write("count", scalars[1], View::Vec4)
    }

    /// targets → count; without an ignored target it is N, and no kernel is needed.
    pub fn count(self, targets: Layout, count: Layout, target: Target) -> Kernel {
        self.single("cross_entropy_count", targets, target)
            .read("targets", targets, View::Scalar)
            .write("count", count, View::Vec4)
    }

    /// A kernel of one workgroup over the targets.
    fn single(self, template: &'static str, targets: Layout, target: Target) -> Kernel {
        let lanes = if target.barrier_free { 1 } else { 256 };
        self.ignoring(Kernel::new(template))
            .with("lanes", lanes)
            .with("size", lanes)
            .with("rows", targets.cols())
            .with("cols", 4)
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
            .read("rows", rows, View::Scalar)
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
    /// `over`: the program's result takes the place of the logits, which it must [fit](Self::fits_over).
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
        let kernel = match target.barrier_free {
            true => kernel.items(logits.rows(), 16),
            false => kernel.groups(logits.rows()).with("size", lanes),
        };
        let kernel = kernel
            .with("lanes", lanes)
            .with("steps", steps)
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
            .write("rows", rows, View::Scalar)
            .flops(9.0 * logits.len() as f64);
        match (over, pairs) {
            (true, _) => kernel.finish_over("logits", program),
            (false, true) => kernel.finish_pairs(program),
            (false, false) => kernel.finish(program),
        }
    }
}

/// Elements behind each row of `rows` to be set to zero: none where the logits are only some of them, and where they end is unknown.
fn padding(logits: Layout, rows: Layout) -> usize {
    match logits.rows() == rows.cols() {
        true => rows.row_stride() - rows.cols(),
        false => 0,
    }
}

/// Invocations that share a row of so many 16-byte blocks, and how many blocks each keeps in registers; 0 where they would not fit.
fn blocks(row: usize, rows: usize, target: Target) -> (usize, usize) {
    /// Blocks an invocation that leave room for several workgroups at a time, or, of few rows, for invocations enough.
    const FEW: usize = 8;
    const SOME: usize = 16;
    /// Four registers a block: with 512 invocations three quarters of the register file of current GPUs.
    const MOST: usize = 24;
    if target.barrier_free {
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
