//! The two data movements of a causal dilated 1-D convolution; the products are [`gemm`](super::gemm)'s.

use super::array::Array;
use crate::graph::Window;

/// [`Op::Im2col`](crate::graph::Op::Im2col)
pub(super) fn im2col(window: Window, x: &Array) -> Vec<f64> {
    let channels = x.cols();
    let mut columns = Vec::with_capacity(x.data().len() * window.kernel);
    for row in 0..x.rows() {
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
    let mut x = vec![0.0; columns.rows() * channels];
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

/// The row of [B·L] that tap `tap` of output row `row` looks at; none before the start of the sample.
fn source_row(window: Window, row: usize, tap: usize) -> Option<usize> {
    let back = (window.kernel - 1 - tap) * window.dilation;
    let time = row % window.time;
    (back <= time).then(|| row - back)
}
