//! The network as written: values in SSA form, operations with shape inference, gradients, recomputed segments. It knows no device.

mod alias;
mod attention;
mod build;
mod display;
mod gradients;
mod id;
mod infer;
mod op;
mod recompute;
mod scope;

use std::collections::HashMap;
use std::sync::Arc;

pub use attention::AttentionOptions;
pub use build::{CrossEntropy, KdLoss};
use id::Lineage;
pub use id::ValueId;
pub use op::{LinearCrossEntropy, Op};
use recompute::Recomputed;

use crate::error::{Error, Result};
use crate::types::{DType, Shape};

/// The origin of a value.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Source {
    /// Given to every run that needs it.
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

/// The initial elements of a parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Init {
    /// The same number everywhere.
    Constant(f32),
    /// Uniform in [−bound, bound).
    Uniform(f32),
}

/// A value: its name, shape, element type and origin.
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

impl Value {
    /// Shape of a parameter as the host sees it: that of a convolution weight is [out, in, k].
    pub(crate) fn host_shape(&self) -> Vec<usize> {
        let dims = self.shape.dims();
        match (self.taps, dims) {
            (Some(taps), [out, cols]) => vec![*out, cols / taps, taps],
            _ => dims.to_vec(),
        }
    }
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
    /// Path of the layer that the node was built in, such as `encoder/blocks.0.conv1`, see [`Graph::scoped`]. Nodes of a gradient
    /// have the path of the node that they differentiate. Errors and profiles show it; executables are cached without it.
    pub scope: Option<Arc<str>>,
}

/// An input, parameter or state that has a name.
#[derive(Clone, Debug)]
struct Declared {
    id: ValueId,
    /// Kind and name of the layer that declared it, for errors.
    by: Option<Arc<str>>,
}

/// A network, a loss, a whole training step: built once, with static shapes, then compiled by
/// [`Session::compile`](crate::Session::compile) or interpreted by [`reference`](crate::reference).
///
/// Nodes run in the order in which they were added. The order of declaration also decides what a read of a parameter or state
/// sees: a node, a reshape or an output that is declared before an update sees the value before the update. A node or reshape that is
/// declared after it is refused. An output of the parameter or state that is declared after the update gives the value after it.
///
/// A clone accepts the values that the original had when it was cloned. Graphs are equal if they compute the same, whatever their
/// layers are called.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    pub(crate) values: Vec<Value>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) outputs: Vec<(String, ValueId)>,
    lineage: Lineage,
    names: HashMap<String, Declared>,
    /// Parameters and states that a node updates: not to be read afterwards.
    updated: Vec<ValueId>,
    /// Calls of [`Graph::dropout`] that added a node.
    dropouts: u64,
    pub(crate) recomputed: Recomputed,
    /// Path of the layer that is being built.
    scope: Option<Arc<str>>,
    /// Kind and name of the layer whose parameters are being declared.
    declaring: Option<Arc<str>>,
}

/// What they compute is compared, and what their gradients would compute.
impl PartialEq for Graph {
    fn eq(&self, other: &Self) -> bool {
        self.to_string() == other.to_string()
            && self.recomputed == other.recomputed
            && self.dropouts == other.dropouts
    }
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
            .map(|(i, value)| (self.lineage.id(i), value))
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
    /// [`Error::Graph`] for an id of another graph. A clone shares the ids that its original had when it was cloned.
    pub fn value(&self, id: ValueId) -> Result<&Value> {
        let value = self.values.get(id.index());
        let own = value.filter(|_| self.lineage.id(id.index()) == id);
        own.ok_or_else(|| {
            Error::Graph(format!(
                "value %{} belongs to another graph; build it in this one, or feed it as an input",
                id.0
            ))
        })
    }

    /// An input, parameter or state by name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<ValueId> {
        self.names.get(name).map(|declared| declared.id)
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
