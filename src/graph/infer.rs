//! Shape inference: what every operation demands of its operands, and the shapes and element types of its results.

use super::{Graph, LinearCrossEntropy, Op, Source, ValueId};
use crate::error::{Error, Result};
use crate::types::{BinaryOp, Broadcast, DType, Rates, Shape, Trans, UnaryOp, Window};

/// The operands of one operation, with the checks that all operations share.
pub(super) struct Operands<'a> {
    op: &'static str,
    pub shapes: Vec<&'a Shape>,
    pub dtypes: Vec<DType>,
}

impl Operands<'_> {
    pub fn fail<T>(&self, reason: impl Into<String>) -> Result<T> {
        Err(Error::shape(self.op, &self.shapes, reason))
    }

    pub fn require(&self, holds: bool, reason: &str) -> Result<()> {
        if holds { Ok(()) } else { self.fail(reason) }
    }

    /// A result, whose extents may be too large.
    pub fn result(&self, dims: &[usize]) -> Result<Shape> {
        Shape::new(dims).map_err(|error| match error {
            Error::Shape { reason, .. } => {
                Error::shape(self.op, &self.shapes, format!("the result {reason}"))
            }
            other => other,
        })
    }

    pub fn count(&self, n: usize) -> Result<()> {
        if self.shapes.len() == n {
            return Ok(());
        }
        self.fail(format!("takes {n} operands, got {}", self.shapes.len()))
    }

    /// Operand `i` holds u32, all others floats.
    fn indices_at(&self, index: Option<usize>) -> Result<()> {
        for (i, &dtype) in self.dtypes.iter().enumerate() {
            let takes_indices = index == Some(i);
            if (dtype == DType::U32) != takes_indices {
                let instead = if takes_indices { "u32" } else { "f32 or f16" };
                return self.fail(format!("operand {i} must not be {dtype}, but {instead}"));
            }
        }
        Ok(())
    }

    /// No index of operand `i` may reach beyond `rows`, except `ignore`, which is never looked up.
    fn indices_below(
        &self,
        graph: &Graph,
        (i, id): (usize, ValueId),
        rows: usize,
        ignore: Option<u32>,
    ) -> Result<()> {
        let mut source = &graph.value(id)?.source;
        while let Source::Node { node, .. } = source {
            source = &graph.value(graph.nodes()[*node].inputs[0])?.source;
        }
        let Source::Input { below: Some(below) } = *source else {
            return self.fail(format!("operand {i} must be an index input"));
        };
        let rows = rows as u64;
        let fits = u64::from(below) <= rows
            || (u64::from(below) == rows + 1 && ignore.map(u64::from) == Some(rows));
        if fits {
            return Ok(());
        }
        self.fail(format!(
            "indices below {below} reach beyond {rows} rows or classes: declare them with \
             index_input(.., {rows}), or with {} and ignore = Some({rows})",
            rows + 1
        ))
    }

    pub fn is(&self, i: usize, shape: &Shape, what: &str) -> Result<()> {
        if self.shapes[i] == shape {
            return Ok(());
        }
        let got = self.shapes[i];
        self.fail(format!("{what} must have shape {shape}, not {got}"))
    }

    /// `params` are parameters, each named once.
    fn parameters(&self, graph: &Graph, params: &[ValueId]) -> Result<()> {
        for (i, &param) in params.iter().enumerate() {
            let value = graph.value(param)?;
            if !matches!(value.source, Source::Parameter(_)) {
                return self.fail(format!("updates only parameters, not {:?}", value.name));
            }
            let twice = params[..i].contains(&param);
            self.require(!twice, "a parameter occurs twice")?;
        }
        Ok(())
    }

    /// The first operands are a gradient of each parameter.
    fn gradients(&self, graph: &Graph, params: &[ValueId]) -> Result<()> {
        for (i, &param) in params.iter().enumerate() {
            self.is(i, &graph.value(param)?.shape, "a gradient")?;
            self.require(self.dtypes[i] == DType::F32, "gradients must be f32")?;
        }
        Ok(())
    }

    /// No other node of the graph accumulates for one of `params` or takes what was accumulated.
    fn once(&self, graph: &Graph, params: &[ValueId]) -> Result<()> {
        let nodes = graph.nodes().iter();
        let mut others = nodes.flat_map(|node| node.op.accumulated());
        match others.find(|param| params.contains(param)) {
            Some(&param) => self.fail(format!(
                "{:?} is accumulated or taken twice in the same graph",
                graph.value(param)?.name
            )),
            None => Ok(()),
        }
    }
}

