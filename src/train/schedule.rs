//! Learning-rate schedules, computed on the device from the step counter.

use serde::{Deserialize, Serialize};

use std::f32::consts::PI;

use crate::error::{Error, Result};
use crate::graph::{Graph, ValueId};
use crate::types::UnaryOp;

/// The learning rate of step t = 1, 2, …
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Schedule {
    /// The same at every step.
    Constant {
        /// Learning rate.
        rate: f32,
    },
    /// Rises linearly from 0 to `peak` at step `warmup`, falls along half a cosine to `end` at step `total`, and stays there.
    /// Loshchilov & Hutter, arXiv:1608.03983, with warm-up.
    WarmupCosine {
        /// Highest learning rate.
        peak: f32,
        /// Last learning rate.
        end: f32,
        /// Number of steps until `peak`.
        warmup: u32,
        /// Number of steps until `end`, warm-up included; at most 2²⁴.
        total: u32,
    },
}

impl Schedule {
    pub(super) fn check(&self) -> Result<()> {
        let fail = |reason: &str| {
            Err(Error::Config {
                field: "schedule",
                reason: reason.to_owned(),
            })
        };
        let sound = |rate: f32| rate.is_finite() && rate >= 0.0;
        match *self {
            Self::Constant { rate } if !sound(rate) => fail("needs a finite rate >= 0"),
            Self::WarmupCosine { peak, end, .. } if !sound(peak) || !sound(end) => {
                fail("needs finite rates >= 0")
            }
            Self::WarmupCosine { warmup, total, .. } if warmup >= total => {
                fail("needs fewer warm-up steps than steps")
            }
            // Steps are counted in f32.
            Self::WarmupCosine { total, .. } if total > 1 << 24 => fail("has more than 2^24 steps"),
            _ => Ok(()),
        }
    }

    /// The learning rate at step `t` = 1, 2, …, computed on the host.
    #[must_use]
    pub fn at(&self, t: u32) -> f32 {
        match *self {
            Self::Constant { rate } => rate,
            Self::WarmupCosine {
                peak,
                end,
                warmup,
                total,
            } => {
                let t = t as f32;
                let up = (t / warmup.max(1) as f32).clamp(0.0, 1.0);
                let down = ((t - warmup as f32) / total.saturating_sub(warmup).max(1) as f32)
                    .clamp(0.0, 1.0);
                up * (end + (peak - end) * (0.5 + 0.5 * (PI * down).cos()))
            }
        }
    }

    /// The learning rate at step `t` `[1]`, as nodes.
    pub(super) fn nodes(&self, graph: &mut Graph, t: ValueId) -> Result<ValueId> {
        let unit = UnaryOp::Clamp { min: 0.0, max: 1.0 };
        match *self {
            Self::Constant { rate } => graph.affine(t, 0.0, rate),
            Self::WarmupCosine {
                peak,
                end,
                warmup,
                total,
            } => {
                let up = graph.affine(t, 1.0 / warmup.max(1) as f32, 0.0)?;
                let up = graph.unary(unit, up)?;
                let span = (total - warmup) as f32;
                let down = graph.affine(t, 1.0 / span, -(warmup as f32) / span)?;
                let down = graph.unary(unit, down)?;
                let down = graph.affine(down, PI, 0.0)?;
                let cosine = graph.unary(UnaryOp::Cos, down)?;
                let half = 0.5 * (peak - end);
                let rate = graph.affine(cosine, half, end + half)?;
                graph.mul(rate, up)
            }
        }
    }
}
