//! Callbacks that the caller registers on the device and the queue run inside calls of this crate: they may call it, and they may panic.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, mpsc};
use std::time::Duration;

use energyflow::gpu::{Alignment, Layout, Tensor};
use energyflow::graph::{Graph, Init};
use energyflow::runtime::Host;
use energyflow::text::{Batches, Dataset, EncoderOptions, Trainer, TrainerOptions};
use energyflow::train::AdamW;
use energyflow::types::{DType, Trans};
use energyflow::{Error, Executable, Gpu, GpuOptions, Session};

/// Fails when `work` takes longer than any of it should, as it would if it waited for itself.
fn without_deadlock(work: impl FnOnce() + Send + 'static) {
    let (done, finished) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        work();
        // The receiver is gone only after the test has failed.
        let _ = done.send(());
    });
    match finished.recv_timeout(Duration::from_secs(300)) {
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("deadlock"),
        _ => thread.join().expect("the work itself failed"),
    }
}

/// y = x·w with a shadow of w, so that a run has to do with everything that is locked: 16 rows of 16 inputs, w = 1.
fn products(gpu: &Gpu) -> Arc<Executable> {
    static GRAPH: LazyLock<Graph> = LazyLock::new(|| {
        let mut graph = Graph::new();
        let x = graph.input("x", &[16, 16], DType::F16).unwrap();
        let w = graph
            .parameter("w", &[16, 16], Init::Constant(1.0))
            .unwrap();
        let w = graph.cast(w, DType::F16).unwrap();
        let y = graph.matmul(x, w, Trans::NN).unwrap();
        let y = graph.cast(y, DType::F32).unwrap();
        graph.output("y", y).unwrap();
        graph
    });
    Session::new(gpu, 0).compile(&GRAPH).unwrap()
}

fn run(executable: &Executable, x: f32) {
    let run = executable.run(&[("x", Host::F32(&[x; 256]))]).unwrap();
    assert_eq!(run.wait().unwrap().get("y").unwrap(), [16.0 * x; 256]);
}

/// On a device that copies inputs, and on one that reads them in place where it can.
fn devices() -> [Gpu; 2] {
    let options = || GpuOptions::from_env().unwrap();
    [options().baseline(true), options()].map(|options| Gpu::new(&options).unwrap())
}

/// Runs an executable twice from a callback, which calls itself again `depth` times.
fn chain(gpu: &Gpu, executable: &Arc<Executable>, count: &Arc<AtomicUsize>, depth: usize) {
    let (again, executable, count) = (gpu.clone(), Arc::clone(executable), Arc::clone(count));
    gpu.queue().on_submitted_work_done(move || {
        if depth > 0 {
            chain(&again, &executable, &count, depth - 1);
        }
        run(&executable, depth as f32);
        run(&executable, 1.0);
        count.fetch_add(1, Ordering::SeqCst);
    });
}

#[test]
fn a_callback_may_run_and_wait() {
    without_deadlock(|| {
        for gpu in devices() {
            let executable = products(&gpu);
            let count = Arc::new(AtomicUsize::new(0));
            for round in 0..20 {
                drop(executable.run(&[("x", Host::F32(&[2.0; 256]))]).unwrap());
                chain(&gpu, &executable, &count, 3);
                run(&executable, round as f32);
            }
            while count.load(Ordering::SeqCst) < 80 {
                run(&executable, 0.5);
            }
        }
    });
}

#[test]
fn callbacks_run_and_wait_from_several_threads() {
    without_deadlock(|| {
        for gpu in devices() {
            let executables = [products(&gpu), products(&gpu)];
            let count = Arc::new(AtomicUsize::new(0));
            std::thread::scope(|scope| {
                for thread in 0..4 {
                    let (gpu, executables, count) = (&gpu, &executables, &count);
                    scope.spawn(move || {
                        for round in 0..10 {
                            let own = &executables[thread % 2];
                            chain(gpu, &executables[(thread + 1) % 2], count, 1);
                            let pending = own.run(&[("x", Host::F32(&[0.25; 256]))]).unwrap();
                            chain(gpu, own, count, 0);
                            run(own, round as f32);
                            pending.wait().unwrap();
                        }
                    });
                }
            });
            while count.load(Ordering::SeqCst) < 4 * 10 * 3 {
                run(&executables[0], 0.5);
            }
        }
    });
}

