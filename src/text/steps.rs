//! What the trainings of encoder and decoder have in common.

use std::collections::VecDeque;

use super::batches::{Batch, Batches};
use super::distill::Precision;
use crate::error::Result;
use crate::graph::{DType, Executable, Graph, Outputs, Pending};
use crate::nn::{Draws, Training};
use crate::train::{AdamW, LossScale};

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
    checkpoint: bool,
) -> Result<Training> {
    let draws = match dropout {
        0.0 => None,
        _ => Some(Draws::new(graph, seed)?),
    };
    Ok(Training::default().draws(draws).checkpoint(checkpoint))
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
