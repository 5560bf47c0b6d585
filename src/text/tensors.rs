//! Datasets as safetensors files, which NumPy writes with `safetensors.numpy.save_file`.
//!
//! The metadata has `format` = `energyflow.dataset` and `version` = `1`. For n samples of N tokens in all:
//!
//! | tensor | type | content |
//! |---|---|---|
//! | `lengths` | U16 or U32 `[n]` | tokens of each sample, at least 1; their sum is N |
//! | `ids` | U16 or U32 `[N]` | token ids of all samples, one after the other |
//! | `mask` | U8 or BOOL `[N]`, optional | 1 for tokens that count, 0 for the others; without it every token counts |
//! | `embeddings` | F16, BF16, F32, F64 or I8 `[n, E]` | the teacher's embeddings, finite |
//! | `scales` | F32 `[n]`, with I8 | a value is its integer times the scale of its row |
//! | `text_lengths` | U16 or U32 `[n]`, with `text` | bytes of each text; their sum is T |
//! | `text` | U8 `[T]`, optional | the texts as UTF-8, one after the other |
//!
//! Values are little-endian, as in every safetensors file. Tensors of other names are refused.

use safetensors::Dtype;

use super::decode::{At, integers};
use super::offsets::Offsets;
use super::rows::Rows;
use super::sample::{MAX_SAMPLE, SampleBuffer};
use crate::error::Result;
use crate::file::{InputFile, TensorFile, TensorPlace};

pub(super) const FORMAT: &str = "dataset";
pub(super) const VERSION: u32 = 1;

const NAMES: [&str; 7] = [
    "lengths",
    "ids",
    "mask",
    "embeddings",
    "scales",
    "text_lengths",
    "text",
];

/// Bytes that are read at once while a file is checked; a multiple of every element's size.
const WINDOW: u64 = 1 << 20;

/// A dataset in a safetensors file, checked whole when it is opened and again as its samples are read.
#[derive(Debug)]
pub(super) struct Tensors {
    file: TensorFile,
    vocab: Option<u32>,
    ids: Divided,
    mask: Option<TensorPlace>,
    embeddings: Rows,
    text: Option<Divided>,
}

/// A tensor that another one divides into samples.
#[derive(Debug)]
struct Divided {
    whole: TensorPlace,
    lengths: TensorPlace,
    /// Where samples start, in elements.
    offsets: Offsets,
}