/// Compiling, allocating, setting parameters, timing and waiting for results of before: everything else that has locks.
#[test]
fn a_callback_may_do_everything_else() {
    without_deadlock(|| {
        for gpu in devices() {
            let executable = products(&gpu);
            let earlier = executable.run(&[("x", Host::F32(&[3.0; 256]))]).unwrap();
            let done = Arc::new(AtomicUsize::new(0));
            let (inner, counter) = (gpu.clone(), Arc::clone(&done));
            let again = Arc::clone(&executable);
            gpu.queue().on_submitted_work_done(move || {
                assert_eq!(earlier.wait().unwrap().get("y").unwrap(), [48.0; 256]);
                let executable = products(&inner);
                run(&executable, 1.0);
                if inner.capabilities().timestamps {
                    assert!(again.time().unwrap() >= 0.0);
                    assert!(!again.profile().unwrap().dispatches.is_empty());
                }
                let layout = Layout::new(1, 8, DType::F32, Alignment::Bytes16).unwrap();
                let tensor = Tensor::zeroed(&inner, layout).unwrap();
                tensor.upload(&inner, &[1.0_f32; 8]).unwrap();
                assert_eq!(
                    tensor.download::<f32>(&inner).unwrap().wait().unwrap(),
                    [1.0; 8]
                );
                inner.trim();
                counter.fetch_add(1, Ordering::SeqCst);
            });
            while done.load(Ordering::SeqCst) == 0 {
                run(&executable, 2.0);
            }
        }
    });
}

/// What a callback trains while an executable is measured stays, as all of a measurement is one submission.
#[test]
fn a_measurement_does_not_undo_what_a_callback_trains() {
    without_deadlock(|| {
        for gpu in devices() {
            if !gpu.capabilities().timestamps {
                continue;
            }
            let mut graph = Graph::new();
            let w = graph.parameter("w", &[4], Init::Constant(1.0)).unwrap();
            let square = graph.mul(w, w).unwrap();
            let loss = graph.sum_all(square).unwrap();
            AdamW::default().step(&mut graph, loss, &[w]).unwrap();
            let mut session = Session::new(&gpu, 0);
            let executable = session.compile(&graph).unwrap();
            let measurements: [fn(&Executable); 2] = [
                |executable| drop(executable.profile().unwrap()),
                |executable| assert!(executable.time().unwrap() >= 0.0),
            ];
            for measure in measurements {
                let before = session.get("w").unwrap();
                measure(&executable);
                assert_eq!(session.get("w").unwrap(), before);
                let (inner, trained) = (Arc::clone(&executable), Arc::new(AtomicUsize::new(0)));
                let counter = Arc::clone(&trained);
                gpu.queue().on_submitted_work_done(move || {
                    inner.run(&[]).unwrap().wait().unwrap();
                    counter.fetch_add(1, Ordering::SeqCst);
                });
                let submissions = gpu.report().submissions;
                measure(&executable);
                let own = 1 + trained.load(Ordering::SeqCst) as u64;
                assert_eq!(gpu.report().submissions, submissions + own);
                assert_eq!(
                    trained.load(Ordering::SeqCst),
                    1,
                    "the callback ran meanwhile"
                );
                let after = session.get("w").unwrap();
                assert!(after[0] < before[0], "{before:?} {after:?}");
            }
        }
    });
}

/// A callback that panics, then calls until its panic has come out of one of them.
fn assert_unwinds(gpu: &Gpu, mut call: impl FnMut()) {
    gpu.queue()
        .on_submitted_work_done(|| panic!("a panic of the caller"));
    for _ in 0..100 {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(&mut call)) {
            assert_eq!(panic.downcast_ref::<&str>(), Some(&"a panic of the caller"));
            return;
        }
    }
    panic!("the callback's panic was swallowed");
}

