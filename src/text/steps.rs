//! What the trainings of encoder and decoder have in common: options, the compiled step, epochs, checkpoints.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use serde::Serialize;

use super::batches::{Batch, Batches};
use super::dataset::Dataset;
use crate::error::{Error, Result};
use crate::gpu::{Gate, Gpu};
use crate::graph::{Graph, ValueId};
use crate::nn::{Draws, Mode};
use crate::runtime::{Executable, Host, Outputs, Pending, Session};
use crate::train::{self, AdamW, Checkpoint, LossScale, StepOutputs, Weights, trainable};
use crate::types::{DType, Precision};

/// The options that both trainings have.
pub(super) struct Common<'a> {
    pub batch: usize,
    pub micro_batches: usize,
    pub optimizer: &'a AdamW,
    pub precision: Precision,
    pub seed: u64,
    pub recompute: bool,
    pub freeze: &'a [String],
    pub dropout: f32,
}

/// How a forward pass runs.
pub(super) struct Pass {
    /// Samples of a run.
    pub samples: usize,
    /// Element type of activations.
    pub dtype: DType,
    pub mode: Mode,
}

/// What a network learns.
pub(super) struct Objective {
    /// A mean over `weight` samples or tokens.
    pub loss: ValueId,
    pub weight: ValueId,
    /// Means over the same, by the names that they have as outputs.
    pub metrics: Vec<(&'static str, ValueId)>,
}

/// What every step reports.
pub(super) struct StepMetrics {
    pub gradient_norm: f32,
    pub learning_rate: f32,
    pub loss_scale: f32,
    pub skipped: f32,
}

impl StepMetrics {
    pub fn new(outputs: &Outputs) -> Result<Self> {
        Ok(Self {
            gradient_norm: outputs.scalar(StepOutputs::GRADIENT_NORM)?,
            learning_rate: outputs.scalar(StepOutputs::LEARNING_RATE)?,
            loss_scale: outputs.scalar(StepOutputs::LOSS_SCALE)?,
            skipped: outputs.scalar(StepOutputs::SKIPPED)?,
        })
    }
}

/// A network in training: its session, the compiled step and the forward pass.
#[derive(Debug)]
pub(super) struct Trainer {
    session: Session,
    step: Step,
    forward: Arc<Executable>,
    /// Skipped steps that were reported, as the bits of an f32.
    skipped: AtomicU32,
}

impl Trainer {
    /// Compiles the step that trains what `objective` adds to a graph, and the pass that `forward` adds to another.
    pub fn new(
        gpu: &Gpu,
        options: &Common<'_>,
        objective: impl FnOnce(&mut Graph, &Pass) -> Result<Objective>,
        forward: impl FnOnce(&mut Graph, &Pass) -> Result<()>,
    ) -> Result<Self> {
        let samples = samples(options.batch, options.micro_batches)?;
        let mut optimizer = options.optimizer.clone();
        let dtype = match options.precision {
            Precision::F32 => DType::F32,
            Precision::Mixed => {
                optimizer.loss_scale.get_or_insert_with(LossScale::default);
                DType::F16
            }
        };
        let mut session = Session::new(gpu, options.seed);
        let mut graph = Graph::new();
        // A rate of 0 needs no draws.
        let draws = match options.dropout {
            0.0 => None,
            _ => Some(Draws::new(&mut graph, options.seed)?),
        };
        let pass = Pass {
            samples,
            dtype,
            mode: Mode::train(draws).recompute(options.recompute),
        };
        let Objective {
            loss,
            weight,
            metrics,
        } = objective(&mut graph, &pass)?;
        let parameters = trainable(&graph, options.freeze)?;
        let update = if options.micro_batches == 1 {
            for (name, value) in metrics {
                graph.output(name, value)?;
            }
            optimizer.step(&mut graph, loss, &parameters)?;
            None
        } else {
            let metrics: Vec<ValueId> = metrics.into_iter().map(|(_, value)| value).collect();
            optimizer.accumulate(&mut graph, loss, weight, &parameters, &metrics)?;
            Some(optimizer.update(&[&graph])?)
        };
        let step = Step {
            train: session.compile(&graph)?,
            update: update.map(|graph| session.compile(&graph)).transpose()?,
            batch: options.batch,
            micro_batches: options.micro_batches,
            order: Gate::default(),
        };
        let mut graph = Graph::new();
        let pass = Pass {
            samples: options.batch,
            dtype,
            mode: Mode::Eval,
        };
        forward(&mut graph, &pass)?;
        Ok(Self {
            forward: session.compile(&graph)?,
            session,
            step,
            skipped: AtomicU32::new(0),
        })
    }

    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The graph that every micro-batch goes through, or the only one.
    pub fn training_step(&self) -> &Executable {
        &self.step.train
    }

    /// Samples of a step.
    pub fn batch(&self) -> usize {
        self.step.batch
    }

