//! From a loss to a training step: gradients, clipping, schedule, AdamW, counters.

use super::{LossScale, Schedule};
use crate::error::{Error, Result};
use crate::graph::{Graph, Op, ValueId};
use crate::types::UnaryOp;

/// Names of the outputs that [`AdamW::step`] and [`AdamW::update`] add to a graph, `[1]` unless said otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StepOutputs;

impl StepOutputs {
    /// Learning rate of the step.
    pub const LEARNING_RATE: &'static str = "learning_rate";
    /// Global norm of the gradients before clipping; not finite when the step was skipped.
    pub const GRADIENT_NORM: &'static str = "gradient_norm";
    /// Loss scale of the step; 1 without loss scaling.
    pub const LOSS_SCALE: &'static str = "loss_scale";
    /// Steps skipped so far because a gradient was not finite.
    pub const SKIPPED: &'static str = "skipped";
    /// Of [`AdamW::update`] alone, `[metrics]`: means of the metrics over the micro-batches.
    pub const METRICS: &'static str = "metrics";
    /// Of [`AdamW::update`] alone: the sum of the weights of the micro-batches.
    pub const WEIGHT: &'static str = "weight";
}

/// AdamW with decoupled weight decay (Loshchilov & Hutter, arXiv:1711.05101), bias-corrected.
///
/// A step whose gradients are not all finite changes no parameter, moment or counter but the number of skipped steps (and the
/// loss scale, if there is one).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub schedule: Schedule,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Gradients are scaled down to this global norm.
    pub clip: Option<f32>,
    /// For f16 gradients.
    pub loss_scale: Option<LossScale>,
}

impl Default for AdamW {
    fn default() -> Self {
        Self {
            schedule: Schedule::Constant { rate: 3e-4 },
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            clip: None,
            loss_scale: None,
        }
    }
}

impl AdamW {
    fn check(&self) -> Result<()> {
        let fail = |field: &'static str, reason: &str| {
            Err(Error::Config {
                field,
                reason: reason.to_owned(),
            })
        };
        let decay = |x: f32| (0.0..1.0).contains(&x);
        if !decay(self.beta1) || !decay(self.beta2) {
            return fail("betas", "must be in [0, 1)");
        }
        if !self.eps.is_finite() || self.eps <= 0.0 {
            return fail("eps", "must be positive");
        }
        if !self.weight_decay.is_finite() || self.weight_decay < 0.0 {
            return fail("weight_decay", "must not be negative");
        }
        if self
            .clip
            .is_some_and(|clip| !clip.is_finite() || clip <= 0.0)
        {
            return fail("clip", "must be positive");
        }
        if let Some(scale) = &self.loss_scale {
            scale.check()?;
        }
        self.schedule.check()
    }

    /// Adds everything that turns `loss` `[1]` into an update of `parameters`, and the outputs named in [`StepOutputs`].
    ///
    /// Counters are states named `train.*`. Works once a graph.
    ///
    /// # Errors
    /// [`Error::Config`] for values out of range, [`Error::Graph`] when the loss has no gradient, no parameter is given or the
    /// graph has a step already.
    pub fn step(&self, graph: &mut Graph, loss: ValueId, parameters: &[ValueId]) -> Result<()> {
        let scale = self.begin(graph, parameters)?;
        let gradients = graph.gradients_from(loss, scale, parameters)?;
        self.finish(graph, parameters, &gradients, [scale, scale])
    }

    /// What every graph with a part of a step begins with: the loss scale.
    pub(super) fn begin(&self, graph: &mut Graph, parameters: &[ValueId]) -> Result<ValueId> {
        self.check()?;
        if parameters.is_empty() {
            return Err(Error::Graph("there is no parameter to train".into()));
        }
        if graph.find("train.step").is_some() {
            return Err(Error::Graph(
                "this graph has an optimizer step already; put parameter groups into one step"
                    .into(),
            ));
        }
        match &self.loss_scale {
            Some(options) => graph.state("train.loss_scale", &[1], options.start),
            None => graph.constant(&[1], 1.0),
        }
    }

    /// The update of `parameters` from gradients that are `divisor` times too large.
    pub(super) fn finish(
        &self,
        graph: &mut Graph,
        parameters: &[ValueId],
        gradients: &[ValueId],
        [scale, divisor]: [ValueId; 2],
    ) -> Result<()> {
        let scaled_norm = graph.global_norm(gradients)?;
        let norm = graph.div(scaled_norm, divisor)?;
        let apply = graph.unary(UnaryOp::IsFinite, scaled_norm)?;
        let factor = self.factor(graph, norm, divisor)?;

        let step = graph.state("train.step", &[1], 0.0)?;
        let next = graph.add(step, apply)?;
        // The number of this step; a skipped one does not count, so the next has the same number.
        let t = graph.affine(step, 1.0, 1.0)?;
        let rate = self.schedule.nodes(graph, t)?;
        let corrections = [
            self.correction(graph, "train.correction1", self.beta1, apply)?,
            self.correction(graph, "train.correction2", self.beta2, apply)?,
        ];
        let skipped = graph.state("train.skipped", &[1], 0.0)?;
        let missed = graph.affine(apply, -1.0, 1.0)?;
        let missed = graph.add(skipped, missed)?;
        let hyper = graph.stack(&[rate, corrections[0], corrections[1], factor, apply])?;
        // A plain copy, so that what is read back is the scale of this step.
        let used_scale = graph.affine(scale, 1.0, 0.0)?;

        if let Some(options) = &self.loss_scale {
            options.update(graph, scale, apply)?;
        }
        graph.assign(step, next)?;
        graph.assign(skipped, missed)?;
        let op = Op::AdamW {
            params: parameters.to_vec(),
            beta1: self.beta1,
            beta2: self.beta2,
            eps: self.eps,
            weight_decay: self.weight_decay,
        };
        graph.apply(op, &[gradients, &[hyper]].concat())?;

        graph.output(StepOutputs::LEARNING_RATE, rate)?;
        graph.output(StepOutputs::GRADIENT_NORM, norm)?;
        graph.output(StepOutputs::LOSS_SCALE, used_scale)?;
        graph.output(StepOutputs::SKIPPED, missed)
    }

    /// What gradients are multiplied by: min(1, clip / norm) / divisor.
    fn factor(&self, graph: &mut Graph, norm: ValueId, divisor: ValueId) -> Result<ValueId> {
        let unscale = graph.unary(UnaryOp::Recip, divisor)?;
        let Some(clip) = self.clip else {
            return Ok(unscale);
        };
        let (min, max) = (1e-12, f32::MAX);
        let norm = graph.unary(UnaryOp::Clamp { min, max }, norm)?;
        let ratio = graph.unary(UnaryOp::Recip, norm)?;
        let ratio = graph.affine(ratio, clip, 0.0)?;
        let ratio = graph.unary(UnaryOp::Clamp { min: 0.0, max: 1.0 }, ratio)?;
        graph.mul(ratio, unscale)
    }

    /// 1 − βᵗ as c ← β·c + (1 − β), which unlike a power in f32 is exact to rounding also for small t.
    fn correction(
        &self,
        graph: &mut Graph,
        name: &str,
        beta: f32,
        apply: ValueId,
    ) -> Result<ValueId> {
        let state = graph.state(name, &[1], 0.0)?;
        let next = graph.affine(state, beta, 1.0 - beta)?;
        let change = graph.sub(next, state)?;
        let change = graph.mul(change, apply)?;
        let kept = graph.add(state, change)?;
        graph.assign(state, kept)?;
        Ok(next)
    }
}
