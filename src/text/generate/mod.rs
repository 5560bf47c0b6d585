//! Text from a trained decoder, token by token on the GPU.
//!
//! A token takes as much work wherever it stands: each block keeps the past that its convolution reads in a ring on the device. The
//! next token is chosen there, too, and the host reads tokens some steps later, while the device computes the next ones.

mod batch;
mod network;
mod options;
mod rows;
mod weights;

use std::collections::VecDeque;
use std::fmt;
#[cfg(feature = "tokenizer")]
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use options::{DecodeOptions, Finish, Generation, Piece, Stop};

use super::model::Model;
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::gpu::{Gpu, Sequence};
use crate::graph::Graph;
use crate::setters::setters;
use crate::types::{DType, Precision};
use batch::{Batch, Loan};
use network::{Network, Tokens};
use weights::DeviceWeights;

/// How a [`TextDecoder`] computes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TextDecoderOptions {
    /// Element type of weights and activations. [`Precision::Mixed`] is f16 storage with f32 sums.
    pub precision: Precision,
    /// Batch sizes in texts. More texts than the largest are decoded one batch after the other.
    pub batches: Vec<usize>,
}

impl Default for TextDecoderOptions {
    /// f32, batches of 1, 4, 16 and 64 texts.
    fn default() -> Self {
        Self {
            precision: Precision::F32,
            batches: vec![1, 4, 16, 64],
        }
    }
}

impl TextDecoderOptions {
    setters! {
        precision: Precision,
        batches: Vec<usize>,
    }

    /// The smallest first.
    fn sizes(&self) -> Result<Vec<usize>> {
        let mut batches = self.batches.clone();
        batches.sort_unstable();
        batches.dedup();
        match batches.first() {
            None | Some(0) => Err(Error::Config {
                field: "batches",
                reason: "must be positive numbers, at least one".into(),
            }),
            Some(_) => Ok(batches),
        }
    }
}

/// Networks of one size that are kept while nobody uses them.
const MOST_IDLE: usize = 2;

/// What all batches of a decoder share.
struct Shared {
    gpu: Gpu,
    weights: Arc<DeviceWeights>,
    /// Sizes of batches, the smallest first.
    batches: Vec<usize>,
    tokenizer: Arc<dyn Tokenizer>,
    start: u32,
    end: Option<u32>,
    padding: u32,
    idle: Mutex<Vec<Network>>,
}

impl Shared {
    fn idle(&self) -> MutexGuard<'_, Vec<Network>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A network for at least `n` texts that nobody uses.
    fn take(&self, n: usize, sampled: bool) -> Result<Network> {
        let fits = self.batches.iter().find(|&&batch| batch >= n);
        // There is one, since no call has more texts than the largest.
        let batch = fits.copied().unwrap_or(n);
        let known = {
            let mut idle = self.idle();
            let mut all = idle.iter();
            let found = all.position(|known| known.batch == batch && known.sampled == sampled);
            found.map(|at| idle.swap_remove(at))
        };
        match known {
            Some(network) => Ok(network),
            None => Network::new(&self.gpu, &self.weights, batch, sampled),
        }
    }

    fn give_back(&self, network: Network) {
        let mut idle = self.idle();
        let same =
            |known: &&Network| known.batch == network.batch && known.sampled == network.sampled;
        if idle.iter().filter(same).count() < MOST_IDLE {
            idle.push(network);
        }
    }

    fn tokens<'a>(&self, stop: &'a [u32]) -> Tokens<'a> {
        Tokens {
            start: self.start,
            padding: self.padding,
            stop,
        }
    }

    /// Texts of the largest batch.
    fn largest(&self) -> usize {
        self.batches.last().copied().unwrap_or(1)
    }

    fn stop_tokens(&self, options: &DecodeOptions) -> Vec<u32> {
        let given = options.stop.iter().filter_map(|stop| match stop {
            Stop::Token(token) => Some(*token),
            Stop::Text(_) => None,
        });
        self.end.into_iter().chain(given).collect()
    }
}

