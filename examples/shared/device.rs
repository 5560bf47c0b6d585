//! The options that choose the GPU.

use energyflow::{Gpu, GpuOptions, Result};

/// Flatten it into the options of an example: `#[command(flatten)] device: Device`.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Device")]
pub struct Device {
    /// Use the adapter with this index (#1) or PCI address (0000:01:00.0), or one whose name contains this.
    /// Without it the environment variable ENERGYFLOW_ADAPTER decides, in the same form
    #[arg(long, value_name = "ADAPTER")]
    adapter: Option<String>,
}

impl Device {
    /// Opens the device, and says on stderr which one it is.
    pub fn open(&self) -> Result<Gpu> {
        let mut options = GpuOptions::from_env()?;
        if let Some(adapter) = &self.adapter {
            options = options.select(adapter)?;
        }
        let gpu = Gpu::new(&options)?;
        let capabilities = gpu.capabilities();
        eprintln!(
            "adapter {} ({}), kernels: {}",
            capabilities.adapter,
            capabilities.driver,
            capabilities.kernel_tier()
        );
        Ok(gpu)
    }
}
