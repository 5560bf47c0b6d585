//! Every allocation fails in turn: nothing that was there changes, and the next attempt succeeds.

use crate::graph::{Graph, Init};
use crate::runtime::{Executable, Host};
use crate::train::{AdamW, Checkpoint};
use crate::types::{DType, Trans, UnaryOp};
use crate::{Error, Gpu, GpuOptions, Result, Session};

const ROWS: usize = 8;
const WIDTH: usize = 16;

/// A training step with an f16 copy of a weight, and two outputs.
fn step() -> Graph {
    let mut graph = Graph::new();
    let x = graph.input("x", &[ROWS, WIDTH], DType::F16).unwrap();
    let w = graph
        .parameter("w", &[WIDTH, WIDTH], Init::Uniform(0.5))
        .unwrap();
    let b = graph
        .parameter("b", &[WIDTH], Init::Constant(0.25))
        .unwrap();
    let half = graph.cast(w, DType::F16).unwrap();
    let y = graph.matmul_as(x, half, Trans::NT, DType::F32).unwrap();
    let y = graph.add_bias(y, b).unwrap();
    let y = graph.unary(UnaryOp::Tanh, y).unwrap();
    let square = graph.unary(UnaryOp::Square, y).unwrap();
    let loss = graph.sum_all(square).unwrap();
    graph.output("loss", loss).unwrap();
    graph.output("y", y).unwrap();
    AdamW::default().step(&mut graph, loss, &[w, b]).unwrap();
    graph
}

/// What a session has before: a graph of its own, and a parameter with it.
fn earlier() -> Graph {
    let mut graph = Graph::new();
    let p = graph
        .parameter("earlier", &[40], Init::Uniform(1.0))
        .unwrap();
    let y = graph.affine(p, 2.0, 0.0).unwrap();
    graph.output("y", y).unwrap();
    graph
}

fn inputs() -> Vec<f32> {
    (0..ROWS * WIDTH)
        .map(|i| (i % 11) as f32 / 11.0 - 0.5)
        .collect()
}

fn losses(executable: &Executable, count: usize) -> Vec<u32> {
    let x = inputs();
    let run = || executable.run(&[("x", Host::F32(&x))]).unwrap().wait();
    (0..count)
        .map(|_| run().unwrap().scalar("loss").unwrap().to_bits())
        .collect()
}

/// Everything that a session keeps, as bits, by name.
fn content(session: &Session) -> Vec<(String, Vec<u32>)> {
    let names: Vec<String> = session
        .parameters()
        .map(|(name, _)| name.to_owned())
        .collect();
    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<u32>>();
    let content = names.into_iter().map(|name| {
        let mut values = bits(session.get(&name).unwrap());
        for moments in session.moments(&name).unwrap().into_iter().flatten() {
            values.extend(bits(moments));
        }
        (name, values)
    });
    content.collect()
}

/// Makes each allocation of `attempt` fail in turn, by itself and with all that follow, each on a session that `prepare` gives. After a
/// failure the session is as before, and the next attempt succeeds. Returns the number of failures.
fn fail_in_turn<P, T>(
    gpu: &Gpu,
    mut prepare: impl FnMut() -> (Session, P),
    mut attempt: impl FnMut(&mut Session, &P) -> Result<T>,
    mut check: impl FnMut(&mut Session, &P, T),
) -> u64 {
    let mut failures = 0;
    for failing in [1, u64::MAX] {
        for granted in 0.. {
            let (mut session, prepared) = prepare();
            let before = content(&session);
            // Nothing idle, so that all memory is allocated.
            gpu.trim();
            let in_use = gpu.report().pool.in_use_bytes;
            gpu.refusals().set(granted, failing);
            let result = attempt(&mut session, &prepared);
            let refused = gpu.refusals().end();
            match result {
                Err(Error::OutOfMemory { what, bytes }) => {
                    assert!(refused > 0 && bytes > 0 && !what.is_empty());
                    failures += 1;
                    let now = gpu.report().pool.in_use_bytes;
                    assert_eq!(now, in_use, "allocation {granted}, {what}");
                    assert!(content(&session) == before, "allocation {granted}, {what}");
                    let result = attempt(&mut session, &prepared).unwrap();
                    check(&mut session, &prepared, result);
                }
                Err(error) => panic!("allocation {granted}: {error}"),
                Ok(result) => {
                    check(&mut session, &prepared, result);
                    if refused == 0 {
                        break;
                    }
                }
            }
        }
    }
    assert_eq!(gpu.report().uncaptured_errors, 0);
    failures
}

