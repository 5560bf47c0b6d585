//! A file of texts, one per line, that is all there is.

use std::path::{Path, PathBuf};

use super::dataset::Dataset;
use super::sample::OpenOptions;
use super::split::{Split, ValidationSize, split_key};
use super::text_lines::TextLines;
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::file::InputFile;
use crate::fnv::Fnv;

/// A text file with one text per line, in UTF-8. Lines of nothing but white space are no texts: they keep their numbers, but nothing is trained
/// on them. A byte-order mark and line ends of `\r\n` are left out.
///
/// The texts stay in the file; 16 bytes per line are held in memory.
#[derive(Clone, Debug)]
pub struct TextFile {
    path: PathBuf,
    keys: Vec<Option<u64>>,
    fingerprint: u64,
}

impl TextFile {
    /// Reads a file once, and checks it.
    ///
    /// # Errors
    /// [`Error::Io`], also for a directory or a special file; [`Error::Format`] for a file without a text, and with the number of the line for
    /// one that is not UTF-8 or longer than 16 MiB.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let mut keys = Vec::new();
        let mut fingerprint = Fnv::new();
        let mut lines = TextLines::open(path)?;
        while let Some(line) = lines.read()? {
            fingerprint = fingerprint.write(line.as_bytes()).write(b"\n");
            let blank = line.trim().is_empty();
            keys.push((!blank).then(|| split_key(&line)));
        }
        if keys.iter().all(Option::is_none) {
            let reason = match keys.len() {
                0 => "the file is empty: it needs a text per line".into(),
                lines => format!("all {lines} lines are blank: the file needs a text per line"),
            };
            return Err(InputFile::open(path)?.fail(0, reason));
        }
        Ok(Self {
            path: path.to_owned(),
            keys,
            fingerprint: fingerprint.finish(),
        })
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Number of lines, blank ones included.
    #[must_use]
    pub fn lines(&self) -> usize {
        self.keys.len()
    }

    /// Number of texts: lines that are not blank.
    #[must_use]
    pub fn texts(&self) -> usize {
        self.keys.iter().flatten().count()
    }

    /// A hash of all lines.
    #[must_use]
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// Reads the lines again, in order; the iterator ends after the first error.
    ///
    /// # Errors
    /// As [`TextFile::open`].
    pub fn read(&self) -> Result<impl Iterator<Item = Result<String>>> {
        let mut lines = TextLines::open(&self.path)?;
        let mut failed = false;
        Ok(std::iter::from_fn(move || {
            let line = match failed {
                true => return None,
                false => lines.read(),
            };
            failed = line.is_err();
            line.transpose()
        }))
    }

    /// Splits the lines that are not blank into those for training and those for validation.
    ///
    /// # Errors
    /// As [`Split::new`], naming the file.
    pub fn split(&self, size: ValidationSize) -> Result<Split> {
        Split::new(self.keys.iter().copied(), size).map_err(|error| match error {
            Error::Data { name, reason } => Error::Data {
                name,
                reason: format!("{}: {reason}", self.path.display()),
            },
            other => other,
        })
    }

    /// The dataset of all lines, blank ones included, with the embeddings of another file, one per line: one that
    /// [`TeacherCache`](super::TeacherCache) wrote, or any that [`OpenOptions::embeddings`] takes. Texts are tokenised now.
    ///
    /// # Errors
    /// As [`Dataset::open_with`].
    pub fn dataset(&self, embeddings: &Path, tokenizer: &dyn Tokenizer) -> Result<Dataset> {
        let options = OpenOptions::default()
            .tokenizer(tokenizer)
            .embeddings(embeddings)
            .in_memory(HELD);
        Dataset::open_with(&self.path, options)
    }
}

/// Bytes of embeddings, and of tokens and texts, up to which they are held in memory, so that an epoch need not read them again.
const HELD: u64 = 1 << 30;
