//! Runs a graph node by node.

use std::collections::{HashMap, HashSet};

use super::array::Array;
use super::attention::{self, Heads};
use super::optimizer::{Constants, Hyper};
use super::{
    conv, dropout, elementwise, embedding, gemm, layer_norm, loss, precision, reduce, softmax,
};
use crate::error::{Error, Result};
use crate::graph::{Graph, Init, Op, Source, Value, ValueId};
use crate::types::{DType, Shape};

/// Parameters, states and optimizer moments by name, and the means to run graphs on them.
///
/// One interpreter may run several graphs that share names, as a training and an evaluation graph do.
#[derive(Clone, Debug, Default)]
pub struct Interpreter {
    variables: HashMap<String, Array>,
}

impl Interpreter {
    /// States and [`Init::Constant`] parameters of `graph` at their start values.
    /// [`Init::Uniform`] parameters have no value until [`Interpreter::set`] gives them one.
    #[must_use]
    pub fn new(graph: &Graph) -> Self {
        let variables = graph.values().filter_map(|(_, value)| {
            let start = match value.source {
                Source::State(start) | Source::Parameter(Init::Constant(start)) => start,
                _ => return None,
            };
            let array = Array::splat(value.shape.clone(), f64::from(start));
            Some((value.name.clone(), array))
        });
        Self {
            variables: variables.collect(),
        }
    }

    /// Gives a parameter or state a value. AdamW keeps the moments of parameter `NAME` as `NAME.adamw.m` and
    /// `NAME.adamw.v`, its bias corrections as `NAME.adamw.c`, and what is accumulated for it as `NAME.accumulated`; they may be set, too, and are zero where absent.
    ///
    /// Names and shapes are checked against the graph when it runs; names it does not use are ignored.
    pub fn set(&mut self, name: impl Into<String>, array: Array) {
        self.variables.insert(name.into(), array);
    }

