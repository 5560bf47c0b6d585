//! Compiled kernels, cached by key. Those of the caller run with all checks, those of this crate without.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::cache::Cache;
use super::capabilities::Capabilities;
use super::context::{Context, within};
use super::lock::lock;
use super::options::GpuOptions;
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

/// A kernel in WGSL with entry point `main`. Binding i is a storage buffer at `@group(0) @binding(i)`. It runs with all checks.
#[derive(Clone, Debug)]
pub struct KernelSource {
    pub(crate) wgsl: String,
    pub(crate) bindings: Vec<Access>,
}

impl KernelSource {
    /// A kernel of this text, with the access of each binding in order.
    #[must_use]
    pub fn new(wgsl: impl Into<String>, bindings: Vec<Access>) -> Self {
        Self {
            wgsl: wgsl.into(),
            bindings,
        }
    }

    /// The WGSL text.
    #[must_use]
    pub fn wgsl(&self) -> &str {
        &self.wgsl
    }

    /// The access of each binding, in order.
    #[must_use]
    pub fn bindings(&self) -> &[Access] {
        &self.bindings
    }
}

/// A kernel of this crate, which runs without runtime checks. It must keep the promises listed in [`Pipelines::compile`].
#[derive(Clone, Debug)]
pub(crate) struct TrustedSource {
    pub(crate) wgsl: String,
    /// The access of each binding in order, and the number of bytes that it needs at least.
    pub(crate) bindings: Vec<(Access, u64)>,
}

/// A compiled kernel.
#[derive(Debug)]
pub struct Pipeline {
    raw: wgpu::ComputePipeline,
    layout: Arc<BindingLayout>,
    key: String,
    wgsl: String,
    /// Number of bytes that each binding needs at least. Empty for a kernel with runtime checks.
    sizes: Vec<u64>,
    /// Tests compute what it computes, see [`trace`](super::trace).
    #[cfg(feature = "trace")]
    stands_in: bool,
}

impl Pipeline {
    /// The key under which it is cached.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// The text it was compiled from.
    #[must_use]
    pub fn wgsl(&self) -> &str {
        &self.wgsl
    }

    /// The access of each binding, in order.
    #[must_use]
    pub fn bindings(&self) -> &[Access] {
        &self.layout.bindings
    }

    pub(super) fn raw(&self) -> &wgpu::ComputePipeline {
        &self.raw
    }

    #[cfg(feature = "trace")]
    pub(super) fn stands_in(&self) -> bool {
        self.stands_in
    }

    pub(super) fn sizes(&self) -> &[u64] {
        &self.sizes
    }

    pub(super) fn layout(&self) -> &BindingLayout {
        &self.layout
    }
}

/// The bind group layout of a list of accesses. There is one per device and list, so that pipelines with the same list share bind groups.
#[derive(Debug)]
pub(super) struct BindingLayout {
    /// Unique in the process, so that a bind group of another device is recognised.
    pub(super) id: u64,
    pub(super) group: wgpu::BindGroupLayout,
    bindings: Vec<Access>,
    pipeline: wgpu::PipelineLayout,
}

/// Counts of the caches of compiled kernels, the caller's and this crate's together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PipelineStats {
    /// Requests served from the cache.
    pub hits: u64,
    /// Kernels compiled.
    pub misses: u64,
    /// Kernels in the cache, in use or not.
    pub cached: u64,
    /// Kernels dropped because there were more than [`GpuOptions::idle_pipelines`](super::GpuOptions::idle_pipelines) idle ones.
    pub evicted: u64,
    /// Time spent on generating and compiling them, summed over threads.
    pub compile_time: Duration,
}

/// Compiled kernels by key.
#[derive(Debug)]
struct ByKey {
    compiled: Cache<String, Pipeline>,
    /// Each is locked while its kernel compiles, so that a key is compiled once while other keys compile at the same time.
    compiling: Mutex<HashMap<String, Arc<Mutex<()>>>>,
}

impl ByKey {
    fn new(most_idle: usize) -> Self {
        Self {
            compiled: Cache::new(most_idle),
            compiling: Mutex::default(),
        }
    }

    fn compile_once(
        &self,
        key: &str,
        compile: impl FnOnce() -> Result<Pipeline>,
    ) -> Result<Arc<Pipeline>> {
        let turn = Arc::clone(lock(&self.compiling).entry(key.to_owned()).or_default());
        let _turn = lock(&turn);
        // Another thread may have compiled it meanwhile.
        if let Some(pipeline) = self.compiled.get(key) {
            lock(&self.compiling).remove(key);
            return Ok(pipeline);
        }
        let compiled = compile();
        let pipeline = compiled.map(|pipeline| self.compiled.insert(key.to_owned(), pipeline));
        lock(&self.compiling).remove(key);
        pipeline
    }
}

