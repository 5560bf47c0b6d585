//! JSON lines: one object per line with `text`, `input_ids`, `attention_mask` (each optional) and `target`.
//!
//! A byte-order mark at the start, blank lines, and line ends of `\r\n` are accepted.

use std::borrow::Cow;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::sample::{
    OpenOptions, Sample, check_samples, check_target, check_tokens, check_width, data,
};
use crate::error::{Error, Result};
use crate::file::{AtomicFile, InputFile, Sequential};

/// Upper bound on the length of a line in bytes, so that a file without line ends is not loaded whole.
pub const MAX_LINE: usize = 16 << 20;

pub(super) const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// One line.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Record {
    /// The text. A line has a text or ids, or both.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// Token ids, at least one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input_ids: Option<Vec<u32>>,
    /// Mask of 0 and 1, as long as the ids.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attention_mask: Option<Vec<u8>>,
    /// The teacher's embedding: finite, and of the same length in every line.
    pub target: Vec<f32>,
}

impl Record {
    /// A record of this target; set the other fields as they are known.
    #[must_use]
    pub fn new(target: Vec<f32>) -> Self {
        Self {
            target,
            ..Self::default()
        }
    }

    /// Without ids if the sample has none. A mask of ones is left out.
    pub(super) fn from_sample(sample: &Sample) -> Self {
        let masked = sample.mask.contains(&0);
        Self {
            text: sample.text.clone(),
            input_ids: Some(sample.ids.clone()).filter(|ids| !ids.is_empty()),
            attention_mask: Some(sample.mask.clone()).filter(|_| masked),
            target: sample.target.clone(),
        }
    }

    /// The mask: that of the record, or ones.
    pub(super) fn mask(&self) -> Cow<'_, [u8]> {
        match &self.attention_mask {
            Some(mask) => mask.into(),
            None => vec![1; self.input_ids.as_ref().map_or(0, Vec::len)].into(),
        }
    }
}

/// Writes JSON lines, record by record. The file appears under its name when it is [finished](Self::finish).
pub struct JsonLinesWriter {
    file: AtomicFile,
    width: usize,
    samples: usize,
}

impl JsonLinesWriter {
    /// Starts a file whose targets have `width` values.
    ///
    /// # Errors
    /// [`Error::Io`], also if `path` is a directory or a special file; [`Error::Data`] if `width` is zero or does not fit 32 bits.
    pub fn create(path: impl AsRef<Path>, width: usize) -> Result<Self> {
        check_width(width)?;
        Ok(Self {
            file: AtomicFile::create(path.as_ref())?,
            width,
            samples: 0,
        })
    }

    /// Adds a line. Numbers are written so that they are read back exactly.
    ///
    /// # Errors
    /// [`Error::Data`] for a record that would not be read back: without text and ids, with ids or a target that a sample cannot have, or
    /// longer than [`MAX_LINE`]; [`Error::Io`].
    pub fn push(&mut self, record: &Record) -> Result<()> {
        let fail = |reason: String| Err(data(&format!("sample {}", self.samples), reason));
        if record.text.is_none() && record.input_ids.is_none() {
            return fail("neither text nor tokens".into());
        }
        if let Some(ids) = &record.input_ids {
            check_tokens(self.samples, ids, &record.mask())?;
        } else if record.attention_mask.is_some() {
            return fail("a mask without tokens".into());
        }
        check_target(self.samples, self.width, &record.target)?;
        let mut line = serde_json::to_vec(record)
            .map_err(|error| Error::io(self.file.path(), std::io::Error::other(error)))?;
        line.push(b'\n');
        if line.len() > MAX_LINE {
            return fail(format!("its line is longer than {MAX_LINE} bytes"));
        }
        self.file.write(&line)?;
        self.samples += 1;
        Ok(())
    }

    /// Completes the file and moves it to its place.
    ///
    /// # Errors
    /// [`Error::Data`] if there are no samples; [`Error::Io`].
    pub fn finish(self) -> Result<()> {
        check_samples(self.samples)?;
        self.file.commit()
    }
}

/// Reads JSON lines one by one. The iterator ends after the first bad line.
#[derive(Debug)]
pub struct JsonLines {
    reader: BufReader<Sequential<InputFile>>,
    vocab: Option<u32>,
    line: Vec<u8>,
    /// Number of the current line, from 1.
    number: u64,
    /// Where the current line starts.
    start: u64,
    /// Where the next line starts.
    offset: u64,
    /// Width of the first target.
    width: Option<usize>,
    failed: bool,
}

