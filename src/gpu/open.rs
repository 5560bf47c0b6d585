//! Lists the adapters of the machine, and opens one.

use std::fmt;
use std::sync::OnceLock;

use wgpu::{Backend, Backends, DeviceType, Features, Limits};

use super::capabilities::{Capabilities, MatrixUnits, shares_memory};
use super::device::Gpu;
use super::matrices;
use super::options::GpuOptions;
use crate::error::{Error, Result};

/// An adapter of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Adapter {
    /// Its place in [`Gpu::adapters`], for [`GpuOptions::adapter_index`]. It stays the same while the machine's adapters and drivers do.
    pub index: usize,
    /// Its name. Several adapters may have the same.
    pub name: String,
    /// The API underneath. One GPU may be an adapter of several.
    pub backend: Backend,
    /// Discrete, integrated, virtual or software.
    pub device_type: DeviceType,
    /// Domain, bus, device and function, for example `0000:01:00.0`. Empty if the backend does not report it.
    pub pci_address: String,
    /// Driver name and version.
    pub driver: String,
}

impl Adapter {
    fn new(index: usize, adapter: &wgpu::Adapter) -> Self {
        let info = adapter.get_info();
        Self {
            index,
            driver: format!("{} {}", info.driver, info.driver_info)
                .trim()
                .to_owned(),
            name: info.name,
            backend: info.backend,
            device_type: info.device_type,
            pci_address: info.device_pci_bus_id,
        }
    }

    fn fits(&self, options: &GpuOptions) -> bool {
        let lower = |text: &str| text.to_lowercase();
        let name = options.adapter.as_deref().unwrap_or_default();
        let address = |address: &str| {
            let (ours, asked) = (lower(&self.pci_address), lower(address));
            ours == asked || ours.strip_prefix("0000:") == Some(&*asked)
        };
        options.backends.contains(self.backend.into())
            && options.adapter_index.is_none_or(|i| i == self.index)
            && options.pci_address.as_deref().is_none_or(address)
            && lower(&self.name).contains(&lower(name))
    }
}

impl fmt::Display for Adapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            index,
            name,
            backend,
            device_type,
            pci_address,
            driver,
        } = self;
        write!(f, "#{index} {name:?} ({device_type:?}, {backend:?}")?;
        if !pci_address.is_empty() {
            write!(f, ", at {pci_address}")?;
        }
        write!(f, ", driver {driver})")
    }
}

impl Gpu {
    /// The adapters of this machine that can compute, in the order of their [`Adapter::index`].
    #[must_use]
    pub fn adapters() -> Vec<Adapter> {
        let found = pollster::block_on(enumerate());
        found.into_iter().map(|(adapter, _)| adapter).collect()
    }

    /// Opens the best adapter that fits: discrete before integrated, virtual, other and software ones, and of equal ones the first. Blocks
    /// until the device is open.
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
        let features = options.wants(supported(&adapter)) | options.features;
        #[cfg(feature = "trace")]
        let features = match std::env::var_os("ENERGYFLOW_STAND_IN") {
            Some(_) => features | (adapter.features() & Features::PASSTHROUGH_SHADERS),
            None => features,
        };
        let limits = match options.baseline {
            true => Limits::default(),
            false => Limits {
                max_immediate_size: match features.contains(Features::IMMEDIATES) {
                    true => adapter.limits().max_immediate_size,
                    false => 0,
                },
                ..adapter.limits()
            },
        };
        let experimental_features = if features.intersects(Features::all_experimental_mask()) {
            // SAFETY: the caller acknowledges that an experimental feature may have bugs that cause undefined
            // behaviour. The only one requested by this crate is cooperative matrices; only kernels of this crate use them, and
            // each is tested against its CPU twin on the adapters that have them.
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
        let mut capabilities = Capabilities::new(&device, features, matrices, options);
        let software = capabilities.device_type == DeviceType::Cpu;
        if options.cooperative.unwrap_or(!software)
            && let Some(units) = MatrixUnits::choose(&capabilities)
        {
            let gpu = Self::assemble(
                device.clone(),
                queue.clone(),
                true,
                capabilities.clone(),
                &GpuOptions::default(),
            );
            capabilities.matrix_units = matrices::tested(&gpu, units);
        }
        let Capabilities {
            adapter,
            backend,
            driver,
            ..
        } = &capabilities;
        log::info!("opened {adapter:?} ({backend:?}, {driver})");
        Ok(Self::assemble(device, queue, true, capabilities, options))
    }

    /// Uses a device that the caller opened, with the features and limits that it was opened with, restricted by
    /// `options.baseline`, `options.f16` and `options.barrier_free`, with the caches, bounds and the tuner of `options`; those that
    /// choose an adapter or ask for features do not apply.
    ///
    /// Replaces the device-lost callback, of which wgpu keeps only one. The uncaptured-error handler stays the caller's.
    /// Matrix units are off, because a device does not report its cooperative-matrix configurations.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] for a device of the `noop` backend, which computes nothing.
    pub fn from_device(
        device: wgpu::Device,
        queue: wgpu::Queue,
        options: &GpuOptions,
    ) -> Result<Self> {
        let features = options.wants(device.features());
        let mut capabilities = Capabilities::new(&device, features, Vec::new(), options);
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
}

/// The one instance of the process, which is never closed. Closing an instance unloads the driver, and NVIDIA's driver finds no adapter
/// any more after it was loaded about thirty times.
fn instance() -> &'static wgpu::Instance {
    static INSTANCE: OnceLock<wgpu::Instance> = OnceLock::new();
    INSTANCE.get_or_init(|| {
        wgpu::Instance::new(wgpu::InstanceDescriptor {
            backends: Backends::PRIMARY,
            // Validation layers and debug information cost time even in debug builds: only on request (WGPU_VALIDATION=1).
            flags: wgpu::InstanceFlags::empty().with_env(),
            ..wgpu::InstanceDescriptor::new_without_display_handle()
        })
    })
}

