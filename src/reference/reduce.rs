//! Sums, means over time, and scalars side by side.

use super::array::Array;

/// [`Op::SumRows`](crate::graph::Op::SumRows)
pub(super) fn sum_rows(x: &Array) -> Vec<f64> {
    sum_groups(x.rows(), x)
}

/// [`Op::SumCols`](crate::graph::Op::SumCols)
pub(super) fn sum_cols(x: &Array) -> Vec<f64> {
    x.row_iter().map(|row| row.iter().sum()).collect()
}

/// [`Op::RowMax`](crate::graph::Op::RowMax)
pub(super) fn row_max(x: &Array) -> [Vec<f64>; 2] {
    let of_row = |row: &[f64]| {
        let mut best = 0;
        for (i, &x) in row.iter().enumerate() {
            if !row[best].is_nan() && (x.is_nan() || x > row[best]) {
                best = i;
            }
        }
        (row[best], best as f64)
    };
    let (max, at) = x.row_iter().map(of_row).unzip();
    [max, at]
}

/// [`Op::SumAll`](crate::graph::Op::SumAll)
pub(super) fn sum_all(x: &Array) -> f64 {
    x.data().iter().sum()
}

/// [`Op::SumGroups`](crate::graph::Op::SumGroups)
pub(super) fn sum_groups(period: usize, x: &Array) -> Vec<f64> {
    let cols = x.cols();
    let mut out = vec![0.0; x.rows() / period * cols];
    for (group, sums) in x
        .data()
        .chunks_exact(period * cols)
        .zip(out.chunks_exact_mut(cols))
    {
        for row in group.chunks_exact(cols) {
            for (sum, x) in sums.iter_mut().zip(row) {
                *sum += x;
            }
        }
    }
    out
}

/// [`Op::SumTiles`](crate::graph::Op::SumTiles)
pub(super) fn sum_tiles(period: usize, rows: usize, x: &Array) -> Vec<f64> {
    let cols = x.cols();
    let mut out = vec![0.0; rows * cols];
    for (r, row) in x.row_iter().enumerate() {
        let sums = &mut out[r % period * cols..][..cols];
        for (sum, x) in sums.iter_mut().zip(row) {
            *sum += x;
        }
    }
    out
}

/// [`Op::MaskedMean`](crate::graph::Op::MaskedMean) over `time` steps a sample.
pub(super) fn masked_mean(time: usize, x: &Array, mask: &Array) -> Vec<f64> {
    let cols = x.cols();
    let mut out = vec![0.0; x.rows() / time * cols];
    let samples = x.data().chunks_exact(time * cols);
    for ((sample, mask), means) in samples
        .zip(mask.data().chunks_exact(time))
        .zip(out.chunks_exact_mut(cols))
    {
        let count = at_least_one(mask.iter().sum());
        for (row, mask) in sample.chunks_exact(cols).zip(mask) {
            for (mean, x) in means.iter_mut().zip(row) {
                *mean += mask * x / count;
            }
        }
    }
    out
}

/// [`Op::MaskedMeanGrad`](crate::graph::Op::MaskedMeanGrad)
pub(super) fn masked_mean_grad(time: usize, dy: &Array, mask: &Array) -> Vec<f64> {
    let mut dx = Vec::with_capacity(mask.data().len() * dy.cols());
    for (dy_row, mask) in dy.row_iter().zip(mask.data().chunks_exact(time)) {
        let count = at_least_one(mask.iter().sum());
        for mask in mask {
            dx.extend(dy_row.iter().map(|dy| mask * dy / count));
        }
    }
    dx
}

/// max(count, 1), but NaN where the count is.
fn at_least_one(count: f64) -> f64 {
    match count < 1.0 {
        true => 1.0,
        false => count,
    }
}

/// [`Op::Stack`](crate::graph::Op::Stack)
pub(super) fn stack(scalars: &[&Array]) -> Vec<f64> {
    scalars.iter().flat_map(|x| x.data()).copied().collect()
}

/// [`Op::GlobalNorm`](crate::graph::Op::GlobalNorm)
pub(super) fn global_norm(gradients: &[&Array]) -> f64 {
    let squares = gradients.iter().flat_map(|g| g.data()).map(|g| g * g);
    squares.sum::<f64>().sqrt()
}
