//! The three products of a convolution: forward, for its input, for its weight.

use super::Target;
use super::conv::Taps;
use super::gemm::Gemm;
use super::gemm_windows::{Role, Windows};
use crate::error::Result;
use crate::gpu::Layout;
use crate::types::{Trans, Window};

impl Gemm {
    /// x [B·L, C], weight [H, k·C] → [B·L', H].
    pub fn conv(
        window: Window,
        [x, weight]: [Layout; 2],
        width: usize,
        target: Target,
    ) -> Result<Self> {
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
    ) -> Result<Self> {
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
    ) -> Result<Self> {
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
