//! EFB2: texts, token ids and teacher embeddings in one file. All values are little-endian; nothing is aligned.
//!
//! | field | type |
//! |---|---|
//! | magic | `"EFB2"` |
//! | samples n, at least 1 | u32 |
//! | width E, at least 1 | u32 |
//! | flags: bit 0 tokens, bit 1 text, bit 2 normalised | u32 |
//! | then for each sample, with texts: bytes of the text | u32 |
//! | the text | UTF-8 |
//! | with tokens: length L, at least 1 | u32 |
//! | token ids | u32 × L |
//! | mask, 0 or 1 | u8 × L |
//! | always: target, finite | f32 × E |
//!
//! A block is absent when its flag is 0; tokens or text must be there. Unknown flags are refused. If the file is called normalised, the
//! squared length of every target is within 0.01 of 1.

use std::path::Path;

use super::efb1::{write_target, write_tokens};
use super::sample::{
    check_length, check_samples, check_target, check_tokens, check_width, data, is_unit,
};
use crate::error::Result;
use crate::file::AtomicFile;

/// First bytes of a file in this format.
pub const MAGIC: [u8; 4] = *b"EFB2";

/// The flags.
pub(super) const TOKENS: u32 = 1;
pub(super) const TEXT: u32 = 2;
pub(super) const NORMALISED: u32 = 4;
pub(super) const KNOWN: u32 = TOKENS | TEXT | NORMALISED;

/// Writes an EFB2 file, sample by sample. The file appears under its name when it is [finished](Self::finish).
pub struct Efb2Writer {
    file: AtomicFile,
    width: usize,
    samples: usize,
    /// Of the first sample: which blocks there are.
    blocks: u32,
    normalised: bool,
}

impl Efb2Writer {
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
        file.write(&[0; 4])?;
        Ok(Self {
            file,
            width,
            samples: 0,
            blocks: 0,
            normalised: true,
        })
    }

    /// Adds a sample: its text, its token ids `[L]` with a mask `[L]` of 0 and 1, and its finite target `[width]`. All samples have a
    /// text or none, and tokens or none.
    ///
    /// # Errors
    /// [`Data`](crate::Error::Data) if the sample is not like that, [`Io`](crate::Error::Io).
    pub fn push(
        &mut self,
        text: Option<&str>,
        tokens: Option<(&[u32], &[u8])>,
        target: &[f32],
    ) -> Result<()> {
        let fail = |reason: &str| Err(data(&format!("sample {}", self.samples), reason));
        let blocks = [(tokens.is_some(), TOKENS), (text.is_some(), TEXT)];
        let blocks = blocks.iter().filter(|(there, _)| *there);
        let blocks = blocks.map(|(_, flag)| flag).sum();
        if blocks == 0 {
            return fail("neither tokens nor text");
        }
        if self.samples > 0 && blocks != self.blocks {
            return fail("all samples have a text, or none, and tokens, or none");
        }
        if let Some((ids, mask)) = tokens {
            check_tokens(self.samples, ids, mask)?;
        }
        check_target(self.samples, self.width, target)?;
        let (text_bytes, length) = (
            text.map_or(0, str::len),
            tokens.map_or(0, |(ids, _)| ids.len()),
        );
        check_length(self.samples, text_bytes)?;
        check_length(self.samples, 5 * length + 4 * target.len())?;
        if let Some(text) = text {
            self.file.write(&(text_bytes as u32).to_le_bytes())?;
            self.file.write(text.as_bytes())?;
        }
        if let Some((ids, mask)) = tokens {
            write_tokens(&mut self.file, ids, mask)?;
        }
        write_target(&mut self.file, target)?;
        self.blocks = blocks;
        self.normalised &= is_unit(target);
        self.samples += 1;
        Ok(())
    }

    /// Completes the file and moves it to its place. It is called normalised if every target has the length 1 up to rounding.
    ///
    /// # Errors
    /// [`Data`](crate::Error::Data) if there are no samples, or more than fit 32 bits; [`Io`](crate::Error::Io).
    pub fn finish(mut self) -> Result<()> {
        let samples = check_samples(self.samples)?;
        let flags = self.blocks | if self.normalised { NORMALISED } else { 0 };
        self.file.patch(4, &samples.to_le_bytes())?;
        self.file.patch(12, &flags.to_le_bytes())?;
        self.file.commit()
    }
}
