//! What the host does for the device: recording and submitting a run, and finding what is compiled already.
//!
//! ```text
//! cargo bench --bench host
//! ```

use std::collections::VecDeque;
use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use energyflow::direct::{Direct, Weight};
use energyflow::gpu::{Access, BufferSlice, KernelSource, Layout, Recorder, Tensor};
use energyflow::graph::{Graph, Init};
use energyflow::nn::Linear;
use energyflow::runtime::Host;
use energyflow::text::{
    Batches, Dataset, EncoderOptions, OpenOptions, Trainer, TrainerOptions, TrainingMode,
};
use energyflow::train::AdamW;
use energyflow::types::{DType, Shape, Trans, UnaryOp};
use energyflow::{Executable, Gpu, GpuOptions, Result, Session};

const WIDTH: usize = 32;
const LAYERS: usize = 16;

/// A chain of small layers, so that the device is done before the host.
fn network() -> Result<Graph> {
    let mut graph = Graph::new();
    let mut x = graph.input("x", &[4, WIDTH], DType::F32)?;
    for i in 0..LAYERS {
        let layer = Linear::new(&mut graph, &format!("layer{i}"), WIDTH, WIDTH, true)?;
        x = layer.forward(&mut graph, x)?;
    }
    graph.output("y", x)?;
    Ok(graph)
}

/// What submitting a training step takes, without what the device takes: by the executable, and by a recorder that is given the same
/// work.
fn training_step(criterion: &mut Criterion, gpu: &Gpu) -> Result<()> {
    let options = EncoderOptions::default()
        .vocabulary(50)
        .length(8)
        .width(16)
        .hidden(32)
        .embedding(16);
    let distill = TrainerOptions::default().batch(4);
    let distiller = Trainer::distill(gpu, &options, &distill)?;
    let step = distiller.training_step(TrainingMode::A).expect("mode A");
    let dispatches = step.plan().dispatches;
    let (ids, mask, target) = (vec![1_u32; 32], vec![1.0_f32; 32], vec![0.5_f32; 64]);
    let inputs = [
        ("ids", Host::from(&ids)),
        ("mask", Host::from(&mask)),
        ("target", Host::from(&target)),
    ];
    // Some drivers compile kernels when they first run.
    step.run(&inputs)?.wait()?;
    let name = format!("submit a training step of {dispatches} dispatches");
    criterion.bench_function(&name, |bencher| {
        bencher.iter_custom(|runs| timed(runs, || step.run(&inputs), |run| run.wait().map(drop)));
    });

    let sequence = step.sequence();
    let tensors: Vec<Tensor> = [32, 32, 64]
        .iter()
        .map(|&n| Tensor::zeroed(gpu, Layout::of(&Shape::new(&[n])?, DType::F32)?))
        .collect::<Result<_>>()?;
    let slices: Vec<BufferSlice> = (0..7).map(|_| tensors[0].slice().clone()).collect();
    let name = format!("record and submit {dispatches} dispatches with 3 uploads and 7 results");
    criterion.bench_function(&name, |bencher| {
        let submit = || {
            let mut recorder = gpu.recorder("bench");
            for tensor in &tensors {
                recorder.upload(tensor, &target[..tensor.layout().len()])?;
            }
            recorder.sequence(&sequence);
            recorder.read_back(&slices, |pieces| Ok(pieces.concat()))
        };
        bencher.iter_custom(|runs| timed(runs, submit, |run| run.wait().map(drop)));
    });
    Ok(())
}

/// Time of the submissions alone, each awaited before the next.
fn timed<T>(runs: u64, submit: impl Fn() -> Result<T>, wait: impl Fn(T) -> Result<()>) -> Duration {
    let mut total = Duration::ZERO;
    for _ in 0..runs {
        let start = Instant::now();
        let pending = submit();
        total += start.elapsed();
        pending
            .and_then(&wait)
            .expect("the benches need a GPU adapter");
    }
    total
}

/// A graph that does little but read its input, on a device that copies inputs and on one that reads them in place where it can.
fn large_inputs(criterion: &mut Criterion) -> Result<()> {
    let copying = GpuOptions::from_env()?.baseline(true);
    for gpu in [Gpu::new(&copying)?, Gpu::new(&GpuOptions::from_env()?)?] {
        for rows in [16, 256, 4096, 8192] {
            let mut graph = Graph::new();
            let x = graph.input("x", &[rows, 1024], DType::F32)?;
            let sum = graph.sum_all(x)?;
            graph.output("sum", sum)?;
            let executable = Session::new(&gpu, 0).compile(&graph)?;
            let how = match executable.plan().inputs_in_place {
                true => "in place",
                false => "copied",
            };
            let data = vec![0.5; rows * 1024];
            let submit = || executable.run(&[("x", Host::F32(&data))]);
            let bytes = rows * 4096;
            criterion.bench_function(&format!("sum of {bytes} bytes, {how}"), |bencher| {
                bencher.iter(|| submit()?.wait().map(black_box));
            });
            let name = format!("sum of {bytes} bytes, {how}, three under way");
            criterion.bench_function(&name, |bencher| {
                let mut pending = VecDeque::new();
                bencher.iter(|| -> Result<()> {
                    pending.push_back(submit()?);
                    if pending.len() == Executable::IN_FLIGHT
                        && let Some(oldest) = pending.pop_front()
                    {
                        black_box(oldest.wait()?);
                    }
                    Ok(())
                });
            });
        }
    }
    Ok(())
}

