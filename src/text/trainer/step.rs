//! An optimizer step: one graph, or one that each micro-batch goes through and one that updates after the last.

use std::sync::Arc;

use super::objective::Objective;
use crate::error::{Error, Result};
use crate::gpu::Gate;
use crate::graph::Graph;
use crate::runtime::{Executable, Host, Pending, Session};
use crate::train::{self, AdamW, trainable};

/// An input of a step: a name, its data, and how many of its elements a sample has.
pub(super) type Whole<'a> = (&'static str, Host<'a>, usize);

/// Upper bound on the inputs of a step.
const MOST_INPUTS: usize = 5;

#[derive(Debug)]
pub(super) struct Step {
    pub train: Arc<Executable>,
    update: Option<Arc<Executable>>,
    samples: usize,
    micro_batches: usize,
    /// Names of the metrics that the steps report, in order.
    pub metrics: Vec<&'static str>,
}

impl Step {
    /// Compiles the step that trains what `objective` adds to `graph`, on `samples` samples.
    pub fn new(
        session: &mut Session,
        (mut graph, objective): (Graph, Objective),
        optimizer: &AdamW,
        freeze: &[String],
        (samples, micro_batches): (usize, usize),
    ) -> Result<Self> {
        let Objective {
            loss,
            weight,
            metrics,
            parameters,
        } = objective;
        let thawed = trainable(&graph, freeze)?;
        let parameters: Vec<_> = parameters
            .into_iter()
            .filter(|id| thawed.contains(id))
            .collect();
        let names = metrics.iter().map(|(name, _)| *name).collect();
        let update = if micro_batches == 1 {
            for (name, value) in metrics {
                graph.output(name, value)?;
            }
            optimizer.step(&mut graph, loss, &parameters)?;
            None
        } else {
            let values: Vec<_> = metrics.into_iter().map(|(_, value)| value).collect();
            optimizer.accumulate(&mut graph, loss, weight, &parameters, &values)?;
            Some(optimizer.update(&[&graph])?)
        };
        Ok(Self {
            train: session.compile(&graph)?,
            update: update.map(|graph| session.compile(&graph)).transpose()?,
            samples,
            micro_batches,
            metrics: names,
        })
    }

    /// Runs the step. `order` keeps the micro-batches of a step together.
    pub fn submit(&self, session: &Session, order: &Gate, inputs: &[Whole<'_>]) -> Result<Pending> {
        let Some(update) = &self.update else {
            return self.run(inputs, 0..self.samples);
        };
        let Some(_order) = order.enter_once() else {
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

    fn accumulate(&self, inputs: &[Whole<'_>]) -> Result<()> {
        let part = self.samples / self.micro_batches;
        for first in (0..self.samples).step_by(part) {
            // Returns at once, since the graph has no outputs.
            self.run(inputs, first..first + part)?.wait()?;
        }
        Ok(())
    }

    fn run(&self, inputs: &[Whole<'_>], samples: std::ops::Range<usize>) -> Result<Pending> {
        // Not a vector: nothing is allocated in a step.
        let mut parts = [("", Host::F32(&[])); MOST_INPUTS];
        for (part, &(name, data, each)) in parts.iter_mut().zip(inputs) {
            check_length(name, data.len(), self.samples * each)?;
            *part = (name, data.part(samples.start * each..samples.end * each));
        }
        self.train.run(&parts[..inputs.len()])
    }
}

/// An input has the size of a batch.
pub(super) fn check_length(name: &str, len: usize, needed: usize) -> Result<()> {
    if len == needed {
        return Ok(());
    }
    Err(Error::Data {
        name: name.into(),
        reason: format!("needs {needed} elements, got {len}"),
    })
}
