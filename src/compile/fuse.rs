//! Fusion: which nodes become one kernel.
//!
//! A group is at most one anchor (a matrix product, a normalisation, a gather, …) and the elementwise nodes that follow it on
//! the same rows and columns. Groups run in the order of their creation. An elementwise node joins the group of its latest
//! operand, so it only ever moves to an earlier place: nothing it reads can be missing or overwritten there.
//! What is computed again for the backward pass joins only groups that begin there (`graph/recompute.rs`).
//! A loss may be computed by the kernel of its gradient, see `compile/pair.rs`.

use std::collections::{HashMap, HashSet};

use crate::compile::pair::pair;
use crate::gpu::Layout;
use crate::graph::{Graph, Op, Source, ValueId};
use crate::kernels::MAX_BINDINGS;
use crate::types::Shape;
use crate::types::{Broadcast, DType};

/// Nodes that become one kernel (an anchor that works in stages may take several dispatches).
#[derive(Clone, Debug)]
pub(crate) struct Group {
    /// The node that is not elementwise, if any.
    pub anchor: Option<usize>,
    /// The loss that the anchor, its gradient, computes too.
    pub value: Option<usize>,
    /// Elementwise nodes, in order.
    pub elementwise: Vec<usize>,
    /// Rows and columns of everything elementwise.
    pub domain: (usize, usize),
}

/// Most elementwise nodes of a group. Drivers take long to compile a kernel of thousands of instructions, and a kernel of this many is not
/// bound by memory any more.
const MOST_NODES: usize = 128;

/// Storage buffers that a group binds.
#[derive(Clone, Debug, Default)]
struct Uses {
    /// Operands and side results of the anchor, if there is one.
    anchor: Option<usize>,
    /// Values that the program loads.
    reads: Vec<(ValueId, Broadcast)>,
    /// Values that the program stores.
    stored: usize,
}

impl Uses {
    fn bindings(&self) -> usize {
        let least = usize::from(self.anchor.is_some());
        self.anchor.unwrap_or(0) + self.reads.len() + self.stored.max(least)
    }
}

/// A graph cut into groups.
#[derive(Debug)]
pub(crate) struct Fused<'a> {
    pub graph: &'a Graph,
    pub groups: Vec<Group>,
    /// By group: what it binds.
    uses: Vec<Uses>,
    /// By value: the value that holds its elements. A reshape that moves nothing holds none.
    roots: Vec<ValueId>,
    /// By node: whether it is a reshape that moves its elements.
    moving: Vec<bool>,
    /// By value: the group that computes it.
    group_of: Vec<Option<usize>>,
    /// By value: live nodes that read it.
    readers: Vec<Vec<usize>>,
    /// By value: how many of its readers are not in its own group.
    outside: Vec<usize>,
    outputs: HashSet<ValueId>,
    /// Casts of parameters that are no work, because the session keeps their result: by value, the parameter.
    shadows: HashMap<ValueId, ValueId>,
}

/// Whether the kernel of an anchor hands its first result to a program.
fn takes_program(op: &Op) -> bool {
    matches!(
        op,
        Op::MatMul { .. }
            | Op::LayerNorm { .. }
            | Op::LayerNormGrad
            | Op::Softmax { .. }
            | Op::SoftmaxGrad { .. }
            | Op::Attention(_)
            | Op::CrossAttention(_)
            | Op::Im2col(_)
            | Op::Col2im(_)
            | Op::Conv { .. }
            | Op::ConvGradInput { .. }
            | Op::ConvGradWeight { .. }
            | Op::Gather { .. }
            | Op::SumGroups { .. }
            | Op::MaskedMean
            | Op::MaskedMeanGrad { .. }
            | Op::KdLossGrad { .. }
            | Op::CrossEntropyGrad { .. }
    )
}

/// Whether the elements of an f16 copy have the same offsets as those of the parameter, counted in elements.
fn shadow_fits(parameter: &Shape, copy: &Shape) -> bool {
    match (
        Layout::of(parameter, DType::F32),
        Layout::of(copy, DType::F16),
    ) {
        (Ok(from), Ok(to)) => from.rows() == 1 || from.row_stride() == to.row_stride(),
        _ => false,
    }
}

