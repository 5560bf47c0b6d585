//! EFB1: token ids and teacher embeddings in one file, little-endian, unaligned.
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

use crate::error::Result;

use super::mapped::Mapped;
use super::sample::{
    Ids, OpenOptions, Sample, Target, check_sample, check_samples, check_width, data,
};
use crate::atomic::AtomicFile;

/// First bytes of a file in this format.
pub const MAGIC: [u8; 4] = *b"EFB1";

const HEADER: usize = 12;

/// An EFB1 file, mapped into memory and checked whole.
#[derive(Debug)]
pub struct Efb1 {
    file: Mapped,
    width: usize,
    /// Where each sample starts, and after them where the file ends.
    starts: Vec<usize>,
}

impl Efb1 {
    /// Opens and checks a file. It must not be changed while it is open.
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
        Self::check(Mapped::open(path.as_ref())?, options)
    }

    pub(super) fn check(file: Mapped, options: OpenOptions) -> Result<Self> {
        file.expect_magic(MAGIC)?;
        let samples = file.count(4, "the number of samples")?;
        let width = file.count(8, "the width of the targets")?;

        // Before anything is allocated by these counts: the smallest sample has one token.
        let smallest = 4 + 5 + 4 * u64::from(width);
        let needed = u64::from(samples)
            .saturating_mul(smallest)
            .saturating_add(HEADER as u64);
        if needed > file.len() {
            let reason = format!(
                "{samples} samples of width {width} take at least {needed} bytes, but the file has {}",
                file.len()
            );
            return Err(file.fail(4, reason));
        }

        // Both fit: they are less than the size of the map.
        let (samples, width) = (samples as usize, width as usize);
        let mut starts = Vec::with_capacity(samples + 1);
        let mut at = HEADER;
        for index in 0..samples {
            starts.push(at);
            let length = file.count(at, "the length of a sample")? as usize;
            let bytes = length
                .checked_mul(5)
                .and_then(|tokens| tokens.checked_add(4 * width));
            let Some(bytes) = bytes else {
                return Err(file.fail(at, format!("sample {index} claims {length} tokens")));
            };
            let ids_at = at + 4;
            let body = file.slice(ids_at, bytes, "the rest of the sample")?;
            let sample = split(body, length);
            let mask_at = ids_at + 4 * length;
            let target_at = mask_at + length;
            file.check_ids(ids_at, 4, options.vocab, sample.ids())?;
            file.check_mask(mask_at, &body[4 * length..5 * length])?;
            file.check_target(target_at, 4, sample.target())?;
            at = ids_at + bytes;
        }
        if at as u64 != file.len() {
            let reason = format!("{} bytes follow the last sample", file.len() - at as u64);
            return Err(file.fail(at, reason));
        }
        starts.push(at);
        Ok(Self {
            file,
            width,
            starts,
        })
    }

    /// Number of samples, at least one.
    #[must_use]
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// Values in a target.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Sample number `index`, `None` past the end.
    #[must_use]
    pub fn sample(&self, index: usize) -> Option<Sample<'_>> {
        let (&start, &end) = (self.starts.get(index)?, self.starts.get(index + 1)?);
        let body = self.file.bytes().get(start + 4..end)?;
        Some(split(body, (body.len() - 4 * self.width) / 5))
    }
}

/// Views the bytes after a sample's length, which are exactly ids, mask and target.
fn split(body: &[u8], length: usize) -> Sample<'_> {
    let (ids, rest) = body.split_at(4 * length);
    let (mask, target) = rest.split_at(length);
    Sample {
        ids: Ids::U32(ids.as_chunks().0),
        mask: Some(mask),
        target: Target::F32(target.as_chunks().0),
        text: None,
    }
}

/// Writes an EFB1 file, sample by sample; the file appears when it is [finished](Self::finish).
pub struct Efb1Writer {
    file: AtomicFile,
    width: usize,
    samples: usize,
}

impl Efb1Writer {
    /// Starts a file whose targets have `width` values.
    ///
    /// # Errors
    /// [`Io`](crate::Error::Io), or [`Data`](crate::Error::Data) if `width` is zero or does not fit 32 bits.
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
        let length = u32::try_from(ids.len()).map_err(|_| {
            data(
                &format!("sample {}", self.samples),
                "more than 2^32 - 1 tokens",
            )
        })?;
        self.file.write(&length.to_le_bytes())?;
        for id in ids {
            self.file.write(&id.to_le_bytes())?;
        }
        self.file.write(mask)?;
        for value in target {
            self.file.write(&value.to_le_bytes())?;
        }
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
