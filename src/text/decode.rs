//! From the bytes of a file to checked values: token ids, masks, targets.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use safetensors::Dtype;

use super::sample::is_unit;
use crate::error::Result;
use crate::file::{InputFile, floats};

/// Values that are converted at once.
const CHUNK: usize = 64;

/// Where values come from: for errors.
#[derive(Clone, Copy)]
pub(super) struct At<'a> {
    pub file: &'a InputFile,
    /// Of the first byte.
    pub offset: u64,
}

impl At<'_> {
    /// Decodes u16 or u32 token ids, which must be below `vocab`.
    pub fn ids(
        self,
        bytes: &[u8],
        dtype: Dtype,
        vocab: Option<u32>,
        ids: &mut Vec<u32>,
    ) -> Result<()> {
        integers(bytes, dtype, ids);
        let bad = |&id: &u32| vocab.is_some_and(|vocab| id >= vocab);
        match ids.iter().position(bad) {
            None => Ok(()),
            Some(i) => {
                let vocab = vocab.unwrap_or_default();
                let reason = format!(
                    "token id {} is not below the vocabulary size {vocab}",
                    ids[i]
                );
                Err(self.fail(i, bytes.len() / ids.len(), reason))
            }
        }
    }

    /// Copies mask bytes, which must be 0 or 1.
    pub fn mask(self, bytes: &[u8], mask: &mut Vec<u8>) -> Result<()> {
        mask.clear();
        mask.extend_from_slice(bytes);
        match bytes.iter().position(|&byte| byte > 1) {
            None => Ok(()),
            Some(i) => {
                let reason = format!("mask byte is {}, neither 0 nor 1", bytes[i]);
                Err(self.fail(i, 1, reason))
            }
        }
    }

    /// Checks that bytes are UTF-8.
    pub fn text(self, bytes: &[u8]) -> Result<&str> {
        std::str::from_utf8(bytes).map_err(|error| {
            let at = error.valid_up_to();
            self.fail(at, 1, "text is not valid UTF-8")
        })
    }

    /// Checks that a target of f32 has the length 1, as the file says.
    pub fn unit(self, target: &[f32]) -> Result<()> {
        match is_unit(target) {
            true => Ok(()),
            false => Err(self.fail(
                0,
                0,
                "the target's length is not 1, but the file is called normalised",
            )),
        }
    }

    /// Decodes f16, bf16, f32 or f64 target values, or i8, which the caller scales. They must be finite.
    pub fn target(self, bytes: &[u8], dtype: Dtype, target: &mut Vec<f32>) -> Result<()> {
        target.clear();
        match dtype {
            Dtype::F16 => {
                // By the chunk, which is several times as fast as value by value.
                let mut halves = [f16::ZERO; CHUNK];
                let mut floats = [0.0; CHUNK];
                for bytes in bytes.chunks(2 * CHUNK) {
                    let words = bytes.as_chunks().0;
                    for (half, word) in halves.iter_mut().zip(words) {
                        *half = f16::from_le_bytes(*word);
                    }
                    let floats = &mut floats[..words.len()];
                    halves[..words.len()].convert_to_f32_slice(floats);
                    target.extend_from_slice(floats);
                }
            }
            Dtype::BF16 => {
                let words = bytes.as_chunks().0.iter();
                target.extend(words.map(|word| bf16::from_le_bytes(*word).to_f32()));
            }
            Dtype::F64 => {
                let words = bytes.as_chunks().0.iter();
                target.extend(words.map(|word| f64::from_le_bytes(*word) as f32));
            }
            Dtype::I8 => target.extend(bytes.iter().map(|&byte| f32::from(byte as i8))),
            _ => target.extend(floats(bytes)),
        }
        // All of them first, without leaving early, which compiles to vector instructions.
        if target.iter().fold(true, |ok, value| ok & value.is_finite()) {
            return Ok(());
        }
        match target.iter().position(|value| !value.is_finite()) {
            None => Ok(()),
            Some(i) => Err(self.fail(i, bytes.len() / target.len(), "target value is not finite")),
        }
    }

    fn fail(self, index: usize, size: usize, reason: impl Into<String>) -> crate::Error {
        self.file.fail(self.offset + (index * size) as u64, reason)
    }
}

/// Decodes u16 or u32.
pub(super) fn integers(bytes: &[u8], dtype: Dtype, values: &mut Vec<u32>) {
    values.clear();
    match dtype {
        Dtype::U16 => {
            let words = bytes.as_chunks().0.iter();
            values.extend(words.map(|word| u32::from(u16::from_le_bytes(*word))));
        }
        _ => {
            let words = bytes.as_chunks().0.iter();
            values.extend(words.map(|word| u32::from_le_bytes(*word)));
        }
    }
}
