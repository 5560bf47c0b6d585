//! The windows of a causal dilated convolution as a matrix, and back.

use super::{Kernel, Program, View};
use crate::gpu::Layout;
use crate::graph::Window;

const SIZE: usize = 64;

/// x [B·L, C] → program(columns [B·L, k·C]).
pub(crate) fn im2col(x: Layout, window: Window, program: Program) -> Kernel {
    windows("im2col", x, x.cols(), window, program)
}

/// columns [B·L, k·C] → program([B·L, C]).
pub(crate) fn col2im(columns: Layout, window: Window, program: Program) -> Kernel {
    let channels = program.cols;
    windows("col2im", columns, channels, window, program)
}

fn windows(
    template: &'static str,
    x: Layout,
    channels: usize,
    window: Window,
    program: Program,
) -> Kernel {
    let view = match channels.is_multiple_of(4) {
        true => View::Vec4,
        false => View::Scalar,
    };
    let width = program.width();
    Kernel::new(template)
        .items(program.rows * width, SIZE)
        .with("rows", program.rows)
        .with("cols", program.cols)
        .with("used", program.cols.div_ceil(4))
        .with("width", width)
        .with("channels", channels)
        .with("time", window.time)
        .with("kernel", window.kernel)
        .with("dilation", window.dilation)
        .read("x", x, view)
        .finish(program)
}
