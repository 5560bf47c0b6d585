//! What is kept after its use is bounded, what is in use is kept, and dropping gives memory back.

use std::sync::Arc;

use energyflow::graph::{Graph, Init};
use energyflow::runtime::Host;
use energyflow::types::{DType, Trans, UnaryOp};
use energyflow::{Executable, Gpu, GpuOptions, Session};

const WIDTH: usize = 64;

/// y = tanh(x·w), w = 1/64, for so many rows.
fn graph(rows: usize) -> Graph {
    let mut graph = Graph::new();
    let x = graph.input("x", &[rows, WIDTH], DType::F32).unwrap();
    let init = Init::Constant(1.0 / WIDTH as f32);
    let w = graph.parameter("w", &[WIDTH, WIDTH], init).unwrap();
    let y = graph.matmul(x, w, Trans::NN).unwrap();
    let y = graph.unary(UnaryOp::Tanh, y).unwrap();
    graph.output("y", y).unwrap();
    graph
}

fn run(executable: &Executable, rows: usize) {
    let x = vec![0.5; rows * WIDTH];
    let outputs = executable.run(&[("x", Host::F32(&x))]).unwrap().wait();
    let y = outputs.unwrap().get("y").unwrap();
    assert!(y.iter().all(|y| (y - 0.5_f32.tanh()).abs() < 1e-5));
}

fn open(options: GpuOptions) -> Gpu {
    Gpu::new(&options).expect("these tests need a GPU adapter")
}

fn options() -> GpuOptions {
    GpuOptions::from_env().unwrap()
}

#[test]
fn what_a_dropped_session_used_is_bounded() {
    const IDLE_BYTES: u64 = 1 << 18;
    let gpu = open(
        options()
            .idle_pipelines(3)
            .idle_bind_groups(2)
            .idle_bytes(IDLE_BYTES),
    );
    let mut session = Session::new(&gpu, 0);
    for rows in 1..=12 {
        let rows = 100 * rows;
        run(&session.compile(&graph(rows)).unwrap(), rows);
    }
    let report = gpu.report();
    let (kernels, groups) = (report.pipelines.cached, report.bind_groups.cached);
    assert!(kernels >= 12 && groups >= 12, "{report}");
    assert!(report.pool.in_use_bytes > 12 * IDLE_BYTES / 4, "{report}");
    drop(session);
    let report = gpu.report();
    assert_eq!(report.pipelines.cached, 3, "{report}");
    assert_eq!(report.pipelines.evicted, kernels - 3, "{report}");
    assert!(report.bind_groups.cached <= 2, "{report}");
    assert_eq!(report.pool.in_use_bytes, 0, "{report}");
    assert!(report.pool.allocated_bytes <= IDLE_BYTES, "{report}");
    gpu.trim();
    let report = gpu.report();
    assert_eq!(report.pool.allocated_bytes, 0);
    assert_eq!(report.bind_groups.cached, 0, "none outlives its buffers");
}

#[test]
fn what_is_in_use_is_never_evicted() {
    let gpu = open(
        options()
            .idle_pipelines(0)
            .idle_bind_groups(0)
            .idle_bytes(0),
    );
    let mut session = Session::new(&gpu, 0);
    let all: Vec<(usize, Arc<Executable>)> = (1..=6)
        .map(|rows| (100 * rows, session.compile(&graph(100 * rows)).unwrap()))
        .collect();
    let report = gpu.report();
    assert_eq!(report.pipelines.evicted, 0, "{report}");
    for rows in 7..=9 {
        let mut other = Session::new(&gpu, 0);
        run(&other.compile(&graph(100 * rows)).unwrap(), 100 * rows);
    }
    for (rows, executable) in &all {
        run(executable, *rows);
    }
    let report = gpu.report();
    assert!(report.pipelines.evicted >= 3, "{report}");
    drop((all, session));
    let report = gpu.report();
    assert_eq!((report.pipelines.cached, report.bind_groups.cached), (0, 0));
    assert_eq!(report.pool.allocated_bytes, 0);
}

/// The kernel used last is compiled once, the one used first again.
#[test]
fn the_least_recently_used_goes_first() {
    let compile = |gpu: &Gpu, rows: usize| {
        let before = gpu.report().pipelines.misses;
        run(&Session::new(gpu, 0).compile(&graph(rows)).unwrap(), rows);
        gpu.report().pipelines.misses - before
    };
    let one = compile(&open(options()), 100);
    let gpu = open(options().idle_pipelines(2 * one as usize));
    for rows in [100, 200, 100, 300, 100, 400, 100] {
        compile(&gpu, rows);
    }
    assert_eq!(compile(&gpu, 100), 0, "it was used in between");
    assert_eq!(compile(&gpu, 200), one, "others came after it");
}

/// A wgpu buffer that the caller has seen does not become somebody else's.
#[test]
fn memory_that_the_caller_can_reach_is_not_reused() {
    let gpu = open(options());
    let buffer = gpu.buffer(1000, "seen").unwrap();
    let (id, raw) = (buffer.id(), buffer.raw().clone());
    drop(buffer);
    assert_eq!(gpu.report().pool.allocated_bytes, 0);
    let other = gpu.buffer(1000, "other").unwrap();
    assert_ne!(other.id(), id);
    gpu.queue().write_buffer(&raw, 0, &[1; 16]);
}

/// Resident bytes of this process, where the system tells.
fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kilobytes << 10)
}

/// Prints what 150 batch sizes take, and what is left of it: run it alone, with `--ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn memory_of_150_batch_sizes() {
    let gpu = open(options().idle_pipelines(16).idle_bytes(1 << 20));
    let megabytes = || resident().unwrap_or_default() >> 20;
    println!("{} MB with the device open", megabytes());
    for _ in 0..2 {
        let mut session = Session::new(&gpu, 0);
        for rows in 1..=150 {
            run(&session.compile(&graph(8 * rows)).unwrap(), 8 * rows);
        }
        println!("{} MB with 150 graphs", megabytes());
        drop(session);
        println!("{} MB after the session\n{}", megabytes(), gpu.report());
    }
}
