//! Softmax of rows, its logarithm, and their gradients.

use super::{BLOCK, Kernel, Program, Target, View, row_lanes};
use crate::gpu::Layout;

/// `vec4`s of a row that an invocation has in registers. Wider rows are read twice.
const MOST_HELD: usize = 8;

/// x → program(softmax of each row), or of its logarithm.
pub(crate) fn softmax(x: Layout, log: bool, program: Program, target: Target) -> Kernel {
    rows("softmax", x, log, &program, target)
        .read("x", x, View::Vec4)
        .flops(5.0 * x.len() as f64)
        .finish(program)
}

/// y, dy → program(dx).
pub(crate) fn softmax_grad(
    [y, dy]: [Layout; 2],
    log: bool,
    program: Program,
    target: Target,
) -> Kernel {
    rows("softmax_grad", y, log, &program, target)
        .read("y", y, View::Vec4)
        .read("dy", dy, View::Vec4)
        .flops(4.0 * y.len() as f64)
        .finish(program)
}

fn rows(template: &'static str, x: Layout, log: bool, program: &Program, target: Target) -> Kernel {
    let width = program.width();
    let (lanes, together) = match row_lanes(width, x.rows(), target) {
        alone @ (1, _) => alone,
        // Enough of them that the row is read once, where that is possible.
        (lanes, _) => {
            let wanted = width.div_ceil(MOST_HELD).next_power_of_two().min(256);
            let lanes = lanes.max(wanted);
            (lanes, (128 / lanes).max(1))
        }
    };
    let each = width.div_ceil(lanes);
    Kernel::new(template)
        .items(x.rows() * lanes, together * lanes)
        .with("lanes", lanes)
        .with("held", each.min(MOST_HELD))
        .with("blocks", each.div_ceil(MOST_HELD))
        .with("block", 4 * BLOCK)
        .with("rows", x.rows())
        .with("cols", x.cols())
        .with("used", x.cols().div_ceil(4))
        .with("width", width)
        .with("log", log)
}
