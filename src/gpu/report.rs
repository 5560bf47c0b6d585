//! What a device can do, and what has been done with it.

use std::fmt;
use std::sync::atomic::Ordering;

use wgpu::{CooperativeMatrixProperties, CooperativeScalarType, Features, Limits};

use super::bindings::BindGroupStats;
use super::device::{Gpu, shares_memory};
use super::matrices::MatrixUnits;
use super::pipelines::PipelineStats;
use super::pool::PoolStats;
use super::store::CacheStats;
use super::tuning::{Tuning, TuningStats};

/// The range of subgroup sizes; a kernel cannot rely on one size where they differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SubgroupSizes {
    /// Smallest, in invocations.
    pub min: u32,
    /// Largest, in invocations.
    pub max: u32,
}

/// What an opened device can do: features count only if the device was opened with them.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Capabilities {
    /// The adapter's name.
    pub adapter: String,
    /// The API underneath.
    pub backend: wgpu::Backend,
    /// Driver name and version.
    pub driver: String,
    /// Discrete, integrated, virtual or software.
    pub device_type: wgpu::DeviceType,
    /// Shaders may use the type `f16`; otherwise 16-bit floats are stored in pairs, through `pack2x16float`.
    pub f16: bool,
    /// Subgroup operations and their sizes.
    pub subgroups: Option<SubgroupSizes>,
    /// GPU time can be measured.
    pub timestamps: bool,
    /// Bytes of immediate data a dispatch; zero without the feature.
    pub immediates: u32,
    /// Compiled pipelines can be kept between processes.
    pub pipeline_cache: bool,
    /// Storage buffers may be mapped, because CPU and GPU share their memory.
    pub mappable_storage: bool,
    /// Matrix multiply-accumulate configurations of the hardware, as far as `f16` allows their use; empty without the feature.
    pub cooperative_matrix: Vec<CooperativeMatrixProperties>,
    /// Kernels do without workgroup memory and barriers, see [`GpuOptions::barrier_free`](super::GpuOptions::barrier_free).
    pub barrier_free: bool,
    /// The one of these configurations that matrix products use, after it has passed its test.
    pub matrix_units: Option<MatrixUnits>,
    /// Limits that the device was opened with.
    pub limits: Limits,
}

impl Capabilities {
    /// `features`: those of the device that may be used.
    pub(super) fn new(
        device: &wgpu::Device,
        features: Features,
        mut cooperative_matrix: Vec<CooperativeMatrixProperties>,
        barrier_free: Option<bool>,
    ) -> Self {
        let info = device.adapter_info();
        let limits = device.limits();
        let shared = shares_memory(&info);
        let has = |feature| features.contains(feature);
        let f16 = has(Features::SHADER_F16);
        let halves = |matrix: &CooperativeMatrixProperties| {
            [matrix.ab_type, matrix.cr_type].contains(&CooperativeScalarType::F16)
        };
        let cooperative = has(Features::EXPERIMENTAL_COOPERATIVE_MATRIX);
        cooperative_matrix.retain(|matrix| cooperative && (f16 || !halves(matrix)));
        Self {
            driver: format!("{} {}", info.driver, info.driver_info)
                .trim()
                .to_owned(),
            adapter: info.name,
            backend: info.backend,
            device_type: info.device_type,
            f16,
            subgroups: has(Features::SUBGROUP).then_some(SubgroupSizes {
                min: info.subgroup_min_size,
                max: info.subgroup_max_size,
            }),
            timestamps: has(Features::TIMESTAMP_QUERY),
            immediates: if has(Features::IMMEDIATES) {
                limits.max_immediate_size
            } else {
                0
            },
            pipeline_cache: has(Features::PIPELINE_CACHE),
            mappable_storage: has(Features::MAPPABLE_PRIMARY_BUFFERS) && shared,
            cooperative_matrix,
            barrier_free: barrier_free.unwrap_or(info.device_type == wgpu::DeviceType::Cpu),
            matrix_units: None,
            limits,
        }
    }

    /// How matrix products share work inside a workgroup.
    #[must_use]
    pub fn kernel_tier(&self) -> &'static str {
        match (self.barrier_free, self.matrix_units) {
            (false, Some(_)) => "cooperative; vector, workgroup tiles",
            (true, Some(_)) => "cooperative; vector, barrier-free",
            (false, None) => "vector, workgroup tiles",
            (true, None) => "vector, barrier-free",
        }
    }

    /// How 16-bit floats are read and written in kernels.
    #[must_use]
    pub fn f16_storage(&self) -> &'static str {
        if self.f16 {
            "native f16"
        } else {
            "pack2x16float"
        }
    }
}

