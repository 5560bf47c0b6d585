//! The device buffers of one executable: which place of a dispatch lies where.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use super::bound::{BoundKernel, Input};
use super::parameters::Parameters;
use crate::compile::{Arena, Arenas, Lowered, Place, Plan, Table};
use crate::error::{Error, Result};
use crate::gpu::{Buffer, BufferSlice, Gpu, IN_FLIGHT, Layout, OFFSET_ALIGNMENT, Tensor};
use crate::graph::{Graph, Source, ValueId};
use crate::kernels::{self, Target};
use crate::runtime::shadow::ShadowUse;

/// Buffers of one executable.
pub(crate) struct Memory<'a> {
    parameters: &'a Parameters,
    table: Table,
    inputs: HashMap<ValueId, Tensor>,
    /// When inputs are read in place: one buffer of all inputs per run in flight. `inputs` lie in the first.
    in_place: Vec<Buffer>,
    gradients: HashMap<usize, Buffer>,
    /// Blocks whose f16 copy is read.
    shadows: BTreeSet<usize>,
    slots: Vec<Buffer>,
    /// Names of states by value.
    states: HashMap<ValueId, String>,
    lowered: &'a Lowered,
    plan: &'a Plan,
}

impl<'a> Memory<'a> {
    pub(crate) fn new(
        parameters: &'a Parameters,
        graph: &Graph,
        lowered: &'a Lowered,
        plan: &'a Plan,
        table: Table,
    ) -> Result<Self> {
        let gpu = parameters.gpu();
        let (inputs, in_place) = inputs(gpu, graph, plan)?;
        let states = graph
            .values()
            .filter(|(_, value)| matches!(value.source, Source::State(_)))
            .map(|(id, value)| (id, value.name.clone()))
            .collect();
        let mut gradients = HashMap::new();
        for &(arena, param) in lowered.pinned.values() {
            if arena != Arena::Gradients {
                continue;
            }
            let block = table.span(param)?.block;
            if let Entry::Vacant(entry) = gradients.entry(block) {
                let bytes = parameters.block(block).bytes;
                // Zeroed: the gaps between parameters are part of the norm.
                entry.insert(gpu.zeroed_buffer(bytes, "gradients")?);
            }
        }
        let shadows = lowered.shadows.values();
        let shadows = shadows
            .map(|&param| Ok(table.span(param)?.block))
            .collect::<Result<_>>()?;
        let slots = plan
            .slots
            .iter()
            .map(|&bytes| gpu.buffer(bytes, "intermediate"))
            .collect::<Result<_>>()?;
        Ok(Self {
            parameters,
            table,
            inputs,
            in_place,
            gradients,
            shadows,
            slots,
            states,
            lowered,
            plan,
        })
    }

    pub(crate) fn in_place(&self) -> &[Buffer] {
        &self.in_place
    }

    /// What a dispatch binds: once, or once per run in flight if it reads inputs in place.
    pub(crate) fn turns(&self, slices: Vec<BufferSlice>) -> Result<Vec<Vec<BufferSlice>>> {
        let first = self.in_place.first().map(Buffer::id);
        if !slices
            .iter()
            .any(|slice| Some(slice.buffer().id()) == first)
        {
            return Ok(vec![slices]);
        }
        let of = |buffer: &Buffer| {
            let slices = slices
                .iter()
                .map(|slice| match Some(slice.buffer().id()) == first {
                    true => buffer.slice(slice.offset(), slice.size()),
                    false => Ok(slice.clone()),
                });
            slices.collect()
        };
        self.in_place.iter().map(of).collect()
    }

    pub(crate) fn slice(&self, place: Place, bytes: u64) -> Result<BufferSlice> {
        if let Place::Part {
            value,
            offset,
            bytes,
        } = place
        {
            let whole = self.slice(Place::Value(value), offset + bytes)?;
            return whole.buffer().slice(whole.offset() + offset, bytes);
        }
        if let Some(&(slot, offset)) = self.plan.place_of.get(&place) {
            return self.slots[slot].slice(offset, bytes);
        }
        let (arena, span) = match place {
            Place::Span(arena, span) => (arena, span),
            Place::Value(id) => {
                if let Some(tensor) = self.inputs.get(&id) {
                    return Ok(tensor.slice().clone());
                }
                if let Some(name) = self.states.get(&id) {
                    return self.parameters.state(name);
                }
                if let Some(&(arena, param)) = self.lowered.pinned.get(&id) {
                    (arena, self.table.span(param)?)
                } else if let Some(&param) = self.lowered.shadows.get(&id) {
                    (Arena::Shadows, self.table.span(param)?)
                } else {
                    (Arena::Parameters, self.table.span(id)?)
                }
            }
            // Parts were taken from their value above.
            Place::Part { .. } => return Err(Error::Graph("a part of a part".into())),
            Place::Scratch(number) => {
                return Err(Error::Graph(format!("scratch {number} was not planned")));
            }
        };
        let buffer = match arena {
            Arena::Gradients => self.gradients.get(&span.block),
            _ => self.parameters.block(span.block).arena(arena),
        };
        let missing = || Error::Graph("an arena is used before it is allocated".into());
        let buffer = buffer.ok_or_else(missing)?;
        buffer.slice(span.offset_in(arena), bytes)
    }

