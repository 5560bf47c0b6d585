//! Mode A: an encoder learns to give a teacher's sentence embeddings.

use std::sync::Arc;

use super::batches::{Batch, Batches};
use super::dataset::Dataset;
use super::encoder::{Encoder, EncoderOptions, PADDING};
use super::metrics;
use super::steps::{self, Step};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::graph::{Graph, ValueId};
use crate::nn::Mode;
use crate::runtime::{Executable, Host, Outputs, Pending, Session};
use crate::train::{AdamW, Checkpoint, StepOutputs, Weights};
use crate::types::{DType, Precision};

/// How to distil.
#[derive(Clone, Debug, PartialEq)]
pub struct DistillOptions {
    /// Samples a step, B.
    pub batch: usize,
    /// Parts of a batch whose gradients are computed one after the other and added up, each with B / micro-batches samples:
    /// less memory for the same step up to rounding.
    pub micro_batches: usize,
    /// Weight of 1 − cosine.
    pub alpha: f32,
    /// Weight of the mean squared error.
    pub beta: f32,
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

impl Default for DistillOptions {
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
        Ok(Self {
            loss,
            cosine,
            mse,
            gradient_norm: outputs.scalar(StepOutputs::GRADIENT_NORM)?,
            learning_rate: outputs.scalar(StepOutputs::LEARNING_RATE)?,
            loss_scale: outputs.scalar(StepOutputs::LOSS_SCALE)?,
            skipped: outputs.scalar(StepOutputs::SKIPPED)?,
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
    batch: usize,
    session: Session,
    step: Step,
    embed: Arc<Executable>,
}

impl Distiller {
    /// Builds and compiles the training step and the forward pass.
    ///
    /// # Errors
    /// [`Error::Config`] for sizes or rates out of range and names in `freeze` that fit no parameter, or all; what [`Session::compile`] returns.
    pub fn new(gpu: &Gpu, encoder: &EncoderOptions, options: &DistillOptions) -> Result<Self> {
        let samples = Step::samples(options.batch, options.micro_batches)?;
        let mut optimizer = options.optimizer;
        let dtype = options.precision.prepare(&mut optimizer);
        let mut session = Session::new(gpu, options.seed);
        let training = training_graph(encoder, options, samples, &optimizer, dtype)?;
        let sizes = [options.batch, options.micro_batches];
        let update = || {
            let mut graph = Graph::new();
            Encoder::new(&mut graph, encoder)?;
            steps::update(graph, &optimizer, &options.freeze, 3)
        };
        let step = Step::new(&mut session, sizes, &training, update)?;
        let mut graph = Graph::new();
        let z = forward(&mut graph, encoder, options.batch, dtype, Mode::Eval)?;
        graph.output("z", z)?;
        let embed = session.compile(&graph)?;
        Ok(Self {
            encoder: encoder.clone(),
            batch: options.batch,
            session,
            step,
            embed,
        })
    }

    /// The network's sizes.
    #[must_use]
    pub fn encoder(&self) -> &EncoderOptions {
        &self.encoder
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

    /// Trains on one batch of shape [B, L] and targets [B, E]; the metrics arrive later.
    ///
    /// # Errors
    /// [`Error::Data`] for a batch of another shape, [`Error::OutOfMemory`], [`Error::DeviceLost`].
    pub fn submit(&self, batch: &Batch) -> Result<Pending> {
        let length = self.encoder.length;
        let inputs = [
            ("ids", Host::from(&batch.ids), length),
            ("mask", Host::from(&batch.mask), length),
            ("target", Host::from(&batch.targets), self.encoder.embedding),
        ];
        self.step.submit(&self.session, inputs)
    }

    /// Trains on one batch and waits for its metrics.
    ///
    /// # Errors
    /// As [`Distiller::submit`].
    pub fn step(&self, batch: &Batch) -> Result<Metrics> {
        Metrics::new(&self.submit(batch)?.wait()?)
    }

    /// Trains on all remaining batches of the current epoch, [`Executable::IN_FLIGHT`] steps ahead of the reported metrics: the next
    /// batch is prepared while the device works on earlier ones.
    ///
    /// # Errors
    /// As [`Distiller::submit`].
    pub fn epoch(&self, batches: &mut Batches, mut report: impl FnMut(&Metrics)) -> Result<()> {
        let metrics = |outputs: &Outputs| {
            report(&Metrics::new(outputs)?);
            Ok(())
        };
        steps::epoch(batches, |batch| self.submit(batch), metrics)
    }

    /// The embeddings [n, E] of `n` tokenised texts; longer texts are cut to L.
    ///
    /// # Errors
    /// [`Error::Data`] for a text without tokens or an id outside the vocabulary; [`Error::DeviceLost`].
    pub fn embed(&self, texts: &[impl AsRef<[u32]>]) -> Result<Vec<f32>> {
        let length = self.encoder.length;
        let mut embeddings = Vec::with_capacity(texts.len() * self.encoder.embedding);
        for chunk in texts.chunks(self.batch) {
            let mut ids = vec![PADDING; self.batch * length];
            let mut mask = vec![0.0; self.batch * length];
            for (i, text) in chunk.iter().enumerate() {
                let text = text.as_ref();
                if text.is_empty() {
                    return Err(Error::Data {
                        name: "ids".into(),
                        reason: "a text has no tokens".into(),
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
        if dataset.width() != width {
            return Err(Error::Config {
                field: "embedding",
                reason: format!("is {width}, but the data has {}", dataset.width()),
            });
        }
        let mut batches = Batches::evaluation(dataset.clone(), self.batch, self.encoder.length)?;
        let mut embeddings = Vec::with_capacity(dataset.len() * width);
        let mut targets = Vec::with_capacity(dataset.len() * width);
        while let Some(batch) = batches.next_batch() {
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
        let mut weights = Weights::from_session(&self.session)?;
        weights.description =
            serde_json::to_string(&self.encoder).map_err(|error| Error::Config {
                field: "encoder",
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

    fn forward(&self, ids: &[u32], mask: &[f32]) -> Result<Vec<f32>> {
        let inputs = [("ids", Host::from(ids)), ("mask", Host::from(mask))];
        self.embed.run(&inputs)?.wait()?.get("z")
    }
}

fn forward(
    graph: &mut Graph,
    options: &EncoderOptions,
    batch: usize,
    dtype: DType,
    mode: Mode,
) -> Result<ValueId> {
    let encoder = Encoder::new(graph, options)?;
    let n = steps::tokens(batch, options.length)?;
    let below = u32::try_from(options.vocabulary).map_err(|_| Error::Config {
        field: "vocabulary",
        reason: "must fit u32".into(),
    })?;
    let ids = graph.index_input("ids", n, below)?;
    let mask = graph.input("mask", &[n], DType::F32)?;
    graph.scoped("encoder", |graph| {
        encoder.forward_in(graph, ids, mask, dtype, mode)
    })
}

fn training_graph(
    encoder: &EncoderOptions,
    options: &DistillOptions,
    batch: usize,
    optimizer: &AdamW,
    dtype: DType,
) -> Result<Graph> {
    let mut graph = Graph::new();
    let (seed, recompute) = (options.seed, options.recompute);
    let mode = steps::training(&mut graph, encoder.dropout, seed, recompute)?;
    let z = forward(&mut graph, encoder, batch, dtype, mode)?;
    let target = graph.input("target", &[batch, encoder.embedding], DType::F32)?;
    let kd = graph.kd_loss(z, target, options.alpha, options.beta)?;
    // All micro-batches have the same number of samples.
    let weight = graph.constant(&[1], 1.0)?;
    let metrics = [("loss", kd.loss), ("cosine", kd.cosine), ("mse", kd.mse)];
    let options = (&*options.freeze, options.micro_batches);
    steps::train_on(&mut graph, optimizer, options, [kd.loss, weight], &metrics)?;
    Ok(graph)
}