/// All adapters that can compute.
async fn enumerate() -> Vec<(Adapter, wgpu::Adapter)> {
    let found = instance().enumerate_adapters(Backends::PRIMARY).await;
    let usable = found.into_iter().filter(|adapter| {
        adapter.get_info().backend != Backend::Noop
            && adapter
                .get_downlevel_capabilities()
                .flags
                .contains(wgpu::DownlevelFlags::COMPUTE_SHADERS)
    });
    let numbered = usable.enumerate();
    numbered
        .map(|(index, adapter)| (Adapter::new(index, &adapter), adapter))
        .collect()
}

async fn choose(options: &GpuOptions) -> Result<wgpu::Adapter> {
    let mut found = enumerate().await;
    let fitting = found
        .iter()
        .enumerate()
        .filter(|(_, (adapter, _))| adapter.fits(options));
    match fitting.min_by_key(|(_, (adapter, _))| rank(adapter)) {
        Some((chosen, _)) => Ok(found.swap_remove(chosen).1),
        None => Err(Error::NoAdapter {
            reason: describe(options, found.iter().map(|(adapter, _)| adapter)),
        }),
    }
}

/// Lower is better. Direct3D comes last among equals: it has no cooperative matrices.
fn rank(adapter: &Adapter) -> (u8, bool) {
    let kind = match adapter.device_type {
        DeviceType::DiscreteGpu => 0,
        DeviceType::IntegratedGpu => 1,
        DeviceType::VirtualGpu => 2,
        DeviceType::Other => 3,
        DeviceType::Cpu => 4,
    };
    (kind, adapter.backend == Backend::Dx12)
}

/// The reason of [`Error::NoAdapter`]: what was asked for, which adapters there are, and what to do.
fn describe<'a>(options: &GpuOptions, found: impl Iterator<Item = &'a Adapter>) -> String {
    // Nothing that this crate is not compiled for.
    let backends = options.backends - Backends::BROWSER_WEBGPU;
    let mut asked = vec![format!("backends {backends:?}")];
    asked.extend(
        options
            .adapter
            .iter()
            .map(|name| format!("name with {name:?}")),
    );
    asked.extend(options.adapter_index.iter().map(|i| format!("index {i}")));
    asked.extend(
        options
            .pci_address
            .iter()
            .map(|address| format!("PCI address {address}")),
    );
    let asked = asked.join(", ");
    let found: Vec<String> = found.map(Adapter::to_string).collect();
    match found.is_empty() {
        true => format!(
            "asked for {asked}; there is none. Install the driver of your GPU, on Linux with its Vulkan part (package nvidia-driver or \
             mesa-vulkan-drivers, and libvulkan1), or Mesa's software driver (mesa-vulkan-drivers)"
        ),
        false => format!(
            "asked for {asked}; there are {}. Ask for one of these",
            found.join(", ")
        ),
    }
}

/// The optional features that this crate uses, as far as the adapter has them.
fn supported(adapter: &wgpu::Adapter) -> Features {
    let mut wanted = Features::SHADER_F16
        | Features::SUBGROUP
        | Features::TIMESTAMP_QUERY
        | Features::TIMESTAMP_QUERY_INSIDE_ENCODERS
        | Features::TIMESTAMP_QUERY_INSIDE_PASSES
        | Features::PIPELINE_CACHE
        | Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
    // Where memory is not shared with the CPU, mappable buffers are slow ones.
    if shares_memory(&adapter.get_info()) {
        wanted |= Features::MAPPABLE_PRIMARY_BUFFERS;
    }
    adapter.features() & wanted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapter(index: usize, name: &str, pci_address: &str) -> Adapter {
        Adapter {
            index,
            name: name.to_owned(),
            backend: Backend::Vulkan,
            device_type: DeviceType::DiscreteGpu,
            pci_address: pci_address.to_owned(),
            driver: String::new(),
        }
    }

    #[test]
    fn of_two_with_one_name_either_can_be_chosen() {
        let twins = [
            adapter(0, "NVIDIA H100 80GB HBM3", "0000:18:00.0"),
            adapter(1, "NVIDIA H100 80GB HBM3", "0000:2a:00.0"),
        ];
        let chosen = |options: GpuOptions| -> Vec<usize> {
            let fitting = twins.iter().filter(|twin| twin.fits(&options));
            fitting.map(|twin| twin.index).collect()
        };
        let options = GpuOptions::default;
        assert_eq!(chosen(options()), [0, 1]);
        assert_eq!(chosen(options().adapter("h100")), [0, 1]);
        assert_eq!(chosen(options().adapter_index(1)), [1]);
        assert_eq!(chosen(options().pci_address("0000:2A:00.0")), [1]);
        assert_eq!(chosen(options().pci_address("18:00.0")), [0]);
        assert_eq!(chosen(options().pci_address("8:00.0")), [0; 0]);
        assert_eq!(chosen(options().adapter("h100").adapter_index(2)), [0; 0]);
        assert_eq!(chosen(options().backends(Backends::METAL)), [0; 0]);
    }
}
