//! Any number of texts of any length through a network of static shapes: what all encoders in use have in common.

use std::collections::{HashMap, VecDeque};
use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use super::buckets::Buckets;
use super::embeddings::{Embeddings, Truncation, normalize};
use super::text_encoder::TextEncoderOptions;
use super::tokenizer::{Tokenizer, Tokens};
use crate::error::{Error, Result};
use crate::gpu::{Gpu, Tensor};
use crate::graph::{Graph, ValueId};
use crate::runtime::{Executable, Host, Pending, Session};
use crate::types::{DType, Precision};

/// A network that turns tokens into embeddings.
pub(super) trait Network: std::fmt::Debug + Send + Sync {
    /// Exclusive upper bound of token ids.
    fn vocabulary(&self) -> usize;

    /// The longest text in tokens.
    fn length(&self) -> usize;

    /// Width of an embedding, E.
    fn embedding(&self) -> usize;

    /// Columns of its widest value: what bounds the tokens of a batch.
    fn widest(&self) -> usize;

    /// The id that fills texts up.
    fn padding(&self) -> Option<u32>;

    /// Declares the parameters and adds the forward pass for texts of `length` tokens: ids [B·L], mask [B·L] → z [B, E] in f32, computed in
    /// `dtype`. Results do not depend on what is masked, nor on the length.
    fn forward(
        &self,
        graph: &mut Graph,
        length: usize,
        ids: ValueId,
        mask: ValueId,
        dtype: DType,
    ) -> Result<ValueId>;
}

/// A network, its tokenizer and its weights at work. Any thread may use it.
///
/// Texts are sorted by length into static shapes, the *buckets*. Each is compiled when it is first needed.
pub(super) struct Engine {
    gpu: Gpu,
    network: Box<dyn Network>,
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

impl Engine {
    /// `normalize`: whether embeddings are divided by their norm, unless the options say. `apply` writes the parameters into the session.
    pub fn new(
        gpu: &Gpu,
        network: Box<dyn Network>,
        tokenizer: Arc<dyn Tokenizer>,
        normalize: bool,
        options: &TextEncoderOptions,
        apply: impl FnOnce(&mut Session) -> Result<()>,
    ) -> Result<Self> {
        check_vocabulary(&*tokenizer, network.vocabulary())?;
        // Padding costs a software adapter its computation, and hardware little beside another submission.
        let sparse = match gpu.capabilities().device_type {
            wgpu::DeviceType::Cpu => 2,
            _ => 4,
        };
        // A value is one binding.
        let binding = gpu.capabilities().limits.max_storage_buffer_binding_size;
        let most = binding / (4 * network.widest().max(1)) as u64;
        let most = usize::try_from(most).unwrap_or(usize::MAX);
        let buckets = Buckets::new(
            &options.lengths,
            network.length(),
            &options.batches,
            options.most_tokens.min(most),
            sparse,
        )?;
        let mut engine = Self {
            gpu: gpu.clone(),
            network,
            precision: options.precision,
            normalize: options.normalize.unwrap_or(normalize),
            threads: options.threads.unwrap_or_else(cores).max(1),
            buckets,
            tokenizer,
            compiled: Mutex::new(Compiled {
                session: Session::new(gpu, 0).max_executables(1),
                executables: HashMap::new(),
            }),
        };
        // The parameters exist from the first graph on.
        engine.executable(0, engine.buckets.batches(0)[0])?;
        let compiled = engine.compiled.get_mut();
        let compiled = compiled.unwrap_or_else(PoisonError::into_inner);
        apply(&mut compiled.session)?;
        Ok(engine)
    }

    pub fn width(&self) -> usize {
        self.network.embedding()
    }

    pub fn tokenizer(&self) -> &dyn Tokenizer {
        &*self.tokenizer
    }

    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    pub fn normalizes(&self) -> bool {
        self.normalize
    }

    /// Whatever reads the parameters.
    pub fn with_session<T>(&self, read: impl FnOnce(&Session) -> Result<T>) -> Result<T> {
        read(&self.compiled_lock().session)
    }

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

    pub async fn encode_async(&self, texts: &[impl AsRef<str> + Sync]) -> Result<Embeddings> {
        let mut job = Job::new(self, texts.len());
        for (window, first) in texts.chunks(WINDOW).zip((0..).step_by(WINDOW)) {
            job.add(self.tokenize(window, first)?, Wait::Async).await?;
        }
        job.finish(Wait::Async).await
    }

