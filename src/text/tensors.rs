//! Datasets as safetensors files, which NumPy writes with `safetensors.numpy.save_file`.
//!
//! The metadata has `format` = `energyflow.dataset` and `version` = `1`. For n samples of N tokens in all:
//!
//! | tensor | type | content |
//! |---|---|---|
//! | `lengths` | U16 or U32 `[n]` | tokens of each sample, at least 1; their sum is N |
//! | `ids` | U16 or U32 `[N]` | token ids of all samples, one after the other |
//! | `mask` | U8 or BOOL `[N]`, optional | 1 for tokens that count, 0 for the others; without it every token counts |
//! | `embeddings` | F16 or F32 `[n, E]` | the teacher's embeddings, finite |
//! | `text_lengths` | U16 or U32 `[n]`, with `text` | bytes of each text; their sum is T |
//! | `text` | U8 `[T]`, optional | the texts as UTF-8, one after the other |
//!
//! Values are little-endian, as in every safetensors file. Tensors of other names are refused.

use std::borrow::Cow;
use std::path::Path;

use half::f16;
use safetensors::Dtype;

use super::decode::{At, integers};
use super::sample::{SampleBuffer, check_samples, check_width, data};
use super::samples::Samples;
use crate::error::Result;
use crate::file::{AtomicFile, InputFile, TensorFile, TensorOut, TensorPlace, write_tensors};
use crate::types::DType;

const FORMAT: &str = "dataset";
const VERSION: u32 = 1;

const NAMES: [&str; 6] = [
    "lengths",
    "ids",
    "mask",
    "embeddings",
    "text_lengths",
    "text",
];

/// Bytes that are read at once while a file is checked; a multiple of every element's size.
const WINDOW: u64 = 1 << 20;

/// A dataset in a safetensors file, checked whole when it is opened and again as its samples are read.
#[derive(Debug)]
pub(super) struct Tensors {
    file: TensorFile,
    width: usize,
    vocab: Option<u32>,
    ids: TensorPlace,
    mask: Option<TensorPlace>,
    embeddings: TensorPlace,
    text: Option<TensorPlace>,
    /// n + 1 bounds of the samples' tokens.
    bounds: Vec<u64>,
    /// n + 1 bounds of the samples' texts, if there are any.
    text_bounds: Option<Vec<u64>>,
}

impl Tensors {
    pub fn new(file: InputFile, vocab: Option<u32>) -> Result<Self> {
        let file = TensorFile::new(file)?;
        let fail = |reason: String| Err(file.file().fail(0, reason));
        if file.version(FORMAT, VERSION)?.is_none() {
            return fail(format!(
                "the metadata does not say that this is a dataset: it needs \"format\": \"energyflow.{FORMAT}\" and \"version\": \"{VERSION}\""
            ));
        }
        if let Some(name) = file
            .tensors()
            .keys()
            .find(|name| !NAMES.contains(&&***name))
        {
            return fail(format!(
                "tensor {name:?} has no place in a dataset, which has {NAMES:?}"
            ));
        }
        let embeddings = find(&file, "embeddings", &[Dtype::F16, Dtype::F32], 2)?;
        let lengths = find(&file, "lengths", &[Dtype::U16, Dtype::U32], 1)?;
        let ids = find(&file, "ids", &[Dtype::U16, Dtype::U32], 1)?;
        let [samples, width] = [embeddings.shape[0], embeddings.shape[1]];
        if samples == 0 || width == 0 {
            return fail(format!(
                "embeddings have shape {:?}: there must be a sample and a value",
                embeddings.shape
            ));
        }
        let optional = |name, types: &[Dtype]| match file.tensors().contains_key(name) {
            true => find(&file, name, types, 1).map(Some),
            false => Ok(None),
        };
        let mask = optional("mask", &[Dtype::U8, Dtype::BOOL])?;
        if let Some(mask) = &mask
            && mask.shape != ids.shape
        {
            return fail(format!(
                "mask has shape {:?}, ids have {:?}",
                mask.shape, ids.shape
            ));
        }
        let text = optional("text", &[Dtype::U8])?;
        let text_lengths = optional("text_lengths", &[Dtype::U16, Dtype::U32])?;
        let text_bounds = match (&text, &text_lengths) {
            (Some(text), Some(lengths)) => Some(bounds(
                &file,
                ("text_lengths", lengths),
                samples,
                0,
                ("text", text),
            )?),
            (None, None) => None,
            _ => return fail("text and text_lengths must be there together".into()),
        };
        let tensors = Self {
            bounds: bounds(&file, ("lengths", &lengths), samples, 1, ("ids", &ids))?,
            text_bounds,
            width,
            vocab,
            ids,
            mask,
            embeddings,
            text,
            file,
        };
        tensors.check_contents()?;
        Ok(tensors)
    }

