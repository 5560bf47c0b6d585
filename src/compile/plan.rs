//! The memory plan: everything that an executable needs on the device, known before anything is allocated.

use std::collections::HashMap;
use std::fmt;

use super::table::Table;
use crate::compile::pack::{Item, pack};
use crate::compile::{Arena, Arenas, CORRECTION, Lowered, PAGE, Place};
use crate::error::Result;
use crate::gpu::{Access, Capabilities, IN_FLIGHT, Layout, OFFSET_ALIGNMENT};
use crate::graph::{Graph, Op, Source, ValueId};

/// What an executable needs on the device, known before anything is allocated.
///
/// Parameters, moments, f16 copies and states belong to the session, which allocates them once for all its graphs. They lie in
/// blocks, whose whole size counts here, with the gaps between parameters.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Plan {
    /// Bytes of each buffer that intermediate values share.
    pub slots: Vec<u64>,
    /// Bytes of the inputs. If kernels read them in place, those of all runs that may be under way count.
    pub inputs: u64,
    /// Whether kernels read inputs in the memory that the host writes, so that no run copies them. Needs an adapter that shares its memory
    /// with the host.
    pub inputs_in_place: bool,
    /// Bytes of the parameters of the session, those of its other graphs included.
    pub parameters: u64,
    /// Bytes of AdamW's moments and bias corrections, which the session keeps for all its parameters; zero for a graph that does not train.
    pub moments: u64,
    /// Bytes of the gradients that lie side by side in the order of the parameters. Other gradients are intermediate values.
    pub gradients: u64,
    /// Bytes of the gradients that the session accumulates over micro-batches, kept for all its parameters; zero for a graph that does not
    /// accumulate.
    pub accumulated: u64,
    /// Bytes of the parameters' f16 copies.
    pub shadows: u64,
    /// Bytes of the states.
    pub states: u64,
    /// Largest number of bytes of intermediate values that are alive at once. No plan needs less.
    pub lower_bound: u64,
    /// Number of intermediate values.
    pub values: usize,
    /// Number of dispatches of a run.
    pub dispatches: usize,
    /// Whether one buffer holds all inputs, one behind the other.
    pub(crate) inputs_together: bool,
    /// By intermediate value: its slot and offset.
    pub(crate) place_of: HashMap<Place, (usize, u64)>,
}

impl Plan {
    /// Bytes of all slots together.
    #[must_use]
    pub fn intermediates(&self) -> u64 {
        self.slots.iter().sum()
    }

    /// Bytes of everything on the device. All of it is allocated when the graph is compiled. The buffer pool may round each buffer up.
    #[must_use]
    pub fn peak(&self) -> u64 {
        let lasting =
            self.parameters + self.moments + self.accumulated + self.shadows + self.states;
        self.inputs + lasting + self.gradients + self.intermediates()
    }
}

/// Plans the memory of an executable.
///
/// Values that are alive in the same step never share bytes. A value that a step reads never lies in a buffer that the step writes.
pub(crate) fn plan(
    graph: &Graph,
    lowered: &Lowered,
    table: &Table,
    capabilities: &Capabilities,
) -> Result<Plan> {
    let limits = &capabilities.limits;
    let largest = limits
        .max_storage_buffer_binding_size
        .min(limits.max_buffer_size);
    let (places, items) = lives(graph, lowered)?;
    let steps = lowered.steps.len();
    let lower_bound = most_alive(&items, steps);
    let packing = pack(&items, largest, lower_bound);
    let bytes_of = |wanted: fn(&Source) -> bool| -> Result<Vec<u64>> {
        let values = graph.values().filter(|(_, value)| wanted(&value.source));
        values
            .map(|(_, value)| Ok(Layout::of(&value.shape, value.dtype)?.size_bytes()))
            .collect()
    };
    let blocks_of = |params: &mut dyn Iterator<Item = ValueId>| -> Result<u64> {
        let mut blocks: Vec<usize> = params
            .map(|param| Ok(table.span(param)?.block))
            .collect::<Result<_>>()?;
        blocks.sort_unstable();
        blocks.dedup();
        Ok(blocks
            .into_iter()
            .map(|block| table.block_bytes(block))
            .sum())
    };
    let pinned = |wanted: Arena| {
        let all = lowered.pinned.values();
        all.filter(move |(arena, _)| *arena == wanted)
            .map(|&(_, param)| param)
    };
    // The session keeps moments and sums for all its parameters once a graph needs any.
    let parameters = table.blocks.iter().sum();
    let any = |test: fn(&Op) -> bool| graph.nodes().iter().any(|node| test(&node.op));
    let trains = any(|op| !op.updated().is_empty());
    let accumulates = any(|op| !op.accumulated().is_empty());
    let inputs = bytes_of(|source| matches!(source, Source::Input { .. }))?;
    let aligned = inputs
        .iter()
        .map(|bytes| bytes.next_multiple_of(OFFSET_ALIGNMENT));
    let together: u64 = aligned.sum();
    let inputs_together = (1..=largest).contains(&together);
    let inputs_in_place = capabilities.mappable_storage && inputs_together;
    let runs = if inputs_in_place { IN_FLIGHT } else { 1 };
    Ok(Plan {
        inputs: match inputs_together {
            true => runs as u64 * together,
            false => inputs.iter().sum(),
        },
        inputs_together,
        inputs_in_place,
        parameters,
        moments: match trains {
            true => 2 * parameters + parameters / PAGE * CORRECTION,
            false => 0,
        },
        gradients: blocks_of(&mut pinned(Arena::Gradients))?,
        accumulated: if accumulates { parameters } else { 0 },
        shadows: blocks_of(&mut lowered.shadows.values().copied())? / 2,
        states: bytes_of(|source| matches!(source, Source::State(_)))?
            .iter()
            .sum(),
        lower_bound,
        values: items.len(),
        dispatches: steps,
        slots: packing.buffers,
        place_of: places.into_iter().zip(packing.places).collect(),
    })
}

