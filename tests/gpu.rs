//! The device layer: opening, kernels, submissions, results, and every way in which they can fail.

use std::sync::{Arc, LazyLock};
use std::time::Instant;

use energyflow::gpu::{
    Access, Alignment, BindGroup, KernelSource, Layout, Pipeline, Sequence, Tensor,
};
use energyflow::graph::Graph;
use energyflow::runtime::Host;
use energyflow::types::DType;
use energyflow::{Error, Gpu, GpuOptions, Result, Session, wgpu};

/// For tests that do not look at counts, which other tests move.
static SHARED: LazyLock<Gpu> = LazyLock::new(open);

fn open() -> Gpu {
    Gpu::new(&GpuOptions::from_env().unwrap()).expect("these tests need a GPU adapter")
}

/// y = 2·y + x
const DOUBLE_AND_ADD: &str = "
@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;
@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x < arrayLength(&y) {
        y[id.x] = 2.0 * y[id.x] + x[id.x];
    }
}";

fn double_and_add(gpu: &Gpu) -> Arc<Pipeline> {
    let source = || {
        let bindings = vec![Access::Read, Access::ReadWrite];
        Ok(KernelSource::new(DOUBLE_AND_ADD, bindings))
    };
    gpu.pipeline("test.double_and_add", source).expect("kernel")
}

fn row(gpu: &Gpu, data: &[f32]) -> Tensor {
    let layout = Layout::new(1, data.len(), DType::F32, Alignment::Bytes16).expect("layout");
    let tensor = Tensor::zeroed(gpu, layout).expect("tensor");
    tensor.upload(gpu, data).expect("upload");
    tensor
}

fn bind(gpu: &Gpu, pipeline: &Pipeline, tensors: &[&Tensor]) -> BindGroup {
    let slices: Vec<_> = tensors
        .iter()
        .map(|tensor| tensor.slice().clone())
        .collect();
    gpu.bind_group(pipeline, &slices).expect("bind group")
}

/// Two dispatches of [`DOUBLE_AND_ADD`] on y = 1 and x = `n`: 2·(2 + n) + n.
fn run_twice(gpu: &Gpu, n: f32) -> Vec<f32> {
    let (x, y) = (row(gpu, &[n; 100]), row(gpu, &[1.0; 100]));
    let pipeline = double_and_add(gpu);
    let group = bind(gpu, &pipeline, &[&x, &y]);
    let mut recorder = gpu.recorder("twice");
    for _ in 0..2 {
        recorder
            .dispatch(&pipeline, &group, [2, 1, 1])
            .expect("dispatch");
    }
    recorder.submit().expect("submit");
    y.download(gpu).expect("download").wait().expect("wait")
}

#[test]
fn opens_with_everything_the_adapter_has() {
    let capabilities = SHARED.capabilities();
    assert_ne!(capabilities.backend, wgpu::Backend::Noop);
    assert!(capabilities.limits.max_storage_buffers_per_shader_stage >= 8);
    let features = SHARED.device().features();
    assert_eq!(
        capabilities.f16,
        features.contains(wgpu::Features::SHADER_F16)
    );
    assert_eq!(
        capabilities.subgroups.is_some(),
        features.contains(wgpu::Features::SUBGROUP)
    );
    let expected = if capabilities.f16 {
        "native f16"
    } else {
        "pack2x16float"
    };
    assert_eq!(capabilities.f16_storage(), expected);
}

#[test]
fn baseline_has_no_optional_feature() {
    let gpu = Gpu::new(&GpuOptions::from_env().unwrap().baseline(true)).expect("baseline");
    assert_eq!(gpu.device().features(), wgpu::Features::empty());
    assert_eq!(gpu.capabilities().limits, wgpu::Limits::default());
    assert_eq!(gpu.capabilities().f16_storage(), "pack2x16float");
    assert!(!gpu.capabilities().timestamps);
    assert_eq!(run_twice(&gpu, 3.0), [13.0; 100]);

    let text = format!("enable f16;\n{DOUBLE_AND_ADD}");
    let source = KernelSource::new(text, vec![Access::Read, Access::ReadWrite]);
    assert!(matches!(
        gpu.pipeline("test.f16", || Ok(source)),
        Err(Error::Validation { .. })
    ));

    let nine = KernelSource::new(DOUBLE_AND_ADD, vec![Access::Read; 9]);
    assert!(matches!(
        gpu.pipeline("test.nine", || Ok(nine)),
        Err(Error::Limit {
            limit: "max_storage_buffers_per_shader_stage",
            needed: 9,
            available: 8,
            ..
        })
    ));
    let pipeline = double_and_add(&gpu);
    let group = bind(&gpu, &pipeline, &[&row(&gpu, &[0.0]), &row(&gpu, &[0.0])]);
    let mut sequence = Sequence::new();
    sequence
        .dispatch(&gpu, &pipeline, &group, [1; 3])
        .expect("dispatch");
    let unsupported = |error: Option<Error>| matches!(error, Some(Error::Unsupported { .. }));
    assert!(unsupported(gpu.time(&[&sequence]).err()));
    assert!(unsupported(gpu.profile(&[&sequence]).err()));
}