fn gpu() -> Gpu {
    Gpu::new(&GpuOptions::from_env().unwrap()).expect("tests need a GPU adapter")
}

fn expected(gpu: &Gpu, graph: &Graph) -> Vec<u32> {
    let mut session = Session::new(gpu, 3);
    losses(&session.compile(graph).unwrap(), 3)
}

#[test]
fn out_of_memory_while_compiling() {
    let (gpu, graph, earlier) = (gpu(), step(), earlier());
    let expected = expected(&gpu, &graph);
    let failures = fail_in_turn(
        &gpu,
        || {
            let mut session = Session::new(&gpu, 3);
            let held = session.compile(&earlier).unwrap();
            (session, held)
        },
        |session, _| session.compile(&graph),
        |_, _, executable| assert_eq!(losses(&executable, 3), expected),
    );
    println!("compiling: {failures} allocations failed in turn");
    assert!(failures > 10, "{failures}");
}

#[test]
fn out_of_memory_while_running() {
    let (gpu, graph) = (gpu(), step());
    let expected = expected(&gpu, &graph);
    let x = inputs();
    let failures = fail_in_turn(
        &gpu,
        || {
            let mut session = Session::new(&gpu, 3);
            let executable = session.compile(&graph).unwrap();
            (session, executable)
        },
        |_, executable| executable.run(&[("x", Host::F32(&x))]),
        |_, executable, pending| {
            let first = pending.wait().unwrap().scalar("loss").unwrap().to_bits();
            assert_eq!(first, expected[0]);
            assert_eq!(losses(executable, 2), expected[1..]);
        },
    );
    println!("running: {failures} allocations failed in turn");
    assert!(failures > 0, "{failures}");
}

/// Reading, writing, and the checkpoint of a session.
#[test]
fn out_of_memory_while_reading_and_writing() {
    let (gpu, graph) = (gpu(), step());
    let prepare = || {
        let mut session = Session::new(&gpu, 3);
        let executable = session.compile(&graph).unwrap();
        losses(&executable, 2);
        (session, executable)
    };
    let w = vec![0.125; WIDTH * WIDTH];
    let mut failures = fail_in_turn(
        &gpu,
        prepare,
        |session, _| session.set("w", &w),
        |session, _, ()| assert_eq!(session.get("w").unwrap(), w),
    );
    let (session, _) = prepare();
    let checkpoint = Checkpoint::from_session(&session).unwrap();
    failures += fail_in_turn(
        &gpu,
        prepare,
        |session, _| Checkpoint::from_session(session),
        |_, _, read| assert!(read == checkpoint),
    );
    failures += fail_in_turn(
        &gpu,
        prepare,
        |session, _| session.get("w"),
        |session, _, w| assert_eq!(session.get("w").unwrap(), w),
    );
    println!("reading and writing: {failures} allocations failed in turn");
    assert!(failures > 4, "{failures}");
}

/// A checkpoint is applied again after a failure, which may have come in its middle.
#[test]
fn out_of_memory_while_a_checkpoint_is_applied() {
    let (gpu, graph) = (gpu(), step());
    let mut session = Session::new(&gpu, 3);
    let executable = session.compile(&graph).unwrap();
    losses(&executable, 2);
    let checkpoint = Checkpoint::from_session(&session).unwrap();
    let next = losses(&executable, 1);
    let mut failures = 0;
    for granted in 0.. {
        losses(&executable, 1);
        gpu.trim();
        gpu.refusals().set(granted, u64::MAX);
        let result = checkpoint.apply(&mut session);
        let refused = gpu.refusals().end();
        if refused == 0 {
            result.unwrap();
            break;
        }
        assert!(matches!(result, Err(Error::OutOfMemory { .. })));
        failures += 1;
        checkpoint.apply(&mut session).unwrap();
        assert_eq!(losses(&executable, 1), next, "allocation {granted}");
    }
    println!("applying a checkpoint: {failures} allocations failed in turn");
    assert!(failures > 4, "{failures}");
}