impl LinearCrossEntropy {
    /// Operands 0, 1, 2 are x, weight and targets, those from `others` on are the bias or nothing.
    fn check(
        &self,
        graph: &Graph,
        o: &Operands<'_>,
        inputs: &[ValueId],
        others: usize,
    ) -> Result<()> {
        if inputs.len() != others + 1 {
            o.count(others)?;
        }
        let (x, weight) = (o.shapes[0], o.shapes[1]);
        o.require(
            (0.0..1.0).contains(&self.smoothing),
            "smoothing must be in [0, 1)",
        )?;
        o.require(self.logits != DType::U32, "logits are f32 or f16")?;
        o.require(self.chunk_bytes > 0, "a chunk has no bytes")?;
        o.require(
            x.rank() > 1 && weight.rank() == 2 && x.cols() == weight.cols(),
            "x must be [.., D], the weight [V, D]",
        )?;
        o.is(2, &Shape::vector(x.rows()), "targets")?;
        o.indices_below(graph, (2, inputs[2]), weight.rows(), self.ignore)?;
        match inputs.len() > others {
            true => o.is(others, &Shape::vector(weight.rows()), "the bias"),
            false => Ok(()),
        }
    }
}

impl Window {
    /// Number of samples in `rows` rows, at `each` rows per sample.
    fn batch(&self, operands: &Operands<'_>, rows: usize, each: usize) -> Result<usize> {
        operands.require(
            rows.is_multiple_of(each),
            "rows must be a multiple of the time steps of the window",
        )?;
        Ok(rows / each)
    }

    /// Number of channels of an operand whose windows have so many columns.
    fn channels(&self, operands: &Operands<'_>, columns: usize) -> Result<usize> {
        operands.require(
            columns.is_multiple_of(self.kernel),
            "columns must be a multiple of the kernel",
        )?;
        Ok(columns / self.kernel)
    }
}

/// What may be used instead of an operation on operands of the same shape.
fn same_hint(a: &Shape, b: &Shape) -> &'static str {
    match b.dims() {
        [n] if *n == a.cols() => "; for a row vector use add_bias or Broadcast::Cols",
        [n] if *n == a.rows() => "; for one number per row use mul_rows or Broadcast::Rows",
        [1] => "; for a scalar use mul_scalar or Broadcast::Scalar",
        _ => "",
    }
}

/// f16 and f32 meet only in broadcast vectors (bias, mask, scale), normalisations with their parameters, means with their masks, and
/// losses. A product or an elementwise function of two whole operands needs one type.
pub(super) fn check_types(graph: &Graph, op: &Op, inputs: &[ValueId]) -> Result<()> {
    let pair = match op {
        // The gradient of an f16 copy of an f32 value is f32.
        Op::Binary(BinaryOp::UnaryGrad(_), _) => return Ok(()),
        Op::Binary(_, Broadcast::Same | Broadcast::Groups { .. } | Broadcast::Tiles { .. })
        | Op::MatMul { .. }
        | Op::Conv { .. }
        | Op::ConvGradInput { .. }
        | Op::ConvGradWeight { .. } => inputs,
        _ => return Ok(()),
    };
    let &[a, b] = pair else {
        return Ok(());
    };
    let is_constant = |id: ValueId| matches!(graph.values[id.index()].source, Source::Constant(_));
    let (of_a, of_b) = (graph.dtype(a), graph.dtype(b));
    let elementwise = matches!(op, Op::Binary(..));
    if of_a == of_b || (elementwise && (is_constant(a) || is_constant(b))) {
        return Ok(());
    }
    let (a, b) = (graph.shape(a), graph.shape(b));
    let reason = format!(
        "{a} {of_a} and {b} {of_b} have different element types: cast one of them (Graph::cast)"
    );
    Err(Error::shape(op.name(), &[a, b], reason))
}

