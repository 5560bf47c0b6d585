//! What a device can do at best, measured: the denominators of every bound.

use std::sync::Arc;

use super::{Clock, Host, Session};
use crate::error::Result;
use crate::gpu::{Access, Alignment, Gpu, KernelSource, Layout, Pipeline, Sequence, Tensor};
use crate::graph::Graph;
use crate::types::DType;

/// Best rates of a device, measured by kernels that do nothing else.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Ceilings {
    /// f32 multiply-adds out of registers, in operations per second: what kernels without matrix units can reach, whatever they store.
    pub flops: f64,
    /// Multiply-adds of the matrix units out of registers, f16 operands and f32 sums; none where products do not use them.
    pub matrix_flops: Option<f64>,
    /// Elementwise copy, bytes read and written per second.
    pub bytes: f64,
    /// Nanoseconds that an empty pass takes: part of every time. 0 by the host's clock, which takes it off.
    pub empty_pass: f64,
    /// What measured them.
    pub clock: Clock,
}

const REPEATS: usize = 20;

impl Ceilings {
    /// Measures them, which takes less than a second on a GPU. Where there are no timestamps or they do not count, the host's clock takes
    /// their place, and the rates are a little lower than the device's.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory), [`Error::DeviceLost`](crate::Error::DeviceLost).
    pub fn measure(gpu: &Gpu) -> Result<Self> {
        let (flops, clock) = arithmetic(gpu)?;
        Ok(Self {
            flops,
            matrix_flops: matrices(gpu)?,
            bytes: copy(gpu)?,
            empty_pass: match clock {
                Clock::Gpu => fastest(|| gpu.time(&[]))?,
                Clock::Host => 0.0,
            },
            clock,
        })
    }

    /// The least time that so much work can take, in nanoseconds: that of its operations or that of its bytes, whichever is longer.
    /// `matrix` says whether matrix units compute.
    #[must_use]
    pub fn bound(&self, flops: f64, bytes: f64, matrix: bool) -> f64 {
        let rate = self.matrix_flops.filter(|_| matrix).unwrap_or(self.flops);
        1e9 * (flops / rate).max(bytes / self.bytes)
    }
}

fn time(gpu: &Gpu, sequence: &Sequence) -> Result<f64> {
    Ok(gpu.time_on_any_clock(&[sequence])?.0)
}

fn fastest(mut time: impl FnMut() -> Result<f64>) -> Result<f64> {
    (0..REPEATS).try_fold(f64::INFINITY, |best, _| Ok(time()?.min(best)))
}

/// y = −x over the largest buffers the device binds, up to 256 MiB each.
fn copy(gpu: &Gpu) -> Result<f64> {
    const WIDTH: usize = 4096;
    let limits = &gpu.capabilities().limits;
    let largest = limits.max_storage_buffer_binding_size.min(256 << 20) as usize;
    let rows = largest / (4 * WIDTH);
    let mut graph = Graph::new();
    let x = graph.input("x", &[rows, WIDTH], DType::F32)?;
    let y = graph.affine(x, -1.0, 0.0)?;
    graph.output("y", y)?;
    let executable = Session::new(gpu, 0).compile(&graph)?;
    let data = vec![1.0; rows * WIDTH];
    executable.run(&[("x", Host::F32(&data))])?.wait()?;
    let sequence = executable.sequence();
    let seconds = fastest(|| time(gpu, &sequence))? * 1e-9;
    Ok((2 * rows * WIDTH * 4) as f64 / seconds)
}

/// Independent `vec4` accumulators an invocation: enough to hide the latency of a multiply-add.
const CHAINS: usize = 8;
/// Multiply-adds of each between two tests of the loop's condition.
const UNROLLED: usize = 8;
const WORKGROUPS: u32 = 4096;
const INVOCATIONS: usize = 256;

fn arithmetic(gpu: &Gpu) -> Result<(f64, Clock)> {
    /// Long against the overhead of a dispatch.
    const LONG: f64 = 5e6;
    let pipeline = multiply_adds(gpu)?;
    let layout = Layout::new(1, 4, DType::U32, Alignment::Bytes16)?;
    let (rounds, sink) = (Tensor::zeroed(gpu, layout)?, Tensor::zeroed(gpu, layout)?);
    let slices = [rounds.slice().clone(), sink.slice().clone()];
    let group = gpu.bind_group(&pipeline, &slices)?;
    let mut sequence = Sequence::new();
    sequence.dispatch(gpu, &pipeline, &group, [WORKGROUPS, 1, 1])?;
    let mut count = 1_u32;
    let clock = loop {
        rounds.upload(gpu, &[count; 4])?;
        let (nanoseconds, clock) = gpu.time_on_any_clock(&[&sequence])?;
        if nanoseconds > LONG || count >= 1 << 16 {
            break clock;
        }
        count *= 2;
    };
    let seconds = fastest(|| time(gpu, &sequence))? * 1e-9;
    let each = CHAINS * UNROLLED * 4 * 2;
    let invocations = WORKGROUPS as usize * INVOCATIONS;
    let rate = f64::from(count) * (each * invocations) as f64 / seconds;
    Ok((rate, clock))
}

