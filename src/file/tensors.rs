//! Safetensors files: read by position, written whole or not at all.
//!
//! Files of this crate have two entries of metadata: `format`, such as `energyflow.weights`, and `version`, a number that
//! counts from 1. A reader takes every version up to its own.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::Serialize;

use super::atomic::AtomicFile;
use super::input::InputFile;
use crate::error::{Error, Result};

/// A file begins with the length of its header, u64 little-endian.
const LENGTH: u64 = 8;

/// The format allows no longer header.
const MAX_HEADER: u64 = 100_000_000;

const METADATA: &str = "__metadata__";
const FORMAT: &str = "format";
const VERSION: &str = "version";
const CRATE: &str = "energyflow.";

/// A tensor in a file.
#[derive(Clone, Debug)]
pub(crate) struct TensorPlace {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Its bytes: as many as type and shape need, inside the file.
    pub bytes: Range<u64>,
}

impl TensorPlace {
    pub fn len(&self) -> u64 {
        self.bytes.end - self.bytes.start
    }
}

/// An open file whose header was read and checked.
#[derive(Debug)]
pub(crate) struct TensorFile {
    file: InputFile,
    metadata: HashMap<String, String>,
    tensors: BTreeMap<String, TensorPlace>,
}

/// Whether a file with these first bytes is meant to be a safetensors file.
pub(crate) fn is_tensor_file(start: &[u8]) -> bool {
    // A header is shorter than 2^32 bytes and a JSON object.
    start.len() > 8 && start[4..8] == [0; 4] && start[8] == b'{'
}

impl TensorFile {
    pub fn open(path: &Path) -> Result<Self> {
        Self::new(InputFile::open(path)?)
    }

    /// Reads and checks the header. The tensors make up the rest of the file, without gaps.
    ///
    /// # Errors
    /// [`Error::Format`], [`Error::Io`]
    pub fn new(file: InputFile) -> Result<Self> {
        let mut length = [0; LENGTH as usize];
        file.read_at(0, &mut length, "the length of the header")?;
        let length = u64::from_le_bytes(length);
        if length > MAX_HEADER {
            let reason = format!("not a safetensors file: a header of {length} bytes");
            return Err(file.fail(0, reason));
        }
        let header = file.read_vec(LENGTH, length, "the header")?;
        let header: Metadata = serde_json::from_slice(&header).map_err(|error| {
            let column = match error.line() {
                1 => error.column().saturating_sub(1) as u64,
                _ => 0,
            };
            let reason = format!("the header is malformed: {error}");
            file.fail(LENGTH + column.min(length), reason)
        })?;
        let start = LENGTH + length;
        let end = start.checked_add(header.data_len() as u64);
        if end != Some(file.len()) {
            let reason = match end {
                Some(end) if end < file.len() => {
                    format!("{} bytes follow the last tensor", file.len() - end)
                }
                _ => format!(
                    "the tensors take {} bytes from here, but the file ends at byte {}",
                    header.data_len(),
                    file.len()
                ),
            };
            let offset = end.filter(|&end| end < file.len()).unwrap_or(start);
            return Err(file.fail(offset, reason));
        }
        // Sums stay within the file, since offsets rise from zero to the end that was checked above.
        let places = header.tensors().into_iter().map(|(name, info)| {
            let (from, to) = info.data_offsets;
            let place = TensorPlace {
                dtype: info.dtype,
                shape: info.shape.clone(),
                bytes: start + from as u64..start + to as u64,
            };
            (name, place)
        });
        let tensors = places.collect();
        Ok(Self {
            file,
            metadata: header.metadata().clone().unwrap_or_default(),
            tensors,
        })
    }

    pub fn file(&self) -> &InputFile {
        &self.file
    }

    pub fn into_file(self) -> InputFile {
        self.file
    }

    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// All tensors by name, in alphabetical order.
    pub fn tensors(&self) -> &BTreeMap<String, TensorPlace> {
        &self.tensors
    }

    /// The bytes of a tensor.
    ///
    /// # Errors
    /// As [`InputFile::read_vec`].
    pub fn read(&self, name: &str, place: &TensorPlace) -> Result<Vec<u8>> {
        let what = format!("tensor {name:?}");
        self.file.read_vec(place.bytes.start, place.len(), &what)
    }

