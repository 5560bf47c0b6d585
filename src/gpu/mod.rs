//! Everything that uses wgpu. Nothing here knows about networks.
//!
//! [`Gpu`] is the device with its caches, shared by cloning. Memory is a [`Buffer`] from its pool, seen as a [`Tensor`]
//! through a [`Layout`]. Work is a [`Recorder`] of dispatches, which becomes one submission. Results come back as a [`Readback`].
//!
//! From the bottom up: `context` is the device with its queue; `pool`, `pipelines`, `bindings`, `staging`, `store` and `tuning` take it and
//! keep memory, kernels and files; `device` puts them together as [`Gpu`]; everything else is built on a [`Gpu`].

mod bindings;
mod bundle;
mod cache;
mod capabilities;
mod context;
mod cores;
mod device;
mod dispatch;
mod element;
mod envelope;
mod gate;
mod layout;
mod lock;
mod matrices;
mod open;
mod options;
mod pipelines;
mod pool;
mod profiler;
mod readback;
mod recorder;
#[cfg(test)]
mod refusals;
mod report;
mod ring;
mod staging;
mod store;
mod tensor;
mod together;
#[cfg(feature = "trace")]
#[doc(hidden)]
pub mod trace;
mod tuning;
mod waiter;

pub use bindings::{BindGroup, BindGroupStats};
pub(crate) use bundle::{Bundle, IN_FLIGHT};
pub use capabilities::{Capabilities, MatrixUnits, SubgroupSizes};
pub use cores::CoresFrom;
pub use device::Gpu;
pub(crate) use device::Sweeper;
pub(crate) use dispatch::Dispatch;
pub use dispatch::Sequence;
pub use element::Element;
pub(crate) use gate::Gate;
pub use layout::{Alignment, Layout};
pub use open::Adapter;
pub use options::GpuOptions;
pub(crate) use pipelines::TrustedSource;
pub use pipelines::{Access, KernelSource, Pipeline, PipelineStats};
pub use pool::{Buffer, BufferSlice, OFFSET_ALIGNMENT, PoolStats};
pub(crate) use profiler::{Around, Passes, Times};
pub use profiler::{Clock, Timing};
pub use readback::Readback;
pub(crate) use readback::{Download, Transfer};
pub use recorder::{Recorder, Submission};
pub use report::Report;
pub use store::CacheStats;
pub use tensor::Tensor;
pub(crate) use tuning::Choice;
pub use tuning::TuningStats;