impl<'a> Fused<'a> {
    pub fn new(graph: &'a Graph) -> Self {
        let count = graph.values.len();
        let mut roots: Vec<ValueId> = graph.values().map(|(id, _)| id).collect();
        let live = graph.live();
        let moving = graph.moving_reshapes(&live);
        for (node, moving) in graph.nodes.iter().zip(&moving) {
            if node.op == Op::Reshape && !moving {
                roots[node.outputs[0].0 as usize] = roots[node.inputs[0].0 as usize];
            }
        }
        let mut fused = Self {
            graph,
            groups: Vec::new(),
            uses: Vec::new(),
            outputs: graph
                .outputs
                .iter()
                .map(|(_, id)| roots[id.0 as usize])
                .collect(),
            roots,
            moving,
            group_of: vec![None; count],
            readers: vec![Vec::new(); count],
            outside: Vec::new(),
            shadows: HashMap::new(),
        };
        for (index, node) in graph.nodes.iter().enumerate() {
            if live[index] && !fused.is_renaming(index) {
                for &id in &node.inputs {
                    let root = fused.root(id);
                    fused.readers[root.0 as usize].push(index);
                }
            }
        }
        fused.outside = fused.readers.iter().map(Vec::len).collect();
        fused.shadows = fused.find_shadows(&live);
        let (order, values) = pair(&fused, &live);
        for index in order {
            let node = &graph.nodes[index];
            let shadowed = || fused.shadows.contains_key(&node.outputs[0]);
            if !(fused.is_elementwise(index) && shadowed()) {
                fused.place(index, values.get(&index).copied());
            }
        }
        fused
    }

    /// Casts to f16 of parameters whose elements lie at the same places in both types. Not those that are read when the
    /// parameter may have changed already: its shadow changes with it.
    fn find_shadows(&self, live: &[bool]) -> HashMap<ValueId, ValueId> {
        let nodes = &self.graph.nodes;
        let mut shadows = HashMap::new();
        let mut updates: HashMap<ValueId, usize> = HashMap::new();
        for (index, node) in nodes.iter().enumerate() {
            for &param in node.op.updated() {
                updates.entry(param).or_insert(index);
            }
        }
        for (index, node) in nodes.iter().enumerate() {
            if !live[index] || node.op != Op::Cast(DType::F16) {
                continue;
            }
            let (param, copy) = (self.root(node.inputs[0]), node.outputs[0]);
            let value = &self.graph.values[param.0 as usize];
            let in_time = updates.get(&param).is_none_or(|&update| {
                let mut readers = self.readers(copy).iter();
                readers.all(|&reader| reader < update) && !self.outputs.contains(&copy)
            });
            if matches!(value.source, Source::Parameter(_))
                && shadow_fits(&value.shape, self.graph.shape(copy))
                && in_time
            {
                shadows.insert(copy, param);
            }
        }
        shadows
    }

    /// The value that holds the elements of `id`.
    pub fn root(&self, id: ValueId) -> ValueId {
        self.roots[id.0 as usize]
    }

    /// A reshape that moves nothing: no work, its result lies where its operand does.
    pub fn is_renaming(&self, index: usize) -> bool {
        self.graph.nodes[index].op == Op::Reshape && !self.moving[index]
    }

    fn is_elementwise(&self, index: usize) -> bool {
        let node = &self.graph.nodes[index];
        match &node.op {
            Op::Unary(_) | Op::Binary(..) | Op::Cast(_) | Op::Dropout { .. } => true,
            // Programs compute in f32.
            Op::Reshape => {
                let (from, to) = (node.inputs[0], node.outputs[0]);
                let (a, b) = (self.graph.shape(from), self.graph.shape(to));
                self.graph.dtype(from) != DType::U32 && a.rows() == b.rows() && a.cols() == b.cols()
            }
            _ => false,
        }
    }

    fn place(&mut self, index: usize, value: Option<usize>) {
        let node = &self.graph.nodes[index];
        let domain = node.outputs.first().map_or((0, 0), |&id| {
            let shape = self.graph.shape(id);
            (shape.rows(), shape.cols())
        });
        let elementwise = self.is_elementwise(index);
        let latest = node
            .inputs
            .iter()
            .filter_map(|&id| self.group_of[self.root(id).0 as usize])
            .max();
        let joined = latest
            .filter(|&group| elementwise && self.may_join(index, group, domain))
            .map(|group| (group, self.uses_with(group, index)))
            .filter(|(_, uses)| uses.bindings() <= MAX_BINDINGS);
        let group = match joined {
            Some((group, uses)) => {
                self.uses[group] = uses;
                group
            }
            None => {
                let group = self.groups.len();
                self.groups.push(Group {
                    anchor: (!elementwise).then_some(index),
                    value,
                    elementwise: Vec::new(),
                    domain,
                });
                self.uses.push(Uses::default());
                self.uses[group] = match elementwise {
                    true => self.uses_with(group, index),
                    false => self.uses_of_anchor(index),
                };
                group
            }
        };
        if elementwise {
            self.groups[group].elementwise.push(index);
            for &id in &node.inputs {
                let root = self.root(id).0 as usize;
                if self.group_of[root] == Some(group) {
                    self.outside[root] -= 1;
                }
            }
        }
        let value = value.map(|value| &self.graph.nodes[value]);
        for node in std::iter::once(node).chain(value) {
            for &id in &node.outputs {
                self.group_of[id.0 as usize] = Some(group);
            }
        }
    }

