//! Opening a device: choice, features, limits, reports, and its loss.

use energyflow::gpu::{Access, KernelSource, Sequence};
use energyflow::{Error, Gpu, GpuOptions, Result, wgpu};

use crate::{DOUBLE_AND_ADD, SHARED, bind, double_and_add, open, row, run_twice};

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
    let shown = error.to_string();
    assert!(shown.contains(&SHARED.capabilities().adapter), "{shown}");
    assert!(
        shown.contains("VULKAN") && !shown.contains("BROWSER"),
        "{shown}"
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
fn the_defaults_read_nothing_from_the_environment() {
    let options = GpuOptions::default();
    assert_eq!((options.adapter, options.cache_dir), (None, None));
    assert!(!options.autotune);
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
