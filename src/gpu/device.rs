//! Adapter choice and the shared handle on an opened device.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use wgpu::{Backend, Backends, DeviceType, Features, Limits};

use super::bindings::BindGroups;
use super::guard::Guard;
use super::matrices::{self, MatrixUnits};
use super::pipelines::Pipelines;
use super::pool::Pool;
use super::readback::Waiter;
use super::report::Capabilities;
use super::staging::Staging;
use super::store::Store;
use super::tuning::Tuning;
use crate::error::{Error, Result};

/// Restricts the adapters that [`Gpu::new`] considers to those whose name contains this, where [`GpuOptions::adapter`] does not.
const ADAPTER_VARIABLE: &str = "ENERGYFLOW_ADAPTER";

/// Which adapter to open, and with what.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct GpuOptions {
    /// Only adapters whose name contains this, ignoring case. Without it the environment variable `ENERGYFLOW_ADAPTER` is used, if set.
    pub adapter: Option<String>,
    /// Backends to look for adapters in.
    pub backends: Backends,
    /// Open the device with the limits of the WebGPU baseline and no optional feature, as a browser would.
    pub baseline: bool,
    /// Use 16-bit floats in shaders where the adapter has them.
    pub f16: bool,
    /// Use kernels without workgroup memory and barriers. Without it, on software adapters only: they are faster there.
    pub barrier_free: Option<bool>,
    /// Use matrix units where the adapter has them and they pass their test. Without it, everywhere but on software adapters, where they are slower.
    pub cooperative: Option<bool>,
    /// Where compiled pipelines and the tuner's choices are kept between processes, see [`GpuOptions::cache_dir`].
    /// Without it the environment variable `ENERGYFLOW_CACHE_DIR` is used, if set.
    pub cache_dir: Option<PathBuf>,
    /// Whether kernels are chosen by measuring, see [`GpuOptions::autotune`]. Without it, if the environment variable
    /// `ENERGYFLOW_AUTOTUNE` is 1.
    pub autotune: Option<bool>,
}

impl Default for GpuOptions {
    fn default() -> Self {
        Self {
            adapter: None,
            backends: Backends::PRIMARY,
            baseline: false,
            f16: true,
            barrier_free: None,
            cooperative: None,
            cache_dir: None,
            autotune: None,
        }
    }
}

impl GpuOptions {
    /// Only adapters whose name contains `name`, ignoring case.
    #[must_use]
    pub fn adapter(mut self, name: impl Into<String>) -> Self {
        self.adapter = Some(name.into());
        self
    }

    /// Only these backends.
    #[must_use]
    pub fn backends(mut self, backends: Backends) -> Self {
        self.backends = backends;
        self
    }

    /// Limits and features of the WebGPU baseline only.
    #[must_use]
    pub fn baseline(mut self, baseline: bool) -> Self {
        self.baseline = baseline;
        self
    }

    /// Whether shaders may use 16-bit floats.
    #[must_use]
    pub fn f16(mut self, f16: bool) -> Self {
        self.f16 = f16;
        self
    }

    /// Whether kernels do without workgroup memory and barriers, whatever the adapter.
    #[must_use]
    pub fn barrier_free(mut self, barrier_free: bool) -> Self {
        self.barrier_free = Some(barrier_free);
        self
    }

    /// Whether matrix products use matrix units, whatever the adapter type.
    #[must_use]
    pub fn cooperative(mut self, cooperative: bool) -> Self {
        self.cooperative = Some(cooperative);
        self
    }

    /// Keeps compiled pipelines, where the adapter can export them, and the tuner's choices in this folder; nowhere if it
    /// is empty. It is made when something is saved.
    ///
    /// Files are read when the device is opened, and written by [`Gpu::save_caches`] and when the last clone of the
    /// [`Gpu`] is dropped. They belong to one adapter, driver and version of this crate. One that does not fit, is damaged, or
    /// cannot be read or written is ignored with a warning. Of processes that share a folder the last writer wins.
    ///
    /// A driver trusts the pipelines it is given: nobody else should be able to write to the folder.
    #[must_use]
    pub fn cache_dir(mut self, folder: impl Into<PathBuf>) -> Self {
        self.cache_dir = Some(folder.into());
        self
    }

    /// Whether kernels with several variants are chosen by measuring them when a graph is compiled, once for each shape;
    /// later, and in later processes with the same [`GpuOptions::cache_dir`], the choice is looked up.
    ///
    /// Without it the built-in rules choose, whatever is stored. Variants may add up in another order: results may differ in their
    /// last bits between choices, and are the same as long as the stored choices are.
    #[must_use]
    pub fn autotune(mut self, autotune: bool) -> Self {
        self.autotune = Some(autotune);
        self
    }