impl Tensors {
    pub fn new(file: TensorFile, vocab: Option<u32>) -> Result<Self> {
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
        let embeddings = rows(&file, "embeddings")?;
        let lengths = find(&file, "lengths", &[Dtype::U16, Dtype::U32], 1)?;
        let ids = find(&file, "ids", &[Dtype::U16, Dtype::U32], 1)?;
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
        let samples = embeddings.rows;
        let text = match (text, text_lengths) {
            (Some(text), Some(lengths)) => Some(Divided::new(
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
            ids: Divided::new(&file, ("lengths", lengths), samples, 1, ("ids", ids))?,
            text,
            vocab,
            mask,
            embeddings,
            file,
        };
        tensors.check_contents()?;
        Ok(tensors)
    }

    fn check_contents(&self) -> Result<()> {
        let (mut integers, mut bytes) = (Vec::new(), Vec::new());
        self.windows(&self.ids.whole, "ids", |at, bytes| {
            at.ids(bytes, self.ids.whole.dtype, self.vocab, &mut integers)
        })?;
        if let Some(mask) = &self.mask {
            self.windows(mask, "mask", |at, window| at.mask(window, &mut bytes))?;
        }
        self.embeddings.check(self.file.file())?;
        let mut buffer = SampleBuffer::default();
        for index in 0..self.text.as_ref().map_or(0, |_| self.len()) {
            self.read_text(index, &mut buffer)?;
        }
        Ok(())
    }

    /// Shows a tensor to `check`, one window after the other.
    fn windows(
        &self,
        place: &TensorPlace,
        what: &str,
        check: impl FnMut(At, &[u8]) -> Result<()>,
    ) -> Result<()> {
        windows(self.file.file(), place, what, check)
    }

    pub fn file(&self) -> &InputFile {
        self.file.file()
    }

    /// Number of samples, at least one.
    pub fn len(&self) -> usize {
        self.embeddings.rows
    }

    pub fn width(&self) -> usize {
        self.embeddings.width
    }

    /// Reads sample number `index`, which exists: two or three reads, and one more for the text.
    pub fn read(&self, index: usize, with_text: bool, buffer: &mut SampleBuffer) -> Result<()> {
        let file = self.file.file();
        let SampleBuffer { sample, bytes } = buffer;
        let (start, end) = self.ids.bounds(file, index, bytes)?;
        let dtype = self.ids.whole.dtype;
        let size = (dtype.bitsize() / 8) as u64;
        let (first, length) = (size * start, size * (end - start));
        let at = self.fetch(&self.ids.whole, first, length, "ids", bytes)?;
        at.ids(bytes, dtype, self.vocab, &mut sample.ids)?;
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
        self.embeddings
            .read(file, index, bytes, &mut sample.target)?;
        sample.text = None;
        match with_text {
            true => self.read_text(index, buffer),
            false => Ok(()),
        }
    }

    fn read_text(&self, index: usize, buffer: &mut SampleBuffer) -> Result<()> {
        let Some(text) = &self.text else {
            return Ok(());
        };
        let SampleBuffer { sample, bytes } = buffer;
        let (start, end) = text.bounds(self.file.file(), index, bytes)?;
        let at = self.fetch(&text.whole, start, end - start, "text", bytes)?;
        sample.text = Some(at.text(bytes)?.to_owned());
        Ok(())
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

impl Divided {
    /// The sum of `samples` lengths, each at least `least`, must be the size of the divided tensor.
    fn new(
        file: &TensorFile,
        (name, lengths): (&str, TensorPlace),
        samples: usize,
        least: u32,
        (divided, whole): (&str, TensorPlace),
    ) -> Result<Self> {
        let start = lengths.bytes.start;
        if lengths.shape != [samples] {
            let reason = format!(
                "{name} have shape {:?}, but there are {samples} embeddings",
                lengths.shape
            );
            return Err(file.file().fail(start, reason));
        }
        let size = (lengths.dtype.bitsize() / 8) as u64;
        let unit = (whole.dtype.bitsize() / 8) as u64;
        let mut offsets = Offsets::new(samples, Offsets::MOST);
        let (mut values, mut end) = (Vec::new(), 0);
        windows(file.file(), &lengths, name, |at, bytes| {
            integers(bytes, lengths.dtype, &mut values);
            for &length in &values {
                let place = start + size * offsets.len() as u64;
                let fail = |reason: String| Err(at.file.fail(place, reason));
                if length < least {
                    return fail(format!("length {} is {length}", offsets.len()));
                }
                if u64::from(length) * unit > MAX_SAMPLE && at.file.len() > MAX_SAMPLE {
                    return fail(format!(
                        "length {} is {length}: at most {MAX_SAMPLE} bytes are read",
                        offsets.len()
                    ));
                }
                // Fewer than 2^64 / 2^32 lengths fit a file.
                offsets.push(end, end + u64::from(length));
                end += u64::from(length);
            }
            Ok(())
        })?;
        match whole.shape[0] as u64 {
            total if total == end => Ok(Self {
                whole,
                lengths,
                offsets,
            }),
            total => {
                let reason =
                    format!("the sum of {name} is {end}, but {divided} has {total} elements");
                Err(file.file().fail(start, reason))
            }
        }
    }

    /// The first element of a sample, and the one after its last. Lengths before it are read where its start was not kept.
    fn bounds(&self, file: &InputFile, index: usize, bytes: &mut Vec<u8>) -> Result<(u64, u64)> {
        let (before, mut start) = self.offsets.before(index);
        if self.offsets.is_whole() {
            return Ok((start, self.offsets.after(index)));
        }
        let size = (self.lengths.dtype.bitsize() / 8) as u64;
        let offset = self.lengths.bytes.start + size * before as u64;
        let count = (index - before + 1) as u64;
        file.resize(offset, size * count, "lengths", bytes)?;
        file.read_at(offset, bytes, "lengths")?;
        let mut values = Vec::new();
        integers(bytes, self.lengths.dtype, &mut values);
        let last = values.pop().unwrap_or_default();
        start += values.iter().map(|&length| u64::from(length)).sum::<u64>();
        let end = start + u64::from(last);
        match end <= self.offsets.after(index) {
            true => Ok((start, end)),
            false => Err(file.fail(offset, "the file was changed while it was open")),
        }
    }
}

/// Shows a tensor to `check`, one window after the other.
fn windows(
    file: &InputFile,
    place: &TensorPlace,
    what: &str,
    mut check: impl FnMut(At, &[u8]) -> Result<()>,
) -> Result<()> {
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

/// The matrix of this name, with scales if it is I8.
fn rows(file: &TensorFile, name: &str) -> Result<Rows> {
    const TYPES: [Dtype; 5] = [Dtype::F16, Dtype::BF16, Dtype::F32, Dtype::F64, Dtype::I8];
    let place = find(file, name, &TYPES, 2)?;
    let [rows, width] = [place.shape[0], place.shape[1]];
    if rows == 0 || width == 0 {
        let reason = format!(
            "{name} have shape {:?}: there must be a sample and a value",
            place.shape
        );
        return Err(file.file().fail(place.bytes.start, reason));
    }
    let scales = match (place.dtype, file.tensors().get("scales")) {
        (Dtype::I8, _) => {
            let scales = find(file, "scales", &[Dtype::F32], 1)?;
            if scales.shape != [rows] {
                let reason = format!(
                    "scales have shape {:?}, but there are {rows} embeddings",
                    scales.shape
                );
                return Err(file.file().fail(scales.bytes.start, reason));
            }
            Some(scales.bytes.start)
        }
        (dtype, Some(place)) => {
            let reason = format!("scales belong to embeddings of I8, but these are {dtype:?}");
            return Err(file.file().fail(place.bytes.start, reason));
        }
        (_, None) => None,
    };
    Ok(Rows {
        start: place.bytes.start,
        rows,
        width,
        dtype: place.dtype,
        scales,
    })
}

/// Whether a file of nobody's format is a matrix of embeddings rather than a dataset without metadata.
pub(super) fn is_matrix(file: &TensorFile) -> Result<bool> {
    if file.version(FORMAT, VERSION)?.is_some() || file.tensors().contains_key("lengths") {
        return Ok(false);
    }
    Ok(only_matrix(file).is_some())
}

/// The embeddings of a file: the tensor of this name, or the only one.
pub(super) fn matrix(file: &TensorFile) -> Result<Rows> {
    let Some(name) = only_matrix(file) else {
        let names: Vec<&String> = file.tensors().keys().collect();
        let reason = format!(
            "embeddings are a tensor \"embeddings\", or the only one; the file has {names:?}"
        );
        return Err(file.file().fail(0, reason));
    };
    rows(file, name)
}

fn only_matrix(file: &TensorFile) -> Option<&str> {
    let names = file.tensors().keys();
    let mut names = names.map(String::as_str).filter(|name| *name != "scales");
    let named = names.clone().find(|name| *name == "embeddings");
    named.or_else(|| names.next().filter(|_| names.next().is_none()))
}