/// Turns embeddings into text. Any thread may use it, also several at once; cloning shares it.
///
/// A text begins after the tokenizer's start token (`[CLS]` or `<s>`) and ends at its end token (`[SEP]` or `</s>`), as in training.
/// Texts are decoded in batches of a few sizes, the last one filled up ([`TextDecoderOptions::batches`]). Each size is compiled when it is first used, or by
/// [`TextDecoder::warm_up`]. The device holds the weights once, without anything that only training needs.
///
/// ```no_run
/// use energyflow::text::{DecodeOptions, TextDecoder};
/// use energyflow::{Gpu, GpuOptions};
///
/// # fn main() -> energyflow::Result<()> {
/// # let z: Vec<f32> = Vec::new();
/// let gpu = Gpu::new(&GpuOptions::default())?;
/// let decoder = TextDecoder::load(&gpu, "model")?;
/// let options = DecodeOptions::default().temperature(0.8).top_k(Some(40)).seed(1);
/// for generation in decoder.decode(&z, &options)? {
///     println!("{}", generation.text);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct TextDecoder(Arc<Shared>);

impl fmt::Debug for TextDecoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let weights = &self.0.weights;
        f.debug_struct("TextDecoder")
            .field("embedding", &weights.embedding)
            .field("vocabulary", &weights.vocabulary)
            .field("dtype", &weights.dtype)
            .finish_non_exhaustive()
    }
}

impl TextDecoder {
    /// Loads the decoder of a [model folder](Model), with its tokenizer.
    ///
    /// # Errors
    /// As [`Model::load`] and [`TextDecoder::new`].
    #[cfg(feature = "tokenizer")]
    pub fn load(gpu: &Gpu, dir: impl AsRef<Path>) -> Result<Self> {
        Self::load_with(gpu, dir, &TextDecoderOptions::default())
    }

    /// As [`TextDecoder::load`], with options.
    ///
    /// # Errors
    /// As [`TextDecoder::load`].
    #[cfg(feature = "tokenizer")]
    pub fn load_with(
        gpu: &Gpu,
        dir: impl AsRef<Path>,
        options: &TextDecoderOptions,
    ) -> Result<Self> {
        Self::new(gpu, &Model::load(dir)?, options)
    }

    /// The decoder of a model, with its tokenizer.
    ///
    /// # Errors
    /// [`Error::Config`] for a model without tokenizer; as [`TextDecoder::with_tokenizer`].
    #[cfg(feature = "tokenizer")]
    pub fn new(gpu: &Gpu, model: &Model, options: &TextDecoderOptions) -> Result<Self> {
        let Some(json) = &model.tokenizer else {
            return Err(Error::Config {
                field: "tokenizer",
                reason: "is missing: the model folder has no tokenizer.json; use TextDecoder::with_tokenizer".into(),
            });
        };
        // Nothing is tokenised, so the length does not matter.
        let tokenizer = super::WordPiece::from_bytes(json, 1 << 20)?;
        Self::with_tokenizer(gpu, model, Arc::new(tokenizer), options)
    }

    /// The decoder of a model, with a tokenizer of the caller.
    ///
    /// # Errors
    /// [`Error::Config`] for a model without decoder, and for options out of range; [`Error::Data`] naming a parameter that is missing,
    /// has another shape, or does not fit f16; [`Error::Tokenizer`] for a tokenizer without start token, or whose start or end token is
    /// not in the decoder's vocabulary; [`Error::OutOfMemory`], [`Error::DeviceLost`], [`Error::Limit`].
    pub fn with_tokenizer(
        gpu: &Gpu,
        model: &Model,
        tokenizer: Arc<dyn Tokenizer>,
        options: &TextDecoderOptions,
    ) -> Result<Self> {
        let mut graph = Graph::new();
        let layers = model.build_decoder(&mut graph, None)?;
        let Some(decoder) = &model.decoder else {
            return Err(Error::Config {
                field: "decoder",
                reason: "is missing: the model has an encoder only".into(),
            });
        };
        let batches = options.sizes()?;
        let vocabulary = decoder.vocabulary;
        let find = |names: [&str; 2]| names.into_iter().find_map(|name| tokenizer.token_id(name));
        let start = find(["[CLS]", "<s>"]).ok_or_else(|| {
            Error::Tokenizer("the vocabulary has neither [CLS] nor <s>, which begin a text".into())
        })?;
        let end = find(["[SEP]", "</s>"]);
        for token in std::iter::once(start).chain(end) {
            if token as usize >= vocabulary {
                return Err(Error::Tokenizer(format!(
                    "its start or end token is {token}, but the ids of the decoder are below {vocabulary}"
                )));
            }
        }
        let padding = tokenizer.padding_id();
        let padding = padding.filter(|&id| (id as usize) < vocabulary);
        let dtype = match options.precision {
            Precision::F32 => DType::F32,
            Precision::Mixed => DType::F16,
        };
        let weights = DeviceWeights::new(gpu, decoder, (&graph, &layers), &model.weights, dtype)?;
        Ok(Self(Arc::new(Shared {
            gpu: gpu.clone(),
            weights: Arc::new(weights),
            batches,
            tokenizer,
            start,
            end,
            padding: padding.unwrap_or(start),
            idle: Mutex::default(),
        })))
    }

