//! Writes datasets in any format.

use std::ffi::OsStr;
use std::fmt;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::dataset_writer::{DatasetWriter, EmbeddingType};
use super::efb1::Efb1Writer;
use super::efb2::Efb2Writer;
use super::jsonl::{JsonLinesWriter, Record};
use super::npy::NpyWriter;
use super::sample::{check_samples, data};
use crate::error::{Error, Result};
use crate::file::AtomicFile;
use crate::types::DType;

/// A format of datasets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DatasetFormat {
    /// [Safetensors](super::tensors): token ids, embeddings and, if there are any, texts.
    Safetensors,
    /// [EFB1](super::efb1): token ids and embeddings.
    Efb1,
    /// [EFB2](super::efb2): embeddings with token ids, texts or both.
    Efb2,
    /// [JSON lines](super::jsonl): embeddings with token ids, texts or both.
    JsonLines,
    /// Texts, one per line, and their embeddings beside them in an [`.npy`](super::npy) file of the same name.
    Text,
}

impl DatasetFormat {
    /// All formats.
    pub const ALL: [Self; 5] = [
        Self::Safetensors,
        Self::Efb1,
        Self::Efb2,
        Self::JsonLines,
        Self::Text,
    ];

    /// The format that the ending of a name stands for: `.safetensors`; `.efb` and `.efb1`; `.efb2`; `.jsonl`, `.ndjson` and `.json`;
    /// `.txt` and `.npy`.
    #[must_use]
    pub fn of_path(path: &Path) -> Option<Self> {
        let ending = path.extension()?.to_str()?.to_ascii_lowercase();
        Some(match &*ending {
            "safetensors" => Self::Safetensors,
            "efb" | "efb1" => Self::Efb1,
            "efb2" => Self::Efb2,
            "jsonl" | "ndjson" | "json" => Self::JsonLines,
            "txt" | "npy" => Self::Text,
            _ => return None,
        })
    }

    /// Whether samples need token ids.
    #[must_use]
    pub fn needs_tokens(self) -> bool {
        matches!(self, Self::Safetensors | Self::Efb1)
    }
}

impl fmt::Display for DatasetFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Safetensors => "safetensors",
            Self::Efb1 => "EFB1",
            Self::Efb2 => "EFB2",
            Self::JsonLines => "JSON lines",
            Self::Text => "text with embeddings beside it",
        })
    }
}

/// Writes a dataset in any format, record by record. The file appears under its name when it is [finished](Self::finish).
pub struct RecordWriter {
    inner: Inner,
    samples: usize,
}

enum Inner {
    Safetensors(Box<DatasetWriter>),
    Efb1(Efb1Writer),
    Efb2(Efb2Writer),
    JsonLines(JsonLinesWriter),
    Text(AtomicFile, Box<NpyWriter>),
}

impl RecordWriter {
    /// Starts a file whose targets have `width` values. `embeddings` says how they are stored in safetensors and `.npy`; the other formats
    /// are exact. For [`DatasetFormat::Text`], texts go to `path` with the ending `.txt`, and embeddings to `path` with the ending `.npy`.
    ///
    /// # Errors
    /// [`Error::Io`], also if `path` is a directory or a special file; [`Error::Data`] if `width` is zero or does not fit 32 bits;
    /// [`Error::Config`] for [`EmbeddingType::Int8`] in `.npy`.
    pub fn create(
        path: impl AsRef<Path>,
        format: DatasetFormat,
        width: usize,
        embeddings: EmbeddingType,
    ) -> Result<Self> {
        let path = path.as_ref();
        let inner = match format {
            DatasetFormat::Safetensors => {
                let writer = DatasetWriter::create(path, width, embeddings)?;
                Inner::Safetensors(Box::new(writer))
            }
            DatasetFormat::Efb1 => Inner::Efb1(Efb1Writer::create(path, width)?),
            DatasetFormat::Efb2 => Inner::Efb2(Efb2Writer::create(path, width)?),
            DatasetFormat::JsonLines => Inner::JsonLines(JsonLinesWriter::create(path, width)?),
            DatasetFormat::Text => {
                let dtype = match embeddings {
                    EmbeddingType::F32 => DType::F32,
                    EmbeddingType::F16 => DType::F16,
                    EmbeddingType::Int8 => {
                        return Err(Error::Config {
                            field: "embeddings",
                            reason: "cannot be int8 in an .npy file, which has no scales".into(),
                        });
                    }
                };
                let [texts, embeddings] = paths(path)?;
                let npy = NpyWriter::create(embeddings, width, dtype)?;
                Inner::Text(AtomicFile::create(&texts)?, Box::new(npy))
            }
        };
        Ok(Self { inner, samples: 0 })
    }

    /// Adds a record.
    ///
    /// # Errors
    /// [`Error::Data`] if the format cannot hold it: because it needs token ids or a text, because it has a line break in a text for
    /// [`DatasetFormat::Text`], or because a value is out of range. [`Error::Io`].
    pub fn push(&mut self, record: &Record) -> Result<()> {
        let fail = |reason: &str| data(&format!("sample {}", self.samples), reason);
        let (text, target) = (record.text.as_deref(), &record.target);
        let mask = record.mask();
        let tokens = record.input_ids.as_deref().map(|ids| (ids, &*mask));
        let needed = || tokens.ok_or_else(|| fail("the text has no token ids: give a tokenizer"));
        match &mut self.inner {
            Inner::Safetensors(writer) => {
                let (ids, mask) = needed()?;
                writer.push(ids, mask, target, text)?;
            }
            Inner::Efb1(writer) => {
                let (ids, mask) = needed()?;
                writer.push(ids, mask, target)?;
            }
            Inner::Efb2(writer) => writer.push(text, tokens, target)?,
            Inner::JsonLines(writer) => writer.push(record)?,
            Inner::Text(file, npy) => {
                let text = text.ok_or_else(|| fail("there is no text"))?;
                if text.contains('\n') || text.ends_with('\r') {
                    return Err(fail(
                        "the text has a line break, so that it is not one line",
                    ));
                }
                if self.samples == 0 && text.starts_with('\u{feff}') {
                    return Err(fail("the first text starts with a byte-order mark"));
                }
                npy.push(target)?;
                file.write(text.as_bytes())?;
                file.write(b"\n")?;
            }
        }
        self.samples += 1;
        Ok(())
    }

    /// Completes the file and moves it to its place. Of texts and embeddings, the embeddings come first.
    ///
    /// # Errors
    /// [`Error::Data`] if there are no samples, or more than fit 32 bits; [`Error::Io`].
    pub fn finish(self) -> Result<()> {
        match self.inner {
            Inner::Safetensors(writer) => writer.finish(),
            Inner::Efb1(writer) => writer.finish(),
            Inner::Efb2(writer) => writer.finish(),
            Inner::JsonLines(writer) => writer.finish(),
            Inner::Text(file, npy) => {
                check_samples(self.samples)?;
                npy.finish()?;
                file.commit()
            }
        }
    }
}

/// The files of texts and of embeddings.
fn paths(path: &Path) -> Result<[PathBuf; 2]> {
    if path
        .file_name()
        .and_then(OsStr::to_str)
        .is_none_or(str::is_empty)
    {
        return Err(Error::io(path, ErrorKind::InvalidInput.into()));
    }
    Ok([path.with_extension("txt"), path.with_extension("npy")])
}
