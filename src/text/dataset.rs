//! A dataset in a file, or a part of one.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::efb::Efb;
use super::records::{Embeddings, Opened, Records};
use super::sample::{OpenOptions, Sample, SampleBuffer, data};
use super::store::{Store, StoreWriter};
use super::tensors::Tensors;
use crate::error::{Error, Result};

#[derive(Debug)]
enum Source {
    Efb(Efb),
    Tensors(Box<Tensors>),
    /// Samples that were decoded when the file was opened.
    Store(Store),
    /// Tokens that were made of texts, without targets, and the embeddings beside the texts.
    Beside(Store, Box<Embeddings>),
}

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    source: Source,
    width: usize,
}

/// Samples of a file: consecutive ones, or some that were [chosen](Dataset::select). Clones and parts share the open file.
///
/// The content of a file tells its format:
///
/// | format | how samples are read |
/// |---|---|
/// | [safetensors](super::tensors), [EFB1](super::efb1), [EFB2](super::efb2) with tokens | by position; a small file is read into memory when it is opened |
/// | [JSON lines](super::jsonl), EFB2 with texts alone | decoded once when the file is opened, and tokenised where there are no ids |
/// | texts, one per line, with embeddings beside them (`.npy` or safetensors) | texts are tokenised once, embeddings read by position |
///
/// A file of texts is opened by its name, or by that of its embeddings. The other file lies beside it and has the same name up to the
/// ending, or [`OpenOptions`] name it. What is decoded once is held in memory while it is small, otherwise in a temporary file, so a
/// dataset needs little memory however large it is: at most 64 MiB for addresses and [`OpenOptions::in_memory`] bytes.
///
/// Samples are checked as they are read: if the file changes or becomes shorter while it is open, a read returns an error that names file
/// and offset.
#[derive(Clone, Debug)]
pub struct Dataset {
    shared: Arc<Shared>,
    /// Places in `chosen`, or samples of the file.
    rows: Range<usize>,
    chosen: Option<Arc<[u32]>>,
}

