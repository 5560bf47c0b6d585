//! Compiled kernels, cached by key.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::device::Gpu;
use super::guard::{Guard, within};
use super::lock;
use super::report::Capabilities;
use super::store::Store;
use crate::error::Result;

/// How a kernel uses a binding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// `var<storage, read>`
    Read,
    /// `var<storage, read_write>`
    ReadWrite,
}

/// A kernel in WGSL: entry point `main`, binding i at `@group(0) @binding(i)`, every one a storage buffer.
#[derive(Clone, Debug)]
pub struct KernelSource {
    pub(crate) wgsl: String,
    pub(crate) bindings: Vec<Access>,
    trusted: bool,
}

impl KernelSource {
    /// A kernel of a user of this crate; runs with bounds checks.
    #[must_use]
    pub fn new(wgsl: impl Into<String>, bindings: Vec<Access>) -> Self {
        Self {
            wgsl: wgsl.into(),
            bindings,
            trusted: false,
        }
    }

    /// A kernel of this crate, which runs without runtime checks. It must keep the promises listed in `compile`.
    pub(crate) fn trusted(wgsl: impl Into<String>, bindings: Vec<Access>) -> Self {
        Self {
            trusted: true,
            ..Self::new(wgsl, bindings)
        }
    }

    /// The text.
    #[must_use]
    pub fn wgsl(&self) -> &str {
        &self.wgsl
    }

    /// What is bound, in order.
    #[must_use]
    pub fn bindings(&self) -> &[Access] {
        &self.bindings
    }
}

/// A compiled kernel.
#[derive(Debug)]
pub struct Pipeline {
    raw: wgpu::ComputePipeline,
    layout: Arc<BindingLayout>,
    key: String,
    wgsl: String,
}

impl Pipeline {
    /// What it is cached under.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// The text it was compiled from.
    #[must_use]
    pub fn wgsl(&self) -> &str {
        &self.wgsl
    }

    /// What is bound, in order.
    #[must_use]
    pub fn bindings(&self) -> &[Access] {
        &self.layout.bindings
    }

    /// The wgpu pipeline.
    #[must_use]
    pub fn raw(&self) -> &wgpu::ComputePipeline {
        &self.raw
    }

    pub(super) fn layout(&self) -> &BindingLayout {
        &self.layout
    }
}

/// One per device and list of accesses, so that pipelines with the same list share bind groups.
#[derive(Debug)]
pub(super) struct BindingLayout {
    /// Unique in the process, so that a bind group of another device is told apart.
    pub(super) id: u64,
    pub(super) group: wgpu::BindGroupLayout,
    bindings: Vec<Access>,
    pipeline: wgpu::PipelineLayout,
}

/// Counts of the cache of compiled kernels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PipelineStats {
    /// Requests served from the cache.
    pub hits: u64,
    /// Kernels compiled.
    pub misses: u64,
    /// Time spent on generating and compiling them, summed over threads.
    pub compile_time: Duration,
}

/// Holds its lock while its kernel compiles, so that one key is compiled once and other keys meanwhile.
type Slot = Arc<Mutex<Option<Arc<Pipeline>>>>;

/// Under which name the driver's cache is kept between processes.
const KIND: &str = "pipelines";

#[derive(Debug)]
pub(super) struct Pipelines {
    slots: Mutex<HashMap<String, Slot>>,
    layouts: Mutex<HashMap<Vec<Access>, Arc<BindingLayout>>>,
    stats: Mutex<PipelineStats>,
    /// The driver's cache, if it is to be kept.
    driver_cache: Option<wgpu::PipelineCache>,
}

impl Pipelines {
    pub(super) fn new(guard: &Guard, capabilities: &Capabilities, store: &Store) -> Self {
        let driver_cache = if store.is_on() && capabilities.pipeline_cache {
            store
                .load(KIND, |content| driver_cache(guard, Some(content)))
                .or_else(|| {
                    driver_cache(guard, None)
                        .inspect_err(|reason| log::warn!("no pipeline cache: {reason}"))
                        .ok()
                })
        } else {
            None
        };
        Self {
            slots: Mutex::default(),
            layouts: Mutex::default(),
            stats: Mutex::default(),
            driver_cache,
        }
    }