    /// The present value of a parameter, state or moment.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Array> {
        self.variables.get(name)
    }

    /// All variables by name.
    #[must_use]
    pub fn variables(&self) -> &HashMap<String, Array> {
        &self.variables
    }

    /// Runs `graph` once and returns its named outputs. An output that is a parameter or state has its value after the run; one that was
    /// declared before an update became a copy when the update was declared.
    ///
    /// # Errors
    /// [`Error::Data`] names an input that is missing though a result depends on it, unknown, given twice, of the wrong shape or not a
    /// valid index, or a variable that has no value or the wrong shape; [`Error::Shape`] reports an index outside of its table.
    /// A failed run leaves all variables as they were.
    pub fn run(
        &mut self,
        graph: &Graph,
        inputs: &[(&str, Array)],
    ) -> Result<HashMap<String, Array>> {
        let values = self.compute(graph, inputs, &graph.wanted())?;
        let outputs = graph.outputs().iter().map(|(name, id)| {
            let array = lookup(&values, *id)?;
            Ok((name.clone(), array.clone()))
        });
        outputs.collect()
    }

    /// As [`Interpreter::run`], but returns every value of the graph, so that no input may be left out.
    ///
    /// # Errors
    /// As [`Interpreter::run`].
    pub fn run_values(
        &mut self,
        graph: &Graph,
        inputs: &[(&str, Array)],
    ) -> Result<HashMap<ValueId, Array>> {
        self.compute(graph, inputs, &vec![true; graph.values().len()])
    }

    /// Every value that does not depend on an input that was left out. Inputs in `wanted` must be there.
    fn compute(
        &mut self,
        graph: &Graph,
        inputs: &[(&str, Array)],
        wanted: &[bool],
    ) -> Result<HashMap<ValueId, Array>> {
        let mut values = self.load(graph, inputs, wanted)?;
        // Moments and accumulated gradients are collected apart, so that an error further on leaves the variables untouched.
        let mut moments = HashMap::new();
        for node in graph.nodes() {
            match (&node.op, node.inputs.as_slice()) {
                (Op::AdamW { .. }, operands) => {
                    self.adamw(graph, &node.op, operands, &mut values, &mut moments)?;
                }
                (Op::Accumulate { params }, operands) => {
                    self.accumulate(graph, params, operands, &values, &mut moments)?;
                }
                (Op::TakeAccumulated { params }, []) => {
                    for (&id, &param) in node.outputs.iter().zip(params) {
                        let value = graph.value(param)?;
                        let (name, sum) = self.accumulated(value)?;
                        let zero = Array::splat(value.shape.clone(), 0.0);
                        values.insert(id, sum);
                        moments.insert(name, zero);
                    }
                }
                (Op::Assign { state }, &[value]) => {
                    let data = lookup(&values, value)?.data().to_vec();
                    let shape = graph.value(*state)?.shape.clone();
                    values.insert(*state, Array::with_shape(shape, data)?);
                }
                // It reads an input that was left out, and no result depends on it.
                (_, operands) if operands.iter().any(|id| !values.contains_key(id)) => {}
                (op, operands) => {
                    let operands = operands.iter().map(|&id| lookup(&values, id));
                    let results = evaluate(op, &operands.collect::<Result<Vec<_>>>()?)?;
                    for (&id, data) in node.outputs.iter().zip(results) {
                        values.insert(id, stored(graph.value(id)?, data)?);
                    }
                }
            }
        }
        for (id, value) in graph.values() {
            if matches!(value.source, Source::Parameter(_) | Source::State(_)) {
                let array = lookup(&values, id)?.clone();
                self.variables.insert(value.name.clone(), array);
            }
        }
        self.variables.extend(moments);
        Ok(values)
    }

    /// The values that no node computes.
    fn load(
        &self,
        graph: &Graph,
        inputs: &[(&str, Array)],
        wanted: &[bool],
    ) -> Result<HashMap<ValueId, Array>> {
        let mut given = HashMap::new();
        for (name, array) in inputs {
            if given.insert(*name, array).is_some() {
                return Err(data_error(name, "given twice"));
            }
        }
        let mut values = HashMap::new();
        let mut known = HashSet::new();
        for (id, value) in graph.values() {
            let name = value.name.as_str();
            let array = match value.source {
                Source::Input { below } => {
                    known.insert(name);
                    let Some(array) = given.get(name) else {
                        if !wanted[id.index()] {
                            continue;
                        }
                        let (shape, dtype) = (&value.shape, value.dtype);
                        let reason = format!("input {name:?} is not given: {name} {shape} {dtype}");
                        return Err(data_error(name, &reason));
                    };
                    check_shape(value, array)?;
                    check_indices(value, below, array)?;
                    stored(value, array.data().to_vec())?
                }
                Source::Parameter(_) | Source::State(_) => {
                    let array = self
                        .variables
                        .get(name)
                        .ok_or_else(|| data_error(name, "this parameter has no value yet"))?;
                    check_shape(value, array)?;
                    array.clone()
                }
                Source::Constant(number) => {
                    stored(value, vec![f64::from(number); value.shape.len()])?
                }
                Source::Node { .. } => continue,
            };
            values.insert(id, array);
        }
        match given.keys().find(|name| !known.contains(*name)) {
            Some(name) => {
                let inputs = graph.values();
                let inputs = inputs.filter(|(_, v)| matches!(v.source, Source::Input { .. }));
                let inputs: Vec<String> = inputs
                    .map(|(_, v)| format!("{} {} {}", v.name, v.shape, v.dtype))
                    .collect();
                let known = inputs.join(", ");
                let reason = format!("unknown input {name:?}; inputs are: {known}");
                Err(data_error(name, &reason))
            }
            None => Ok(values),
        }
    }

    /// What was accumulated for a parameter in earlier runs, and the name that it has as a variable.
    fn accumulated(&self, parameter: &Value) -> Result<(String, Array)> {
        let name = format!("{}.accumulated", parameter.name);
        let sum = match self.variables.get(&name) {
            Some(array) => {
                check_shape(parameter, array)?;
                array.clone()
            }
            None => Array::splat(parameter.shape.clone(), 0.0),
        };
        Ok((name, sum))
    }

    /// [`Op::Accumulate`].
    fn accumulate(
        &self,
        graph: &Graph,
        params: &[ValueId],
        operands: &[ValueId],
        values: &HashMap<ValueId, Array>,
        sums: &mut HashMap<String, Array>,
    ) -> Result<()> {
        let Some((&weight, gradients)) = operands.split_last() else {
            return Err(Error::Graph("accumulate has no weight".into()));
        };
        let weight = lookup(values, weight)?.data()[0];
        for (&param, &gradient) in params.iter().zip(gradients) {
            let (name, mut sum) = self.accumulated(graph.value(param)?)?;
            let gradient = lookup(values, gradient)?.data();
            for (sum, gradient) in sum.data_mut().iter_mut().zip(gradient) {
                *sum += weight * gradient;
            }
            sums.insert(name, sum);
        }
        Ok(())
    }

    /// [`Op::AdamW`]: updates its parameters in `values`, and their moments.
    fn adamw(
        &self,
        graph: &Graph,
        op: &Op,
        operands: &[ValueId],
        values: &mut HashMap<ValueId, Array>,
        moments: &mut HashMap<String, Array>,
    ) -> Result<()> {
        let (
            Op::AdamW {
                params,
                beta1,
                beta2,
                eps,
                rates,
            },
            Some((&hyper, gradients)),
        ) = (op, operands.split_last())
        else {
            return Err(operand_error(op));
        };
        let &[lr, scale, apply] = lookup(values, hyper)?.data() else {
            return Err(operand_error(op));
        };
        if apply == 0.0 {
            return Ok(());
        }
        let hyper = Hyper { lr, scale };
        for ((&param, &gradient), &rates) in params.iter().zip(gradients).zip(rates) {
            let constants = Constants {
                beta1: *beta1,
                beta2: *beta2,
                eps: *eps,
                rates,
            };
            let value = graph.value(param)?;
            let [m_name, v_name, c_name] =
                ["m", "v", "c"].map(|kind| format!("{}.adamw.{kind}", value.name));
            let two = Shape::vector(2);
            let kept =
                |name: &String, shape: &Shape| match moments.get(name).or(self.variables.get(name))
                {
                    Some(array) if array.shape() != shape => Err(shape_error(name, array, value)),
                    Some(array) => Ok(array.clone()),
                    None => Ok(Array::splat(shape.clone(), 0.0)),
                };
            let mut m = kept(&m_name, &value.shape)?;
            let mut v = kept(&v_name, &value.shape)?;
            let corrections = kept(&c_name, &two)?;
            let mut c = [corrections.data()[0], corrections.data()[1]];
            let mut p = lookup(values, param)?.clone();
            let gradient = lookup(values, gradient)?.data();
            let [p_data, m_data, v_data] = [&mut p, &mut m, &mut v].map(Array::data_mut);
            constants.step(&hyper, gradient, p_data, m_data, v_data, &mut c);
            values.insert(param, p);
            let c = Array::with_shape(two, c.to_vec())?;
            moments.extend([(m_name, m), (v_name, v), (c_name, c)]);
        }
        Ok(())
    }
}

