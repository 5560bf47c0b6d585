//! From groups to kernels: the list of dispatches, each with the places it reads and writes.

mod arena;
mod attention;
mod conv;
mod gather;
mod groups;
mod linear_cross_entropy;
mod loss;
mod matmul;
mod parts;
mod staged;

use std::collections::HashMap;
use std::sync::Arc;

use self::matmul::ProductPlaces;
use self::parts::Parts;
use crate::compile::fuse::{Fused, Group};
use crate::compile::{Arena, Arenas, Lowered, Place, Step, Tuner};
use crate::error::{Error, Result};
use crate::gpu::{Alignment, Layout};
use crate::graph::{Graph, Op, Source, ValueId};
use crate::kernels::{self, Instruction, Kernel, Operand, Program, Target};
use crate::types::{Broadcast, DType};

/// `tuner`: chooses kernels by measuring them; without it the built-in rules choose.
pub(crate) fn lower(
    graph: &Graph,
    tuner: Option<&dyn Tuner>,
    target: Target,
    arenas: &dyn Arenas,
    max_binding: u64,
) -> Result<Lowered> {
    let fused = Fused::new(graph);
    let mut lowering = Lowering {
        pinned: arena::pin(&fused)?,
        fused: &fused,
        tuner,
        target,
        arenas,
        max_binding,
        steps: Vec::new(),
        scratch: Vec::new(),
        parts: Vec::new(),
        constants: HashMap::new(),
        assigns: Vec::new(),
        layer: None,
        renamed: HashMap::new(),
    };
    for group in &fused.groups {
        let named = group.anchor.or(group.elementwise.first().copied());
        lowering.layer = named.and_then(|index| graph.nodes()[index].scope.clone());
        lowering.group(group)?;
    }
    lowering.layer = None;
    lowering.add_up()?;
    lowering.clear_accumulated()?;
    let renamed = lowering.renamed;
    let home = |mut id: ValueId| {
        while let Some(&other) = renamed.get(&id) {
            id = other;
        }
        id
    };
    for place in lowering.steps.iter_mut().flat_map(|step| &mut step.places) {
        if let Place::Value(value) | Place::Part { value, .. } = place {
            *value = home(*value);
        }
    }
    let assigns = lowering.assigns.into_iter();
    Ok(Lowered {
        steps: lowering.steps,
        pinned: lowering.pinned,
        shadows: fused.shadows().clone(),
        assigns: assigns.map(|(id, state)| (home(id), state)).collect(),
        roots: graph.values().map(|(id, _)| home(fused.root(id))).collect(),
    })
}

/// A matrix and where it stands.
type At = (Layout, Place);

struct Lowering<'a> {
    fused: &'a Fused<'a>,
    tuner: Option<&'a dyn Tuner>,
    target: Target,
    arenas: &'a dyn Arenas,
    max_binding: u64,
    steps: Vec<Step>,
    scratch: Vec<Layout>,
    parts: Vec<Parts>,
    pinned: HashMap<ValueId, (Arena, ValueId)>,
    /// Constants that had to be stored because something other than a program reads them.
    constants: HashMap<ValueId, Place>,
    assigns: Vec<(ValueId, ValueId)>,
    /// The layer of the group that is lowered.
    layer: Option<Arc<str>>,
    /// Values that take the place of another, by which they are known in the steps.
    renamed: HashMap<ValueId, ValueId>,
}

