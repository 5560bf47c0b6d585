//! Embeddings of texts on the host.

use std::slice::ChunksExact;

/// Embeddings `[n, E]` of `n` texts, dense and row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Embeddings {
    data: Vec<f32>,
    width: usize,
    truncated: Vec<Truncation>,
}

/// A text that did not fit the encoder's length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Truncation {
    /// Number of the text.
    pub text: usize,
    /// Number of tokens that were cut off.
    pub tokens: usize,
    /// Bytes at the end of the text that were not even tokenised, because enough tokens came before. Their tokens are not in
    /// [`Truncation::tokens`].
    pub bytes: usize,
}

impl Truncation {
    pub(super) fn new(text: usize, tokens: usize, bytes: usize) -> Self {
        Self {
            text,
            tokens,
            bytes,
        }
    }
}

impl Embeddings {
    /// `width` is positive, and `data` whole rows.
    pub(super) fn new(data: Vec<f32>, width: usize, truncated: Vec<Truncation>) -> Self {
        Self {
            data,
            width,
            truncated,
        }
    }

    /// Number of texts, n.
    #[must_use]
    pub fn len(&self) -> usize {
        self.data.len() / self.width
    }

    /// Whether there are no texts.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// Width of an embedding, E.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    /// The embedding `[E]` of text number `index`.
    ///
    /// # Panics
    /// As a slice does, if there is no such text; see [`Embeddings::get`].
    #[must_use]
    pub fn row(&self, index: usize) -> &[f32] {
        &self.data[index * self.width..(index + 1) * self.width]
    }

    /// The embedding `[E]` of text number `index`, if there is such a text.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<&[f32]> {
        self.iter().nth(index)
    }

    /// The embeddings in the order of the texts.
    pub fn iter(&self) -> ChunksExact<'_, f32> {
        self.data.chunks_exact(self.width)
    }

    /// All values `[n, E]`.
    #[must_use]
    pub fn as_slice(&self) -> &[f32] {
        &self.data
    }

    /// All values `[n, E]`.
    #[must_use]
    pub fn into_vec(self) -> Vec<f32> {
        self.data
    }

    /// The texts that did not fit, in order. Of each the beginning was encoded.
    #[must_use]
    pub fn truncated(&self) -> &[Truncation] {
        &self.truncated
    }
}

impl<'a> IntoIterator for &'a Embeddings {
    type Item = &'a [f32];
    type IntoIter = ChunksExact<'a, f32>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// Divides each row of `[n, width]` by its norm. Rows whose norm is 0, or not finite, stay as they are.
pub(super) fn normalize(rows: &mut [f32], width: usize) {
    for row in rows.chunks_exact_mut(width) {
        let squares: f64 = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        let norm = squares.sqrt();
        if norm > 0.0 && norm.is_finite() {
            row.iter_mut()
                .for_each(|x| *x = (f64::from(*x) / norm) as f32);
        }
    }
}
