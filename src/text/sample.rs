//! One sample of a dataset, borrowed from the mapped file, and what its reader and writer check.

use half::f16;

use crate::error::{Error, Result};
use crate::setters::setters;

/// What the content of a dataset is checked against when it is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct OpenOptions {
    /// Size of the vocabulary: token ids must be below it. `None` leaves them unchecked.
    pub vocab: Option<u32>,
}

impl OpenOptions {
    setters! {
        vocab: Option<u32>,
    }
}

/// One sample: token ids, mask, the teacher's embedding and, where the file has it, the text.
///
/// A view of the mapped file, cheap to copy. Values are decoded as they are read, because nothing in these files
/// is aligned.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    pub(super) ids: Ids<'a>,
    /// `None`: every token counts.
    pub(super) mask: Option<&'a [u8]>,
    pub(super) target: Target<'a>,
    pub(super) text: Option<&'a str>,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Ids<'a> {
    U32(&'a [[u8; 4]]),
    U16(&'a [[u8; 2]]),
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Target<'a> {
    F32(&'a [[u8; 4]]),
    F16(&'a [[u8; 2]]),
}

impl<'a> Ids<'a> {
    pub(super) fn iter(self) -> impl ExactSizeIterator<Item = u32> + use<'a> {
        let length = match self {
            Self::U32(ids) => ids.len(),
            Self::U16(ids) => ids.len(),
        };
        (0..length).map(move |t| match self {
            Self::U32(ids) => u32::from_le_bytes(ids[t]),
            Self::U16(ids) => u16::from_le_bytes(ids[t]).into(),
        })
    }
}

impl<'a> Target<'a> {
    pub(super) fn iter(self) -> impl ExactSizeIterator<Item = f32> + use<'a> {
        let width = match self {
            Self::F32(values) => values.len(),
            Self::F16(values) => values.len(),
        };
        (0..width).map(move |e| match self {
            Self::F32(values) => f32::from_le_bytes(values[e]),
            Self::F16(values) => f16::from_le_bytes(values[e]).to_f32(),
        })
    }
}

// No `is_empty`: a sample without tokens is refused when the file is opened.
#[allow(clippy::len_without_is_empty)]
impl<'a> Sample<'a> {
    /// Number of tokens, at least one.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ids.iter().len()
    }

    /// Token ids, as long as [`len`](Self::len).
    pub fn ids(&self) -> impl ExactSizeIterator<Item = u32> + use<'a> {
        self.ids.iter()
    }

    /// Mask, 1 for tokens that count and 0 for padding, as long as [`len`](Self::len).
    pub fn mask(&self) -> impl ExactSizeIterator<Item = u8> + use<'a> {
        let mask = self.mask;
        (0..self.len()).map(move |t| mask.map_or(1, |mask| mask[t]))
    }

    /// The teacher's embedding, as long as the dataset's width.
    pub fn target(&self) -> impl ExactSizeIterator<Item = f32> + use<'a> {
        self.target.iter()
    }

    /// The text, where the file has texts.
    #[must_use]
    pub fn text(&self) -> Option<&'a str> {
        self.text
    }

    /// Copies ids and mask into rows of static length: longer samples are cut, shorter ones filled up with the id `padding` and mask 0.
    ///
    /// # Errors
    /// [`Error::Data`] if the two rows differ in length.
    pub fn copy_tokens(&self, ids: &mut [u32], mask: &mut [f32], padding: u32) -> Result<()> {
        if ids.len() != mask.len() {
            let reason = format!("{} ids, but {} mask values", ids.len(), mask.len());
            return Err(data("tokens", reason));
        }
        let mut source = self.ids().zip(self.mask());
        for (id, keep) in ids.iter_mut().zip(mask) {
            let (token, byte) = source.next().unwrap_or((padding, 0));
            *id = token;
            *keep = f32::from(byte);
        }
        Ok(())
    }

    /// Copies the teacher's embedding.
    ///
    /// # Errors
    /// [`Error::Data`] if `target` is not as long as the dataset is wide.
    pub fn copy_target(&self, target: &mut [f32]) -> Result<()> {
        let source = self.target();
        if target.len() != source.len() {
            let reason = format!(
                "{} values, but the dataset has {}",
                target.len(),
                source.len()
            );
            return Err(data("target", reason));
        }
        for (to, from) in target.iter_mut().zip(source) {
            *to = from;
        }
        Ok(())
    }
}

/// What a writer asks of sample number `index`.
pub(super) fn check_sample(
    index: usize,
    width: usize,
    ids: &[u32],
    mask: &[u8],
    target: &[f32],
) -> Result<()> {
    let reason = if ids.is_empty() {
        "no tokens".into()
    } else if mask.len() != ids.len() {
        format!("{} mask values for {} tokens", mask.len(), ids.len())
    } else if mask.iter().any(|&byte| byte > 1) {
        "a mask value is neither 0 nor 1".into()
    } else if target.len() != width {
        format!("target has {} values instead of {width}", target.len())
    } else if !target.iter().all(|value| value.is_finite()) {
        "a target value is not finite".into()
    } else {
        return Ok(());
    };
    Err(data(&format!("sample {index}"), reason))
}

/// What a writer asks of the width of the targets.
pub(super) fn check_width(width: usize) -> Result<u32> {
    u32::try_from(width)
        .ok()
        .filter(|&width| width > 0)
        .ok_or_else(|| {
            data(
                "target",
                format!("{width} values a sample, not 1 to 2^32 - 1"),
            )
        })
}

/// What a writer asks of the number of samples.
pub(super) fn check_samples(samples: usize) -> Result<u32> {
    u32::try_from(samples)
        .ok()
        .filter(|&samples| samples > 0)
        .ok_or_else(|| data("dataset", format!("{samples} samples, not 1 to 2^32 - 1")))
}

pub(super) fn data(name: &str, reason: impl Into<String>) -> Error {
    Error::Data {
        name: name.into(),
        reason: reason.into(),
    }
}
