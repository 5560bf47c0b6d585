//! Steps over several micro-batches: one graph adds up gradients, another updates from their weighted mean.
//!
//! The accumulated gradients are Σ weight·scale·∂loss, so the update divides by scale·Σ weight. The weight multiplies the f32
//! gradient, not the loss. So f16 gradients are as large as in a step without micro-batches, and a loss whose count is the weight
//! can still be computed together with its gradient. Only the update changes the loss scale, so that all gradients of a step have
//! the same scale.

use std::collections::HashSet;

use super::optimizer::{LOSS_SCALE, reached, whole};
use super::{AdamW, StepOutputs};
use crate::error::{Error, Result};
use crate::graph::{Graph, Op, Source, Value, ValueId};
use crate::runtime::Session;
use crate::types::{BinaryOp, Broadcast, UnaryOp};

/// The state with Σ weight since the last update.
const WEIGHT: &str = "accumulated_weight";
/// The state with Σ weight·metric since the last update.
const METRICS: &str = "accumulated_metrics";

impl AdamW {
    /// Adds the gradients of `loss` `[1]`, times `weight` `[1]`, to those that the session accumulates for [`AdamW::update`], which
    /// takes the weighted mean. The weight, at least 0, is what the loss is a mean over: the number of counted targets, or the
    /// number of samples (1 serves where all micro-batches have the same number). Then several micro-batches give the gradient of a
    /// single large batch up to rounding.
    ///
    /// `metrics`, each `[1]`, are averaged with the same weights. A graph accumulates once.
    ///
    /// # Errors
    /// As [`AdamW::step`]; [`Error::Shape`] for a weight or metric that is not an f32 `[1]`.
    pub fn accumulate(
        &self,
        graph: &mut Graph,
        loss: ValueId,
        weight: ValueId,
        parameters: &[ValueId],
        metrics: &[ValueId],
    ) -> Result<()> {
        whole(graph, |graph| {
            if graph.find(&self.state(WEIGHT)).is_some() {
                return Err(Error::Graph(
                    "this graph accumulates gradients already; add the losses up and accumulate once".into(),
                ));
            }
            let scale = self.begin(graph, parameters)?;
            let (params, gradients) = reached(graph, [loss, scale], parameters)?;
            let operands = [gradients.as_slice(), &[weight]].concat();
            graph.apply(Op::Accumulate { params }, &operands)?;
            let total = graph.state(&self.state(WEIGHT), &[1], 0.0)?;
            let next = graph.add(total, weight)?;
            graph.assign(total, next)?;
            if !metrics.is_empty() {
                let total = graph.state(&self.state(METRICS), &[metrics.len()], 0.0)?;
                let values = graph.stack(metrics)?;
                let values = graph.mul_scalar(values, weight)?;
                let next = graph.add(total, values)?;
                graph.assign(total, next)?;
            }
            Ok(())
        })
    }

