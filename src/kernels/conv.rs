//! Windows of a 1-D convolution: how the rows of a product find the rows that they read, and the windows as a matrix.

use super::{BLOCK, Kernel, Program, View};
use crate::gpu::Layout;
use crate::types::Window;

const SIZE: usize = 64;

/// Which rows a row looks at, in the numbers of `wgsl/shared/window.wgsl`: tap j of row r, step s = r mod `rows_each` of its sample, looks
/// at step (s·`times` + j·`apart` + `offset`) / `divide` of the sample's `source_each`. Numbers wrap.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Taps {
    pub rows_each: usize,
    pub source_each: usize,
    times: u32,
    apart: u32,
    offset: u32,
    divide: u32,
}

// A window's extents are at most 2³¹.
impl Taps {
    /// Steps of the result look at steps of the operand.
    pub fn forward(window: Window) -> Self {
        Self {
            rows_each: window.steps,
            source_each: window.time,
            times: window.stride as u32,
            apart: window.dilation as u32,
            offset: (window.before as u32).wrapping_neg(),
            divide: 1,
        }
    }

    /// Steps of the operand look at the steps of the result that look at them.
    pub fn backward(window: Window) -> Self {
        Self {
            rows_each: window.time,
            source_each: window.steps,
            times: 1,
            apart: (window.dilation as u32).wrapping_neg(),
            offset: window.before as u32,
            divide: window.stride as u32,
        }
    }
}

impl Kernel {
    /// The numbers that `shared/window` needs.
    pub(super) fn taps(self, taps: Taps) -> Self {
        self.with("rows_each", taps.rows_each)
            .with("source_each", taps.source_each)
            .with("times", taps.times)
            .with("apart", taps.apart)
            .with("offset", taps.offset)
            .with("divide", taps.divide)
    }
}

/// x [B·L, C] → program(columns [B·L', k·C]).
pub(crate) fn im2col(x: Layout, window: Window, program: Program) -> Kernel {
    windows("im2col", x, x.cols(), Taps::forward(window), program)
}

/// columns [B·L', k·C] → program([B·L, C]).
pub(crate) fn col2im(columns: Layout, window: Window, program: Program) -> Kernel {
    let channels = program.cols;
    let taps = Taps::backward(window);
    windows("col2im", columns, channels, taps, program)
        .with("kernel", window.kernel)
        .with("windows", window.steps)
        .with("dilation", window.dilation)
        .with("block", BLOCK)
}

fn windows(
    template: &'static str,
    x: Layout,
    channels: usize,
    taps: Taps,
    program: Program,
) -> Kernel {
    let view = match channels.is_multiple_of(4) {
        true => View::Vec4,
        false => View::Scalar,
    };
    let width = program.width();
    Kernel::new(template)
        .items(program.rows * width, SIZE)
        .taps(taps)
        .with("rows", program.rows)
        .with("cols", program.cols)
        .with("used", program.cols.div_ceil(4))
        .with("width", width)
        .with("channels", channels)
        .read("x", x, view)
        .finish(program)
}
