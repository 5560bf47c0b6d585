//! Profiles and dumps: what they hold, what they leave alone, the files.

mod common;

use common::gpu;
use energyflow::graph::{Graph, Init};
use energyflow::nn::{Gelu, Linear};
use energyflow::runtime::{Clock, Host};
use energyflow::train::AdamW;
use energyflow::types::{DType, Trans};
use energyflow::{Gpu, GpuOptions, Session};
use tempfile::TempDir;

/// A training step of two layers of one shape.
fn step() -> Graph {
    let mut graph = Graph::new();
    let x = graph.input("x", &[16, 32], DType::F32).unwrap();
    let mut h = x;
    for name in ["first", "second"] {
        let layer = Linear::new(&mut graph, name, 32, 32, true).unwrap();
        h = graph
            .scoped(name, |graph| {
                let h = layer.forward(graph, h)?;
                Gelu::Tanh.forward(graph, h)
            })
            .unwrap();
    }
    let scale = graph.parameter("scale", &[1], Init::Constant(1.0)).unwrap();
    let h = graph.mul_scalar(h, scale).unwrap();
    let loss = graph.sum_all(h).unwrap();
    graph.output("loss", loss).unwrap();
    let parameters: Vec<_> = graph.parameters().map(|(id, _)| id).collect();
    AdamW::default()
        .step(&mut graph, loss, &parameters)
        .unwrap();
    graph
}

fn data() -> Vec<f32> {
    (0..16 * 32).map(|i| (i % 7) as f32 - 3.0).collect()
}

#[test]
fn a_profile_has_every_dispatch_and_changes_nothing() {
    let graph = step();
    let mut session = Session::new(&gpu(), 0);
    let executable = session.compile(&graph).unwrap();
    let x = data();
    executable
        .run(&[("x", Host::from(&x))])
        .unwrap()
        .wait()
        .unwrap();
    let before = session.get("first.weight").unwrap();
    let profile = executable.profile().unwrap().measured();
    assert_eq!(session.get("first.weight").unwrap(), before);
    // Some drivers have timestamps that do not count.
    let counts = executable.time().is_ok_and(|nanoseconds| nanoseconds > 0.0);
    let (clock, clock_in_json) = match counts {
        true => (Clock::Gpu, "gpu"),
        false => (Clock::Host, "host"),
    };
    assert_eq!(profile.clock, clock);
    assert_eq!(profile.dispatches.len(), executable.plan().dispatches);
    assert!(profile.total() > 0.0);
    let rows = profile.rows();
    let calls: usize = rows.iter().map(|row| row.calls).sum();
    assert_eq!(calls, profile.dispatches.len());
    let time: f64 = rows.iter().map(|row| row.nanoseconds).sum();
    assert!((time - profile.total()).abs() < 1e-6 * time);
    assert!(rows.is_sorted_by(|a, b| a.nanoseconds >= b.nanoseconds));
    for row in &rows {
        if counts && row.nanoseconds > 0.0 && row.bytes > 0.0 {
            assert!(row.bound.unwrap() > 0.0, "{row:?}");
        }
    }
    assert!(rows.iter().any(|row| row.layer.as_deref() == Some("first")));
    let starts: Vec<f64> = profile.dispatches.iter().map(|d| d.start).collect();
    assert!(starts.is_sorted(), "{starts:?}");
    let text = profile.to_string();
    for word in ["GFLOP/s", "second", "memory", "allocated"] {
        assert!(text.contains(word), "{word:?} is missing in\n{text}");
    }

    let json = profile.to_json();
    assert_eq!(
        json["dispatches"].as_array().unwrap().len(),
        profile.dispatches.len()
    );
    assert_eq!(json["clock"], clock_in_json);
    assert!(json["memory_bytes"]["parameters"].as_u64().unwrap() > 0);
    let trace = profile.to_chrome_trace();
    let events = trace["traceEvents"].as_array().unwrap();
    let kernels: Vec<_> = events
        .iter()
        .filter(|e| e["tid"] == 2 && e["ph"] == "X")
        .collect();
    assert_eq!(kernels.len(), profile.dispatches.len());
    let duration: f64 = kernels.iter().map(|e| e["dur"].as_f64().unwrap()).sum();
    assert!((1e3 * duration - profile.total()).abs() < 1.0);
    let layers = events.iter().filter(|e| e["tid"] == 1 && e["ph"] == "X");
    assert!(layers.clone().count() >= 2);
}

#[test]
fn without_timestamps_the_host_measures() {
    // The baseline has no timestamps.
    let gpu = Gpu::new(&GpuOptions::from_env().unwrap().baseline(true)).unwrap();
    assert!(!gpu.capabilities().timestamps);
    let mut session = Session::new(&gpu, 0);
    let executable = session.compile(&step()).unwrap();
    let x = data();
    executable
        .run(&[("x", Host::from(&x))])
        .unwrap()
        .wait()
        .unwrap();
    let before = session.get("second.weight").unwrap();
    let profile = executable.profile().unwrap().measured();
    assert_eq!(session.get("second.weight").unwrap(), before);
    assert_eq!(profile.clock, Clock::Host);
    assert!(profile.ceilings.is_none());
    assert_eq!(profile.dispatches.len(), executable.plan().dispatches);
    assert!(profile.total() > 0.0, "a submission takes time");
    assert!(profile.to_string().contains("the host's clock"));
    executable
        .run(&[("x", Host::from(&x))])
        .unwrap()
        .wait()
        .unwrap();
    assert_ne!(
        session.get("second.weight").unwrap(),
        before,
        "and trains on"
    );
}

