//! Where the figures of a training go: JSON lines, TensorBoard, curves, the log.
//!
//! A [`Recorder`] takes named scalars per step. [`Recorders`] passes them on to several. Names that share the part after the last
//! slash, such as `train/loss` and `validation/loss`, belong together: [`Curves`] draws them in one picture, and TensorBoard groups
//! by the part before the slash.
//!
//! ```
//! use energyflow::train::record::{Curves, JsonLinesLog, Recorder, Recorders, TensorBoard};
//!
//! # fn main() -> energyflow::Result<()> {
//! # let folder = tempfile::tempdir().unwrap();
//! # let out = folder.path();
//! let mut recorders = Recorders::new()
//!     .with(JsonLinesLog::create(out.join("metrics.jsonl"))?)
//!     .with(TensorBoard::create(out.join("tensorboard"))?);
//! let mut curves = Curves::new();
//! for step in 1..=100 {
//!     let scalars = [("train/loss", 1.0 / step as f64)];
//!     recorders.scalars(step, &scalars)?;
//!     curves.scalars(step, &scalars)?;
//! }
//! recorders.flush()?;
//! # #[cfg(feature = "plot")]
//! curves.draw_svg(out.join("curves.svg"))?;
//! # Ok(())
//! # }
//! ```

mod curves;
mod json_lines;
#[cfg(feature = "plot")]
mod plot;
mod tensor_board;

use std::time::{Duration, Instant};

pub use curves::Curves;
pub use json_lines::{JsonLinesLog, read_json_lines};
pub use tensor_board::TensorBoard;

use crate::error::Result;

/// Takes the figures of a training.
pub trait Recorder: Send {
    /// Records the values of named scalars at a step. Steps do not fall; several calls per step are allowed. NaN and infinities are
    /// recorded as far as the format can hold them.
    ///
    /// # Errors
    /// Those of the recorder, such as [`Error::Io`](crate::Error::Io).
    fn scalars(&mut self, step: u64, scalars: &[(&str, f64)]) -> Result<()>;

    /// Hands everything recorded so far to the operating system. Call it before a checkpoint is saved, so that the records reach at
    /// least as far as the checkpoint.
    ///
    /// # Errors
    /// As for [`scalars`](Self::scalars).
    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

impl<R: Recorder + ?Sized> Recorder for Box<R> {
    fn scalars(&mut self, step: u64, scalars: &[(&str, f64)]) -> Result<()> {
        (**self).scalars(step, scalars)
    }

    fn flush(&mut self) -> Result<()> {
        (**self).flush()
    }
}

impl<R: Recorder + ?Sized> Recorder for &mut R {
    fn scalars(&mut self, step: u64, scalars: &[(&str, f64)]) -> Result<()> {
        (**self).scalars(step, scalars)
    }

    fn flush(&mut self) -> Result<()> {
        (**self).flush()
    }
}

/// Passes everything on to several recorders.
#[derive(Default)]
pub struct Recorders<'a> {
    all: Vec<Box<dyn Recorder + 'a>>,
}

impl<'a> Recorders<'a> {
    /// No recorder yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a recorder; a mutable reference to one serves as well.
    #[must_use]
    pub fn with(mut self, recorder: impl Recorder + 'a) -> Self {
        self.all.push(Box::new(recorder));
        self
    }

    /// Calls every recorder, also after one has failed, and returns the first error.
    fn each(&mut self, mut call: impl FnMut(&mut dyn Recorder) -> Result<()>) -> Result<()> {
        let mut all = Ok(());
        for recorder in &mut self.all {
            let one = call(recorder);
            all = all.and(one);
        }
        all
    }
}

impl Recorder for Recorders<'_> {
    /// Every recorder gets the scalars, even if an earlier one fails; the first error is returned.
    fn scalars(&mut self, step: u64, scalars: &[(&str, f64)]) -> Result<()> {
        self.each(|recorder| recorder.scalars(step, scalars))
    }

    fn flush(&mut self) -> Result<()> {
        self.each(|recorder| recorder.flush())
    }
}

/// Writes the scalars as one line each `every` steps to the [`log`] facade, at level `info`.
#[derive(Clone, Debug)]
pub struct LogMessages {
    every: u64,
}

impl LogMessages {
    /// Logs steps that are multiples of `every`; 0 counts as 1.
    #[must_use]
    pub fn new(every: u64) -> Self {
        Self {
            every: every.max(1),
        }
    }
}

impl Recorder for LogMessages {
    fn scalars(&mut self, step: u64, scalars: &[(&str, f64)]) -> Result<()> {
        if step.is_multiple_of(self.every) && !scalars.is_empty() {
            log::info!("step {step}: {}", line(scalars));
        }
        Ok(())
    }
}

/// `name value` of each scalar with four significant digits, separated by commas.
#[must_use]
pub fn line(scalars: &[(&str, f64)]) -> String {
    let shown = scalars
        .iter()
        .map(|(name, value)| format!("{name} {}", short(*value)));
    shown.collect::<Vec<_>>().join(", ")
}

/// Four significant digits, without an exponent between 0.001 and 1 000 000.
fn short(value: f64) -> String {
    let size = value.abs();
    if value == 0.0 || !value.is_finite() {
        return value.to_string();
    }
    if !(1e-3..1e6).contains(&size) {
        return format!("{value:.3e}");
    }
    // Between -3 and 5.
    let before = size.log10().floor() as i32;
    format!("{value:.*}", usize::try_from(3 - before).unwrap_or(0))
}

/// Says when buffered records are due to be written: at most a second after they came.
#[derive(Debug)]
struct FlushTimer {
    last: Instant,
}

impl FlushTimer {
    const INTERVAL: Duration = Duration::from_secs(1);

    fn new() -> Self {
        Self {
            last: Instant::now(),
        }
    }

    fn is_due(&mut self) -> bool {
        let now = Instant::now();
        let due = now.duration_since(self.last) >= Self::INTERVAL;
        if due {
            self.last = now;
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    struct Counts<'a>(&'a mut u32, bool);

    impl Recorder for Counts<'_> {
        fn scalars(&mut self, step: u64, _: &[(&str, f64)]) -> Result<()> {
            *self.0 += 1;
            match self.1 {
                true => Err(Error::Graph(format!("step {step}"))),
                false => Ok(()),
            }
        }
    }

    #[test]
    fn every_recorder_is_called_and_the_first_error_returned() {
        let [mut first, mut second, mut third] = [0; 3];
        let mut recorders = Recorders::new()
            .with(Counts(&mut first, false))
            .with(Counts(&mut second, true))
            .with(Counts(&mut third, true));
        let error = recorders.scalars(7, &[]).unwrap_err();
        assert!(error.to_string().contains("step 7"));
        drop(recorders);
        assert_eq!([first, second, third], [1; 3]);
    }

    #[test]
    fn values_are_shown_with_four_digits() {
        let shown = [
            (0.0, "0"),
            (1.0, "1.000"),
            (-12.3456, "-12.35"),
            (123_456.7, "123457"),
            (0.012_345_6, "0.01235"),
            (0.001_234_4, "0.001234"),
            (0.000_01, "1.000e-5"),
            (1e6, "1.000e6"),
            (f64::NAN, "NaN"),
            (f64::INFINITY, "inf"),
        ];
        for (value, expected) in shown {
            assert_eq!(short(value), expected);
        }
        assert_eq!(line(&[("a", 0.5), ("b", 2.0)]), "a 0.5000, b 2.000");
    }
}