/// Independent sums a subgroup: enough to hide the latency of a multiplication.
const SUMS: usize = 8;
const ROUNDS: usize = 512;
const SUBGROUPS: usize = 4;

fn matrices(gpu: &Gpu) -> Result<Option<f64>> {
    const GROUPS: u32 = 2112;
    let Some(units) = gpu.capabilities().matrix_units.filter(|units| units.f16) else {
        return Ok(None);
    };
    let (size, area) = (units.size, units.size * units.size);
    let each = |statement: &dyn Fn(usize) -> String| (0..SUMS).map(statement).collect::<String>();
    let zero = each(&|i| format!("    var c{i} = coop_mat{size}x{size}<f32, C>();\n"));
    let round = each(&|i| format!("        c{i} = coopMultiplyAdd(a, b, c{i});\n"));
    let store = each(&|i| {
        format!("    coopStoreT(c{i}, &y[(subgroup * {SUMS}u + {i}u) * {area}u], {size}u);\n")
    });
    let wgsl = format!(
        "enable f16;
enable wgpu_cooperative_matrix;
@group(0) @binding(0) var<storage, read> x: array<f16>;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;
var<workgroup> tile: array<f16, {both}>;
@compute @workgroup_size({threads})
fn main(@builtin(local_invocation_index) lid: u32, @builtin(subgroup_id) subgroup: u32) {{
    for (var i = lid; i < {both}u; i += {threads}u) {{
        tile[i] = x[i];
    }}
    workgroupBarrier();
    let a = coopLoadT<coop_mat{size}x{size}<f16, A>>(&tile[0], {size}u);
    let b = coopLoadT<coop_mat{size}x{size}<f16, B>>(&tile[{area}], {size}u);
{zero}    for (var n = 0u; n < {ROUNDS}u; n++) {{
{round}    }}
{store}}}
",
        both = 2 * area,
        threads = SUBGROUPS * units.lanes,
    );
    let pipeline = gpu.pipeline("ceilings.matrices", || {
        let bindings = vec![Access::Read, Access::ReadWrite];
        Ok(KernelSource::new(wgsl, bindings))
    })?;
    let operands = Tensor::zeroed(
        gpu,
        Layout::new(1, 2 * area, DType::F16, Alignment::Bytes64)?,
    )?;
    // Neither zero nor equal: the units take less power, and run faster, on those.
    let data: Vec<f32> = (0..2 * area)
        .map(|i| ((i * 37 % 101) as f32 - 50.0) / 1024.0)
        .collect();
    operands.upload(gpu, &data)?;
    let sums = Layout::new(1, SUBGROUPS * SUMS * area, DType::F32, Alignment::Bytes64)?;
    let sums = Tensor::zeroed(gpu, sums)?;
    let slices = [operands.slice().clone(), sums.slice().clone()];
    let group = gpu.bind_group(&pipeline, &slices)?;
    let mut sequence = Sequence::new();
    sequence.dispatch(gpu, &pipeline, &group, [GROUPS, 1, 1])?;
    let seconds = fastest(|| time(gpu, &sequence))? * 1e-9;
    let products = GROUPS as usize * SUBGROUPS * SUMS * ROUNDS;
    Ok(Some(2.0 * (products * size * area) as f64 / seconds))
}

fn multiply_adds(gpu: &Gpu) -> Result<Arc<Pipeline>> {
    let each = |statement: &dyn Fn(usize) -> String| (0..CHAINS).map(statement).collect::<String>();
    // Start and factors depend on the invocation, so that nothing is known when the kernel is compiled; |factor| < 1.
    let start = each(&|i| format!("    var x{i} = factor + {i}.0;\n"));
    let round = each(&|i| format!("        x{i} = x{i} * factor + summand;\n")).repeat(UNROLLED);
    let sum = each(&|i| format!(" + x{i}"));
    let wgsl = format!(
        "
@group(0) @binding(0) var<storage, read> rounds: array<u32>;
@group(0) @binding(1) var<storage, read_write> sink: array<f32>;
@compute @workgroup_size({INVOCATIONS})
fn main(@builtin(global_invocation_id) id: vec3<u32>) {{
    let factor = vec4<f32>(0.5, 0.6, 0.7, 0.8) + f32(id.x) * 1e-8;
    let summand = factor * 0.25;
{start}    let n = rounds[0];
    for (var i = 0u; i < n; i++) {{
{round}    }}
    let sum = vec4<f32>(){sum};
    // Never true, but no compiler knows (it does know that a square is not negative).
    if (sum.x + sum.y + sum.z + sum.w == 1e30) {{
        sink[0] = sum.x;
    }}
}}
"
    );
    gpu.pipeline("ceilings.multiply_adds", || {
        let bindings = vec![Access::Read, Access::ReadWrite];
        Ok(KernelSource::new(wgsl, bindings))
    })
}
