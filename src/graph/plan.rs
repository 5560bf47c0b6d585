//! Memory plan: which intermediate values share a buffer.

use std::collections::HashMap;
use std::fmt;

use super::lower::{Lowered, Place};
use super::{Graph, Source};
use crate::error::Result;
use crate::gpu::{Access, Layout};

/// What an executable needs on the device, known before anything is allocated.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Plan {
    /// Bytes of each buffer that intermediate values share in turn.
    pub slots: Vec<u64>,
    /// Bytes of the inputs.
    pub inputs: u64,
    /// Bytes of the parameters, as declared.
    pub parameters: u64,
    /// Most bytes of intermediate values that are alive at once: no plan needs less than this.
    pub lower_bound: u64,
    /// Number of intermediate values.
    pub values: usize,
    /// Dispatches of a run.
    pub dispatches: usize,
    /// By intermediate value: its slot.
    pub(super) slot_of: HashMap<Place, usize>,
}

impl Plan {
    /// Bytes of all slots together.
    #[must_use]
    pub fn intermediates(&self) -> u64 {
        self.slots.iter().sum()
    }
}

/// First and last step that touch a value.
struct Life {
    place: Place,
    bytes: u64,
    first: usize,
    last: usize,
}

/// Two values alive in the same step never share a buffer. Greedy, in order of birth: the smallest free slot that is large
/// enough, else the largest free one, grown.
pub(super) fn plan(graph: &Graph, lowered: &Lowered) -> Result<Plan> {
    let lives = lives(graph, lowered)?;
    let mut slots: Vec<u64> = Vec::new();
    let mut free_after: Vec<usize> = Vec::new();
    let mut slot_of = HashMap::new();
    for life in &lives {
        let free = (0..slots.len()).filter(|&slot| free_after[slot] < life.first);
        let (fitting, small): (Vec<usize>, Vec<usize>) =
            free.partition(|&slot| slots[slot] >= life.bytes);
        let chosen = match fitting.into_iter().min_by_key(|&slot| slots[slot]) {
            Some(slot) => Some(slot),
            None => small.into_iter().max_by_key(|&slot| slots[slot]),
        };
        let slot = chosen.unwrap_or_else(|| {
            slots.push(0);
            free_after.push(0);
            slots.len() - 1
        });
        slots[slot] = slots[slot].max(life.bytes);
        free_after[slot] = life.last;
        slot_of.insert(life.place, slot);
    }
    let steps = lowered.steps.len();
    let alive = |step: usize| {
        let now = lives.iter().filter(|l| l.first <= step && step <= l.last);
        now.map(|life| life.bytes).sum::<u64>()
    };
    let bytes_of = |wanted: fn(&Source) -> bool| -> Result<u64> {
        let values = graph.values().filter(|(_, value)| wanted(&value.source));
        values
            .map(|(_, value)| Ok(Layout::of(&value.shape, value.dtype)?.size_bytes()))
            .sum()
    };
    Ok(Plan {
        lower_bound: (0..steps).map(alive).max().unwrap_or(0),
        inputs: bytes_of(|source| matches!(source, Source::Input { .. }))?,
        parameters: bytes_of(|source| matches!(source, Source::Parameter(_)))?,
        values: lives.len(),
        dispatches: steps,
        slots,
        slot_of,
    })
}

/// Intermediate values in the order of their birth.
fn lives(graph: &Graph, lowered: &Lowered) -> Result<Vec<Life>> {
    let mut lives: Vec<Life> = Vec::new();
    let mut index: HashMap<Place, usize> = HashMap::new();
    for (step, work) in lowered.steps.iter().enumerate() {
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
                Place::Run(..) | Place::Part { .. } => false,
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
                lives.push(Life {
                    place,
                    bytes,
                    first: step,
                    last: step,
                });
                lives.len() - 1
            });
            lives[at].last = step;
        }
    }
    let outputs = graph.outputs().iter().map(|(_, id)| *id);
    let assigned = lowered.assigns.iter().map(|(value, _)| *value);
    for id in outputs.chain(assigned) {
        let root = lowered.roots[id.0 as usize];
        if let Some(&at) = index.get(&Place::Value(root)) {
            lives[at].last = usize::MAX;
        }
    }
    Ok(lives)
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        write!(
            f,
            "{} dispatches; {} intermediate values in {} buffers, {:.2} MiB (at least {:.2} MiB are alive at once); inputs {:.2} MiB, parameters {:.2} MiB",
            self.dispatches,
            self.values,
            self.slots.len(),
            mib(self.intermediates()),
            mib(self.lower_bound),
            mib(self.inputs),
            mib(self.parameters),
        )
    }
}
