//! Convolutions as products of which one operand, the windows, is gathered while its tiles are loaded.

use super::conv::Taps;
use super::gemm::Gemm;
use super::{Kernel, Target};
use crate::gpu::Layout;
use crate::types::{Trans, Window};

/// Which product of a convolution.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Role {
    /// windows(x) · weightᵀ
    Forward,
    /// windows(dy) · weight, whose rows are those of a tap: the gradient for x.
    Input,
    /// dyᵀ · windows(x)
    Weight,
}

/// The gathered operand.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Windows {
    pub role: Role,
    pub taps: Taps,
    /// Columns of the gathered operand that a tap takes.
    pub channels: usize,
    /// Columns of the weight that a tap takes.
    pub tap_columns: usize,
}

impl Windows {
    /// Whether every `depth` of K belong to one tap, or, of a weight gradient, to one sample.
    pub(super) fn whole(&self, depth: usize) -> bool {
        match self.role {
            Role::Forward | Role::Input => self.channels.is_multiple_of(depth),
            Role::Weight => self.taps.rows_each.is_multiple_of(depth),
        }
    }
}

impl Kernel {
    /// The numbers that templates of products need to gather an operand, or to know that they do not.
    pub(super) fn windows(self, windows: Option<&Windows>) -> Self {
        let Some(windows) = windows else {
            return self.with("windows", "");
        };
        let role = match windows.role {
            Role::Forward => "forward",
            Role::Input => "input",
            Role::Weight => "weight",
        };
        self.taps(windows.taps)
            .with("windows", role)
            .with("cells", windows.channels / 4)
            .with("tap_cells", windows.tap_columns / 4)
    }
}

/// Whether kernels can gather the windows: four neighbouring columns must belong to the same tap.
pub(crate) fn gathers(channels: usize) -> bool {
    channels.is_multiple_of(4)
}

impl Gemm {
    /// x [B·L, C], weight [H, k·C] → [B·L', H].
    pub fn conv(window: Window, [x, weight]: [Layout; 2], width: usize, target: Target) -> Self {
        let windows = Windows {
            role: Role::Forward,
            taps: Taps::forward(window),
            channels: x.cols(),
            tap_columns: x.cols(),
        };
        let rows = x.rows() / window.time * window.steps;
        let extents = [rows, window.kernel * x.cols()];
        Self::gathered(windows, [x, weight], (Trans::NT, extents), width, target)
    }

    /// dy [B·L', H], weight [H, k·C] → [B·L, C].
    pub fn conv_grad_input(
        window: Window,
        [dy, weight]: [Layout; 2],
        width: usize,
        target: Target,
    ) -> Self {
        let windows = Windows {
            role: Role::Input,
            taps: Taps::backward(window),
            channels: dy.cols(),
            tap_columns: weight.cols() / window.kernel,
        };
        let rows = dy.rows() / window.steps * window.time;
        let extents = [rows, window.kernel * dy.cols()];
        Self::gathered(windows, [dy, weight], (Trans::NN, extents), width, target)
    }

    /// dy [B·L', H], x [B·L, C] → [H, k·C].
    pub fn conv_grad_weight(
        window: Window,
        [dy, x]: [Layout; 2],
        width: usize,
        target: Target,
    ) -> Self {
        let windows = Windows {
            role: Role::Weight,
            taps: Taps::forward(window),
            channels: x.cols(),
            tap_columns: x.cols(),
        };
        let extents = [dy.cols(), dy.rows()];
        Self::gathered(windows, [dy, x], (Trans::TN, extents), width, target)
    }
}
