//! Softmax of rows, its logarithm, and their derivatives.

use super::array::Array;

/// [`Op::Softmax`](crate::graph::Op::Softmax)
pub(super) fn softmax(log: bool, x: &Array) -> Vec<f64> {
    let mut y = Vec::with_capacity(x.data().len());
    for row in x.row_iter() {
        let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        // NaN where an element is NaN or the largest is infinite.
        let sum: f64 = row.iter().map(|x| (x - max).exp()).sum();
        y.extend(row.iter().map(|x| match log {
            true => (x - max) - sum.ln(),
            false => (x - max).exp() / sum,
        }));
    }
    y
}

/// [`Op::SoftmaxGrad`](crate::graph::Op::SoftmaxGrad)
pub(super) fn softmax_grad(log: bool, y: &Array, dy: &Array) -> Vec<f64> {
    let mut dx = Vec::with_capacity(y.data().len());
    for (y, dy) in y.row_iter().zip(dy.row_iter()) {
        let both = y.iter().zip(dy);
        let sum: f64 = match log {
            true => dy.iter().sum(),
            false => both.clone().map(|(y, dy)| y * dy).sum(),
        };
        dx.extend(both.map(|(y, dy)| match log {
            true => dy - y.exp() * sum,
            false => y * (dy - sum),
        }));
    }
    dx
}
