//! The gradient of a table: which places have the same id, then the sums of their rows.

use super::{At, Lowering};
use crate::compile::Place;
use crate::error::Result;
use crate::gpu::Layout;
use crate::graph::Node;
use crate::kernels::embedding::{self, Rows, Search};
use crate::types::{DType, Shape};

impl Lowering<'_> {
    /// ids `[N]`, dy [N, C] → table [V, C].
    pub(crate) fn gather_grad(&mut self, node: &Node, padding: Option<u32>) -> Result<()> {
        let reads = self.places(&node.inputs)?;
        let [ids, dy] = self.layouts(&node.inputs)?;
        let (ids, dy) = ((ids, reads[0]), (dy, reads[1]));
        let table = (self.layout(node.outputs[0])?, Place::Value(node.outputs[0]));
        self.fill(table.0, 0.0, table.1)?;
        let chain = match embedding::search(table.0.rows(), ids.0.cols(), self.target) {
            Search::Compare => {
                let links = self.numbers(2 * ids.0.cols())?;
                let kernel = embedding::links(ids.0, links.0, padding);
                self.step(kernel, vec![ids.1, links.1])?;
                links
            }
            Search::Runs(run) => {
                let sorted = self.sorted_runs(ids, run)?;
                let links = self.numbers(2 * ids.0.cols())?;
                let kernel = embedding::links_sorted(sorted.0, links.0, run, padding);
                self.step(kernel, vec![sorted.1, links.1])?;
                links
            }
            Search::Sort(run) => return self.sum_sorted([ids, dy], run, padding, table),
        };
        let kernel = embedding::gather_grad([ids.0, chain.0, dy.0], table.0);
        self.step(kernel, vec![ids.1, chain.1, dy.1, table.1])
    }

    /// Sorts all places by id, then adds up rows of equal ids, which lie side by side.
    fn sum_sorted(
        &mut self,
        [ids, dy]: [At; 2],
        run: usize,
        padding: Option<u32>,
        table: At,
    ) -> Result<()> {
        let mut sorted = self.sorted_runs(ids, run)?;
        let mut length = run;
        while length == run || length < sorted.0.cols() {
            let merged = self.numbers(sorted.0.cols())?;
            let layouts = [sorted.0, merged.0];
            let kernel = embedding::merge(ids.0, layouts, length, length == run);
            self.step(kernel, vec![ids.1, sorted.1, merged.1])?;
            (sorted, length) = (merged, 2 * length);
        }
        let mut rows = Rows::Places([ids.0, sorted.0, dy.0]);
        let mut from = vec![ids.1, sorted.1, dy.1];
        let mut count = ids.0.cols();
        loop {
            let blocks = embedding::blocks(count);
            if blocks == 1 {
                let kernel = embedding::segments(rows, count, table.0, None, padding);
                return self.step(kernel, [from, vec![table.1]].concat());
            }
            let keys = self.numbers(2 * blocks)?;
            let parts = Layout::of(&Shape::matrix(2 * blocks, dy.0.cols()), DType::F32)?;
            let place = self.scratch(parts);
            let left = Some([keys.0, parts]);
            let kernel = embedding::segments(rows, count, table.0, left, padding);
            self.step(kernel, [from, vec![table.1, keys.1, place]].concat())?;
            rows = Rows::Parts([keys.0, parts]);
            from = vec![keys.1, place];
            count = 2 * blocks;
        }
    }

    fn sorted_runs(&mut self, ids: At, run: usize) -> Result<At> {
        let sorted = self.numbers(ids.0.cols().next_multiple_of(run))?;
        let kernel = embedding::sort(ids.0, sorted.0, run);
        self.step(kernel, vec![ids.1, sorted.1])?;
        Ok(sorted)
    }

    /// Scratch for so many u32.
    fn numbers(&mut self, count: usize) -> Result<At> {
        let layout = Self::vector(count, DType::U32)?;
        Ok((layout, self.scratch(layout)))
    }
}
