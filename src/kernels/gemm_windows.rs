//! Convolutions as matrix products. One operand is the windows, which the kernel gathers while it loads tiles.

use super::Kernel;
use super::conv::Taps;

/// Which product of a convolution.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Role {
    /// windows(x) · weightᵀ
    Forward,
    /// windows(dy) · weight, the gradient for x. The rows of the weight are those of one tap at a time.
    Input,
    /// dyᵀ · windows(x)
    Weight,
}

/// The gathered operand.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Windows {
    pub role: Role,
    pub taps: Taps,
    /// Number of columns of the gathered operand per tap.
    pub channels: usize,
    /// Number of columns of the weight per tap.
    pub tap_columns: usize,
}

impl Windows {
    /// Whether each `depth` consecutive elements of K belong to one tap, or, for a weight gradient, to one sample.
    pub(super) fn whole(&self, depth: usize) -> bool {
        match self.role {
            Role::Forward | Role::Input => self.channels.is_multiple_of(depth),
            Role::Weight => self.taps.rows_each.is_multiple_of(depth),
        }
    }
}

impl Kernel {
    /// Passes to a template of products the constants for gathering an operand, or that there is nothing to gather.
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