    pub fn encode_ids(&self, texts: &[impl AsRef<[u32]>]) -> Result<Embeddings> {
        let mut job = Job::new(self, texts.len());
        let vocabulary = self.network.vocabulary();
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
                let kept = text.len().min(self.network.length());
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
        let network = &self.network;
        let mut graph = Graph::new();
        let n = batch.checked_mul(length).ok_or_else(|| Error::Config {
            field: "batches",
            reason: format!("of {batch} texts of {length} tokens are too large"),
        })?;
        let below = u32::try_from(network.vocabulary()).map_err(|_| Error::Config {
            field: "vocabulary",
            reason: format!("is {}, but token ids have 32 bits", network.vocabulary()),
        })?;
        let ids = graph.index_input("ids", n, below)?;
        let mask = graph.input("mask", &[n], DType::F32)?;
        let dtype = match self.precision {
            Precision::F32 => DType::F32,
            Precision::Mixed => DType::F16,
        };
        let z = network.forward(&mut graph, length, ids, mask, dtype)?;
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
        let mut ids = vec![self.network.padding().unwrap_or(0); batch * length];
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

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("network", &self.network)
            .field("precision", &self.precision)
            .field("buckets", &self.buckets)
            .finish_non_exhaustive()
    }
}

/// Refuses a tokenizer with more tokens than a network of this vocabulary knows.
pub(super) fn check_vocabulary(tokenizer: &dyn Tokenizer, vocabulary: usize) -> Result<()> {
    match tokenizer.vocab_size() as usize {
        tokens if tokens <= vocabulary => Ok(()),
        tokens => Err(Error::Config {
            field: "vocabulary",
            reason: format!(
                "of the encoder has {vocabulary} tokens, but that of the tokenizer {tokens}"
            ),
        }),
    }
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
    engine: &'a Engine,
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
    fn new(engine: &'a Engine, texts: usize) -> Self {
        Self {
            engine,
            data: vec![0.0; texts * engine.width()],
            truncated: Vec::new(),
            waiting: vec![Vec::new(); engine.buckets.len()],
            sent: vec![0; engine.buckets.len()],
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
            let long = tokens
                .ids
                .len()
                .saturating_sub(self.engine.network.length());
            if tokens.is_cut() || long > 0 {
                let cut = Truncation::new(number, tokens.cut_tokens + long, tokens.cut_bytes);
                self.truncated.push(cut);
            }
            let bucket = self.engine.buckets.bucket(tokens.ids.len());
            self.waiting[bucket].push((number, tokens.ids));
            if self.waiting[bucket].len() >= self.engine.buckets.largest(bucket) {
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
        let width = self.engine.width();
        Ok(Embeddings::new(self.data, width, self.truncated))
    }

    async fn send(&mut self, bucket: usize, wait: Wait) -> Result<()> {
        let texts = self.waiting[bucket].len();
        let next = self.engine.buckets.next(bucket, texts);
        let last = self.sent[bucket];
        // Compiling a shape for what is left over takes longer than a batch with few texts.
        let batch = match last >= texts && !self.engine.is_compiled(bucket, next) {
            true => last,
            false => next,
        };
        self.sent[bucket] = batch;
        let executable = self.engine.executable(bucket, batch)?;
        if self.flights.len() >= Executable::IN_FLIGHT {
            self.land(wait).await?;
        }
        let waiting = &mut self.waiting[bucket];
        let texts: Vec<(usize, Vec<u32>)> = waiting.drain(..batch.min(waiting.len())).collect();
        self.flights.push_back(Flight {
            pending: self.engine.submit(&executable, bucket, batch, &texts)?,
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
        let width = self.engine.width();
        self.scratch.resize(flight.batch * width, 0.0);
        outputs.get_into("z", &mut self.scratch)?;
        let used = &mut self.scratch[..flight.texts.len() * width];
        self.engine.check_finite(used, &flight.texts)?;
        if self.engine.normalize {
            normalize(used, width);
        }
        for (&number, row) in flight.texts.iter().zip(used.chunks_exact(width)) {
            self.data[number * width..][..width].copy_from_slice(row);
        }
        Ok(())
    }
}
