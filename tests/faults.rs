//! Faults: a device that is lost, what is dropped while work is under way, many threads, many steps.
//!
//! `ENERGYFLOW_TEST_STEPS=100000 cargo test --test faults -- --nocapture steps` is the long form.

mod common;
#[path = "common/itself.rs"]
mod itself;

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Arc, LazyLock, mpsc};
use std::time::Duration;

use energyflow::graph::{Graph, Init};
use energyflow::runtime::Pending;
use energyflow::text::trainer::Event;
use energyflow::text::{
    Batches, Dataset, Efb1Writer, EncoderOptions, FitOptions, Trainer, TrainerOptions,
};
use energyflow::train::{AdamW, Checkpoint};
use energyflow::types::{DType, Trans, UnaryOp};
use energyflow::{Error, Executable, Gpu, GpuOptions, Host, Session};
use tempfile::TempDir;

const ROWS: usize = 16;
const WIDTH: usize = 32;

/// Fails when `work` takes longer than any of it should, as it would if it waited for what never comes.
fn in_time(work: impl FnOnce() + Send + 'static) {
    let (done, finished) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        work();
        // The receiver is gone only after the test has failed.
        let _ = done.send(());
    });
    match finished.recv_timeout(Duration::from_secs(300)) {
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("it hangs"),
        _ => thread.join().expect("the work itself failed"),
    }
}

fn open() -> Gpu {
    Gpu::new(&GpuOptions::from_env().unwrap()).expect("tests need a GPU adapter")
}

/// A training step of two layers, one with an f16 copy of its weight.
static STEP: LazyLock<Graph> = LazyLock::new(|| {
    let mut graph = Graph::new();
    let x = graph.input("x", &[ROWS, WIDTH], DType::F32).unwrap();
    let mut parameters = Vec::new();
    let mut y = x;
    for name in ["a", "b"] {
        let init = Init::Uniform(0.3);
        let w = graph.parameter(name, &[WIDTH, WIDTH], init).unwrap();
        parameters.push(w);
        let w = graph.cast(w, DType::F16).unwrap();
        let input = graph.cast(y, DType::F16).unwrap();
        y = graph.matmul_as(input, w, Trans::NT, DType::F32).unwrap();
        y = graph.unary(UnaryOp::Tanh, y).unwrap();
    }
    let difference = graph.sub(y, x).unwrap();
    let square = graph.unary(UnaryOp::Square, difference).unwrap();
    let loss = graph.sum_all(square).unwrap();
    graph.output("loss", loss).unwrap();
    AdamW::default()
        .step(&mut graph, loss, &parameters)
        .unwrap();
    graph
});

/// The input of a step.
fn x(step: usize) -> Vec<f32> {
    let x = (0..ROWS * WIDTH).map(|i| ((i * 7 + step * 13) % 29) as f32 / 29.0 - 0.5);
    x.collect()
}

fn start(executable: &Executable, step: usize) -> Result<Pending, Error> {
    executable.run(&[("x", Host::F32(&x(step)))])
}

fn loss(pending: Pending) -> Result<u32, Error> {
    Ok(pending.wait()?.scalar("loss")?.to_bits())
}

/// The losses of so many steps, as bits.
fn train(executable: &Executable, steps: std::ops::Range<usize>) -> Vec<u32> {
    steps
        .map(|step| loss(start(executable, step).unwrap()).unwrap())
        .collect()
}

fn session(gpu: &Gpu) -> (Session, Arc<Executable>) {
    let mut session = Session::new(gpu, 5);
    let executable = session.compile(&STEP).unwrap();
    (session, executable)
}

fn is_lost<T>(result: &Result<T, Error>) -> bool {
    matches!(result, Err(Error::DeviceLost { .. }))
}

