//! energyflow
mod atomic;
pub mod error;
pub mod gpu;
pub mod graph;
mod kernels;
pub mod nn;
pub mod reference;
pub mod text;
pub mod train;

pub use error::{Error, Result};
pub use gpu::{Gpu, GpuOptions};
pub use graph::{DType, Executable, Graph, Session};
pub use wgpu;