/// Shapes and element types of the results of `op`.
#[expect(clippy::too_many_lines, reason = "one arm per operation")]
pub(crate) fn infer(graph: &Graph, op: &Op, inputs: &[ValueId]) -> Result<Vec<(Shape, DType)>> {
    for &id in inputs {
        graph.value(id)?;
    }
    let o = Operands {
        op: op.name(),
        shapes: inputs.iter().map(|&id| graph.shape(id)).collect(),
        dtypes: inputs.iter().map(|&id| graph.dtype(id)).collect(),
    };
    let f32 = DType::F32;
    let scalar = Shape::scalar;
    let like = |i: usize| (o.shapes[i].clone(), o.dtypes[i]);
    let gather_id = matches!(op, Op::Gather { .. }).then_some(1);
    let id_operand = match op {
        Op::GatherGrad { .. } => Some(0),
        Op::CrossEntropy { .. } | Op::CrossEntropyGrad { .. } => Some(1),
        Op::LinearCrossEntropy(_) | Op::LinearCrossEntropyGrad { .. } => Some(2),
        _ => gather_id,
    };
    if !matches!(op, Op::Reshape) {
        o.indices_at(id_operand)?;
    }
    Ok(match op {
        Op::Unary(unary) => {
            o.count(1)?;
            if let UnaryOp::Clamp { min, max } = unary {
                o.require(min <= max, "clamp needs min <= max")?;
            }
            vec![like(0)]
        }
        Op::Binary(_, broadcast) => {
            o.count(2)?;
            let (a, b) = (o.shapes[0], o.shapes[1]);
            match broadcast {
                Broadcast::Same if a.rows() != b.rows() || a.cols() != b.cols() => {
                    let hint = same_hint(a, b);
                    return o.fail(format!("{a} and {b} cannot be broadcast{hint}"));
                }
                Broadcast::Same => {}
                Broadcast::Cols => o.is(
                    1,
                    &Shape::vector(a.cols()),
                    "the operand of one element per column",
                )?,
                Broadcast::Rows => o.is(
                    1,
                    &Shape::vector(a.rows()),
                    "the operand of one element per row",
                )?,
                Broadcast::Scalar => o.is(1, &scalar(), "the scalar operand")?,
                Broadcast::Groups { period } => o.require(
                    b.rows().checked_mul(*period) == Some(a.rows()) && a.cols() == b.cols(),
                    "the second operand must have rows/period rows and the same columns",
                )?,
                // In a group of fused nodes every operand that is computed there has the group's rows.
                Broadcast::Tiles { period } => {
                    let computed = matches!(graph.value(inputs[1])?.source, Source::Node { .. });
                    o.require(
                        *period > 0 && a.rows().is_multiple_of(*period),
                        "rows must be a multiple of the period",
                    )?;
                    o.require(
                        b.rank() > 1
                            && a.cols() == b.cols()
                            && (b.rows() == *period || (b.rows() > *period && !computed)),
                        "the second operand must be a matrix of period rows and the same columns",
                    )?;
                }
            }
            vec![like(0)]
        }
        Op::Cast(dtype) => {
            o.count(1)?;
            o.require(*dtype != DType::U32, "indices are given, not computed")?;
            vec![(o.shapes[0].clone(), *dtype)]
        }
        Op::Dropout { rate, .. } => {
            o.count(2)?;
            o.require((0.0..1.0).contains(rate), "the rate must be in [0, 1)")?;
            o.is(1, &scalar(), "the counter")?;
            o.require(o.dtypes[1] == f32, "the counter must be f32")?;
            vec![like(0)]
        }
        Op::Reshape => return o.fail("use Graph::reshape, which carries the new shape"),
        Op::MatMul { batch, trans, out } => {
            o.count(2)?;
            let (a, b) = (o.shapes[0], o.shapes[1]);
            let batched = |shape: &Shape| shape.rank() == 3 && shape.dims()[0] == *batch;
            o.require(
                *batch == 1 || (*batch > 1 && batched(a) && batched(b)),
                "a batch of products needs operands of rank 3 with equal numbers of matrices",
            )?;
            let rows = |shape: &Shape| shape.rows() / batch;
            o.require(*out != DType::U32, "a product is f32 or f16")?;
            let (m, k) = match trans {
                Trans::TN => (a.cols(), rows(a)),
                Trans::NN | Trans::NT => (rows(a), a.cols()),
            };
            let (n, kb) = match trans {
                Trans::NT => (rows(b), b.cols()),
                Trans::NN | Trans::TN => (b.cols(), rows(b)),
            };
            o.require(
                a.rank() > 1 && b.rank() > 1,
                "operands need rank 2 or 3; reshape vectors",
            )?;
            if k != kb {
                let product = match trans {
                    Trans::NN => format!("{a} · {b}"),
                    Trans::NT => format!("{a} · {b}ᵀ"),
                    Trans::TN => format!("{a}ᵀ · {b}"),
                };
                return o.fail(format!("{product}: inner extents {k} and {kb} differ"));
            }
            let shape = match batch {
                1 => o.result(&[m, n])?,
                _ => o.result(&[*batch, m, n])?,
            };
            vec![(shape, *out)]
        }
        Op::LayerNorm { eps } => {
            o.count(3)?;
            let x = o.shapes[0];
            o.require(*eps > 0.0, "eps must be positive")?;
            o.is(1, &Shape::vector(x.cols()), "gamma")?;
            o.is(2, &Shape::vector(x.cols()), "beta")?;
            vec![like(0), (o.result(&[3, x.rows()])?, f32)]
        }
        Op::LayerNormGrad => {
            o.count(4)?;
            let x = o.shapes[0];
            o.is(1, &Shape::vector(x.cols()), "gamma")?;
            o.is(2, &Shape::matrix(3, x.rows()), "the statistics")?;
            o.is(3, x, "dy")?;
            vec![like(0)]
        }
        Op::LayerNormParamGrad => {
            o.count(3)?;
            let x = o.shapes[0];
            o.is(1, &Shape::matrix(3, x.rows()), "the statistics")?;
            o.is(2, x, "dy")?;
            let vector = (Shape::vector(x.cols()), f32);
            vec![vector.clone(), vector]
        }
        Op::Im2col(window) => {
            o.count(1)?;
            let x = o.shapes[0];
            let batch = window.batch(&o, x.rows(), window.time)?;
            let rows = batch.saturating_mul(window.steps);
            let cols = window.kernel.saturating_mul(x.cols());
            vec![(o.result(&[rows, cols])?, o.dtypes[0])]
        }
        Op::Col2im(window) => {
            o.count(1)?;
            let x = o.shapes[0];
            let batch = window.batch(&o, x.rows(), window.steps)?;
            let channels = window.channels(&o, x.cols())?;
            let shape = o.result(&[batch, window.time, channels])?;
            vec![(shape, o.dtypes[0])]
        }
        Op::Conv { window, out } => {
            o.count(2)?;
            let (x, weight) = (o.shapes[0], o.shapes[1]);
            o.require(*out != DType::U32, "a product is f32 or f16")?;
            let batch = window.batch(&o, x.rows(), window.time)?;
            let (taps, channels) = (window.kernel, x.cols());
            if weight.rank() != 2 || taps.checked_mul(channels) != Some(weight.cols()) {
                return o.fail(format!(
                    "the weight must be [H, k·C] with {taps} taps and {channels} channels, not {weight}"
                ));
            }
            let shape = o.result(&[batch, window.steps, weight.rows()])?;
            vec![(shape, *out)]
        }
        Op::ConvGradInput { window, out } => {
            o.count(2)?;
            let (dy, weight) = (o.shapes[0], o.shapes[1]);
            o.require(*out != DType::U32, "a product is f32 or f16")?;
            let batch = window.batch(&o, dy.rows(), window.steps)?;
            o.require(
                weight.rank() == 2 && weight.rows() == dy.cols(),
                "the weight must be [H, k·C], dy [B, L', H]",
            )?;
            let channels = window.channels(&o, weight.cols())?;
            vec![(o.result(&[batch, window.time, channels])?, *out)]
        }
        Op::ConvGradWeight { window, out } => {
            o.count(2)?;
            let (x, dy) = (o.shapes[0], o.shapes[1]);
            o.require(*out != DType::U32, "a product is f32 or f16")?;
            let batch = window.batch(&o, x.rows(), window.time)?;
            o.require(
                x.rank() > 1 && batch.checked_mul(window.steps) == Some(dy.rows()),
                "dy must have the rows of the result",
            )?;
            let cols = window.kernel.saturating_mul(x.cols());
            vec![(o.result(&[dy.cols(), cols])?, *out)]
        }
        Op::Gather { .. } => {
            o.count(2)?;
            o.require(o.shapes[0].rank() == 2, "the table must be [V, C]")?;
            o.require(o.shapes[1].rank() == 1, "ids must be [N]")?;
            o.indices_below(graph, (1, inputs[1]), o.shapes[0].rows(), None)?;
            let shape = o.result(&[o.shapes[1].cols(), o.shapes[0].cols()])?;
            vec![(shape, o.dtypes[0])]
        }
        Op::GatherGrad { rows, .. } => {
            o.count(2)?;
            o.require(*rows > 0, "the table has no rows")?;
            o.is(0, &Shape::vector(o.shapes[1].rows()), "ids")?;
            o.indices_below(graph, (0, inputs[0]), *rows, None)?;
            vec![(o.result(&[*rows, o.shapes[1].cols()])?, f32)]
        }
        Op::SumRows => {
            o.count(1)?;
            vec![(Shape::vector(o.shapes[0].cols()), f32)]
        }
        Op::SumCols => {
            o.count(1)?;
            vec![(Shape::vector(o.shapes[0].rows()), f32)]
        }
        Op::RowMax => {
            o.count(1)?;
            // Columns are counted in f32.
            o.require(o.shapes[0].cols() <= 1 << 24, "has more than 2^24 columns")?;
            let rows = Shape::vector(o.shapes[0].rows());
            vec![(rows.clone(), f32), (rows, f32)]
        }
        Op::Softmax { .. } => {
            o.count(1)?;
            vec![like(0)]
        }
        Op::SoftmaxGrad { .. } => {
            o.count(2)?;
            o.is(1, o.shapes[0], "dy")?;
            vec![like(0)]
        }
        Op::Attention(options) => options.infer_packed(&o, false)?,
        Op::AttentionGrad(options) => options.infer_packed(&o, true)?,
        Op::CrossAttention(options) => options.infer_cross(&o, false)?,
        Op::CrossAttentionGrad(options) => options.infer_cross(&o, true)?,
        Op::SumAll => {
            o.count(1)?;
            vec![(scalar(), f32)]
        }
        Op::SumGroups { period } => {
            o.count(1)?;
            let x = o.shapes[0];
            o.require(
                *period > 0 && x.rows().is_multiple_of(*period),
                "rows must be a multiple of the period",
            )?;
            vec![(Shape::matrix(x.rows() / period, x.cols()), o.dtypes[0])]
        }
        Op::SumTiles { period, rows } => {
            o.count(1)?;
            let x = o.shapes[0];
            o.require(
                *period > 0 && x.rows().is_multiple_of(*period),
                "rows must be a multiple of the period",
            )?;
            o.require(rows >= period, "the result has at least period rows")?;
            vec![(o.result(&[*rows, x.cols()])?, f32)]
        }
        Op::MaskedMean => {
            o.count(2)?;
            let x = o.shapes[0];
            o.require(x.rank() == 3, "x must be [B, L, C]")?;
            o.is(1, &Shape::vector(x.rows()), "the mask")?;
            vec![(Shape::matrix(x.dims()[0], x.cols()), o.dtypes[0])]
        }
        Op::MaskedMeanGrad { time } => {
            o.count(2)?;
            let dy = o.shapes[0];
            let shape = o.result(&[dy.rows(), *time, dy.cols()])?;
            o.is(1, &Shape::vector(shape.rows()), "the mask")?;
            vec![(shape, o.dtypes[0])]
        }
        Op::Stack => {
            o.require(!inputs.is_empty(), "needs an operand")?;
            for i in 0..inputs.len() {
                o.is(i, &scalar(), "every operand")?;
            }
            vec![(Shape::vector(inputs.len()), f32)]
        }
        Op::KdLoss { .. } => {
            o.count(2)?;
            let y = o.shapes[0];
            o.require(y.rank() == 2, "y must be [B, E]")?;
            o.is(1, y, "the target")?;
            let one = (scalar(), f32);
            let rows = (o.result(&[y.rows(), 4])?, f32);
            vec![one.clone(), one.clone(), one, rows]
        }
        Op::KdLossGrad { .. } => {
            o.count(4)?;
            let y = o.shapes[0];
            o.is(1, y, "the target")?;
            o.is(2, &Shape::matrix(y.rows(), 4), "the row statistics")?;
            o.is(3, &scalar(), "dloss")?;
            vec![like(0)]
        }
        Op::CrossEntropy { smoothing, ignore } => {
            o.count(2)?;
            let n = o.shapes[0].rows();
            o.require(
                (0.0..1.0).contains(smoothing),
                "smoothing must be in [0, 1)",
            )?;
            o.is(1, &Shape::vector(n), "targets")?;
            o.indices_below(graph, (1, inputs[1]), o.shapes[0].cols(), *ignore)?;
            let one = (scalar(), f32);
            vec![one.clone(), one, (o.result(&[2, n])?, f32)]
        }
        Op::CrossEntropyGrad { ignore, .. } => {
            o.count(5)?;
            let n = o.shapes[0].rows();
            o.is(1, &Shape::vector(n), "targets")?;
            o.indices_below(graph, (1, inputs[1]), o.shapes[0].cols(), *ignore)?;
            o.is(2, &Shape::matrix(2, n), "the row statistics")?;
            o.is(3, &scalar(), "count")?;
            o.is(4, &scalar(), "dloss")?;
            vec![like(0)]
        }
        Op::LinearCrossEntropy(layer) => {
            layer.check(graph, &o, inputs, 3)?;
            let one = (scalar(), f32);
            let rows = (o.result(&[2, o.shapes[0].rows()])?, f32);
            vec![one.clone(), one, rows]
        }
        Op::LinearCrossEntropyGrad { layer, dx } => {
            layer.check(graph, &o, inputs, 6)?;
            let (x, weight) = (o.shapes[0], o.shapes[1]);
            o.is(3, &Shape::matrix(2, x.rows()), "the row statistics")?;
            o.is(4, &scalar(), "count")?;
            o.is(5, &scalar(), "dloss")?;
            o.require(*dx != DType::U32, "dx is f32 or f16")?;
            let mut results = vec![(x.clone(), *dx), (weight.clone(), f32)];
            if inputs.len() > 6 {
                results.push((Shape::vector(weight.rows()), f32));
            }
            results
        }
        Op::GlobalNorm => {
            o.require(!inputs.is_empty(), "needs an operand")?;
            let floats = o.dtypes.iter().all(|&dtype| dtype == f32);
            o.require(floats, "operands must be f32")?;
            vec![(scalar(), f32)]
        }
        Op::AdamW {
            params, eps, rates, ..
        } => {
            o.count(params.len() + 1)?;
            o.require(
                rates.len() == params.len(),
                "needs rates for each parameter",
            )?;
            let sound = |x: f32| x.is_finite() && x >= 0.0;
            let sound = |rates: &Rates| sound(rates.lr_scale) && sound(rates.weight_decay);
            o.require(rates.iter().all(sound), "rates must be finite and >= 0")?;
            // Else padding becomes 0/0.
            o.require(*eps > 0.0, "eps must be positive")?;
            o.parameters(graph, params)?;
            o.gradients(graph, params)?;
            o.is(params.len(), &Shape::vector(3), "hyper")?;
            Vec::new()
        }
        Op::Accumulate { params } => {
            o.count(params.len() + 1)?;
            o.parameters(graph, params)?;
            o.once(graph, params)?;
            o.gradients(graph, params)?;
            o.is(params.len(), &scalar(), "the weight")?;
            o.require(o.dtypes[params.len()] == f32, "the weight must be f32")?;
            Vec::new()
        }
        Op::TakeAccumulated { params } => {
            o.count(0)?;
            o.parameters(graph, params)?;
            o.once(graph, params)?;
            let shapes = params.iter().map(|&param| graph.shape(param));
            shapes.map(|shape| (shape.clone(), f32)).collect()
        }
        Op::Assign { state } => {
            o.count(1)?;
            let value = graph.value(*state)?;
            if !matches!(value.source, Source::State(_)) {
                return o.fail(format!("assigns only states, not {:?}", value.name));
            }
            o.is(0, &value.shape, "the value")?;
            o.require(o.dtypes[0] == f32, "states are f32")?;
            Vec::new()
        }
    })
}
