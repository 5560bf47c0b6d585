//! From groups to kernels: the list of dispatches, each with the places it reads and writes.

use std::collections::HashMap;

use super::fuse::{Fused, Group};
use super::{Broadcast, DType, Graph, Node, Op, Shape, Source, ValueId, infer};
use crate::error::{Error, Result};
use crate::gpu::{Alignment, Layout};
use crate::kernels::{self, Instruction, Kernel, Operand, Program, Target};

/// What a binding of a dispatch refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Place {
    /// A value of the graph.
    Value(ValueId),
    /// Intermediate storage of one operation, by number.
    Scratch(usize),
    /// A run of an arena.
    Run(Arena, Run),
}

/// Which of the parallel arenas.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Arena {
    Parameters,
    Gradients,
    FirstMoments,
    SecondMoments,
}

/// A stretch of consecutive parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Run {
    /// Which block of parameters, see [`Session`](super::Session).
    pub block: usize,
    pub offset: u64,
    pub bytes: u64,
}

/// One dispatch. `places` are in binding order.
#[derive(Clone, Debug)]
pub(super) struct Step {
    pub kernel: Kernel,
    pub places: Vec<Place>,
}

/// Everything an executable is made from.
#[derive(Debug)]
pub(super) struct Lowered {
    pub steps: Vec<Step>,
    /// Gradients that live in the gradient arena, with their parameter.
    pub pinned: HashMap<ValueId, ValueId>,
    /// (value, state) to copy when the run ends.
    pub assigns: Vec<(ValueId, ValueId)>,
    /// Reshapes resolved: by value, the value that holds its elements.
    pub roots: Vec<ValueId>,
}

/// Where the session keeps parameters.
pub(super) trait Arenas {
    /// The run of one parameter.
    fn run(&self, parameter: ValueId) -> Result<Run>;
}

pub(super) fn lower(
    graph: &Graph,
    target: Target,
    arenas: &dyn Arenas,
    max_binding: u64,
) -> Result<Lowered> {
    let fused = Fused::new(graph);
    let mut lowering = Lowering {
        pinned: pin(&fused)?,
        fused: &fused,
        target,
        arenas,
        max_binding,
        steps: Vec::new(),
        scratch: Vec::new(),
        constants: HashMap::new(),
        assigns: Vec::new(),
    };
    for group in &fused.groups {
        lowering.group(group)?;
    }
    Ok(Lowered {
        steps: lowering.steps,
        pinned: lowering.pinned,
        assigns: lowering.assigns,
        roots: graph.values().map(|(id, _)| fused.root(id)).collect(),
    })
}

/// Gradients that only optimizers and norms read are computed straight into the gradient arena.
fn pin(fused: &Fused<'_>) -> Result<HashMap<ValueId, ValueId>> {
    let graph = fused.graph;
    let mut pinned = HashMap::new();
    for node in graph.nodes() {
        let Op::AdamW { params, .. } = &node.op else {
            continue;
        };
        for (&gradient, &param) in node.inputs.iter().zip(params) {
            let root = fused.root(gradient);
            let value = graph.value(root)?;
            let computed = matches!(value.source, Source::Node { .. });
            let readers = fused.readers(root);
            let for_optimizer = readers.iter().all(|&reader| {
                matches!(graph.nodes()[reader].op, Op::AdamW { .. } | Op::GlobalNorm)
            });
            let uses = node.inputs.iter().filter(|&&id| fused.root(id) == root);
            let layout = Layout::of(&value.shape, value.dtype)?;
            let same = layout == Layout::of(graph.shape(param), DType::F32)?;
            if computed && for_optimizer && uses.count() == 1 && same && !pinned.contains_key(&root)
            {
                pinned.insert(root, param);
            }
        }
    }
    Ok(pinned)
}

