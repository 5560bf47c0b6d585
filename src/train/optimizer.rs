//! From a loss to a training step: gradients, clipping, schedule, AdamW, counters.

use serde::{Deserialize, Serialize};

use super::{LossScale, ParameterGroup, Schedule};
use crate::error::{Error, Result};
use crate::graph::{Graph, Op, ValueId};
use crate::setters::setters;
use crate::types::UnaryOp;

/// The state that counts skipped steps.
pub(crate) const SKIPPED: &str = "skipped";
/// The state with the present loss scale.
pub(super) const LOSS_SCALE: &str = "loss_scale";

/// Names of the outputs that [`AdamW::step`] and [`AdamW::update`] add to a graph. They are `[1]` unless said otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StepOutputs;

impl StepOutputs {
    /// Learning rate of the step, before the factors of parameter groups.
    pub const LEARNING_RATE: &'static str = "learning_rate";
    /// Global norm of the gradients of all groups before clipping; not finite when the step was skipped.
    pub const GRADIENT_NORM: &'static str = "gradient_norm";
    /// Loss scale of the step; 1 without loss scaling.
    pub const LOSS_SCALE: &'static str = "loss_scale";
    /// Number of steps skipped so far because a gradient was not finite.
    pub const SKIPPED: &'static str = "skipped";
    /// Means of the metrics over the micro-batches, `[metrics]`. Only [`AdamW::update`] adds it.
    pub const METRICS: &'static str = "metrics";
    /// Sum of the weights of the micro-batches. Only [`AdamW::update`] adds it.
    pub const WEIGHT: &'static str = "weight";
}

/// AdamW with decoupled weight decay (Loshchilov & Hutter, arXiv:1711.05101) and bias correction.
///
/// The step counter, the loss scale and what else a step counts are states of the session, under names that begin with
/// [`AdamW::name`]. Two trainings in one session have different names, so that each has its own schedule and loss scale. Moments and
/// bias corrections belong to the parameters: the correction of a parameter counts the updates of that parameter, by whichever
/// training, so that a parameter that is trained later than others is corrected as if it had been alone.
///
/// A step whose gradients are not all finite is skipped: it changes the number of skipped steps and the loss scale, but no
/// parameter, moment or step counter.
///
/// A parameter that the loss does not depend on has no gradient. It does not change, and neither do its moments. A row of a
/// token table that no id looked up has the gradient zero, and decays.
///
/// ```
/// use energyflow::train::{AdamW, Schedule};
///
/// let optimizer = AdamW::default()
///     .schedule(Schedule::Constant { rate: 1e-3 })
///     .clip(Some(1.0))
///     .no_decay_for_biases_and_norms();
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct AdamW {
    /// What the names of its states begin with: NAME.step, NAME.skipped, NAME.loss_scale, …; `train` by default.
    pub name: String,
    /// Learning rate of each step.
    pub schedule: Schedule,
    /// Decay rate of the first moment, in [0, 1).
    pub beta1: f32,
    /// Decay rate of the second moment, in [0, 1).
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Upper bound on the global norm of the gradients, which are scaled down to it.
    pub clip: Option<f32>,
    /// Dynamic loss scale, for f16 gradients.
    pub loss_scale: Option<LossScale>,
    /// Parameters with rates of their own; see [`AdamW::group`].
    pub groups: Vec<ParameterGroup>,
}

impl Default for AdamW {
    /// The name `train`, a constant learning rate of 3e-4, betas 0.9 and 0.999, eps 1e-8, weight decay 0.01; no clipping, loss scale or groups.
    fn default() -> Self {
        Self {
            name: "train".into(),
            schedule: Schedule::Constant { rate: 3e-4 },
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            clip: None,
            loss_scale: None,
            groups: Vec::new(),
        }
    }
}

impl AdamW {
    setters! {
        schedule: Schedule,
        beta1: f32,
        beta2: f32,
        eps: f32,
        weight_decay: f32,
        clip: Option<f32>,
        loss_scale: Option<LossScale>,
    }

