//! A trained encoder in use: texts to embeddings.

use std::collections::{HashMap, VecDeque};
use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use super::buckets::Buckets;
use super::embeddings::{Embeddings, Truncation, normalize};
use super::encoder::{Encoder, EncoderOptions};
use super::model::Model;
use super::tokenizer::{Tokenizer, Tokens};
use crate::error::{Error, Result};
use crate::gpu::{Gpu, Tensor};
use crate::graph::Graph;
use crate::runtime::{Executable, Host, Pending, Session};
use crate::setters::setters;
use crate::types::{DType, Precision};

/// How a [`TextEncoder`] computes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TextEncoderOptions {
    /// Element type of activations and matrix operands. [`Precision::Mixed`] is f16 storage with f32 sums.
    pub precision: Precision,
    /// Whether embeddings are divided by their norm. `None`: as [`Model::normalize`] says.
    pub normalize: Option<bool>,
    /// Lengths in tokens that texts are padded to. Those of the model's length or more are left out, and the model's length is added.
    pub lengths: Vec<usize>,
    /// Batch sizes in texts.
    pub batches: Vec<usize>,
    /// Most tokens of a batch, padding included: larger batch sizes are not used for long texts. The smallest batch size is always used.
    pub most_tokens: usize,
    /// Threads that tokenise. `None`: one per core.
    pub threads: Option<usize>,
    /// Whether control tokens in a text, such as `[SEP]`, become the tokens of that name, instead of being text. It concerns the tokenizer
    /// of a [`Model`], not one of the caller.
    pub control_tokens: bool,
}

impl Default for TextEncoderOptions {
    /// f32, lengths 8, 16, 32, 64, 128, 256, batches of 1, 8, 64, 256 and 1024 texts, at most 32 768 tokens.
    fn default() -> Self {
        Self {
            precision: Precision::F32,
            normalize: None,
            lengths: vec![8, 16, 32, 64, 128, 256],
            batches: vec![1, 8, 64, 256, 1024],
            most_tokens: 32_768,
            threads: None,
            control_tokens: false,
        }
    }
}

impl TextEncoderOptions {
    setters! {
        precision: Precision,
        normalize: Option<bool>,
        lengths: Vec<usize>,
        batches: Vec<usize>,
        most_tokens: usize,
        threads: Option<usize>,
        control_tokens: bool,
    }
}

/// Turns any number of texts of any length into embeddings. Any thread may use it.
///
/// Texts are sorted by length into static shapes, the *buckets*: pairs of a length in tokens and a batch size. Each is compiled when it is
/// first needed, or by [`TextEncoder::warm_up`]. What is left over after full batches is computed in one more batch of the same size, unless a
/// smaller size is compiled already. A text does not pay for longer ones beside it, and its embedding does not depend on them,
/// or on the bucket, but for rounding: padding does not count.
///
/// There is no optimizer state. Parameters are kept in f32, and once more in f16 if activations are.
pub struct TextEncoder {
    gpu: Gpu,
    options: EncoderOptions,
    precision: Precision,
    normalize: bool,
    threads: usize,
    buckets: Buckets,
    tokenizer: Arc<dyn Tokenizer>,
    compiled: Mutex<Compiled>,
}

#[derive(Debug)]
struct Compiled {
    session: Session,
    /// By bucket and batch size.
    executables: HashMap<(usize, usize), Arc<Executable>>,
}

/// Texts that are tokenised while the device works on earlier ones.
const WINDOW: usize = 8192;
/// Texts that a thread takes at a time.
const SHARE: usize = 64;

impl TextEncoder {
    /// Loads the encoder of a [model folder](Model), with its tokenizer.
    ///
    /// # Errors
    /// As [`Model::load`] and [`TextEncoder::new`].
    #[cfg(feature = "tokenizer")]
    pub fn load(gpu: &Gpu, dir: impl AsRef<std::path::Path>) -> Result<Self> {
        Self::load_with(gpu, dir, &TextEncoderOptions::default())
    }