#[test]
fn f16_can_be_declined() {
    let gpu = Gpu::new(&GpuOptions::from_env().unwrap().f16(false)).expect("device");
    assert!(!gpu.capabilities().f16);
    assert!(!gpu.device().features().contains(wgpu::Features::SHADER_F16));
}

#[test]
fn works_on_a_device_of_the_caller() {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let (device, queue) = pollster::block_on(async {
        let adapter = instance
            .request_adapter(&Default::default())
            .await
            .expect("adapter");
        adapter
            .request_device(&Default::default())
            .await
            .expect("device")
    });
    let gpu = Gpu::from_device(device, queue, &GpuOptions::from_env().unwrap()).expect("gpu");
    assert!(!gpu.capabilities().f16, "the device was opened without f16");
    assert!(gpu.capabilities().cooperative_matrix.is_empty());
    assert_eq!(run_twice(&gpu, 1.0), [7.0; 100]);
}

#[test]
fn an_unknown_adapter_is_an_error_that_lists_the_others() {
    let error = Gpu::new(&GpuOptions::from_env().unwrap().adapter("no such adapter"))
        .expect_err("no adapter");
    assert!(matches!(error, Error::NoAdapter { .. }));
    assert!(
        error.to_string().contains(&SHARED.capabilities().adapter),
        "{error}"
    );
}

#[test]
fn the_report_names_device_and_counts() {
    let gpu = open();
    run_twice(&gpu, 1.0);
    let report = gpu.report();
    assert_eq!((report.dispatches, report.uncaptured_errors), (2, 0));
    assert_eq!(
        report.submissions, 2,
        "one for the work, one for the download"
    );
    let text = report.to_string();
    for part in [
        gpu.capabilities().adapter.as_str(),
        "f16 storage",
        "2 submissions",
        "1 misses",
    ] {
        assert!(text.contains(part), "{part:?} is missing in\n{text}");
    }
}

#[test]
fn what_is_recorded_keeps_its_memory() -> Result<()> {
    let gpu = open();
    let pipeline = double_and_add(&gpu);
    let y = row(&gpu, &[1.0; 64]);
    let mut recorder = gpu.recorder("keeps");
    let x = row(&gpu, &[5.0; 64]);
    recorder.dispatch(&pipeline, &bind(&gpu, &pipeline, &[&x, &y]), [1; 3])?;
    drop(x);
    let other = row(&gpu, &[1e9; 64]);
    recorder.submit()?;
    assert_eq!(y.download::<f32>(&gpu)?.wait()?, [7.0; 64]);
    assert_eq!(other.download::<f32>(&gpu)?.wait()?, [1e9; 64]);
    Ok(())
}

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

#[test]
fn dispatches_run_in_order() {
    assert_eq!(run_twice(&SHARED, 10.0), [34.0; 100]);
}

#[test]
fn impossible_grids_are_refused() {
    let pipeline = double_and_add(&SHARED);
    let (x, y) = (row(&SHARED, &[1.0; 8]), row(&SHARED, &[2.0; 8]));
    let group = bind(&SHARED, &pipeline, &[&x, &y]);
    let limit = SHARED
        .capabilities()
        .limits
        .max_compute_workgroups_per_dimension;
    let mut recorder = SHARED.recorder("grids");
    for grid in [[0, 1, 1], [1, limit + 1, 1], [1, 1, u32::MAX]] {
        let refused = recorder.dispatch(&pipeline, &group, grid);
        assert!(matches!(refused, Err(Error::Limit { .. })), "{grid:?}");
    }
}

#[test]
fn a_dropped_recorder_does_nothing() -> Result<()> {
    let pipeline = double_and_add(&SHARED);
    let (x, y) = (row(&SHARED, &[1.0; 8]), row(&SHARED, &[2.0; 8]));
    let mut recorder = SHARED.recorder("dropped");
    recorder.dispatch(&pipeline, &bind(&SHARED, &pipeline, &[&x, &y]), [1; 3])?;
    recorder.clear(x.slice());
    drop(recorder);
    assert_eq!(y.download::<f32>(&SHARED)?.wait()?, [2.0; 8]);
    assert_eq!(x.download::<f32>(&SHARED)?.wait()?, [1.0; 8]);
    Ok(())
}