/// The results of an operation that has no side effect, before they are stored in their element types.
fn evaluate(op: &Op, operands: &[&Array]) -> Result<Vec<Vec<f64>>> {
    let results = match (op, operands) {
        (Op::Unary(f), [x]) => vec![elementwise::unary(*f, x)],
        (Op::Binary(f, broadcast), [a, b]) => vec![elementwise::binary(*f, *broadcast, a, b)],
        (Op::Cast(_) | Op::Reshape, [x]) => vec![x.data().to_vec()],
        (Op::Dropout { rate, stream }, [x, counter]) => {
            vec![dropout::dropout(*rate, *stream, x, counter.data()[0])]
        }
        (Op::MatMul { batch, trans, .. }, [a, b]) => vec![gemm::batch_matmul(*batch, *trans, a, b)],
        (Op::LayerNorm { eps }, [x, gamma, beta]) => {
            let (y, statistics) = layer_norm::layer_norm(x, gamma, beta, *eps);
            vec![y, statistics]
        }
        (Op::LayerNormGrad, [x, gamma, statistics, dy]) => {
            vec![layer_norm::layer_norm_grad(x, gamma, statistics, dy)]
        }
        (Op::LayerNormParamGrad, [x, statistics, dy]) => {
            let (dgamma, dbeta) = layer_norm::layer_norm_param_grad(x, statistics, dy);
            vec![dgamma, dbeta]
        }
        (Op::Im2col(window), [x]) => vec![conv::im2col(*window, x)],
        (Op::Col2im(window), [columns]) => vec![conv::col2im(*window, columns)],
        (Op::Conv { window, .. }, [x, weight]) => vec![conv::conv(*window, x, weight)],
        (Op::ConvGradInput { window, .. }, [dy, weight]) => {
            vec![conv::grad_input(*window, dy, weight)]
        }
        (Op::ConvGradWeight { window, .. }, [x, dy]) => vec![conv::grad_weight(*window, x, dy)],
        (Op::Gather { .. }, [table, ids]) => vec![embedding::gather(table, ids)?],
        (Op::GatherGrad { rows, padding }, [ids, dy]) => {
            vec![embedding::gather_grad(*rows, *padding, ids, dy)?]
        }
        (Op::SumRows, [x]) => vec![reduce::sum_rows(x)],
        (Op::SumCols, [x]) => vec![reduce::sum_cols(x)],
        (Op::RowMax, [x]) => reduce::row_max(x).to_vec(),
        (Op::Softmax { log }, [x]) => vec![softmax::softmax(*log, x)],
        (Op::SoftmaxGrad { log }, [y, dy]) => vec![softmax::softmax_grad(*log, y, dy)],
        (Op::Attention(options), [qkv, mask @ ..]) => {
            let heads = Heads::packed(*options, qkv, mask.first().copied());
            let (y, statistics) = heads.attention();
            vec![y, statistics]
        }
        (Op::AttentionGrad(options), [qkv, _, _, dy, mask @ ..]) => {
            let heads = Heads::packed(*options, qkv, mask.first().copied());
            let [dq, dk, dv] = heads.gradients(dy);
            vec![attention::side_by_side(heads.width(), &[dq, dk, dv])]
        }
        (Op::CrossAttention(options), [q, kv, mask @ ..]) => {
            let heads = Heads::cross(*options, q, kv, mask.first().copied());
            let (y, statistics) = heads.attention();
            vec![y, statistics]
        }
        (Op::CrossAttentionGrad(options), [q, kv, _, _, dy, mask @ ..]) => {
            let heads = Heads::cross(*options, q, kv, mask.first().copied());
            let [dq, dk, dv] = heads.gradients(dy);
            vec![dq, attention::side_by_side(heads.width(), &[dk, dv])]
        }
        (Op::SumAll, [x]) => vec![vec![reduce::sum_all(x)]],
        (Op::SumGroups { period }, [x]) => vec![reduce::sum_groups(*period, x)],
        (Op::SumTiles { period, rows }, [x]) => vec![reduce::sum_tiles(*period, *rows, x)],
        (Op::MaskedMean, [x, mask]) => {
            let &[_, time, _] = x.shape().dims() else {
                return Err(operand_error(op));
            };
            vec![reduce::masked_mean(time, x, mask)]
        }
        (Op::MaskedMeanGrad { time }, [dy, mask]) => {
            vec![reduce::masked_mean_grad(*time, dy, mask)]
        }
        (Op::Stack, scalars) => vec![reduce::stack(scalars)],
        (Op::KdLoss { alpha, beta }, [y, t]) => {
            let kd = loss::kd_loss(*alpha, *beta, y, t);
            vec![vec![kd.loss], vec![kd.cosine], vec![kd.mse], kd.rows]
        }
        (Op::KdLossGrad { alpha, beta }, [y, t, rows, dloss]) => {
            vec![loss::kd_loss_grad(
                *alpha,
                *beta,
                y,
                t,
                rows,
                dloss.data()[0],
            )]
        }
        (Op::CrossEntropy { ignore, smoothing }, [logits, targets]) => {
            let ce = loss::cross_entropy(*ignore, *smoothing, logits, targets)?;
            vec![vec![ce.loss], vec![ce.count], ce.rows]
        }
        (Op::CrossEntropyGrad { ignore, smoothing }, [logits, targets, rows, count, dloss]) => {
            let scale = dloss.data()[0] / count.data()[0].max(1.0);
            vec![loss::cross_entropy_grad(
                *ignore, *smoothing, logits, targets, rows, scale,
            )?]
        }
        (Op::LinearCrossEntropy(layer), [x, weight, targets, bias @ ..]) => {
            let ce = loss::linear_cross_entropy(layer, x, weight, bias.first().copied(), targets)?;
            vec![vec![ce.loss], vec![ce.count], ce.rows]
        }
        (
            Op::LinearCrossEntropyGrad { layer, .. },
            [x, weight, targets, rows, count, dloss, bias @ ..],
        ) => {
            let bias = bias.first().copied();
            let scale = dloss.data()[0] / count.data()[0].max(1.0);
            loss::linear_cross_entropy_grad(layer, x, weight, bias, targets, rows, scale)?
        }
        (Op::GlobalNorm, gradients) => vec![vec![reduce::global_norm(gradients)]],
        // Every variant once more, without a wildcard, so that a new operation does not compile without its twin here.
        (
            Op::Unary(_)
            | Op::Binary(..)
            | Op::Cast(_)
            | Op::Dropout { .. }
            | Op::Reshape
            | Op::MatMul { .. }
            | Op::LayerNorm { .. }
            | Op::LayerNormGrad
            | Op::LayerNormParamGrad
            | Op::Im2col(_)
            | Op::Col2im(_)
            | Op::Conv { .. }
            | Op::ConvGradInput { .. }
            | Op::ConvGradWeight { .. }
            | Op::Gather { .. }
            | Op::GatherGrad { .. }
            | Op::SumRows
            | Op::SumCols
            | Op::RowMax
            | Op::Softmax { .. }
            | Op::SoftmaxGrad { .. }
            | Op::Attention(_)
            | Op::AttentionGrad(_)
            | Op::CrossAttention(_)
            | Op::CrossAttentionGrad(_)
            | Op::SumAll
            | Op::SumGroups { .. }
            | Op::SumTiles { .. }
            | Op::MaskedMean
            | Op::MaskedMeanGrad { .. }
            | Op::KdLoss { .. }
            | Op::KdLossGrad { .. }
            | Op::CrossEntropy { .. }
            | Op::CrossEntropyGrad { .. }
            | Op::LinearCrossEntropy(_)
            | Op::LinearCrossEntropyGrad { .. }
            | Op::AdamW { .. }
            | Op::Accumulate { .. }
            | Op::TakeAccumulated { .. }
            | Op::Assign { .. },
            _,
        ) => return Err(operand_error(op)),
    };
    Ok(results)
}

