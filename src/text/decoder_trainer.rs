//! Mode B: a decoder learns to continue a text, given the embedding of the whole.

use super::batches::{Batch, Batches};
use super::dataset::Dataset;
use super::decoder::{Decoder, DecoderOptions, next_tokens};
use super::steps::{self, Common, Objective, Pass, StepMetrics, Trainer, Whole};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::graph::{CrossEntropy, Graph};
use crate::runtime::{Executable, Host, Outputs, Pending, Session};
use crate::setters::setters;
use crate::train::{AdamW, Checkpoint, StepOutputs, Weights};
use crate::types::{DType, Precision};

/// How to train a decoder.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct DecoderTraining {
    /// Samples per step, B.
    pub batch: usize,
    /// Number of parts of a batch. Their gradients are computed one after the other and added up, each of B / micro-batches samples:
    /// less memory for the same step up to rounding.
    pub micro_batches: usize,
    /// Label smoothing in [0, 1), used only in training.
    pub smoothing: f32,
    /// Optimizer; [`Precision::Mixed`] adds a default loss scale where none is set.
    pub optimizer: AdamW,
    /// Element type in which activations are stored.
    pub precision: Precision,
    /// Seed of the parameters' initial values and of dropout.
    pub seed: u64,
    /// Whether the backward pass computes the values inside the blocks again, instead of keeping them: less memory, more time.
    pub recompute: bool,
    /// Parameters that are not trained, by name or prefix; see [`trainable`](crate::train::trainable).
    pub freeze: Vec<String>,
}

impl DecoderTraining {
    setters! {
        batch: usize,
        micro_batches: usize,
        smoothing: f32,
        optimizer: AdamW,
        precision: Precision,
        seed: u64,
        recompute: bool,
        freeze: Vec<String>,
    }
}