    /// The graph of the update: it takes the gradients that the graphs `accumulations`, to which [`AdamW::accumulate`] was added,
    /// have added up in this session since the last update. It has the outputs named in [`StepOutputs`], with the means of the
    /// metrics if there are any. What was accumulated is zero afterwards. If any micro-batch had a gradient that was not finite,
    /// the whole step is skipped.
    ///
    /// The update changes the parameters that the loss of at least one of the graphs depends on.
    ///
    /// # Errors
    /// [`Error::Config`] for values out of range, a loss scale that is not that of the accumulation, and groups that do not fit
    /// the graphs; [`Error::Graph`] when a graph accumulates nothing, or the graphs disagree about a parameter or the number of
    /// metrics.
    pub fn update(&self, accumulations: &[&Graph]) -> Result<Graph> {
        let mut graph = Graph::new();
        let mut params = Vec::new();
        let mut metrics = None;
        for accumulation in accumulations {
            let accumulated: HashSet<ValueId> = accumulation
                .nodes()
                .iter()
                .filter(|node| matches!(node.op, Op::Accumulate { .. }))
                .flat_map(|node| node.op.accumulated().iter().copied())
                .collect();
            if accumulated.is_empty() {
                return Err(Error::Graph(
                    "a graph accumulates no gradients; call AdamW::accumulate on it before AdamW::update".into(),
                ));
            }
            self.check_scale(accumulation)?;
            // All of them, so that the parameters lie in the same order whichever graph is compiled first.
            for (id, value) in accumulation.parameters() {
                let parameter = declare(&mut graph, value)?;
                if accumulated.contains(&id) && !params.contains(&parameter) {
                    params.push(parameter);
                }
            }
            let state = accumulation.find(&self.state(METRICS));
            let count = match state {
                Some(state) => accumulation.value(state)?.shape.len(),
                None => 0,
            };
            if *metrics.get_or_insert(count) != count {
                return Err(Error::Graph(
                    "the graphs that accumulate have different numbers of metrics".into(),
                ));
            }
        }
        let scale = self.begin(&mut graph, &params)?;
        let taken = Op::TakeAccumulated {
            params: params.clone(),
        };
        let gradients = graph.apply(taken, &[])?;
        let total = graph.state(&self.state(WEIGHT), &[1], 0.0)?;
        // Without any weight the gradients are zero, as those of a batch where nothing counts.
        let (min, max) = (1e-12, f32::MAX);
        let weight = graph.unary(UnaryOp::Clamp { min, max }, total)?;
        let divisor = graph.mul(weight, scale)?;
        let metrics = metrics.unwrap_or(0);
        if metrics > 0 {
            let sums = graph.state(&self.state(METRICS), &[metrics], 0.0)?;
            let inverse = graph.unary(UnaryOp::Recip, weight)?;
            let means = graph.mul_scalar(sums, inverse)?;
            graph.output(StepOutputs::METRICS, means)?;
            reset(&mut graph, sums)?;
        }
        // A plain copy, since the state is zero when results are read back.
        let all = graph.affine(total, 1.0, 0.0)?;
        graph.output(StepOutputs::WEIGHT, all)?;
        reset(&mut graph, total)?;
        self.finish(&mut graph, &params, &gradients, [scale, divisor])?;
        Ok(graph)
    }

    /// Gradients are as large as the scale that they were accumulated with.
    fn check_scale(&self, accumulation: &Graph) -> Result<()> {
        let start = match accumulation.find(&self.state(LOSS_SCALE)) {
            Some(state) => match accumulation.value(state)?.source {
                Source::State(start) => Some(start),
                _ => None,
            },
            None => None,
        };
        if start == self.loss_scale.map(|options| options.start) {
            return Ok(());
        }
        Err(Error::Config {
            field: "loss_scale",
            reason: "is not that of the accumulation; use the same options for both".into(),
        })
    }
}

/// Declares the parameter of another graph, unless it is declared already.
fn declare(graph: &mut Graph, value: &Value) -> Result<ValueId> {
    if let Some(known) = graph.find(&value.name) {
        let other = graph.value(known)?;
        if other.shape == value.shape && other.taps == value.taps {
            return Ok(known);
        }
        return Err(Error::Graph(format!(
            "parameter {:?} has shape {} in one graph that accumulates, but {} in another",
            value.name, other.shape, value.shape
        )));
    }
    let Source::Parameter(init) = value.source else {
        return Err(Error::Graph(format!("{:?} is no parameter", value.name)));
    };
    match value.taps {
        Some(taps) => {
            let (out, channels) = (value.shape.rows(), value.shape.cols() / taps);
            graph.conv_parameter(&value.name, [out, channels, taps], init)
        }
        None => graph.parameter(&value.name, value.shape.dims(), init),
    }
}

fn reset(graph: &mut Graph, state: ValueId) -> Result<()> {
    // Zero also where the state is NaN.
    let zero = graph.binary(BinaryOp::Greater, Broadcast::Same, state, state)?;
    graph.assign(state, zero)
}

/// The states of all trainings of a session that end with one of `kinds`.
fn states(session: &Session, kinds: &[&str]) -> Vec<String> {
    let all = session.states().into_keys();
    let of_kind = |name: &&str| {
        let kind = name.rsplit_once('.').map(|(_, kind)| kind);
        kind.is_some_and(|kind| kinds.contains(&kind))
    };
    all.filter(of_kind).map(str::to_owned).collect()
}

/// A state that shows that gradients are accumulated, if there are any.
pub(super) fn pending(session: &Session) -> Result<Option<String>> {
    for name in states(session, &[WEIGHT]) {
        if session.get(&name)?.iter().any(|&x| x != 0.0) {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// Discards what was accumulated, after a step that could not be finished.
pub(crate) fn discard(session: &Session) -> Result<()> {
    session.clear_accumulated()?;
    for name in states(session, &[WEIGHT, METRICS]) {
        session.clear_state(&name)?;
    }
    Ok(())
}
