//! Scalars in memory, to be drawn.

use std::path::Path;

use super::{Recorder, read_json_lines};
use crate::error::Result;

/// Upper bound on the points that are kept of a series. When there are more, neighbours are replaced by their means.
const MOST: usize = 8192;

/// One series of scalars.
#[derive(Clone, Debug)]
pub(super) struct Series {
    pub name: String,
    /// Step and value; each the mean of `merged` records.
    pub points: Vec<(f64, f64)>,
    merged: u32,
    /// Sums of the records that do not make a point yet, and their number.
    open: (f64, f64, u32),
}

impl Series {
    fn push(&mut self, step: f64, value: f64) {
        self.open.0 += step;
        self.open.1 += value;
        self.open.2 += 1;
        if self.open.2 < self.merged {
            return;
        }
        let count = f64::from(self.merged);
        self.points.push((self.open.0 / count, self.open.1 / count));
        self.open = (0.0, 0.0, 0);
        if self.points.len() == MOST {
            let pairs = self.points.as_chunks().0.iter();
            let mean = |[a, b]: &[(f64, f64); 2]| ((a.0 + b.0) / 2.0, (a.1 + b.1) / 2.0);
            self.points = pairs.map(mean).collect();
            self.merged = self.merged.saturating_mul(2);
        }
    }
}

/// Keeps scalars in memory and draws them as SVG (feature `plot`).
///
/// A series of more than 8192 values is thinned out by averaging neighbours, so that a long training takes no more memory than a
/// short one. NaN and infinities are left out.
#[derive(Clone, Debug, Default)]
pub struct Curves {
    pub(super) all: Vec<Series>,
    /// What is drawn, in this order; everything if it is empty.
    pub(super) panels: Vec<String>,
}

impl Curves {
    /// No series yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Draws only these, in this order: `loss` for all series whose name is `loss` or ends in `/loss`. By default everything that was
    /// recorded is drawn, in the order in which it came.
    #[must_use]
    pub fn panels<S: Into<String>>(mut self, panels: impl IntoIterator<Item = S>) -> Self {
        self.panels = panels.into_iter().map(Into::into).collect();
        self
    }

    /// Adds what a [`JsonLinesLog`](super::JsonLinesLog) has written, so that the curves of a resumed training are whole.
    ///
    /// # Errors
    /// As for [`read_json_lines`].
    pub fn read(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let mut read = Vec::new();
        read_json_lines(path, |step, name, value| {
            read.push((step, name.to_owned(), value));
        })?;
        for (step, name, value) in read {
            self.add(step, &name, value);
        }
        Ok(())
    }

    /// Names of all series in the order in which they came.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.all.iter().map(|series| series.name.as_str())
    }

    /// Steps and values of a series; averaged if it is long. `None` for an unknown name.
    #[must_use]
    pub fn points(&self, name: &str) -> Option<&[(f64, f64)]> {
        let series = self.all.iter().find(|series| series.name == name)?;
        Some(&series.points)
    }

    /// Draws a picture for each group of series, one under the other, and writes them as an SVG file, whole or not at all.
    /// Series of more than 200 points are drawn smoothed, over a pale line of the values themselves.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io); [`Error::Data`](crate::Error::Data) if there is nothing to draw.
    #[cfg(feature = "plot")]
    pub fn draw_svg(&self, path: impl AsRef<Path>) -> Result<()> {
        super::plot::draw_svg(self, path.as_ref())
    }

    fn add(&mut self, step: u64, name: &str, value: f64) {
        if !value.is_finite() {
            return;
        }
        let step = step as f64;
        match self.all.iter_mut().find(|series| series.name == name) {
            Some(series) => series.push(step, value),
            None => self.all.push(Series {
                name: name.to_owned(),
                points: vec![(step, value)],
                merged: 1,
                open: (0.0, 0.0, 0),
            }),
        }
    }
}

impl Recorder for Curves {
    fn scalars(&mut self, step: u64, scalars: &[(&str, f64)]) -> Result<()> {
        for (name, value) in scalars {
            self.add(step, name, *value);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_series_are_thinned_out_and_keep_their_mean() {
        let mut curves = Curves::new();
        let steps = 5 * MOST as u64;
        for step in 1..=steps {
            let value = [0.0, 2.0][step as usize % 2];
            curves
                .scalars(step, &[("a", value), ("b", f64::NAN)])
                .unwrap();
        }
        let points = curves.points("a").unwrap();
        assert!(
            points.len() < MOST && points.len() >= MOST / 2,
            "{}",
            points.len()
        );
        assert!(points.iter().all(|point| point.1 == 1.0));
        let rising = points.windows(2).all(|pair| pair[0].0 < pair[1].0);
        assert!(rising && points[points.len() - 1].0 > 0.99 * steps as f64);
        assert_eq!(curves.points("b"), None);
    }
}