#[test]
fn folders_of_profiles_and_dumps() {
    let folder = TempDir::new().unwrap();
    let (profiles, dumps) = (folder.path().join("profiles"), folder.path().join("dumps"));
    let options = GpuOptions::from_env().unwrap();
    let options = options.profile_dir(&profiles).dump_dir(&dumps);
    let gpu = Gpu::new(&options).unwrap();
    let mut session = Session::new(&gpu, 0);
    let graph = step();
    let executable = session.compile(&graph).unwrap();
    let only = |path: &std::path::Path| {
        let mut entries = std::fs::read_dir(path).unwrap();
        let entry = entries.next().unwrap().unwrap().path();
        assert!(entries.next().is_none());
        entry
    };
    let dumped = only(&dumps);
    let read = |name: &str| std::fs::read_to_string(dumped.join(name)).unwrap();
    assert_eq!(read("graph.txt"), graph.to_string());
    let dot = read("graph.dot");
    assert!(dot.starts_with("digraph") && dot.contains("matmul") && dot.contains("first.weight"));
    assert_eq!(dot.matches("shape=box").count(), graph.nodes().len());
    assert_eq!(
        read("dispatches.txt").lines().count(),
        executable.plan().dispatches
    );
    let plan = read("plan.txt");
    assert!(plan.starts_with(&executable.plan().to_string()));
    let buffers = plan.lines().filter(|line| line.starts_with("buffer"));
    assert_eq!(buffers.count(), executable.plan().slots.len());
    let values = plan.lines().filter(|line| line.contains('%')).count();
    let scratch = plan.lines().filter(|line| line.contains("scratch")).count();
    assert_eq!(values + scratch, executable.plan().values, "{plan}");
    let kernels = std::fs::read_dir(dumped.join("wgsl")).unwrap().count();
    let mut keys: Vec<&str> = executable.sources().map(|(key, _)| key).collect();
    keys.sort_unstable();
    keys.dedup();
    assert_eq!(kernels, keys.len());

    let x = data();
    for run in 1..=4 {
        executable
            .run(&[("x", Host::from(&x))])
            .unwrap()
            .wait()
            .unwrap();
        assert_eq!(profiles.exists(), run >= 3, "run {run}");
    }
    let profile = only(&profiles);
    for name in ["profile.json", "trace.json"] {
        let text = std::fs::read_to_string(profile.join(name)).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert!(json.is_object(), "{name}");
    }
    let table = std::fs::read_to_string(profile.join("profile.txt")).unwrap();
    assert!(
        table.contains("by GPU timestamps") || table.contains("by the host's clock"),
        "{table}"
    );
}

/// Quotes, line breaks and control characters in names end no line of a table, no string of JSON and no label of Graphviz.
#[test]
fn any_character_may_be_in_a_name() {
    let layer = "a \"layer\"\nwith\ttabs\\, é\u{0} and }";
    let mut graph = Graph::new();
    let x = graph.input("x\"\n", &[16, 32], DType::F32).unwrap();
    let h = graph.scoped(layer, |graph| {
        let w = graph.parameter("w\n\"é", &[32, 32], Init::Constant(0.1))?;
        graph.matmul(x, w, Trans::NN)
    });
    graph.output("y\n\"", h.unwrap()).unwrap();
    let folder = TempDir::new().unwrap();
    let options = GpuOptions::from_env().unwrap().dump_dir(folder.path());
    let mut session = Session::new(&Gpu::new(&options).unwrap(), 0);
    let executable = session.compile(&graph).unwrap();
    let profile = executable.profile().unwrap();
    let count = executable.plan().dispatches;
    // Two lines ahead of the rows, two behind.
    let table = profile.to_string();
    assert_eq!(table.lines().count(), 4 + profile.rows().len(), "{table}");
    assert!(table.contains("é"), "{table}");
    assert_eq!(executable.to_string().lines().count(), 1 + count);
    let trace = profile.to_chrome_trace().to_string();
    let trace: serde_json::Value = serde_json::from_str(&trace).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    assert!(events.iter().any(|event| event["name"] == layer));
    let dumped = std::fs::read_dir(folder.path()).unwrap().next().unwrap();
    let dumped = dumped.unwrap().path();
    let lines = |name: &str| {
        let text = std::fs::read_to_string(dumped.join(name)).unwrap();
        text.lines().count()
    };
    assert_eq!(lines("dispatches.txt"), count);
    // Braces and two lines of defaults; two values, one node with two arrows, one output with its arrow.
    assert_eq!(lines("graph.dot"), 4 + 2 + 3 + 2);
}

#[test]
fn a_graph_without_dispatches_takes_no_time() {
    let mut graph = Graph::new();
    let x = graph.input("x", &[4, 4], DType::F32).unwrap();
    graph.output("y", x).unwrap();
    let without = GpuOptions::from_env().unwrap().baseline(true);
    for (gpu, clock) in [
        (gpu(), Clock::Gpu),
        (Gpu::new(&without).unwrap(), Clock::Host),
    ] {
        let mut session = Session::new(&gpu, 0);
        let executable = session.compile(&graph).unwrap();
        assert_eq!(executable.plan().dispatches, 0);
        let profile = executable.profile().unwrap().measured();
        assert_eq!(profile.clock, clock);
        assert!(profile.total().is_sign_positive() && profile.rows().is_empty());
        assert!(profile.to_string().contains(" 0.000 ms"), "{profile}");
    }
}