/// Most bytes that are alive in one of the steps.
fn most_alive(items: &[Item], steps: usize) -> u64 {
    let mut born = vec![0; steps];
    let mut dead = vec![0; steps];
    for item in items {
        born[item.first] += item.bytes;
        if let Some(dead) = dead.get_mut(item.last) {
            *dead += item.bytes;
        }
    }
    let (mut alive, mut most) = (0_u64, 0);
    for (born, dead) in born.into_iter().zip(dead) {
        alive += born;
        most = most.max(alive);
        alive -= dead;
    }
    most
}

/// Intermediate values in the order of their birth, and what each needs.
pub(super) fn lives(graph: &Graph, lowered: &Lowered) -> Result<(Vec<Place>, Vec<Item>)> {
    let mut places: Vec<Place> = Vec::new();
    let mut items: Vec<Item> = Vec::new();
    let mut index: HashMap<Place, usize> = HashMap::new();
    for (step, work) in lowered.steps.iter().enumerate() {
        let (mut reads, mut writes) = (Vec::new(), Vec::new());
        for (&place, binding) in work.places.iter().zip(work.kernel.bindings()) {
            let (place, bytes) = match place {
                Place::Part { value, .. } => {
                    let whole = graph.value(value)?;
                    let layout = Layout::of(&whole.shape, whole.dtype)?;
                    (Place::Value(value), layout.size_bytes())
                }
                place => (place, binding.layout.size_bytes()),
            };
            let planned = match place {
                Place::Scratch(_) => true,
                Place::Span(..) | Place::Part { .. } => false,
                Place::Value(id) => {
                    let computed = matches!(graph.value(id)?.source, Source::Node { .. });
                    computed && !lowered.is_in_arena(id)
                }
            };
            if !planned {
                continue;
            }
            let at = *index.entry(place).or_insert_with(|| {
                debug_assert_eq!(binding.access, Access::ReadWrite, "written before read");
                places.push(place);
                items.push(Item {
                    bytes,
                    first: step,
                    last: step,
                    apart: Vec::new(),
                });
                items.len() - 1
            });
            items[at].last = step;
            match binding.access {
                Access::Read => reads.push(at),
                Access::ReadWrite => writes.push(at),
            }
        }
        for &write in &writes {
            for &read in reads.iter().filter(|&&read| read != write) {
                let apart = &mut items[read.max(write)].apart;
                let other = read.min(write);
                if !apart.contains(&other) {
                    apart.push(other);
                }
            }
        }
    }
    let outputs = graph.outputs().iter().map(|(_, id)| *id);
    let assigned = lowered.assigns.iter().map(|(value, _)| *value);
    for id in outputs.chain(assigned) {
        let root = lowered.roots[id.0 as usize];
        if let Some(&at) = index.get(&Place::Value(root)) {
            items[at].last = usize::MAX;
        }
    }
    Ok((places, items))
}

/// A number of bytes in the largest of the units B, KiB and MiB of which there is at least one.
pub(crate) fn size(bytes: u64) -> String {
    let kib = bytes as f64 / 1024.0;
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..1_048_576 => format!("{kib:.2} KiB"),
        _ => format!("{:.2} MiB", kib / 1024.0),
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} dispatches; {} intermediate values in {} buffers, {} (at least {} are alive at once); {} in all: inputs {}, parameters {}",
            self.dispatches,
            self.values,
            self.slots.len(),
            size(self.intermediates()),
            size(self.lower_bound),
            size(self.peak()),
            size(self.inputs),
            size(self.parameters),
        )?;
        let rest = [
            ("moments", self.moments),
            ("gradients", self.gradients),
            ("accumulated gradients", self.accumulated),
            ("f16 copies", self.shadows),
        ];
        for (name, bytes) in rest.into_iter().filter(|&(_, bytes)| bytes > 0) {
            write!(f, ", {name} {}", size(bytes))?;
        }
        Ok(())
    }
}