impl Dataset {
    /// Opens and checks a file.
    ///
    /// # Errors
    /// [`Error::Io`], also for a directory or a special file; [`Error::Format`] with the offset of the first thing wrong, and with the
    /// number of the line in files of lines.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, OpenOptions::default())
    }

    /// [`open`](Self::open), with a vocabulary to check ids against, a tokenizer for samples that have only texts, or the names of
    /// further files.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn open_with(path: impl AsRef<Path>, options: OpenOptions) -> Result<Self> {
        let path = path.as_ref();
        let source = match Opened::new(path, &options)? {
            Opened::Efb(file) if file.has_tokens() && options.texts.is_none() => Source::Efb(file),
            Opened::Tensors(file) if options.texts.is_none() => Source::Tensors(file),
            opened => import(path, opened, &options)?,
        };
        let (samples, width) = match &source {
            Source::Efb(file) => (file.len(), file.width()),
            Source::Tensors(file) => (file.len(), file.width()),
            Source::Store(store) => (store.len(), store.width()),
            Source::Beside(_, embeddings) => (embeddings.rows.rows, embeddings.rows.width),
        };
        Ok(Self {
            shared: Arc::new(Shared {
                path: path.to_owned(),
                source,
                width,
            }),
            rows: 0..samples,
            chosen: None,
        })
    }

    /// Samples that were made of a file.
    pub(super) fn of_store(path: &Path, store: Store) -> Self {
        Self {
            rows: 0..store.len(),
            chosen: None,
            shared: Arc::new(Shared {
                path: path.to_owned(),
                width: store.width(),
                source: Source::Store(store),
            }),
        }
    }

    /// Number of samples; a part may have none.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether this is an empty part.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Number of values in a target.
    #[must_use]
    pub fn width(&self) -> usize {
        self.shared.width
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    /// Reads sample number `index` of this part.
    ///
    /// # Errors
    /// [`Error::Data`] past the end; [`Error::Io`] and [`Error::Format`] if the file can no longer be read or was changed.
    pub fn sample(&self, index: usize) -> Result<Sample> {
        let mut buffer = SampleBuffer::default();
        self.read(index, true, &mut buffer)?;
        Ok(buffer.sample)
    }

    /// Reads all samples of this part in order; each as [`sample`](Self::sample).
    pub fn iter(&self) -> impl Iterator<Item = Result<Sample>> {
        (0..self.len()).map(|index| self.sample(index))
    }

    /// [`sample`](Self::sample) into a buffer that was used before, with or without the text.
    pub(super) fn read(
        &self,
        index: usize,
        with_text: bool,
        buffer: &mut SampleBuffer,
    ) -> Result<()> {
        if index >= self.len() {
            let reason = format!("is past the end: there are {} samples", self.len());
            return Err(data(&format!("sample {index}"), reason));
        }
        let index = self.place(index);
        match &self.shared.source {
            Source::Efb(file) => file.read(index, with_text, buffer),
            Source::Tensors(file) => file.read(index, with_text, buffer),
            Source::Store(store) => store.read(index, with_text, buffer),
            Source::Beside(store, embeddings) => {
                store.read(index, with_text, buffer)?;
                let SampleBuffer { sample, bytes } = buffer;
                let Embeddings { file, rows } = &**embeddings;
                rows.read(file, index, bytes, &mut sample.target)
            }
        }
    }

    /// Where sample number `index` of this part, which exists, is in the file.
    fn place(&self, index: usize) -> usize {
        let index = self.rows.start + index;
        match &self.chosen {
            Some(chosen) => chosen[index] as usize,
            None => index,
        }
    }

    /// The samples of these numbers, in this order.
    ///
    /// # Errors
    /// [`Error::Data`] for a number past the end, or one that does not fit 32 bits.
    pub fn select(&self, samples: &[usize]) -> Result<Self> {
        let place = |&index: &usize| {
            let inside = index < self.len();
            let place = inside.then(|| u32::try_from(self.place(index)).ok());
            place.flatten().ok_or_else(|| {
                let reason = format!(
                    "cannot be chosen: there are {} samples, and 2^32 count",
                    self.len()
                );
                data(&format!("sample {index}"), reason)
            })
        };
        Ok(Self {
            shared: Arc::clone(&self.shared),
            rows: 0..samples.len(),
            chosen: Some(samples.iter().map(place).collect::<Result<_>>()?),
        })
    }

    /// The first `samples` samples, or all if there are fewer.
    #[must_use]
    pub fn take(&self, samples: usize) -> Self {
        self.split(samples).0
    }

    /// The first `samples` samples (or all if there are fewer), and the rest.
    #[must_use]
    pub fn split(&self, samples: usize) -> (Self, Self) {
        let middle = self.rows.start + samples.min(self.len());
        let part = |rows| Self {
            shared: Arc::clone(&self.shared),
            rows,
            chosen: self.chosen.clone(),
        };
        (part(self.rows.start..middle), part(middle..self.rows.end))
    }
}

/// Decodes a file whose samples cannot be read by position, and tokenises its texts.
fn import(path: &Path, opened: Opened, options: &OpenOptions) -> Result<Source> {
    // Embeddings of their own file stay where they are.
    let beside = matches!(opened, Opened::Texts(..));
    let mut records = Records::new(opened, options)?;
    let mut store: Option<StoreWriter> = None;
    while let Some(record) = records.next().transpose()? {
        let ids = match (&record.input_ids, &record.text, options.tokenizer) {
            (Some(ids), ..) => ids.clone(),
            (None, Some(text), Some(tokenizer)) => {
                let ids = tokenizer.encode(text);
                ids.map_err(|error| records.fail(error))?
            }
            _ => {
                let reason = "a text without input_ids needs a tokenizer: give one with OpenOptions::tokenizer";
                return Err(records.fail(reason));
            }
        };
        let mask = match record.attention_mask {
            Some(mask) => mask,
            None => vec![1; ids.len()],
        };
        let target = if beside { &[][..] } else { &record.target };
        let store = store.get_or_insert_with(|| {
            StoreWriter::new(target.len(), options.in_memory, options.temporary)
        });
        let pushed = store.push(&ids, &mask, target, record.text);
        pushed.map_err(|error| match error {
            Error::Data { reason, .. } => records.fail(reason),
            error => error,
        })?;
    }
    let store = store.ok_or_else(|| records.fail("the file has no samples"))?;
    let store = store.finish(path)?;
    Ok(match records.into_embeddings() {
        Some(embeddings) => Source::Beside(store, Box::new(embeddings)),
        None => Source::Store(store),
    })
}