    /// The version of a file of this crate, `None` for a file that others have written.
    ///
    /// # Errors
    /// [`Error::Format`] for a file of another kind than `kind`, and for a version above `newest`.
    pub fn version(&self, kind: &str, newest: u32) -> Result<Option<u32>> {
        let fail = |reason: String| Err(self.file.fail(0, reason));
        let Some(found) = self
            .metadata(FORMAT)
            .and_then(|format| format.strip_prefix(CRATE))
        else {
            return Ok(None);
        };
        if found != kind {
            return fail(format!(
                "the file is of energyflow's format {found:?}, not of {kind:?}"
            ));
        }
        let version = self.metadata(VERSION).unwrap_or_default();
        match version.parse() {
            Ok(0) | Err(_) => fail(format!("the version of the {kind} format is {version:?}")),
            Ok(version) if version > newest => fail(newer(kind, version, newest)),
            Ok(version) => Ok(Some(version)),
        }
    }
}

/// What to do about a file of a newer version.
pub(crate) fn newer(kind: &str, version: impl std::fmt::Display, newest: u32) -> String {
    format!(
        "a newer energyflow wrote this file: {kind} format {version}, but this one reads up to {newest}; update energyflow"
    )
}

/// A tensor to write; its bytes are little-endian.
pub(crate) struct TensorOut<'a> {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Cow<'a, [u8]>,
}

/// A tensor to write whose bytes need not be in memory.
pub(crate) struct TensorStream<'a> {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Writes the bytes, exactly as many as type and shape need.
    pub write: WriteBytes<'a>,
}

type WriteBytes<'a> = Box<dyn FnOnce(&mut AtomicFile) -> Result<()> + 'a>;

#[derive(Serialize)]
#[serde(untagged)]
enum Entry<'a> {
    Metadata(BTreeMap<&'a str, &'a str>),
    Tensor(TensorInfo),
}

/// Writes tensors with the metadata of this crate and more. Equal content gives equal files.
///
/// # Errors
/// [`Error::Io`]; [`Error::Data`] for a name that the format reserves or that is there twice.
pub(crate) fn write_tensors(
    file: AtomicFile,
    format: (&str, u32),
    more: &[(&str, &str)],
    tensors: Vec<TensorOut>,
) -> Result<()> {
    let streams = tensors.into_iter().map(|tensor| {
        let TensorOut {
            name,
            dtype,
            shape,
            bytes,
        } = tensor;
        TensorStream {
            name,
            dtype,
            shape,
            write: Box::new(move |file: &mut AtomicFile| file.write(&bytes)),
        }
    });
    stream_tensors(file, format, more, streams.collect())
}

/// [`write_tensors`] with bytes that need not be in memory.
///
/// # Errors
/// As for [`write_tensors`], and those of the streams.
pub(crate) fn stream_tensors(
    mut file: AtomicFile,
    (kind, version): (&str, u32),
    more: &[(&str, &str)],
    mut tensors: Vec<TensorStream>,
) -> Result<()> {
    // Wide elements first, so that every tensor is aligned.
    tensors.sort_by(|a, b| (b.dtype.bitsize(), &a.name).cmp(&(a.dtype.bitsize(), &b.name)));
    let (format, version) = (format!("{CRATE}{kind}"), version.to_string());
    let mut metadata = BTreeMap::from([(FORMAT, &*format), (VERSION, &*version)]);
    metadata.extend(more.iter().copied());
    let mut header = BTreeMap::from([(METADATA, Entry::Metadata(metadata))]);
    let mut end = 0;
    for tensor in &tensors {
        let start = end;
        end += tensor.shape.iter().product::<usize>() * tensor.dtype.bitsize() / 8;
        let info = TensorInfo {
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
            data_offsets: (start, end),
        };
        if header.insert(&tensor.name, Entry::Tensor(info)).is_some() {
            return Err(Error::Data {
                name: tensor.name.clone(),
                reason: "a safetensors file cannot hold a tensor of this name".into(),
            });
        }
    }
    let mut header = serde_json::to_vec(&header)
        .map_err(|error| Error::io(file.path(), std::io::Error::other(error)))?;
    header.resize(header.len().next_multiple_of(LENGTH as usize), b' ');
    file.write(&(header.len() as u64).to_le_bytes())?;
    file.write(&header)?;
    for tensor in tensors {
        (tensor.write)(&mut file)?;
    }
    file.commit()
}

/// Little-endian f32.
pub(crate) fn floats(bytes: &[u8]) -> impl ExactSizeIterator<Item = f32> {
    bytes
        .as_chunks()
        .0
        .iter()
        .map(|word| f32::from_le_bytes(*word))
}
