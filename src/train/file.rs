//! Safetensors files with one entry of metadata: written whole or not at all, read with the place of what is wrong.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use safetensors::tensor::{SafeTensors, View, serialize};

use crate::atomic::AtomicFile;
use crate::error::{Error, Result};

/// Writes tensors under their names. A single entry of metadata, so that equal content gives equal files.
pub(super) fn save<N, V>(
    path: &Path,
    tensors: impl IntoIterator<Item = (N, V)>,
    key: &str,
    text: String,
) -> Result<()>
where
    N: AsRef<str> + Ord + std::fmt::Display,
    V: View,
{
    let metadata = HashMap::from([(key.to_owned(), text)]);
    let bytes = serialize(tensors, Some(metadata))
        .map_err(|error| Error::io(path, std::io::Error::other(error)))?;
    let mut file = AtomicFile::create(path)?;
    file.write(&bytes)?;
    file.commit()
}

/// The content of a file.
pub(super) struct File {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl File {
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|error| Error::io(path, error))?;
        Ok(Self {
            path: path.to_owned(),
            bytes,
        })
    }

    /// That something is wrong at a place.
    pub fn fail(&self, offset: usize, reason: impl Into<String>) -> Error {
        Error::Format {
            path: self.path.clone(),
            offset: offset as u64,
            reason: reason.into(),
        }
    }

    /// The tensors, and the entry of the metadata if it is there.
    pub fn tensors(&self, key: &str) -> Result<(SafeTensors<'_>, Option<String>)> {
        let malformed = |error: safetensors::SafeTensorError| self.fail(0, error.to_string());
        let (_, metadata) = SafeTensors::read_metadata(&self.bytes).map_err(malformed)?;
        let tensors = SafeTensors::deserialize(&self.bytes).map_err(malformed)?;
        let entry = metadata.metadata().as_ref().and_then(|map| map.get(key));
        Ok((tensors, entry.cloned()))
    }

    /// Where the bytes of a tensor begin.
    pub fn offset(&self, data: &[u8]) -> usize {
        data.as_ptr() as usize - self.bytes.as_ptr() as usize
    }
}

/// Little-endian f32.
pub(super) fn floats(bytes: &[u8]) -> Vec<f32> {
    let words = bytes.chunks_exact(4);
    words
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect()
}
