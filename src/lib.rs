//! energyflow
pub mod error;
pub mod gpu;
pub mod graph;

pub use error::{Error, Result};
