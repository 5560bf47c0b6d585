//! What the trainings of encoder and decoder have in common.

use std::collections::VecDeque;
use std::sync::Arc;

use super::batches::{Batch, Batches};
use crate::error::{Error, Result};
use crate::gpu::Gate;
use crate::graph::{Graph, ValueId};
use crate::nn::{Draws, Training};
use crate::runtime::{Executable, Host, Outputs, Pending, Session};
use crate::train::{self, AdamW, LossScale, trainable};
use crate::types::{DType, Precision};

impl Precision {
    /// Element type of activations; mixed precision gives an optimizer without a loss scale the default one.
    pub(super) fn prepare(self, optimizer: &mut AdamW) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Mixed => {
                optimizer.loss_scale.get_or_insert_with(LossScale::default);
                DType::F16
            }
        }
    }
}

/// How the forward pass of a training graph runs; a rate of dropout of 0 needs no draws.
pub(super) fn training(
    graph: &mut Graph,
    dropout: f32,
    seed: u64,
    recompute: bool,
) -> Result<Training> {
    let draws = match dropout {
        0.0 => None,
        _ => Some(Draws::new(graph, seed)?),
    };
    Ok(Training::default().draws(draws).recompute(recompute))
}

/// Adds what trains all parameters but the frozen ones on `loss`, the mean over `weight` samples or tokens: a whole step with outputs
/// `metrics`, or the part of it that every micro-batch goes through, where there are several.
pub(super) fn train_on(
    graph: &mut Graph,
    optimizer: &AdamW,
    (frozen, micro_batches): (&[String], usize),
    [loss, weight]: [ValueId; 2],
    metrics: &[(&str, ValueId)],
) -> Result<()> {
    let parameters = trainable(graph, frozen)?;
    if micro_batches > 1 {
        let values: Vec<ValueId> = metrics.iter().map(|(_, value)| *value).collect();
        return optimizer.accumulate(graph, loss, weight, &parameters, &values);
    }
    for (name, value) in metrics {
        graph.output(name, *value)?;
    }
    optimizer.step(graph, loss, &parameters)
}

/// Of a graph with nothing but parameters, the step that follows the micro-batches.
pub(super) fn update(
    mut graph: Graph,
    optimizer: &AdamW,
    frozen: &[String],
    metrics: usize,
) -> Result<Graph> {
    let parameters = trainable(&graph, frozen)?;
    optimizer.update(&mut graph, &parameters, metrics)?;
    Ok(graph)
}

/// Submits all remaining batches of the current epoch, [`Executable::IN_FLIGHT`] ahead of the reported results: the next batch is
/// prepared while the device works on earlier ones.
pub(super) fn epoch(
    batches: &mut Batches,
    mut submit: impl FnMut(&Batch) -> Result<Pending>,
    mut report: impl FnMut(&Outputs) -> Result<()>,
) -> Result<()> {
    let mut pending: VecDeque<Pending> = VecDeque::with_capacity(Executable::IN_FLIGHT);
    while let Some(batch) = batches.next_batch() {
        if pending.len() == Executable::IN_FLIGHT
            && let Some(oldest) = pending.pop_front()
        {
            report(&oldest.wait()?)?;
        }
        pending.push_back(submit(batch)?);
    }
    for step in pending {
        report(&step.wait()?)?;
    }
    Ok(())
}

/// What goes into a step: a name, the data of a whole batch, and how many of its elements a sample has.
pub(super) type Whole<'a> = (&'static str, Host<'a>, usize);

/// A training step, in one graph, or in one that each micro-batch goes through and one that updates behind the last.
#[derive(Debug)]
pub(super) struct Step {
    train: Arc<Executable>,
    update: Option<Arc<Executable>>,
    batch: usize,
    micro_batches: usize,
    /// The micro-batches of a step belong together.
    order: Gate,
}

impl Step {
    /// Compiles `train` and, where there are several micro-batches, `update`.
    pub fn new(
        session: &mut Session,
        [batch, micro_batches]: [usize; 2],
        train: &Graph,
        update: impl FnOnce() -> Result<Graph>,
    ) -> Result<Self> {
        let train = session.compile(train)?;
        let update = match micro_batches {
            1 => None,
            _ => Some(session.compile(&update()?)?),
        };
        Ok(Self {
            train,
            update,
            batch,
            micro_batches,
            order: Gate::default(),
        })
    }

    /// Samples of a micro-batch.
    ///
    /// # Errors
    /// [`Error::Config`] for a batch without samples or that micro-batches of equal size do not fill.
    pub fn samples(batch: usize, micro_batches: usize) -> Result<usize> {
        if batch == 0 {
            return Err(Error::Config {
                field: "batch",
                reason: "must be at least 1".into(),
            });
        }
        if micro_batches == 0 || !batch.is_multiple_of(micro_batches) {
            return Err(Error::Config {
                field: "micro_batches",
                reason: format!("must divide the batch of {batch}"),
            });
        }
        Ok(batch / micro_batches)
    }

    /// The graph that every micro-batch goes through, or the only one.
    pub fn train(&self) -> &Executable {
        &self.train
    }

    /// The metrics arrive later.
    pub fn submit<const N: usize>(
        &self,
        session: &Session,
        inputs: [Whole<'_>; N],
    ) -> Result<Pending> {
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
