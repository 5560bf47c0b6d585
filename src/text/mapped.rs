//! A file mapped into memory, read through checked offsets, and the checks that the binary formats share.

use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::error::{Error, Result};

#[derive(Debug)]
pub(super) struct Mapped {
    path: PathBuf,
    map: Mmap,
}

impl Mapped {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|error| Error::io(path, error))?;
        let length = file
            .metadata()
            .map_err(|error| Error::io(path, error))?
            .len();
        if length == 0 {
            return Err(Error::Format {
                path: path.to_owned(),
                offset: 0,
                reason: "the file is empty".into(),
            });
        }
        // SAFETY: the map is only read, as plain bytes, for which every bit pattern is valid. That nobody changes
        // the file meanwhile is asked of the caller by every public `open`; what was checked when the file was
        // opened is not relied on for memory safety.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| Error::io(path, error))?;
        Ok(Self {
            path: path.to_owned(),
            map,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.map
    }

    pub(super) fn len(&self) -> u64 {
        self.map.len() as u64
    }

    pub(super) fn fail(&self, offset: usize, reason: impl Into<String>) -> Error {
        Error::Format {
            path: self.path.clone(),
            offset: offset as u64,
            reason: reason.into(),
        }
    }

    /// `length` bytes at `offset`, or an error that calls them `what`.
    pub(super) fn slice(&self, offset: usize, length: usize, what: &str) -> Result<&[u8]> {
        offset
            .checked_add(length)
            .and_then(|end| self.map.get(offset..end))
            .ok_or_else(|| {
                let reason = format!(
                    "{what} takes {length} bytes from here, but the file ends at byte {}",
                    self.map.len()
                );
                self.fail(offset, reason)
            })
    }

    pub(super) fn u32(&self, offset: usize, what: &str) -> Result<u32> {
        let bytes = self.slice(offset, 4, what)?;
        Ok(bytes
            .first_chunk()
            .map_or(0, |bytes| u32::from_le_bytes(*bytes)))
    }

    /// A count that may not be zero.
    pub(super) fn count(&self, offset: usize, what: &str) -> Result<u32> {
        match self.u32(offset, what)? {
            0 => Err(self.fail(offset, format!("{what} is zero"))),
            count => Ok(count),
        }
    }

    pub(super) fn expect_magic(&self, magic: [u8; 4]) -> Result<()> {
        let found = self.slice(0, 4, "the magic number")?;
        if found == magic {
            return Ok(());
        }
        let reason = format!(
            "the magic number is \"{}\", not \"{}\"",
            found.escape_ascii(),
            magic.escape_ascii()
        );
        Err(self.fail(0, reason))
    }

    /// Every id, found `size` bytes apart from `offset` on, is below `vocab`.
    pub(super) fn check_ids(
        &self,
        offset: usize,
        size: usize,
        vocab: Option<u32>,
        mut ids: impl Iterator<Item = u32>,
    ) -> Result<()> {
        let Some(vocab) = vocab else { return Ok(()) };
        let mut at = offset;
        match ids.find(|&id| {
            at += size;
            id >= vocab
        }) {
            None => Ok(()),
            Some(id) => Err(self.fail(
                at - size,
                format!("token id {id} is not below the vocabulary size {vocab}"),
            )),
        }
    }

    /// Every mask byte of `mask`, found at `offset`, is 0 or 1.
    pub(super) fn check_mask(&self, offset: usize, mask: &[u8]) -> Result<()> {
        match mask.iter().position(|&byte| byte > 1) {
            None => Ok(()),
            Some(t) => Err(self.fail(
                offset + t,
                format!("mask byte is {}, neither 0 nor 1", mask[t]),
            )),
        }
    }

    /// Every target value, found `size` bytes apart from `offset` on, is finite.
    pub(super) fn check_target(
        &self,
        offset: usize,
        size: usize,
        mut target: impl Iterator<Item = f32>,
    ) -> Result<()> {
        match target.position(|value| !value.is_finite()) {
            None => Ok(()),
            Some(at) => Err(self.fail(offset + at * size, "target value is not finite")),
        }
    }
}