struct Lowering<'a> {
    fused: &'a Fused<'a>,
    target: Target,
    arenas: &'a dyn Arenas,
    max_binding: u64,
    steps: Vec<Step>,
    scratch: Vec<Layout>,
    pinned: HashMap<ValueId, ValueId>,
    /// Constants that had to be stored because something other than a program reads them.
    constants: HashMap<ValueId, Place>,
    assigns: Vec<(ValueId, ValueId)>,
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

    fn step(&mut self, kernel: Kernel, places: Vec<Place>) {
        self.steps.push(Step { kernel, places });
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
        self.fill(layout, number, place);
        self.constants.insert(root, place);
        Ok(place)
    }

    fn fill(&mut self, layout: Layout, number: f32, place: Place) {
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
        );
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
                // Registers are f32; a cast happens in the store.
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
            self.step(kernel, [loads, stores].concat());
            return Ok(());
        };
        let graph = self.fused.graph;
        let node = &graph.nodes()[anchor];
        if self.staged(node)? {
            return Ok(());
        }
        let (program, loads, stores) = self.program(group)?;
        let x = node.inputs.as_slice();
        let target = self.target;
        let reads = self.places(x)?;
        let mut side = Vec::new();
        let kernel = match &node.op {
            Op::MatMul { trans, .. } => {
                let [a, b] = self.layouts(x)?;
                let gemm = kernels::gemm::Gemm::new(a, b, *trans, program.width(), target)?;
                if gemm.splits == 1 {
                    gemm.single(program)
                } else {
                    let shape = Shape::matrix(gemm.splits * program.rows, program.cols);
                    let partial = Layout::of(&shape, DType::F32)?;
                    let place = self.scratch(partial);
                    self.step(gemm.partial(partial), vec![reads[0], reads[1], place]);
                    let kernel = gemm.add_up(partial, program);
                    self.step(kernel, [vec![place], loads, stores].concat());
                    return Ok(());
                }
            }
            Op::LayerNorm { eps } => {
                side.push(Place::Value(node.outputs[1]));
                let stats = self.layout(node.outputs[1])?;
                kernels::layer_norm::layer_norm(self.layouts(x)?, stats, *eps, program, target)
            }
            Op::LayerNormGrad => {
                kernels::layer_norm::layer_norm_grad(self.layouts(x)?, program, target)
            }
            Op::Im2col(window) => kernels::conv::im2col(self.layout(x[0])?, *window, program),
            Op::Col2im(window) => kernels::conv::col2im(self.layout(x[0])?, *window, program),
            Op::Gather { .. } => {
                let [table, ids] = self.layouts(x)?;
                kernels::embedding::gather(table, ids, program)
            }
            Op::SumGroups { period } => {
                kernels::reduce::group_sums(self.layout(x[0])?, *period, program)
            }
            Op::MaskedMean => {
                let [values, mask] = self.layouts(x)?;
                let period = graph.shape(x[0]).dims()[1];
                kernels::reduce::masked_mean(values, mask, period, program)
            }
            Op::MaskedMeanGrad { .. } => {
                let [dy, mask] = self.layouts(x)?;
                kernels::reduce::masked_mean_grad(dy, mask, program)
            }
            Op::KdLossGrad { alpha, beta } => {
                kernels::loss::kd_grad(self.layouts(x)?, [*alpha, *beta], program)
            }
            Op::CrossEntropyGrad { ignore, smoothing } => {
                kernels::loss::cross_entropy_grad(self.layouts(x)?, *ignore, *smoothing, program)
            }
            op => {
                return Err(Error::Graph(format!("{} has no kernel", infer::name(op))));
            }
        };
        self.step(kernel, [reads, loads, side, stores].concat());
        Ok(())
    }

    /// Operations that take several dispatches or no program; false for all others.
    fn staged(&mut self, node: &Node) -> Result<bool> {
        let x = node.inputs.as_slice();
        let target = self.target;
        match &node.op {
            Op::SumRows => {
                let input = self.layout(x[0])?;
                let from = self.place(x[0])?;
                self.sum_rows(input, from, node.outputs[0])?;
            }
            Op::SumCols => {
                let (input, output) = (self.layout(x[0])?, self.layout(node.outputs[0])?);
                let from = self.place(x[0])?;
                let kernel = kernels::reduce::row_sums(input, output, target);
                self.step(kernel, vec![from, Place::Value(node.outputs[0])]);
            }
            Op::SumAll => {
                let (input, output) = (self.layout(x[0])?, self.layout(node.outputs[0])?);
                let from = self.place(x[0])?;
                let sums = Self::vector(input.rows(), DType::F32)?;
                let place = self.scratch(sums);
                let rows = kernels::reduce::row_sums(input, sums, target);
                self.step(rows, vec![from, place]);
                let total = kernels::reduce::total(sums, output, false, target);
                self.step(total, vec![place, Place::Value(node.outputs[0])]);
            }
            Op::LayerNormParamGrad => self.layer_norm_params(node)?,
            Op::GatherGrad { padding, .. } => {
                let (ids, dy) = (self.layout(x[0])?, self.layout(x[1])?);
                let table = self.layout(node.outputs[0])?;
                let result = Place::Value(node.outputs[0]);
                let links = Self::vector(2 * ids.cols(), DType::U32)?;
                let chain = self.scratch(links);
                let reads = self.places(x)?;
                self.fill(table, 0.0, result);
                let kernel = kernels::embedding::links(ids, links, *padding);
                self.step(kernel, vec![reads[0], chain]);
                let kernel = kernels::embedding::gather_grad([ids, links, dy], table);
                self.step(kernel, vec![reads[0], chain, reads[1], result]);
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
                self.step(kernels::reduce::stack(&layouts, output), places);
            }
            Op::KdLoss { alpha, beta } => {
                let [y, t] = self.layouts(x)?;
                let [loss, cosine, mse, rows] = self.layouts(&node.outputs)?;
                let out: Vec<Place> = node.outputs.iter().map(|&id| Place::Value(id)).collect();
                let mut places = self.places(x)?;
                places.push(out[3]);
                self.step(kernels::loss::kd_rows(y, t, rows, target), places);
                let scalars = [loss, cosine, mse];
                let kernel =
                    kernels::loss::kd_total(rows, scalars, y.cols(), [*alpha, *beta], target);
                self.step(kernel, vec![out[3], out[0], out[1], out[2]]);
            }
            Op::CrossEntropy { ignore, smoothing } => {
                let [logits, targets] = self.layouts(x)?;
                let [loss, count, rows] = self.layouts(&node.outputs)?;
                let out: Vec<Place> = node.outputs.iter().map(|&id| Place::Value(id)).collect();
                let reads = self.places(x)?;
                let kernel = kernels::loss::cross_entropy_rows(
                    logits, targets, rows, *ignore, *smoothing, target,
                );
                self.step(kernel, vec![reads[0], reads[1], out[2]]);
                let kernel = kernels::loss::cross_entropy_total(
                    rows,
                    targets,
                    [loss, count],
                    logits.cols(),
                    *ignore,
                    target,
                );
                self.step(kernel, vec![out[2], reads[1], out[0], out[1]]);
            }
            Op::GlobalNorm => self.global_norm(node)?,
            Op::AdamW { .. } => self.adamw(node)?,
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

    fn sum_rows(&mut self, input: Layout, from: Place, to: ValueId) -> Result<()> {
        let output = self.layout(to)?;
        let chunks = kernels::reduce::chunks(input.rows());
        let to = Place::Value(to);
        if chunks == 1 {
            let kernel = kernels::reduce::column_sums(input, 0, input.rows(), output);
            self.step(kernel, vec![from, to]);
            return Ok(());
        }
        let partial = Layout::of(&Shape::matrix(chunks, input.cols()), DType::F32)?;
        let place = self.scratch(partial);
        let kernel = kernels::reduce::column_sums(input, 0, input.rows(), partial);
        self.step(kernel, vec![from, place]);
        let kernel = kernels::reduce::column_sums(partial, 0, chunks, output);
        self.step(kernel, vec![place, to]);
        Ok(())
    }

    fn layer_norm_params(&mut self, node: &Node) -> Result<()> {
        let [x, stats, dy] = self.layouts(&node.inputs)?;
        let reads = self.places(&node.inputs)?;
        let chunks = kernels::reduce::chunks(x.rows());
        let partial = Layout::of(&Shape::matrix(2 * chunks, x.cols()), DType::F32)?;
        let place = self.scratch(partial);
        let kernel = kernels::reduce::layer_norm_param_sums([dy, x, stats], partial);
        self.step(kernel, vec![reads[2], reads[0], reads[1], place]);
        for (output, first) in [(0, chunks), (1, 0)] {
            let id = node.outputs[output];
            if self.fused.readers(id).is_empty() && !self.is_output(id) {
                continue;
            }
            let layout = self.layout(id)?;
            let kernel = kernels::reduce::column_sums(partial, first, chunks, layout);
            self.step(kernel, vec![place, Place::Value(id)]);
        }
        Ok(())
    }

    fn is_output(&self, id: ValueId) -> bool {
        let mut outputs = self.graph().outputs().iter();
        outputs.any(|(_, output)| self.fused.root(*output) == id)
    }

    /// Runs of the arena that cover the pinned gradients of `ids`, merged where they touch; and the other gradients.
    fn runs(&self, ids: &[ValueId], params: Option<&[ValueId]>) -> Result<(Vec<Run>, Vec<usize>)> {
        let mut runs: Vec<Run> = Vec::new();
        let mut rest = Vec::new();
        for (i, &id) in ids.iter().enumerate() {
            match self.pinned.get(&self.fused.root(id)) {
                Some(&param) if params.is_none_or(|params| params[i] == param) => {
                    runs.push(self.arenas.run(param)?);
                }
                _ => rest.push(i),
            }
        }
        runs.sort_by_key(|run| (run.block, run.offset));
        let mut merged: Vec<Run> = Vec::new();
        for run in runs {
            match merged.last_mut() {
                Some(last)
                    if last.block == run.block
                        && last.offset + last.bytes == run.offset
                        && last.bytes + run.bytes <= self.max_binding =>
                {
                    last.bytes += run.bytes;
                }
                _ => merged.push(run),
            }
        }
        Ok((merged, rest))
    }

    fn global_norm(&mut self, node: &Node) -> Result<()> {
        let (runs, rest) = self.runs(&node.inputs, None)?;
        let mut sources = Vec::new();
        for run in runs {
            let layout = Self::vector(run.bytes as usize / 4, DType::F32)?;
            sources.push((layout, Place::Run(Arena::Gradients, run)));
        }
        for i in rest {
            let layout = self.layout(node.inputs[i])?;
            // Padding is zero, so rows and padding may be read as one vector.
            let flat = Self::vector(layout.size_bytes() as usize / 4, DType::F32)?;
            sources.push((flat, self.place(node.inputs[i])?));
        }
        let parts: usize = sources
            .iter()
            .map(|(layout, _)| kernels::optimizer::norm_parts(layout.row_stride()))
            .sum();
        let partial = Self::vector(parts, DType::F32)?;
        let place = self.scratch(partial);
        let mut first = 0;
        for (layout, source) in sources {
            let kernel = kernels::optimizer::norm_partial(layout, partial, first, self.target);
            self.step(kernel, vec![source, place]);
            first += kernels::optimizer::norm_parts(layout.row_stride());
        }
        let output = self.layout(node.outputs[0])?;
        let kernel = kernels::reduce::total(partial, output, true, self.target);
        self.step(kernel, vec![place, Place::Value(node.outputs[0])]);
        Ok(())
    }

    fn adamw(&mut self, node: &Node) -> Result<()> {
        let Op::AdamW {
            params,
            beta1,
            beta2,
            eps,
            weight_decay,
        } = &node.op
        else {
            return Ok(());
        };
        let options = kernels::optimizer::AdamW {
            beta1: *beta1,
            beta2: *beta2,
            eps: *eps,
            weight_decay: *weight_decay,
        };
        let gradients = &node.inputs[..params.len()];
        let hyper = node.inputs[params.len()];
        let (hyper_layout, hyper) = (self.layout(hyper)?, self.place(hyper)?);
        let (runs, rest) = self.runs(gradients, Some(params))?;
        let mut work: Vec<(Run, Place)> = runs
            .into_iter()
            .map(|run| (run, Place::Run(Arena::Gradients, run)))
            .collect();
        for i in rest {
            let run = self.arenas.run(params[i])?;
            // Without the gap behind the parameter, which the gradient's own buffer does not have.
            let bytes = self.layout(params[i])?.size_bytes();
            let source = self.place(gradients[i])?;
            work.push((Run { bytes, ..run }, source));
        }
        for (run, gradient) in work {
            let layout = Self::vector(run.bytes as usize / 4, DType::F32)?;
            let kernel = kernels::optimizer::adamw(layout, hyper_layout, options);
            let arena = |arena| Place::Run(arena, run);
            let places = vec![
                gradient,
                hyper,
                arena(Arena::Parameters),
                arena(Arena::FirstMoments),
                arena(Arena::SecondMoments),
            ];
            self.step(kernel, places);
        }
        Ok(())
    }
}