    fn check_contents(&self) -> Result<()> {
        let (mut integers, mut floats, mut bytes) = (Vec::new(), Vec::new(), Vec::new());
        self.windows(&self.ids, "ids", |at, bytes| {
            at.ids(bytes, self.ids.dtype, self.vocab, &mut integers)
        })?;
        if let Some(mask) = &self.mask {
            self.windows(mask, "mask", |at, window| at.mask(window, &mut bytes))?;
        }
        self.windows(&self.embeddings, "embeddings", |at, bytes| {
            at.target(bytes, self.embeddings.dtype, &mut floats)
        })?;
        let mut buffer = SampleBuffer::default();
        for index in 0..self.text_bounds.as_ref().map_or(0, |_| self.len()) {
            self.read_text(index, &mut buffer)?;
        }
        Ok(())
    }

    /// Shows a tensor to `check`, one window after the other.
    fn windows(
        &self,
        place: &TensorPlace,
        what: &str,
        mut check: impl FnMut(At, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let file = self.file.file();
        let mut bytes = vec![0; WINDOW.min(place.len()) as usize];
        let mut offset = place.bytes.start;
        while offset < place.bytes.end {
            let length = WINDOW.min(place.bytes.end - offset);
            let window = &mut bytes[..length as usize];
            file.read_at(offset, window, what)?;
            check(At { file, offset }, window)?;
            offset += length;
        }
        Ok(())
    }

    /// Number of samples, at least one.
    pub fn len(&self) -> usize {
        self.bounds.len() - 1
    }

    pub fn width(&self) -> usize {
        self.width
    }

    /// Reads sample number `index`, which exists: two or three reads, and one more for the text.
    pub fn read(&self, index: usize, with_text: bool, buffer: &mut SampleBuffer) -> Result<()> {
        let (start, end) = (self.bounds[index], self.bounds[index + 1]);
        let size = (self.ids.dtype.bitsize() / 8) as u64;
        let SampleBuffer { sample, bytes } = buffer;
        let at = self.fetch(&self.ids, size * start, size * (end - start), "ids", bytes)?;
        at.ids(bytes, self.ids.dtype, self.vocab, &mut sample.ids)?;
        match &self.mask {
            Some(mask) => {
                let at = self.fetch(mask, start, end - start, "mask", bytes)?;
                at.mask(bytes, &mut sample.mask)?;
            }
            None => {
                sample.mask.clear();
                sample.mask.resize(sample.ids.len(), 1);
            }
        }
        // Rows lie in the file, so that no product overflows.
        let row = (self.width * self.embeddings.dtype.bitsize() / 8) as u64;
        let at = self.fetch(
            &self.embeddings,
            row * index as u64,
            row,
            "embeddings",
            bytes,
        )?;
        at.target(bytes, self.embeddings.dtype, &mut sample.target)?;
        sample.text = None;
        match with_text {
            true => self.read_text(index, buffer),
            false => Ok(()),
        }
    }

    fn read_text(&self, index: usize, buffer: &mut SampleBuffer) -> Result<()> {
        let (Some(place), Some(bounds)) = (&self.text, &self.text_bounds) else {
            return Ok(());
        };
        let (start, end) = (bounds[index], bounds[index + 1]);
        let SampleBuffer { sample, bytes } = buffer;
        let at = self.fetch(place, start, end - start, "text", bytes)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => {
                sample.text = Some(text.to_owned());
                Ok(())
            }
            Err(error) => {
                let at = at.offset + error.valid_up_to() as u64;
                Err(self.file.file().fail(at, "text is not valid UTF-8"))
            }
        }
    }