/// Name under which the driver's cache is kept between processes.
const KIND: &str = "pipelines";

#[derive(Debug)]
pub(super) struct Pipelines {
    /// Kernels of this crate. They have their own namespace: no key of a caller finds or replaces one of them.
    trusted: ByKey,
    /// Kernels of the caller.
    checked: ByKey,
    layouts: Mutex<HashMap<Vec<Access>, Arc<BindingLayout>>>,
    compile_time: Mutex<Duration>,
    /// The driver's cache, if it is to be kept.
    driver_cache: Option<wgpu::PipelineCache>,
}

impl Pipelines {
    pub(super) fn new(context: &Context, options: &GpuOptions, store: &Store) -> Self {
        let Capabilities { pipeline_cache, .. } = context.capabilities;
        let driver_cache = if store.is_on() && pipeline_cache {
            store
                .load(KIND, |content| driver_cache(context, Some(content)))
                .or_else(|| {
                    driver_cache(context, None)
                        .inspect_err(|reason| log::warn!("no pipeline cache: {reason}"))
                        .ok()
                })
        } else {
            None
        };
        let software = context.capabilities.device_type == wgpu::DeviceType::Cpu;
        let usual = if software { 32 } else { 256 };
        let idle = options.idle_pipelines.unwrap_or(usual);
        Self {
            trusted: ByKey::new(idle),
            checked: ByKey::new(idle),
            layouts: Mutex::default(),
            compile_time: Mutex::default(),
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

    pub(super) fn stats(&self) -> PipelineStats {
        let [trusted, checked] = [&self.trusted, &self.checked].map(|of| of.compiled.counts());
        PipelineStats {
            hits: trusted.hits + checked.hits,
            misses: trusted.misses + checked.misses,
            cached: trusted.cached + checked.cached,
            evicted: trusted.evicted + checked.evicted,
            compile_time: *lock(&self.compile_time),
        }
    }

    /// Drops surplus idle kernels.
    pub(super) fn sweep(&self) {
        self.trusted.compiled.sweep();
        self.checked.compiled.sweep();
    }

    /// A kernel of the caller.
    pub(super) fn checked(
        &self,
        context: &Context,
        key: &str,
        source: impl FnOnce() -> Result<KernelSource>,
    ) -> Result<Arc<Pipeline>> {
        context.check()?;
        if let Some(pipeline) = self.checked.compiled.get(key) {
            return Ok(pipeline);
        }
        let pipeline = self.checked.compile_once(key, || {
            let start = Instant::now();
            let pipeline = self.compile(context, key, source()?, None)?;
            *lock(&self.compile_time) += start.elapsed();
            Ok(pipeline)
        })?;
        context.settle()?;
        Ok(pipeline)
    }

    /// A kernel of this crate.
    pub(super) fn trusted(
        &self,
        context: &Context,
        key: &str,
        source: impl FnOnce() -> Result<TrustedSource>,
    ) -> Result<Arc<Pipeline>> {
        context.check()?;
        if let Some(pipeline) = self.trusted.compiled.get(key) {
            return Ok(pipeline);
        }
        let pipeline = self.make_trusted(context, key, source)?;
        context.settle()?;
        Ok(pipeline)
    }

    pub(super) fn has_trusted(&self, key: &str) -> bool {
        self.trusted.compiled.has(key)
    }

    /// As [`Self::trusted`], for a kernel that is not in the cache. The caller settles.
    pub(super) fn make_trusted(
        &self,
        context: &Context,
        key: &str,
        source: impl FnOnce() -> Result<TrustedSource>,
    ) -> Result<Arc<Pipeline>> {
        self.trusted.compile_once(key, || {
            let start = Instant::now();
            let TrustedSource { wgsl, bindings } = source()?;
            let (bindings, sizes) = bindings.into_iter().unzip();
            let kernel = KernelSource { wgsl, bindings };
            let pipeline = self.compile(context, key, kernel, Some(sizes))?;
            *lock(&self.compile_time) += start.elapsed();
            Ok(pipeline)
        })
    }

    /// With `trusted`, compiles without runtime checks, for bindings of at least these sizes.
    fn compile(
        &self,
        context: &Context,
        key: &str,
        source: KernelSource,
        trusted: Option<Vec<u64>>,
    ) -> Result<Pipeline> {
        let what = || format!("kernel {key:?}");
        let layout = self.binding_layout(context, &source.bindings, what)?;
        let device = &context.device;
        let text = source.wgsl.as_str();
        #[cfg(feature = "trace")]
        let made = trusted.as_ref().map(|_| made(key, &source));
        #[cfg(feature = "trace")]
        let text = match made {
            // Its bindings are those of the layout.
            Some(super::trace::Made::StandIn) => "@compute @workgroup_size(1) fn main() {}",
            _ => text,
        };
        let descriptor = wgpu::ShaderModuleDescriptor {
            label: Some(key),
            source: wgpu::ShaderSource::Wgsl(text.into()),
        };
        let raw = context.run(what, 0, || {
            #[cfg(feature = "trace")]
            let other = match &made {
                Some(super::trace::Made::Spirv(words)) => Some(passthrough(device, words)),
                _ => None,
            };
            #[cfg(not(feature = "trace"))]
            let other = None;
            let module = if let Some(module) = other {
                module
            } else if trusted.is_some() {
                // SAFETY: the shader must not do what the checks would prevent: access memory outside its bindings, loop for ever, divide
                // by zero.
                //
                // Only this crate makes trusted sources, from its own templates and static shapes. They index only inside the layouts they
                // are generated for; every loop has a bound known when it is generated; divisors are constants other than zero.
                //
                // A binding holds the whole layout: `BindGroup::check` compares its size with the layout's before every dispatch is made,
                // and refuses what is smaller. Of a value that is bound in part it compares what the kernel touches (`Binding::needs`). The grid
                // is the kernel's own: `runtime::BoundKernel` and `runtime::Function` take it from the kernel alone.
                //
                // An index that is read from memory (a token id, a position in a sorted list) is below its bound. Ids come from the host,
                // which checks them before every upload; an input that has never been written is zero. Positions are computed by earlier
                // dispatches of the same run, which write all that is read later. A run may be cut into several submissions; until its last
                // one nothing else is submitted (`Context::submit_part`). Functions on tensors of the caller (`direct`) refuse indices.
                //
                // Safe code of a caller cannot break this. A trusted pipeline never leaves the crate: its cache is apart from that of
                // `Gpu::pipeline`; `Sequence`, the handle for timing, runs whole executables as they are; memory whose wgpu buffer a caller
                // has seen is never reused for an executable (`Lease::exposed`). Kernels of the caller are compiled below, with all checks,
                // and so stay inside the buffers that the caller bound.
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
                    zero_initialize_workgroup_memory: trusted.is_none(),
                    ..Default::default()
                },
                cache: self.driver_cache.as_ref(),
            })
        });
        let raw =
            raw.inspect_err(|_| log::debug!("kernel {key:?}:\n{}", numbered(&source.wgsl)))?;
        Ok(Pipeline {
            raw,
            layout,
            key: key.to_owned(),
            wgsl: source.wgsl,
            sizes: trusted.unwrap_or_default(),
            #[cfg(feature = "trace")]
            stands_in: matches!(made, Some(super::trace::Made::StandIn)),
        })
    }