#[test]
fn writes_copies_and_dispatches_keep_their_order() -> Result<()> {
    let pipeline = double_and_add(&SHARED);
    let (x, y, z) = (
        row(&SHARED, &[1.0; 8]),
        row(&SHARED, &[2.0; 8]),
        row(&SHARED, &[0.0; 8]),
    );
    let group = bind(&SHARED, &pipeline, &[&x, &y]);
    let mut recorder = SHARED.recorder("order");
    recorder.dispatch(&pipeline, &group, [1; 3])?; // y = 5
    recorder.copy(y.slice(), z.slice())?; // z = 5
    recorder.upload(&x, &[3.0_f32; 8])?;
    recorder.dispatch(&pipeline, &group, [1; 3])?; // y = 13
    recorder.upload(&x, &[7.0_f32; 8])?;
    let slices = [x, y, z].map(|tensor| tensor.slice().clone());
    let sums = recorder.read_back(&slices, |pieces| {
        Ok(pieces
            .iter()
            .map(|piece| bytemuck::pod_collect_to_vec(piece))
            .collect::<Vec<Vec<f32>>>())
    })?;
    assert_eq!(sums.wait()?, [vec![7.0; 8], vec![13.0; 8], vec![5.0; 8]]);
    Ok(())
}

#[test]
fn malformed_copies_and_writes_are_refused() -> Result<()> {
    let buffer = SHARED.buffer(1024, "one")?;
    let other = SHARED.buffer(1024, "two")?;
    let mut recorder = SHARED.recorder("malformed");
    let part = other.slice(0, 256)?;
    assert!(matches!(
        recorder.copy(&buffer.whole(), &part),
        Err(Error::Layout { .. })
    ));
    assert!(matches!(
        recorder.copy(&part, &other.slice(256, 256)?),
        Err(Error::Layout { .. })
    ));
    for bytes in [0, 3, 260] {
        let refused = recorder.write(&part, &vec![0; bytes]);
        assert!(
            matches!(refused, Err(Error::Layout { .. })),
            "{bytes} bytes"
        );
    }
    recorder.submit()?.wait()
}

#[test]
fn results_come_by_wait_by_polling_and_by_await() -> Result<()> {
    let x = row(&SHARED, &[4.0; 8]);
    let waited = x.download::<f32>(&SHARED)?;
    let mut polled = x.download::<f32>(&SHARED)?;
    let awaited = x.download::<f32>(&SHARED)?;
    x.upload(&SHARED, &[9.0_f32; 8])?;
    SHARED.recorder("nothing").submit()?;

    assert_eq!(pollster::block_on(awaited)?, [4.0; 8]);
    let value = loop {
        if let Some(value) = polled.try_take() {
            break value?;
        }
        std::thread::yield_now();
    };
    assert_eq!(value, [4.0; 8]);
    assert!(polled.try_take().is_none(), "taken once");
    assert!(matches!(polled.wait(), Err(Error::Validation { .. })));
    assert_eq!(waited.wait()?, [4.0; 8]);
    Ok(())
}

#[test]
fn await_sleeps_until_long_work_is_done() -> Result<()> {
    let pipeline = double_and_add(&SHARED);
    let (x, y) = (row(&SHARED, &[0.0; 1 << 16]), row(&SHARED, &[0.0; 1 << 16]));
    let group = bind(&SHARED, &pipeline, &[&x, &y]);
    for _ in 0..3 {
        let mut recorder = SHARED.recorder("long");
        for _ in 0..100 {
            recorder.dispatch(&pipeline, &group, [1024, 1, 1])?;
        }
        let result = recorder.read_back(&[y.slice().clone()], |pieces| Ok(pieces[0].len()))?;
        assert_eq!(pollster::block_on(result)?, 4 << 16);
    }
    Ok(())
}

#[test]
fn discarded_results_do_no_harm() -> Result<()> {
    let gpu = open();
    let x = row(&gpu, &[4.0; 8]);
    for _ in 0..4 {
        drop(x.download::<f32>(&gpu)?);
    }
    assert_eq!(x.download::<f32>(&gpu)?.wait()?, [4.0; 8]);
    assert_eq!(gpu.report().uncaptured_errors, 0);
    Ok(())
}

