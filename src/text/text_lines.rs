//! Plain text, one text per line.
//!
//! Every line is a text, also a blank one, so that texts and embeddings stay together. A byte-order mark at the start and line ends of
//! `\r\n` are left out.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use super::jsonl::{BYTE_ORDER_MARK, MAX_LINE};
use crate::error::{Error, Result};
use crate::file::{InputFile, Sequential};

/// Reads lines one by one.
#[derive(Debug)]
pub(super) struct TextLines {
    reader: BufReader<Sequential<InputFile>>,
    line: Vec<u8>,
    /// Number of the current line, from 1.
    number: u64,
    /// Where the current line starts.
    start: u64,
    /// Where the next line starts.
    offset: u64,
}

impl TextLines {
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self::new(InputFile::open(path)?))
    }

    pub fn new(file: InputFile) -> Self {
        Self {
            reader: BufReader::with_capacity(1 << 16, Sequential::new(file)),
            line: Vec::new(),
            number: 0,
            start: 0,
            offset: 0,
        }
    }

    /// The next line without its end; `None` at the end of the file.
    pub fn read(&mut self) -> Result<Option<String>> {
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
            return Err(self.fail(0, format!("longer than {MAX_LINE} bytes")));
        }
        let marked = self.number == 1 && self.line.starts_with(BYTE_ORDER_MARK);
        let skipped = if marked { BYTE_ORDER_MARK.len() } else { 0 };
        let line = &self.line[skipped..];
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        match std::str::from_utf8(line) {
            Ok(text) => Ok(Some(text.to_owned())),
            Err(error) => {
                let at = skipped + error.valid_up_to();
                Err(self.fail(at as u64, "not valid UTF-8"))
            }
        }
    }

    /// Number of lines that were read.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The error for something wrong in the current line, or in the whole file before its first one.
    pub fn fail(&self, column: u64, reason: impl std::fmt::Display) -> Error {
        let reason = match self.number {
            0 => reason.to_string(),
            number => format!("line {number}: {reason}"),
        };
        self.reader
            .get_ref()
            .file()
            .fail(self.start + column, reason)
    }
}
