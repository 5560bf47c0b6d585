//! Batches of static shape. Their order depends on seed and epoch alone.

use std::sync::Arc;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::error::{Error, Result};

use super::dataset::Dataset;
use super::prefetch::Prefetch;
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
///
/// A text of more than L tokens is cut at the end, and so loses the token that ends it, such as `[SEP]`. A tokenizer that cuts to L itself keeps it.
///
/// Batches are prepared in the background: from the first call of [`next_batch`](Self::next_batch) in an epoch, one thread per four cores,
/// at most four, reads up to six batches ahead. Order and content do not depend on it. The threads end with the epoch, or when this value
/// is dropped.
#[derive(Debug)]
pub struct Batches {
    recipe: Recipe,
    /// Seed of the shuffles; `None` in evaluation, which keeps the order of the file.
    seed: Option<u64>,
    /// See [`Batches::chunks`].
    chunks: usize,
    epoch: u64,
    /// Number of batches of this epoch that were given out.
    position: usize,
    /// The batch that was given out last.
    batch: Batch,
    background: Option<Prefetch>,
}

/// What makes a batch out of its number.
#[derive(Clone, Debug)]
struct Recipe {
    dataset: Dataset,
    batch: usize,
    length: usize,
    padding: u32,
    /// Indices of the samples; a 32-bit index is enough for all formats.
    order: Arc<Vec<u32>>,
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
        let samples = u32::try_from(dataset.len())
            .map_err(|_| config("dataset", "has more than 2^32 - 1 samples"))?;
        Ok(Self {
            seed,
            chunks: 1,
            epoch: 0,
            position: 0,
            batch: Batch {
                ids: zeros("length", batch, length)?,
                mask: zeros("length", batch, length)?,
                targets: zeros("batch", batch, dataset.width())?,
                samples: zeros("batch", batch, 1)?,
                valid: 0,
            },
            recipe: Recipe {
                dataset,
                batch,
                length,
                padding: 0,
                order: Arc::new((0..samples).collect()),
            },
            background: None,
        })
    }

    /// Fills texts up with this id from the next batch on, instead of 0. Any id of the vocabulary serves, since the mask is 0 there;
    /// that of [`EncoderOptions::padding`](super::EncoderOptions::padding) is the cheapest.
    #[must_use]
    pub fn padding(mut self, id: u32) -> Self {
        self.recipe.padding = id;
        self.background = None;
        self
    }

    /// In training, orders the samples such that in `chunks` epochs (numbers n·`chunks` to (n + 1)·`chunks` − 1) each sample is once in
    /// each of the `chunks` equal parts of its batch. Where parts train different networks, as in joint training, each network then sees
    /// each sample equally often. A random order shows a network some samples many times and others never. Starts the current epoch
    /// again. [`Trainer::fit`](super::Trainer::fit) calls this by itself.
    ///
    /// In an epoch, up to `chunks` − 1 samples are left out in addition to those that do not fill a last batch.
    ///
    /// # Errors
    /// [`Error::Config`] if `chunks` does not divide the number of samples per batch.
    pub fn chunks(mut self, chunks: usize) -> Result<Self> {
        self.set_chunks(chunks)?;
        self.start_epoch(self.epoch);
        Ok(self)
    }

    /// As [`Batches::chunks`], from the next start of an epoch on.
    pub(super) fn set_chunks(&mut self, chunks: usize) -> Result<()> {
        let batch = self.recipe.batch;
        if chunks == 0 || !batch.is_multiple_of(chunks) {
            let reason = format!("is {chunks}, but must divide the batch of {batch}");
            return Err(config("chunks", reason));
        }
        self.chunks = chunks;
        Ok(())
    }

    /// The dataset.
    #[must_use]
    pub fn dataset(&self) -> &Dataset {
        &self.recipe.dataset
    }

    /// Number of samples per batch, B.
    #[must_use]
    pub fn batch_size(&self) -> usize {
        self.recipe.batch
    }

    /// Number of tokens per sample, L.
    #[must_use]
    pub fn length(&self) -> usize {
        self.recipe.length
    }

    /// Seed of the order in training.
    pub(super) fn seed(&self) -> Option<u64> {
        self.seed
    }

    /// Number of batches per epoch, at least one.
    #[must_use]
    pub fn per_epoch(&self) -> usize {
        let (samples, batch) = (self.recipe.order.len(), self.recipe.batch);
        match self.seed {
            Some(_) => samples / batch,
            None => samples.div_ceil(batch),
        }
    }

    /// The current epoch, and the number of its batches that were given out.
    #[must_use]
    pub fn position(&self) -> (u64, usize) {
        (self.epoch, self.position)
    }

    /// Goes to the start of an epoch. In training, its order depends on the seed and its number alone.
    pub fn start_epoch(&mut self, epoch: u64) {
        self.background = None;
        self.epoch = epoch;
        self.position = 0;
        if let Some(seed) = self.seed {
            // Not copied: the threads that shared it have ended.
            let order: &mut Vec<u32> = Arc::make_mut(&mut self.recipe.order);
            for (i, slot) in order.iter_mut().enumerate() {
                *slot = i as u32;
            }
            match self.chunks {
                1 => shuffle(order, [seed, epoch, 0, 0]),
                chunks => {
                    *order = in_turn(
                        std::mem::take(order),
                        chunks,
                        self.recipe.batch,
                        [seed, epoch],
                    )
                }
            }
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
        let count = self.per_epoch();
        if self.position == count {
            return Ok(None);
        }
        let background = match &self.background {
            Some(background) => background,
            None => {
                let maker = || {
                    let (recipe, mut buffer) = (self.recipe.clone(), SampleBuffer::default());
                    move |number, batch: &mut Batch| recipe.prepare(number, batch, &mut buffer)
                };
                let path = self.recipe.dataset.path();
                let spawned = Prefetch::spawn(self.position..count, &self.batch, maker);
                let spawned = spawned.map_err(|error| Error::io(path, error))?;
                self.background.insert(spawned)
            }
        };
        match background.next(&mut self.batch) {
            Ok(()) => self.position += 1,
            Err(error) => {
                // The next call starts again at this position.
                self.background = None;
                return Err(error);
            }
        }
        Ok(Some(&self.batch))
    }
}

