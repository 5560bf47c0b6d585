//! One sample of a dataset, and what its readers and writers check.

use std::path::Path;

use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};

/// Upper bound on the bytes of a sample, or of its text, so that a damaged file does not fill the memory.
pub(super) const MAX_SAMPLE: u64 = 64 << 20;

/// How far the squared length of a target that is called normalised may be from 1. Targets that were rounded to f16 stay within it.
const UNIT: f64 = 0.01;

/// Whether a target has the length 1, up to rounding.
pub(super) fn is_unit(target: &[f32]) -> bool {
    let square: f64 = target.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    (square - 1.0).abs() <= UNIT
}

/// What a dataset is checked against when it is opened, and how texts without tokens become samples.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct OpenOptions<'a> {
    /// Size of the vocabulary: token ids must be below it. Where it is `None`, the tokenizer's size counts; without either, ids
    /// are not checked.
    pub vocab: Option<u32>,
    /// Makes the token ids of samples that have only a text. Files that hold token ids do not need it.
    pub tokenizer: Option<&'a dyn Tokenizer>,
    /// Files of at most this many bytes are read into memory when they are opened; samples of larger files are read one by one,
    /// two or three system calls each. JSON lines and texts are decoded once: what they make is held in memory up to this size, and in a
    /// temporary file beyond it. 32 MiB by default.
    pub in_memory: u64,
    /// For a file of texts: the file of their embeddings. By default it lies beside the texts under the same name, with `.npy` or
    /// `.safetensors` at its end.
    pub embeddings: Option<&'a Path>,
    /// For a file of embeddings: the file of their texts, which by default lies beside it and ends in `.txt`. For another dataset: texts of
    /// its samples, one per line, instead of those in the file.
    pub texts: Option<&'a Path>,
    /// Folder of temporary files. By default it is the system's, which the environment variable `TMPDIR` names on Unix.
    pub temporary: Option<&'a Path>,
}

impl Default for OpenOptions<'_> {
    fn default() -> Self {
        Self {
            vocab: None,
            tokenizer: None,
            in_memory: 32 << 20,
            embeddings: None,
            texts: None,
            temporary: None,
        }
    }
}

impl<'a> OpenOptions<'a> {
    /// Sets the size of the vocabulary, which token ids must be below.
    #[must_use]
    pub fn vocab(mut self, vocab: u32) -> Self {
        self.vocab = Some(vocab);
        self
    }

    /// Sets the tokenizer of texts that have no token ids.
    #[must_use]
    pub fn tokenizer(mut self, tokenizer: &'a dyn Tokenizer) -> Self {
        self.tokenizer = Some(tokenizer);
        self
    }

    /// Sets up to how many bytes a file is read into memory; 0 reads samples of every file one by one.
    #[must_use]
    pub fn in_memory(mut self, bytes: u64) -> Self {
        self.in_memory = bytes;
        self
    }

    /// Names the file of embeddings that belong to a file of texts.
    #[must_use]
    pub fn embeddings(mut self, path: &'a Path) -> Self {
        self.embeddings = Some(path);
        self
    }

    /// Names the file of texts that belong to embeddings or to the samples of another dataset.
    #[must_use]
    pub fn texts(mut self, path: &'a Path) -> Self {
        self.texts = Some(path);
        self
    }

    /// Sets the folder of temporary files.
    #[must_use]
    pub fn temporary(mut self, folder: &'a Path) -> Self {
        self.temporary = Some(folder);
        self
    }

    /// Exclusive upper bound of the ids, if they are checked.
    pub(super) fn limit(&self) -> Option<u32> {
        let size = self.tokenizer.map(Tokenizer::vocab_size);
        self.vocab.or(size)
    }
}

impl std::fmt::Debug for OpenOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenOptions")
            .field("vocab", &self.vocab)
            .field("tokenizer", &self.tokenizer.map(|_| "…"))
            .field("in_memory", &self.in_memory)
            .field("embeddings", &self.embeddings)
            .field("texts", &self.texts)
            .field("temporary", &self.temporary)
            .finish()
    }
}

/// One sample: token ids, mask, the teacher's embedding and, where the file has it, the text.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    pub(super) ids: Vec<u32>,
    /// As long as the ids.
    pub(super) mask: Vec<u8>,
    pub(super) target: Vec<f32>,
    pub(super) text: Option<String>,
}

/// A sample and the bytes it is decoded from, reused from one sample to the next.
#[derive(Clone, Debug, Default)]
pub(super) struct SampleBuffer {
    pub sample: Sample,
    pub bytes: Vec<u8>,
}

// No `is_empty`: a sample without tokens is refused when the file is opened.
#[allow(clippy::len_without_is_empty)]
impl Sample {
    /// Number of tokens, at least one.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Token ids, as long as [`len`](Self::len).
    #[must_use]
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Mask, 1 for tokens that count and 0 for padding, as long as [`len`](Self::len).
    #[must_use]
    pub fn mask(&self) -> &[u8] {
        &self.mask
    }

    /// The teacher's embedding, as long as the dataset's width.
    #[must_use]
    pub fn target(&self) -> &[f32] {
        &self.target
    }

    /// The text, where the file has texts.
    #[must_use]
    pub fn text(&self) -> Option<&str> {
        self.text.as_deref()
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
        let mut source = self.ids.iter().copied().zip(self.mask.iter().copied());
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
        if target.len() != self.target.len() {
            let reason = format!(
                "{} values, but the dataset has {}",
                target.len(),
                self.target.len()
            );
            return Err(data("target", reason));
        }
        target.copy_from_slice(&self.target);
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
    check_tokens(index, ids, mask)?;
    check_target(index, width, target)
}

/// What a writer asks of the tokens of sample number `index`.
pub(super) fn check_tokens(index: usize, ids: &[u32], mask: &[u8]) -> Result<()> {
    let reason = if ids.is_empty() {
        "no tokens".into()
    } else if mask.len() != ids.len() {
        format!("{} mask values for {} tokens", mask.len(), ids.len())
    } else if mask.iter().any(|&byte| byte > 1) {
        "a mask value is neither 0 nor 1".into()
    } else {
        return Ok(());
    };
    Err(data(&format!("sample {index}"), reason))
}

/// What a writer asks of the target of sample number `index`.
pub(super) fn check_target(index: usize, width: usize, target: &[f32]) -> Result<()> {
    let reason = if target.len() != width {
        format!("target has {} values instead of {width}", target.len())
    } else if !target.iter().all(|value| value.is_finite()) {
        "a target value is not finite".into()
    } else {
        return Ok(());
    };
    Err(data(&format!("sample {index}"), reason))
}

/// What a writer asks of the number of bytes of sample number `index`.
pub(super) fn check_length(index: usize, bytes: usize) -> Result<()> {
    match bytes as u64 <= MAX_SAMPLE {
        true => Ok(()),
        false => {
            let reason = format!("has {bytes} bytes; samples of at most {MAX_SAMPLE} are read");
            Err(data(&format!("sample {index}"), reason))
        }
    }
}

/// What a writer asks of the width of the targets.
pub(super) fn check_width(width: usize) -> Result<u32> {
    u32::try_from(width)
        .ok()
        .filter(|&width| width > 0)
        .ok_or_else(|| {
            data(
                "target",
                format!("{width} values per sample, not 1 to 2^32 - 1"),
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
