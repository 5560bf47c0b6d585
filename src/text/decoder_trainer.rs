//! Mode B: a decoder learns to continue a text, given the embedding of the whole.

use std::sync::Arc;

use super::batches::{Batch, Batches};
use super::dataset::Dataset;
use super::decoder::{Decoder, DecoderOptions, next_tokens};
use super::encoder::PADDING;
use super::steps::{self, Step, Whole};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::graph::{CrossEntropy, Graph};
use crate::nn::Mode;
use crate::runtime::{Executable, Host, Outputs, Pending, Session};
use crate::train::{AdamW, Checkpoint, StepOutputs, Weights};
use crate::types::{DType, Precision};

/// How to train a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderTraining {
    /// Samples a step, B.
    pub batch: usize,
    /// Parts of a batch whose gradients are computed one after the other and added up, each with B / micro-batches samples:
    /// less memory for the same step up to rounding.
    pub micro_batches: usize,
    /// Label smoothing in [0, 1), while training only.
    pub smoothing: f32,
    /// Optimizer; [`Precision::Mixed`] adds a default loss scale where none is set.
    pub optimizer: AdamW,
    /// Storage of activations.
    pub precision: Precision,
    /// Start of the parameters, and what dropout draws from.
    pub seed: u64,
    /// Compute the values inside the blocks again for the backward pass, instead of keeping them: less memory, more time.
    pub recompute: bool,
    /// Parameters that are not trained, by name or prefix: see [`trainable`](crate::train::trainable).
    pub freeze: Vec<String>,
}

impl Default for DecoderTraining {
    fn default() -> Self {
        Self {
            batch: 64,
            micro_batches: 1,
            smoothing: 0.0,
            optimizer: AdamW {
                clip: Some(1.0),
                ..AdamW::default()
            },
            precision: Precision::F32,
            seed: 0,
            recompute: false,
            freeze: Vec::new(),
        }
    }
}

/// What one training step reports.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct DecoderMetrics {
    /// Mean cross entropy of the next tokens, with the smoothing of the training.
    pub loss: f32,
    /// Targets that counted.
    pub tokens: f32,
    /// Before clipping; not finite when the step was skipped.
    pub gradient_norm: f32,
    /// Of this step.
    pub learning_rate: f32,
    /// Of this step; 1 in f32.
    pub loss_scale: f32,
    /// Steps skipped so far.
    pub skipped: f32,
}

impl DecoderMetrics {
    fn new(outputs: &Outputs) -> Result<Self> {
        // Of micro-batches, the mean over all their tokens is the only metric, and their tokens are its weight.
        let [loss, tokens] = match outputs.contains(StepOutputs::METRICS) {
            true => [StepOutputs::METRICS, StepOutputs::WEIGHT],
            false => ["loss", "tokens"],
        };
        Ok(Self {
            loss: outputs.scalar(loss)?,
            tokens: outputs.scalar(tokens)?,
            gradient_norm: outputs.scalar(StepOutputs::GRADIENT_NORM)?,
            learning_rate: outputs.scalar(StepOutputs::LEARNING_RATE)?,
            loss_scale: outputs.scalar(StepOutputs::LOSS_SCALE)?,
            skipped: outputs.scalar(StepOutputs::SKIPPED)?,
        })
    }
}

/// How well a decoder foretells the texts of a dataset.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct DecoderEvaluation {
    /// Mean over all targets that count, without smoothing.
    pub cross_entropy: f64,
    /// Number of those targets.
    pub tokens: u64,
}

impl DecoderEvaluation {
    /// e to the power of the cross entropy.
    #[must_use]
    pub fn perplexity(&self) -> f64 {
        self.cross_entropy.exp()
    }
}

/// A decoder in training, with its session. It is given the teacher's embedding of each text as z, or whatever stands in
/// [`Batch::targets`].
#[derive(Debug)]
pub struct DecoderTrainer {
    decoder: DecoderOptions,
    batch: usize,
    session: Session,
    step: Step,
    evaluate: Arc<Executable>,
    /// Of the batch at hand.
    targets: Vec<u32>,
}

