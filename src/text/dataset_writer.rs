//! Writes datasets as [safetensors](super::tensors).

use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use safetensors::Dtype;

use super::npy::encode;
use super::sample::{check_length, check_sample, check_samples, check_width, data};
use super::tensors::{FORMAT, VERSION};
use crate::error::{Error, Result};
use crate::file::{AtomicFile, TensorStream, quantize, stream_tensors};
use crate::types::DType;

/// Bytes that are copied at once; a multiple of every element's size.
const WINDOW: usize = 1 << 18;

/// How a [`DatasetWriter`] stores embeddings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EmbeddingType {
    /// Exact.
    F32,
    /// Half the size, rounded to nearest even; values within ±65504.
    F16,
    /// A quarter of the size: integers of -127 to 127 with one scale per sample, rounded to nearest. The error of a value is at most
    /// 1/254 of the largest value of its sample.
    Int8,
}

/// Collects samples and writes them as one safetensors file.
///
/// The tensors lie one after the other, so each is collected in a temporary file until [`finish`](Self::finish). The temporary files
/// have no names; their folder is that of the file.
pub struct DatasetWriter {
    file: AtomicFile,
    kind: EmbeddingType,
    width: usize,
    samples: usize,
    lengths: Column,
    ids: Column,
    mask: Column,
    /// Whether a mask value is 0.
    masked: bool,
    embeddings: Column,
    scales: Column,
    text_lengths: Column,
    text: Column,
    /// Of the first sample.
    with_text: bool,
    bytes: Vec<u8>,
}

impl DatasetWriter {
    /// Starts a file whose targets have `width` values.
    ///
    /// # Errors
    /// [`Io`](crate::Error::Io), also if `path` is a directory or a special file; [`Data`](crate::Error::Data) if `width` is zero or
    /// does not fit 32 bits.
    pub fn create(path: impl AsRef<Path>, width: usize, kind: EmbeddingType) -> Result<Self> {
        check_width(width)?;
        let path = path.as_ref();
        let file = AtomicFile::create(path)?;
        let column = || Column::new(path);
        Ok(Self {
            file,
            kind,
            width,
            samples: 0,
            lengths: column(),
            ids: column(),
            mask: column(),
            masked: false,
            embeddings: column(),
            scales: column(),
            text_lengths: column(),
            text: column(),
            with_text: false,
            bytes: Vec::new(),
        })
    }

    /// Adds a sample: token ids `[L]`, mask `[L]` of 0 and 1, finite target `[width]`, and its text, which all samples have or none.
    ///
    /// # Errors
    /// [`Data`](crate::Error::Data) if the sample is not like that; nothing of it is kept then. [`Io`](crate::Error::Io), after which
    /// the file cannot be finished.
    pub fn push(
        &mut self,
        ids: &[u32],
        mask: &[u8],
        target: &[f32],
        text: Option<&str>,
    ) -> Result<()> {
        let fail = |reason: String| data(&format!("sample {}", self.samples), reason);
        check_sample(self.samples, self.width, ids, mask, target)?;
        check_length(self.samples, 4 * ids.len())?;
        check_length(self.samples, 4 * target.len())?;
        check_length(self.samples, text.map_or(0, str::len))?;
        if self.samples > 0 && self.with_text != text.is_some() {
            return Err(fail("all samples have a text, or none".into()));
        }
        match self.kind {
            EmbeddingType::F32 => encode(target, DType::F32, &mut self.bytes).map_err(fail)?,
            EmbeddingType::F16 => encode(target, DType::F16, &mut self.bytes)
                .map_err(|reason| fail(format!("target: {reason}")))?,
            EmbeddingType::Int8 => {
                let scale = quantize(target, &mut self.bytes);
                if !(scale * 127.0).is_finite() {
                    return Err(fail("target: a value is too large for int8".into()));
                }
                self.scales.push(&scale.to_le_bytes())?;
            }
        }
        self.embeddings.push(&self.bytes)?;
        self.lengths.push_integer(ids.len() as u32)?;
        for &id in ids {
            self.ids.push_integer(id)?;
        }
        self.mask.push(mask)?;
        self.masked |= mask.contains(&0);
        if let Some(text) = text {
            self.text_lengths.push_integer(text.len() as u32)?;
            self.text.push(text.as_bytes())?;
        }
        self.with_text = text.is_some();
        self.samples += 1;
        Ok(())
    }

    /// Writes the file and moves it to its place. The mask is left out if every token counts.
    ///
    /// # Errors
    /// [`Data`](crate::Error::Data) if there are no samples; [`Io`](crate::Error::Io).
    pub fn finish(self) -> Result<()> {
        check_samples(self.samples)?;
        let dtype = match self.kind {
            EmbeddingType::F32 => Dtype::F32,
            EmbeddingType::F16 => Dtype::F16,
            EmbeddingType::Int8 => Dtype::I8,
        };
        let shape = vec![self.samples, self.width];
        let mut tensors = vec![
            self.lengths.integers("lengths"),
            self.ids.integers("ids"),
            self.embeddings.stream("embeddings", dtype, shape),
        ];
        if self.kind == EmbeddingType::Int8 {
            let shape = vec![self.samples];
            tensors.push(self.scales.stream("scales", Dtype::F32, shape));
        }
        if self.masked {
            tensors.push(self.mask.bytes("mask"));
        }
        if self.with_text {
            tensors.push(self.text_lengths.integers("text_lengths"));
            tensors.push(self.text.bytes("text"));
        }
        stream_tensors(self.file, (FORMAT, VERSION), &[], tensors)
    }
}