    /// Width of an embedding, E.
    #[must_use]
    pub fn embedding(&self) -> usize {
        self.0.weights.embedding
    }

    /// Decodes embeddings z [n, E], row after row. Text `i` is that of row `i`.
    ///
    /// # Errors
    /// [`Error::Config`] for options out of their range; [`Error::Data`] unless z is whole rows of finite numbers (which fit f16, where
    /// the weights are f16), and where logits are not finite; [`Error::Tokenizer`]; [`Error::OutOfMemory`], [`Error::DeviceLost`].
    pub fn decode(&self, z: &[f32], options: &DecodeOptions) -> Result<Vec<Generation>> {
        let mut generations = Vec::with_capacity(z.len() / self.embedding());
        for (first, z) in self.batches(z, options)? {
            generations.extend(Batch::new(&self.0, z, first, options)?.run()?);
        }
        Ok(generations)
    }

    /// As [`TextDecoder::decode`], without blocking while the device works. Any executor will do.
    ///
    /// # Errors
    /// As [`TextDecoder::decode`].
    pub async fn decode_async(
        &self,
        z: &[f32],
        options: &DecodeOptions,
    ) -> Result<Vec<Generation>> {
        let mut generations = Vec::with_capacity(z.len() / self.embedding());
        for (first, z) in self.batches(z, options)? {
            let batch = Batch::new(&self.0, z, first, options)?;
            generations.extend(batch.run_async().await?);
        }
        Ok(generations)
    }

    /// Decodes what `teacher` makes of texts: n texts to n embeddings of E, row after row.
    ///
    /// # Errors
    /// As [`TextDecoder::decode`]; what `teacher` returns.
    pub fn decode_from_teacher<T: AsRef<str>>(
        &self,
        texts: &[T],
        teacher: impl FnOnce(&[&str]) -> Result<Vec<f32>>,
        options: &DecodeOptions,
    ) -> Result<Vec<Generation>> {
        let texts: Vec<&str> = texts.iter().map(AsRef::as_ref).collect();
        let z = teacher(&texts)?;
        let (n, width) = (texts.len(), self.embedding());
        if z.len() != n * width {
            return Err(Error::Data {
                name: "z".into(),
                reason: format!(
                    "the teacher gave {} numbers for {n} texts, which are not {width} per text",
                    z.len()
                ),
            });
        }
        self.decode(&z, options)
    }

    /// As [`TextDecoder::decode`], with the tokens as they come: the iterator waits for the device, and gives what is new of each text.
    /// Texts follow each other in batches of the largest size.
    ///
    /// # Errors
    /// As [`TextDecoder::decode`], here or from the iterator, which then ends.
    pub fn stream(&self, z: &[f32], options: &DecodeOptions) -> Result<Stream> {
        let batches = self.batches(z, options)?;
        let waiting = batches.map(|(first, z)| (first, z.to_vec())).collect();
        Ok(Stream {
            shared: Arc::clone(&self.0),
            options: options.clone(),
            waiting,
            batch: None,
            pieces: VecDeque::new(),
        })
    }