impl fmt::Display for Capabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let yes = |flag| if flag { "yes" } else { "no" };
        writeln!(f, "adapter      {}", self.adapter)?;
        writeln!(
            f,
            "device       {:?}, {}",
            self.device_type,
            self.backend.to_str()
        )?;
        writeln!(f, "driver       {}", self.driver)?;
        writeln!(f, "kernels      {}", self.kernel_tier())?;
        writeln!(f, "f16 storage  {}", self.f16_storage())?;
        match self.subgroups {
            Some(SubgroupSizes { min, max }) if min == max => writeln!(f, "subgroups    {min}")?,
            Some(SubgroupSizes { min, max }) => writeln!(f, "subgroups    {min} to {max}")?,
            None => writeln!(f, "subgroups    no")?,
        }
        writeln!(f, "timestamps   {}", yes(self.timestamps))?;
        writeln!(f, "immediates   {} B", self.immediates)?;
        writeln!(
            f,
            "features     pipeline cache {}, mappable storage {}",
            yes(self.pipeline_cache),
            yes(self.mappable_storage)
        )?;
        write!(f, "matrices     ")?;
        if self.cooperative_matrix.is_empty() {
            write!(f, "none: vector kernels")?;
        }
        for (i, matrix) in self.cooperative_matrix.iter().enumerate() {
            let separator = if i == 0 { "" } else { ", " };
            write!(
                f,
                "{separator}{}x{}x{} {:?}->{:?}",
                matrix.m_size, matrix.n_size, matrix.k_size, matrix.ab_type, matrix.cr_type
            )?;
        }
        match self.matrix_units {
            Some(units) => writeln!(f, "; products use {units}")?,
            None if self.cooperative_matrix.is_empty() => writeln!(f)?,
            None => writeln!(f, "; not used")?,
        }
        let limits = &self.limits;
        write!(
            f,
            "limits       {} storage buffers, {} B a binding, {} B a buffer, {} B workgroup storage, {} invocations, {} workgroups",
            limits.max_storage_buffers_per_shader_stage,
            limits.max_storage_buffer_binding_size,
            limits.max_buffer_size,
            limits.max_compute_workgroup_storage_size,
            limits.max_compute_invocations_per_workgroup,
            limits.max_compute_workgroups_per_dimension,
        )
    }
}

/// A snapshot of a device's capabilities and of the counts of everything done with it; made to be printed.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Report {
    /// What the device can do.
    pub capabilities: Capabilities,
    /// Buffers.
    pub pool: PoolStats,
    /// Compiled kernels.
    pub pipelines: PipelineStats,
    /// Bindings of buffers to kernels.
    pub bind_groups: BindGroupStats,
    /// Files kept between processes.
    pub caches: CacheStats,
    /// The tuner; `None` while it is off.
    pub tuning: Option<TuningStats>,
    /// Host-visible buffers made, for uploads and results.
    pub staging_buffers: u64,
    /// Submissions so far.
    pub submissions: u64,
    /// Dispatches in them.
    pub dispatches: u64,
    /// Errors of the device that belong to no call of this crate; they are in the log.
    pub uncaptured_errors: u64,
}

impl Gpu {
    /// Capabilities and statistics at this moment.
    #[must_use]
    pub fn report(&self) -> Report {
        Report {
            capabilities: self.0.capabilities.clone(),
            pool: self.pool_stats(),
            pipelines: self.pipeline_stats(),
            bind_groups: self.bind_group_stats(),
            caches: self.0.store.stats(),
            tuning: self.tuning().map(Tuning::stats),
            staging_buffers: self.staging_made(),
            submissions: self.0.submissions.load(Ordering::Relaxed),
            dispatches: self.0.dispatches.load(Ordering::Relaxed),
            uncaptured_errors: self.0.guard.uncaptured(),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.capabilities)?;
        let PoolStats {
            allocated_bytes,
            in_use_bytes,
            peak_bytes,
            hits,
            misses,
        } = self.pool;
        writeln!(
            f,
            "pool         {allocated_bytes} B allocated, {in_use_bytes} B in use, {peak_bytes} B at peak, {hits} hits, {misses} misses"
        )?;
        let PipelineStats {
            hits,
            misses,
            compile_time,
        } = self.pipelines;
        writeln!(
            f,
            "pipelines    {hits} hits, {misses} misses, {compile_time:.1?} compiling"
        )?;
        let BindGroupStats { hits, misses } = self.bind_groups;
        writeln!(f, "bind groups  {hits} hits, {misses} misses")?;
        let CacheStats {
            loaded_bytes,
            saved,
            ignored,
        } = self.caches;
        writeln!(
            f,
            "cache files  {loaded_bytes} B loaded, {saved} saved, {ignored} ignored"
        )?;
        match self.tuning {
            Some(TuningStats {
                choices,
                hits,
                measured,
            }) => writeln!(
                f,
                "tuning       {choices} choices, {hits} hits, {measured} measured"
            )?,
            None => writeln!(f, "tuning       off")?,
        }
        write!(
            f,
            "work         {} submissions, {} dispatches, {} staging buffers, {} uncaptured errors",
            self.submissions, self.dispatches, self.staging_buffers, self.uncaptured_errors
        )
    }
}
