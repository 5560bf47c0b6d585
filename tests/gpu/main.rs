//! The device layer: opening, kernels, submissions, results, and every way in which they can fail.

mod kernels;
mod opening;
mod recording;
mod timing;

use std::sync::{Arc, LazyLock};

use energyflow::gpu::{Access, Alignment, BindGroup, KernelSource, Layout, Pipeline, Tensor};
use energyflow::types::DType;
use energyflow::{Gpu, GpuOptions};

/// For tests that do not look at counts, which other tests move.
static SHARED: LazyLock<Gpu> = LazyLock::new(open);

fn open() -> Gpu {
    Gpu::new(&GpuOptions::from_env().unwrap()).expect("these tests need a GPU adapter")
}

/// y = 2·y + x
const DOUBLE_AND_ADD: &str = "
@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;
@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x < arrayLength(&y) {
        y[id.x] = 2.0 * y[id.x] + x[id.x];
    }
}";

fn double_and_add(gpu: &Gpu) -> Arc<Pipeline> {
    let source = || {
        let bindings = vec![Access::Read, Access::ReadWrite];
        Ok(KernelSource::new(DOUBLE_AND_ADD, bindings))
    };
    gpu.pipeline("test.double_and_add", source).expect("kernel")
}

fn row(gpu: &Gpu, data: &[f32]) -> Tensor {
    let layout = Layout::new(1, data.len(), DType::F32, Alignment::Bytes16).expect("layout");
    let tensor = Tensor::zeroed(gpu, layout).expect("tensor");
    tensor.upload(gpu, data).expect("upload");
    tensor
}

fn bind(gpu: &Gpu, pipeline: &Pipeline, tensors: &[&Tensor]) -> BindGroup {
    let slices: Vec<_> = tensors
        .iter()
        .map(|tensor| tensor.slice().clone())
        .collect();
    gpu.bind_group(pipeline, &slices).expect("bind group")
}

/// Two dispatches of [`DOUBLE_AND_ADD`] on y = 1 and x = `n`: 2·(2 + n) + n.
fn run_twice(gpu: &Gpu, n: f32) -> Vec<f32> {
    let (x, y) = (row(gpu, &[n; 100]), row(gpu, &[1.0; 100]));
    let pipeline = double_and_add(gpu);
    let group = bind(gpu, &pipeline, &[&x, &y]);
    let mut recorder = gpu.recorder("twice");
    for _ in 0..2 {
        recorder
            .dispatch(&pipeline, &group, [2, 1, 1])
            .expect("dispatch");
    }
    recorder.submit().expect("submit");
    y.download(gpu).expect("download").wait().expect("wait")
}
