//! energyflow
pub mod error;
pub mod gpu;
pub mod graph;
pub mod reference;

pub use error::{Error, Result};
