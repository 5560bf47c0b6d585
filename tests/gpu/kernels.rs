//! The caller's kernels: compilation, bindings, caches, checks.

use std::sync::Arc;

use energyflow::gpu::{Access, Alignment, KernelSource, Layout, Tensor};
use energyflow::graph::Graph;
use energyflow::runtime::Host;
use energyflow::types::DType;
use energyflow::{Error, Result, Session};

use crate::{DOUBLE_AND_ADD, SHARED, bind, double_and_add, open, row};

#[test]
fn kernels_are_compiled_once() -> Result<()> {
    let gpu = open();
    let first = double_and_add(&gpu);
    let second = gpu.pipeline("test.double_and_add", || panic!("it is cached"))?;
    assert!(Arc::ptr_eq(&first, &second));
    let stats = gpu.report().pipelines;
    assert_eq!((stats.hits, stats.misses), (1, 1));
    assert!(!stats.compile_time.is_zero());
    Ok(())
}

#[test]
fn broken_kernels_are_errors_and_not_cached() -> Result<()> {
    let gpu = open();
    let broken = [
        ("syntax", "fn main( {".to_owned()),
        ("types", DOUBLE_AND_ADD.replace("2.0 *", "2u *")),
        ("entry point", DOUBLE_AND_ADD.replace("fn main", "fn other")),
        (
            "bindings",
            DOUBLE_AND_ADD.replace("storage, read>", "storage, read_write>"),
        ),
    ];
    for (name, text) in broken {
        let bindings = vec![Access::Read, Access::ReadWrite];
        let error = gpu
            .pipeline("test.broken", || Ok(KernelSource::new(text, bindings)))
            .expect_err(name);
        assert!(matches!(error, Error::Validation { .. }), "{name}: {error}");
        assert!(error.to_string().contains("test.broken"), "{name}: {error}");
    }
    let bindings = vec![Access::Read, Access::ReadWrite];
    gpu.pipeline("test.broken", || {
        Ok(KernelSource::new(DOUBLE_AND_ADD, bindings))
    })?;
    let failed: Result<_> = gpu.pipeline("test.failing", || Err(Error::Graph("no source".into())));
    assert!(matches!(failed, Err(Error::Graph(_))));
    assert_eq!(gpu.report().pipelines.misses, 1);
    assert_eq!(gpu.report().uncaptured_errors, 0);
    Ok(())
}

#[test]
fn bind_groups_are_cached_by_buffer() -> Result<()> {
    let gpu = open();
    let pipeline = double_and_add(&gpu);
    let (x, y) = (row(&gpu, &[1.0; 8]), row(&gpu, &[2.0; 8]));
    let first = bind(&gpu, &pipeline, &[&x, &y]);
    let second = bind(&gpu, &pipeline, &[&x, &y]);
    assert_eq!(first, second);
    assert_ne!(first, bind(&gpu, &pipeline, &[&y, &x]));
    let stats = gpu.report().bind_groups;
    assert_eq!((stats.hits, stats.misses), (1, 2));

    drop((first, second, x));
    gpu.trim();
    let z = row(&gpu, &[3.0; 8]);
    bind(&gpu, &pipeline, &[&z, &y]);
    assert_eq!(
        gpu.report().bind_groups.misses,
        3,
        "a trimmed buffer's bind group is not found again"
    );
    Ok(())
}