impl DecoderTrainer {
    /// Builds and compiles the training step and the loss alone.
    ///
    /// # Errors
    /// [`Error::Config`] for sizes or rates out of range; what [`Session::compile`] returns.
    pub fn new(gpu: &Gpu, decoder: &DecoderOptions, training: &DecoderTraining) -> Result<Self> {
        let samples = Step::samples(training.batch, training.micro_batches)?;
        if !(0.0..1.0).contains(&training.smoothing) {
            return Err(Error::Config {
                field: "smoothing",
                reason: "must be in [0, 1)".into(),
            });
        }
        let mut optimizer = training.optimizer;
        let dtype = training.precision.prepare(&mut optimizer);
        let mut session = Session::new(gpu, training.seed);
        let graph = training_graph(decoder, training, samples, &optimizer, dtype)?;
        let sizes = [training.batch, training.micro_batches];
        let update = || {
            let mut graph = Graph::new();
            Decoder::new(&mut graph, decoder)?;
            steps::update(graph, &optimizer, &training.freeze, 1)
        };
        let step = Step::new(&mut session, sizes, &graph, update)?;
        let mut graph = Graph::new();
        let mode = Mode::Eval;
        let ce = loss(&mut graph, decoder, training.batch, 0.0, (dtype, mode))?;
        graph.output("loss", ce.loss)?;
        graph.output("tokens", ce.count)?;
        let evaluate = session.compile(&graph)?;
        Ok(Self {
            decoder: decoder.clone(),
            batch: training.batch,
            session,
            step,
            evaluate,
            targets: vec![PADDING; training.batch * decoder.length],
        })
    }

    /// The network's sizes.
    #[must_use]
    pub fn decoder(&self) -> &DecoderOptions {
        &self.decoder
    }

    /// The compiled training step: its plan, its kernels. With micro-batches the part that every one of them goes through.
    #[must_use]
    pub fn training_step(&self) -> &Executable {
        self.step.train()
    }

    /// The parameters.
    #[must_use]
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Trains on one batch of shape [B, L] and embeddings [B, E]; the metrics arrive later.
    ///
    /// # Errors
    /// [`Error::Data`] for a batch of another shape, [`Error::OutOfMemory`], [`Error::DeviceLost`].
    pub fn submit(&mut self, batch: &Batch) -> Result<Pending> {
        next_tokens(
            &batch.ids,
            &batch.mask,
            self.decoder.length,
            &mut self.targets,
        )?;
        let inputs = inputs(&self.decoder, batch, &self.targets);
        self.step.submit(&self.session, inputs)
    }

    /// Trains on one batch and waits for its metrics.
    ///
    /// # Errors
    /// As [`DecoderTrainer::submit`].
    pub fn step(&mut self, batch: &Batch) -> Result<DecoderMetrics> {
        DecoderMetrics::new(&self.submit(batch)?.wait()?)
    }

    /// Trains on all remaining batches of the current epoch, [`Executable::IN_FLIGHT`] steps ahead of the reported metrics: the next
    /// batch is prepared while the device works on earlier ones.
    ///
    /// # Errors
    /// As [`DecoderTrainer::submit`].
    pub fn epoch(
        &mut self,
        batches: &mut Batches,
        mut report: impl FnMut(&DecoderMetrics),
    ) -> Result<()> {
        let metrics = |outputs: &Outputs| {
            report(&DecoderMetrics::new(outputs)?);
            Ok(())
        };
        steps::epoch(batches, |batch| self.submit(batch), metrics)
    }

    /// Cross entropy of a dataset's texts, each given its teacher's embedding.
    ///
    /// # Errors
    /// [`Error::Config`] when the dataset has another embedding width; [`Error::Data`] for an id outside the vocabulary or a dataset
    /// in which no target counts; [`Error::DeviceLost`].
    pub fn evaluate(&self, dataset: &Dataset) -> Result<DecoderEvaluation> {
        let (width, length) = (self.decoder.embedding, self.decoder.length);
        if dataset.width() != width {
            return Err(Error::Config {
                field: "embedding",
                reason: format!("is {width}, but the data has {}", dataset.width()),
            });
        }
        let mut batches = Batches::evaluation(dataset.clone(), self.batch, length)?;
        let mut targets = vec![PADDING; self.batch * length];
        let (mut sum, mut tokens) = (0.0, 0.0);
        while let Some(batch) = batches.next_batch() {
            next_tokens(&batch.ids, &batch.mask, length, &mut targets)?;
            // What fills up the last batch does not count.
            targets[batch.valid * length..].fill(PADDING);
            let inputs = inputs(&self.decoder, batch, &targets);
            let inputs = inputs.map(|(name, data, _)| (name, data));
            let outputs = self.evaluate.run(&inputs)?.wait()?;
            let count = f64::from(outputs.scalar("tokens")?);
            sum += count * f64::from(outputs.scalar("loss")?);
            tokens += count;
        }
        if tokens == 0.0 {
            return Err(Error::Data {
                name: "targets".into(),
                reason: "no text has a next token that counts".into(),
            });
        }
        Ok(DecoderEvaluation {
            cross_entropy: sum / tokens,
            tokens: tokens as u64,
        })
    }

