//! Which time steps a 1-D convolution looks at.

use crate::error::{Error, Result};

/// Where a convolution sees zeros beyond the ends of a sample.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Padding {
    /// Only before the start, so that a step depends on none that comes later; one step of output a stride.
    #[default]
    Causal,
    /// At both ends, so that with stride 1 there are as many steps as before, as PyTorch's `padding="same"`: of an odd number of
    /// zeros one more behind the end.
    Same,
    /// Nowhere: windows that fit only.
    Valid,
}

/// Geometry of a dilated 1-D convolution over [B, L, C]: tap j of step t of the result looks at step
/// t·stride + j·dilation − before of the operand, which counts as zero outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Window {
    /// Time steps a sample of the operand, L.
    pub(crate) time: usize,
    /// Time steps a sample of the result.
    pub(crate) steps: usize,
    /// Taps, k.
    pub(crate) kernel: usize,
    /// Distance between taps in time steps.
    pub(crate) dilation: usize,
    /// Distance between windows in time steps.
    pub(crate) stride: usize,
    /// Zeros before the start.
    pub(crate) before: usize,
}

impl Window {
    /// The window of `kernel` taps, `dilation` apart, over samples of `time` steps that ends with the current step.
    ///
    /// # Errors
    /// [`Error::Config`] for a number of zero.
    pub fn causal(time: usize, kernel: usize, dilation: usize) -> Result<Self> {
        Self::new(time, kernel, dilation, 1, Padding::Causal)
    }

    /// Windows of `kernel` taps, `dilation` apart, every `stride` steps.
    ///
    /// # Errors
    /// [`Error::Config`] for a number of zero, for extents beyond 2³¹, and without padding for samples shorter than the window.
    pub fn new(
        time: usize,
        kernel: usize,
        dilation: usize,
        stride: usize,
        padding: Padding,
    ) -> Result<Self> {
        let numbers = [
            ("time", time),
            ("kernel", kernel),
            ("dilation", dilation),
            ("stride", stride),
        ];
        // Kernels compute places in wrapping u32.
        let most = 1 << 31;
        if let Some((field, _)) = numbers.into_iter().find(|&(_, n)| n == 0 || n > most) {
            return Err(Error::Config {
                field,
                reason: "must be at least 1 and at most 2^31".into(),
            });
        }
        let reach = (kernel - 1).checked_mul(dilation);
        let Some(reach) = reach.filter(|reach| reach + time <= most) else {
            return Err(Error::Config {
                field: "dilation",
                reason: format!("{kernel} taps {dilation} apart reach beyond 2^31 steps"),
            });
        };
        let (before, padded) = match padding {
            Padding::Causal => (reach, time + reach),
            Padding::Same => (reach / 2, time + reach),
            Padding::Valid => (0, time),
        };
        if padded <= reach {
            return Err(Error::Config {
                field: "padding",
                reason: format!(
                    "no window of {} steps fits into {time} unpadded ones",
                    reach + 1
                ),
            });
        }
        Ok(Self {
            time,
            steps: (padded - reach - 1) / stride + 1,
            kernel,
            dilation,
            stride,
            before,
        })
    }

    /// Time steps a sample of the result, L'.
    #[must_use]
    pub fn steps(&self) -> usize {
        self.steps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(numbers: [usize; 4], padding: Padding) -> Result<(usize, usize)> {
        let [time, kernel, dilation, stride] = numbers;
        let window = Window::new(time, kernel, dilation, stride, padding)?;
        Ok((window.before, window.steps))
    }

    /// As PyTorch's `Conv1d` gives.
    #[test]
    fn steps_and_zeros() -> Result<()> {
        assert_eq!(window([7, 3, 2, 1], Padding::Causal)?, (4, 7));
        assert_eq!(window([7, 3, 2, 3], Padding::Causal)?, (4, 3));
        assert_eq!(window([7, 4, 1, 1], Padding::Same)?, (1, 7));
        assert_eq!(window([7, 4, 1, 2], Padding::Same)?, (1, 4));
        assert_eq!(window([7, 3, 2, 1], Padding::Valid)?, (0, 3));
        assert_eq!(window([7, 3, 3, 1], Padding::Valid)?, (0, 1));
        assert_eq!(window([1, 5, 9, 1], Padding::Causal)?, (36, 1));
        Ok(())
    }

    #[test]
    fn impossible_windows_are_refused() {
        for numbers in [
            [0, 1, 1, 1],
            [1, 0, 1, 1],
            [1, 1, 0, 1],
            [1, 1, 1, 0],
            [4, 2, usize::MAX, 1],
        ] {
            let result = window(numbers, Padding::Causal);
            assert!(matches!(result, Err(Error::Config { .. })), "{numbers:?}");
        }
        assert!(window([4, 2, 1 << 31, 1], Padding::Causal).is_err());
        let result = window([7, 3, 4, 1], Padding::Valid);
        assert!(matches!(
            result,
            Err(Error::Config {
                field: "padding",
                ..
            })
        ));
    }
}
