//! What an executable encodes, and what it reads from the host.

use crate::error::Result;
use crate::gpu::{self, BufferSlice, Gpu, Tensor};
use crate::kernels::{Cost, Kernel, Target};

/// A kernel with its bindings, on its own grid.
#[derive(Debug)]
pub(crate) struct Dispatch {
    pub name: &'static str,
    pub work: gpu::Dispatch,
    pub cost: Cost,
}

impl Dispatch {
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
            work: gpu::Dispatch::new(gpu, pipeline, bind_groups, kernel.workgroups())?,
            cost: kernel.cost(),
        })
    }
}

/// An input with its memory.
#[derive(Debug)]
pub(crate) struct Input {
    pub name: String,
    pub tensor: Tensor,
    pub below: Option<u32>,
}