impl JsonLines {
    /// Opens a file.
    ///
    /// # Errors
    /// [`Error::Io`], also for a directory or a special file. What is wrong with a line, the iterator tells: [`Error::Format`] with number
    /// and byte offset of the line.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, OpenOptions::default())
    }

    /// [`open`](Self::open), with a vocabulary to check ids against. Texts are not tokenised here.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn open_with(path: impl AsRef<Path>, options: OpenOptions) -> Result<Self> {
        Ok(Self::new(InputFile::open(path.as_ref())?, options.limit()))
    }

    pub(super) fn new(file: InputFile, vocab: Option<u32>) -> Self {
        Self {
            reader: BufReader::with_capacity(1 << 16, Sequential::new(file)),
            vocab,
            line: Vec::new(),
            number: 0,
            start: 0,
            offset: 0,
            width: None,
            failed: false,
        }
    }

    /// The next line that is not blank, without what surrounds the object; `None` at the end.
    pub(super) fn read(&mut self) -> Result<Option<Record>> {
        loop {
            self.line.clear();
            self.start = self.offset;
            let read = (&mut self.reader)
                .take(MAX_LINE as u64 + 1)
                .read_until(b'\n', &mut self.line)
                .map_err(|error| self.reader.get_ref().error(error))?;
            if read == 0 {
                return Ok(None);
            }
            self.number += 1;
            self.offset += read as u64;
            if read > MAX_LINE {
                return Err(self.fail(self.start, format!("longer than {MAX_LINE} bytes")));
            }
            let marked = self.number == 1 && self.line.starts_with(BYTE_ORDER_MARK);
            let skipped = if marked { BYTE_ORDER_MARK.len() } else { 0 };
            let line = self.line[skipped..].trim_ascii_end();
            let start = self.start + skipped as u64;
            match line.trim_ascii_start().first() {
                None => continue,
                Some(b'{') => {}
                // Otherwise the derived reader would also take an array of the fields.
                Some(_) => return Err(self.fail(start, "not an object")),
            }
            let record: Record = serde_json::from_slice(line).map_err(|error| {
                let column = error.column().saturating_sub(1) as u64;
                // The message counts lines from the start of this one, which is of no use.
                let reason = error.to_string();
                let reason = reason.split(" at line ").next().unwrap_or_default();
                self.fail(start + column, reason)
            })?;
            self.check(&record)
                .map_err(|reason| self.fail(self.start, reason))?;
            self.width = Some(record.target.len());
            return Ok(Some(record));
        }
    }

    fn check(&self, record: &Record) -> Result<(), String> {
        let target = &record.target;
        if target.is_empty() {
            return Err("target is empty".into());
        }
        if let Some(width) = self.width.filter(|&width| width != target.len()) {
            let found = target.len();
            return Err(format!(
                "target has {found} values, the first line's {width}"
            ));
        }
        if let Some(at) = target.iter().position(|value| !value.is_finite()) {
            return Err(format!("target value {at} is not finite"));
        }
        match (&record.input_ids, &record.attention_mask) {
            (None, _) if record.text.is_none() => Err("neither text nor input_ids".into()),
            (None, Some(_)) => Err("attention_mask without input_ids".into()),
            (Some(ids), _) if ids.is_empty() => Err("input_ids is empty".into()),
            (Some(ids), Some(mask)) if ids.len() != mask.len() => {
                let (ids, mask) = (ids.len(), mask.len());
                Err(format!(
                    "{ids} input_ids, but {mask} values in attention_mask"
                ))
            }
            (_, Some(mask)) if mask.iter().any(|&value| value > 1) => {
                Err("attention_mask has a value that is neither 0 nor 1".into())
            }
            (Some(ids), _) => {
                let vocab = self.vocab.unwrap_or(u32::MAX);
                match ids.iter().find(|&&id| id >= vocab) {
                    Some(id) if self.vocab.is_some() => Err(format!(
                        "token id {id} is not below the vocabulary size {vocab}"
                    )),
                    _ => Ok(()),
                }
            }
            (None, None) => Ok(()),
        }
    }

    /// The error for something wrong with the current line, or with the file's end if there is no line.
    pub(super) fn fail_here(&self, reason: impl std::fmt::Display) -> Error {
        self.fail(self.start, reason)
    }

    fn fail(&self, offset: u64, reason: impl std::fmt::Display) -> Error {
        Error::Format {
            path: self.reader.get_ref().file().path().to_owned(),
            offset,
            reason: format!("line {}: {reason}", self.number),
        }
    }
}

impl Iterator for JsonLines {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let record = self.read();
        self.failed = record.is_err();
        record.transpose()
    }
}

/// Whether a file with these first bytes is meant to be JSON lines.
pub(super) fn is_json_lines(start: &[u8]) -> bool {
    let start = start.strip_prefix(BYTE_ORDER_MARK).unwrap_or(start);
    start.trim_ascii_start().first() == Some(&b'{')
}