/// Results under way are those of their steps or errors, every later call is an error, and a new device goes on from the checkpoint.
#[test]
fn a_device_lost_with_steps_in_flight() {
    in_time(|| {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("checkpoint.safetensors");
        let expected = train(&session(&open()).1, 0..20);
        let mut lost = 0;
        for in_flight in [1, Executable::IN_FLIGHT, 3 * Executable::IN_FLIGHT] {
            let gpu = open();
            let (mut own, executable) = session(&gpu);
            assert_eq!(train(&executable, 0..4), expected[..4]);
            Checkpoint::from_session(&own).unwrap().save(&path).unwrap();
            let pending: Vec<Pending> = (4..4 + in_flight)
                .map(|step| start(&executable, step).unwrap())
                .collect();
            gpu.device().destroy();
            for (i, pending) in pending.into_iter().enumerate() {
                // Every other one as a future.
                let result = match i % 2 {
                    0 => loss(pending),
                    _ => pollster::block_on(pending)
                        .and_then(|outputs| Ok(outputs.scalar("loss")?.to_bits())),
                };
                match result {
                    Ok(loss) => assert_eq!(loss, expected[4 + i], "step {i}"),
                    Err(Error::DeviceLost { .. }) => lost += 1,
                    Err(error) => panic!("{error}"),
                }
            }
            for _ in 0..2 {
                assert!(is_lost(&start(&executable, 4)));
                assert!(is_lost(&own.get("a")));
                assert!(is_lost(&own.set("a", &[0.0; WIDTH * WIDTH])));
                assert!(is_lost(&own.moments("b")));
                assert!(is_lost(&Checkpoint::from_session(&own)));
                assert!(is_lost(&executable.profile()));
                assert!(is_lost(&executable.time()));
                let mut other = Session::new(&gpu, 1);
                assert!(is_lost(&other.compile(&STEP)));
                gpu.trim();
                gpu.save_caches();
                assert!(!gpu.report().to_string().is_empty());
            }
            assert!(own.forget(&STEP));
            drop((executable, own, gpu));

            let (mut own, executable) = session(&open());
            Checkpoint::load(&path).unwrap().apply(&mut own).unwrap();
            assert_eq!(train(&executable, 4..20), expected[4..]);
        }
        println!("{lost} results under way were lost");
        assert!(lost > 0, "the device was lost too late");
    });
}

/// While other threads submit, wait, compile and read.
#[test]
fn a_device_lost_under_eight_threads() {
    in_time(|| {
        for milliseconds in [0, 1, 5, 20, 60, 100, 150, 200] {
            lose_under_eight_threads(Duration::from_millis(milliseconds));
        }
        train(&session(&open()).1, 0..1);
    });
}

