//! What an executable encodes, and what it reads from the host.

use std::fmt;
use std::sync::Arc;

use crate::error::Result;
use crate::gpu::{self, BufferSlice, Gpu, Tensor};
use crate::kernels::{Cost, Kernel, Target};
use crate::types::Shape;

/// A kernel with its bindings, on its own grid.
#[derive(Debug)]
pub(crate) struct BoundKernel {
    pub name: &'static str,
    /// The layer that it is for, if it is for one.
    pub layer: Option<Arc<str>>,
    pub work: gpu::Dispatch,
    pub cost: Cost,
}

impl BoundKernel {
    pub fn new(
        gpu: &Gpu,
        target: Target,
        kernel: &Kernel,
        turns: &[Vec<BufferSlice>],
    ) -> Result<Self> {
        let pipeline = gpu.trusted_pipeline(&kernel.key(target), || kernel.source(target))?;
        let bind_groups = turns
            .iter()
            .map(|slices| gpu.bind_group(&pipeline, slices))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            name: kernel.name(),
            layer: None,
            work: gpu::Dispatch::new(gpu, pipeline, bind_groups, kernel.workgroups())?,
            cost: kernel.cost(),
        })
    }

    pub fn layer(self, layer: Option<Arc<str>>) -> Self {
        Self { layer, ..self }
    }
}

/// An input with its memory.
#[derive(Debug)]
pub(crate) struct Input {
    pub name: String,
    pub shape: Shape,
    pub tensor: Tensor,
    pub below: Option<u32>,
    /// Whether a run needs it.
    pub is_read: bool,
}

/// Name, shape and element type.
impl fmt::Display for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dtype = self.tensor.layout().dtype();
        write!(f, "{} {} {dtype}", self.name, self.shape)
    }
}