impl Default for DecoderTraining {
    /// Batches of 64, no smoothing, AdamW with gradients clipped to 1, f32.
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
        // With micro-batches, the mean over all their tokens is the only metric, and their tokens are its weight.
        let [loss, tokens] = match outputs.contains(StepOutputs::METRICS) {
            true => [StepOutputs::METRICS, StepOutputs::WEIGHT],
            false => ["loss", "tokens"],
        };
        let step = StepMetrics::new(outputs)?;
        Ok(Self {
            loss: outputs.scalar(loss)?,
            tokens: outputs.scalar(tokens)?,
            gradient_norm: step.gradient_norm,
            learning_rate: step.learning_rate,
            loss_scale: step.loss_scale,
            skipped: step.skipped,
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
    trainer: Trainer,
    /// Next tokens of the batch at hand.
    targets: Vec<u32>,
}

impl DecoderTrainer {
    /// Builds and compiles the training step and the loss alone.
    ///
    /// # Errors
    /// [`Error::Config`] for sizes or rates out of range, and names in `freeze` or in parameter groups that fit no parameter;
    /// what [`Session::compile`] returns.
    pub fn new(gpu: &Gpu, decoder: &DecoderOptions, training: &DecoderTraining) -> Result<Self> {
        let smoothing = training.smoothing;
        if !(0.0..1.0).contains(&smoothing) {
            return Err(Error::Config {
                field: "smoothing",
                reason: format!("is {smoothing}, but must be in [0, 1)"),
            });
        }
        let common = Common {
            batch: training.batch,
            micro_batches: training.micro_batches,
            optimizer: &training.optimizer,
            precision: training.precision,
            seed: training.seed,
            recompute: training.recompute,
            freeze: &training.freeze,
            dropout: decoder.dropout,
        };
        let objective = |graph: &mut Graph, pass: &Pass| {
            let ce = loss(graph, decoder, smoothing, pass)?;
            let mut metrics = vec![("loss", ce.loss)];
            if training.micro_batches == 1 {
                // With several, their number is the sum of the weights.
                metrics.push(("tokens", ce.count));
            }
            Ok(Objective {
                loss: ce.loss,
                weight: ce.count,
                metrics,
            })
        };
        let evaluate = |graph: &mut Graph, pass: &Pass| {
            let ce = loss(graph, decoder, 0.0, pass)?;
            graph.output("loss", ce.loss)?;
            graph.output("tokens", ce.count)
        };
        Ok(Self {
            trainer: Trainer::new(gpu, &common, objective, evaluate)?,
            targets: vec![0; training.batch * decoder.length],
            decoder: decoder.clone(),
        })
    }

    /// The network's sizes.
    #[must_use]
    pub fn decoder(&self) -> &DecoderOptions {
        &self.decoder
    }

    /// The compiled training step: its plan, its kernels. With micro-batches it is the part that every one of them goes through.
    #[must_use]
    pub fn training_step(&self) -> &Executable {
        self.trainer.training_step()
    }

    /// The parameters.
    #[must_use]
    pub fn session(&self) -> &Session {
        self.trainer.session()
    }

    /// Trains on one batch of shape [B, L] and embeddings [B, E]; the metrics arrive later.
    ///
    /// # Errors
    /// [`Error::Data`] for a batch of another shape, [`Error::OutOfMemory`], [`Error::DeviceLost`].
    pub fn submit(&mut self, batch: &Batch) -> Result<Pending> {
        let (length, ignored) = (self.decoder.length, self.decoder.ignored_target());
        next_tokens(&batch.ids, &batch.mask, length, ignored, &mut self.targets)?;
        let inputs = inputs(&self.decoder, batch, &self.targets);
        self.trainer.submit(inputs)
    }

    /// Trains on one batch and waits for its metrics. A step that was skipped gives a warning in the log.
    ///
    /// # Errors
    /// As [`DecoderTrainer::submit`].
    pub fn step(&mut self, batch: &Batch) -> Result<DecoderMetrics> {
        let step = self.submit(batch)?;
        DecoderMetrics::new(&self.trainer.wait(step)?)
    }

    /// Trains on all remaining batches of the current epoch, [`Executable::IN_FLIGHT`] steps ahead of the reported metrics: the next
    /// batch is prepared while the device works on earlier ones. Steps that were skipped give warnings in the log.
    ///
    /// # Errors
    /// As [`DecoderTrainer::submit`].
    pub fn epoch(
        &mut self,
        batches: &mut Batches,
        mut report: impl FnMut(&DecoderMetrics),
    ) -> Result<()> {
        steps::epoch(batches, self, Self::submit, |trainer, step| {
            report(&DecoderMetrics::new(&trainer.trainer.wait(step)?)?);
            Ok(())
        })
    }

    /// Cross entropy of a dataset's texts, each given its teacher's embedding.
    ///
    /// # Errors
    /// [`Error::Config`] when the dataset has another embedding width; [`Error::Data`] for an id outside the vocabulary or a dataset
    /// in which no target counts; [`Error::DeviceLost`].
    pub fn evaluate(&self, dataset: &Dataset) -> Result<DecoderEvaluation> {
        steps::check_width(self.decoder.embedding, dataset)?;
        let (size, length) = (self.trainer.batch(), self.decoder.length);
        let ignored = self.decoder.ignored_target();
        let mut batches = Batches::evaluation(dataset.clone(), size, length)?
            .padding(self.decoder.padding.unwrap_or(0));
        let mut targets = vec![ignored; size * length];
        let (mut sum, mut tokens) = (0.0, 0.0);
        while let Some(batch) = batches.next_batch()? {
            next_tokens(&batch.ids, &batch.mask, length, ignored, &mut targets)?;
            // What fills up the last batch does not count.
            targets[batch.valid * length..].fill(ignored);
            let inputs = inputs(&self.decoder, batch, &targets);
            let inputs = inputs.map(|(name, data, _)| (name, data));
            let outputs = self.trainer.forward(&inputs)?;
            let count = f64::from(outputs.scalar("tokens")?);
            sum += count * f64::from(outputs.scalar("loss")?);
            tokens += count;
        }
        if tokens == 0.0 {
            return Err(Error::Data {
                name: "targets".into(),
                reason: "no text has a token that counts after another that counts".into(),
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
        self.trainer.weights(&self.decoder)
    }

    /// Replaces all parameters.
    ///
    /// # Errors
    /// As [`Weights::apply`].
    pub fn set_weights(&mut self, weights: &Weights) -> Result<()> {
        self.trainer.set_weights(weights)
    }

    /// Everything that continues this training bit for bit, except the position in the data: give the same batches from here on.
    ///
    /// # Errors
    /// As [`Checkpoint::from_session`].
    pub fn checkpoint(&self) -> Result<Checkpoint> {
        self.trainer.checkpoint()
    }

    /// Continues where a checkpoint of a training with the same options was taken.
    ///
    /// # Errors
    /// As [`Checkpoint::apply`].
    pub fn resume(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        self.trainer.resume(checkpoint)
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

/// Adds inputs, decoder and loss.
fn loss(
    graph: &mut Graph,
    options: &DecoderOptions,
    smoothing: f32,
    pass: &Pass,
) -> Result<CrossEntropy> {
    let decoder = Decoder::new(graph, options)?;
    let n = steps::tokens(pass.samples, options.length)?;
    let ids = graph.index_input("ids", n, steps::id_bound(options.vocabulary)?)?;
    let mask = graph.input("mask", &[n], DType::F32)?;
    let z = graph.input("z", &[pass.samples, options.embedding], DType::F32)?;
    // `Decoder::new` has refused a vocabulary without room for one more.
    let targets = graph.index_input("targets", n, options.ignored_target() + 1)?;
    graph.scoped("decoder", |graph| {
        let states = decoder.forward_in(graph, [ids, z], Some(mask), pass.dtype, pass.mode)?;
        decoder.loss(graph, states, targets, smoothing)
    })
}
