//! Cross entropy: the loss of each row, then their mean; or both together with the gradient.

use super::Lowering;
use crate::compile::Place;
use crate::error::Result;
use crate::gpu::Layout;
use crate::graph::{Node, Source, ValueId};
use crate::kernels::Program;
use crate::kernels::loss::{Count, CrossEntropyKernel};
use crate::types::{DType, Shape};

impl Lowering<'_> {
    /// The value alone.
    pub(crate) fn cross_entropy(&mut self, entropy: CrossEntropyKernel, node: &Node) -> Result<()> {
        let [logits, targets] = self.layouts(&node.inputs)?;
        let rows = self.layout(node.outputs[2])?;
        let mut places = self.places(&node.inputs)?;
        places.push(Place::Value(node.outputs[2]));
        self.step(entropy.rows(logits, targets, rows, self.target), places)?;
        self.cross_entropy_total(entropy, node, node.inputs[1], logits.cols())
    }

    /// The value, node `value`, and its gradient, node `node`, with one read of the logits.
    pub(crate) fn cross_entropy_with_gradient(
        &mut self,
        entropy: CrossEntropyKernel,
        [value, node]: [&Node; 2],
        program: Program,
        [loads, stores]: [Vec<Place>; 2],
    ) -> Result<()> {
        let [logits, targets, rows, _, dloss] = self.layouts(&node.inputs)?;
        let reads = self.places(&node.inputs)?;
        let (count, counted) = self.count(entropy, value.inputs[1])?;
        let over = self.can_overwrite(node.inputs[0], [value, node])
            && CrossEntropyKernel::fits_over(logits, &program);
        let layouts = [logits, targets, rows, dloss];
        let kernel = entropy.value_grad(layouts, count, program, over, self.target);
        let counted = counted.into_iter().collect();
        let stores = match (&*stores, reads[0]) {
            (&[Place::Value(gradient)], Place::Value(logits)) if over => {
                self.renamed.insert(gradient, logits);
                Vec::new()
            }
            _ => stores,
        };
        let own = [vec![reads[0], reads[1]], counted, vec![reads[4]]].concat();
        let places = [own, loads, vec![reads[2]], stores].concat();
        self.step(kernel, places)?;
        let others = |id| {
            let readers = self.fused.readers(id).iter();
            self.is_output(id) || readers.clone().count() > usize::from(id == node.inputs[3])
        };
        // Where only the gradient is wanted, nobody but it reads the count.
        match value.outputs[..2].iter().any(|&id| others(id)) {
            true => self.cross_entropy_total(entropy, value, value.inputs[1], logits.cols()),
            false => Ok(()),
        }
    }

    /// Whether nobody but these nodes wants a value, which no arena holds.
    fn can_overwrite(&self, id: ValueId, nodes: [&Node; 2]) -> bool {
        let root = self.fused.root(id);
        let graph = self.graph();
        let computed = graph
            .value(root)
            .is_ok_and(|value| matches!(value.source, Source::Node { .. }));
        let mut readers = self.fused.readers(root).iter();
        computed
            && !self.is_output(root)
            && !self.pinned.contains_key(&root)
            && !self.fused.shadows().contains_key(&root)
            && readers.all(|&reader| {
                let reader = &graph.nodes()[reader];
                nodes.iter().any(|&node| std::ptr::eq(node, reader))
            })
    }

    /// How many targets count, and where that stands if it is not known: the gradient needs it before the rows are summed.
    pub(crate) fn count(
        &mut self,
        entropy: CrossEntropyKernel,
        targets: ValueId,
    ) -> Result<(Count, Option<Place>)> {
        let (layout, from) = (self.layout(targets)?, self.place(targets)?);
        if entropy.ignore.is_none() {
            return Ok((Count::Known(layout.cols()), None));
        }
        let parts = entropy.parts(layout.cols(), self.target);
        let count = match parts {
            1 => Self::vector(1, DType::F32)?,
            _ => Layout::of(&Shape::matrix(parts, 1), DType::F32)?,
        };
        let place = self.scratch(count);
        let kernel = entropy.count(layout, count, self.target);
        self.step(kernel, vec![from, place])?;
        let (count, place) = match parts {
            1 => (count, place),
            _ => self.summed((count, place))?,
        };
        Ok((Count::Value(count), Some(place)))
    }

    /// Loss and count of a node whose row losses are there.
    pub(crate) fn cross_entropy_total(
        &mut self,
        entropy: CrossEntropyKernel,
        node: &Node,
        targets: ValueId,
        vocabulary: usize,
    ) -> Result<()> {
        let [loss, count, rows] = self.layouts(&node.outputs)?;
        let (layout, from) = (self.layout(targets)?, self.place(targets)?);
        let [loss_place, count_place, rows_place] =
            [0, 1, 2].map(|i| Place::Value(node.outputs[i]));
        let parts = entropy.parts(layout.cols(), self.target);
        if parts == 1 {
            let kernel = entropy.total(rows, layout, [loss, count], vocabulary, self.target);
            return self.step(kernel, vec![rows_place, from, loss_place, count_place]);
        }
        let sums = Layout::of(&Shape::matrix(parts, 4), DType::F32)?;
        let place = self.scratch(sums);
        let kernel = entropy.total_parts([rows, layout], sums, vocabulary, self.target);
        self.step(kernel, vec![rows_place, from, place])?;
        let (sum, place) = self.summed((sums, place))?;
        let kernel = entropy.total_of_parts(sum, [loss, count], self.target);
        self.step(kernel, vec![place, loss_place, count_place])
    }
}
