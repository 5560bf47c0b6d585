//! Windows of a 1-D convolution: which rows of the operand a row of the product reads, and the matrix of all windows.

use super::{BLOCK, Kernel, Program, View};
use crate::gpu::Layout;
use crate::types::Window;

const SIZE: usize = 64;

/// Constants of `wgsl/shared/window.wgsl`, which say which row a tap reads. Row r is step s = r mod `rows_each` of its sample. Its tap j
/// reads step (s·`times` + j·`apart` + `offset`) / `divide` of the `source_each` steps of that sample. The arithmetic wraps.
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
    /// Forward: each step of the result reads steps of the operand.
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

    /// Transposed: each step of the operand reads the steps of the result that read it.
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
    /// Passes the constants to a kernel whose template includes `shared/window`.
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
