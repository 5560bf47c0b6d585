//! Operations that take several dispatches, or whose kernel takes no program.

use super::parts::Parts;
use super::{At, Lowering};
use crate::compile::Place;
use crate::error::{Error, Result};
use crate::gpu::Layout;
use crate::graph::{Node, Op, Source, ValueId};
use crate::kernels;
use crate::kernels::loss::{CrossEntropyKernel, KdTotal};
use crate::kernels::reduce::{ColumnSums, RowSums};
use crate::types::{DType, Shape};

impl Lowering<'_> {
    /// Operations that take several dispatches or no program; false for all others.
    /// `value`: the loss that is computed with its gradient.
    pub(crate) fn staged(&mut self, node: &Node, value: Option<&Node>) -> Result<bool> {
        let x = node.inputs.as_slice();
        let target = self.target;
        match &node.op {
            Op::Reshape => {
                let (input, output) = (self.layout(x[0])?, self.layout(node.outputs[0])?);
                let from = self.place(x[0])?;
                let kernel = kernels::elementwise::reshape(input, output);
                self.step(kernel, vec![from, Place::Value(node.outputs[0])])?;
            }
            Op::SumRows => {
                let input = self.layout(x[0])?;
                let from = self.place(x[0])?;
                let to = (self.layout(node.outputs[0])?, Place::Value(node.outputs[0]));
                self.sum_rows(input, from, to)?;
            }
            Op::SumCols => {
                let from = (self.layout(x[0])?, self.place(x[0])?);
                let to = (self.layout(node.outputs[0])?, Place::Value(node.outputs[0]));
                self.sum_cols(from, to)?;
            }
            Op::RowMax => {
                let [max, at] = self.layouts(&node.outputs)?;
                let kernel = kernels::reduce::row_max(self.layout(x[0])?, max, at, target);
                let places = [
                    self.place(x[0])?,
                    Place::Value(node.outputs[0]),
                    Place::Value(node.outputs[1]),
                ];
                self.step(kernel, places.to_vec())?;
            }
            Op::SumAll => {
                let from = (self.layout(x[0])?, self.place(x[0])?);
                let to = (self.layout(node.outputs[0])?, Place::Value(node.outputs[0]));
                let sums = Self::vector(from.0.rows(), DType::F32)?;
                let sums = (sums, self.scratch(sums));
                self.sum_cols(from, sums)?;
                self.total(sums, to, false)?;
            }
            Op::SumTiles { period, .. } => self.sum_tiles(node, *period)?,
            Op::AttentionGrad(_) | Op::CrossAttentionGrad(_) => self.attention_grad(node)?,
            Op::LayerNormParamGrad => self.layer_norm_params(node)?,
            Op::GatherGrad { padding, .. } => self.gather_grad(node, *padding)?,
            Op::Stack => {
                let output = self.layout(node.outputs[0])?;
                let layouts: Vec<Layout> =
                    x.iter().map(|&id| self.layout(id)).collect::<Result<_>>()?;
                let places = self.places(x)?;
                let each = kernels::reduce::STACKED;
                for (i, layouts) in layouts.chunks(each).enumerate() {
                    let kernel = kernels::reduce::stack(layouts, i * each, output);
                    let own = &places[i * each..i * each + layouts.len()];
                    self.step(kernel, [own, &[Place::Value(node.outputs[0])]].concat())?;
                }
            }
            Op::KdLoss { alpha, beta } => {
                let [y, t] = self.layouts(x)?;
                let [loss, cosine, mse, rows] = self.layouts(&node.outputs)?;
                let out: Vec<Place> = node.outputs.iter().map(|&id| Place::Value(id)).collect();
                let mut places = self.places(x)?;
                places.push(out[3]);
                self.step(kernels::loss::kd_rows(y, t, rows, target), places)?;
                let total = KdTotal {
                    samples: y.rows(),
                    width: y.cols(),
                    alpha: *alpha,
                    beta: *beta,
                };
                let parts = total.parts(target);
                let (mut from, mut layout) = (out[3], rows);
                if parts > 1 {
                    let sums = Layout::of(&Shape::matrix(parts, 4), DType::F32)?;
                    let place = self.scratch(sums);
                    self.step(total.first(rows, sums, target), vec![from, place])?;
                    (layout, from) = self.summed((sums, place))?;
                }
                let kernel = total.last(layout, parts > 1, [loss, cosine, mse], target);
                self.step(kernel, vec![from, out[0], out[1], out[2]])?;
            }
            Op::CrossEntropy { ignore, smoothing } => {
                let (ignore, smoothing) = (*ignore, *smoothing);
                self.cross_entropy(CrossEntropyKernel { ignore, smoothing }, node)?;
            }
            Op::LinearCrossEntropy(layer) => {
                self.linear_cross_entropy(*layer, Some(node), None)?;
            }
            Op::LinearCrossEntropyGrad { layer, .. } => {
                self.linear_cross_entropy(*layer, value, Some(node))?;
            }
            Op::GlobalNorm => self.global_norm(node)?,
            Op::AdamW { .. } => self.adamw(node)?,
            Op::Accumulate { params } => self.accumulate(node, params)?,
            // Its results are where they were accumulated.
            Op::TakeAccumulated { .. } => {}
            Op::Assign { state } => {
                let from = self.fused.root(x[0]);
                if !matches!(self.graph().value(from)?.source, Source::Node { .. }) {
                    return Err(Error::Graph("assign takes a computed value".into()));
                }
                self.assigns.push((from, *state));
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// The sum of each row of a matrix.
    fn sum_cols(&mut self, from: At, (output, to): At) -> Result<()> {
        let (input, from) = self.short_rows(from)?;
        let kernel = RowSums::new(input, self.target).sums(input, output);
        self.step(kernel, vec![from, to])
    }

    /// The sum of a vector, or the root of it.
    pub(crate) fn total(&mut self, from: At, (output, to): At, root: bool) -> Result<()> {
        let (input, from) = self.short_rows(from)?;
        let kernel = kernels::reduce::total(input, output, root, self.target);
        self.step(kernel, vec![from, to])
    }

    /// A matrix whose rows have the same sums and are single pieces: long ones are replaced by the sums of their pieces.
    fn short_rows(&mut self, (mut input, mut from): At) -> Result<At> {
        loop {
            let sums = RowSums::new(input, self.target);
            if sums.pieces == 1 {
                return Ok((input, from));
            }
            let partial = Layout::of(&Shape::matrix(input.rows(), sums.pieces), DType::F32)?;
            let place = self.scratch(partial);
            self.step(sums.sums(input, partial), vec![from, place])?;
            (input, from) = (partial, place);
        }
    }

    /// The sum of each column of a matrix, perhaps later.
    pub(crate) fn sum_rows(&mut self, input: Layout, from: Place, (output, to): At) -> Result<()> {
        let columns = ColumnSums::new(input.cols(), self.target);
        let chunks = columns.chunks(input.rows(), input.cols());
        if chunks == 1 {
            return self.step(columns.sums(input, output), vec![from, to]);
        }
        let partial = Layout::of(&Shape::matrix(chunks, input.cols()), DType::F32)?;
        let place = self.scratch(partial);
        self.step(columns.sums(input, partial), vec![from, place])?;
        let ((layout, source), parts) = self.fewer_parts((partial, place), 1)?;
        self.put_off(Parts {
            source,
            layout,
            first: 0,
            parts,
            rows: output.rows(),
            to,
            result: output,
        })
    }

    /// The sum of each column of a matrix, as a vector of its own.
    pub(crate) fn summed(&mut self, (input, from): At) -> Result<At> {
        let sum = Self::vector(input.cols(), DType::F32)?;
        let place = self.scratch(sum);
        self.sum_rows(input, from, (sum, place))?;
        Ok((sum, place))
    }

    /// The sums of the rows of x that are `period` apart. Tiles of rows are parts of the result; many tiles are summed to fewer first.
    fn sum_tiles(&mut self, node: &Node, period: usize) -> Result<()> {
        let mut layout = self.layout(node.inputs[0])?;
        let mut source = self.place(node.inputs[0])?;
        let mut parts = layout.rows() / period;
        if parts > ColumnSums::MOST || layout.dtype() != DType::F32 {
            // A tile as one row, with the padding of its rows, which is zero.
            let stride = layout.row_stride();
            let wide = Layout::of(&Shape::matrix(parts, period * stride), layout.dtype())?;
            let columns = ColumnSums::new(wide.cols(), self.target);
            let chunks = columns.chunks(parts, wide.cols());
            let partial = Layout::of(&Shape::matrix(chunks, wide.cols()), DType::F32)?;
            let place = self.scratch(partial);
            self.step(columns.sums(wide, partial), vec![source, place])?;
            ((_, source), parts) = self.fewer_parts((partial, place), 1)?;
            layout = Layout::of(&Shape::matrix(parts * period, stride), DType::F32)?;
        }
        self.put_off(Parts {
            source,
            layout,
            first: 0,
            parts,
            rows: period,
            to: Place::Value(node.outputs[0]),
            result: self.layout(node.outputs[0])?,
        })
    }

    /// So many matrices of parts one behind the other, summed until each has no more than one invocation can add up; and that number.
    fn fewer_parts(&mut self, (mut layout, mut from): At, matrices: usize) -> Result<(At, usize)> {
        const MOST: usize = ColumnSums::MOST;
        let columns = ColumnSums::new(layout.cols(), self.target);
        while layout.rows() / matrices > MOST {
            let shape = Shape::matrix(layout.rows() / MOST, layout.cols());
            let sums = Layout::of(&shape, DType::F32)?;
            let place = self.scratch(sums);
            self.step(columns.sums(layout, sums), vec![from, place])?;
            (layout, from) = (sums, place);
        }
        Ok(((layout, from), layout.rows() / matrices))
    }

    fn layer_norm_params(&mut self, node: &Node) -> Result<()> {
        let [x, stats, dy] = self.layouts(&node.inputs)?;
        let reads = self.places(&node.inputs)?;
        let columns = ColumnSums::new(x.cols(), self.target);
        let chunks = columns.chunks(x.rows(), x.cols());
        let partial = Layout::of(&Shape::matrix(2 * chunks, x.cols()), DType::F32)?;
        let place = self.scratch(partial);
        let kernel = columns.layer_norm_params([dy, x, stats], partial);
        self.step(kernel, vec![reads[2], reads[0], reads[1], place])?;
        let ((layout, source), parts) = self.fewer_parts((partial, place), 2)?;
        for (id, first) in [(node.outputs[1], 0), (node.outputs[0], parts)] {
            if self.fused.readers(id).is_empty() && !self.is_output(id) {
                continue;
            }
            let result = self.layout(id)?;
            self.put_off(Parts {
                source,
                layout,
                first,
                parts,
                rows: result.rows(),
                to: Place::Value(id),
                result,
            })?;
        }
        Ok(())
    }

    pub(crate) fn is_output(&self, id: ValueId) -> bool {
        let mut outputs = self.graph().outputs().iter();
        outputs.any(|(_, output)| self.fused.root(*output) == id)
    }
}