    /// Compiles what `n` texts with these options need, so that the first call takes no longer than others.
    ///
    /// # Errors
    /// As [`TextDecoder::decode`].
    pub fn warm_up(&self, n: usize, options: &DecodeOptions) -> Result<()> {
        let largest = self.0.largest();
        let rest = match n % largest {
            _ if n < largest => n,
            0 => largest,
            rest => rest,
        };
        let options = options.clone().max_len(1);
        for n in [n.min(largest), rest] {
            self.decode(&vec![0.0; n * self.embedding()], &options)?;
        }
        Ok(())
    }

    /// Checks z and the options; batches of rows with the number of the first.
    fn batches<'z>(
        &self,
        z: &'z [f32],
        options: &DecodeOptions,
    ) -> Result<impl Iterator<Item = (usize, &'z [f32])> + use<'z>> {
        let weights = &self.0.weights;
        options.check(weights.vocabulary)?;
        let width = weights.embedding;
        let fail = |reason: String| {
            Err(Error::Data {
                name: "z".into(),
                reason,
            })
        };
        if !z.len().is_multiple_of(width) {
            let reason = format!("has {} numbers, which are no rows of {width}", z.len());
            return fail(reason);
        }
        let largest = match weights.dtype {
            DType::F16 => half::f16::MAX.to_f32(),
            _ => f32::MAX,
        };
        let fits = |x: &f32| x.abs() <= largest;
        if let Some(at) = z.iter().position(|x| !fits(x)) {
            let (row, col) = (at / width, at % width);
            let x = z[at];
            let reason = match x.is_finite() {
                true => format!("row {row}, column {col} is {x}, which does not fit f16"),
                false => format!("row {row}, column {col} is {x}"),
            };
            return fail(reason);
        }
        let each = self.0.largest();
        let batches = z.chunks(each * width).enumerate();
        Ok(batches.map(move |(i, z)| (i * each, z)))
    }

    /// The work of one token of a batch for `n` texts at a position, to be timed.
    ///
    /// # Errors
    /// As [`TextDecoder::decode`].
    pub fn step(&self, n: usize, position: u32, options: &DecodeOptions) -> Result<TokenStep> {
        options.check(self.0.weights.vocabulary)?;
        let loan = Loan::new(&self.0, n.clamp(1, self.0.largest()), options.samples())?;
        let mut recorder = loan.recorder();
        let z = vec![0.0; loan.batch * self.embedding()];
        let stop = self.0.stop_tokens(options);
        let tokens = self.0.tokens(&stop);
        loan.begin(
            &mut recorder,
            &z,
            [0, u64::from(position)],
            &tokens,
            options,
        )?;
        recorder.submit()?.wait()?;
        Ok(TokenStep {
            sequence: loan.sequence(),
            batch: loan.batch,
            weight_bytes: self.0.weights.bytes_per_token(),
            _loan: loan,
        })
    }
}

/// The work of one token, see [`TextDecoder::step`]. Every run of it adds a token.
#[derive(Debug)]
#[non_exhaustive]
pub struct TokenStep {
    /// The dispatches, for [`Gpu::time`] and [`Gpu::profile`].
    pub sequence: Sequence,
    /// Texts that get a token.
    pub batch: usize,
    /// Bytes of the weights that are read.
    pub weight_bytes: u64,
    _loan: Loan,
}

/// Tokens as they come, see [`TextDecoder::stream`].
pub struct Stream {
    shared: Arc<Shared>,
    options: DecodeOptions,
    waiting: VecDeque<(usize, Vec<f32>)>,
    batch: Option<Batch>,
    pieces: VecDeque<Piece>,
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream")
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl Stream {
    fn advance(&mut self) -> Result<Option<Piece>> {
        loop {
            if let Some(piece) = self.pieces.pop_front() {
                return Ok(Some(piece));
            }
            let batch = match &mut self.batch {
                Some(batch) => batch,
                None => {
                    let Some((first, z)) = self.waiting.pop_front() else {
                        return Ok(None);
                    };
                    let batch = Batch::new(&self.shared, &z, first, &self.options)?;
                    self.batch.insert(batch)
                }
            };
            match batch.pieces()? {
                Some(pieces) => self.pieces.extend(pieces),
                None => self.batch = None,
            }
        }
    }
}

impl Iterator for Stream {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.advance();
        if next.is_err() {
            self.batch = None;
            self.waiting.clear();
        }
        next.transpose()
    }
}
