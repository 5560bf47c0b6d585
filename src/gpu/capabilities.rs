//! What a device can do.

use std::fmt;

use wgpu::{
    AdapterInfo, Backend, CooperativeMatrixProperties, CooperativeScalarType, DeviceType, Features,
    Limits,
};

use super::cores::{self, CoresFrom};
use super::options::GpuOptions;

/// The range of subgroup sizes. If the two differ, a kernel cannot rely on one size.
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
    pub backend: Backend,
    /// Driver name and version.
    pub driver: String,
    /// Discrete, integrated, virtual or software.
    pub device_type: DeviceType,
    /// Cores that run workgroups at once: streaming multiprocessors of NVIDIA, compute units of AMD, Xe cores of Intel, GPU cores of Apple.
    /// The choice of kernels and the division of work depend on it. No API reports it.
    pub cores: usize,
    /// Where the number of cores comes from.
    pub cores_from: CoresFrom,
    /// Shaders may use the type `f16`; otherwise 16-bit floats are stored in pairs, through `pack2x16float`.
    pub f16: bool,
    /// Subgroup operations and their sizes.
    pub subgroups: Option<SubgroupSizes>,
    /// GPU time can be measured.
    pub timestamps: bool,
    /// Compiled pipelines can be kept between processes.
    pub pipeline_cache: bool,
    /// Storage buffers may be mapped, because CPU and GPU share their memory.
    pub mappable_storage: bool,
    /// Matrix multiply-accumulate configurations of the hardware, as far as `f16` allows their use; empty without the feature.
    pub cooperative_matrix: Vec<CooperativeMatrixProperties>,
    /// Kernels do without workgroup memory and barriers, see [`GpuOptions::barrier_free`](super::GpuOptions::barrier_free).
    pub barrier_free: bool,
    /// The configuration that matrix products use. It has passed its test.
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
        options: &GpuOptions,
    ) -> Self {
        #[cfg_attr(not(feature = "trace"), expect(unused_mut, reason = "tests change it"))]
        let (mut info, mut limits, mut features) =
            (device.adapter_info(), device.limits(), features);
        #[cfg(feature = "trace")]
        if let Some(stand_in) = super::trace::installed() {
            stand_in.disguise(super::trace::Disguise {
                info: &mut info,
                features: &mut features,
                limits: &mut limits,
                matrices: &mut cooperative_matrix,
            });
        }
        let shared = shares_memory(&info);
        let cores = cores::of(&info.name, info.device_type, options.cores);
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
            pipeline_cache: has(Features::PIPELINE_CACHE),
            mappable_storage: has(Features::MAPPABLE_PRIMARY_BUFFERS) && shared,
            cooperative_matrix,
            barrier_free: options
                .barrier_free
                .unwrap_or(info.device_type == DeviceType::Cpu),
            cores: cores.0,
            cores_from: cores.1,
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
        writeln!(f, "cores        {} ({})", self.cores, self.cores_from)?;
        writeln!(f, "kernels      {}", self.kernel_tier())?;
        writeln!(f, "f16 storage  {}", self.f16_storage())?;
        match self.subgroups {
            Some(SubgroupSizes { min, max }) if min == max => writeln!(f, "subgroups    {min}")?,
            Some(SubgroupSizes { min, max }) => writeln!(f, "subgroups    {min} to {max}")?,
            None => writeln!(f, "subgroups    no")?,
        }
        writeln!(f, "timestamps   {}", yes(self.timestamps))?;
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

/// Hardware that multiplies small matrices with f32 sums. The invocations of a subgroup do it together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct MatrixUnits {
    /// Rows and columns of the matrices: 8 or 16.
    pub size: usize,
    /// Invocations of a subgroup.
    pub lanes: usize,
    /// They take f16 operands.
    pub f16: bool,
    /// They take f32 operands.
    pub f32: bool,
    /// Matrices are read from arrays of scalars only.
    pub(crate) scalar: bool,
    /// Bytes of workgroup memory.
    pub(crate) storage: usize,
    /// Upper bound on the invocations per workgroup.
    pub(crate) invocations: usize,
}

impl MatrixUnits {
    /// The largest square configuration with f32 sums that kernels are written for.
    pub(super) fn choose(capabilities: &Capabilities) -> Option<Self> {
        let lanes = match (capabilities.backend, capabilities.subgroups) {
            // Metal reports a range, but every GPU with matrix units has SIMD-groups of 32.
            (Backend::Metal, Some(_)) => 32,
            (_, Some(sizes)) if sizes.min == sizes.max => sizes.min as usize,
            _ => return None,
        };
        let has = |size: u32, operand: CooperativeScalarType| {
            capabilities.cooperative_matrix.iter().any(|matrix| {
                [matrix.m_size, matrix.n_size, matrix.k_size] == [size; 3]
                    && matrix.ab_type == operand
                    && matrix.cr_type == CooperativeScalarType::F32
            })
        };
        let limits = &capabilities.limits;
        [16, 8].into_iter().find_map(|size| {
            let f16 = has(size, CooperativeScalarType::F16);
            let f32 = has(size, CooperativeScalarType::F32);
            (f16 || f32).then_some(Self {
                size: size as usize,
                lanes,
                f16,
                f32,
                scalar: capabilities.backend == Backend::Metal,
                storage: limits.max_compute_workgroup_storage_size as usize,
                invocations: limits.max_compute_invocations_per_workgroup.min(256) as usize,
            })
        })
    }
}

impl fmt::Display for MatrixUnits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let operands = match (self.f16, self.f32) {
            (true, true) => "f16 and f32",
            (true, false) => "f16",
            (false, _) => "f32",
        };
        let size = self.size;
        write!(
            f,
            "{size}x{size}x{size} {operands}, subgroups of {}",
            self.lanes
        )
    }
}

pub(super) fn shares_memory(info: &AdapterInfo) -> bool {
    matches!(
        info.device_type,
        DeviceType::IntegratedGpu | DeviceType::Cpu
    )
}
