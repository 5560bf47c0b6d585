//! EFB1: token ids and teacher embeddings in one file. All values are little-endian; nothing is aligned.
//!
//! | field | type |
//! |---|---|
//! | magic | `"EFB1"` |
//! | samples n, at least 1 | u32 |
//! | width E, at least 1 | u32 |
//! | then for each sample: length L, at least 1 | u32 |
//! | token ids | u32 × L |
//! | mask, 0 or 1 | u8 × L |
//! | target, finite | f32 × E |

use std::path::Path;

use super::sample::{check_length, check_sample, check_samples, check_width};
use crate::error::Result;
use crate::file::AtomicFile;

/// First bytes of a file in this format.
pub const MAGIC: [u8; 4] = *b"EFB1";

/// Writes an EFB1 file, sample by sample. The file appears under its name when it is [finished](Self::finish).
pub struct Efb1Writer {
    file: AtomicFile,
    width: usize,
    samples: usize,
}

impl Efb1Writer {
    /// Starts a file whose targets have `width` values.
    ///
    /// # Errors
    /// [`Io`](crate::Error::Io), also if `path` is a directory or a special file; [`Data`](crate::Error::Data) if `width` is zero or does not
    /// fit 32 bits.
    pub fn create(path: impl AsRef<Path>, width: usize) -> Result<Self> {
        let stored_width = check_width(width)?;
        let mut file = AtomicFile::create(path.as_ref())?;
        file.write(&MAGIC)?;
        file.write(&[0; 4])?;
        file.write(&stored_width.to_le_bytes())?;
        Ok(Self {
            file,
            width,
            samples: 0,
        })
    }

    /// Adds a sample: token ids `[L]`, mask `[L]` of 0 and 1, finite target `[width]`.
    ///
    /// # Errors
    /// [`Data`](crate::Error::Data) if the sample is not like that, [`Io`](crate::Error::Io).
    pub fn push(&mut self, ids: &[u32], mask: &[u8], target: &[f32]) -> Result<()> {
        check_sample(self.samples, self.width, ids, mask, target)?;
        check_length(self.samples, 5 * ids.len() + 4 * target.len())?;
        write_tokens(&mut self.file, ids, mask)?;
        write_target(&mut self.file, target)?;
        self.samples += 1;
        Ok(())
    }

    /// Completes the file and moves it to its place.
    ///
    /// # Errors
    /// [`Data`](crate::Error::Data) if there are no samples, or more than fit 32 bits; [`Io`](crate::Error::Io).
    pub fn finish(mut self) -> Result<()> {
        let samples = check_samples(self.samples)?;
        self.file.patch(4, &samples.to_le_bytes())?;
        self.file.commit()
    }
}

/// Length, ids and mask of a sample, whose length was checked.
pub(super) fn write_tokens(file: &mut AtomicFile, ids: &[u32], mask: &[u8]) -> Result<()> {
    file.write(&(ids.len() as u32).to_le_bytes())?;
    for id in ids {
        file.write(&id.to_le_bytes())?;
    }
    file.write(mask)
}

pub(super) fn write_target(file: &mut AtomicFile, target: &[f32]) -> Result<()> {
    for value in target {
        file.write(&value.to_le_bytes())?;
    }
    Ok(())
}
