//! From a graph to steps and a plan: data in, data out, without a device.

mod alive;
mod check;
mod fingerprint;
mod fuse;
mod lower;
mod pack;
mod pair;
mod plan;
mod steps;
mod table;

pub(crate) use check::binds;
pub(crate) use fingerprint::fingerprint;
#[cfg(test)]
pub(crate) use lower::lower;
pub use plan::Plan;
pub(crate) use plan::size;
pub(crate) use steps::{Arena, Arenas, CORRECTION, Lowered, PAGE, Place, Span, Step, Tuner};
pub(crate) use table::{Entry, NewParameters, Table};

use crate::error::Result;
use crate::gpu::Capabilities;
use crate::graph::Graph;
use crate::kernels::Target;

/// Most steps of a plan that debug builds check.
const MOST_CHECKED: usize = 500;

/// Steps and memory plan of a graph, checked against the limits of the device.
///
/// `tuner` chooses kernels by measuring them; without it the built-in rules choose.
///
/// # Errors
/// [`Error::Limit`](crate::Error::Limit) with the name of the value or kernel that is too large for the device;
/// [`Error::Graph`](crate::Error::Graph) for a graph that cannot be compiled.
pub(crate) fn compile(
    graph: &Graph,
    tuner: Option<&dyn Tuner>,
    table: &Table,
    capabilities: &Capabilities,
) -> Result<(Lowered, Plan)> {
    let target = Target::new(capabilities);
    let limits = &capabilities.limits;
    let lowered = lower::lower(
        graph,
        tuner,
        target,
        table,
        limits.max_storage_buffer_binding_size,
    )?;
    let plan = plan::plan(graph, &lowered, table, capabilities)?;
    // Its time grows with the square of the steps.
    if lowered.steps.len() <= MOST_CHECKED {
        debug_assert_eq!(alive::fault(graph, &lowered, &plan)?, None);
    }
    check::check(graph, &lowered, &plan, limits)?;
    Ok((lowered, plan))
}
