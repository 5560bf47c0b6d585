//! Which time steps a 1-D convolution reads.

use crate::error::{Error, Result};

/// Where a convolution pads a sample with zeros.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Padding {
    /// Zeros before the start only. A step depends on no later one. There is one step of output per stride.
    #[default]
    Causal,
    /// Zeros at both ends, so that stride 1 keeps the number of steps, as PyTorch's `padding="same"`. If their number is odd,
    /// there is one more at the end than at the start.
    Same,
    /// No zeros: only windows that lie inside of the sample.
    Valid,
}

/// Geometry of a dilated 1-D convolution over [B, L, C].
///
/// Tap j of step t of the result reads step t·stride + j·dilation − before of the operand. The operand counts as zero outside of
/// the sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Window {
    /// Time steps per sample of the operand, L.
    pub(crate) time: usize,
    /// Time steps per sample of the result.
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
    /// Windows of `kernel` taps, `dilation` apart, over samples of `time` steps. Each window ends with the current step.
    ///
    /// # Errors
    /// As [`Window::new`].
    pub fn causal(time: usize, kernel: usize, dilation: usize) -> Result<Self> {
        Self::new(time, kernel, dilation, 1, Padding::Causal)
    }

    /// The step before the current one, zero at the start of a sample.
    ///
    /// # Errors
    /// As [`Window::new`].
    pub fn delay(time: usize) -> Result<Self> {
        Ok(Self {
            before: 1,
            ..Self::causal(time, 1, 1)?
        })
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
        let fits = |reach: &usize| reach.checked_add(time).is_some_and(|end| end <= most);
        let Some(reach) = reach.filter(fits) else {
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

    /// Time steps per sample of the result, L'.
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
