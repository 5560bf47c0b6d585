//! The shared handle of an opened device, with its memory, kernels and cache files.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::bindings::{self, BindGroup};
use super::capabilities::Capabilities;
use super::context::Context;
use super::gate::Passage;
use super::options::GpuOptions;
use super::pipelines::{KernelSource, Pipeline, Pipelines, TrustedSource};
use super::pool::{Buffer, BufferSlice, HostAccess, Pool};
use super::staging::Staging;
use super::store::Store;
use super::tuning::Tuning;
use super::waiter::Waiter;
use crate::error::Result;

/// An opened GPU device with its buffer pool and its caches. Clones share the device. Any thread may use it.
///
/// Once the device is lost, every call returns [`Error::DeviceLost`](crate::Error::DeviceLost); a new `Gpu` is needed then.
///
/// wgpu runs callbacks that the caller registers on [`Gpu::device`] and [`Gpu::queue`] on whichever thread submits or waits, which may be one
/// inside a call of this crate. A callback may call anything of this crate, and its panic unwinds out of that call. It must not block on
/// another thread that uses the same `Gpu`, because that thread may have to wait until the submission in which the callback runs returns.
#[derive(Clone)]
pub struct Gpu(pub(super) Arc<Inner>);

pub(super) struct Inner {
    pub(super) context: Arc<Context>,
    pub(super) pool: Arc<Pool>,
    pub(super) staging: Arc<Staging>,
    pub(super) pipelines: Pipelines,
    pub(super) store: Store,
    pub(super) tuning: Option<Tuning>,
    pub(super) waiter: Waiter,
    /// [`GpuOptions::profile_dir`] and [`GpuOptions::dump_dir`].
    folders: [Option<PathBuf>; 2],
}

impl Inner {
    fn save_caches(&self) {
        self.pipelines.save(&self.store);
        if let Some(tuning) = &self.tuning {
            tuning.save(&self.store);
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.save_caches();
    }
}

impl Gpu {
    pub(super) fn assemble(
        device: wgpu::Device,
        queue: wgpu::Queue,
        owned: bool,
        capabilities: Capabilities,
        options: &GpuOptions,
    ) -> Self {
        let store = Store::new(options.cache_dir.clone(), &capabilities);
        let context = Context::new(device, queue, owned, capabilities);
        let pipelines = Pipelines::new(&context, options, &store);
        let tuning = Tuning::new(options.autotune, &store);
        Self(Arc::new(Inner {
            context: Arc::new(context),
            pool: Arc::new(Pool::new(options)),
            staging: Arc::new(Staging::new(options.idle_bytes)),
            pipelines,
            store,
            tuning,
            waiter: Waiter::default(),
            folders: [&options.profile_dir, &options.dump_dir].map(|folder| {
                folder
                    .clone()
                    .filter(|folder| !folder.as_os_str().is_empty())
            }),
        }))
    }

    pub(super) fn context(&self) -> &Arc<Context> {
        &self.0.context
    }

    /// Which allocations fail.
    #[cfg(test)]
    pub(crate) fn refusals(&self) -> &super::refusals::Refusals {
        &self.0.context.refusals
    }

    /// What the opened device can do; constant.
    #[must_use]
    pub fn capabilities(&self) -> &Capabilities {
        &self.0.context.capabilities
    }

    /// Where profiles go.
    pub(crate) fn profile_dir(&self) -> Option<&Path> {
        self.0.folders[0].as_deref()
    }

    /// Where graphs and what they become go.
    pub(crate) fn dump_dir(&self) -> Option<&Path> {
        self.0.folders[1].as_deref()
    }

    /// Writes compiled pipelines and the tuner's choices to the folder of [`GpuOptions::cache_dir`], as far as they have
    /// changed. Does nothing without a folder; a failure is a warning in the log and counted in [`Gpu::report`].
    pub fn save_caches(&self) {
        self.0.save_caches();
    }

    /// The wgpu device, for use beside this crate.
    #[must_use]
    pub fn device(&self) -> &wgpu::Device {
        &self.0.context.device
    }

    /// The wgpu queue, for use beside this crate.
    #[must_use]
    pub fn queue(&self) -> &wgpu::Queue {
        &self.0.context.queue
    }

