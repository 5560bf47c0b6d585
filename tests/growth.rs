//! Memory of a process that compiles graph after graph stays bounded, and comes back.
#![cfg(target_os = "linux")]

use energyflow::graph::{Graph, Init};
use energyflow::runtime::Host;
use energyflow::types::{DType, Trans, UnaryOp};
use energyflow::{Executable, Gpu, GpuOptions, Result, Session};

const WIDTH: usize = 16;

/// Bytes of memory that the process holds.
fn resident() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = pages.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// y = tanh(x·wᵀ) for a batch of any size.
fn layer(batch: usize) -> Result<Graph> {
    let mut graph = Graph::new();
    let x = graph.input("x", &[batch, WIDTH], DType::F32)?;
    let w = graph.parameter("w", &[WIDTH, WIDTH], Init::Constant(0.5))?;
    let y = graph.matmul(x, w, Trans::NT)?;
    let y = graph.unary(UnaryOp::Tanh, y)?;
    graph.output("y", y)?;
    Ok(graph)
}

fn run(executable: &Executable, batch: usize) {
    let x = vec![1.0 / 16.0; batch * WIDTH];
    let y = executable.run(&[("x", Host::from(&x))]).unwrap();
    let y = y.wait().unwrap().get("y").unwrap();
    assert!(y.iter().all(|y| (y - 0.5_f32.tanh()).abs() < 1e-6));
}

#[test]
fn explore() {
    let gpu = Gpu::new(&GpuOptions::default()).unwrap();
    for most in [4, 1000] {
        let mut session = Session::new(&gpu, 0).max_executables(most);
        for i in 0..40 {
            if i % 10 == 0 {
                println!(
                    "{most} {i}: {:.1} MiB, pool {:?} pipelines {:?}",
                    mib(resident()),
                    gpu.report().pool,
                    gpu.report().pipelines
                );
            }
            let batch = 100 + i + 100 * (most % 7);
            let executable = session.compile(&layer(batch).unwrap()).unwrap();
            run(&executable, batch);
        }
        println!(
            "{most} end: {:.1} MiB, pool {:?}",
            mib(resident()),
            gpu.report().pool
        );
        drop(session);
        println!(
            "{most} dropped: {:.1} MiB, pool {:?}",
            mib(resident()),
            gpu.report().pool
        );
    }
    drop(gpu);
    println!("gpu dropped: {:.1} MiB", mib(resident()));
}