fn host(criterion: &mut Criterion) -> Result<()> {
    let gpu = Gpu::new(&GpuOptions::from_env()?)?;
    let graph = network()?;
    let mut session = Session::new(&gpu, 0);
    let executable = session.compile(&graph)?;
    let dispatches = executable.plan().dispatches;
    let data = [0.5; 4 * WIDTH];

    let name = format!("run of {dispatches} dispatches, submitted and awaited");
    criterion.bench_function(&name, |bencher| {
        bencher.iter(|| {
            let pending = executable.run(&[("x", Host::F32(&data))]);
            pending.and_then(|pending| pending.wait()).map(black_box)
        });
    });

    training_step(criterion, &gpu)?;

    let sequence = executable.sequence();
    criterion.bench_function(&format!("record {dispatches} dispatches"), |bencher| {
        bencher.iter(|| {
            let mut recorder = gpu.recorder("bench");
            recorder.sequence(&sequence);
            black_box(recorder)
        });
    });

    criterion.bench_function("compile an equal graph again", |bencher| {
        bencher.iter(|| session.compile(&graph).map(black_box));
    });

    let source = || {
        let text = "@group(0) @binding(0) var<storage, read_write> y: array<u32>;
@compute @workgroup_size(1) fn main() { y[0] = 1u; }";
        Ok(KernelSource::new(text, vec![Access::ReadWrite]))
    };
    let pipeline = gpu.pipeline("bench.one", source)?;
    criterion.bench_function("find a pipeline", |bencher| {
        bencher.iter(|| gpu.pipeline("bench.one", source).map(black_box));
    });

    let tensor = |dims: &[usize]| Tensor::zeroed(&gpu, Layout::of(&Shape::new(dims)?, DType::F32)?);
    let bound = [tensor(&[1])?.slice().clone()];
    criterion.bench_function("find a bind group", |bencher| {
        bencher.iter(|| gpu.bind_group(&pipeline, &bound).map(black_box));
    });

    let (x, w, y) = (tensor(&[4, 32])?, tensor(&[32, 32])?, tensor(&[4, 32])?);
    let direct = Direct::new(&gpu);
    criterion.bench_function("record a direct function", |bencher| {
        bencher.iter(|| -> Result<Recorder> {
            let mut recorder = gpu.recorder("bench");
            let weight = Weight {
                weight: &w,
                bias: None,
            };
            direct.gelu_gemm(&mut recorder, &x, weight, &y)?;
            Ok(black_box(recorder))
        });
    });
    Ok(())
}

/// Planning and compiling long graphs. Both should take about five times as long for 10 000 nodes as for 2 000.
fn long_graphs(criterion: &mut Criterion) -> Result<()> {
    let gpu = Gpu::new(&GpuOptions::default())?;
    for nodes in [2_000, 10_000] {
        let mut graph = Graph::new();
        let x = graph.input("x", &[4, 16], DType::F32)?;
        let mut y = x;
        for _ in 0..nodes {
            y = graph.add(y, x)?;
        }
        graph.output("y", y)?;
        let session = Session::new(&gpu, 0);
        criterion.bench_function(&format!("plan a chain of {nodes} additions"), |bencher| {
            bencher.iter(|| session.plan(&graph).map(black_box));
        });
        // Kernels are compiled once, bind groups and memory are found again.
        criterion.bench_function(
            &format!("compile a chain of {nodes} additions"),
            |bencher| {
                bencher.iter(|| Session::new(&gpu, 0).compile(&graph).map(black_box));
            },
        );

        let mut graph = Graph::new();
        let mut y = graph.input("x", &[4, 16], DType::F32)?;
        let mut parameters = Vec::new();
        for i in 0..nodes / 6 {
            let w = graph.parameter(&format!("w{i}"), &[16, 16], Init::Uniform(0.1))?;
            y = graph.matmul(y, w, Trans::NT)?;
            y = graph.unary(UnaryOp::Tanh, y)?;
            parameters.push(w);
        }
        let loss = graph.sum_all(y)?;
        AdamW::default().step(&mut graph, loss, &parameters)?;
        let name = format!("plan a training step of {} nodes", graph.nodes().len());
        criterion.bench_function(&name, |bencher| {
            bencher.iter(|| session.plan(&graph).map(black_box));
        });
    }
    Ok(())
}

/// Batches of samples in a random order: from a file in memory, and sample by sample from the file.
fn batches(criterion: &mut Criterion) -> Result<()> {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/data/wordnet_train.safetensors"
    );
    for (how, in_memory) in [("in memory", u64::MAX), ("read by position", 0)] {
        let options = OpenOptions::default().in_memory(in_memory);
        let dataset = Dataset::open_with(path, options)?;
        let mut batches = Batches::training(dataset, 64, 32, 0)?;
        let mut epoch = 0;
        let name = format!("assemble a batch of 64 x 32 tokens, {how}");
        criterion.bench_function(&name, |bencher| {
            bencher.iter(|| -> Result<()> {
                if batches.position().1 == batches.per_epoch() {
                    epoch += 1;
                    batches.start_epoch(epoch);
                }
                black_box(batches.next_batch()?);
                Ok(())
            });
        });
    }
    Ok(())
}

fn run(criterion: &mut Criterion) {
    batches(criterion).expect("the benches need the bundled data");
    host(criterion)
        .and_then(|()| large_inputs(criterion))
        .and_then(|()| long_graphs(criterion))
        .expect("the benches need a GPU adapter");
}

criterion_group!(benches, run);
criterion_main!(benches);
