//! The buffer pool: reuse, statistics, limits, and tensors in its buffers.

use std::sync::LazyLock;

use energyflow::gpu::{Alignment, Layout, Tensor};
use energyflow::types::DType;
use energyflow::{Error, Gpu, GpuOptions, Result};

/// For tests that do not look at counts, which other tests move.
static SHARED: LazyLock<Gpu> = LazyLock::new(open);

fn open() -> Gpu {
    Gpu::new(&GpuOptions::from_env().unwrap()).expect("these tests need a GPU adapter")
}

#[test]
fn the_pool_reuses_memory_of_the_same_class() -> Result<()> {
    let gpu = open();
    let first = gpu.buffer(1000, "first")?;
    let second = gpu.buffer(1000, "second")?;
    assert_ne!(first.id(), second.id());
    assert_eq!(first.size(), 1008, "rounded up to 16");
    let id = first.id();
    let clone = first.clone();
    drop(first);
    assert_ne!(
        gpu.buffer(1000, "third")?.id(),
        id,
        "a clone still holds it"
    );
    drop(clone);
    let again = gpu.buffer(1024, "again")?;
    assert_eq!(again.id(), id);

    let stats = gpu.report().pool;
    assert_eq!((stats.hits, stats.misses), (1, 3));
    assert_eq!(
        (stats.allocated_bytes, stats.in_use_bytes, stats.peak_bytes),
        (3072, 2048, 3072)
    );
    assert_eq!(gpu.trim(), 1024);
    let stats = gpu.report().pool;
    assert_eq!(
        (stats.allocated_bytes, stats.in_use_bytes, stats.peak_bytes),
        (2048, 2048, 3072)
    );
    Ok(())
}

#[test]
fn zeroed_memory_is_zero_even_when_reused() -> Result<()> {
    let gpu = open();
    let layout = Layout::new(3, 5, DType::F32, Alignment::Bytes64)?;
    let dirty = Tensor::zeroed(&gpu, layout)?;
    assert!(
        dirty
            .download_raw(&gpu)?
            .wait()?
            .iter()
            .all(|&byte| byte == 0)
    );
    dirty.poison(&gpu)?;
    assert!(
        dirty
            .download::<f32>(&gpu)?
            .wait()?
            .iter()
            .all(|float| float.is_nan())
    );
    let id = dirty.slice().buffer().id();
    drop(dirty);
    let clean = Tensor::zeroed(&gpu, layout)?;
    assert_eq!(clean.slice().buffer().id(), id);
    assert!(
        clean
            .download_raw(&gpu)?
            .wait()?
            .iter()
            .all(|&byte| byte == 0)
    );
    Ok(())
}

#[test]
fn too_large_requests_are_refused_before_the_driver_sees_them() {
    let limits = &SHARED.capabilities().limits;
    let binding = limits.max_storage_buffer_binding_size;
    for bytes in [binding + 1, limits.max_buffer_size + 1, u64::MAX] {
        assert!(
            matches!(SHARED.buffer(bytes, "huge"), Err(Error::Limit { .. })),
            "{bytes}"
        );
    }
}

#[test]
fn slices_are_aligned_and_inside() -> Result<()> {
    let buffer = SHARED.buffer(1024, "slices")?;
    let slice = buffer.slice(256, 512)?;
    assert_eq!((slice.offset(), slice.size()), (256, 512));
    for (offset, size) in [(16, 16), (0, 0), (0, 6), (768, 260), (u64::MAX - 255, 512)] {
        assert!(
            matches!(buffer.slice(offset, size), Err(Error::Layout { .. })),
            "{offset} + {size}"
        );
    }
    let layout = Layout::new(4, 64, DType::F32, Alignment::Bytes64)?;
    assert!(matches!(
        Tensor::from_slice(slice, layout),
        Err(Error::Layout { .. })
    ));
    let view = Tensor::from_slice(buffer.whole(), layout)?;
    assert_eq!(view.slice().size(), layout.size_bytes());
    Ok(())
}

#[test]
fn elements_of_the_wrong_type_are_refused() -> Result<()> {
    let ids = Tensor::zeroed(&SHARED, Layout::new(1, 4, DType::U32, Alignment::Bytes16)?)?;
    assert!(matches!(
        ids.upload(&SHARED, &[1.0_f32; 4]),
        Err(Error::Layout { .. })
    ));
    assert!(matches!(
        ids.upload(&SHARED, &[1_u32; 3]),
        Err(Error::Layout { .. })
    ));
    assert!(matches!(
        ids.download::<f32>(&SHARED)?.wait(),
        Err(Error::Layout { .. })
    ));
    Ok(())
}
