//! energyflow
pub mod error;
pub mod gpu;
pub mod graph;
pub mod reference;

pub use error::{Error, Result};
pub use gpu::{Gpu, GpuOptions};
pub use wgpu;
