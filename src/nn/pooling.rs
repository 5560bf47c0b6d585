//! One vector per sample from the vectors of its time steps.

use super::{uniform, weight_like};
use crate::error::{Error, Result};
use crate::graph::{Graph, Op, ValueId};
use crate::types::{BinaryOp, Broadcast, DType, Trans, UnaryOp, Window};

/// Weighted mean of the time steps, with a learned score per step:
/// y = Σ_t w_t·x_t with w = softmax over the counted steps of x·weightᵀ.
///
/// A sample of which no step counts becomes zero.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct AttentionPooling {
    /// [1, C]
    pub weight: ValueId,
}

impl AttentionPooling {
    /// Declares `NAME.weight` [1, width], uniform in ±1/√width. A bias would add the same number to all scores, which softmax takes out
    /// again, so there is none.
    ///
    /// # Errors
    /// [`Error::Graph`] for a taken name, [`Error::Shape`] for a width of zero.
    pub fn new(graph: &mut Graph, name: &str, width: usize) -> Result<Self> {
        graph.declaring("AttentionPooling", name, |graph| {
            let name = format!("{name}.weight");
            let weight = graph.parameter(&name, &[1, width], uniform(width))?;
            Ok(Self { weight })
        })
    }

    /// x [B, L, C], mask [B·L] of zeros and ones → [B, C] like x. Scores and weights are f32.
    ///
    /// x must be finite at all steps, also at those that do not count.
    ///
    /// # Errors
    /// [`Error::Shape`] when the operands do not fit.
    pub fn forward(&self, graph: &mut Graph, x: ValueId, mask: ValueId) -> Result<ValueId> {
        graph.scoped_like(self.weight, |graph| {
            let [batch, time, _] = samples("attention_pooling", graph, x)?;
            let weight = weight_like(graph, self.weight, x)?;
            let scores = graph.matmul_as(x, weight, Trans::NT, DType::F32)?;
            let scores = graph.reshape(scores, &[batch, time])?;
            let mask = graph.cast(mask, DType::F32)?;
            // Far below every score, and finite, since a row of −∞ has no softmax.
            let outside = graph.affine(mask, OUTSIDE, -OUTSIDE)?;
            let outside = graph.reshape(outside, &[batch, time])?;
            let scores = graph.add(scores, outside)?;
            let weights = graph.softmax(scores)?;
            let weights = graph.reshape(weights, &[batch * time])?;
            // For samples of which nothing counts, whose weights are equal otherwise.
            let weights = graph.mul(weights, mask)?;
            let x = graph.mul_rows(x, weights)?;
            Ok(graph.apply(Op::SumGroups { period: time }, &[x])?[0])
        })
    }
}

/// Subtracted from the scores of steps that do not count.
const OUTSIDE: f32 = 1e30;

/// The first time step of each sample: x [B, L, C] → [B, C] like x. That of a text is the token `[CLS]`.
///
/// NaN where x is NaN or infinite at any step, like a mean with a mask.
///
/// # Errors
/// [`Error::Shape`] when x is no [B, L, C].
pub fn first_step(graph: &mut Graph, x: ValueId) -> Result<ValueId> {
    let [batch, time, _] = samples("first_step", graph, x)?;
    // Of the windows of two ones each, only that of the first step reaches outside of the sample.
    let ones = graph.constant(&[batch, time, 1], 1.0)?;
    let taps = graph.constant(&[1, 2], 1.0)?;
    let counts = graph.conv1d(ones, taps, Window::causal(time, 2, 1)?)?;
    let first = graph.affine(counts, -1.0, 2.0)?;
    let first = graph.reshape(first, &[batch * time])?;
    graph.masked_mean(x, first)
}

/// Smallest norm that [`normalize`] divides by, that of PyTorch's `F.normalize`.
const SMALLEST_NORM: f32 = 1e-12;

/// Every row divided by its norm: y = x / max(‖x‖, 1e-12). x [.., C] in f32 → like x. Where the norm is below the bound it is constant for
/// the gradient, so that rows of zeros have a finite one.
///
/// # Errors
/// [`Error::Shape`] when x is no f32.
pub fn normalize(graph: &mut Graph, x: ValueId) -> Result<ValueId> {
    let value = graph.value(x)?;
    if value.dtype != DType::F32 {
        let reason = format!("x must be f32, not {}: cast it (Graph::cast)", value.dtype);
        return Err(Error::shape("normalize", &[&value.shape], reason));
    }
    let rows = value.shape.rows();
    let squares = graph.unary(UnaryOp::Square, x)?;
    let sum = graph.sum_cols(squares)?;
    let least = graph.constant(&[rows], SMALLEST_NORM * SMALLEST_NORM)?;
    let sum = graph.binary(BinaryOp::Max, Broadcast::Same, sum, least)?;
    let scale = graph.unary(UnaryOp::Rsqrt, sum)?;
    graph.mul_rows(x, scale)
}

/// The extents of x [B, L, C].
fn samples(op: &'static str, graph: &Graph, x: ValueId) -> Result<[usize; 3]> {
    let shape = &graph.value(x)?.shape;
    match *shape.dims() {
        [batch, time, columns] => Ok([batch, time, columns]),
        _ => Err(Error::shape(op, &[shape], "x must be [B, L, C]")),
    }
}