    fn wants(&self, features: Features) -> Features {
        if self.baseline {
            Features::empty()
        } else if self.f16 {
            features
        } else {
            features - Features::SHADER_F16
        }
    }
}

/// An opened GPU device with its buffer pool and its caches; cloning shares it, any thread may use it.
///
/// Once the device is lost, every call returns [`Error::DeviceLost`]; a new `Gpu` is needed then.
#[derive(Clone)]
pub struct Gpu(pub(super) Arc<Inner>);

pub(super) struct Inner {
    pub(super) guard: Arc<Guard>,
    pub(super) capabilities: Capabilities,
    pub(super) pool: Arc<Pool>,
    pub(super) staging: Arc<Staging>,
    pub(super) pipelines: Pipelines,
    pub(super) bind_groups: BindGroups,
    pub(super) store: Store,
    pub(super) tuning: Option<Tuning>,
    pub(super) waiter: Waiter,
    pub(super) submissions: AtomicU64,
    pub(super) dispatches: AtomicU64,
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
    /// Opens the best adapter: discrete before integrated, virtual, other and software ones. Blocks meanwhile.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] when no adapter fits `options`, [`Error::DeviceRequest`] when the driver refuses to open it.
    pub fn new(options: &GpuOptions) -> Result<Self> {
        pollster::block_on(Self::new_async(options))
    }

    /// As [`Gpu::new`], without blocking.
    ///
    /// # Errors
    /// As [`Gpu::new`].
    pub async fn new_async(options: &GpuOptions) -> Result<Self> {
        let adapter = choose(options).await?;
        let info = adapter.get_info();
        let features = options.wants(supported(&adapter));
        let limits = if options.baseline {
            Limits::default()
        } else {
            let mut limits = adapter.limits();
            if !features.contains(Features::IMMEDIATES) {
                limits.max_immediate_size = 0;
            }
            limits
        };
        let experimental_features = if features.intersects(Features::all_experimental_mask()) {
            // SAFETY: the caller acknowledges that an experimental feature may have bugs that cause undefined
            // behaviour. The only one requested is cooperative matrices; only kernels of this crate use them, and each
            // is tested against its CPU twin on the adapters that have them.
            unsafe { wgpu::ExperimentalFeatures::enabled() }
        } else {
            wgpu::ExperimentalFeatures::disabled()
        };
        let (device, queue) = adapter
            .request_device(&wgpu::DeviceDescriptor {
                label: Some("energyflow"),
                required_features: features,
                required_limits: limits,
                experimental_features,
                memory_hints: wgpu::MemoryHints::Performance,
                trace: wgpu::Trace::Off,
            })
            .await
            .map_err(|error| Error::DeviceRequest {
                adapter: info.name.clone(),
                reason: error.to_string(),
            })?;
        let matrices = adapter.cooperative_matrix_properties();
        let mut capabilities = Capabilities::new(&device, features, matrices, options.barrier_free);
        let software = info.device_type == DeviceType::Cpu;
        if options.cooperative.unwrap_or(!software)
            && let Some(units) = MatrixUnits::choose(&capabilities)
        {
            let gpu = Self::assemble(
                device.clone(),
                queue.clone(),
                true,
                capabilities.clone(),
                &GpuOptions::default().cache_dir("").autotune(false),
            );
            capabilities.matrix_units = matrices::tested(&gpu, units);
        }
        Ok(Self::assemble(device, queue, true, capabilities, options))
    }

    /// Uses a device that the caller opened, with the features and limits that it was opened with, restricted by
    /// `options.baseline`, `options.f16` and `options.barrier_free`, with the caches and the tuner of `options`; those that
    /// choose an adapter do not apply.
    ///
    /// Takes over the device-lost callback, of which wgpu keeps one; the uncaptured-error handler stays the caller's.
    /// A device does not tell its cooperative-matrix configurations, so that kernel tier is off.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] for a device of the `noop` backend, which computes nothing.
    pub fn from_device(
        device: wgpu::Device,
        queue: wgpu::Queue,
        options: &GpuOptions,
    ) -> Result<Self> {
        let features = options.wants(device.features());
        let mut capabilities =
            Capabilities::new(&device, features, Vec::new(), options.barrier_free);
        if capabilities.backend == Backend::Noop {
            return Err(Error::NoAdapter {
                reason: "a noop device computes nothing".to_owned(),
            });
        }
        if options.baseline {
            capabilities.limits = Limits::default().or_worse_values_from(&capabilities.limits);
        }
        Ok(Self::assemble(device, queue, false, capabilities, options))
    }