    /// Whether an elementwise node may become part of a group, if there are bindings for its operands.
    fn may_join(&self, index: usize, group: usize, domain: (usize, usize)) -> bool {
        let candidate = &self.groups[group];
        if candidate.domain != domain || candidate.elementwise.len() >= MOST_NODES {
            return false;
        }
        if let Some(start) = self.graph.recomputed.start_of_copies(index) {
            let first = candidate.anchor.or(candidate.elementwise.first().copied());
            if first.is_some_and(|first| first < start) {
                return false;
            }
        }
        let Some(anchor) = candidate.anchor else {
            return true;
        };
        let anchor = &self.graph.nodes[anchor];
        let node = &self.graph.nodes[index];
        let value = candidate.value.map(|value| &self.graph.nodes[value]);
        let side = value.into_iter().flat_map(|value| &value.outputs);
        let side: Vec<&ValueId> = anchor.outputs.iter().skip(1).chain(side).collect();
        let mut inputs = node.inputs.iter();
        let reads_side_result = inputs.any(|&id| side.contains(&&self.root(id)));
        takes_program(&anchor.op) && !reads_side_result
    }

    fn uses_of_anchor(&self, index: usize) -> Uses {
        let node = &self.graph.nodes[index];
        Uses {
            anchor: Some(node.inputs.len() + node.outputs.len().saturating_sub(1)),
            stored: node.outputs.first().map_or(0, |&id| self.stores(id)),
            reads: Vec::new(),
        }
    }

    /// What a group binds once an elementwise node is part of it, which must not read a side result of the group's anchor.
    fn uses_with(&self, group: usize, index: usize) -> Uses {
        let mut uses = self.uses[group].clone();
        let node = &self.graph.nodes[index];
        for (i, &id) in node.inputs.iter().enumerate() {
            let root = self.root(id);
            let at = root.0 as usize;
            if self.group_of[at] == Some(group) {
                let own = node.inputs.iter().map(|&id| self.root(id));
                let first = own.clone().position(|id| id == root) == Some(i);
                let last_reader = own.filter(|&id| id == root).count() == self.outside[at];
                if first && last_reader && !self.outputs.contains(&root) {
                    uses.stored -= 1;
                }
            } else if !matches!(self.graph.values[at].source, Source::Constant(_)) {
                let read = (root, node.op.broadcast_of(i));
                if !uses.reads.contains(&read) {
                    uses.reads.push(read);
                }
            }
        }
        uses.stored += node.outputs.first().map_or(0, |&id| self.stores(id));
        uses
    }

    /// 1 if a value is stored: if something outside its group, as far as that is known, reads it.
    fn stores(&self, id: ValueId) -> usize {
        usize::from(self.outputs.contains(&id) || self.outside[id.0 as usize] > 0)
    }

    /// Values of a group's program that something outside the group reads; the anchor's first result if nothing else.
    pub fn stored(&self, group: &Group) -> Vec<ValueId> {
        let nodes = group.anchor.iter().chain(&group.elementwise);
        let mut stored: Vec<ValueId> = nodes
            .filter_map(|&index| self.graph.nodes[index].outputs.first().copied())
            .filter(|&id| self.stores(id) > 0)
            .collect();
        if stored.is_empty()
            && let Some(anchor) = group.anchor
        {
            stored.extend(self.graph.nodes[anchor].outputs.first());
        }
        stored
    }

    /// Casts that are read from the session's shadows: by value, the parameter.
    pub fn shadows(&self) -> &HashMap<ValueId, ValueId> {
        &self.shadows
    }

    /// Live nodes that read a value.
    pub fn readers(&self, id: ValueId) -> &[usize] {
        &self.readers[id.0 as usize]
    }
}
