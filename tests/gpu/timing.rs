//! GPU time of dispatches and of whole passes.

use std::time::Instant;

use energyflow::gpu::{Clock, Sequence};
use energyflow::runtime::Ceilings;
use energyflow::{Gpu, GpuOptions, Result};

use crate::{SHARED, bind, double_and_add, row};

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
    let shown = timings[0].to_string();
    let microseconds = format!("{:.2} µs", timings[0].nanoseconds / 1e3);
    assert!(
        shown.contains(&microseconds) && shown.ends_with(labels[0]),
        "{shown}"
    );
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
fn without_timestamps_the_host_measures_a_pass() -> Result<()> {
    let gpu = Gpu::new(&GpuOptions::from_env()?.baseline(true))?;
    assert!(!gpu.capabilities().timestamps);
    let pipeline = double_and_add(&gpu);
    let (x, y) = (row(&gpu, &[1.0; 1 << 20]), row(&gpu, &[0.0; 1 << 20]));
    let group = bind(&gpu, &pipeline, &[&x, &y]);
    let mut sequence = Sequence::new();
    sequence.dispatch(&gpu, &pipeline, &group, [1 << 14, 1, 1])?;
    let begin = Instant::now();
    let (nanoseconds, clock) = gpu.time_on_any_clock(&[&sequence, &sequence])?;
    let wall = begin.elapsed().as_nanos() as f64;
    assert_eq!(clock, Clock::Host);
    assert!(
        (1.0..wall).contains(&nanoseconds),
        "{nanoseconds} of {wall}"
    );
    assert_eq!(
        y.download::<f32>(&gpu)?.wait()?,
        vec![3.0; 1 << 20],
        "each ran once"
    );
    assert!(gpu.time_on_any_clock(&[])?.0 >= 1.0);
    let ceilings = Ceilings::measure(&gpu)?;
    assert_eq!((ceilings.clock, ceilings.empty_pass), (Clock::Host, 0.0));
    assert!(ceilings.flops > 0.0 && ceilings.bytes > 0.0);
    Ok(())
}

#[test]
fn more_dispatches_are_profiled_than_one_query_set_holds() -> Result<()> {
    if !SHARED.capabilities().timestamps {
        return Ok(());
    }
    let pipeline = double_and_add(&SHARED);
    let (x, y) = (row(&SHARED, &[1.0; 4]), row(&SHARED, &[-1.0; 4]));
    let mut sequence = Sequence::new();
    sequence.dispatch(
        &SHARED,
        &pipeline,
        &bind(&SHARED, &pipeline, &[&x, &y]),
        [1; 3],
    )?;
    let timings = SHARED.profile(&vec![&sequence; 2100])?;
    assert_eq!(timings.len(), 2100);
    assert!(timings.iter().all(|timing| timing.nanoseconds < 1e10));
    assert_eq!(y.download::<f32>(&SHARED)?.wait()?, [-1.0; 4]);
    Ok(())
}
