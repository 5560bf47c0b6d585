//! Batches of static shape. Their order depends on seed and epoch alone.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::error::{Error, Result};

use super::dataset::Dataset;
use super::sample::SampleBuffer;

/// One batch of B samples, cut or filled up to L tokens.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Batch {
    /// Token ids `[B·L]`, the padding id after the end of a text.
    pub ids: Vec<u32>,
    /// Mask `[B·L]`, 1 for tokens that count, 0 for the rest and after the end of a text.
    pub mask: Vec<f32>,
    /// Teacher embeddings `[B·E]`.
    pub targets: Vec<f32>,
    /// Indices of the samples in the dataset `[B]`.
    pub samples: Vec<usize>,
    /// Number of samples that count. They come first; the rest repeat the last of them.
    pub valid: usize,
}

/// An iterator over the batches of a dataset, epoch after epoch. All batches have the same shape.
#[derive(Clone, Debug)]
pub struct Batches {
    dataset: Dataset,
    length: usize,
    /// Seed of the shuffles; `None` in evaluation, which keeps the order of the file.
    seed: Option<u64>,
    epoch: u64,
    order: Vec<usize>,
    /// Number of batches of this epoch that were given out.
    position: usize,
    padding: u32,
    batch: Batch,
    /// Reused from one sample to the next.
    buffer: SampleBuffer,
}

impl Batches {
    /// Batches for training. Every epoch has another order, and leaves out the samples that do not fill a last batch.
    /// Starts with epoch 0.
    ///
    /// # Errors
    /// [`Error::Config`] if `batch` or `length` is zero or too large, or the dataset has not one full batch.
    pub fn training(dataset: Dataset, batch: usize, length: usize, seed: u64) -> Result<Self> {
        if batch > dataset.len() {
            let reason = format!(
                "{batch} exceeds the {} samples of the dataset",
                dataset.len()
            );
            return Err(config("batch", reason));
        }
        let mut batches = Self::new(dataset, batch, length, Some(seed))?;
        batches.start_epoch(0);
        Ok(batches)
    }

    /// Batches for evaluation: every sample once, in the order of the file. The last batch is filled up by repeating its last
    /// sample; [`Batch::valid`] says how many count.
    ///
    /// # Errors
    /// [`Error::Config`] if `batch` or `length` is zero or too large, or the dataset is empty.
    pub fn evaluation(dataset: Dataset, batch: usize, length: usize) -> Result<Self> {
        if dataset.is_empty() {
            return Err(config("dataset", "is empty"));
        }
        Self::new(dataset, batch, length, None)
    }

    fn new(dataset: Dataset, batch: usize, length: usize, seed: Option<u64>) -> Result<Self> {
        if length == 0 {
            return Err(config("length", "is zero"));
        }
        if batch == 0 {
            return Err(config("batch", "is zero"));
        }
        Ok(Self {
            length,
            seed,
            epoch: 0,
            order: (0..dataset.len()).collect(),
            position: 0,
            padding: 0,
            batch: Batch {
                ids: zeros("length", batch, length)?,
                mask: zeros("length", batch, length)?,
                targets: zeros("batch", batch, dataset.width())?,
                samples: zeros("batch", batch, 1)?,
                valid: 0,
            },
            buffer: SampleBuffer::default(),
            dataset,
        })
    }

    /// Fills texts up with this id from the next batch on, instead of 0. Any id of the vocabulary serves, since the mask is 0 there;
    /// that of [`EncoderOptions::padding`](super::EncoderOptions::padding) is the cheapest.
    #[must_use]
    pub fn padding(mut self, id: u32) -> Self {
        self.padding = id;
        self
    }

    /// The dataset.
    #[must_use]
    pub fn dataset(&self) -> &Dataset {
        &self.dataset
    }

    /// Number of samples per batch, B.
    #[must_use]
    pub fn batch_size(&self) -> usize {
        self.batch.samples.len()
    }

    /// Number of tokens per sample, L.
    #[must_use]
    pub fn length(&self) -> usize {
        self.length
    }

    /// Seed of the order in training.
    pub(super) fn seed(&self) -> Option<u64> {
        self.seed
    }

    /// Number of batches per epoch, at least one.
    #[must_use]
    pub fn per_epoch(&self) -> usize {
        match self.seed {
            Some(_) => self.order.len() / self.batch_size(),
            None => self.order.len().div_ceil(self.batch_size()),
        }
    }

    /// The current epoch, and the number of its batches that were given out.
    #[must_use]
    pub fn position(&self) -> (u64, usize) {
        (self.epoch, self.position)
    }

    /// Goes to the start of an epoch. In training, its order depends on the seed and its number alone.
    pub fn start_epoch(&mut self, epoch: u64) {
        self.epoch = epoch;
        self.position = 0;
        if let Some(seed) = self.seed {
            shuffle(&mut self.order, seed, epoch);
        }
    }

    /// Goes to a [`position`](Self::position), to continue from there. A position past the end is the end of the epoch.
    pub fn seek(&mut self, epoch: u64, position: usize) {
        self.start_epoch(epoch);
        self.position = position.min(self.per_epoch());
    }

    /// The next batch of this epoch, or `None` at its end.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Format`] if the file can no longer be read, for example because it has become shorter. The position stays
    /// where it was, so that the next call reads the same batch again.
    pub fn next_batch(&mut self) -> Result<Option<&Batch>> {
        if self.position == self.per_epoch() {
            return Ok(None);
        }
        let size = self.batch_size();
        let rest = &self.order[self.position * size..];
        let last = rest.len().min(size) - 1;
        self.batch.valid = last + 1;
        let rows = self.batch.ids.chunks_exact_mut(self.length);
        let rows = rows.zip(self.batch.mask.chunks_exact_mut(self.length));
        let targets = self.batch.targets.chunks_exact_mut(self.dataset.width());
        for (row, ((ids, mask), target)) in rows.zip(targets).enumerate() {
            let index = rest[row.min(last)];
            self.batch.samples[row] = index;
            // The last sample fills up the batch: it is in the buffer already.
            if row <= last {
                self.dataset.read(index, false, &mut self.buffer)?;
            }
            let sample = &self.buffer.sample;
            sample.copy_tokens(ids, mask, self.padding)?;
            sample.copy_target(target)?;
        }
        self.position += 1;
        Ok(Some(&self.batch))
    }
}

/// Fisher–Yates shuffle of 0..n by a generator keyed with seed and epoch. It is written out here so that no other crate can change
/// the order.
fn shuffle(order: &mut [usize], seed: u64, epoch: u64) {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&epoch.to_le_bytes());
    let mut random = ChaCha8Rng::from_seed(key);
    for (i, slot) in order.iter_mut().enumerate() {
        *slot = i;
    }
    for i in (1..order.len()).rev() {
        // The high half of a 64 × 64-bit product: uniform in 0..=i up to 2^-64 (i + 1).
        let product = u128::from(random.next_u64()) * (i as u128 + 1);
        order.swap(i, (product >> 64) as usize);
    }
}

fn zeros<T: Clone + Default>(field: &'static str, rows: usize, cols: usize) -> Result<Vec<T>> {
    let too_large = || config(field, format!("is too large: {rows} x {cols} values"));
    let length = rows.checked_mul(cols).ok_or_else(too_large)?;
    let mut values = Vec::new();
    values.try_reserve_exact(length).map_err(|_| too_large())?;
    values.resize(length, T::default());
    Ok(values)
}

fn config(field: &'static str, reason: impl Into<String>) -> Error {
    Error::Config {
        field,
        reason: reason.into(),
    }
}
