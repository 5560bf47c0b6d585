//! What runs: parameters and states by name, executables, and their runs.

mod dispatch;
mod executable;
mod executables;
mod memory;
mod parameters;
mod record;
mod run;
mod session;
mod shadow;
mod tune;

pub use executable::{Executable, Step};
pub use run::{Host, Outputs, Pending};
pub use session::{Session, SessionStats};

pub use crate::compile::Plan;
