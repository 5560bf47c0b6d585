//! A dataset in a file, or a part of one.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::efb1::{self, Efb1};
use super::jsonl;
use super::sample::{OpenOptions, Sample, SampleBuffer, data};
use super::samples::Samples;
use super::tensors::Tensors;
use crate::error::{Error, Result};
use crate::file::{InputFile, is_tensor_file, newer};

/// As many first bytes of a file as are looked at to tell its format.
const START: u64 = 4096;

#[derive(Debug)]
enum Source {
    Efb1(Efb1),
    Tensors(Tensors),
    Memory(Samples),
}

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    source: Source,
    width: usize,
}

/// Consecutive samples of a file; clones and parts share the open file.
///
/// A small file is read into memory when it is opened (see [`OpenOptions::in_memory`]), and so are JSON lines. Samples of other files are
/// read by position when they are asked for and checked as they are read: if the file changes or becomes shorter while it is open, a read
/// returns an error that names file and offset.
#[derive(Clone, Debug)]
pub struct Dataset {
    shared: Arc<Shared>,
    rows: Range<usize>,
}

impl Dataset {
    /// Opens and checks a file. Its content tells the format: [safetensors](super::tensors), [EFB1](super::efb1) or
    /// [JSON lines](super::jsonl).
    ///
    /// JSON lines are held in memory, 4 bytes per target value; convert large files with `examples/convert.rs`.
    ///
    /// # Errors
    /// [`Error::Io`], also for a directory or a special file; [`Error::Format`] with the offset of the first thing wrong.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, OpenOptions::default())
    }

    /// [`open`](Self::open), with a vocabulary to check ids against, or a tokenizer for JSON lines that have only texts.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn open_with(path: impl AsRef<Path>, options: OpenOptions) -> Result<Self> {
        let path = path.as_ref();
        let mut file = InputFile::open(path)?;
        if file.len() == 0 {
            return Err(file.fail(0, "the file is empty"));
        }
        let start = file.read_vec(0, START.min(file.len()), "the first bytes")?;
        let source = if start.starts_with(&efb1::MAGIC) {
            file.hold(options.in_memory)?;
            Source::Efb1(Efb1::new(file, options.limit())?)
        } else if is_tensor_file(&start) {
            file.hold(options.in_memory)?;
            Source::Tensors(Tensors::new(file, options.limit())?)
        } else if jsonl::is_json_lines(&start) {
            Source::Memory(jsonl::read_all(file, &options)?)
        } else {
            return Err(unknown(&file, &start));
        };
        let (samples, width) = match &source {
            Source::Efb1(file) => (file.len(), file.width()),
            Source::Tensors(file) => (file.len(), file.width()),
            Source::Memory(samples) => (samples.len(), samples.width),
        };
        Ok(Self {
            shared: Arc::new(Shared {
                path: path.to_owned(),
                source,
                width,
            }),
            rows: 0..samples,
        })
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

    /// Number of values in a target.
    #[must_use]
    pub fn width(&self) -> usize {
        self.shared.width
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    /// Reads sample number `index` of this part.
    ///
    /// # Errors
    /// [`Error::Data`] past the end; [`Error::Io`] and [`Error::Format`] if the file can no longer be read or was changed.
    pub fn sample(&self, index: usize) -> Result<Sample> {
        let mut buffer = SampleBuffer::default();
        self.read(index, true, &mut buffer)?;
        Ok(buffer.sample)
    }

    /// Reads all samples of this part in order; each as [`sample`](Self::sample).
    pub fn iter(&self) -> impl Iterator<Item = Result<Sample>> {
        (0..self.len()).map(|index| self.sample(index))
    }

    /// [`sample`](Self::sample) into a buffer that was used before, with or without the text.
    pub(super) fn read(
        &self,
        index: usize,
        with_text: bool,
        buffer: &mut SampleBuffer,
    ) -> Result<()> {
        if index >= self.len() {
            let reason = format!("is past the end: there are {} samples", self.len());
            return Err(data(&format!("sample {index}"), reason));
        }
        let index = self.rows.start + index;
        match &self.shared.source {
            Source::Efb1(file) => file.read(index, buffer),
            Source::Tensors(file) => file.read(index, with_text, buffer),
            Source::Memory(samples) => {
                samples.read(index, with_text, buffer);
                Ok(())
            }
        }
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
            shared: Arc::clone(&self.shared),
            rows,
        };
        (part(self.rows.start..middle), part(middle..self.rows.end))
    }
}

/// The error for a file of no known format, with what is known about its first bytes.
fn unknown(file: &InputFile, start: &[u8]) -> Error {
    let reason = match start {
        [b'E', b'F', b'B', version @ b'2'..=b'9', ..] => {
            newer("EFB", char::from(*version), 1)
        }
        [b'E', b'F', b'C', b'1', ..] => {
            "EFC1 files are no longer read: write the dataset again as safetensors, see data/README.md".into()
        }
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => {
            "this looks like UTF-16 text: save JSON lines as UTF-8".into()
        }
        _ => format!(
            "the file begins with \"{}\": this is neither a safetensors file, nor EFB1, nor JSON lines",
            start[..start.len().min(8)].escape_ascii()
        ),
    };
    file.fail(0, reason)
}