impl Clone for Batches {
    /// The clone continues at the same position, with a thread of its own.
    fn clone(&self) -> Self {
        Self {
            recipe: self.recipe.clone(),
            batch: self.batch.clone(),
            background: None,
            ..*self
        }
    }
}

impl Recipe {
    /// Makes batch number `number` of the epoch.
    fn prepare(&self, number: usize, batch: &mut Batch, buffer: &mut SampleBuffer) -> Result<()> {
        let rest = &self.order[number * self.batch..];
        let last = rest.len().min(self.batch) - 1;
        batch.valid = last + 1;
        let rows = batch.ids.chunks_exact_mut(self.length);
        let rows = rows.zip(batch.mask.chunks_exact_mut(self.length));
        let targets = batch.targets.chunks_exact_mut(self.dataset.width());
        for (row, ((ids, mask), target)) in rows.zip(targets).enumerate() {
            let index = rest[row.min(last)] as usize;
            batch.samples[row] = index;
            // The last sample fills up the batch: it is in the buffer already.
            if row <= last {
                self.dataset.read(index, false, buffer)?;
            }
            let sample = &buffer.sample;
            sample.copy_tokens(ids, mask, self.padding)?;
            sample.copy_target(target)?;
        }
        Ok(())
    }
}

/// An order in which each sample is once in each of the `chunks` parts of its batch in `chunks` epochs. For so many epochs the samples
/// belong to as many classes, and in each epoch a part of the batches takes another class.
fn in_turn(
    mut samples: Vec<u32>,
    chunks: usize,
    batch: usize,
    [seed, epoch]: [u64; 2],
) -> Vec<u32> {
    let count = chunks as u64;
    let len = samples.len();
    shuffle(&mut samples, [seed, epoch / count, 1, count]);
    let mut classes: Vec<&mut [u32]> = samples.chunks_exact_mut(len / chunks).collect();
    for (class, samples) in (0..count).zip(&mut classes) {
        shuffle(samples, [seed, epoch, 2, class]);
    }
    let part = batch / chunks;
    let turn = (epoch % count) as usize;
    let mut order = Vec::with_capacity(len);
    for number in 0..len / batch {
        for chunk in 0..chunks {
            let class = &classes[(chunk + turn) % chunks];
            order.extend_from_slice(&class[number * part..(number + 1) * part]);
        }
    }
    // What fills no batch is not read, but counts.
    order.resize(len, 0);
    order
}

/// Fisher–Yates shuffle by a generator with this key. It is written out here so that no other crate can change the order.
fn shuffle(order: &mut [u32], key: [u64; 4]) {
    let mut random = ChaCha8Rng::from_seed(bytemuck::cast(key.map(u64::to_le)));
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
