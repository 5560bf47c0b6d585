//! Parameters and states by name, executables, and their runs.

mod bound;
mod ceilings;
mod dump;
mod executable;
mod function;
mod memory;
#[cfg(test)]
mod out_of_memory;
mod pace;
mod parameters;
mod profile;
mod recent;
mod run;
mod session;
mod shadow;
mod top_k;
mod tune;

pub use crate::gpu::Clock;
pub(crate) use bound::BoundKernel;
pub use ceilings::Ceilings;
pub use executable::{Executable, Step};
pub(crate) use function::Function;
pub use profile::{Profile, ProfileRow, Profiled};
pub(crate) use recent::Recent;
pub use run::{Host, Outputs, Pending};
pub use session::{Session, SessionStats};
pub(crate) use top_k::Selection;

pub use crate::compile::Plan;
