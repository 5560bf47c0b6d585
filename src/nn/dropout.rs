//! Dropout and its random numbers.

use super::Mode;
use crate::error::{Error, Result};
use crate::graph::{Graph, ValueId};
use crate::types::{BinaryOp, Broadcast};

/// The random numbers of the dropouts of a graph: a counter of its runs and a seed.
///
/// The counter is the state [`Draws::STATE`]. So every run draws new numbers, whether it becomes a step, a skipped step or a part of
/// a step. A training that is resumed with its states continues the sequence.
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

    /// Declares the counter and counts each run of the graph. Once per graph.
    ///
    /// # Errors
    /// [`Error::Graph`] when the graph has a counter already.
    pub fn new(graph: &mut Graph, seed: u64) -> Result<Self> {
        let state = graph.state(Self::STATE, &[1], 0.0)?;
        // A copy: a state cannot be read after its update, and gradients read the counter, too.
        let counter = graph.affine(state, 1.0, 0.0)?;
        let next = graph.affine(state, 1.0, 1.0)?;
        let end = graph.constant(&[1], Self::PERIOD)?;
        let end = graph.binary(BinaryOp::Greater, Broadcast::Same, end, next)?;
        let next = graph.mul(next, end)?;
        graph.assign(state, next)?;
        Ok(Self { counter, seed })
    }
}

/// y = x·keep/(1 − rate) in training, y = x in evaluation.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Dropout {
    /// Share of the elements that is dropped, in [0, 1).
    pub rate: f32,
}

impl Dropout {
    /// Dropout at `rate`.
    ///
    /// # Errors
    /// [`Error::Config`] for a rate outside of [0, 1).
    pub fn new(rate: f32) -> Result<Self> {
        match (0.0..1.0).contains(&rate) {
            true => Ok(Self { rate }),
            false => Err(Error::Config {
                field: "dropout",
                reason: format!("must be in [0, 1), not {rate}"),
            }),
        }
    }

    /// x [.., C] → like x. Nothing is added to the graph at rate 0, in evaluation, and without draws.
    ///
    /// # Errors
    /// As [`Graph::apply`].
    pub fn forward(&self, graph: &mut Graph, x: ValueId, mode: Mode) -> Result<ValueId> {
        match mode.draws() {
            Some(Draws { counter, seed }) => graph.dropout(x, self.rate, counter, seed),
            None => Ok(x),
        }
    }
}
