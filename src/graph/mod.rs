//! The network as written: values in SSA form, operations with shape inference, gradients, recomputed segments. It knows no device.

mod build;
mod display;
mod gradients;
mod infer;
mod op;
mod recompute;

use std::collections::HashMap;

pub use build::{CrossEntropy, KdLoss};
pub(crate) use infer::name as op_name;
pub use op::{LinearCrossEntropy, Op};
use recompute::Recomputed;

use crate::error::{Error, Result};
use crate::types::{DType, Shape};

/// A value of one [`Graph`]; cheap to copy, meaningless in another graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ValueId(pub(crate) u32);

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Source {
    /// Given to every run. `below`: exclusive upper bound that u32 elements are checked against.
    Input {
        /// Exclusive upper bound of u32 elements.
        below: Option<u32>,
    },
    /// Trainable, persistent, f32, addressed by name.
    Parameter(Init),
    /// Persistent, updated by [`Op::Assign`], f32; starts with this value.
    State(f32),
    /// The same number everywhere.
    Constant(f32),
    /// Output number `output` of node number `node`.
    Node {
        /// Index into [`Graph::nodes`].
        node: usize,
        /// Index into that node's outputs.
        output: usize,
    },
}

/// How a parameter starts.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Init {
    /// The same number everywhere.
    Constant(f32),
    /// Uniform in [−bound, bound).
    Uniform(f32),
}

/// A value: what it is called, its shape, its element type, its origin.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Value {
    /// Unique among inputs, parameters and states; empty for the rest.
    pub name: String,
    /// Static shape.
    pub shape: Shape,
    /// Element type.
    pub dtype: DType,
    /// Origin.
    pub source: Source,
    /// Taps k of a convolution weight, which is stored [out, k·in], tap after tap, and exchanged with the host as [out, in, k].
    pub taps: Option<usize>,
}

/// An operation with its operands and results.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Node {
    /// What is computed.
    pub op: Op,
    /// Operands, in the order that [`Op`] documents.
    pub inputs: Vec<ValueId>,
    /// Results, in the order that [`Op`] documents.
    pub outputs: Vec<ValueId>,
}

/// A network, a loss, a whole training step: built once, with static shapes, then compiled by
/// [`Session::compile`](crate::Session::compile) or interpreted by [`reference`](crate::reference).
///
/// Nodes run in the order in which they were added.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Graph {
    pub(crate) values: Vec<Value>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) outputs: Vec<(String, ValueId)>,
    names: HashMap<String, ValueId>,
    /// Parameters and states that a node updates: not to be read afterwards.
    updated: Vec<ValueId>,
    /// Calls of [`Graph::dropout`] that added a node.
    dropouts: u64,
    pub(crate) recomputed: Recomputed,
}

impl Graph {
    /// An empty graph.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// All values, in the order of their creation.
    pub fn values(&self) -> impl ExactSizeIterator<Item = (ValueId, &Value)> {
        self.values
            .iter()
            .enumerate()
            .map(|(i, value)| (ValueId(i as u32), value))
    }

    /// All nodes, in execution order.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Named results of a run, in the order of [`Graph::output`] calls.
    #[must_use]
    pub fn outputs(&self) -> &[(String, ValueId)] {
        &self.outputs
    }

    /// The value behind an id.
    ///
    /// # Errors
    /// [`Error::Graph`] for an id of another graph that is out of range here.
    pub fn value(&self, id: ValueId) -> Result<&Value> {
        self.values
            .get(id.0 as usize)
            .ok_or_else(|| Error::Graph(format!("value {} does not belong to this graph", id.0)))
    }

    /// An input, parameter or state by name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<ValueId> {
        self.names.get(name).copied()
    }

    /// Parameters in the order of their creation.
    pub fn parameters(&self) -> impl Iterator<Item = (ValueId, &Value)> {
        self.values()
            .filter(|(_, value)| matches!(value.source, Source::Parameter(_)))
    }

    /// The shape of a value of this graph; for builders that have checked the id already.
    pub(crate) fn shape(&self, id: ValueId) -> &Shape {
        &self.values[id.0 as usize].shape
    }

    pub(crate) fn dtype(&self, id: ValueId) -> DType {
        self.values[id.0 as usize].dtype
    }
}
