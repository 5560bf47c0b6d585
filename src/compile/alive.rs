//! Whether a memory plan keeps values that are alive together apart, found by following the steps: a second opinion on `plan`, which reasons
//! with the first and last step of every value. Builds with debug assertions ask it about every plan of at most `MOST_CHECKED` steps.

use std::collections::HashSet;

use super::plan::Plan;
use super::steps::{Lowered, Place};
use crate::error::Result;
use crate::gpu::{Access, Layout};
use crate::graph::Graph;

/// The bytes of a slot that a place was last to claim.
#[derive(Clone, Copy, Debug)]
struct Claim {
    place: Place,
    slot: usize,
    from: u64,
    to: u64,
}

impl Claim {
    fn meets(&self, other: &Self) -> bool {
        self.slot == other.slot && self.from < other.to && other.from < self.to
    }
}

/// What is wrong with a plan, if anything is.
///
/// A place claims its bytes when a step binds it for the first time, and whoever held some of them loses its claim. It must hold all of them
/// in every later step that binds it, and outputs and values of states at the end. No step binds one slot for reading and for writing.
pub(super) fn fault(graph: &Graph, lowered: &Lowered, plan: &Plan) -> Result<Option<String>> {
    let mut known = HashSet::new();
    let mut held: Vec<Claim> = Vec::new();
    for (number, step) in lowered.steps.iter().enumerate() {
        let mut bound = Vec::new();
        for (&place, binding) in step.places.iter().zip(step.kernel.bindings()) {
            let (place, bytes) = match place {
                Place::Part { value, .. } => {
                    let value_of = graph.value(value)?;
                    let layout = Layout::of(&value_of.shape, value_of.dtype)?;
                    (Place::Value(value), layout.size_bytes())
                }
                place => (place, binding.layout.size_bytes()),
            };
            let Some(&(slot, from)) = plan.place_of.get(&place) else {
                continue;
            };
            let to = from + bytes;
            if plan.slots.get(slot).is_none_or(|&size| to > size) {
                return Ok(Some(format!("{place:?} ends behind slot {slot}")));
            }
            let claim = Claim {
                place,
                slot,
                from,
                to,
            };
            if known.insert(place) {
                held.retain(|other| !other.meets(&claim));
                held.push(claim);
            }
            bound.push((claim, binding.access));
        }
        for (claim, access) in &bound {
            if !held.iter().any(|other| other.place == claim.place) {
                return Ok(Some(format!("step {number}: {:?} is lost", claim.place)));
            }
            let mixed = |(other, of_other): &&(Claim, Access)| {
                other.slot == claim.slot && of_other != access && other.place != claim.place
            };
            if let Some((other, _)) = bound.iter().find(mixed) {
                let (one, two) = (claim.place, other.place);
                return Ok(Some(format!(
                    "step {number} reads and writes a slot: {one:?}, {two:?}"
                )));
            }
        }
    }
    let outputs = graph.outputs().iter().map(|(_, id)| *id);
    let assigned = lowered.assigns.iter().map(|(value, _)| *value);
    for id in outputs.chain(assigned) {
        let place = Place::Value(lowered.roots[id.0 as usize]);
        if known.contains(&place) && !held.iter().any(|other| other.place == place) {
            return Ok(Some(format!("{place:?} is lost before the end")));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compile::plan::lives;
    use crate::compile::{Table, compile};
    use crate::graph::ValueId;
    use crate::types::{DType, Trans, UnaryOp};
    use crate::{Gpu, GpuOptions};

    /// Two branches of products and their gradients.
    fn graph() -> Result<Graph> {
        let mut graph = Graph::new();
        let x = graph.input("x", &[5, 16], DType::F32)?;
        let w = graph.input("w", &[16, 16], DType::F32)?;
        let mut y = x;
        for _ in 0..3 {
            let branch = graph.matmul(y, w, Trans::NN)?;
            let branch = graph.unary(UnaryOp::Tanh, branch)?;
            let other = graph.softmax(y)?;
            y = graph.mul(branch, other)?;
        }
        let loss = graph.sum_all(y)?;
        let gradients: Vec<ValueId> = graph.gradients(loss, &[x, w])?;
        graph.output("y", y)?;
        graph.output("dx", gradients[0])?;
        graph.output("dw", gradients[1])?;
        Ok(graph)
    }

    /// Every value is moved to where each other one lies. That is a fault exactly if it meets a value there that lives at the same time.
    #[test]
    fn a_value_that_is_moved_onto_another_is_found() -> Result<()> {
        let graph = graph()?;
        let gpu = Gpu::new(&GpuOptions::from_env()?)?;
        let (lowered, plan) = compile(&graph, None, &Table::default(), gpu.capabilities())?;
        assert_eq!(fault(&graph, &lowered, &plan)?, None);
        let (places, items) = lives(&graph, &lowered)?;
        let (mut faults, mut fits) = (0, 0);
        for (i, item) in items.iter().enumerate() {
            for to in &places {
                let mut moved = plan.clone();
                let (slot, from) = plan.place_of[to];
                moved.place_of.insert(places[i], (slot, from));
                let end = from + item.bytes;
                let meets = |k: usize| {
                    let (other_slot, at) = plan.place_of[&places[k]];
                    let other = &items[k];
                    let together = item.first <= other.last && other.first <= item.last;
                    let shared = from < at + other.bytes && at < end;
                    let apart = item.apart.contains(&k) || other.apart.contains(&i);
                    k != i && slot == other_slot && (together && shared || apart)
                };
                let wanted = end > plan.slots[slot] || (0..items.len()).any(meets);
                let found = fault(&graph, &lowered, &moved)?;
                assert_eq!(
                    found.is_some(),
                    wanted,
                    "{:?} to {to:?}: {found:?}",
                    places[i]
                );
                faults += usize::from(wanted);
                fits += usize::from(!wanted);
            }
        }
        assert!(faults > 20 && fits > items.len(), "{faults} {fits}");
        Ok(())
    }
}