    pub(super) fn save(&self, store: &Store) {
        // A device that is lost has none.
        if let Some(content) = self
            .driver_cache
            .as_ref()
            .and_then(|cache| cache.get_data())
        {
            store.save(KIND, &content);
        }
    }
}

/// A cache of the driver, filled with what an earlier one held.
fn driver_cache(guard: &Guard, data: Option<&[u8]>) -> Result<wgpu::PipelineCache, String> {
    let descriptor = wgpu::PipelineCacheDescriptor {
        label: Some("energyflow"),
        data,
        // Refused data is to be reported, not to be replaced in silence.
        fallback: false,
    };
    let cache = guard.run(
        || "the pipeline cache".to_owned(),
        data.map_or(0, |data| data.len() as u64),
        || {
            // SAFETY: `data` must be what `get_data` returned for this adapter. Only `save` writes it. The envelope's
            // checksum and key show that it is whole and of this adapter, driver and version of this crate; wgpu checks its own
            // header, and the driver the vendor, device and cache identifier in its. Against a forger none of these helps,
            // hence the request in `GpuOptions::cache_dir` to keep the folder private.
            unsafe { guard.device.create_pipeline_cache(&descriptor) }
        },
    );
    cache.map_err(|error| error.to_string())
}

impl Gpu {
    /// The kernel cached under `key`, which is made from `source` if there is none. A failure is not cached.
    ///
    /// Keys are one namespace with those of this crate's kernels; prefix your own.
    ///
    /// # Errors
    /// Whatever `source` returns; [`Error::Limit`](crate::Error::Limit) when it has too many bindings; [`Error::Validation`](crate::Error::Validation)
    /// when it does not compile (the log has the numbered text at level debug).
    pub fn pipeline(
        &self,
        key: &str,
        source: impl FnOnce() -> Result<KernelSource>,
    ) -> Result<Arc<Pipeline>> {
        self.0.guard.check()?;
        let cache = &self.0.pipelines;
        let slot = {
            let mut slots = lock(&cache.slots);
            match slots.get(key) {
                Some(slot) => Arc::clone(slot),
                None => Arc::clone(slots.entry(key.to_owned()).or_default()),
            }
        };
        let mut slot = lock(&slot);
        if let Some(pipeline) = &*slot {
            lock(&cache.stats).hits += 1;
            return Ok(Arc::clone(pipeline));
        }
        let start = Instant::now();
        let pipeline = Arc::new(self.compile(key, &source()?)?);
        *slot = Some(Arc::clone(&pipeline));
        let mut stats = lock(&cache.stats);
        stats.misses += 1;
        stats.compile_time += start.elapsed();
        Ok(pipeline)
    }

    pub(super) fn pipeline_stats(&self) -> PipelineStats {
        *lock(&self.0.pipelines.stats)
    }

