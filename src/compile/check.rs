//! What the adapter refuses, found before anything is allocated: kernels, bindings and buffers against the device's limits.

use super::plan::Plan;
use super::steps::{Arena, Lowered, Place};
use crate::error::{Error, Result};
use crate::gpu::Layout;
use crate::graph::{Graph, Source, ValueId};

/// Fails where a dispatch, a binding or a buffer of the executable exceeds a limit of the device, and where an output is not a result
/// of the run.
///
/// The error names the value or kernel, what it needs and what the device has.
pub(crate) fn check(
    graph: &Graph,
    lowered: &Lowered,
    plan: &Plan,
    limits: &wgpu::Limits,
) -> Result<()> {
    check_outputs(graph, lowered)?;
    for step in &lowered.steps {
        let bindings = step.kernel.bindings();
        within(
            || format!("kernel {:?}", step.kernel.name()),
            "max_storage_buffers_per_shader_stage",
            bindings.len() as u64,
            u64::from(limits.max_storage_buffers_per_shader_stage),
        )?;
        for (&place, binding) in step.places.iter().zip(&bindings) {
            let bytes = match place {
                Place::Part { bytes, .. } => bytes,
                _ => binding.layout.size_bytes(),
            };
            let user = || {
                let of = describe(graph, place);
                format!("{of} in kernel {:?}", step.kernel.name())
            };
            binds(user, bytes, limits)?;
        }
        let workgroups = step.kernel.workgroups();
        let most = workgroups.into_iter().max().unwrap_or(0);
        let what = || {
            let of = step.places.last();
            let of = of.map_or_else(String::new, |&place| {
                format!(" for {}", describe(graph, place))
            });
            let name = step.kernel.name();
            format!("a dispatch of kernel {name:?} in {workgroups:?} workgroups{of}")
        };
        within(
            what,
            "max_compute_workgroups_per_dimension",
            u64::from(most),
            u64::from(limits.max_compute_workgroups_per_dimension),
        )?;
    }
    check_buffers(graph, lowered, plan, limits)
}

fn check_outputs(graph: &Graph, lowered: &Lowered) -> Result<()> {
    for (name, id) in graph.outputs() {
        let root = lowered.roots[id.0 as usize];
        if let Source::Constant(_) = graph.value(root)?.source {
            return Err(Error::Graph(format!("output {name:?} is a constant")));
        }
        if let Some((Arena::Accumulated, _)) = lowered.pinned.get(&root) {
            return Err(Error::Graph(format!(
                "output {name:?} is an accumulated gradient, which is zero when the run ends: output a copy"
            )));
        }
    }
    Ok(())
}

fn check_buffers(
    graph: &Graph,
    lowered: &Lowered,
    plan: &Plan,
    limits: &wgpu::Limits,
) -> Result<()> {
    // Whatever no kernel reads is allocated nevertheless.
    for (id, value) in graph.values() {
        if matches!(value.source, Source::Node { .. } | Source::Constant(_)) {
            continue;
        }
        let bytes = Layout::of(&value.shape, value.dtype)?.size_bytes();
        binds(|| describe(graph, Place::Value(id)), bytes, limits)?;
    }
    for (slot, &bytes) in plan.slots.iter().enumerate() {
        let holder = || {
            let placed = plan.place_of.iter();
            let first = placed
                .filter(|(_, at)| **at == (slot, 0))
                .map(|(place, _)| *place);
            first
                .min_by_key(|place| describe(graph, *place))
                .map_or_else(
                    || "intermediate values".to_owned(),
                    |place| format!("the buffer of {}", describe(graph, place)),
                )
        };
        binds(holder, bytes, limits)?;
    }
    // Data travels through staging buffers that hold all inputs or all outputs.
    let staged = |ids: &mut dyn Iterator<Item = ValueId>| -> Result<u64> {
        ids.map(|id| {
            let value = graph.value(id)?;
            Ok(Layout::of(&value.shape, value.dtype)?.size_bytes())
        })
        .sum()
    };
    let inputs = graph
        .values()
        .filter(|(_, value)| matches!(value.source, Source::Input { .. }));
    let inputs = staged(&mut inputs.map(|(id, _)| id))?;
    let outputs = graph.outputs().iter();
    let outputs = staged(&mut outputs.map(|(_, id)| lowered.roots[id.0 as usize]))?;
    for (what, bytes) in [("all inputs", inputs), ("all outputs", outputs)] {
        within(
            || format!("the staging buffer of {what} together"),
            "max_buffer_size",
            bytes,
            limits.max_buffer_size,
        )?;
    }
    Ok(())
}

/// Fails where a buffer of so many bytes cannot be bound as a whole.
pub(crate) fn binds(what: impl Fn() -> String, bytes: u64, limits: &wgpu::Limits) -> Result<()> {
    let (binding, buffer) = (
        limits.max_storage_buffer_binding_size,
        limits.max_buffer_size,
    );
    within(&what, "max_storage_buffer_binding_size", bytes, binding)?;
    within(&what, "max_buffer_size", bytes, buffer)
}

fn within(
    what: impl FnOnce() -> String,
    limit: &'static str,
    needed: u64,
    available: u64,
) -> Result<()> {
    match needed <= available {
        true => Ok(()),
        false => Err(Error::Limit {
            what: what(),
            limit,
            needed,
            available,
        }),
    }
}

/// A place in words: its name or operation, its shape, its element type.
fn describe(graph: &Graph, place: Place) -> String {
    let id = match place {
        Place::Value(id) | Place::Part { value: id, .. } => id,
        Place::Scratch(_) => return "temporary storage".to_owned(),
        Place::Span(arena, _) => return format!("parameters ({arena:?})"),
    };
    // Values of a place are of this graph.
    let Ok(value) = graph.value(id) else {
        return "a value".to_owned();
    };
    let of = match &value.source {
        Source::Input { .. } => format!("input {:?}", value.name),
        Source::Parameter(_) => format!("parameter {:?}", value.name),
        Source::State(_) => format!("state {:?}", value.name),
        Source::Constant(number) => format!("constant {number}"),
        Source::Node { node, .. } => {
            let node = graph.nodes().get(*node);
            let op = node.map_or("operation", |node| node.op.name());
            let layer = node.and_then(|node| node.scope.as_deref());
            let layer = layer.map_or_else(String::new, |layer| format!("layer {layer:?}: "));
            let outputs = graph.outputs().iter();
            let output = outputs
                .filter(|(_, output)| *output == id)
                .map(|(name, _)| name);
            match output.min() {
                Some(name) => format!("{layer}output {name:?} of {op}"),
                None => format!("{layer}the result of {op}"),
            }
        }
    };
    format!("{of} {} {}", value.shape, value.dtype)
}