    fn binding_layout(
        &self,
        context: &Context,
        bindings: &[Access],
        what: impl Fn() -> String,
    ) -> Result<Arc<BindingLayout>> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);

        if let Some(layout) = lock(&self.layouts).get(bindings) {
            return Ok(Arc::clone(layout));
        }
        within(
            &what,
            "max_storage_buffers_per_shader_stage",
            bindings.len() as u64,
            u64::from(
                context
                    .capabilities
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
        let device = &context.device;
        let (group, pipeline) = context.run(what, 0, || {
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
        let mut layouts = lock(&self.layouts);
        Ok(Arc::clone(
            layouts.entry(bindings.to_vec()).or_insert(layout),
        ))
    }
}

/// What becomes of a kernel of this crate. A failure panics, because only tests come here.
#[cfg(feature = "trace")]
fn made(key: &str, source: &KernelSource) -> super::trace::Made {
    use super::trace::{Kernel, Made, installed};
    let Some(stand_in) = installed() else {
        return Made::Adapter;
    };
    let kernel = Kernel {
        key,
        wgsl: &source.wgsl,
        accesses: &source.bindings,
    };
    let made = stand_in.make(kernel);
    made.unwrap_or_else(|reason| panic!("{key}: {reason}"))
}

/// A module that the driver gets as it is.
#[cfg(feature = "trace")]
fn passthrough(device: &wgpu::Device, words: &[u32]) -> wgpu::ShaderModule {
    let entry_point = wgpu::PassthroughShaderEntryPoint {
        name: "main".into(),
        workgroup_size: (0, 0, 0),
    };
    let descriptor = wgpu::ShaderModuleDescriptorPassthrough {
        entry_points: vec![entry_point].into(),
        spirv: Some(words.to_vec().into()),
        ..Default::default()
    };
    // SAFETY: the words come from a test, which made them from a kernel of this crate.
    unsafe { device.create_shader_module_passthrough(descriptor) }
}

/// A pipeline cache of the driver, filled with the content of an earlier one.
fn driver_cache(context: &Context, data: Option<&[u8]>) -> Result<wgpu::PipelineCache, String> {
    let descriptor = wgpu::PipelineCacheDescriptor {
        label: Some("energyflow"),
        data,
        // Refused data is to be reported, not to be replaced in silence.
        fallback: false,
    };
    let cache = context.run(
        || "the pipeline cache".to_owned(),
        data.map_or(0, |data| data.len() as u64),
        || {
            // SAFETY: `data` must be what `get_data` returned for this adapter. Only `save` writes it. The envelope's
            // checksum and key show that it is whole and of this adapter, driver and version of this crate; wgpu checks its own
            // header, and the driver the vendor, device and cache identifier in its. Against a forger none of these helps,
            // hence the request in `GpuOptions::cache_dir` to keep the folder private.
            unsafe { context.device.create_pipeline_cache(&descriptor) }
        },
    );
    cache.map_err(|error| error.to_string())
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
    use crate::error::Error;
    use crate::gpu::{Alignment, Gpu, Layout, Tensor};
    use crate::types::DType;

    /// Reverses 64 numbers through workgroup memory, without any runtime check.
    #[test]
    fn trusted_kernels_compute() -> Result<()> {
        let gpu = Gpu::new(&GpuOptions::from_env()?)?;
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
        let kernel = gpu.trusted_pipeline("test.reverse", || {
            let bindings = [(Access::Read, 256), (Access::ReadWrite, 256)];
            Ok(TrustedSource {
                wgsl: text.to_owned(),
                bindings: bindings.to_vec(),
            })
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

    /// A kernel that would write far outside its bindings if it were given a smaller one.
    #[test]
    fn trusted_kernels_are_bound_to_what_they_need() -> Result<()> {
        let gpu = Gpu::new(&GpuOptions::from_env()?)?;
        let text = "
@group(0) @binding(0) var<storage, read> x: array<u32>;
@group(0) @binding(1) var<storage, read_write> y: array<u32>;
@compute @workgroup_size(64)
fn main(@builtin(local_invocation_index) i: u32) {
    y[i] = x[i];
}";
        let source = |bytes| TrustedSource {
            wgsl: text.to_owned(),
            bindings: vec![(Access::Read, bytes), (Access::ReadWrite, bytes)],
        };
        let kernel = gpu.trusted_pipeline("test.copy", || Ok(source(256)))?;
        let buffer = gpu.buffer(512, "x")?;
        let other = gpu.buffer(512, "y")?;
        let bind = |from: u64, to: u64| {
            gpu.bind_group(&kernel, &[buffer.slice(0, from)?, other.slice(256, to)?])
        };
        let good = bind(256, 256)?;
        for (from, to) in [(256, 240), (16, 256), (252, 252)] {
            let refused = bind(from, to);
            let Err(Error::Validation { reason, .. }) = refused else {
                panic!("{from} and {to} bytes: {refused:?}");
            };
            assert!(reason.contains("256 bytes"), "{reason}");
        }

        // The same accesses, so that bind groups are shared, but another size: refused before it is dispatched.
        let larger = gpu.trusted_pipeline("test.larger", || Ok(source(512)))?;
        let mut recorder = gpu.recorder("larger");
        let refused = recorder.dispatch(&larger, &good, [1; 3]);
        assert!(matches!(refused, Err(Error::Validation { .. })));
        recorder.dispatch(&kernel, &good, [1; 3])?;
        recorder.submit()?.wait()
    }

    #[test]
    fn keys_of_the_caller_and_of_the_crate_are_apart() -> Result<()> {
        let gpu = Gpu::new(&GpuOptions::from_env()?)?;
        let text = |value: u32| {
            format!(
                "@group(0) @binding(0) var<storage, read_write> y: array<u32>;
@compute @workgroup_size(1) fn main() {{ y[0] = {value}u; }}"
            )
        };
        let trusted = |value| {
            let source = TrustedSource {
                wgsl: text(value),
                bindings: vec![(Access::ReadWrite, 4)],
            };
            gpu.trusted_pipeline("same", || Ok(source))
        };
        let checked = |value| {
            gpu.pipeline("same", || {
                Ok(KernelSource::new(text(value), vec![Access::ReadWrite]))
            })
        };
        let (ours, theirs) = (trusted(1)?, checked(2)?);
        assert!(ours.wgsl().contains("1u") && theirs.wgsl().contains("2u"));
        assert!(Arc::ptr_eq(&ours, &trusted(3)?) && Arc::ptr_eq(&theirs, &checked(4)?));
        assert_eq!((ours.sizes(), theirs.sizes()), (&[4][..], &[][..]));
        Ok(())
    }
}
