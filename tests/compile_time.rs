//! The time that compiling takes is about proportional to the number of nodes.

mod common;

use std::time::Instant;

use common::gpu;
use energyflow::graph::{Graph, Init};
use energyflow::runtime::Host;
use energyflow::train::AdamW;
use energyflow::types::{DType, Trans, UnaryOp};
use energyflow::{Result, Session};

/// y = x + x + x + …
fn additions(nodes: usize) -> Result<Graph> {
    let mut graph = Graph::new();
    let x = graph.input("x", &[4, 16], DType::F32)?;
    let mut y = x;
    for _ in 0..nodes {
        y = graph.add(y, x)?;
    }
    graph.output("y", y)?;
    Ok(graph)
}

/// Products with a function behind each, all of one shape.
fn products(nodes: usize) -> Result<Graph> {
    let mut graph = Graph::new();
    let x = graph.input("x", &[4, 16], DType::F32)?;
    let w = graph.input("w", &[16, 16], DType::F32)?;
    let mut y = x;
    for _ in 0..nodes / 2 {
        y = graph.matmul(y, w, Trans::NN)?;
        y = graph.unary(UnaryOp::Tanh, y)?;
    }
    graph.output("y", y)?;
    Ok(graph)
}

/// A training step over many layers with a parameter each; about this many nodes with the backward pass.
fn training(nodes: usize) -> Result<Graph> {
    let mut graph = Graph::new();
    let mut y = graph.input("x", &[4, 16], DType::F32)?;
    let mut parameters = Vec::new();
    for i in 0..nodes / 6 {
        let w = graph.parameter(&format!("w{i}"), &[16, 16], Init::Uniform(0.1))?;
        y = graph.matmul(y, w, Trans::NT)?;
        y = graph.unary(UnaryOp::Tanh, y)?;
        parameters.push(w);
    }
    let square = graph.unary(UnaryOp::Square, y)?;
    let loss = graph.sum_all(square)?;
    AdamW::default().step(&mut graph, loss, &parameters)?;
    Ok(graph)
}

/// Four times as many nodes take at most this many times as long. Work that grows with the square would take 16 times as long.
const MOST: f64 = 8.0;

/// Seconds that this thread has computed, where the system tells; other work of the machine does not count.
fn computed() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    let nanoseconds: f64 = text.split(' ').next()?.parse().ok()?;
    Some(nanoseconds * 1e-9)
}

/// Seconds to plan a graph. It is planned several times, because the system counts in steps of milliseconds.
fn planning(graph: &Graph) -> f64 {
    let session = Session::new(&gpu(), 0);
    let (start, before) = (Instant::now(), computed());
    let mut times = 0;
    loop {
        session.plan(graph).unwrap();
        times += 1;
        let wall = start.elapsed().as_secs_f64();
        let passed = match (before, computed()) {
            (Some(before), Some(now)) if now > before => now - before,
            // Not counted, or not yet.
            _ if wall > 2.0 => wall,
            _ => continue,
        };
        if passed > 0.1 || wall > 10.0 {
            return passed / f64::from(times);
        }
    }
}

#[test]
fn four_times_the_nodes_take_about_four_times_as_long() {
    for (name, build) in [
        ("additions", additions as fn(usize) -> Result<Graph>),
        ("products", products),
        ("training", training),
    ] {
        let [few, many] = [2000, 8000].map(|nodes| build(nodes).unwrap());
        let [few, many] = [planning(&few), planning(&many)];
        println!("{name}: {few:.4} s and {many:.4} s");
        assert!(many <= MOST * few, "{name}: {few:.4} s and {many:.4} s");
    }
}

/// A long chain becomes several kernels of bounded length, most of which are the same one; they compute what one kernel would.
#[test]
fn long_chains_are_cut() {
    let nodes = 10_000;
    let mut session = Session::new(&gpu(), 0);
    let start = Instant::now();
    let executable = session.compile(&additions(nodes).unwrap()).unwrap();
    let compiled = start.elapsed();
    println!("{nodes} additions compiled in {compiled:?}");
    let longest = executable.sources().map(|(_, wgsl)| wgsl.len()).max();
    assert!(longest.unwrap() < 20_000);
    let mut keys: Vec<&str> = executable.sources().map(|(key, _)| key).collect();
    keys.sort_unstable();
    keys.dedup();
    assert!(keys.len() <= 3, "{}", keys.len());
    let x: Vec<f32> = (0..64).map(|i| i as f32 / 64.0).collect();
    let y = executable
        .run(&[("x", Host::from(&x))])
        .unwrap()
        .wait()
        .unwrap();
    for (x, y) in x.iter().zip(y.get("y").unwrap()) {
        let expected = x * (nodes + 1) as f32;
        assert!((y - expected).abs() <= 1e-3 * expected, "{y} {expected}");
    }
}
