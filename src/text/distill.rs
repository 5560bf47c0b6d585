//! Mode A: an encoder learns to give a teacher's sentence embeddings.

use super::batches::{Batch, Batches};
use super::dataset::Dataset;
use super::encoder::{Encoder, EncoderOptions};
use super::metrics;
use super::steps::{self, Common, Objective, Pass, StepMetrics, Trainer};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::graph::{Graph, ValueId};
use crate::runtime::{Executable, Host, Outputs, Pending, Session};
use crate::setters::setters;
use crate::train::{AdamW, Checkpoint, StepOutputs, Weights};
use crate::types::{DType, Precision};

/// How to distil.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct DistillOptions {
    /// Samples per step, B.
    pub batch: usize,
    /// Number of parts of a batch. Their gradients are computed one after the other and added up, each of B / micro-batches samples:
    /// less memory for the same step up to rounding.
    pub micro_batches: usize,
    /// Weight of 1 − cosine.
    pub alpha: f32,
    /// Weight of the mean squared error.
    pub beta: f32,
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

impl DistillOptions {
    setters! {
        batch: usize,
        micro_batches: usize,
        alpha: f32,
        beta: f32,
        optimizer: AdamW,
        precision: Precision,
        seed: u64,
        recompute: bool,
        freeze: Vec<String>,
    }
}