fn lookup(values: &HashMap<ValueId, Array>, id: ValueId) -> Result<&Array> {
    values
        .get(&id)
        .ok_or_else(|| Error::Graph(format!("{id:?} is read before it is computed")))
}

/// `data` as it reads after being stored as `value`.
fn stored(value: &Value, mut data: Vec<f64>) -> Result<Array> {
    for x in &mut data {
        *x = precision::store(*x, value.dtype);
    }
    Array::with_shape(value.shape.clone(), data)
}

fn check_shape(value: &Value, array: &Array) -> Result<()> {
    if array.shape() == &value.shape {
        return Ok(());
    }
    Err(shape_error(&value.name, array, value))
}

fn check_indices(value: &Value, below: Option<u32>, array: &Array) -> Result<()> {
    if value.dtype != DType::U32 {
        return Ok(());
    }
    let largest = f64::from(below.map_or(u32::MAX, |below| below.saturating_sub(1)));
    for (i, x) in array.data().iter().enumerate() {
        if !(0.0..=largest).contains(x) || x.fract() != 0.0 {
            let reason = format!("element {i} is {x}, not an integer in 0..={largest}");
            return Err(data_error(&value.name, &reason));
        }
    }
    Ok(())
}

fn data_error(name: &str, reason: &str) -> Error {
    Error::Data {
        name: name.to_owned(),
        reason: reason.to_owned(),
    }
}

fn shape_error(name: &str, array: &Array, value: &Value) -> Error {
    let reason = format!("has shape {}, not {}", array.shape(), value.shape);
    data_error(name, &reason)
}

fn operand_error(op: &Op) -> Error {
    Error::Graph(format!("the operands of {op:?} are not those it documents"))
}