    /// Keeps other threads from submitting until it is dropped, for work that must reach the device together, or for state that must change
    /// together with a submission. The thread that holds it may take it again.
    pub(crate) fn gate(&self) -> Passage<'_> {
        self.0.context.gate()
    }

    /// The tuner's choices; `None` while tuning is off.
    pub(crate) fn tuning(&self) -> Option<&Tuning> {
        self.0.tuning.as_ref()
    }

    /// The kernel cached under `key`, which is made from `source` if there is none. A failure is not cached.
    ///
    /// Kernels run with all checks of WebGPU. Keys are a namespace of the caller's own: kernels of this crate are kept elsewhere.
    ///
    /// # Errors
    /// Whatever `source` returns; [`Error::Limit`](crate::Error::Limit) when it has too many bindings; [`Error::Validation`](crate::Error::Validation)
    /// when it does not compile (the log has the numbered text at level debug).
    pub fn pipeline(
        &self,
        key: &str,
        source: impl FnOnce() -> Result<KernelSource>,
    ) -> Result<Arc<Pipeline>> {
        self.0.pipelines.checked(&self.0.context, key, source)
    }

    /// As [`Gpu::pipeline`], for a kernel of this crate without runtime checks. The caller must run it on the kernel's own grid.
    pub(crate) fn trusted_pipeline(
        &self,
        key: &str,
        source: impl FnOnce() -> Result<TrustedSource>,
    ) -> Result<Arc<Pipeline>> {
        self.0.pipelines.trusted(&self.0.context, key, source)
    }

    /// The bind group of `slices` for the bindings of `pipeline`, in order.
    ///
    /// # Errors
    /// [`Error::Validation`](crate::Error::Validation) when the number of slices is not that of the bindings, or when one buffer is bound both
    /// for reading and for writing, which wgpu does not allow even for disjoint ranges; [`Error::Limit`](crate::Error::Limit) when a slice is too
    /// large to bind.
    pub fn bind_group(&self, pipeline: &Pipeline, slices: &[BufferSlice]) -> Result<BindGroup> {
        bindings::bind(&self.0.context, &self.0.pool, pipeline, slices)
    }

    /// A storage buffer of at least `bytes`, which can be copied from and to. Its content is undefined.
    ///
    /// # Errors
    /// [`Error::Limit`](crate::Error::Limit) when a binding or a buffer of this size is not possible,
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory) when memory is short even after [`Gpu::trim`].
    pub fn buffer(&self, bytes: u64, label: &str) -> Result<Buffer> {
        let (context, pool) = (&self.0.context, &self.0.pool);
        Ok(pool.lease(context, bytes, label, HostAccess::None)?.0)
    }

    /// As [`Gpu::buffer`]. All bytes are zero for everything that is submitted from now on.
    ///
    /// # Errors
    /// As [`Gpu::buffer`].
    pub fn zeroed_buffer(&self, bytes: u64, label: &str) -> Result<Buffer> {
        self.zeroed(bytes, label, HostAccess::None)
    }

    /// As [`Gpu::zeroed_buffer`]. The host can map the buffer for writing while no work in flight uses it.
    pub(crate) fn writable_buffer(&self, bytes: u64, label: &str) -> Result<Buffer> {
        self.zeroed(bytes, label, HostAccess::Write)
    }

    fn zeroed(&self, bytes: u64, label: &str, access: HostAccess) -> Result<Buffer> {
        let context = &self.0.context;
        let (buffer, reused) = self.0.pool.lease(context, bytes, label, access)?;
        if reused {
            let clear = |encoder: &mut wgpu::CommandEncoder| {
                encoder.clear_buffer(buffer.inner(), 0, Some(buffer.size()));
                0
            };
            context.submit("zero", clear, || (), drop)?;
            context.settle()?;
        }
        Ok(buffer)
    }

    /// Frees all pooled memory that nothing uses; returns its size in bytes.
    pub fn trim(&self) -> u64 {
        self.0.staging.trim();
        self.0.pool.trim()
    }
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Gpu")
            .field(&self.capabilities().adapter)
            .finish()
    }
}

/// Drops surplus idle kernels and bind groups when it is dropped itself. It must be dropped after what uses them.
#[derive(Debug)]
pub(crate) struct Sweeper(pub Gpu);

impl Drop for Sweeper {
    fn drop(&mut self) {
        self.0.0.pipelines.sweep();
        self.0.0.pool.groups.sweep();
    }
}
