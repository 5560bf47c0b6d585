//! Dispatches, copies and writes, and their results.

use energyflow::{Error, Result};

use crate::{SHARED, bind, double_and_add, open, row, run_twice};

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