    fn compile(&self, key: &str, source: &KernelSource) -> Result<Pipeline> {
        let what = || format!("kernel {key:?}");
        let layout = self.binding_layout(&source.bindings, what)?;
        let device = self.device();
        let descriptor = wgpu::ShaderModuleDescriptor {
            label: Some(key),
            source: wgpu::ShaderSource::Wgsl(source.wgsl.as_str().into()),
        };
        let raw = self.0.guard.run(what, 0, || {
            let module = if source.trusted {
                // SAFETY: only this crate makes trusted sources, from its own templates and static shapes. They index
                // only inside the sizes of the layouts they are generated for, which the plan binds and whose buffers
                // hold them whole; an index read from data (a token id) is checked on the host before upload; every
                // loop has a bound known when it is generated; divisors are constants other than zero.
                unsafe {
                    device.create_shader_module_trusted(
                        descriptor,
                        wgpu::ShaderRuntimeChecks::unchecked(),
                    )
                }
            } else {
                device.create_shader_module(descriptor)
            };
            device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(key),
                layout: Some(&layout.pipeline),
                module: &module,
                entry_point: Some("main"),
                compilation_options: wgpu::PipelineCompilationOptions {
                    // Own kernels write workgroup memory before they read it.
                    zero_initialize_workgroup_memory: !source.trusted,
                    ..Default::default()
                },
                cache: self.0.pipelines.driver_cache.as_ref(),
            })
        });
        let raw =
            raw.inspect_err(|_| log::debug!("kernel {key:?}:\n{}", numbered(&source.wgsl)))?;
        Ok(Pipeline {
            raw,
            layout,
            key: key.to_owned(),
            wgsl: source.wgsl.clone(),
        })
    }

    fn binding_layout(
        &self,
        bindings: &[Access],
        what: impl Fn() -> String,
    ) -> Result<Arc<BindingLayout>> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);

        if let Some(layout) = lock(&self.0.pipelines.layouts).get(bindings) {
            return Ok(Arc::clone(layout));
        }
        within(
            &what,
            "max_storage_buffers_per_shader_stage",
            bindings.len() as u64,
            u64::from(
                self.capabilities()
                    .limits
                    .max_storage_buffers_per_shader_stage,
            ),
        )?;
        let entries: Vec<_> = bindings
            .iter()
            .zip(0..)
            .map(|(&access, binding)| wgpu::BindGroupLayoutEntry {
                binding,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer {
                    ty: wgpu::BufferBindingType::Storage {
                        read_only: access == Access::Read,
                    },
                    has_dynamic_offset: false,
                    min_binding_size: None,
                },
                count: None,
            })
            .collect();
        let device = self.device();
        let (group, pipeline) = self.0.guard.run(what, 0, || {
            let group = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
                label: None,
                entries: &entries,
            });
            let pipeline = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
                label: None,
                bind_group_layouts: &[Some(&group)],
                immediate_size: 0,
            });
            (group, pipeline)
        })?;
        let layout = Arc::new(BindingLayout {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            group,
            bindings: bindings.to_vec(),
            pipeline,
        });
        // Where two threads made it at once, the first one's stays.
        let mut layouts = lock(&self.0.pipelines.layouts);
        Ok(Arc::clone(
            layouts.entry(bindings.to_vec()).or_insert(layout),
        ))
    }
}

fn numbered(text: &str) -> String {
    text.lines()
        .zip(1..)
        .map(|(line, number)| format!("{number:5} {line}\n"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{Alignment, GpuOptions, Layout, Tensor};
    use crate::types::DType;

    /// Reverses 64 numbers through workgroup memory, without any runtime check.
    #[test]
    fn trusted_kernels_compute() -> Result<()> {
        let gpu = Gpu::new(&GpuOptions::default())?;
        let text = "
@group(0) @binding(0) var<storage, read> x: array<u32>;
@group(0) @binding(1) var<storage, read_write> y: array<u32>;
var<workgroup> tile: array<u32, 64>;
@compute @workgroup_size(64)
fn main(@builtin(local_invocation_index) i: u32) {
    tile[i] = x[i];
    workgroupBarrier();
    y[i] = tile[63u - i];
}";
        let kernel = gpu.pipeline("test.reverse", || {
            let bindings = vec![Access::Read, Access::ReadWrite];
            Ok(KernelSource::trusted(text, bindings))
        })?;
        let layout = Layout::new(1, 64, DType::U32, Alignment::Bytes64)?;
        let (x, y) = (Tensor::uninit(&gpu, layout)?, Tensor::uninit(&gpu, layout)?);
        let up: Vec<u32> = (0..64).collect();
        x.upload(&gpu, &up)?;
        y.poison(&gpu)?;
        let group = gpu.bind_group(&kernel, &[x.slice().clone(), y.slice().clone()])?;
        let mut recorder = gpu.recorder("reverse");
        recorder.dispatch(&kernel, &group, [1; 3])?;
        recorder.submit()?;
        let down: Vec<u32> = y.download(&gpu)?.wait()?;
        assert!(down.iter().eq(up.iter().rev()), "{down:?}");
        Ok(())
    }
}
