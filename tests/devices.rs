//! Many devices in one process, one after the other and at once, and choosing among adapters.

use energyflow::gpu::{Access, Adapter, Alignment, KernelSource, Layout, Tensor};
use energyflow::types::DType;
use energyflow::{Error, Gpu, GpuOptions, Result};

/// How many devices are opened one after the other; 40 without it, since some drivers fail at the thirty-first.
const COUNT_VARIABLE: &str = "ENERGYFLOW_TEST_DEVICES";

fn options() -> GpuOptions {
    GpuOptions::from_env().unwrap()
}

/// Fills a buffer by a kernel and reads it.
fn compute(gpu: &Gpu, value: u32) -> Result<()> {
    let layout = Layout::new(1, 1 << 20, DType::U32, Alignment::Bytes64)?;
    let tensor = Tensor::uninit(gpu, layout)?;
    let kernel = gpu.pipeline("test.fill", || {
        let text = format!(
            "@group(0) @binding(0) var<storage, read_write> y: array<u32>;
@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {{ y[id.x] = {value}u; }}"
        );
        Ok(KernelSource::new(text, vec![Access::ReadWrite]))
    })?;
    let group = gpu.bind_group(&kernel, &[tensor.slice().clone()])?;
    let mut recorder = gpu.recorder("fill");
    recorder.dispatch(&kernel, &group, [1 << 14, 1, 1])?;
    recorder.submit()?;
    let values: Vec<u32> = tensor.download(gpu)?.wait()?;
    assert!(values.iter().all(|&found| found == value));
    Ok(())
}

/// Resident bytes of this process, where the system tells.
fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kilobytes << 10)
}

#[test]
fn devices_one_after_the_other_and_eight_at_once() {
    let count = std::env::var(COUNT_VARIABLE).map_or(40, |count| count.parse().unwrap());
    let open = |i: u32| {
        let gpu = Gpu::new(&options()).unwrap_or_else(|error| panic!("device {i}: {error}"));
        compute(&gpu, i).unwrap();
    };
    let at_once = || {
        std::thread::scope(|scope| {
            for i in 0..8 {
                scope.spawn(move || open(i));
            }
        });
    };
    (0..10).for_each(open);
    // Threads of their own make the allocator take more memory, once.
    at_once();
    let before = resident();
    (10..count).for_each(open);
    at_once();
    let all: Vec<Gpu> = (0..8).map(|_| Gpu::new(&options()).unwrap()).collect();
    for (i, gpu) in all.iter().enumerate() {
        compute(gpu, i as u32).unwrap();
    }
    drop(all);
    (0..2).for_each(open);
    if let (Some(before), Some(after)) = (before, resident()) {
        // A device with its buffers takes at least 8 MB.
        let grown = after.saturating_sub(before);
        assert!(grown < 64 << 20, "{grown} bytes more after {count} devices");
    }
}

#[test]
fn adapters_are_listed_and_chosen_by_index_address_and_name() {
    let adapters = Gpu::adapters();
    assert!(!adapters.is_empty(), "these tests need a GPU adapter");
    for (i, adapter) in adapters.iter().enumerate() {
        let Adapter {
            index,
            name,
            backend,
            pci_address,
            driver,
            ..
        } = adapter;
        assert_eq!(*index, i);
        let opens = |options: GpuOptions| {
            let gpu = Gpu::new(&options).unwrap();
            let found = gpu.capabilities();
            assert_eq!((&found.adapter, &found.backend), (name, backend));
            assert_eq!(&found.driver, driver);
        };
        opens(GpuOptions::default().adapter_index(i));
        let text = adapter.to_string();
        assert!(
            text.contains(name) && text.contains(&format!("#{i}")),
            "{text}"
        );
        if !pci_address.is_empty() {
            opens(
                GpuOptions::default()
                    .pci_address(pci_address)
                    .backends((*backend).into()),
            );
        }
    }
    let none = GpuOptions::default().adapter_index(adapters.len());
    let error = Gpu::new(&none).expect_err("there is none");
    assert!(matches!(error, Error::NoAdapter { .. }));
    let text = error.to_string();
    assert!(text.contains(&adapters[0].to_string()), "{text}");
    assert!(
        text.contains(&format!("index {}", adapters.len())),
        "{text}"
    );
    let nowhere = GpuOptions::default().pci_address("ffff:ff:1f.7");
    assert!(matches!(Gpu::new(&nowhere), Err(Error::NoAdapter { .. })));
}

#[test]
fn the_number_of_cores_is_known_or_asked_for() {
    let gpu = Gpu::new(&options().cores(7)).unwrap();
    assert_eq!(gpu.capabilities().cores, 7);
    let text = gpu.report().to_string();
    assert!(text.contains("cores        7 (as asked for)"), "{text}");
    let gpu = Gpu::new(&options()).unwrap();
    assert!(gpu.capabilities().cores >= 1);
}
