//! After the first run, a run and taking its results allocate nothing of this crate's, on the host or on the device; and runs under
//! way are bounded.
//!
//! wgpu allocates on the host whatever one does with it. So every allocation is traced, and belongs to the innermost function of
//! the trace that is either wgpu's (or of a crate below it) or this crate's: what std, half or pollster allocate for this crate
//! counts. Two of wgpu's are boxes for the callbacks that it is given, of inputs and of results.

mod common;
#[path = "common/itself.rs"]
mod itself;

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::gpu;
use energyflow::graph::{Graph, Init};
use energyflow::runtime::{Host, Pending, Session};
use energyflow::text::{
    Batch, Batches, Dataset, EncoderOptions, Precision, Trainer, TrainerOptions, TrainingMode,
};
use energyflow::types::{DType, Trans, UnaryOp};
use energyflow::{Executable, Gpu, GpuOptions};

struct Traced;

thread_local! {
    static WATCHED: Cell<bool> = const { Cell::new(false) };
    static TRACES: RefCell<Vec<Backtrace>> = const { RefCell::new(Vec::new()) };
}

impl Traced {
    /// Traces what this thread allocates while it is watched; tracing allocates, too.
    fn note() {
        if WATCHED.try_with(|watched| watched.replace(false)) == Ok(true) {
            let trace = Backtrace::force_capture();
            TRACES.with_borrow_mut(|traces| traces.push(trace));
            WATCHED.set(true);
        }
    }
}

