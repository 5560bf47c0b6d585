//! Operations that take several dispatches, or whose kernel takes no program.

use super::Lowering;
use super::parts::Parts;
use crate::compile::Place;
use crate::error::{Error, Result};
use crate::gpu::Layout;
use crate::graph::{Node, Op, Source, ValueId};
use crate::kernels::loss::CrossEntropyKernel;
use crate::kernels::{self, reduce::ColumnSums};
use crate::types::{DType, Shape};

impl Lowering<'_> {
    /// Operations that take several dispatches or no program; false for all others.
    /// `value`: the loss that is computed with its gradient.
    pub(crate) fn staged(&mut self, node: &Node, value: Option<&Node>) -> Result<bool> {
        let x = node.inputs.as_slice();
        let target = self.target;
        match &node.op {
            Op::SumRows => {
                let input = self.layout(x[0])?;
                let from = self.place(x[0])?;
                let to = (self.layout(node.outputs[0])?, Place::Value(node.outputs[0]));
                self.sum_rows(input, from, to)?;
            }
            Op::SumCols => {
                let (input, output) = (self.layout(x[0])?, self.layout(node.outputs[0])?);
                let from = self.place(x[0])?;
                let kernel = kernels::reduce::row_sums(input, output, target);
                self.step(kernel, vec![from, Place::Value(node.outputs[0])])?;
            }
            Op::SumAll => {
                let (input, output) = (self.layout(x[0])?, self.layout(node.outputs[0])?);
                let from = self.place(x[0])?;
                let sums = Self::vector(input.rows(), DType::F32)?;
                let place = self.scratch(sums);
                let rows = kernels::reduce::row_sums(input, sums, target);
                self.step(rows, vec![from, place])?;
                let total = kernels::reduce::total(sums, output, false, target);
                self.step(total, vec![place, Place::Value(node.outputs[0])])?;
            }
            Op::LayerNormParamGrad => self.layer_norm_params(node)?,
            Op::GatherGrad { padding, .. } => {
                let (ids, dy) = (self.layout(x[0])?, self.layout(x[1])?);
                let table = self.layout(node.outputs[0])?;
                let result = Place::Value(node.outputs[0]);
                let links = Self::vector(2 * ids.cols(), DType::U32)?;
                let chain = self.scratch(links);
                let reads = self.places(x)?;
                self.fill(table, 0.0, result)?;
                match kernels::embedding::run_length(table.rows(), target) {
                    None => {
                        let kernel = kernels::embedding::links(ids, links, *padding);
                        self.step(kernel, vec![reads[0], chain])?;
                    }
                    Some(run) => {
                        let keys = ids.cols().next_multiple_of(run);
                        let sorted = Self::vector(keys, DType::U32)?;
                        let place = self.scratch(sorted);
                        let kernel = kernels::embedding::sort(ids, sorted, run);
                        self.step(kernel, vec![reads[0], place])?;
                        let kernel = kernels::embedding::links_sorted(sorted, links, run, *padding);
                        self.step(kernel, vec![place, chain])?;
                    }
                }
                let kernel = kernels::embedding::gather_grad([ids, links, dy], table);
                self.step(kernel, vec![reads[0], chain, reads[1], result])?;
            }
            Op::Stack => {
                let output = self.layout(node.outputs[0])?;
                let layouts: Vec<Layout> =
                    x.iter().map(|&id| self.layout(id)).collect::<Result<_>>()?;
                let available = kernels::MAX_BINDINGS - 1;
                if layouts.len() > available {
                    return Err(Error::Limit {
                        what: "stacking scalars".into(),
                        limit: "max_storage_buffers_per_shader_stage",
                        needed: layouts.len() as u64 + 1,
                        available: available as u64 + 1,
                    });
                }
                let mut places = self.places(x)?;
                places.push(Place::Value(node.outputs[0]));
                self.step(kernels::reduce::stack(&layouts, output), places)?;
            }
            Op::KdLoss { alpha, beta } => {
                let [y, t] = self.layouts(x)?;
                let [loss, cosine, mse, rows] = self.layouts(&node.outputs)?;
                let out: Vec<Place> = node.outputs.iter().map(|&id| Place::Value(id)).collect();
                let mut places = self.places(x)?;
                places.push(out[3]);
                self.step(kernels::loss::kd_rows(y, t, rows, target), places)?;
                let scalars = [loss, cosine, mse];
                let kernel =
                    kernels::loss::kd_total(rows, scalars, y.cols(), [*alpha, *beta], target);
                self.step(kernel, vec![out[3], out[0], out[1], out[2]])?;
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

    pub(crate) fn sum_rows(
        &mut self,
        input: Layout,
        from: Place,
        (output, to): (Layout, Place),
    ) -> Result<()> {
        let columns = ColumnSums::new(input.cols(), self.target);
        let chunks = columns.chunks(input.rows(), input.cols());
        if chunks == 1 {
            return self.step(columns.sums(input, output), vec![from, to]);
        }
        let partial = Layout::of(&Shape::matrix(chunks, input.cols()), DType::F32)?;
        let place = self.scratch(partial);
        self.step(columns.sums(input, partial), vec![from, place])?;
        self.put_off(Parts {
            source: place,
            layout: partial,
            first: 0,
            parts: chunks,
            to,
            result: output,
        })
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
        for (id, first) in [(node.outputs[1], 0), (node.outputs[0], chunks)] {
            if self.fused.readers(id).is_empty() && !self.is_output(id) {
                continue;
            }
            self.put_off(Parts {
                source: place,
                layout: partial,
                first,
                parts: chunks,
                to: Place::Value(id),
                result: self.layout(id)?,
            })?;
        }
        Ok(())
    }

    pub(crate) fn is_output(&self, id: ValueId) -> bool {
        let mut outputs = self.graph().outputs().iter();
        outputs.any(|(_, output)| self.fused.root(*output) == id)
    }
}
