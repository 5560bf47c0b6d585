//! A dataset in either binary format, or a part of one.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::error::Result;

use super::compact::{self, Compact};
use super::efb1::{self, Efb1};
use super::mapped::Mapped;
use super::sample::{OpenOptions, Sample};

#[derive(Debug)]
enum Source {
    Efb1(Efb1),
    Compact(Compact),
}

/// Consecutive samples of a mapped file; clones and parts share the map.
#[derive(Clone, Debug)]
pub struct Dataset {
    source: Arc<Source>,
    rows: Range<usize>,
}

impl Dataset {
    /// Opens and checks a file in either format, told apart by its first bytes. It must not be changed while it is open.
    ///
    /// # Errors
    /// [`Io`](crate::Error::Io), or [`Format`](crate::Error::Format) with the offset of the first thing wrong.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, OpenOptions::default())
    }

    /// [`open`](Self::open), with more to check.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn open_with(path: impl AsRef<Path>, options: OpenOptions) -> Result<Self> {
        let file = Mapped::open(path.as_ref())?;
        let magic = file.slice(0, 4, "the magic number")?;
        let source = if magic == efb1::MAGIC {
            Source::Efb1(Efb1::check(file, options)?)
        } else if magic == compact::MAGIC {
            Source::Compact(Compact::check(file, options)?)
        } else {
            let magic = magic.escape_ascii();
            let reason = format!("the magic number is \"{magic}\", neither \"EFB1\" nor \"EFC1\"");
            return Err(file.fail(0, reason));
        };
        Ok(source.into())
    }

    /// Number of samples; a part may have none.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether this is an empty part.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Values in a target.
    #[must_use]
    pub fn width(&self) -> usize {
        match &*self.source {
            Source::Efb1(file) => file.width(),
            Source::Compact(file) => file.width(),
        }
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        match &*self.source {
            Source::Efb1(file) => file.path(),
            Source::Compact(file) => file.path(),
        }
    }

    /// Sample number `index` of this part, `None` past the end.
    #[must_use]
    pub fn sample(&self, index: usize) -> Option<Sample<'_>> {
        if index >= self.len() {
            return None;
        }
        let index = self.rows.start + index;
        match &*self.source {
            Source::Efb1(file) => file.sample(index),
            Source::Compact(file) => file.sample(index),
        }
    }

    /// All samples of this part in order.
    pub fn iter(&self) -> impl Iterator<Item = Sample<'_>> {
        (0..self.len()).filter_map(|index| self.sample(index))
    }

    /// The first `samples` samples, or all if there are fewer.
    #[must_use]
    pub fn take(&self, samples: usize) -> Self {
        self.split(samples).0
    }

    /// The first `samples` samples (or all if there are fewer), and the rest.
    #[must_use]
    pub fn split(&self, samples: usize) -> (Self, Self) {
        let middle = self.rows.start + samples.min(self.len());
        let part = |rows| Self {
            source: Arc::clone(&self.source),
            rows,
        };
        (part(self.rows.start..middle), part(middle..self.rows.end))
    }
}

impl From<Source> for Dataset {
    fn from(source: Source) -> Self {
        let samples = match &source {
            Source::Efb1(file) => file.len(),
            Source::Compact(file) => file.len(),
        };
        Self {
            source: Arc::new(source),
            rows: 0..samples,
        }
    }
}

impl From<Efb1> for Dataset {
    fn from(file: Efb1) -> Self {
        Source::Efb1(file).into()
    }
}

impl From<Compact> for Dataset {
    fn from(file: Compact) -> Self {
        Source::Compact(file).into()
    }
}