    /// As [`TextEncoder::load`], with options.
    ///
    /// # Errors
    /// As [`TextEncoder::load`].
    #[cfg(feature = "tokenizer")]
    pub fn load_with(
        gpu: &Gpu,
        dir: impl AsRef<std::path::Path>,
        options: &TextEncoderOptions,
    ) -> Result<Self> {
        Self::new(gpu, &Model::load(dir)?, options)
    }

    /// The encoder of a model, with its tokenizer.
    ///
    /// # Errors
    /// [`Error::Config`] if the model has no encoder or no tokenizer, and for options out of range; [`Error::Tokenizer`]; as [`Model::apply`].
    #[cfg(feature = "tokenizer")]
    pub fn new(gpu: &Gpu, model: &Model, options: &TextEncoderOptions) -> Result<Self> {
        let Some(json) = &model.tokenizer else {
            return Err(Error::Config {
                field: "tokenizer",
                reason: "is missing: the model folder has no tokenizer.json; use TextEncoder::with_tokenizer".into(),
            });
        };
        let length = encoder_of(model)?.length;
        let tokenizer = super::WordPiece::from_bytes(json, length)?;
        let tokenizer = tokenizer.control_tokens(options.control_tokens);
        Self::with_tokenizer(gpu, model, Arc::new(tokenizer), options)
    }

    /// The encoder of a model, with a tokenizer of the caller, which should cut texts to the encoder's length.
    ///
    /// # Errors
    /// [`Error::Config`] if the model has no encoder, the tokenizer has more tokens than the encoder knows, and for options out of range; as
    /// [`Model::apply`].
    pub fn with_tokenizer(
        gpu: &Gpu,
        model: &Model,
        tokenizer: Arc<dyn Tokenizer>,
        options: &TextEncoderOptions,
    ) -> Result<Self> {
        let encoder = encoder_of(model)?;
        if tokenizer.vocab_size() as usize > encoder.vocabulary {
            return Err(Error::Config {
                field: "vocabulary",
                reason: format!(
                    "of the encoder has {} tokens, but that of the tokenizer {}",
                    encoder.vocabulary,
                    tokenizer.vocab_size()
                ),
            });
        }
        // Padding costs a software adapter its computation, and hardware little beside another submission.
        let sparse = match gpu.capabilities().device_type {
            wgpu::DeviceType::Cpu => 2,
            _ => 4,
        };
        let buckets = Buckets::new(
            &options.lengths,
            encoder.length,
            &options.batches,
            options.most_tokens,
            sparse,
        )?;
        let mut encoder = Self {
            gpu: gpu.clone(),
            options: encoder.clone(),
            precision: options.precision,
            normalize: options.normalize.unwrap_or(model.normalize),
            threads: options.threads.unwrap_or_else(cores).max(1),
            buckets,
            tokenizer,
            compiled: Mutex::new(Compiled {
                session: Session::new(gpu, 0).max_executables(1),
                executables: HashMap::new(),
            }),
        };
        // The parameters exist from the first graph on.
        encoder.executable(0, encoder.buckets.batches(0)[0])?;
        let compiled = encoder.compiled.get_mut();
        let compiled = compiled.unwrap_or_else(PoisonError::into_inner);
        model.apply(&mut compiled.session)?;
        Ok(encoder)
    }

    /// The network's sizes.
    #[must_use]
    pub fn options(&self) -> &EncoderOptions {
        &self.options
    }

    /// Width of an embedding, E.
    #[must_use]
    #[allow(clippy::misnamed_getters, reason = "the network has a width, too")]
    pub fn width(&self) -> usize {
        self.options.embedding
    }

    /// The tokenizer.
    #[must_use]
    pub fn tokenizer(&self) -> &dyn Tokenizer {
        &*self.tokenizer
    }

