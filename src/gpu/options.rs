//! Options for opening a device.

use std::path::PathBuf;

use wgpu::{Backends, Features};

use crate::error::{Error, Result};

/// Which adapter to open, and with which options. [`GpuOptions::default`] reads nothing from the environment, [`GpuOptions::from_env`] does.
///
/// If several of `adapter_index`, `pci_address` and `adapter` are set, all of them must fit.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct GpuOptions {
    /// Only adapters whose name contains this, ignoring case.
    pub adapter: Option<String>,
    /// Only the adapter with this [index](super::Adapter::index).
    pub adapter_index: Option<usize>,
    /// Only adapters at this [PCI address](super::Adapter::pci_address), for example `0000:01:00.0`; a leading domain of zeros may be left out.
    pub pci_address: Option<String>,
    /// Backends to look for adapters in.
    pub backends: Backends,
    /// Open the device with the limits of the WebGPU baseline and no optional feature, as a browser would.
    pub baseline: bool,
    /// Use 16-bit floats in shaders if the adapter has them.
    pub f16: bool,
    /// Use kernels without workgroup memory and barriers. `None` uses them on software adapters only, where they are faster.
    pub barrier_free: Option<bool>,
    /// Use matrix units if the adapter has them and they pass their test. `None` uses them except on software adapters, where they are slower.
    pub cooperative: Option<bool>,
    /// Number of cores to assume, see [`Capabilities::cores`](super::Capabilities::cores). `None` derives it from the adapter's name.
    pub cores: Option<usize>,
    /// Features that kernels of the caller need. Opening fails if the adapter lacks one. Kernels of this crate do not use them.
    pub features: Features,
    /// Folder in which compiled pipelines and the tuner's choices are kept between processes, see [`GpuOptions::cache_dir`].
    pub cache_dir: Option<PathBuf>,
    /// Whether kernels are chosen by measuring, see [`GpuOptions::autotune`].
    pub autotune: bool,
    /// Folder for profiles, see [`GpuOptions::profile_dir`].
    pub profile_dir: Option<PathBuf>,
    /// Folder for what graphs become, see [`GpuOptions::dump_dir`].
    pub dump_dir: Option<PathBuf>,
    /// Number of idle compiled kernels that are kept. `None` is 256, or 32 on software adapters, where a kernel takes some megabytes. The
    /// same bound holds for kernels of the caller.
    pub idle_pipelines: Option<usize>,
    /// Number of idle bind groups that are kept, 1024 by default. No bind group outlives its buffers.
    pub idle_bind_groups: usize,
    /// Bytes of idle buffers that are kept for reuse, 256 MiB by default. The same bound holds for staging buffers.
    pub idle_bytes: u64,
}

impl Default for GpuOptions {
    fn default() -> Self {
        Self {
            adapter: None,
            adapter_index: None,
            pci_address: None,
            backends: Backends::PRIMARY,
            baseline: false,
            f16: true,
            barrier_free: None,
            cooperative: None,
            cores: None,
            features: Features::empty(),
            cache_dir: None,
            autotune: false,
            profile_dir: None,
            dump_dir: None,
            idle_pipelines: None,
            idle_bind_groups: 1024,
            idle_bytes: 256 << 20,
        }
    }
}

impl GpuOptions {
    /// The defaults, changed by the environment:
    ///
    /// | variable | sets |
    /// |---|---|
    /// | `ENERGYFLOW_ADAPTER` | the adapter: `#1` by index, `0000:01:00.0` by PCI address, anything else by a part of its name |
    /// | `ENERGYFLOW_CACHE_DIR` | [`GpuOptions::cache_dir`]; empty is none |
    /// | `ENERGYFLOW_AUTOTUNE` | [`GpuOptions::autotune`]: `1` is on, `0` or empty is off |
    /// | `ENERGYFLOW_PROFILE` | [`GpuOptions::profile_dir`]; empty is none |
    /// | `ENERGYFLOW_DUMP` | [`GpuOptions::dump_dir`]; empty is none |
    ///
    /// # Errors
    /// [`Error::Config`] for a variable with an invalid value.
    pub fn from_env() -> Result<Self> {
        let mut options = Self::default();
        if let Ok(adapter) = std::env::var("ENERGYFLOW_ADAPTER") {
            options = options.select(&adapter)?;
        }
        if let Some(folder) = std::env::var_os("ENERGYFLOW_CACHE_DIR") {
            options = options.cache_dir(folder);
        }
        if let Some(folder) = std::env::var_os("ENERGYFLOW_PROFILE") {
            options = options.profile_dir(folder);
        }
        if let Some(folder) = std::env::var_os("ENERGYFLOW_DUMP") {
            options = options.dump_dir(folder);
        }
        match std::env::var("ENERGYFLOW_AUTOTUNE").as_deref() {
            Ok("1") => options.autotune = true,
            Ok("" | "0") | Err(_) => {}
            Ok(other) => {
                return Err(Error::Config {
                    field: "ENERGYFLOW_AUTOTUNE",
                    reason: format!("must be 0 or 1, not {other:?}"),
                });
            }
        }
        Ok(options)
    }