    /// Fills `bytes` with `length` bytes of a tensor, `start` bytes behind its first.
    fn fetch(
        &self,
        place: &TensorPlace,
        start: u64,
        length: u64,
        what: &str,
        bytes: &mut Vec<u8>,
    ) -> Result<At<'_>> {
        let file = self.file.file();
        let offset = place.bytes.start + start;
        file.resize(offset, length, what, bytes)?;
        file.read_at(offset, bytes, what)?;
        Ok(At { file, offset })
    }
}

/// A tensor that must be there, of one of these types and this rank.
fn find(file: &TensorFile, name: &str, types: &[Dtype], rank: usize) -> Result<TensorPlace> {
    let Some(place) = file.tensors().get(name) else {
        return Err(file.file().fail(0, format!("tensor {name:?} is missing")));
    };
    let fail = |reason: String| Err(file.file().fail(place.bytes.start, reason));
    if !types.contains(&place.dtype) {
        let found = place.dtype;
        return fail(format!(
            "tensor {name:?} is {found:?}; it must be one of {types:?}"
        ));
    }
    if place.shape.len() != rank {
        let shape = &place.shape;
        return fail(format!(
            "tensor {name:?} has shape {shape:?}, not {rank} dimensions"
        ));
    }
    Ok(place.clone())
}

/// Sums of lengths: from 0 to the size of the tensor that they divide, each length at least `least`.
fn bounds(
    file: &TensorFile,
    (name, lengths): (&str, &TensorPlace),
    samples: usize,
    least: u32,
    (divided, whole): (&str, &TensorPlace),
) -> Result<Vec<u64>> {
    let start = lengths.bytes.start;
    if lengths.shape != [samples] {
        let reason = format!(
            "{name} have shape {:?}, but there are {samples} embeddings",
            lengths.shape
        );
        return Err(file.file().fail(start, reason));
    }
    let bytes = file.read(name, lengths)?;
    let mut values = Vec::new();
    integers(&bytes, lengths.dtype, &mut values);
    let mut bounds = Vec::with_capacity(samples + 1);
    let mut end = 0;
    bounds.push(end);
    for (i, length) in values.into_iter().enumerate() {
        if length < least {
            let at = start + (i * lengths.dtype.bitsize() / 8) as u64;
            return Err(file.file().fail(at, format!("length {i} is {length}")));
        }
        // Fewer than 2^64 / 2^32 lengths fit a file.
        end += u64::from(length);
        bounds.push(end);
    }
    match whole.shape[0] as u64 {
        total if total == end => Ok(bounds),
        total => {
            let reason = format!("the sum of {name} is {end}, but {divided} has {total} elements");
            Err(file.file().fail(start, reason))
        }
    }
}

/// Collects samples and writes them as one safetensors file.
///
/// The samples are held in memory until [`finish`](Self::finish), because the tensors lie one after the other.
pub struct DatasetWriter {
    file: AtomicFile,
    dtype: DType,
    samples: Samples,
}

impl DatasetWriter {
    /// Starts a file whose targets have `width` values, stored as `dtype`: [`DType::F32`], or [`DType::F16`] for half the size.
    ///
    /// # Errors
    /// [`Io`](crate::Error::Io), also if `path` is a directory or a special file; [`Data`](crate::Error::Data) if `width` is zero or
    /// does not fit 32 bits; [`Config`](crate::Error::Config) for another `dtype`.
    pub fn create(path: impl AsRef<Path>, width: usize, dtype: DType) -> Result<Self> {
        check_width(width)?;
        if !matches!(dtype, DType::F16 | DType::F32) {
            return Err(crate::Error::Config {
                field: "dtype",
                reason: format!("is {dtype}; embeddings are f16 or f32"),
            });
        }
        Ok(Self {
            file: AtomicFile::create(path.as_ref())?,
            dtype,
            samples: Samples::new(width),
        })
    }