    /// The device.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Whether embeddings are divided by their norm.
    #[must_use]
    pub fn normalizes(&self) -> bool {
        self.normalize
    }

    /// The embeddings of texts, in their order. What does not fit the encoder's length is cut: [`Embeddings::truncated`].
    ///
    /// Texts are tokenised on all cores while the device works on earlier ones. An empty text is encoded like any other.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] naming the text; [`Error::Data`] naming the text for an embedding that is not finite; [`Error::OutOfMemory`],
    /// [`Error::DeviceLost`]; what compiling returns.
    pub fn encode(&self, texts: &[impl AsRef<str> + Sync]) -> Result<Embeddings> {
        let mut job = Job::new(self, texts.len());
        let mut windows = texts.chunks(WINDOW).zip((0..).step_by(WINDOW));
        let tokenize = |(window, first)| self.tokenize(window, first);
        let mut next = windows.next().map(tokenize).transpose()?;
        while let Some(tokens) = next {
            let following = windows.next();
            next = thread::scope(|scope| {
                let following = following.map(|window| scope.spawn(move || tokenize(window)));
                // Never waits: it blocks instead.
                pollster::block_on(job.add(tokens, Wait::Blocking))?;
                following.map(join).transpose()
            })?;
        }
        pollster::block_on(job.finish(Wait::Blocking))
    }

    /// As [`TextEncoder::encode`], without blocking while the device works. Tokenising and compiling still block, the former for some
    /// milliseconds at a time.
    ///
    /// # Errors
    /// As [`TextEncoder::encode`].
    pub async fn encode_async(&self, texts: &[impl AsRef<str> + Sync]) -> Result<Embeddings> {
        let mut job = Job::new(self, texts.len());
        for (window, first) in texts.chunks(WINDOW).zip((0..).step_by(WINDOW)) {
            job.add(self.tokenize(window, first)?, Wait::Async).await?;
        }
        job.finish(Wait::Async).await
    }

    /// The embeddings of texts that are tokenised already, with the tokens that start and end them.
    ///
    /// What does not fit the encoder's length is cut at the end. A text that is cut so loses the token that ends it, such as `[SEP]`, which
    /// [`TextEncoder::encode`] keeps: its tokenizer cuts the words and then adds the token.
    ///
    /// # Errors
    /// [`Error::Data`] for an id outside the vocabulary; as [`TextEncoder::encode`].
    pub fn encode_ids(&self, texts: &[impl AsRef<[u32]>]) -> Result<Embeddings> {
        let mut job = Job::new(self, texts.len());
        let vocabulary = self.options.vocabulary;
        for (number, text) in texts.iter().enumerate() {
            if let Some(id) = text.as_ref().iter().find(|&&id| id as usize >= vocabulary) {
                return Err(Error::Data {
                    name: "ids".into(),
                    reason: format!(
                        "text {number} has the id {id}, but the vocabulary {vocabulary} tokens"
                    ),
                });
            }
        }
        for window in texts.chunks(WINDOW) {
            let tokens = window.iter().map(|text| {
                let text = text.as_ref();
                let kept = text.len().min(self.options.length);
                Tokens {
                    ids: text[..kept].to_vec(),
                    cut_tokens: text.len() - kept,
                    cut_bytes: 0,
                }
            });
            pollster::block_on(job.add(tokens.collect(), Wait::Blocking))?;
        }
        pollster::block_on(job.finish(Wait::Blocking))
    }