    /// Picks the adapter by a text, which replaces an earlier choice: `#1` is an index, `0000:01:00.0` a PCI address, and anything else a part
    /// of the name. An empty text picks any adapter.
    ///
    /// # Errors
    /// [`Error::Config`] for `#` that is not followed by a number.
    pub fn select(mut self, adapter: &str) -> Result<Self> {
        (self.adapter, self.adapter_index, self.pci_address) = (None, None, None);
        if let Some(index) = adapter.strip_prefix('#') {
            let index = index.parse().map_err(|_| Error::Config {
                field: "adapter",
                reason: format!("must have a number after '#', as in #0, not {index:?}"),
            })?;
            return Ok(self.adapter_index(index));
        }
        let of_address = |c: char| c.is_ascii_hexdigit() || c == ':' || c == '.';
        Ok(match adapter {
            "" => self,
            address if address.contains(':') && address.chars().all(of_address) => {
                self.pci_address(address)
            }
            name => self.adapter(name),
        })
    }

    /// Only adapters whose name contains `name`, ignoring case.
    #[must_use]
    pub fn adapter(mut self, name: impl Into<String>) -> Self {
        self.adapter = Some(name.into());
        self
    }

    /// Only the adapter with this index in [`Gpu::adapters`](super::Gpu::adapters).
    #[must_use]
    pub fn adapter_index(mut self, index: usize) -> Self {
        self.adapter_index = Some(index);
        self
    }

    /// Only adapters at this PCI address, for example `0000:01:00.0` or `01:00.0`.
    #[must_use]
    pub fn pci_address(mut self, address: impl Into<String>) -> Self {
        self.pci_address = Some(address.into());
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

    /// Number of cores to assume, at least one.
    #[must_use]
    pub fn cores(mut self, cores: usize) -> Self {
        self.cores = Some(cores);
        self
    }

    /// Features that kernels of the caller need.
    #[must_use]
    pub fn features(mut self, features: Features) -> Self {
        self.features = features;
        self
    }

    /// Keeps compiled pipelines, if the adapter can export them, and the tuner's choices in this folder. An empty path keeps nothing. The
    /// folder is created when something is saved.
    ///
    /// Files are read when the device is opened, and written by [`Gpu::save_caches`](super::Gpu::save_caches) and when the last clone of the
    /// [`Gpu`](super::Gpu) is dropped. They belong to one adapter, driver and version of this crate. A file that does not fit, is damaged, or
    /// cannot be read or written is ignored with a warning. If processes share a folder, the last writer wins.
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
        self.autotune = autotune;
        self
    }

    /// Profiles each executable at its third run, and writes a table, JSON and a Chrome trace into a folder of its own in this folder:
    /// `profile.txt`, `profile.json` and `trace.json`. An empty path profiles nothing. A failure is a warning in the log.
    #[must_use]
    pub fn profile_dir(mut self, folder: impl Into<PathBuf>) -> Self {
        self.profile_dir = Some(folder.into());
        self
    }

    /// Writes what each graph becomes when it is compiled into a folder of its own in this folder: the graph as text and for Graphviz, the
    /// memory plan, the list of dispatches, and the WGSL of each kernel. An empty path writes nothing. A failure is a warning in the log.
    #[must_use]
    pub fn dump_dir(mut self, folder: impl Into<PathBuf>) -> Self {
        self.dump_dir = Some(folder.into());
        self
    }

    /// Upper bound on the idle compiled kernels that are kept. The least recently used are dropped first. A kernel in use is never dropped.
    #[must_use]
    pub fn idle_pipelines(mut self, most: usize) -> Self {
        self.idle_pipelines = Some(most);
        self
    }

    /// Upper bound on the idle bind groups that are kept.
    #[must_use]
    pub fn idle_bind_groups(mut self, most: usize) -> Self {
        self.idle_bind_groups = most;
        self
    }

    /// Upper bound on the bytes of idle buffers that are kept for reuse.
    #[must_use]
    pub fn idle_bytes(mut self, most: u64) -> Self {
        self.idle_bytes = most;
        self
    }

    /// The features of a device that may be used.
    pub(super) fn wants(&self, features: Features) -> Features {
        if self.baseline {
            Features::empty()
        } else if self.f16 {
            features
        } else {
            features - Features::SHADER_F16
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_selects_by_index_address_or_name() -> Result<()> {
        let select = |text| GpuOptions::default().select(text);
        assert_eq!(select("#12")?.adapter_index, Some(12));
        for address in ["0000:01:00.0", "c1:00.0"] {
            assert_eq!(select(address)?.pci_address.as_deref(), Some(address));
        }
        for name in ["4090", "llvmpipe (LLVM 15.0.6, 256 bits)", "abc", "a: b"] {
            let options = select(name)?;
            assert_eq!(options.adapter.as_deref(), Some(name));
            assert_eq!(options.pci_address, None);
        }
        let nothing = select("")?;
        assert_eq!((nothing.adapter, nothing.adapter_index), (None, None));
        for wrong in ["#", "#x", "#-1", "#1.5"] {
            assert!(
                matches!(select(wrong), Err(Error::Config { .. })),
                "{wrong}"
            );
        }
        Ok(())
    }
}
