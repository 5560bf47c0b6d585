//! Everything that touches wgpu, and nothing that knows about networks.
//!
//! [`Gpu`] is the device with its caches, shared by cloning. Memory is a [`Buffer`] from its pool, seen as a [`Tensor`]
//! through a [`Layout`]; work is a [`Recorder`] of dispatches, one submission each; results come back as a [`Readback`].

mod bindings;
mod bundle;
mod device;
mod element;
mod envelope;
mod guard;
mod layout;
mod matrices;
mod pipelines;
mod pool;
mod profiler;
mod readback;
mod recorder;
mod report;
mod staging;
mod store;
mod tensor;
mod tuning;

use std::sync::{Mutex, MutexGuard, PoisonError};

pub use bindings::{BindGroup, BindGroupStats};
pub(crate) use bundle::{Bundle, Dispatch, IN_FLIGHT};
pub use device::{Gpu, GpuOptions};
pub use element::Element;
pub use layout::{Alignment, Layout};
pub use matrices::MatrixUnits;
pub use pipelines::{Access, KernelSource, Pipeline, PipelineStats};
pub use pool::{Buffer, BufferSlice, OFFSET_ALIGNMENT, PoolStats};
pub use profiler::{ProfileStep, Timing};
pub use readback::Readback;
pub(crate) use readback::{Download, Transfer};
pub use recorder::{Recorder, Submission};
pub use report::{Capabilities, Report, SubgroupSizes};
pub use store::CacheStats;
pub use tensor::Tensor;
pub(crate) use tuning::Choice;
pub use tuning::TuningStats;

/// Locks a cache. Every critical section leaves its data valid, so a panic elsewhere does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
