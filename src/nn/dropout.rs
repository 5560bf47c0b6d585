//! Dropout, and what it draws from.

use crate::error::{Error, Result};
use crate::graph::{Graph, ValueId};
use crate::types::{BinaryOp, Broadcast};

/// What a forward pass for training has beyond one for evaluation; by default nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Training {
    /// What dropout draws from; without it nothing is dropped.
    pub draws: Option<Draws>,
    /// Compute the values inside a block again for the backward pass, instead of keeping them: [`Graph::recompute`].
    pub recompute: bool,
}

impl Training {
    /// The same with dropout.
    #[must_use]
    pub fn draws(mut self, draws: Option<Draws>) -> Self {
        self.draws = draws;
        self
    }

    /// With or without recomputation.
    #[must_use]
    pub fn recompute(mut self, recompute: bool) -> Self {
        self.recompute = recompute;
        self
    }
}

/// Where the dropouts of a graph draw from: a counter of its runs, and a seed.
///
/// The counter is the state [`Draws::STATE`], so that every run draws anew, whether it becomes a step, a skipped step or a share of a
/// step, and that a training that is resumed with its states goes on as if it had not ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draws {
    counter: ValueId,
    seed: u64,
}

impl Draws {
    /// Runs so far, `[1]`.
    pub const STATE: &str = "train.draws";

    /// f32 counts exactly up to here; then the draws repeat.
    const PERIOD: f32 = 16_777_216.0;

    /// Declares the counter and counts each run of the graph. Once a graph.
    ///
    /// # Errors
    /// [`Error::Graph`] when the graph has a counter already.
    pub fn new(graph: &mut Graph, seed: u64) -> Result<Self> {
        let state = graph.state(Self::STATE, &[1], 0.0)?;
        // A copy, because a state is not to be read behind its update, and gradients read the counter, too.
        let counter = graph.affine(state, 1.0, 0.0)?;
        let next = graph.affine(state, 1.0, 1.0)?;
        let end = graph.constant(&[1], Self::PERIOD)?;
        let end = graph.binary(BinaryOp::Greater, Broadcast::Same, end, next)?;
        let next = graph.mul(next, end)?;
        graph.assign(state, next)?;
        Ok(Self { counter, seed })
    }
}

/// y = x·keep/(1 − rate) in training, y = x otherwise.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Dropout {
    /// Share of the elements that is dropped, in [0, 1).
    pub rate: f32,
}

impl Dropout {
    /// # Errors
    /// [`Error::Config`] for a rate outside [0, 1).
    pub fn new(rate: f32) -> Result<Self> {
        match (0.0..1.0).contains(&rate) {
            true => Ok(Self { rate }),
            false => Err(Error::Config {
                field: "dropout",
                reason: format!("must be in [0, 1), not {rate}"),
            }),
        }
    }

    /// x [.., C] → like x. Nothing is added to the graph at rate 0 and outside training.
    ///
    /// # Errors
    /// As [`Graph::apply`].
    pub fn forward(&self, graph: &mut Graph, x: ValueId, training: &Training) -> Result<ValueId> {
        match training.draws {
            Some(Draws { counter, seed }) => graph.dropout(x, self.rate, counter, seed),
            None => Ok(x),
        }
    }
}