    pub(crate) fn shadow_use(&self, graph: &Graph, target: Target) -> Result<ShadowUse> {
        let gpu = self.parameters.gpu();
        let mut reads = Vec::new();
        for &block in &self.shadows {
            let block_of = self.parameters.block(block);
            let arenas = [Arena::Parameters, Arena::Shadows];
            let arenas = arenas.iter().filter_map(|&arena| block_of.arena(arena));
            let slices: Vec<BufferSlice> = arenas.map(Buffer::whole).collect();
            let kernel = kernels::optimizer::shadow(block_of.bytes as usize / 4, target)?;
            reads.push((block, BoundKernel::new(gpu, target, &kernel, &[slices])?));
        }
        let mut outdates = Vec::new();
        for param in graph.nodes().iter().flat_map(|node| node.op.updated()) {
            let block = self.table.span(*param)?.block;
            if !self.shadows.contains(&block) && !outdates.contains(&block) {
                outdates.push(block);
            }
        }
        Ok(ShadowUse {
            shadows: Arc::clone(self.parameters.shadows()),
            reads,
            outdates,
        })
    }

    /// In the order of their declaration.
    pub(crate) fn inputs(&self, graph: &Graph) -> Vec<Input> {
        let mut inputs = Vec::new();
        let wanted = graph.wanted();
        for (id, value) in graph.values() {
            if let (Source::Input { below }, Some(tensor)) = (&value.source, self.inputs.get(&id)) {
                inputs.push(Input {
                    name: value.name.clone(),
                    shape: value.shape.clone(),
                    tensor: tensor.clone(),
                    below: *below,
                    is_read: wanted[id.index()],
                });
            }
        }
        inputs
    }

    pub(crate) fn intermediates(&self, graph: &Graph) -> Result<Vec<BufferSlice>> {
        let mut slices: Vec<BufferSlice> = self.slots.iter().map(Buffer::whole).collect();
        let pinned = self.lowered.pinned.iter();
        let computed = pinned.filter(|(_, (arena, _))| *arena == Arena::Gradients);
        for (&gradient, _) in computed {
            let value = graph.value(gradient)?;
            let bytes = Layout::of(&value.shape, value.dtype)?.size_bytes();
            slices.push(self.slice(Place::Value(gradient), bytes)?);
        }
        Ok(slices)
    }
}

/// The tensors of the inputs, and the buffers of inputs that are read in place, one per run in flight.
///
/// Inputs lie side by side in one buffer, or each in a buffer of its own if one buffer cannot hold them.
fn inputs(
    gpu: &Gpu,
    graph: &Graph,
    plan: &Plan,
) -> Result<(HashMap<ValueId, Tensor>, Vec<Buffer>)> {
    let mut bytes = 0;
    let mut places = Vec::new();
    let mut inputs = HashMap::new();
    for (id, value) in graph.values() {
        if let Source::Input { .. } = value.source {
            let layout = Layout::of(&value.shape, value.dtype)?;
            if !plan.inputs_together {
                inputs.insert(id, Tensor::zeroed(gpu, layout)?);
                continue;
            }
            places.push((id, layout, bytes));
            bytes += layout.size_bytes().next_multiple_of(OFFSET_ALIGNMENT);
        }
    }
    if places.is_empty() {
        return Ok((inputs, Vec::new()));
    }
    let buffers: Vec<Buffer> = match plan.inputs_in_place {
        true => (0..IN_FLIGHT)
            .map(|_| gpu.writable_buffer(bytes, "inputs"))
            .collect::<Result<_>>()?,
        false => vec![gpu.zeroed_buffer(bytes, "inputs")?],
    };
    for (id, layout, offset) in places {
        let slice = buffers[0].slice(offset, layout.size_bytes())?;
        inputs.insert(id, Tensor::from_slice(slice, layout)?);
    }
    let in_place = match plan.inputs_in_place {
        true => buffers,
        false => Vec::new(),
    };
    Ok((inputs, in_place))
}
