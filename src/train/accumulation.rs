//! Steps over several micro-batches: one graph adds up gradients, another updates from their weighted mean.
//!
//! The accumulated gradients are Σ weight·scale·∂loss, so that the update divides by scale·Σ weight. A weight multiplies the f32
//! gradient and not the loss: f16 gradients have the size that they have in a step without micro-batches, and a loss whose
//! count is the weight is still computed together with its gradient. Only the update moves the loss scale, so that all gradients
//! of a step have the same.

use super::{AdamW, StepOutputs};
use crate::error::Result;
use crate::graph::{Graph, Op, ValueId};
use crate::runtime::Session;
use crate::types::{BinaryOp, Broadcast, UnaryOp};

/// Σ weight since the last update.
const WEIGHT: &str = "train.weight";
/// Σ weight·metric since the last update.
const METRICS: &str = "train.metrics";

impl AdamW {
    /// Adds the gradients of `loss` `[1]`, times `weight` `[1]`, to those that the session accumulates for [`AdamW::update`], which
    /// takes the weighted mean. The weight, at least 0, is what the loss is a mean over: the number of counted targets, or the
    /// number of samples (where all micro-batches have the same, 1 does). Then several micro-batches give the gradient of a
    /// single large one up to rounding.
    ///
    /// `metrics`, each `[1]`, are averaged with the same weights. Works once a graph.
    ///
    /// # Errors
    /// As [`AdamW::step`]; [`Error::Shape`](crate::Error::Shape) for a weight or metric that is not an f32 `[1]`.
    pub fn accumulate(
        &self,
        graph: &mut Graph,
        loss: ValueId,
        weight: ValueId,
        parameters: &[ValueId],
        metrics: &[ValueId],
    ) -> Result<()> {
        let scale = self.begin(graph, parameters)?;
        let gradients = graph.gradients_from(loss, scale, parameters)?;
        let params = parameters.to_vec();
        let operands = [gradients.as_slice(), &[weight]].concat();
        graph.apply(Op::Accumulate { params }, &operands)?;
        let total = graph.state(WEIGHT, &[1], 0.0)?;
        let next = graph.add(total, weight)?;
        graph.assign(total, next)?;
        if !metrics.is_empty() {
            let total = graph.state(METRICS, &[metrics.len()], 0.0)?;
            let values = graph.stack(metrics)?;
            let values = graph.mul_scalar(values, weight)?;
            let next = graph.add(total, values)?;
            graph.assign(total, next)?;
        }
        Ok(())
    }

    /// Updates `parameters` from the gradients that graphs with [`AdamW::accumulate`] have added up in this session since the last
    /// update, and the outputs named in [`StepOutputs`], with the means of `metrics` numbers if there are any. What was
    /// accumulated is zero afterwards. If any micro-batch had a gradient that was not finite, the whole step is skipped.
    ///
    /// The options must be those of the accumulation. Works once a graph, which is another than that of the accumulation.
    ///
    /// # Errors
    /// As [`AdamW::step`].
    pub fn update(&self, graph: &mut Graph, parameters: &[ValueId], metrics: usize) -> Result<()> {
        let scale = self.begin(graph, parameters)?;
        let params = parameters.to_vec();
        let gradients = graph.apply(Op::TakeAccumulated { params }, &[])?;
        let total = graph.state(WEIGHT, &[1], 0.0)?;
        // Without any weight the gradients are zero, as those of a batch where nothing counts.
        let (min, max) = (1e-12, f32::MAX);
        let weight = graph.unary(UnaryOp::Clamp { min, max }, total)?;
        let divisor = graph.mul(weight, scale)?;
        if metrics > 0 {
            let sums = graph.state(METRICS, &[metrics], 0.0)?;
            let inverse = graph.unary(UnaryOp::Recip, weight)?;
            let means = graph.mul_scalar(sums, inverse)?;
            graph.output(StepOutputs::METRICS, means)?;
            reset(graph, sums)?;
        }
        // A plain copy, since the state is zero when results are read back.
        let all = graph.affine(total, 1.0, 0.0)?;
        graph.output(StepOutputs::WEIGHT, all)?;
        reset(graph, total)?;
        self.finish(graph, parameters, &gradients, [scale, divisor])
    }
}

fn reset(graph: &mut Graph, state: ValueId) -> Result<()> {
    // Zero also where the state is NaN.
    let zero = graph.binary(BinaryOp::Greater, Broadcast::Same, state, state)?;
    graph.assign(state, zero)
}

/// The state that tells of accumulated gradients, if there are any.
pub(super) fn pending(session: &Session) -> Result<Option<&'static str>> {
    let weight = match session.states().contains_key(WEIGHT) {
        true => session.get(WEIGHT)?,
        false => Vec::new(),
    };
    Ok(weight.iter().any(|&x| x != 0.0).then_some(WEIGHT))
}

/// Forgets what was accumulated, for a step that could not be finished.
pub(crate) fn discard(session: &Session) -> Result<()> {
    session.clear_accumulated()?;
    for name in [WEIGHT, METRICS] {
        session.clear_state(name)?;
    }
    Ok(())
}