    /// Runs the forward pass.
    pub fn forward(&self, inputs: &[(&str, Host<'_>)]) -> Result<Outputs> {
        self.forward.run(inputs)?.wait()
    }

    /// Runs a step; its results arrive later.
    pub fn submit<const N: usize>(&self, inputs: [Whole<'_>; N]) -> Result<Pending> {
        self.step.submit(&self.session, inputs)
    }

    /// Waits for a step. One that was skipped gives a warning.
    pub fn wait(&self, step: Pending) -> Result<Outputs> {
        let outputs = step.wait()?;
        let skipped = outputs.scalar(StepOutputs::SKIPPED)?;
        let before = f32::from_bits(self.skipped.swap(skipped.to_bits(), Ordering::Relaxed));
        if skipped > before {
            let scale = outputs.scalar(StepOutputs::LOSS_SCALE)?;
            log::warn!(
                "a step was skipped, because a gradient was not finite; loss scale {scale}, skipped steps so far: {skipped}"
            );
        }
        Ok(outputs)
    }

    pub fn weights(&self, sizes: &impl Serialize) -> Result<Weights> {
        let mut weights = Weights::from_session(&self.session)?;
        weights.description = serde_json::to_string(sizes).map_err(|error| Error::Config {
            field: "description",
            reason: format!("the network's sizes cannot be written as JSON: {error}"),
        })?;
        Ok(weights)
    }

    pub fn set_weights(&mut self, weights: &Weights) -> Result<()> {
        weights.apply(&mut self.session)
    }

    pub fn checkpoint(&self) -> Result<Checkpoint> {
        Checkpoint::from_session(&self.session)
    }

    pub fn resume(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        checkpoint.apply(&mut self.session)?;
        // Skips from before the checkpoint are no news.
        let skipped = self.session.get(train::SKIPPED)?;
        self.skipped.store(skipped[0].to_bits(), Ordering::Relaxed);
        Ok(())
    }
}

/// Tokens of a batch, B·L.
pub(super) fn tokens(batch: usize, length: usize) -> Result<usize> {
    batch.checked_mul(length).ok_or_else(|| Error::Config {
        field: "batch",
        reason: format!("of {batch} texts of {length} tokens is too large"),
    })
}

/// The dataset's embeddings are as wide as the network's.
pub(super) fn check_width(width: usize, dataset: &Dataset) -> Result<()> {
    if dataset.width() == width {
        return Ok(());
    }
    Err(Error::Config {
        field: "embedding",
        reason: format!(
            "is {width}, but the embeddings of {} have {} values",
            dataset.path().display(),
            dataset.width()
        ),
    })
}

/// Exclusive upper bound of token ids.
pub(super) fn id_bound(vocabulary: usize) -> Result<u32> {
    u32::try_from(vocabulary).map_err(|_| Error::Config {
        field: "vocabulary",
        reason: format!("is {vocabulary}, but token ids have 32 bits"),
    })
}

/// Samples of a micro-batch.
fn samples(batch: usize, micro_batches: usize) -> Result<usize> {
    if batch == 0 {
        return Err(Error::Config {
            field: "batch",
            reason: "must be at least 1".into(),
        });
    }
    if micro_batches == 0 || !batch.is_multiple_of(micro_batches) {
        return Err(Error::Config {
            field: "micro_batches",
            reason: format!("is {micro_batches}, but must divide the batch of {batch}"),
        });
    }
    Ok(batch / micro_batches)
}

/// Submits all remaining batches of the current epoch, [`Executable::IN_FLIGHT`] ahead of the reported results: the next batch is
/// prepared while the device works on earlier ones.
pub(super) fn epoch<T>(
    batches: &mut Batches,
    trainer: &mut T,
    mut submit: impl FnMut(&mut T, &Batch) -> Result<Pending>,
    mut report: impl FnMut(&T, Pending) -> Result<()>,
) -> Result<()> {
    let mut pending: VecDeque<Pending> = VecDeque::with_capacity(Executable::IN_FLIGHT);
    while let Some(batch) = batches.next_batch()? {
        if pending.len() == Executable::IN_FLIGHT
            && let Some(oldest) = pending.pop_front()
        {
            report(trainer, oldest)?;
        }
        pending.push_back(submit(trainer, batch)?);
    }
    for step in pending {
        report(trainer, step)?;
    }
    Ok(())
}

/// An input of a step: a name, the data of a whole batch, and how many of its elements a sample has.
pub(super) type Whole<'a> = (&'static str, Host<'a>, usize);

/// A training step: one graph, or one that each micro-batch goes through and one that updates after the last.
#[derive(Debug)]
struct Step {
    train: Arc<Executable>,
    update: Option<Arc<Executable>>,
    batch: usize,
    micro_batches: usize,
    /// The micro-batches of a step belong together.
    order: Gate,
}

impl Step {
    fn submit<const N: usize>(&self, session: &Session, inputs: [Whole<'_>; N]) -> Result<Pending> {
        let Some(update) = &self.update else {
            return self.train.run(&inputs.map(|(name, data, _)| (name, data)));
        };
        let Some(_order) = self.order.enter_once() else {
            return Err(Error::Graph(
                "a step is under way on this thread; a callback that it runs cannot begin another"
                    .into(),
            ));
        };
        let step = self.accumulate(inputs).and_then(|()| update.run(&[]));
        if step.is_err() {
            // Or the next step would contain the beginning of this one. What went wrong is reported first.
            let _ = train::discard(session);
        }
        step
    }

    fn accumulate<const N: usize>(&self, inputs: [Whole<'_>; N]) -> Result<()> {
        for (name, data, each) in inputs {
            let (len, needed) = (data.len(), self.batch * each);
            if len != needed {
                return Err(Error::Data {
                    name: name.into(),
                    reason: format!("needs {needed} elements, got {len}"),
                });
            }
        }
        let samples = self.batch / self.micro_batches;
        for first in (0..self.batch).step_by(samples) {
            let part = inputs.map(|(name, data, each)| {
                (name, data.part(first * each..(first + samples) * each))
            });
            // Returns at once, since the graph has no outputs.
            self.train.run(&part)?.wait()?;
        }
        Ok(())
    }
}
