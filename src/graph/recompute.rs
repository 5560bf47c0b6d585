//! Recomputation (gradient checkpointing): segments of a graph whose values are computed again for the backward pass, instead of kept for it.
//! Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174.

use std::collections::HashMap;
use std::ops::Range;

use super::{Graph, Node, ValueId};
use crate::error::{Error, Result};

/// Ranges of nodes.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Recomputed {
    /// In the order of the nodes, apart from each other.
    segments: Vec<Range<usize>>,
    /// A segment is being written down.
    open: bool,
    /// Copies of nodes of segments, in order.
    copies: Vec<Range<usize>>,
}

impl Recomputed {
    /// The segment that ends with node `last`.
    pub fn ending_at(&self, last: usize) -> Option<Range<usize>> {
        let mut segments = self.segments.iter();
        segments.find(|segment| segment.end == last + 1).cloned()
    }

    /// Where the copies begin that node `index` is one of. They must not run before that place, or what they compute would
    /// live as long as what they are there to replace.
    pub fn start_of_copies(&self, index: usize) -> Option<usize> {
        let after = self.copies.partition_point(|range| range.start <= index);
        let range = self.copies[..after].last()?;
        range.contains(&index).then_some(range.start)
    }
}

impl Graph {
    /// Runs `build`, and makes the nodes that it adds a segment: [`Graph::gradients`] computes anew what it needs of the segment's
    /// values, right before it differentiates the segment, so that only the values that the segment reads have to be kept from the
    /// forward to the backward pass. The gradients are the same.
    ///
    /// # Errors
    /// [`Error::Graph`] inside another segment, and what `build` returns; the nodes that were added are no segment then.
    pub fn recompute<T>(&mut self, build: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.recomputed.open {
            return Err(Error::Graph(
                "a recomputed segment inside another one".into(),
            ));
        }
        let start = self.nodes.len();
        self.recomputed.open = true;
        let result = build(self);
        self.recomputed.open = false;
        let segment = start..self.nodes.len();
        if result.is_ok() && !segment.is_empty() {
            self.recomputed.segments.push(segment);
        }
        result
    }

    /// Adds the nodes of a segment again. They read the same values from outside and each other's results.
    ///
    /// Returns the copies, and by value of the segment its copy. Nodes without results, whose effects must not happen twice,
    /// are left out; what nobody reads costs nothing, like any other node.
    pub(crate) fn copy_segment(
        &mut self,
        segment: Range<usize>,
    ) -> Result<(Vec<Node>, HashMap<ValueId, ValueId>)> {
        let mut copy_of: HashMap<ValueId, ValueId> = HashMap::new();
        let start = self.nodes.len();
        let nodes = self.nodes[segment].to_vec();
        for node in nodes {
            if node.outputs.is_empty() {
                continue;
            }
            let inputs = node.inputs.iter();
            let inputs: Vec<ValueId> = inputs
                .map(|id| copy_of.get(id).copied().unwrap_or(*id))
                .collect();
            self.check_current(&inputs)?;
            let outputs = node.outputs.iter();
            let results = outputs
                .map(|&id| (self.shape(id).clone(), self.dtype(id)))
                .collect();
            let copies = self.push_node(node.op, inputs, results);
            copy_of.extend(node.outputs.into_iter().zip(copies));
        }
        let copies = start..self.nodes.len();
        self.recomputed.copies.push(copies.clone());
        Ok((self.nodes[copies].to_vec(), copy_of))
    }
}
