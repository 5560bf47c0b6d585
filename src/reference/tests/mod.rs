//! Every operation against numbers worked out by hand or another way, every gradient operation against finite differences.

mod elementwise;
mod gemm;
mod interpreter;
mod layer_norm;
mod loss;
mod optimizer;
mod reduce;

use super::{Array, Interpreter, numeric_gradient};
use crate::error::Result;
use crate::graph::{Graph, Op, Source, Value, ValueId};
use crate::types::{BinaryOp, Broadcast, DType, Shape};

/// An operand of a graph under test.
pub(super) type Operand<'a> = (&'a Array, DType);

/// f32 operands.
pub(super) fn f32s<'a, const N: usize>(arrays: [&'a Array; N]) -> [Operand<'a>; N] {
    arrays.map(|array| (array, DType::F32))
}

pub(super) fn push(
    graph: &mut Graph,
    name: &str,
    dims: &[usize],
    dtype: DType,
    source: Source,
) -> Result<ValueId> {
    Ok(graph.push_value(Value {
        name: name.to_owned(),
        shape: Shape::new(dims)?,
        dtype,
        source,
        taps: None,
    }))
}

pub(super) fn input(
    graph: &mut Graph,
    name: &str,
    dims: &[usize],
    dtype: DType,
) -> Result<ValueId> {
    push(graph, name, dims, dtype, Source::Input { below: None })
}

pub(super) fn node(
    graph: &mut Graph,
    op: Op,
    inputs: &[ValueId],
    results: &[(&[usize], DType)],
) -> Result<Vec<ValueId>> {
    let results = results
        .iter()
        .map(|(dims, dtype)| Ok((Shape::new(dims)?, *dtype)));
    let results = results.collect::<Result<_>>()?;
    Ok(graph.push_node(op, inputs.to_vec(), results))
}

const NAMES: [&str; 6] = ["x0", "x1", "x2", "x3", "x4", "x5"];

/// A graph of one operation, whose operands are inputs.
struct Single<'a> {
    graph: Graph,
    feeds: Vec<(&'static str, Array)>,
    operands: Vec<ValueId>,
    results: Vec<ValueId>,
    dims: &'a [(&'a [usize], DType)],
}

impl<'a> Single<'a> {
    fn new(op: Op, operands: &[Operand], dims: &'a [(&'a [usize], DType)]) -> Result<Self> {
        let mut graph = Graph::new();
        let mut ids = Vec::new();
        let mut feeds = Vec::new();
        for (name, (array, dtype)) in NAMES.into_iter().zip(operands) {
            ids.push(input(&mut graph, name, array.shape().dims(), *dtype)?);
            feeds.push((name, (*array).clone()));
        }
        let results = node(&mut graph, op, &ids, dims)?;
        Ok(Self {
            graph,
            feeds,
            operands: ids,
            results,
            dims,
        })
    }
}

/// The results of one operation.
pub(super) fn apply(
    op: Op,
    operands: &[Operand],
    results: &[(&[usize], DType)],
) -> Result<Vec<Array>> {
    let single = Single::new(op, operands, results)?;
    let mut values = Interpreter::default().run_values(&single.graph, &single.feeds)?;
    Ok(single
        .results
        .iter()
        .filter_map(|id| values.remove(id))
        .collect())
}

/// The first result of one operation, as f32.
pub(super) fn apply_f32<const N: usize>(
    op: Op,
    operands: [&Array; N],
    dims: &[usize],
) -> Result<Array> {
    let mut results = apply(op, &f32s(operands), &[(dims, DType::F32)])?;
    Ok(results.remove(0))
}

/// d(Σ weights ⊙ first result)/d(operand number `operand`), by finite differences.
pub(super) fn numeric(
    op: Op,
    operands: &[Operand],
    results: &[(&[usize], DType)],
    weights: &Array,
    operand: usize,
) -> Result<Array> {
    let mut single = Single::new(op, operands, results)?;
    let (dims, dtype) = single.dims[0];
    let graph = &mut single.graph;
    let w = input(graph, "weights", dims, dtype)?;
    single.feeds.push(("weights", weights.clone()));
    let product = Op::Binary(BinaryOp::Mul, Broadcast::Same);
    let product = node(graph, product, &[single.results[0], w], &[(dims, dtype)])?;
    let sum = node(graph, Op::SumAll, &product, &[(&[1], DType::F32)])?;
    let operand = single.operands[operand];
    numeric_gradient(
        &Interpreter::default(),
        graph,
        &single.feeds,
        sum[0],
        operand,
    )
}

/// Irregular numbers in −1..1, others for another seed.
pub(super) fn noise(dims: &[usize], seed: f64) -> Result<Array> {
    let n: usize = dims.iter().product();
    let data = (0..n).map(|i| (seed + 0.37 * (i * i) as f64 + 0.11 * i as f64).sin());
    Array::new(dims, data.collect())
}

#[track_caller]
pub(super) fn assert_close(actual: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(actual.len(), expected.len());
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        assert!(
            (a - e).abs() <= tolerance * e.abs().max(1.0),
            "element {i}: {a}, expected {e}"
        );
    }
}