fn lose_under_eight_threads(after: Duration) {
    let gpu = open();
    let (own, executable) = session(&gpu);
    train(&executable, 0..1);
    let ends: Vec<Error> = std::thread::scope(|scope| {
        let (gpu, own, executable) = (&gpu, &own, &executable);
        let threads: Vec<_> = (0..8)
            .map(|thread| {
                scope.spawn(move || {
                    let until_it_fails = |mut call: Box<dyn FnMut() -> Result<(), Error>>| loop {
                        if let Err(error) = call() {
                            return error;
                        }
                    };
                    until_it_fails(match thread {
                        0 => Box::new(|| own.get("a").map(drop)),
                        1 => Box::new(|| Session::new(gpu, 9).compile(&STEP).map(drop)),
                        2 => Box::new(|| Checkpoint::from_session(own).map(drop)),
                        3 => Box::new(|| start(executable, 1).map(drop)),
                        4 => Box::new(|| pollster::block_on(start(executable, 2)?).map(drop)),
                        _ => Box::new(|| loss(start(executable, 3)?).map(drop)),
                    })
                })
            })
            .collect();
        std::thread::sleep(after);
        gpu.device().destroy();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    for error in ends {
        assert!(matches!(error, Error::DeviceLost { .. }), "{error}");
    }
}

/// A few random texts.
fn texts(folder: &Path) -> Dataset {
    let path = folder.join("texts.efb");
    let mut writer = Efb1Writer::create(&path, 4).unwrap();
    for i in 0..24_u32 {
        let target = [0, 1, 2, 3].map(|k| ((i * 3 + k) as f32).sin());
        writer
            .push(&[1, 2 + i % 6, 2 + i % 5], &[1; 3], &target)
            .unwrap();
    }
    writer.finish().unwrap();
    Dataset::open(path).unwrap()
}

/// `fit` says that the device is lost, and what it saved before is loaded by a trainer on a new device.
#[test]
fn a_device_lost_during_a_training() {
    in_time(|| {
        let folder = TempDir::new().unwrap();
        let data = texts(folder.path());
        let encoder = EncoderOptions::default()
            .vocabulary(10)
            .length(4)
            .width(8)
            .hidden(8)
            .kernel(2)
            .dilations(vec![1])
            .embedding(4);
        let trainer = |gpu: &Gpu| {
            Trainer::distill(gpu, &encoder, &TrainerOptions::default().batch(6)).unwrap()
        };
        let batches = || Batches::training(data.clone(), 6, 4, 0).unwrap();
        let saved = folder.path().join("saved");
        let fit = FitOptions::new(5)
            .checkpoint_every(Some(2))
            .checkpoints(Some(saved.clone()));

        let gpu = open();
        let mut first = trainer(&gpu);
        let result = first.fit(&mut batches(), &fit, |event| {
            if let Event::Step { step: 7, .. } = event {
                gpu.device().destroy();
            }
            ControlFlow::Continue(())
        });
        assert!(is_lost(&result), "{:?}", result.err());
        drop(first);

        let latest = Trainer::latest_checkpoint(&saved).unwrap().unwrap();
        let mut second = trainer(&open());
        second.resume(&Checkpoint::load(latest).unwrap()).unwrap();
        let done = second.steps();
        assert!((4..=8).contains(&done), "{done}");
        let report = second.fit(&mut batches(), &fit, |_| ControlFlow::Continue(()));
        report.unwrap();
        assert_eq!(second.steps(), 20);
    });
}

/// Pending results, executable, session and device, dropped in every order while work is under way.
#[test]
fn whatever_is_dropped_first_while_work_is_under_way() {
    in_time(|| {
        let expected = train(&session(&open()).1, 0..3);
        let mut orders = Vec::new();
        for a in 0..4 {
            for b in (0..4).filter(|&b| b != a) {
                for c in (0..4).filter(|&c| c != a && c != b) {
                    orders.push([a, b, c, 6 - a - b - c]);
                }
            }
        }
        assert_eq!(orders.len(), 24);
        // One device, opened and closed 24 times, would spend the time on compiling; clones are what applications drop.
        let shared = open();
        for order in orders {
            let (own, executable) = session(&shared);
            let all: Vec<Pending> = (0..3).map(|i| start(&executable, i).unwrap()).collect();
            let mut pending = all.into_iter();
            let kept = pending.next_back().unwrap();
            let mut parts: [Option<Box<dyn std::any::Any>>; 4] = [
                Some(Box::new(own)),
                Some(Box::new(executable)),
                Some(Box::new(shared.clone())),
                Some(Box::new(pending.collect::<Vec<_>>())),
            ];
            order.iter().for_each(|&i| drop(parts[i].take()));
            assert_eq!(loss(kept).unwrap(), expected[2], "{order:?}");
        }
        // Nothing is kept once it is done.
        shared.recorder("nothing").submit().unwrap().wait().unwrap();
        let pool = shared.report().pool;
        assert_eq!(pool.in_use_bytes, 0, "{pool:?}");

        // The device goes first, or last, or everything while unfinished.
        let (own, executable) = session(&shared);
        drop(shared);
        let kept: Vec<Pending> = (0..3).map(|i| start(&executable, i).unwrap()).collect();
        drop((own, executable));
        for (i, pending) in kept.into_iter().enumerate() {
            assert_eq!(loss(pending).unwrap(), expected[i]);
        }
        let (own, executable) = session(&open());
        let unfinished: Vec<Pending> = (0..3).map(|i| start(&executable, i).unwrap()).collect();
        drop((own, executable, unfinished));
    });
}

/// Each thread trains a session of its own, all with one step under way at least; every result is as of one thread alone.
#[test]
fn sixteen_threads_on_one_device_and_on_two() {
    const STEPS: usize = 12;
    in_time(|| {
        let devices = [open(), open()];
        let expected = train(&session(&devices[0]).1, 0..STEPS);
        for used in [1, 2] {
            std::thread::scope(|scope| {
                for thread in 0..16 {
                    let (gpu, expected) = (&devices[thread % used], &expected);
                    scope.spawn(move || {
                        let (own, executable) = session(gpu);
                        let pending: Vec<Pending> = (0..STEPS)
                            .map(|step| start(&executable, step).unwrap())
                            .collect();
                        let losses = pending.into_iter().map(|p| loss(p).unwrap());
                        assert_eq!(losses.collect::<Vec<_>>(), *expected, "thread {thread}");
                        assert!(own.get("a").unwrap().iter().all(|w| w.is_finite()));
                    });
                }
            });
        }
        for gpu in devices {
            assert_eq!(gpu.report().uncaptured_errors, 0);
            assert_eq!(gpu.report().pool.in_use_bytes, 0);
        }
    });
}

/// What a process holds: resident bytes, open files, threads.
#[cfg(target_os = "linux")]
fn held() -> [u64; 3] {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let field = |name: &str| -> u64 {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let files = std::fs::read_dir("/proc/self/fd").unwrap().count();
    [field("VmRSS:") << 10, files as u64, field("Threads:")]
}

/// In a process of its own, so that no other test allocates meanwhile. Some results are waited for, some are dropped; parameters are read and
/// set now and then.
#[cfg(target_os = "linux")]
#[test]
fn steps_need_no_more_memory_handles_or_time() {
    const ALONE: &str = "ENERGYFLOW_TEST_STEPS_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let test = "steps_need_no_more_memory_handles_or_time";
        let mut alone = itself::command();
        let alone = alone.args(["--exact", test, "--nocapture"]).env(ALONE, "1");
        assert!(alone.status().unwrap().success());
        return;
    }
    let steps = std::env::var("ENERGYFLOW_TEST_STEPS").map_or(600, |n| n.parse().unwrap());
    let gpu = open();
    let (mut own, executable) = session(&gpu);
    let w = own.get("a").unwrap();
    let mut times = Vec::with_capacity(steps);
    let mut before = None;
    for step in 0..steps {
        // All that is made once is made in the first tenth.
        if step == steps / 10 {
            gpu.recorder("wait").submit().unwrap().wait().unwrap();
            before = Some((held(), gpu.report()));
        }
        let begin = std::time::Instant::now();
        let pending = start(&executable, step).unwrap();
        match step % 5 {
            0 => drop(pending),
            _ => assert!(f32::from_bits(loss(pending).unwrap()).is_finite()),
        }
        match step % 20 {
            7 => drop(own.get("b").unwrap()),
            13 => own.set("a", &w).unwrap(),
            _ => {}
        }
        times.push(begin.elapsed().as_secs_f64());
    }
    gpu.recorder("wait").submit().unwrap().wait().unwrap();
    let ([memory, files, threads], report) = before.unwrap();
    let ([memory_after, files_after, threads_after], after) = (held(), gpu.report());
    let median = |times: &mut [f64]| {
        times.sort_by(f64::total_cmp);
        1e6 * times[times.len() / 2]
    };
    let tenth = steps / 10;
    let last = median(&mut times[steps - tenth..]);
    let first = median(&mut times[..tenth]);
    println!(
        "{steps} steps on {}: from the first tenth to the end {:.2} MiB more resident, {files} → {files_after} open files, \
         {threads} → {threads_after} threads, pool {} → {} bytes, {} → {} staging buffers, median step {first:.0} → {last:.0} µs",
        gpu.capabilities().adapter,
        (memory_after as f64 - memory as f64) / f64::from(1 << 20),
        report.pool.allocated_bytes,
        after.pool.allocated_bytes,
        report.staging_buffers,
        after.staging_buffers,
    );
    assert_eq!(after.pool.allocated_bytes, report.pool.allocated_bytes);
    assert_eq!(after.pool.in_use_bytes, report.pool.in_use_bytes);
    assert_eq!(after.staging_buffers, report.staging_buffers);
    assert_eq!(after.bind_groups.cached, report.bind_groups.cached);
    assert_eq!(after.pipelines.cached, report.pipelines.cached);
    assert_eq!(after.uncaptured_errors, 0);
    assert_eq!(files_after, files);
    assert_eq!(threads_after, threads);
    assert!(memory_after < memory + (8 << 20), "{memory} {memory_after}");
    // Few steps tell nothing on a busy machine, nor do the slow ones of many.
    if steps >= 10_000 {
        let fast = |sorted: &[f64]| sorted[sorted.len() / 10];
        let (first, last) = (fast(&times[..tenth]), fast(&times[steps - tenth..]));
        assert!(last < 1.5 * first, "{first} {last}");
    }
}