impl Default for DistillOptions {
    /// Batches of 64, alpha and beta 1, AdamW with gradients clipped to 1, f32.
    fn default() -> Self {
        Self {
            batch: 64,
            micro_batches: 1,
            alpha: 1.0,
            beta: 1.0,
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
pub struct Metrics {
    /// alpha·(1 − cosine) + beta·mse
    pub loss: f32,
    /// Mean cosine to the teacher.
    pub cosine: f32,
    /// Mean squared error.
    pub mse: f32,
    /// Before clipping; not finite when the step was skipped.
    pub gradient_norm: f32,
    /// Of this step.
    pub learning_rate: f32,
    /// Of this step; 1 in f32.
    pub loss_scale: f32,
    /// Steps skipped so far.
    pub skipped: f32,
}

impl Metrics {
    fn new(outputs: &Outputs) -> Result<Self> {
        // Means over micro-batches are one output.
        let mut means = [0.0; 3];
        match outputs.contains(StepOutputs::METRICS) {
            true => outputs.get_into(StepOutputs::METRICS, &mut means)?,
            false => {
                for (mean, name) in means.iter_mut().zip(["loss", "cosine", "mse"]) {
                    *mean = outputs.scalar(name)?;
                }
            }
        }
        let [loss, cosine, mse] = means;
        let step = StepMetrics::new(outputs)?;
        Ok(Self {
            loss,
            cosine,
            mse,
            gradient_norm: step.gradient_norm,
            learning_rate: step.learning_rate,
            loss_scale: step.loss_scale,
            skipped: step.skipped,
        })
    }
}

/// How well an encoder imitates its teacher on a dataset.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Evaluation {
    /// Mean cosine to the teacher.
    pub cosine: f64,
    /// Mean squared error.
    pub mse: f64,
    /// Share of texts whose own teacher embedding is the nearest of all.
    pub precision_at_1: f64,
    /// Share of texts whose own teacher embedding is among the five nearest.
    pub precision_at_5: f64,
    /// The embeddings [n, E].
    pub embeddings: Vec<f32>,
}

/// An encoder in training, with its session.
#[derive(Debug)]
pub struct Distiller {
    encoder: EncoderOptions,
    trainer: Trainer,
}

impl Distiller {
    /// Builds and compiles the training step and the forward pass.
    ///
    /// # Errors
    /// [`Error::Config`] for sizes or rates out of range, and names in `freeze` or in parameter groups that fit no parameter;
    /// what [`Session::compile`] returns.
    pub fn new(gpu: &Gpu, encoder: &EncoderOptions, options: &DistillOptions) -> Result<Self> {
        let common = Common {
            batch: options.batch,
            micro_batches: options.micro_batches,
            optimizer: &options.optimizer,
            precision: options.precision,
            seed: options.seed,
            recompute: options.recompute,
            freeze: &options.freeze,
            dropout: encoder.dropout,
        };
        let objective = |graph: &mut Graph, pass: &Pass| {
            let z = forward(graph, encoder, pass)?;
            let target = graph.input("target", &[pass.samples, encoder.embedding], DType::F32)?;
            let kd = graph.kd_loss(z, target, options.alpha, options.beta)?;
            Ok(Objective {
                loss: kd.loss,
                // All micro-batches have the same number of samples.
                weight: graph.constant(&[1], 1.0)?,
                metrics: vec![("loss", kd.loss), ("cosine", kd.cosine), ("mse", kd.mse)],
            })
        };
        let embed = |graph: &mut Graph, pass: &Pass| {
            let z = forward(graph, encoder, pass)?;
            graph.output("z", z)
        };
        Ok(Self {
            encoder: encoder.clone(),
            trainer: Trainer::new(gpu, &common, objective, embed)?,
        })
    }

    /// The network's sizes.
    #[must_use]
    pub fn encoder(&self) -> &EncoderOptions {
        &self.encoder
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

    /// Trains on one batch of shape [B, L] and targets [B, E]; the metrics arrive later.
    ///
    /// # Errors
    /// [`Error::Data`] for a batch of another shape, [`Error::OutOfMemory`], [`Error::DeviceLost`].
    pub fn submit(&self, batch: &Batch) -> Result<Pending> {
        let length = self.encoder.length;
        self.trainer.submit([
            ("ids", Host::from(&batch.ids), length),
            ("mask", Host::from(&batch.mask), length),
            ("target", Host::from(&batch.targets), self.encoder.embedding),
        ])
    }

    /// Trains on one batch and waits for its metrics. A step that was skipped gives a warning in the log.
    ///
    /// # Errors
    /// As [`Distiller::submit`].
    pub fn step(&self, batch: &Batch) -> Result<Metrics> {
        Metrics::new(&self.trainer.wait(self.submit(batch)?)?)
    }

    /// Trains on all remaining batches of the current epoch, [`Executable::IN_FLIGHT`] steps ahead of the reported metrics: the next
    /// batch is prepared while the device works on earlier ones. Steps that were skipped give warnings in the log.
    ///
    /// # Errors
    /// As [`Distiller::submit`].
    pub fn epoch(&self, batches: &mut Batches, mut report: impl FnMut(&Metrics)) -> Result<()> {
        let submit = |distiller: &mut &Self, batch: &Batch| distiller.submit(batch);
        steps::epoch(batches, &mut &*self, submit, |distiller, step| {
            report(&Metrics::new(&distiller.trainer.wait(step)?)?);
            Ok(())
        })
    }

    /// The embeddings [n, E] of `n` tokenised texts; longer texts are cut to L.
    ///
    /// # Errors
    /// [`Error::Data`] for a text without tokens or an id outside the vocabulary; [`Error::DeviceLost`].
    pub fn embed(&self, texts: &[impl AsRef<[u32]>]) -> Result<Vec<f32>> {
        let (batch, length) = (self.trainer.batch(), self.encoder.length);
        let mut embeddings = Vec::with_capacity(texts.len() * self.encoder.embedding);
        for (number, chunk) in texts.chunks(batch).enumerate() {
            let mut ids = vec![self.encoder.padding.unwrap_or(0); batch * length];
            let mut mask = vec![0.0; batch * length];
            for (i, text) in chunk.iter().enumerate() {
                let text = text.as_ref();
                if text.is_empty() {
                    return Err(Error::Data {
                        name: "ids".into(),
                        reason: format!("text {} has no tokens", number * batch + i),
                    });
                }
                let used = text.len().min(length);
                ids[i * length..][..used].copy_from_slice(&text[..used]);
                mask[i * length..][..used].fill(1.0);
            }
            let z = self.forward(&ids, &mask)?;
            embeddings.extend_from_slice(&z[..chunk.len() * self.encoder.embedding]);
        }
        Ok(embeddings)
    }

    /// Compares the embeddings of a dataset's texts with their teacher's.
    ///
    /// # Errors
    /// [`Error::Config`] when the dataset has another embedding width; as [`Distiller::embed`].
    pub fn evaluate(&self, dataset: &Dataset) -> Result<Evaluation> {
        let width = self.encoder.embedding;
        steps::check_width(width, dataset)?;
        let (batch, length) = (self.trainer.batch(), self.encoder.length);
        let mut batches = Batches::evaluation(dataset.clone(), batch, length)?
            .padding(self.encoder.padding.unwrap_or(0));
        let mut embeddings = Vec::with_capacity(dataset.len() * width);
        let mut targets = Vec::with_capacity(dataset.len() * width);
        while let Some(batch) = batches.next_batch()? {
            let z = self.forward(&batch.ids, &batch.mask)?;
            embeddings.extend_from_slice(&z[..batch.valid * width]);
            targets.extend_from_slice(&batch.targets[..batch.valid * width]);
        }
        let ranks = metrics::retrieval_ranks(&embeddings, &targets, width)?;
        Ok(Evaluation {
            cosine: metrics::mean_cosine(&embeddings, &targets, width)?,
            mse: metrics::mean_squared_error(&embeddings, &targets, width)?,
            precision_at_1: metrics::precision_at(&ranks, 1),
            precision_at_5: metrics::precision_at(&ranks, 5),
            embeddings,
        })
    }

    /// All parameters, with the network's sizes as JSON in the description.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::DeviceLost`]
    pub fn weights(&self) -> Result<Weights> {
        self.trainer.weights(&self.encoder)
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

    fn forward(&self, ids: &[u32], mask: &[f32]) -> Result<Vec<f32>> {
        let inputs = [("ids", Host::from(ids)), ("mask", Host::from(mask))];
        self.trainer.forward(&inputs)?.get("z")
    }
}

/// Adds inputs and encoder.
fn forward(graph: &mut Graph, options: &EncoderOptions, pass: &Pass) -> Result<ValueId> {
    let encoder = Encoder::new(graph, options)?;
    let n = steps::tokens(pass.samples, options.length)?;
    let ids = graph.index_input("ids", n, steps::id_bound(options.vocabulary)?)?;
    let mask = graph.input("mask", &[n], DType::F32)?;
    graph.scoped("encoder", |graph| {
        encoder.forward_in(graph, ids, mask, pass.dtype, pass.mode)
    })
}
