//! Convolutions as products of which one operand, the windows, is gathered while its tiles are loaded.

use super::Kernel;
use super::conv::Taps;

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
