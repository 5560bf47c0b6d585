//! From a graph to steps and a plan: data in, data out, without a device.

mod fuse;
mod lower;
mod pack;
mod pair;
mod plan;
mod steps;
mod table;

pub(crate) use lower::lower;
pub use plan::Plan;
pub(crate) use plan::plan;
pub(crate) use steps::{Arena, Arenas, Lowered, Place, Span, Step, Tuner};
pub(crate) use table::{Entry, NewParameters, Table};
