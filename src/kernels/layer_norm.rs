//! LayerNorm and its gradients.

use super::{BLOCK, Kernel, Program, Target, View, row_lanes};
use crate::gpu::Layout;

/// `vec4`s of a row that an invocation has in registers at a time. It keeps them there until it writes the result; wider rows are read
/// again.
const MOST_HELD: usize = 8;

/// x, gamma, beta → program(y), statistics [3, rows].
pub(crate) fn layer_norm(
    [x, gamma, beta]: [Layout; 3],
    stats: Layout,
    eps: f32,
    program: Program,
    target: Target,
) -> Kernel {
    rows("layer_norm", x, &program, target)
        .with("eps", f64::from(eps))
        .read("x", x, View::Vec4)
        .read("gamma", gamma, View::Vec4)
        .read("beta", beta, View::Vec4)
        .write("stats", stats, View::Scalar)
        .flops(8.0 * x.len() as f64)
        .finish(program)
}

/// x, gamma, statistics, dy → program(dx).
pub(crate) fn layer_norm_grad(
    [x, gamma, stats, dy]: [Layout; 4],
    program: Program,
    target: Target,
) -> Kernel {
    rows("layer_norm_grad", x, &program, target)
        .read("x", x, View::Vec4)
        .read("gamma", gamma, View::Vec4)
        .read("stats", stats, View::Scalar)
        .read("dy", dy, View::Vec4)
        .flops(11.0 * x.len() as f64)
        .finish(program)
}

fn rows(template: &'static str, x: Layout, program: &Program, target: Target) -> Kernel {
    let width = program.width();
    let (lanes, rows) = row_lanes(width, x.rows(), target);
    let each = width.div_ceil(lanes);
    Kernel::new(template)
        .items(x.rows() * lanes, rows * lanes)
        .with("lanes", lanes)
        .with("held", each.min(MOST_HELD))
        .with("blocks", each.div_ceil(MOST_HELD))
        .with("block", 4 * BLOCK)
        .with("rows", x.rows())
        .with("cols", x.cols())
        .with("used", x.cols().div_ceil(4))
        .with("width", width)
}
