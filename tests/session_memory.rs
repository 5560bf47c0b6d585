//! Memory of a session that compiles graph after graph is bounded, and comes back.

#[path = "common/itself.rs"]
mod itself;

use energyflow::graph::{Graph, Init};
use energyflow::runtime::Host;
use energyflow::types::{DType, Trans, UnaryOp};
use energyflow::{Executable, Gpu, GpuOptions, Result, Session};

const WIDTH: usize = 16;

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

/// A device of its own: its counts are nobody else's.
fn own_gpu() -> Gpu {
    Gpu::new(&GpuOptions::default()).expect("tests need a GPU adapter")
}

#[test]
fn executables_are_bounded_and_parameters_stay() {
    const MOST: usize = 3;
    let gpu = own_gpu();
    let mut session = Session::new(&gpu, 0).max_executables(MOST);
    let mut most = 0;
    for i in 1..=10 {
        let batch = 500 * i;
        run(&session.compile(&layer(batch).unwrap()).unwrap(), batch);
        let stats = session.stats();
        assert_eq!(stats.executables, i.min(MOST));
        assert_eq!(stats.evicted, i.saturating_sub(MOST) as u64);
        most = most.max(gpu.report().pool.in_use_bytes);
    }
    // Inputs, of all runs under way, and results of the four largest; the weight.
    let rows = 500 * (10 + 9 + 8 + 7);
    let bytes = (rows * WIDTH * 4) as u64;
    let bound = (Executable::IN_FLIGHT as u64 + 1) * bytes * 5 / 4 + (1 << 16);
    assert!(most <= bound, "{most} {bound}");
    // What was evicted is not kept by the pool either.
    let pool = gpu.report().pool;
    assert_eq!(pool.allocated_bytes, pool.in_use_bytes, "{pool:?}");
    assert_eq!(session.get("w").unwrap(), [0.5; WIDTH * WIDTH]);
    drop(session);
    assert_eq!(gpu.report().pool.allocated_bytes, 0);
}

#[test]
fn the_least_recently_used_goes_first_and_what_is_held_stays() {
    let mut session = Session::new(&own_gpu(), 0).max_executables(2);
    let graphs: Vec<Graph> = (1..=4).map(|i| layer(i).unwrap()).collect();
    let held = session.compile(&graphs[0]).unwrap();
    drop(session.compile(&graphs[1]).unwrap());
    // The first is older, but held.
    drop(session.compile(&graphs[2]).unwrap());
    let stats = session.stats();
    assert_eq!((stats.executables, stats.evicted), (2, 1));
    run(&held, 1);
    let again = session.compile(&graphs[0]).unwrap();
    assert!(std::sync::Arc::ptr_eq(&held, &again));
    drop((held, again));
    // Used last, it outlives the third.
    drop(session.compile(&graphs[3]).unwrap());
    let misses = session.stats().misses;
    drop(session.compile(&graphs[0]).unwrap());
    assert_eq!(session.stats().misses, misses);
    drop(session.compile(&graphs[2]).unwrap());
    assert_eq!(session.stats().misses, misses + 1);

    // More than the bound, if all are held.
    let all: Vec<_> = graphs
        .iter()
        .map(|graph| session.compile(graph).unwrap())
        .collect();
    assert_eq!(session.stats().executables, 4);
    for (i, executable) in all.iter().enumerate() {
        run(executable, i + 1);
    }
}

#[test]
fn a_graph_can_be_forgotten() {
    let gpu = own_gpu();
    let mut session = Session::new(&gpu, 0);
    let graph = layer(100).unwrap();
    assert!(!session.forget(&graph));
    drop(session.compile(&graph).unwrap());
    session.set("w", &[0.25; WIDTH * WIDTH]).unwrap();
    let before = gpu.report().pool;
    assert!(session.forget(&graph));
    let after = gpu.report().pool;
    assert!(after.in_use_bytes < before.in_use_bytes);
    assert_eq!(after.allocated_bytes, after.in_use_bytes, "{after:?}");
    assert!(!session.forget(&graph));
    assert_eq!(session.get("w").unwrap(), [0.25; WIDTH * WIDTH]);
    // One that is held runs on.
    let held = session.compile(&graph).unwrap();
    assert!(session.forget(&graph));
    session.set("w", &[0.5; WIDTH * WIDTH]).unwrap();
    run(&held, 100);
}

/// Bytes of memory that the process holds, where the system tells.
#[cfg(target_os = "linux")]
fn resident() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = pages.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

/// A process of its own, so that no other test allocates meanwhile: batch sizes one after the other, each with a kernel of its own.
#[cfg(target_os = "linux")]
#[test]
fn a_process_that_meets_many_batch_sizes_stays_small() {
    const ALONE: &str = "SESSION_MEMORY_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let test = "a_process_that_meets_many_batch_sizes_stays_small";
        let mut alone = itself::command();
        let alone = alone.args(["--exact", test, "--nocapture"]).env(ALONE, "1");
        assert!(alone.status().unwrap().success());
        return;
    }
    let options = GpuOptions::from_env().unwrap().idle_pipelines(4);
    let gpu = Gpu::new(&options).unwrap();
    let compile = |session: &mut Session, batch: usize| {
        let mut graph = Graph::new();
        let x = graph.input("x", &[batch, WIDTH], DType::F32).unwrap();
        let y = graph.unary(UnaryOp::Tanh, x).unwrap();
        graph.output("y", y).unwrap();
        let executable = session.compile(&graph).unwrap();
        let x = vec![0.0; batch * WIDTH];
        let y = executable.run(&[("x", Host::from(&x))]).unwrap().wait();
        assert_eq!(y.unwrap().get("y").unwrap(), x);
    };
    let mut session = Session::new(&gpu, 0).max_executables(4);
    (1..=30).for_each(|batch| compile(&mut session, batch));
    let before = resident();
    (31..=150).for_each(|batch| compile(&mut session, batch));
    let after = resident();
    drop(session);
    let dropped = resident();
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    println!(
        "{:.1} MiB after 30 batch sizes, {:.1} after 150, {:.1} after dropping the session",
        mib(before),
        mib(after),
        mib(dropped)
    );
    // A kernel takes 1 to 4 MiB in the software driver.
    assert!(after < before + (24 << 20), "{before} {after}");
    assert_eq!(gpu.report().pool.allocated_bytes, 0);
}
