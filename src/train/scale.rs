//! Dynamic loss scaling: keeps small f16 gradients from vanishing, and large ones from staying infinite.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::graph::{Graph, ValueId};
use crate::setters::setters;
use crate::types::{BinaryOp, Broadcast, UnaryOp};

/// A factor on the loss. It doubles after `interval` good steps in a row. It halves when a gradient is not finite, and that step is
/// skipped. Micikevicius et al., arXiv:1710.03740.
///
/// The first step uses `start`, which may lie outside of `min..=max`, for instance to provoke an overflow. The scale of every later
/// step lies within.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LossScale {
    /// Scale of the first step.
    pub start: f32,
    /// Smallest scale.
    pub min: f32,
    /// Largest scale.
    pub max: f32,
    /// Number of good steps in a row until the scale doubles, at most 2²³.
    pub interval: u32,
}

impl Default for LossScale {
    /// Starts at 1024, stays within 1 and 65 536, doubles after 2000 good steps.
    fn default() -> Self {
        Self {
            start: 1024.0,
            min: 1.0,
            max: 65_536.0,
            interval: 2000,
        }
    }
}

impl LossScale {
    setters! {
        start: f32,
        min: f32,
        max: f32,
        interval: u32,
    }

    pub(super) fn check(&self) -> Result<()> {
        let ordered = 0.0 < self.min && self.min <= self.max && self.start > 0.0;
        // Steps are counted in f32, and compared at half a step.
        let counted = (1..=1 << 23).contains(&self.interval);
        if ordered && self.max.is_finite() && self.start.is_finite() && counted {
            return Ok(());
        }
        Err(Error::Config {
            field: "loss_scale",
            reason: "needs 0 < min <= max, a finite start > 0 and an interval in 1..=2^23".into(),
        })
    }

    /// Moves the scale on. `apply` is 1 when the step was good, 0 when a gradient was not finite.
    /// `good` counts good steps in a row.
    pub(super) fn update(
        &self,
        graph: &mut Graph,
        [scale, good]: [ValueId; 2],
        apply: ValueId,
    ) -> Result<()> {
        let count = graph.affine(good, 1.0, 1.0)?;
        let count = graph.mul(count, apply)?;
        let enough = graph.constant(&[1], self.interval as f32 - 0.5)?;
        let grow = graph.binary(BinaryOp::Greater, Broadcast::Same, count, enough)?;
        let rest = graph.affine(grow, -1.0, 1.0)?;
        let count = graph.mul(count, rest)?;
        // Half after a bad step, one after a good one, two when it grows.
        let factor = graph.affine(apply, 0.5, 0.5)?;
        let factor = graph.add(factor, grow)?;
        let next = graph.mul(scale, factor)?;
        let (min, max) = (self.min, self.max);
        let next = graph.unary(UnaryOp::Clamp { min, max }, next)?;
        graph.assign(good, count)?;
        graph.assign(scale, next)
    }
}