    fn assemble(
        device: wgpu::Device,
        queue: wgpu::Queue,
        owned: bool,
        capabilities: Capabilities,
        options: &GpuOptions,
    ) -> Self {
        let guard = Arc::new(Guard::new(device, queue, owned));
        let store = Store::new(options.cache_dir.clone(), &capabilities);
        let pipelines = Pipelines::new(&guard, &capabilities, &store);
        let tuning = Tuning::new(options.autotune, &store);
        Self(Arc::new(Inner {
            guard,
            capabilities,
            pool: Arc::default(),
            staging: Arc::default(),
            pipelines,
            bind_groups: BindGroups::default(),
            store,
            tuning,
            waiter: Waiter::default(),
            submissions: AtomicU64::new(0),
            dispatches: AtomicU64::new(0),
        }))
    }

    /// What the opened device can do; constant.
    #[must_use]
    pub fn capabilities(&self) -> &Capabilities {
        &self.0.capabilities
    }

    /// Writes compiled pipelines and the tuner's choices to the folder of [`GpuOptions::cache_dir`], as far as they have
    /// changed. Does nothing without a folder; a failure is a warning in the log and counted in [`Gpu::report`].
    pub fn save_caches(&self) {
        self.0.save_caches();
    }

    /// The wgpu device, for use beside this crate.
    #[must_use]
    pub fn device(&self) -> &wgpu::Device {
        &self.0.guard.device
    }

    /// The wgpu queue, for use beside this crate.
    #[must_use]
    pub fn queue(&self) -> &wgpu::Queue {
        &self.0.guard.queue
    }
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Gpu")
            .field(&self.0.capabilities.adapter)
            .finish()
    }
}

async fn choose(options: &GpuOptions) -> Result<wgpu::Adapter> {
    let backends = options.backends - Backends::NOOP;
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends,
        // Validation layers and debug information cost time even in debug builds: only on request (WGPU_VALIDATION=1).
        flags: wgpu::InstanceFlags::empty().with_env(),
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    });
    let name = options
        .adapter
        .clone()
        .or_else(|| std::env::var(ADAPTER_VARIABLE).ok())
        .unwrap_or_default();
    let found = instance.enumerate_adapters(backends).await;
    let names: Vec<String> = found
        .iter()
        .map(|adapter| adapter.get_info().name)
        .collect();
    found
        .into_iter()
        .filter(|adapter| usable(adapter, &name))
        .min_by_key(rank)
        .ok_or_else(|| Error::NoAdapter {
            reason: format!("asked for name {name:?} in {backends:?}, found {names:?}"),
        })
}

fn usable(adapter: &wgpu::Adapter, name: &str) -> bool {
    let info = adapter.get_info();
    info.backend != Backend::Noop
        && info.name.to_lowercase().contains(&name.to_lowercase())
        && adapter
            .get_downlevel_capabilities()
            .flags
            .contains(wgpu::DownlevelFlags::COMPUTE_SHADERS)
}

/// Lower is better. Direct3D comes last among equals: it has no cooperative matrices.
fn rank(adapter: &wgpu::Adapter) -> (u8, bool) {
    let info = adapter.get_info();
    let kind = match info.device_type {
        DeviceType::DiscreteGpu => 0,
        DeviceType::IntegratedGpu => 1,
        DeviceType::VirtualGpu => 2,
        DeviceType::Other => 3,
        DeviceType::Cpu => 4,
    };
    (kind, info.backend == Backend::Dx12)
}

pub(super) fn shares_memory(info: &wgpu::AdapterInfo) -> bool {
    matches!(
        info.device_type,
        DeviceType::IntegratedGpu | DeviceType::Cpu
    )
}

/// The optional features this crate has a use for, as far as the adapter has them.
fn supported(adapter: &wgpu::Adapter) -> Features {
    let mut wanted = Features::SHADER_F16
        | Features::SUBGROUP
        | Features::TIMESTAMP_QUERY
        | Features::TIMESTAMP_QUERY_INSIDE_ENCODERS
        | Features::TIMESTAMP_QUERY_INSIDE_PASSES
        | Features::IMMEDIATES
        | Features::PIPELINE_CACHE
        | Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
    // Where memory is not shared with the CPU, mappable buffers are slow ones.
    if shares_memory(&adapter.get_info()) {
        wanted |= Features::MAPPABLE_PRIMARY_BUFFERS;
    }
    adapter.features() & wanted
}