    /// All parameters, with the network's sizes as JSON in the description.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::DeviceLost`]
    pub fn weights(&self) -> Result<Weights> {
        let mut weights = Weights::from_session(&self.session)?;
        weights.description =
            serde_json::to_string(&self.decoder).map_err(|error| Error::Config {
                field: "decoder",
                reason: error.to_string(),
            })?;
        Ok(weights)
    }

    /// Replaces all parameters.
    ///
    /// # Errors
    /// As [`Weights::apply`].
    pub fn set_weights(&mut self, weights: &Weights) -> Result<()> {
        weights.apply(&mut self.session)
    }

    /// All that continues this training bit for bit, but the data: with the same batches from here on, in the same order.
    ///
    /// # Errors
    /// As [`Checkpoint::from_session`].
    pub fn checkpoint(&self) -> Result<Checkpoint> {
        Checkpoint::from_session(&self.session)
    }

    /// Continues where a checkpoint of a training with the same options was taken.
    ///
    /// # Errors
    /// As [`Checkpoint::apply`].
    pub fn resume(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        checkpoint.apply(&mut self.session)
    }
}

fn inputs<'a>(decoder: &DecoderOptions, batch: &'a Batch, targets: &'a [u32]) -> [Whole<'a>; 4] {
    let length = decoder.length;
    [
        ("ids", Host::from(&batch.ids), length),
        ("mask", Host::from(&batch.mask), length),
        ("z", Host::from(&batch.targets), decoder.embedding),
        ("targets", Host::from(targets), length),
    ]
}

fn training_graph(
    decoder: &DecoderOptions,
    options: &DecoderTraining,
    batch: usize,
    optimizer: &AdamW,
    dtype: DType,
) -> Result<Graph> {
    let mut graph = Graph::new();
    let (seed, recompute) = (options.seed, options.recompute);
    let mode = steps::training(&mut graph, decoder.dropout, seed, recompute)?;
    let ce = loss(&mut graph, decoder, batch, options.smoothing, (dtype, mode))?;
    let mut metrics = vec![("loss", ce.loss)];
    if options.micro_batches == 1 {
        // Of several, their number is the sum of the weights.
        metrics.push(("tokens", ce.count));
    }
    let options = (&*options.freeze, options.micro_batches);
    steps::train_on(
        &mut graph,
        optimizer,
        options,
        [ce.loss, ce.count],
        &metrics,
    )?;
    Ok(graph)
}

/// Adds inputs, decoder and loss.
fn loss(
    graph: &mut Graph,
    options: &DecoderOptions,
    batch: usize,
    smoothing: f32,
    (dtype, mode): (DType, Mode),
) -> Result<CrossEntropy> {
    let decoder = Decoder::new(graph, options)?;
    let n = steps::tokens(batch, options.length)?;
    let below = u32::try_from(options.vocabulary).map_err(|_| Error::Config {
        field: "vocabulary",
        reason: "must fit u32".into(),
    })?;
    let ids = graph.index_input("ids", n, below)?;
    let mask = graph.input("mask", &[n], DType::F32)?;
    let z = graph.input("z", &[batch, options.embedding], DType::F32)?;
    let targets = graph.index_input("targets", n, below)?;
    graph.scoped("decoder", |graph| {
        let states = decoder.forward_in(graph, [ids, z], Some(mask), dtype, mode)?;
        decoder.loss(graph, states, targets, smoothing)
    })
}
