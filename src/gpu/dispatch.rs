//! A kernel with its buffers and its grid.

use std::sync::Arc;

use super::bindings::BindGroup;
use super::device::Gpu;
use super::pipelines::Pipeline;
use crate::error::{Error, Result};

/// A dispatch that is checked once for all its submissions.
#[derive(Clone, Debug)]
pub(crate) struct Dispatch {
    pipeline: Arc<Pipeline>,
    /// One bind group, or one per turn of a [`Bundle`](super::Bundle) if the turns read different memory.
    bind_groups: Arc<[BindGroup]>,
    workgroups: [u32; 3],
}

impl Dispatch {
    /// Fails as [`Recorder::dispatch`](super::Recorder::dispatch). A trusted pipeline must get the kernel's own grid.
    pub fn new(
        gpu: &Gpu,
        pipeline: Arc<Pipeline>,
        bind_groups: impl Into<Arc<[BindGroup]>>,
        workgroups: [u32; 3],
    ) -> Result<Self> {
        let limit = gpu
            .capabilities()
            .limits
            .max_compute_workgroups_per_dimension;
        if let Some(n) = workgroups.into_iter().find(|&n| n == 0 || n > limit) {
            return Err(Error::Limit {
                what: format!(
                    "dispatch of {:?} with {workgroups:?} workgroups",
                    pipeline.key()
                ),
                limit: "max_compute_workgroups_per_dimension",
                needed: u64::from(n),
                available: u64::from(limit),
            });
        }
        let bind_groups = bind_groups.into();
        for bind_group in bind_groups.iter() {
            bind_group.check(&pipeline)?;
        }
        Ok(Self {
            pipeline,
            bind_groups,
            workgroups,
        })
    }

    /// Key of the kernel.
    pub fn key(&self) -> &str {
        self.pipeline.key()
    }

    pub fn wgsl(&self) -> &str {
        self.pipeline.wgsl()
    }

    pub fn workgroups(&self) -> [u32; 3] {
        self.workgroups
    }

    /// The same dispatch on the memory of one turn.
    fn at(&self, turn: usize) -> Self {
        let mut at = self.clone();
        if let Some(bind_group) = self.bind_groups.get(turn) {
            at.bind_groups = [bind_group.clone()].into();
        }
        at
    }

    /// Whether tests see to this dispatch themselves, so that it cannot share a pass with others.
    #[cfg(feature = "trace")]
    pub(super) fn is_apart(&self) -> bool {
        super::trace::is_of_interest(self.kernel(), self.stands_in())
    }

    /// Only tests have dispatches that cannot share a pass with others.
    #[cfg(not(feature = "trace"))]
    pub(super) fn is_apart(&self) -> bool {
        false
    }

    #[cfg(feature = "trace")]
    pub(super) fn stands_in(&self) -> bool {
        self.pipeline.stands_in()
    }

    #[cfg(feature = "trace")]
    pub(super) fn kernel(&self) -> super::trace::Kernel<'_> {
        super::trace::Kernel {
            key: self.key(),
            wgsl: self.wgsl(),
            accesses: self.pipeline.bindings(),
        }
    }

    #[cfg(feature = "trace")]
    pub(super) fn slices(&self, turn: usize) -> &[super::pool::BufferSlice] {
        let bind_group = self.bind_groups.get(turn);
        bind_group.unwrap_or(&self.bind_groups[0]).slices()
    }

    /// Encodes it in a pass of its own.
    #[cfg(feature = "trace")]
    pub(super) fn encode_alone(&self, encoder: &mut wgpu::CommandEncoder, turn: usize) {
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        self.encode(&mut pass, turn);
    }

    /// Encodes it on the memory of a turn. A dispatch with one bind group uses the same memory in every turn.
    pub(super) fn encode(&self, pass: &mut wgpu::ComputePass<'_>, turn: usize) {
        let [x, y, z] = self.workgroups;
        let bind_group = self.bind_groups.get(turn).unwrap_or(&self.bind_groups[0]);
        pass.set_pipeline(self.pipeline.raw());
        pass.set_bind_group(0, bind_group.raw(), &[]);
        pass.dispatch_workgroups(x, y, z);
    }
}

/// A list of checked dispatches in order, for [`Gpu::time`] and [`Gpu::profile`]. That of an executable comes from
/// [`Executable::sequence`](crate::Executable::sequence) and cannot be taken apart.
#[derive(Clone, Debug, Default)]
pub struct Sequence {
    pub(super) dispatches: Vec<Dispatch>,
}

impl Sequence {
    /// A sequence without dispatches.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The dispatches on the memory of one turn of their bundle.
    pub(crate) fn of<'a>(dispatches: impl Iterator<Item = &'a Dispatch>, turn: usize) -> Self {
        Self {
            dispatches: dispatches.map(|dispatch| dispatch.at(turn)).collect(),
        }
    }

    /// Adds a dispatch of a kernel with this number of workgroups per dimension.
    ///
    /// # Errors
    /// As [`Recorder::dispatch`](super::Recorder::dispatch).
    pub fn dispatch(
        &mut self,
        gpu: &Gpu,
        pipeline: &Arc<Pipeline>,
        bind_group: &BindGroup,
        workgroups: [u32; 3],
    ) -> Result<()> {
        let bind_groups = [bind_group.clone()];
        let dispatch = Dispatch::new(gpu, Arc::clone(pipeline), bind_groups, workgroups)?;
        self.dispatches.push(dispatch);
        Ok(())
    }

    /// Its dispatches, in order.
    pub(crate) fn each(&self) -> &[Dispatch] {
        &self.dispatches
    }

    /// Number of dispatches.
    #[must_use]
    pub fn len(&self) -> usize {
        self.dispatches.len()
    }

    /// Whether there is no dispatch.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.dispatches.is_empty()
    }

    /// The keys of its kernels, in order.
    pub fn keys(&self) -> impl ExactSizeIterator<Item = &str> {
        self.dispatches.iter().map(Dispatch::key)
    }
}