// SAFETY: everything is handed to the system's allocator.
unsafe impl GlobalAlloc for Traced {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::note();
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::note();
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        Self::note();
        unsafe { System.realloc(block, layout, size) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Traced = Traced;

/// Crates that allocate for themselves.
const WGPU: [&str; 6] = ["wgpu", "wgpu_core", "wgpu_hal", "wgpu_types", "naga", "ash"];

#[derive(Debug, Default)]
struct Allocations {
    wgpu: usize,
    /// Traces of those of this crate, or of the test.
    own: Vec<String>,
}

/// Runs `work` and finds out on whose behalf this thread allocated meanwhile.
fn allocations<T>(work: impl FnOnce() -> T) -> (T, Allocations) {
    WATCHED.set(true);
    let value = work();
    WATCHED.set(false);
    let mut found = Allocations::default();
    for trace in TRACES.take() {
        let text = trace.to_string();
        match owner(&text) {
            Owner::Wgpu => found.wgpu += 1,
            Owner::Own => found.own.push(text),
        }
    }
    (value, found)
}

enum Owner {
    Wgpu,
    /// This crate, or the test.
    Own,
}

/// Where the innermost function is that counts: by its file where it has debug information, else by its name.
fn owner(trace: &str) -> Owner {
    let mut lines = trace.lines().map(str::trim).peekable();
    while let Some(line) = lines.next() {
        let Some((_, function)) = line.split_once(": ") else {
            continue;
        };
        let file = lines.next_if(|next| next.starts_with("at "));
        let function = function.trim_start_matches(['<', '&', '*', ' ']);
        let named = |name: &str| function.starts_with(&format!("{name}::"));
        let wgpu = match file {
            // Generic functions of wgpu are compiled here, but written there; so are those of std and of others.
            Some(file) => file.contains("/registry/src/") && file.contains("/wgpu-"),
            None => WGPU.iter().any(|name| named(name)),
        };
        if wgpu {
            return Owner::Wgpu;
        }
        let own = match file {
            Some(file) => {
                file.contains("/src/") && !file.contains("/registry/") && !file.contains("library/")
            }
            None => named("energyflow"),
        };
        if own {
            return Owner::Own;
        }
    }
    Owner::Own
}

/// Whether the test has to run in a process of its own, which it then did. If the environment asks for backtraces, debug builds of wgpu
/// trace their locks; that allocates, and the trace of the allocation would wait for std's lock on tracing.
fn ran_alone(test: &str) -> bool {
    let set = |name| std::env::var_os(name).is_some_and(|value| value != "0");
    if std::env::var_os("RUST_LIB_BACKTRACE").is_some_and(|value| value == "0")
        || !(set("RUST_BACKTRACE") || set("RUST_LIB_BACKTRACE"))
    {
        return false;
    }
    let mut alone = itself::command();
    let alone = alone.args(["--exact", test, "--nocapture"]);
    assert!(
        alone
            .env("RUST_LIB_BACKTRACE", "0")
            .status()
            .unwrap()
            .success()
    );
    true
}

/// Runs `work` once to warm up, then shows that it allocates nothing of ours and makes nothing on the device.
fn assert_lean(what: &str, gpu: &Gpu, mut work: impl FnMut()) {
    work();
    let counts = || {
        let report = gpu.report();
        let memory = gpu.device().generate_allocator_report();
        (
            (
                report.pool,
                report.pipelines,
                report.bind_groups,
                report.staging_buffers,
            ),
            memory.map(|memory| (memory.allocations.len(), memory.total_allocated_bytes)),
        )
    };
    let before = counts();
    for _ in 0..2 {
        let ((), found) = allocations(&mut work);
        assert!(found.wgpu > 0, "{what}: nothing was traced");
        assert!(
            found.own.is_empty(),
            "{what}: {} allocations, the first by\n{}",
            found.own.len(),
            found.own[0]
        );
    }
    for _ in 0..18 {
        work();
    }
    assert_eq!(counts(), before, "{what}");
}

/// A device of its own: its counts are nobody else's.
fn own_gpu() -> Gpu {
    Gpu::new(&GpuOptions::from_env().unwrap()).expect("tests need a GPU adapter")
}

fn encoder() -> EncoderOptions {
    EncoderOptions::default()
        .length(6)
        .width(12)
        .hidden(20)
        .kernel(3)
        .dilations(vec![1, 2])
        .embedding(384)
}

fn batches(options: &EncoderOptions) -> Batches {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/data/wordnet_train.safetensors"
    );
    let samples = Dataset::open(path).unwrap().take(8);
    Batches::training(samples, 4, options.length, 0).unwrap()
}

fn inputs(batch: &Batch) -> [(&str, Host<'_>); 3] {
    [
        ("ids", Host::from(&batch.ids)),
        ("mask", Host::from(&batch.mask)),
        ("target", Host::from(&batch.targets)),
    ]
}

#[test]
fn the_trace_tells_who_allocates() {
    if ran_alone("the_trace_tells_who_allocates") {
        return;
    }
    let layout =
        energyflow::gpu::Layout::new(2, 3, DType::F16, energyflow::gpu::Alignment::Bytes64);
    let layout = layout.unwrap();
    let (_, found) = allocations(|| layout.pack(&[1.0_f32; 6]).unwrap());
    assert_eq!((found.wgpu, found.own.len()), (0, 1), "{found:?}");
    let gpu = gpu();
    let (_, found) = allocations(|| gpu.device().create_command_encoder(&Default::default()));
    assert!(found.wgpu > 0 && found.own.is_empty(), "{found:?}");
    let (_, found) = allocations(|| drop(std::hint::black_box(Box::new(1))));
    assert_eq!((found.wgpu, found.own.len()), (0, 1), "{found:?}");
}

#[test]
fn training_steps_allocate_nothing() {
    if ran_alone("training_steps_allocate_nothing") {
        return;
    }
    let options = encoder();
    let mut batches = batches(&options);
    for precision in [Precision::F32, Precision::Mixed] {
        let gpu = own_gpu();
        let distill = TrainerOptions::default().batch(4).precision(precision);
        let distiller = Trainer::distill(&gpu, &options, &distill).unwrap();
        // An epoch begins with threads that prepare its batches.
        batches.start_epoch(0);
        let batch = batches.next_batch().unwrap().unwrap();
        assert_lean(&format!("{precision:?}"), &gpu, || {
            assert!(distiller.step(batch, 0).unwrap().loss.is_finite());
        });

        // Several under way, as in `Trainer::epoch`.
        let step = distiller.training_step(TrainingMode::A).unwrap();
        let mut pending: Vec<Pending> = Vec::with_capacity(Executable::IN_FLIGHT);
        assert_lean(&format!("{precision:?}, several"), &gpu, || {
            for _ in 0..Executable::IN_FLIGHT {
                pending.push(step.run(&inputs(batch)).unwrap());
            }
            for run in pending.drain(..) {
                assert!(run.wait().unwrap().scalar("loss").unwrap().is_finite());
            }
        });
    }
}

/// y = tanh(x·w + x) in f16, and its sum: inputs that are converted, padded rows, outputs of both types.
fn small(gpu: &Gpu) -> Arc<Executable> {
    let mut graph = Graph::new();
    let x = graph.input("x", &[5, 7], DType::F16).unwrap();
    let w = graph.parameter("w", &[7, 7], Init::Constant(0.0)).unwrap();
    let half = graph.cast(w, DType::F16).unwrap();
    let h = graph.matmul(x, half, Trans::NN).unwrap();
    let h = graph.add(h, x).unwrap();
    let y = graph.unary(UnaryOp::Tanh, h).unwrap();
    let wide = graph.cast(y, DType::F32).unwrap();
    let sum = graph.sum_all(wide).unwrap();
    graph.output("y", y).unwrap();
    graph.output("sum", sum).unwrap();
    Session::new(gpu, 0).compile(&graph).unwrap()
}

#[test]
fn results_are_taken_without_allocating() {
    if ran_alone("results_are_taken_without_allocating") {
        return;
    }
    let gpu = own_gpu();
    let executable = small(&gpu);
    let x: Vec<f32> = (0..35).map(|i| i as f32 / 64.0).collect();
    let halves: Vec<half::f16> = x.iter().copied().map(half::f16::from_f32).collect();
    let mut y = [0.0_f32; 35];
    let mut narrow = [half::f16::ZERO; 35];
    for data in [Host::from(&x), Host::from(halves.as_slice())] {
        assert_lean("small", &gpu, || {
            let outputs = executable.run(&[("x", data)]).unwrap().wait().unwrap();
            outputs.get_into("y", &mut y).unwrap();
            outputs.get_into("y", &mut narrow).unwrap();
            assert!(outputs.scalar("sum").unwrap() > 1.0);
            assert!(outputs.padding_is_zero("y").unwrap());
        });
        for ((x, y), narrow) in x.iter().zip(y).zip(narrow) {
            assert!((y - x.tanh()).abs() < 1e-3);
            assert_eq!(narrow.to_f32(), y);
        }
    }
    let outputs = executable
        .run(&[("x", Host::from(&x))])
        .unwrap()
        .wait()
        .unwrap();
    assert_eq!(outputs.get("y").unwrap(), y);
    assert!(outputs.get_into("y", &mut y[1..]).is_err(), "too short");
    assert!(
        outputs.get_into("y", &mut [0_u32; 35]).is_err(),
        "another type"
    );
    assert!(outputs.get_into("z", &mut y).is_err(), "unknown");
    assert_eq!(gpu.report().uncaptured_errors, 0);
}

fn first(run: Pending) -> f32 {
    run.wait().unwrap().scalar("y").unwrap()
}

#[test]
fn results_outlive_later_runs() {
    let gpu = own_gpu();
    let executable = small(&gpu);
    let run = |x: f32| executable.run(&[("x", Host::F32(&[x; 35]))]).unwrap();
    let expected: Vec<f32> = (0..10).map(|i| first(run(i as f32 / 8.0))).collect();
    let kept = run(0.5).wait().unwrap();
    let clone = kept.clone();
    drop(kept);
    // More results than staging buffers, none taken before all runs are submitted; every third is never taken.
    for _ in 0..3 {
        let pending: Vec<Pending> = (0..10).map(|i| run(i as f32 / 8.0)).collect();
        for (i, pending) in pending.into_iter().enumerate() {
            if i % 3 != 0 {
                assert_eq!(first(pending), expected[i]);
            }
        }
    }
    let made = gpu.report().staging_buffers;
    let pending: Vec<Pending> = (0..10).map(|i| run(i as f32 / 8.0)).collect();
    assert_eq!(gpu.report().staging_buffers, made, "all of them again");
    drop(pending);
    assert_eq!(clone.scalar("y").unwrap(), expected[4]);
    assert_eq!(gpu.report().uncaptured_errors, 0);
}

#[test]
fn runs_under_way_are_bounded_whoever_waits() {
    let gpu = own_gpu();
    let done = Arc::new(AtomicUsize::new(0));
    // Long work, few kernels.
    let mut graph = Graph::new();
    let x = graph.input("x", &[256, 256], DType::F32).unwrap();
    let mut y = x;
    for _ in 0..10 {
        y = graph.matmul(y, x, Trans::NN).unwrap();
    }
    graph.output("y", y).unwrap();
    let executable = Session::new(&gpu, 0).compile(&graph).unwrap();
    let data = vec![1.0 / 256.0; 256 * 256];
    for submitted in 1..=20 {
        drop(executable.run(&[("x", Host::from(&data))]).unwrap());
        let counter = Arc::clone(&done);
        gpu.queue().on_submitted_work_done(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        });
        let done = done.load(Ordering::SeqCst);
        assert!(
            done + Executable::IN_FLIGHT >= submitted,
            "{done} of {submitted}"
        );
    }
}