#[test]
fn a_panic_reaches_whoever_polled_and_spoils_nothing() {
    without_deadlock(|| {
        for gpu in devices() {
            let executable = products(&gpu);
            run(&executable, 1.0);
            let made = gpu.report().staging_buffers;
            for round in 0..10 {
                assert_unwinds(&gpu, || run(&executable, 2.0));
                run(&executable, round as f32);
                assert_unwinds(&gpu, || {
                    drop(executable.run(&[("x", Host::F32(&[3.0; 256]))]).unwrap());
                });
                for _ in 0..4 {
                    run(&executable, 4.0);
                }
                assert_unwinds(&gpu, || {
                    gpu.recorder("nothing").submit().unwrap().wait().unwrap();
                });
            }
            assert_eq!(gpu.report().uncaptured_errors, 0);
            let now = gpu.report().staging_buffers;
            assert!(now <= made + 20, "{made} staging buffers before, {now} now");
            // Not lost, not poisoned.
            run(&products(&gpu), 1.0);
        }
    });
}

/// The thread that waits for tasks runs callbacks, too. Its panic comes out of the task, or of the next call.
#[test]
fn no_panic_is_lost_on_the_thread_that_waits_for_tasks() {
    let gpu = common_gpu();
    let executable = products(&gpu);
    without_deadlock(move || {
        for _ in 0..50 {
            let pending = executable.run(&[("x", Host::F32(&[2.0; 256]))]).unwrap();
            gpu.queue()
                .on_submitted_work_done(|| panic!("a panic of the caller"));
            match catch_unwind(AssertUnwindSafe(|| pollster::block_on(pending))) {
                Ok(outputs) => {
                    assert_eq!(outputs.unwrap().get("y").unwrap(), [32.0; 256]);
                    let mut calls = (0..100).map(|_| {
                        let call = || run(&executable, 1.0);
                        catch_unwind(AssertUnwindSafe(call))
                    });
                    assert!(calls.any(|call| call.is_err()), "swallowed");
                }
                Err(panic) => assert!(panic.is::<&str>()),
            }
        }
        let outputs = pollster::block_on(executable.run(&[("x", Host::F32(&[1.0; 256]))]).unwrap());
        assert_eq!(outputs.unwrap().get("y").unwrap(), [16.0; 256]);
    });
}

fn common_gpu() -> Gpu {
    Gpu::new(&GpuOptions::from_env().unwrap()).unwrap()
}

/// The gradients of two steps must not be added up together: a callback inside a step cannot begin another.
#[test]
fn a_step_in_micro_batches_is_not_entered_twice() {
    without_deadlock(|| {
        let gpu = common_gpu();
        let encoder = EncoderOptions::default()
            .length(6)
            .width(12)
            .hidden(20)
            .kernel(3)
            .dilations(vec![1])
            .embedding(384);
        let distill = TrainerOptions::default().batch(4).micro_batches(2);
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/data/wordnet_train.safetensors"
        );
        let samples = Dataset::open(path).unwrap().take(8);
        let mut batches = Batches::training(samples, 4, encoder.length, 0).unwrap();
        batches.start_epoch(0);
        let batch = batches.next_batch().unwrap().unwrap().clone();
        let distiller = Arc::new(Trainer::distill(&gpu, &encoder, &distill).unwrap());
        let (ran, refused) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        for round in 1..=30 {
            let (ran, refused) = (Arc::clone(&ran), Arc::clone(&refused));
            let (inner, again) = (Arc::clone(&distiller), batch.clone());
            let counted = Arc::clone(&ran);
            gpu.queue().on_submitted_work_done(move || {
                match inner.step(&again, 0) {
                    Ok(metrics) => assert!(metrics.loss.is_finite()),
                    Err(Error::Graph(_)) => {
                        refused.fetch_add(1, Ordering::SeqCst);
                    }
                    Err(error) => panic!("{error}"),
                }
                counted.fetch_add(1, Ordering::SeqCst);
            });
            assert!(distiller.step(&batch, 0).unwrap().loss.is_finite());
            while ran.load(Ordering::SeqCst) < round {
                gpu.recorder("poll").submit().unwrap().wait().unwrap();
            }
        }
        assert!(refused.load(Ordering::SeqCst) > 0);
    });
}
