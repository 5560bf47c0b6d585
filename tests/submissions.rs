//! Runs that are cut into several submissions compute the same.

mod common;

use std::time::Duration;

use common::{baseline_gpu, gpu};
use energyflow::graph::{Graph, Init};
use energyflow::runtime::Host;
use energyflow::train::AdamW;
use energyflow::types::{DType, Trans, UnaryOp};
use energyflow::{Executable, Gpu, GpuOptions, Result, Session};

const LAYERS: usize = 2;

/// A training step that also counts, and outputs its loss and an input.
fn step() -> Result<Graph> {
    let mut graph = Graph::new();
    let x = graph.input("x", &[8, 16], DType::F32)?;
    let mut y = x;
    let mut parameters = Vec::new();
    for i in 0..LAYERS {
        let w = graph.parameter(&format!("w{i}"), &[16, 16], Init::Uniform(0.5))?;
        let half = graph.cast(w, DType::F16)?;
        let input = graph.cast(y, DType::F16)?;
        let product = graph.matmul_as(input, half, Trans::NT, DType::F32)?;
        y = graph.unary(UnaryOp::Tanh, product)?;
        parameters.push(w);
    }
    let square = graph.unary(UnaryOp::Square, y)?;
    let loss = graph.sum_all(square)?;
    graph.output("loss", loss)?;
    graph.output("x", x)?;
    AdamW::default().step(&mut graph, loss, &parameters)?;
    Ok(graph)
}

/// Losses and parameters after some steps, as bits, and submissions per step.
fn train(gpu: &Gpu, most: Option<Duration>) -> (Vec<u32>, usize) {
    let mut session = Session::new(gpu, 3).max_submission(most);
    let graph = step().unwrap();
    let executable = session.compile(&graph).unwrap();
    let submissions = executable.submissions();
    let mut pending = Vec::new();
    for i in 0..2 * Executable::IN_FLIGHT {
        let x: Vec<f32> = (0..128)
            .map(|j| ((i * 37 + j) % 17) as f32 / 17.0)
            .collect();
        let inputs: Vec<(&str, Host<'_>)> = graph
            .values()
            .filter(|(_, value)| value.name == "x")
            .map(|_| ("x", Host::from(&x)))
            .collect();
        pending.push((executable.run(&inputs).unwrap(), x));
        if i % 2 == 0 {
            // Outdates the f16 copies, which then are part of the next run.
            session.set("w1", &[0.125 * i as f32; 256]).unwrap();
        }
    }
    let mut bits = Vec::new();
    for (pending, x) in pending {
        let outputs = pending.wait().unwrap();
        assert_eq!(outputs.get("x").unwrap(), x);
        bits.push(outputs.scalar("loss").unwrap().to_bits());
    }
    for i in 0..LAYERS {
        let w = session.get(&format!("w{i}")).unwrap();
        bits.extend(w.iter().map(|w| w.to_bits()));
    }
    (bits, submissions)
}

#[test]
fn cut_runs_compute_the_same_bits() {
    for gpu in [gpu(), baseline_gpu()] {
        let (whole, one) = train(&gpu, None);
        assert_eq!(one, 1);
        let (each, many) = train(&gpu, Some(Duration::ZERO));
        assert!(many > 4 * LAYERS, "{many}");
        assert_eq!(each, whole);
        // Somewhere in between.
        let (some, few) = train(&gpu, Some(Duration::from_micros(10)));
        assert!((2..many).contains(&few), "{few} of {many}");
        assert_eq!(some, whole);
        let (long, one) = train(&gpu, Some(Duration::from_secs(3600)));
        assert_eq!((long, one), (whole, 1));
    }
}

/// The device counts what the executable says, and a measured time takes the place of the estimate.
#[test]
fn submissions_are_counted_and_follow_what_is_measured() {
    let gpu = Gpu::new(&GpuOptions::default()).unwrap();
    let mut graph = Graph::new();
    let x = graph.input("x", &[64, 64], DType::F32).unwrap();
    let mut y = x;
    for _ in 0..20 {
        y = graph.matmul(y, x, Trans::NN).unwrap();
    }
    graph.output("y", y).unwrap();
    let data = vec![0.0; 64 * 64];
    let run = |most| {
        let mut session = Session::new(&gpu, 0).max_submission(most);
        let executable = session.compile(&graph).unwrap();
        let before = gpu.report().submissions;
        let expected = executable.submissions();
        let outputs = executable.run(&[("x", Host::from(&data))]).unwrap().wait();
        assert_eq!(outputs.unwrap().get("y").unwrap(), data);
        assert_eq!(gpu.report().submissions - before, expected as u64);
        (expected, executable.submissions())
    };
    assert_eq!(run(Some(Duration::ZERO)), (20, 20));
    assert_eq!(run(None), (1, 1));
    // Whatever a run takes here, it is less than an hour and more than a nanosecond.
    assert_eq!(run(Some(Duration::from_secs(3600))), (1, 1));
    assert_eq!(run(Some(Duration::from_nanos(1))), (20, 20));
}
