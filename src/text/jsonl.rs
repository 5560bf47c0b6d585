//! JSON lines: one object a line with `text`, `input_ids`, `attention_mask` (each optional) and `target`.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::error::{Error, Result};

use super::sample::OpenOptions;

/// Longest line that is read, in bytes, so that a file without line ends is not loaded whole.
pub const MAX_LINE: usize = 16 << 20;

/// One line.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[non_exhaustive]
pub struct Record {
    /// The text; there is a text or there are ids.
    pub text: Option<String>,
    /// Token ids, at least one.
    pub input_ids: Option<Vec<u32>>,
    /// Mask of 0 and 1, as long as the ids.
    pub attention_mask: Option<Vec<u8>>,
    /// The teacher's embedding: finite, and as long in every line.
    pub target: Vec<f32>,
}

/// Reads JSON lines one by one; ends after the first bad one.
#[derive(Debug)]
pub struct JsonLines {
    path: PathBuf,
    reader: BufReader<File>,
    options: OpenOptions,
    line: Vec<u8>,
    /// Number of the current line, from 1.
    number: u64,
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
    /// [`Error::Io`]. What is wrong with a line, the iterator tells.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, OpenOptions::default())
    }

    /// [`open`](Self::open), with more to check.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn open_with(path: impl AsRef<Path>, options: OpenOptions) -> Result<Self> {
        let path = path.as_ref();
        let file = File::open(path).map_err(|error| Error::io(path, error))?;
        Ok(Self {
            path: path.to_owned(),
            reader: BufReader::new(file),
            options,
            line: Vec::new(),
            number: 0,
            offset: 0,
            width: None,
            failed: false,
        })
    }

    fn read(&mut self) -> Result<Option<Record>> {
        self.line.clear();
        let start = self.offset;
        let read = (&mut self.reader)
            .take(MAX_LINE as u64 + 1)
            .read_until(b'\n', &mut self.line)
            .map_err(|error| Error::io(&self.path, error))?;
        if read == 0 {
            return Ok(None);
        }
        self.number += 1;
        self.offset += read as u64;
        if read > MAX_LINE {
            return Err(self.fail(start, format!("longer than {MAX_LINE} bytes")));
        }
        // Otherwise the derived reader would also take an array of the fields.
        let line = self.line.trim_ascii_end();
        if !matches!(line.trim_ascii_start().first(), None | Some(b'{')) {
            return Err(self.fail(start, "not an object"));
        }
        let record: Record = serde_json::from_slice(line).map_err(|error| {
            let column = error.column().saturating_sub(1) as u64;
            // The message counts lines from the start of this one, which is of no use.
            let reason = error.to_string();
            let reason = reason.split(" at line ").next().unwrap_or_default();
            self.fail(start + column, reason)
        })?;
        self.check(&record)
            .map_err(|reason| self.fail(start, reason))?;
        self.width = Some(record.target.len());
        Ok(Some(record))
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
                let vocab = self.options.vocab.unwrap_or(u32::MAX);
                match ids.iter().find(|&&id| id >= vocab) {
                    Some(id) if self.options.vocab.is_some() => Err(format!(
                        "token id {id} is not below the vocabulary size {vocab}"
                    )),
                    _ => Ok(()),
                }
            }
            (None, None) => Ok(()),
        }
    }

    fn fail(&self, offset: u64, reason: impl std::fmt::Display) -> Error {
        Error::Format {
            path: self.path.clone(),
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