    /// The optimizer of the training of this name.
    #[must_use]
    pub fn named(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            ..Self::default()
        }
    }

    /// The name of one of its states.
    pub(crate) fn state(&self, what: &str) -> String {
        format!("{}.{what}", self.name)
    }

    fn check(&self) -> Result<()> {
        if self.name.is_empty() {
            return Err(Error::Config {
                field: "name",
                reason: "of an optimizer must not be empty".into(),
            });
        }
        let require = |field: &'static str, value: f32, holds: bool, range: &str| match holds {
            true => Ok(()),
            false => Err(Error::Config {
                field,
                reason: format!("is {value}, but must be {range}"),
            }),
        };
        for (field, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            require(field, beta, (0.0..1.0).contains(&beta), "in [0, 1)")?;
        }
        let positive = |x: f32| x.is_finite() && x > 0.0;
        let (eps, decay) = (self.eps, self.weight_decay);
        require("eps", eps, positive(eps), "finite and > 0")?;
        let sound = decay.is_finite() && decay >= 0.0;
        require("weight_decay", decay, sound, "finite and >= 0")?;
        if let Some(clip) = self.clip {
            require("clip", clip, positive(clip), "finite and > 0")?;
        }
        if let Some(scale) = &self.loss_scale {
            scale.check()?;
        }
        for group in &self.groups {
            group.check()?;
        }
        self.schedule.check()
    }

    /// Adds everything that turns `loss` `[1]` into an update of `parameters`, and the outputs named in [`StepOutputs`].
    ///
    /// The counters are states with names that begin with that of the optimizer. A graph has one step; parameters with rates of their own
    /// are groups of it.
    ///
    /// # Errors
    /// [`Error::Config`] for values out of range and groups that do not fit the graph; [`Error::Graph`] when the loss has no
    /// gradient or depends on none of the parameters, or the graph has a step already. The graph is then as it was before.
    pub fn step(&self, graph: &mut Graph, loss: ValueId, parameters: &[ValueId]) -> Result<()> {
        whole(graph, |graph| {
            let scale = self.begin(graph, parameters)?;
            let (parameters, gradients) = reached(graph, [loss, scale], parameters)?;
            self.finish(graph, &parameters, &gradients, [scale, scale])
        })
    }

    /// What every graph with a part of a step begins with: the loss scale.
    pub(super) fn begin(&self, graph: &mut Graph, parameters: &[ValueId]) -> Result<ValueId> {
        self.check()?;
        let mut outputs = graph.outputs().iter();
        if outputs.any(|(name, _)| name == StepOutputs::LEARNING_RATE) {
            return Err(Error::Graph(
                "this graph has an optimizer step already; put parameter groups into one step (AdamW::group)".into(),
            ));
        }
        if parameters.is_empty() {
            return Err(Error::Graph("there is no parameter to train".into()));
        }
        // Also where only the update needs the rates, so that a mistake shows at once.
        self.rates(graph, parameters)?;
        match &self.loss_scale {
            Some(options) => graph.state(&self.state(LOSS_SCALE), &[1], options.start),
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
        let rates = self.rates(graph, parameters)?;
        let scaled_norm = graph.global_norm(gradients)?;
        let norm = graph.div(scaled_norm, divisor)?;
        let apply = graph.unary(UnaryOp::IsFinite, scaled_norm)?;
        let factor = self.factor(graph, norm, divisor)?;

        let step = graph.state(&self.state("step"), &[1], 0.0)?;
        let next = graph.add(step, apply)?;
        // The number of this step; a skipped one does not count, so the next has the same number.
        let t = graph.affine(step, 1.0, 1.0)?;
        let rate = self.schedule.nodes(graph, t)?;
        let skipped = graph.state(&self.state(SKIPPED), &[1], 0.0)?;
        let missed = graph.affine(apply, -1.0, 1.0)?;
        let missed = graph.add(skipped, missed)?;
        let hyper = graph.stack(&[rate, factor, apply])?;
        // A plain copy, so that what is read back is the scale of this step.
        let used_scale = graph.affine(scale, 1.0, 0.0)?;

        if let Some(options) = &self.loss_scale {
            let good = graph.state(&self.state("good_steps"), &[1], 0.0)?;
            options.update(graph, [scale, good], apply)?;
        }
        graph.assign(step, next)?;
        graph.assign(skipped, missed)?;
        let op = Op::AdamW {
            params: parameters.to_vec(),
            beta1: self.beta1,
            beta2: self.beta2,
            eps: self.eps,
            rates,
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
}

/// Leaves the graph as it was when `build` fails.
pub(super) fn whole<T>(
    graph: &mut Graph,
    build: impl FnOnce(&mut Graph) -> Result<T>,
) -> Result<T> {
    let before = graph.clone();
    build(graph).inspect_err(|_| *graph = before)
}

/// The parameters that `loss` depends on, and their gradients times `scale`.
pub(super) fn reached(
    graph: &mut Graph,
    [loss, scale]: [ValueId; 2],
    parameters: &[ValueId],
) -> Result<(Vec<ValueId>, Vec<ValueId>)> {
    let gradients = graph.reached_gradients(loss, scale, parameters)?;
    let pairs = parameters.iter().zip(gradients);
    let reached = pairs.filter_map(|(&parameter, gradient)| Some((parameter, gradient?)));
    let (parameters, gradients): (Vec<ValueId>, Vec<ValueId>) = reached.unzip();
    match parameters.is_empty() {
        true => Err(Error::Graph(
            "the loss depends on none of the parameters that are to be trained".into(),
        )),
        false => Ok((parameters, gradients)),
    }
}