    /// As [`TextEncoder::encode`], into the rows of a tensor [n, E] in f32 or f16, for everything submitted from now on. Returns what was cut.
    ///
    /// # Errors
    /// [`Error::Layout`] for a tensor of another shape or type; as [`TextEncoder::encode`]. The tensor is then unchanged.
    pub fn encode_to(
        &self,
        texts: &[impl AsRef<str> + Sync],
        tensor: &Tensor,
    ) -> Result<Vec<Truncation>> {
        let layout = tensor.layout();
        if (layout.rows(), layout.cols()) != (texts.len(), self.width()) {
            return Err(Error::Layout {
                rows: layout.rows(),
                cols: layout.cols(),
                reason: format!("the embeddings are [{}, {}]", texts.len(), self.width()),
            });
        }
        let embeddings = self.encode(texts)?;
        tensor.upload(&self.gpu, embeddings.as_slice())?;
        Ok(embeddings.truncated().to_vec())
    }

    /// Compiles what calls of up to `texts` texts need, for all lengths, and runs each shape once, so that later calls wait for neither.
    ///
    /// # Errors
    /// What compiling and running return.
    pub fn warm_up(&self, texts: usize) -> Result<()> {
        for bucket in 0..self.buckets.len() {
            let mut done = 0;
            for &batch in self.buckets.batches(bucket) {
                if done < texts {
                    let executable = self.executable(bucket, batch)?;
                    self.submit(&executable, bucket, batch, &[])?.wait()?;
                }
                done = batch;
            }
        }
        Ok(())
    }

    /// The compiled forward pass for texts of up to so many tokens in a batch that holds `texts` of them, for looking at its plan and
    /// kernels.
    ///
    /// # Errors
    /// What compiling returns.
    pub fn compiled(&self, tokens: usize, texts: usize) -> Result<Arc<Executable>> {
        let bucket = self.buckets.bucket(tokens);
        let sizes = self.buckets.batches(bucket).iter();
        let size = sizes.copied().find(|&size| size >= texts);
        self.executable(bucket, size.unwrap_or(self.buckets.largest(bucket)))
    }