#[test]
fn many_threads_share_one_device() {
    fn shareable<T: Clone + Send + Sync>(_: &T) {}
    fn sendable<T: Send>(_: &T) {}

    let gpu = open();
    shareable(&gpu);
    sendable(&row(&gpu, &[1.0]).download::<f32>(&gpu).expect("download"));
    std::thread::scope(|scope| {
        for thread in 0..8_u8 {
            let gpu = gpu.clone();
            scope.spawn(move || {
                for round in 0..10_u8 {
                    let n = f32::from(thread) * 10.0 + f32::from(round);
                    assert_eq!(run_twice(&gpu, n), [4.0 + 3.0 * n; 100]);
                }
            });
        }
    });
    let report = gpu.report();
    assert_eq!(report.pipelines.misses, 1);
    assert_eq!(report.dispatches, 160);
    assert!(report.pool.hits > 100, "{:?}", report.pool);
}

#[test]
fn dispatches_can_be_timed() -> Result<()> {
    if !SHARED.capabilities().timestamps {
        return Ok(());
    }
    let pipeline = double_and_add(&SHARED);
    let (x, y) = (row(&SHARED, &[1.0; 1 << 16]), row(&SHARED, &[0.0; 1 << 16]));
    let group = bind(&SHARED, &pipeline, &[&x, &y]);
    let mut sequence = Sequence::new();
    sequence.dispatch(&SHARED, &pipeline, &group, [1024, 1, 1])?;
    let timings = SHARED.profile(&[&sequence, &sequence])?;
    let labels: Vec<_> = timings.iter().map(|timing| timing.label.as_str()).collect();
    assert_eq!(labels, ["test.double_and_add"; 2]);
    for timing in &timings {
        assert!((1.0..1e10).contains(&timing.nanoseconds), "{timing:?}");
    }
    assert_eq!(
        y.download::<f32>(&SHARED)?.wait()?,
        vec![3.0; 1 << 16],
        "both ran"
    );
    Ok(())
}

#[test]
fn a_whole_pass_can_be_timed() -> Result<()> {
    if !SHARED.capabilities().timestamps {
        return Ok(());
    }
    let pipeline = double_and_add(&SHARED);
    let (x, y) = (row(&SHARED, &[1.0; 1 << 20]), row(&SHARED, &[0.0; 1 << 20]));
    let group = bind(&SHARED, &pipeline, &[&x, &y]);
    let mut sequence = Sequence::new();
    sequence.dispatch(&SHARED, &pipeline, &group, [1 << 14, 1, 1])?;
    let begin = Instant::now();
    let nanoseconds = SHARED.time(&[&sequence, &sequence])?;
    let wall = begin.elapsed().as_nanos() as f64;
    assert!(
        nanoseconds > 0.0 && nanoseconds < 1.1 * wall,
        "{nanoseconds} ns of {wall} ns"
    );
    assert_eq!(
        y.download::<f32>(&SHARED)?.wait()?,
        vec![3.0; 1 << 20],
        "both ran"
    );
    Ok(())
}

#[test]
fn a_lost_device_is_an_error_everywhere() -> Result<()> {
    let gpu = open();
    let pipeline = double_and_add(&gpu);
    let (x, y) = (row(&gpu, &[1.0; 8]), row(&gpu, &[2.0; 8]));
    let group = bind(&gpu, &pipeline, &[&x, &y]);
    gpu.device().destroy();

    let lost = |error: Option<Error>| matches!(error, Some(Error::DeviceLost { .. }));
    let mut recorder = gpu.recorder("lost");
    recorder.dispatch(&pipeline, &group, [1; 3])?;
    assert!(
        lost(recorder.submit().err()),
        "the first call after the loss"
    );
    assert!(lost(gpu.buffer(1 << 20, "lost").err()));
    assert!(lost(gpu.buffer(16, "lost").err()), "pooled memory too");
    assert!(lost(
        gpu.pipeline("test.double_and_add", || panic!("cached"))
            .err()
    ));
    assert!(lost(
        gpu.bind_group(&pipeline, &[x.slice().clone(), y.slice().clone()])
            .err()
    ));
    assert!(lost(x.upload(&gpu, &[0.0_f32; 8]).err()));
    assert!(lost(x.download::<f32>(&gpu).err()));
    Ok(())
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

#[test]
fn the_defaults_read_nothing_from_the_environment() {
    let options = GpuOptions::default();
    assert_eq!((options.adapter, options.cache_dir), (None, None));
    assert!(!options.autotune);
}
