//! energyflow
pub mod error;
pub mod gpu;
pub mod graph;
pub mod text;

pub use error::{Error, Result};
