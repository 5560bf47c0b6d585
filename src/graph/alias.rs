//! What a read of a parameter or state sees: the order of declaration decides.
//!
//! A parameter is updated in place, and its reshapes have no memory of their own. So a read that was declared before the update but
//! happens after it needs a copy that is made before. A copy is a reshape that moves its elements; `compile/fuse.rs` finds the reshapes
//! that have to, and this file adds those that nobody wrote.

use super::{Graph, Op, Source, ValueId};
use crate::error::{Error, Result};

impl Graph {
    /// Which nodes a run has to compute: those whose results reach an output or a persistent value.
    pub(crate) fn live(&self) -> Vec<bool> {
        let mut wanted = vec![false; self.values.len()];
        for (_, id) in &self.outputs {
            wanted[id.index()] = true;
        }
        let mut live = vec![false; self.nodes.len()];
        for (index, node) in self.nodes.iter().enumerate().rev() {
            live[index] = node.op.has_effect() || node.outputs.iter().any(|id| wanted[id.index()]);
            if live[index] {
                for &id in &node.inputs {
                    wanted[id.index()] = true;
                }
            }
        }
        live
    }

    /// By value: whether it is an output or a live node reads it.
    pub(crate) fn wanted(&self) -> Vec<bool> {
        let mut wanted = vec![false; self.values.len()];
        for (_, id) in &self.outputs {
            wanted[id.index()] = true;
        }
        for (node, live) in self.nodes.iter().zip(self.live()) {
            for id in node.inputs.iter().filter(|_| live) {
                wanted[id.index()] = true;
            }
        }
        wanted
    }

    /// Parameters and states are not read once a node has updated them.
    pub(crate) fn check_current(&self, inputs: &[ValueId]) -> Result<()> {
        match inputs.iter().find(|id| self.updated.contains(id)) {
            None => Ok(()),
            Some(&id) => Err(Error::Graph(format!(
                "{:?} is read after its update in the same graph; declare the read before the update, it then sees the value before it",
                self.value(id)?.name
            ))),
        }
    }

    /// What a node that updates `updates` reads instead of `inputs`. Outputs of `updates` that are declared already become outputs of
    /// copies, which have the value before the update.
    pub(super) fn before_update(
        &mut self,
        op: &Op,
        updates: &[ValueId],
        inputs: &[ValueId],
    ) -> Vec<ValueId> {
        for &id in updates {
            if self.outputs.iter().any(|(_, output)| *output == id) {
                let copy = self.copy(id);
                for (_, output) in &mut self.outputs {
                    if *output == id {
                        *output = copy;
                    }
                }
            }
        }
        let mut operands = Vec::with_capacity(inputs.len());
        for &id in inputs {
            let copied = match self.values[id.index()].source {
                // One dispatch cannot read and write the buffer that holds all parameters.
                Source::Parameter(_) => matches!(op, Op::AdamW { .. } | Op::Assign { .. }),
                // A state takes a value that the run computes.
                Source::Node { node, .. } => {
                    let taken = matches!(self.nodes[node].op, Op::TakeAccumulated { .. });
                    taken && matches!(op, Op::Assign { .. })
                }
                _ => matches!(op, Op::Assign { .. }),
            };
            operands.push(match copied {
                true => self.copy(id),
                false => id,
            });
        }
        operands
    }

    /// A reshape to the same shape.
    fn copy(&mut self, id: ValueId) -> ValueId {
        let result = (self.shape(id).clone(), self.dtype(id));
        self.push_node(Op::Reshape, vec![id], vec![result])[0]
    }

    /// By node: whether it is a reshape that has to move its elements, because they lie elsewhere under the new shape, or because its
    /// result is read when the elements of its operand may have changed already.
    pub(crate) fn moving_reshapes(&self, live: &[bool]) -> Vec<bool> {
        let reshape = |index: usize| self.nodes[index].op == Op::Reshape;
        let mut moving: Vec<bool> = (0..self.nodes.len())
            .map(|index| reshape(index) && self.is_laid_out_anew(index))
            .collect();
        // By value: the value that holds its elements, and the first of the reshapes between them.
        let mut origins: Vec<(ValueId, Option<usize>)> =
            self.values().map(|(id, _)| (id, None)).collect();
        for (index, node) in self.nodes.iter().enumerate() {
            if reshape(index) && !moving[index] {
                let (root, first) = origins[node.inputs[0].index()];
                origins[node.outputs[0].index()] = (root, first.or(Some(index)));
            }
        }
        let mut updates: Vec<Option<usize>> = vec![None; self.values.len()];
        for (index, node) in self.nodes.iter().enumerate() {
            let state = match &node.op {
                Op::Assign { state } => Some(state),
                _ => None,
            };
            for id in node.op.updated().iter().chain(state) {
                updates[id.index()] = Some(index);
            }
        }
        // Accumulated gradients are zero when outputs are read and states are written.
        let is_taken = |root: ValueId| match self.values[root.index()].source {
            Source::Node { node, .. } => matches!(self.nodes[node].op, Op::TakeAccumulated { .. }),
            _ => false,
        };
        let is_computed =
            |root: ValueId| matches!(self.values[root.index()].source, Source::Node { .. });
        for (index, node) in self.nodes.iter().enumerate() {
            if !live[index] || reshape(index) {
                continue;
            }
            for id in &node.inputs {
                let (root, Some(first)) = origins[id.index()] else {
                    continue;
                };
                let is_parameter = matches!(self.values[root.index()].source, Source::Parameter(_));
                moving[first] |= match &node.op {
                    Op::Assign { .. } => !is_computed(root) || is_taken(root),
                    Op::AdamW { .. } => is_parameter,
                    // States change when the run ends.
                    _ => is_parameter && updates[root.index()].is_some_and(|update| update < index),
                };
            }
        }
        for (_, id) in &self.outputs {
            if let (root, Some(first)) = origins[id.index()] {
                moving[first] |= updates[root.index()].is_some() || is_taken(root);
            }
        }
        moving
    }

    /// Whether the rows of a reshape begin elsewhere than those of its operand. Vectors and matrices have rows of other strides.
    fn is_laid_out_anew(&self, index: usize) -> bool {
        let node = &self.nodes[index];
        let (from, to) = (self.shape(node.inputs[0]), self.shape(node.outputs[0]));
        from.rows() != to.rows()
            || from.cols() != to.cols()
            || (from.rank() == 1) != (to.rank() == 1)
    }
}
