//! Knowledge-distillation loss and cross entropy.

use super::{Kernel, Program, Target, View, row_lanes};
use crate::gpu::Layout;

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

fn ignored(kernel: Kernel, ignore: Option<u32>) -> Kernel {
    kernel.with("ignore", ignore.map_or(-1, i64::from))
}

/// logits [N, V], targets `[N]` → rows [2, N].
pub(crate) fn cross_entropy_rows(
    logits: Layout,
    targets: Layout,
    rows: Layout,
    ignore: Option<u32>,
    smoothing: f32,
    target: Target,
) -> Kernel {
    let used = logits.cols().div_ceil(4);
    let (lanes, each) = row_lanes(used, logits.rows(), target);
    ignored(Kernel::new("cross_entropy"), ignore)
        .items(logits.rows() * lanes, each * lanes)
        .with("lanes", lanes)
        .with("rows", logits.rows())
        .with("cols", logits.cols())
        .with("used", used)
        .with("smoothing", f64::from(smoothing))
        .read("logits", logits, View::Vec4)
        .read("targets", targets, View::Scalar)
        .write("rows", rows, View::Scalar)
        .flops(5.0 * logits.len() as f64)
}

/// rows, targets → loss, count.
pub(crate) fn cross_entropy_total(
    rows: Layout,
    targets: Layout,
    scalars: [Layout; 2],
    vocabulary: usize,
    ignore: Option<u32>,
    target: Target,
) -> Kernel {
    let lanes = if target.barrier_free { 1 } else { 256 };
    ignored(Kernel::new("cross_entropy_total"), ignore)
        .with("lanes", lanes)
        .with("size", lanes)
        .with("rows", targets.cols())
        .with("cols", 4)
        .with("vocabulary", vocabulary)
        .read("rows", rows, View::Scalar)
        .read("targets", targets, View::Scalar)
        .write("loss", scalars[0], View::Vec4)
        .write("count", scalars[1], View::Vec4)
}

/// logits, targets, rows, count, dloss → program(dlogits).
pub(crate) fn cross_entropy_grad(
    [logits, targets, rows, count, dloss]: [Layout; 5],
    ignore: Option<u32>,
    smoothing: f32,
    program: Program,
) -> Kernel {
    let width = program.width();
    ignored(Kernel::new("cross_entropy_grad"), ignore)
        .items(logits.rows() * width, SIZE)
        .with("rows", logits.rows())
        .with("cols", logits.cols())
        .with("used", logits.cols().div_ceil(4))
        .with("width", width)
        .with("smoothing", f64::from(smoothing))
        .read("logits", logits, View::Vec4)
        .read("targets", targets, View::Scalar)
        .read("rows", rows, View::Scalar)
        .read("count", count, View::Scalar)
        .read("dloss", dloss, View::Scalar)
        .flops(4.0 * logits.len() as f64)
        .finish(program)
}
