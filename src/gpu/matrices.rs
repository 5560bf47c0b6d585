//! The test that matrix units must pass before products use them.

use half::f16;

use super::capabilities::MatrixUnits;
use super::device::Gpu;
use super::layout::{Alignment, Layout};
use super::pipelines::{Access, TrustedSource};
use super::tensor::Tensor;
use crate::error::Result;
use crate::types::DType;

/// The units without the operand types that fail the test, with a warning. `None` if no type is left.
pub(super) fn tested(gpu: &Gpu, units: MatrixUnits) -> Option<MatrixUnits> {
    let passes = |dtype| match passes(gpu, units, dtype) {
        Ok(true) => true,
        Ok(false) => {
            log::warn!(
                "matrix units ({units}) compute wrong products of {dtype}: they are not used"
            );
            false
        }
        Err(error) => {
            log::warn!("matrix units ({units}) are not used for {dtype}: {error}");
            false
        }
    };
    let tested = MatrixUnits {
        f16: units.f16 && passes(DType::F16),
        f32: units.f32 && passes(DType::F32),
        ..units
    };
    (tested.f16 || tested.f32).then_some(tested)
}

/// Multiplies matrices of small integers, whose products are exact. Two subgroups read both operands from workgroup memory, as the kernels
/// do, first by rows and then by columns.
fn passes(gpu: &Gpu, units: MatrixUnits, dtype: DType) -> Result<bool> {
    let size = units.size;
    let area = size * size;
    let operand = |seed: usize| -> Vec<f32> {
        // Neither symmetric nor periodic, so that a transposed or misplaced element shows.
        (0..area)
            .map(|i| ((i * i + seed * i) % 13) as f32 - 6.0)
            .collect()
    };
    let (a, b) = (operand(3), operand(5));
    let product = |transposed: bool| {
        let at = move |m: &[f32], r: usize, c: usize| match transposed {
            true => m[c * size + r],
            false => m[r * size + c],
        };
        let (a, b) = (a.clone(), b.clone());
        (0..area).map(move |i| -> f32 {
            // Summed twice: the accumulator is an operand, too.
            2.0 * (0..size)
                .map(|k| at(&a, i / size, k) * at(&b, k, i % size))
                .sum::<f32>()
        })
    };
    let both = || product(false).chain(product(true));
    let expected: Vec<f32> = both().chain(both()).collect();

    let vector = |n, dtype| Layout::new(1, n, dtype, Alignment::Bytes64);
    let (x, y) = (
        Tensor::zeroed(gpu, vector(2 * area, dtype)?)?,
        Tensor::zeroed(gpu, vector(4 * area, DType::F32)?)?,
    );
    let operands = [a.as_slice(), b.as_slice()].concat();
    match dtype {
        DType::F16 => {
            let halves: Vec<f16> = operands.iter().copied().map(f16::from_f32).collect();
            x.upload(gpu, &halves)?;
        }
        _ => x.upload(gpu, &operands)?,
    }
    y.poison(gpu)?;
    let pipeline = gpu.trusted_pipeline(&format!("matrix test {size} {dtype}"), || {
        Ok(TrustedSource {
            wgsl: source(units, dtype),
            bindings: vec![
                (Access::Read, x.layout().size_bytes()),
                (Access::ReadWrite, y.layout().size_bytes()),
            ],
        })
    })?;
    let bindings = [x.slice().clone(), y.slice().clone()];
    let group = gpu.bind_group(&pipeline, &bindings)?;
    let mut recorder = gpu.recorder("matrix test");
    recorder.dispatch(&pipeline, &group, [1; 3])?;
    recorder.submit()?;
    let got: Vec<f32> = y.download(gpu)?.wait()?;
    Ok(got == expected)
}

fn source(units: MatrixUnits, dtype: DType) -> String {
    let MatrixUnits { size, lanes, .. } = units;
    let area = size * size;
    let enable = if dtype == DType::F16 {
        "enable f16;\n"
    } else {
        ""
    };
    let matrix = |role| format!("coop_mat{size}x{size}<{dtype}, {role}>");
    let multiply = |load: &str, to: usize| {
        let (a, b) = (matrix("A"), matrix("B"));
        format!(
            "    {{
        let a = {load}<{a}>(&tile[0], {size}u);
        let b = {load}<{b}>(&tile[{area}], {size}u);
        var c = coop_mat{size}x{size}<f32, C>();
        c = coopMultiplyAdd(a, b, c);
        c = coopMultiplyAdd(a, b, c);
        coopStoreT(c, &y[subgroup * {both}u + {to}u], {size}u);
    }}
",
            both = 2 * area,
        )
    };
    let (by_rows, by_columns) = (multiply("coopLoadT", 0), multiply("coopLoad", area));
    format!(
        "enable wgpu_cooperative_matrix;
{enable}
@group(0) @binding(0) var<storage, read> x: array<{dtype}>;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;
var<workgroup> tile: array<{dtype}, {both}>;
@compute @workgroup_size({threads})
fn main(@builtin(local_invocation_index) lid: u32, @builtin(subgroup_id) subgroup: u32) {{
    for (var i = lid; i < {both}u; i += {threads}u) {{
        tile[i] = x[i];
    }}
    workgroupBarrier();
{by_rows}{by_columns}}}
",
        both = 2 * area,
        threads = 2 * lanes,
    )
}
