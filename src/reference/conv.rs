//! 1-D convolutions: straight from the definition, and the two data movements that make them matrix products.

use super::array::Array;
use crate::types::Window;

/// [`Op::Im2col`](crate::graph::Op::Im2col)
pub(super) fn im2col(window: Window, x: &Array) -> Vec<f64> {
    let channels = x.cols();
    let rows = x.rows() / window.time * window.steps;
    let mut columns = Vec::with_capacity(rows * window.kernel * channels);
    for row in 0..rows {
        for tap in 0..window.kernel {
            match source_row(window, row, tap) {
                Some(source) => columns.extend_from_slice(x.row(source)),
                None => columns.resize(columns.len() + channels, 0.0),
            }
        }
    }
    columns
}

/// [`Op::Col2im`](crate::graph::Op::Col2im)
pub(super) fn col2im(window: Window, columns: &Array) -> Vec<f64> {
    let channels = columns.cols() / window.kernel;
    let rows = columns.rows() / window.steps * window.time;
    let mut x = vec![0.0; rows * channels];
    for (row, taps) in columns.row_iter().enumerate() {
        for (tap, values) in taps.chunks_exact(channels).enumerate() {
            if let Some(source) = source_row(window, row, tap) {
                for (c, value) in values.iter().enumerate() {
                    x[source * channels + c] += value;
                }
            }
        }
    }
    x
}

/// [`Op::Conv`](crate::graph::Op::Conv)
pub(super) fn conv(window: Window, x: &Array, weight: &Array) -> Vec<f64> {
    let outputs = weight.rows();
    let rows = x.rows() / window.time * window.steps;
    let mut y = vec![0.0; rows * outputs];
    for_each_tap(window, rows, x.cols(), |row, source, taps| {
        for (h, sum) in y[row * outputs..][..outputs].iter_mut().enumerate() {
            let weight = &weight.row(h)[taps.clone()];
            let products = x.row(source).iter().zip(weight);
            *sum += products.map(|(x, w)| x * w).sum::<f64>();
        }
    });
    y
}

/// [`Op::ConvGradInput`](crate::graph::Op::ConvGradInput)
pub(super) fn grad_input(window: Window, dy: &Array, weight: &Array) -> Vec<f64> {
    let channels = weight.cols() / window.kernel;
    let mut dx = vec![0.0; dy.rows() / window.steps * window.time * channels];
    for_each_tap(window, dy.rows(), channels, |row, source, taps| {
        for (h, &d) in dy.row(row).iter().enumerate() {
            let weight = &weight.row(h)[taps.clone()];
            for (dx, w) in dx[source * channels..][..channels].iter_mut().zip(weight) {
                *dx += d * w;
            }
        }
    });
    dx
}

/// [`Op::ConvGradWeight`](crate::graph::Op::ConvGradWeight)
pub(super) fn grad_weight(window: Window, x: &Array, dy: &Array) -> Vec<f64> {
    let width = window.kernel * x.cols();
    let mut gradient = vec![0.0; dy.cols() * width];
    for_each_tap(window, dy.rows(), x.cols(), |row, source, taps| {
        for (h, &d) in dy.row(row).iter().enumerate() {
            let sums = &mut gradient[h * width..][taps.clone()];
            for (sum, x) in sums.iter_mut().zip(x.row(source)) {
                *sum += d * x;
            }
        }
    });
    gradient
}

/// Every row of the result with every row of the operand that it looks at, and the columns of the weight between them.
fn for_each_tap(
    window: Window,
    rows: usize,
    channels: usize,
    mut visit: impl FnMut(usize, usize, std::ops::Range<usize>),
) {
    for row in 0..rows {
        for tap in 0..window.kernel {
            if let Some(source) = source_row(window, row, tap) {
                visit(row, source, tap * channels..(tap + 1) * channels);
            }
        }
    }
}

/// The row of [B·L] that tap `tap` of row `row` of the result looks at; none outside of the sample.
fn source_row(window: Window, row: usize, tap: usize) -> Option<usize> {
    let (sample, step) = (row / window.steps, row % window.steps);
    let place = step * window.stride + tap * window.dilation;
    let step = place.checked_sub(window.before)?;
    (step < window.time).then_some(sample * window.time + step)
}
