//! Recomputation (gradient checkpointing): segments of a graph whose values are computed again for the backward pass instead of being kept.
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

    /// First node of the recomputed segment that contains `index`. Its nodes must not run earlier: their results would live as long as
    /// the results that they replace.
    pub fn start_of_copies(&self, index: usize) -> Option<usize> {
        let after = self.copies.partition_point(|range| range.start <= index);
        let range = self.copies[..after].last()?;
        range.contains(&index).then_some(range.start)
    }
}

/// Closes the segment, also when the closure panics.
struct Open<'a>(&'a mut Graph);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.recomputed.open = false;
    }
}

impl Graph {
    /// Runs `build` and makes the nodes that it adds a segment.
    ///
    /// [`Graph::gradients`] computes the values of the segment again right before it differentiates the segment. So only the values that
    /// the segment reads are kept from the forward to the backward pass. The gradients are the same.
    ///
    /// # Errors
    /// [`Error::Graph`] inside of another segment, and what `build` returns. If `build` fails or panics, the nodes that it added are no
    /// segment.
    pub fn recompute<T>(&mut self, build: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.recomputed.open {
            return Err(Error::Graph(
                "a recomputed segment cannot be inside of another one".into(),
            ));
        }
        let start = self.nodes.len();
        self.recomputed.open = true;
        let open = Open(self);
        let result = build(open.0);
        drop(open);
        let segment = start..self.nodes.len();
        if result.is_ok() && !segment.is_empty() {
            self.recomputed.segments.push(segment);
        }
        result
    }

    /// Adds the nodes of a segment again. The copies read the same values from outside of the segment, and each other's results.
    ///
    /// Returns the copies, and by value of the segment its copy. Nodes without results are left out, because their effects must not
    /// happen twice. A copy that nobody reads costs nothing, like any other node.
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
            let copies = self.scope_as(node.scope, |graph| {
                graph.push_node(node.op, inputs, results)
            });
            copy_of.extend(node.outputs.into_iter().zip(copies));
        }
        let copies = start..self.nodes.len();
        self.recomputed.copies.push(copies.clone());
        Ok((self.nodes[copies].to_vec(), copy_of))
    }
}