#[test]
fn wrong_bindings_are_errors() -> Result<()> {
    let pipeline = double_and_add(&SHARED);
    let buffer = SHARED.buffer(1024, "both")?;
    let refused = |slices: &[_]| {
        matches!(
            SHARED.bind_group(&pipeline, slices),
            Err(Error::Validation { .. })
        )
    };
    assert!(refused(&[buffer.whole()]), "one of two");
    assert!(
        refused(&[buffer.slice(0, 256)?, buffer.slice(256, 256)?]),
        "read and written"
    );

    let bindings = vec![Access::ReadWrite, Access::ReadWrite];
    let text = DOUBLE_AND_ADD.replace("storage, read>", "storage, read_write>");
    let other = SHARED.pipeline("test.writes", || Ok(KernelSource::new(text, bindings)))?;
    let group = SHARED.bind_group(&other, &[buffer.slice(0, 256)?, buffer.slice(256, 256)?])?;
    let mut recorder = SHARED.recorder("mismatch");
    recorder.dispatch(&other, &group, [1; 3])?;
    assert!(matches!(
        recorder.dispatch(&pipeline, &group, [1; 3]),
        Err(Error::Validation { .. })
    ));
    recorder.submit()?.wait()
}

/// Whatever a caller gives the key of a kernel of this crate gets what the caller wrote, and the executable keeps what is its own.
#[test]
fn keys_of_executables_find_nothing_of_theirs() -> Result<()> {
    let gpu = open();
    let mut graph = Graph::new();
    let x = graph.input("x", &[5, 7], DType::F32)?;
    let y = graph.affine(x, 2.0, 1.0)?;
    graph.output("y", y)?;
    let mut session = Session::new(&gpu, 0);
    let executable = session.compile(&graph)?;
    let steps: Vec<_> = executable.steps().collect();
    assert!(!steps.is_empty());
    assert!(
        steps
            .iter()
            .all(|step| step.bytes > 0.0 && !step.name.is_empty())
    );
    let bindings = || vec![Access::Read, Access::ReadWrite];
    for step in &steps {
        let own = gpu.pipeline(step.key, || {
            Ok(KernelSource::new(DOUBLE_AND_ADD, bindings()))
        })?;
        assert_eq!(own.wgsl(), DOUBLE_AND_ADD);
    }
    let again = Session::new(&gpu, 0).compile(&graph)?;
    for executable in [&executable, &again] {
        let outputs = executable.run(&[("x", Host::F32(&[3.0; 35]))])?.wait()?;
        assert_eq!(outputs.get("y")?, [7.0; 35]);
    }
    // What is timed is the executable as it is.
    let sequence = executable.sequence();
    let keys: Vec<&str> = steps.iter().map(|step| step.key).collect();
    assert!(sequence.keys().eq(keys.iter().copied()));
    if gpu.capabilities().timestamps {
        let timings = gpu.profile(&[&sequence, &again.sequence()])?;
        let labels = timings.iter().map(|timing| timing.label.as_str());
        assert!(labels.eq(keys.repeat(2)));
        assert!(gpu.time(&[&sequence; 3])? >= 0.0);
    }
    Ok(())
}

/// Kernels of a caller run with all checks: one that writes far outside stays inside its binding.
#[test]
fn kernels_of_the_caller_stay_inside_their_bindings() -> Result<()> {
    let kernel = SHARED.pipeline("test.outside", || {
        let text = "
@group(0) @binding(0) var<storage, read_write> y: array<u32>;
@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    y[id.x] = 7u;
    y[id.x + 100u] = 7u;
    y[id.x * 0x1000000u] = 7u;
}";
        Ok(KernelSource::new(text, vec![Access::ReadWrite]))
    })?;
    let layout = Layout::new(1, 1024, DType::U32, Alignment::Bytes64)?;
    let all = Tensor::zeroed(&SHARED, layout)?;
    let middle = all.slice().buffer().slice(1024, 256)?;
    let group = SHARED.bind_group(&kernel, &[middle])?;
    let mut recorder = SHARED.recorder("outside");
    recorder.dispatch(&kernel, &group, [1000, 1, 1])?;
    recorder.submit()?;
    let values: Vec<u32> = all.download(&SHARED)?.wait()?;
    for (i, &value) in values.iter().enumerate() {
        let inside = (256..320).contains(&i);
        assert_eq!(value, if inside { 7 } else { 0 }, "element {i}");
    }
    Ok(())
}