/// The values of one tensor so far, in memory while they are few, then in a temporary file.
struct Column {
    path: PathBuf,
    len: usize,
    held: Vec<u8>,
    file: Option<BufWriter<File>>,
    /// The largest integer.
    largest: u32,
}

impl Column {
    fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            len: 0,
            held: Vec::new(),
            file: None,
            largest: 0,
        }
    }

    fn push_integer(&mut self, value: u32) -> Result<()> {
        self.largest = self.largest.max(value);
        self.push(&value.to_le_bytes())
    }

    fn push(&mut self, bytes: &[u8]) -> Result<()> {
        self.len += bytes.len();
        let fail = |error| Error::io(&self.path, error);
        if let Some(file) = &mut self.file {
            return file.write_all(bytes).map_err(fail);
        }
        self.held.extend_from_slice(bytes);
        if self.held.len() < WINDOW {
            return Ok(());
        }
        let folder = self
            .path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new("."));
        let file = tempfile::tempfile_in(folder).map_err(fail)?;
        let mut file = BufWriter::with_capacity(WINDOW, file);
        file.write_all(&self.held).map_err(fail)?;
        self.held = Vec::new();
        self.file = Some(file);
        Ok(())
    }

    /// U16 where all values fit, otherwise U32.
    fn integers(self, name: &str) -> TensorStream<'static> {
        let shape = vec![self.len / 4];
        if self.largest > u32::from(u16::MAX) {
            return self.stream(name, Dtype::U32, shape);
        }
        TensorStream {
            name: name.into(),
            dtype: Dtype::U16,
            shape,
            write: Box::new(move |file| {
                let mut short = Vec::new();
                self.each(|bytes| {
                    short.clear();
                    // The low half of each.
                    let words = bytes.as_chunks::<4>().0.iter();
                    short.extend(words.flat_map(|word| [word[0], word[1]]));
                    file.write(&short)
                })
            }),
        }
    }

    fn bytes(self, name: &str) -> TensorStream<'static> {
        let shape = vec![self.len];
        self.stream(name, Dtype::U8, shape)
    }

    fn stream(self, name: &str, dtype: Dtype, shape: Vec<usize>) -> TensorStream<'static> {
        TensorStream {
            name: name.into(),
            dtype,
            shape,
            write: Box::new(move |file| self.each(|bytes| file.write(bytes))),
        }
    }

    /// Shows all bytes in parts; each but the last is a multiple of four long.
    fn each(self, mut show: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let Some(file) = self.file else {
            return show(&self.held);
        };
        let fail = |error| Error::io(&self.path, error);
        let mut file = file
            .into_inner()
            .map_err(|error| fail(error.into_error()))?;
        file.seek(SeekFrom::Start(0)).map_err(fail)?;
        let mut bytes = vec![0; WINDOW.min(self.len)];
        let mut left = self.len;
        while left > 0 {
            let part = &mut bytes[..WINDOW.min(left)];
            file.read_exact(part).map_err(fail)?;
            show(part)?;
            left -= part.len();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_are_within_half_a_step() {
        let mut bytes = Vec::new();
        let target = [0.3, -1.0, 0.0, 0.004, 0.99];
        let scale = quantize(&target, &mut bytes);
        for (value, byte) in target.iter().zip(&bytes) {
            let back = f32::from(*byte as i8) * scale;
            assert!((back - value).abs() <= 0.5001 * scale, "{value} {back}");
        }
        assert_eq!(bytes[1] as i8, -127);
        assert_eq!(
            (quantize(&[0.0; 3], &mut bytes), &*bytes),
            (0.0, &[0; 3][..])
        );
        // A scale that is not a normal number.
        let scale = quantize(&[1e-44, -1e-45], &mut bytes);
        assert!(scale.is_finite());
    }

    #[test]
    fn long_columns_come_back_from_their_file() {
        let folder = tempfile::tempdir().unwrap();
        for count in [0, 1, WINDOW / 4 - 1, WINDOW / 4, 3 * WINDOW / 4 + 5] {
            let mut column = Column::new(&folder.path().join("x"));
            for value in 0..count as u32 {
                column.push_integer(value).unwrap();
            }
            let mut all = Vec::new();
            column
                .each(|bytes| {
                    all.extend_from_slice(bytes);
                    Ok(())
                })
                .unwrap();
            let expected: Vec<u8> = (0..count as u32).flat_map(u32::to_le_bytes).collect();
            assert!(all == expected, "{count}");
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