    /// Tokens of texts of which the first has this number.
    fn tokenize(&self, texts: &[impl AsRef<str> + Sync], first: usize) -> Result<Vec<Tokens>> {
        let one = |(i, text): (usize, &_)| {
            let text: &str = AsRef::as_ref(text);
            self.tokenizer.tokenize(text).map_err(|error| match error {
                Error::Tokenizer(reason) => {
                    Error::Tokenizer(format!("text {}: {reason}", first + i))
                }
                other => other,
            })
        };
        let threads = self.threads.min(texts.len().div_ceil(SHARE));
        if threads <= 1 {
            return texts.iter().enumerate().map(one).collect();
        }
        let next = AtomicUsize::new(0);
        let work = || {
            let mut done = Vec::new();
            loop {
                let share = next.fetch_add(1, Ordering::Relaxed);
                let begin = share * SHARE;
                if begin >= texts.len() {
                    return Ok(done);
                }
                let end = texts.len().min(begin + SHARE);
                let texts = (begin..end).zip(&texts[begin..end]);
                let tokens: Vec<Tokens> = texts.map(one).collect::<Result<_>>()?;
                done.push((share, tokens));
            }
        };
        let mut shares = thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let mut shares = work()?;
            for other in others {
                shares.extend(join(other)?);
            }
            Ok::<_, Error>(shares)
        })?;
        shares.sort_unstable_by_key(|&(share, _)| share);
        Ok(shares.into_iter().flat_map(|(_, tokens)| tokens).collect())
    }

    fn executable(&self, bucket: usize, batch: usize) -> Result<Arc<Executable>> {
        let mut compiled = self.compiled_lock();
        if let Some(executable) = compiled.executables.get(&(bucket, batch)) {
            return Ok(Arc::clone(executable));
        }
        let graph = self.graph(self.buckets.length(bucket), batch)?;
        let executable = compiled.session.compile(&graph)?;
        let known = Arc::clone(&executable);
        compiled.executables.insert((bucket, batch), known);
        Ok(executable)
    }

    fn is_compiled(&self, bucket: usize, batch: usize) -> bool {
        let compiled = self.compiled_lock();
        compiled.executables.contains_key(&(bucket, batch))
    }

    fn compiled_lock(&self) -> MutexGuard<'_, Compiled> {
        // Whatever panicked left it as it was.
        self.compiled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn graph(&self, length: usize, batch: usize) -> Result<Graph> {
        let options = self.options.clone().length(length);
        let mut graph = Graph::new();
        let encoder = Encoder::new(&mut graph, &options)?;
        let n = batch.checked_mul(length).ok_or_else(|| Error::Config {
            field: "batches",
            reason: format!("of {batch} texts of {length} tokens are too large"),
        })?;
        let below = u32::try_from(options.vocabulary).map_err(|_| Error::Config {
            field: "vocabulary",
            reason: format!("is {}, but token ids have 32 bits", options.vocabulary),
        })?;
        let ids = graph.index_input("ids", n, below)?;
        let mask = graph.input("mask", &[n], DType::F32)?;
        let dtype = match self.precision {
            Precision::F32 => DType::F32,
            Precision::Mixed => DType::F16,
        };
        let z = graph.scoped("encoder", |graph| encoder.forward(graph, ids, mask, dtype))?;
        graph.output("z", z)?;
        Ok(graph)
    }

    /// Refuses embeddings, one for each of these texts, that are no numbers.
    fn check_finite(&self, embeddings: &[f32], texts: &[usize]) -> Result<()> {
        let Some(i) = embeddings.iter().position(|x| !x.is_finite()) else {
            return Ok(());
        };
        let advice = match self.precision {
            Precision::Mixed => {
                "a value exceeds the range of f16, or a weight is not finite; use Precision::F32"
            }
            Precision::F32 => {
                "the weights are not finite, or too large for f32; look at what trained or wrote them"
            }
        };
        Err(Error::Data {
            name: "embeddings".into(),
            reason: format!(
                "that of text {} has {}: {advice}",
                texts[i / self.width()],
                embeddings[i]
            ),
        })
    }

    /// Runs a batch of at most `batch` texts.
    fn submit(
        &self,
        executable: &Executable,
        bucket: usize,
        batch: usize,
        texts: &[(usize, Vec<u32>)],
    ) -> Result<Pending> {
        let length = self.buckets.length(bucket);
        let mut ids = vec![self.options.padding.unwrap_or(0); batch * length];
        let mut mask = vec![0.0; batch * length];
        for (row, (_, text)) in texts.iter().enumerate() {
            // A tokenizer of the caller may not cut.
            let text = &text[..text.len().min(length)];
            ids[row * length..][..text.len()].copy_from_slice(text);
            mask[row * length..][..text.len()].fill(1.0);
        }
        executable.run(&[("ids", Host::from(&ids)), ("mask", Host::from(&mask))])
    }
}

impl std::fmt::Debug for TextEncoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TextEncoder")
            .field("options", &self.options)
            .field("precision", &self.precision)
            .field("buckets", &self.buckets)
            .finish_non_exhaustive()
    }
}

fn encoder_of(model: &Model) -> Result<&EncoderOptions> {
    model.encoder.as_ref().ok_or_else(|| Error::Config {
        field: "encoder",
        reason: "is missing: the model has a decoder only".into(),
    })
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, NonZero::get)
}

/// What a thread returned; a panic in a tokenizer is an error.
fn join<T>(thread: thread::ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    let panicked = |_| Err(Error::Tokenizer("a thread that tokenises panicked".into()));
    thread.join().unwrap_or_else(panicked)
}

/// How a call waits for the device.
#[derive(Clone, Copy)]
enum Wait {
    Blocking,
    Async,
}

/// A batch under way: its results, and the numbers of its texts.
struct Flight {
    pending: Pending,
    batch: usize,
    texts: Vec<usize>,
}

