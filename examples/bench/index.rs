//! `index`: exact search among a million embeddings, from call to hits on the host.

use energyflow::text::{Index, IndexOptions};
use energyflow::{DType, Gpu};

use crate::measure::Failure;
use crate::wall::{Row, median_milliseconds};

const WIDTH: usize = 384;
const K: usize = 10;

pub fn run(gpu: &Gpu, dtype: DType, seconds: f64) -> Result<Vec<Row>, Failure> {
    let large = gpu.capabilities().device_type != energyflow::wgpu::DeviceType::Cpu;
    let (n, piece) = if large {
        (1_000_000, 100_000)
    } else {
        (10_000, 10_000)
    };
    let mut state = 1_u64;
    let mut number = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let mut index = Index::new(gpu, WIDTH, &IndexOptions::default().dtype(dtype))?;
    for _ in 0..n / piece {
        let rows: Vec<f32> = (0..piece * WIDTH).map(|_| number()).collect();
        index.add(&rows, &[""; 0])?;
    }
    let queries: Vec<f32> = (0..64 * WIDTH).map(|_| number()).collect();
    let mut rows = Vec::new();
    for batch in [1, 8, 64] {
        let queries = &queries[..batch * WIDTH];
        let time = median_milliseconds(seconds, || {
            index.search(queries, K)?;
            Ok(())
        })?;
        let what = format!("{K} of {n} x {WIDTH} for {batch} queries");
        rows.push(Row::new(what, time, "ms"));
    }
    Ok(rows)
}