    /// Adds a sample: token ids `[L]`, mask `[L]` of 0 and 1, finite target `[width]`, and its text, which all samples have or none.
    /// In a file of f16 targets are rounded to nearest even and must be within ±65504.
    ///
    /// # Errors
    /// [`Data`](crate::Error::Data) if the sample is not like that; nothing of it is kept then.
    pub fn push(
        &mut self,
        ids: &[u32],
        mask: &[u8],
        target: &[f32],
        text: Option<&str>,
    ) -> Result<()> {
        let samples = &mut self.samples;
        let fail = |reason: String| Err(data(&format!("sample {}", samples.len()), reason));
        if self.dtype == DType::F16
            && let Some(value) = target
                .iter()
                .find(|value| value.is_finite() && !f16::from_f32(**value).is_finite())
        {
            return fail(format!("target value {value} does not fit f16"));
        }
        if samples
            .texts
            .first()
            .is_some_and(|first| first.is_some() != text.is_some())
        {
            return fail("all samples have a text, or none".into());
        }
        if ids.len().max(text.map_or(0, str::len)) > u32::MAX as usize {
            return fail("more than 2^32 - 1 tokens or bytes of text".into());
        }
        samples.push(ids, mask, target, text.map(str::to_owned))
    }

    /// Writes the file and moves it to its place. The mask is left out if every token counts.
    ///
    /// # Errors
    /// [`Data`](crate::Error::Data) if there are no samples; [`Io`](crate::Error::Io).
    pub fn finish(self) -> Result<()> {
        let samples = &self.samples;
        check_samples(samples.len())?;
        let starts = std::iter::once(0).chain(samples.ends.iter().copied());
        let lengths = samples
            .ends
            .iter()
            .zip(starts)
            .map(|(end, start)| end - start);
        // `push` keeps lengths within 32 bits.
        let lengths: Vec<u32> = lengths.map(|length| length as u32).collect();
        let targets: Cow<[u8]> = match self.dtype {
            DType::F16 => {
                let halves = samples.targets.iter().map(|&value| f16::from_f32(value));
                halves.flat_map(f16::to_le_bytes).collect()
            }
            _ => bytemuck::cast_slice(&samples.targets).into(),
        };
        let mut tensors = vec![
            unsigned("lengths", &lengths),
            unsigned("ids", &samples.ids),
            TensorOut {
                name: "embeddings".into(),
                dtype: match self.dtype {
                    DType::F16 => Dtype::F16,
                    _ => Dtype::F32,
                },
                shape: vec![samples.len(), samples.width],
                bytes: targets,
            },
        ];
        if samples.mask.contains(&0) {
            tensors.push(bytes("mask", samples.mask.as_slice().into()));
        }
        if samples.texts[0].is_some() {
            let texts = samples.texts.iter().flatten();
            let lengths: Vec<u32> = texts.clone().map(|text| text.len() as u32).collect();
            tensors.push(unsigned("text_lengths", &lengths));
            let text: Vec<u8> = texts.flat_map(|text| text.bytes()).collect();
            tensors.push(bytes("text", text.into()));
        }
        write_tensors(self.file, (FORMAT, VERSION), &[], tensors)
    }
}

/// U16 where all values fit, otherwise U32.
fn unsigned(name: &str, values: &[u32]) -> TensorOut<'static> {
    let fits = values.iter().all(|&value| value <= u32::from(u16::MAX));
    let (dtype, bytes): (_, Vec<u8>) = match fits {
        true => {
            let words = values
                .iter()
                .flat_map(|&value| (value as u16).to_le_bytes());
            (Dtype::U16, words.collect())
        }
        false => {
            let words = values.iter().flat_map(|value| value.to_le_bytes());
            (Dtype::U32, words.collect())
        }
    };
    TensorOut {
        name: name.into(),
        dtype,
        shape: vec![values.len()],
        bytes: bytes.into(),
    }
}

fn bytes<'a>(name: &str, bytes: Cow<'a, [u8]>) -> TensorOut<'a> {
    TensorOut {
        name: name.into(),
        dtype: Dtype::U8,
        shape: vec![bytes.len()],
        bytes,
    }
}