/// A call under way.
struct Job<'a> {
    encoder: &'a TextEncoder,
    data: Vec<f32>,
    truncated: Vec<Truncation>,
    /// Number and tokens of the texts that wait, by bucket.
    waiting: Vec<Vec<(usize, Vec<u32>)>>,
    /// Size of the last batch that was sent, by bucket.
    sent: Vec<usize>,
    flights: VecDeque<Flight>,
    added: usize,
    scratch: Vec<f32>,
}

impl<'a> Job<'a> {
    fn new(encoder: &'a TextEncoder, texts: usize) -> Self {
        Self {
            encoder,
            data: vec![0.0; texts * encoder.width()],
            truncated: Vec::new(),
            waiting: vec![Vec::new(); encoder.buckets.len()],
            sent: vec![0; encoder.buckets.len()],
            flights: VecDeque::new(),
            added: 0,
            scratch: Vec::new(),
        }
    }

    /// Takes the next texts, and submits the batches that are full.
    async fn add(&mut self, tokens: Vec<Tokens>, wait: Wait) -> Result<()> {
        for tokens in tokens {
            let number = self.added;
            self.added += 1;
            let long = tokens.ids.len().saturating_sub(self.encoder.options.length);
            if tokens.is_cut() || long > 0 {
                let cut = Truncation::new(number, tokens.cut_tokens + long, tokens.cut_bytes);
                self.truncated.push(cut);
            }
            let bucket = self.encoder.buckets.bucket(tokens.ids.len());
            self.waiting[bucket].push((number, tokens.ids));
            if self.waiting[bucket].len() >= self.encoder.buckets.largest(bucket) {
                self.send(bucket, wait).await?;
            }
        }
        Ok(())
    }

    /// Submits the rest and waits for everything.
    async fn finish(mut self, wait: Wait) -> Result<Embeddings> {
        for bucket in (0..self.waiting.len()).rev() {
            while !self.waiting[bucket].is_empty() {
                self.send(bucket, wait).await?;
            }
        }
        while !self.flights.is_empty() {
            self.land(wait).await?;
        }
        let width = self.encoder.width();
        Ok(Embeddings::new(self.data, width, self.truncated))
    }

    async fn send(&mut self, bucket: usize, wait: Wait) -> Result<()> {
        let texts = self.waiting[bucket].len();
        let next = self.encoder.buckets.next(bucket, texts);
        let last = self.sent[bucket];
        // Compiling a shape for what is left over takes longer than a batch with few texts.
        let batch = match last >= texts && !self.encoder.is_compiled(bucket, next) {
            true => last,
            false => next,
        };
        self.sent[bucket] = batch;
        let executable = self.encoder.executable(bucket, batch)?;
        if self.flights.len() >= Executable::IN_FLIGHT {
            self.land(wait).await?;
        }
        let waiting = &mut self.waiting[bucket];
        let texts: Vec<(usize, Vec<u32>)> = waiting.drain(..batch.min(waiting.len())).collect();
        self.flights.push_back(Flight {
            pending: self.encoder.submit(&executable, bucket, batch, &texts)?,
            batch,
            texts: texts.into_iter().map(|(number, _)| number).collect(),
        });
        Ok(())
    }

    /// Takes the results of the oldest batch.
    async fn land(&mut self, wait: Wait) -> Result<()> {
        let Some(flight) = self.flights.pop_front() else {
            return Ok(());
        };
        let outputs = match wait {
            Wait::Blocking => flight.pending.wait()?,
            Wait::Async => flight.pending.await?,
        };
        let width = self.encoder.width();
        self.scratch.resize(flight.batch * width, 0.0);
        outputs.get_into("z", &mut self.scratch)?;
        let used = &mut self.scratch[..flight.texts.len() * width];
        self.encoder.check_finite(used, &flight.texts)?;
        if self.encoder.normalize {
            normalize(used, width);
        }
        for (&number, row) in flight.texts.iter().zip(used.chunks_exact(width)) {
            self.data[number * width..][..width].copy_from_slice(row);
        }
        Ok(())
    }
}