impl Lowering<'_> {
    fn graph(&self) -> &Graph {
        self.fused.graph
    }

    fn layout(&self, id: ValueId) -> Result<Layout> {
        let value = self.graph().value(self.fused.root(id))?;
        Layout::of(&value.shape, value.dtype)
    }

    fn vector(n: usize, dtype: DType) -> Result<Layout> {
        Layout::new(1, n, dtype, Alignment::Bytes16)
    }

    fn scratch(&mut self, layout: Layout) -> Place {
        self.scratch.push(layout);
        Place::Scratch(self.scratch.len() - 1)
    }

    /// The next dispatch, behind the sums that it needs.
    fn step(&mut self, kernel: Kernel, places: Vec<Place>) -> Result<()> {
        for &place in &places {
            self.settle(place)?;
        }
        self.push(kernel, places);
        Ok(())
    }

    fn push(&mut self, kernel: Kernel, places: Vec<Place>) {
        let layer = self.layer.clone();
        self.steps.push(Step {
            kernel,
            places,
            layer,
        });
    }

    /// Where an operand of an anchor lies.
    fn place(&mut self, id: ValueId) -> Result<Place> {
        let root = self.fused.root(id);
        let Source::Constant(number) = self.graph().value(root)?.source else {
            return Ok(Place::Value(root));
        };
        if let Some(&place) = self.constants.get(&root) {
            return Ok(place);
        }
        let layout = self.layout(root)?;
        let place = self.scratch(layout);
        self.fill(layout, number, place)?;
        self.constants.insert(root, place);
        Ok(place)
    }

    fn fill(&mut self, layout: Layout, number: f32, place: Place) -> Result<()> {
        let program = Program {
            rows: layout.rows(),
            cols: layout.cols(),
            operands: Vec::new(),
            instructions: vec![Instruction::Constant(number)],
            results: vec![(0, layout)],
        };
        self.step(
            kernels::elementwise::elementwise(program, self.target),
            vec![place],
        )
    }

    fn places(&mut self, ids: &[ValueId]) -> Result<Vec<Place>> {
        ids.iter().map(|&id| self.place(id)).collect()
    }

    fn layouts<const N: usize>(&self, ids: &[ValueId]) -> Result<[Layout; N]> {
        let layouts: Vec<Layout> = ids
            .iter()
            .map(|&id| self.layout(id))
            .collect::<Result<_>>()?;
        layouts
            .try_into()
            .map_err(|_| Error::Graph("an operation has the wrong number of operands".into()))
    }

    /// The program of a group, the values it loads and the values it stores.
    fn program(&self, group: &Group) -> Result<(Program, Vec<Place>, Vec<Place>)> {
        let graph = self.graph();
        let mut instructions = Vec::new();
        let mut registers: HashMap<ValueId, usize> = HashMap::new();
        let mut loads: Vec<(ValueId, Broadcast)> = Vec::new();
        let mut operands = Vec::new();
        if let Some(anchor) = group.anchor {
            instructions.push(Instruction::Sum);
            registers.insert(graph.nodes()[anchor].outputs[0], 0);
        }
        for &index in &group.elementwise {
            let node = &graph.nodes()[index];
            let mut inputs = Vec::new();
            for (i, &id) in node.inputs.iter().enumerate() {
                let root = self.fused.root(id);
                let broadcast = node.op.broadcast_of(i);
                // A value of the same group has the group's rows and columns, where every broadcast is the identity.
                let register = if let Some(&register) = registers.get(&root) {
                    register
                } else if let Source::Constant(number) = graph.value(root)?.source {
                    instructions.push(Instruction::Constant(number));
                    instructions.len() - 1
                } else {
                    let known = loads.iter().position(|load| *load == (root, broadcast));
                    let number = match known {
                        Some(number) => number,
                        None => {
                            let layout = self.layout(root)?;
                            operands.push(Operand { layout, broadcast });
                            loads.push((root, broadcast));
                            loads.len() - 1
                        }
                    };
                    instructions.push(Instruction::Load(number));
                    instructions.len() - 1
                };
                inputs.push(register);
            }
            let register = match &node.op {
                Op::Unary(op) => {
                    instructions.push(Instruction::Unary(*op, inputs[0]));
                    instructions.len() - 1
                }
                Op::Binary(op, _) => {
                    instructions.push(Instruction::Binary(*op, inputs[0], inputs[1]));
                    instructions.len() - 1
                }
                &Op::Dropout { rate, stream } => {
                    let [x, counter] = [inputs[0], inputs[1]];
                    let draw = kernels::Dropout { rate, stream };
                    instructions.push(Instruction::Dropout(draw, x, counter));
                    instructions.len() - 1
                }
                // Registers are f32: a cast happens in the store, and a reshape that keeps rows and columns is a copy.
                _ => inputs[0],
            };
            registers.insert(node.outputs[0], register);
        }
        let stored = self.fused.stored(group);
        let results = stored
            .iter()
            .map(|id| Ok((registers[id], self.layout(*id)?)))
            .collect::<Result<_>>()?;
        let program = Program {
            rows: group.domain.0,
            cols: group.domain.1,
            operands,
            instructions,
            results,
        };
        let loads = loads.into_iter().map(|(id, _)| Place::Value(id)).collect();
        let stores = stored.into_iter().map(Place::Value).collect();
        Ok((program, loads, stores))
    }

    fn group(&mut self, group: &Group) -> Result<()> {
        let Some(anchor) = group.anchor else {
            let (program, loads, stores) = self.program(group)?;
            let kernel = kernels::elementwise::elementwise(program, self.target);
            self.step(kernel, [loads, stores].concat())?;
            return Ok(());
        };
        let graph = self.fused.graph;
        let node = &graph.nodes()[anchor];
        let value = group.value.map(|value| &graph.nodes()[value]);
        if self.staged(node, value)? {
            return Ok(());
        }
        let (program, loads, stores) = self.program(group)?;
        let x = node.inputs.as_slice();
        let target = self.target;
        let reads = self.places(x)?;
        let mut side = Vec::new();
        let kernel = match &node.op {
            Op::MatMul { batch, trans, .. } => {
                let ab = self.layouts(x)?;
                let width = program.width();
                let gemm = kernels::gemm::Gemm::batched(*batch, ab, *trans, width, target);
                let ab = [reads[0], reads[1]];
                return self.matmul(gemm, &program, &ProductPlaces { ab, loads, stores });
            }
            op @ (Op::Conv { .. } | Op::ConvGradInput { .. } | Op::ConvGradWeight { .. }) => {
                let layouts = self.layouts(x)?;
                let ab = [reads[0], reads[1]];
                return self.conv(op, layouts, program, ProductPlaces { ab, loads, stores });
            }
            Op::LayerNorm { eps } => {
                side.push(Place::Value(node.outputs[1]));
                let stats = self.layout(node.outputs[1])?;
                kernels::layer_norm::layer_norm(self.layouts(x)?, stats, *eps, program, target)
            }
            Op::LayerNormGrad => {
                kernels::layer_norm::layer_norm_grad(self.layouts(x)?, program, target)
            }
            Op::Softmax { log } => {
                kernels::softmax::softmax(self.layout(x[0])?, *log, program, target)
            }
            Op::SoftmaxGrad { log } => {
                kernels::softmax::softmax_grad(self.layouts(x)?, *log, program, target)
            }
            Op::Attention(_) | Op::CrossAttention(_) => {
                side.push(Place::Value(node.outputs[1]));
                self.attention(node, program)?
            }
            Op::Im2col(window) => kernels::conv::im2col(self.layout(x[0])?, *window, program),
            Op::Col2im(window) => kernels::conv::col2im(self.layout(x[0])?, *window, program),
            Op::Gather { .. } => {
                let [table, ids] = self.layouts(x)?;
                kernels::embedding::gather(table, ids, program)
            }
            Op::SumGroups { period } => {
                let x = (self.layout(x[0])?, reads[0]);
                let rest = [loads, stores].concat();
                return self.group_sums(x, *period, None, program, rest);
            }
            Op::MaskedMean => {
                let period = graph.shape(x[0]).dims()[1];
                let [x, mask] = self.layouts(x)?;
                let (x, mask) = ((x, reads[0]), (mask, reads[1]));
                let rest = [loads, stores].concat();
                return self.group_sums(x, period, Some(mask), program, rest);
            }
            Op::MaskedMeanGrad { .. } => {
                let [dy, mask] = self.layouts(x)?;
                let (dy, mask) = ((dy, reads[0]), (mask, reads[1]));
                let rest = [loads, stores].concat();
                return self.masked_mean_grad(dy, mask, program, rest);
            }
            Op::KdLossGrad { alpha, beta } => {
                kernels::loss::kd_grad(self.layouts(x)?, [*alpha, *beta], program)
            }
            Op::CrossEntropyGrad { ignore, smoothing } => {
                let (ignore, smoothing) = (*ignore, *smoothing);
                let entropy = kernels::loss::CrossEntropyKernel { ignore, smoothing };
                if let Some(value) = value {
                    let (nodes, operands) = ([value, node], [loads, stores]);
                    return self.cross_entropy_with_gradient(entropy, nodes, program, operands);
                }
                entropy.grad(self.layouts(x)?, program)
            }
            op => {
                return Err(Error::Graph(format!("{} has no kernel", op.name())));
            }
        };
        self.step(kernel, [reads, loads, side, stores].concat())?;
        Ok(())
    }
}
