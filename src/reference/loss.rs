//! Distillation loss and cross entropy, and their derivatives.

use super::array::Array;
use super::embedding::checked_index;
use super::gemm::matmul;
use super::precision;
use super::reduce::sum_rows;
use crate::error::Result;
use crate::graph::LinearCrossEntropy;
use crate::types::Trans;

/// What norms are limited to from below, so that a zero vector has a cosine.
const SMALLEST_NORM: f64 = 1e-6;

/// The results of [`Op::KdLoss`](crate::graph::Op::KdLoss).
pub(super) struct Kd {
    pub loss: f64,
    pub cosine: f64,
    pub mse: f64,
    pub rows: Vec<f64>,
}

/// [`Op::KdLoss`](crate::graph::Op::KdLoss)
pub(super) fn kd_loss(alpha: f32, beta: f32, y: &Array, t: &Array) -> Kd {
    let mut rows = Vec::with_capacity(4 * y.rows());
    let mut cosines = 0.0;
    let mut squares = 0.0;
    for (y, t) in y.row_iter().zip(t.row_iter()) {
        let dot = dot(y, t);
        let y_norm = norm(y);
        let t_norm = norm(t);
        let square: f64 = y.iter().zip(t).map(|(y, t)| (y - t).powi(2)).sum();
        cosines += dot / (y_norm * t_norm);
        squares += square;
        rows.extend([dot, y_norm, t_norm, square]);
    }
    let cosine = cosines / y.rows() as f64;
    let mse = squares / y.data().len() as f64;
    let loss = f64::from(alpha) * (1.0 - cosine) + f64::from(beta) * mse;
    Kd {
        loss,
        cosine,
        mse,
        rows,
    }
}

/// [`Op::KdLossGrad`](crate::graph::Op::KdLossGrad)
pub(super) fn kd_loss_grad(
    alpha: f32,
    beta: f32,
    y: &Array,
    t: &Array,
    rows: &Array,
    dloss: f64,
) -> Vec<f64> {
    let batch = y.rows() as f64;
    let elements = y.data().len() as f64;
    let mut dy = Vec::with_capacity(y.data().len());
    for ((y, t), row) in y.row_iter().zip(t.row_iter()).zip(rows.row_iter()) {
        let (dot, y_norm, t_norm) = (row[0], row[1], row[2]);
        for (y, t) in y.iter().zip(t) {
            let mut dcosine = t / (y_norm * t_norm);
            // A norm at its lower bound is constant.
            if y_norm != SMALLEST_NORM {
                dcosine -= dot * y / (y_norm.powi(3) * t_norm);
            }
            let dmse = 2.0 * (y - t) / elements;
            dy.push(dloss * (-f64::from(alpha) / batch * dcosine + f64::from(beta) * dmse));
        }
    }
    dy
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn norm(x: &[f64]) -> f64 {
    let norm = dot(x, x).sqrt();
    // Not `f64::max`, which hides NaN.
    match norm < SMALLEST_NORM {
        true => SMALLEST_NORM,
        false => norm,
    }
}

/// The results of [`Op::CrossEntropy`](crate::graph::Op::CrossEntropy).
pub(super) struct CrossEntropy {
    pub loss: f64,
    pub count: f64,
    pub rows: Vec<f64>,
}

/// [`Op::CrossEntropy`](crate::graph::Op::CrossEntropy)
pub(super) fn cross_entropy(
    ignore: Option<u32>,
    smoothing: f32,
    logits: &Array,
    targets: &Array,
) -> Result<CrossEntropy> {
    let smoothing = f64::from(smoothing);
    let mut count = 0.0;
    let mut sums = Vec::with_capacity(logits.rows());
    let mut losses = Vec::with_capacity(logits.rows());
    for (x, &target) in logits.row_iter().zip(targets.data()) {
        let (largest, log_sum) = log_sum_exp(x);
        sums.push(largest + log_sum);
        if Some(target) == ignore.map(f64::from) {
            losses.push(0.0);
            continue;
        }
        let target = checked_index("cross entropy", target, x.len(), targets)?;
        // Relative to the largest, so that large logits do not swallow a small loss.
        let mut loss = log_sum + (1.0 - smoothing) * (largest - x[target]);
        // Without smoothing the mean does not count, even if a masked class makes it infinite.
        if smoothing > 0.0 {
            loss += smoothing * (largest - x.iter().sum::<f64>() / x.len() as f64);
        }
        losses.push(loss);
        count += 1.0;
    }
    let loss = losses.iter().sum::<f64>() / f64::max(count, 1.0);
    sums.extend(losses);
    Ok(CrossEntropy {
        loss,
        count,
        rows: sums,
    })
}

/// [`Op::CrossEntropyGrad`](crate::graph::Op::CrossEntropyGrad); `scale` is dloss / max(count, 1).
pub(super) fn cross_entropy_grad(
    ignore: Option<u32>,
    smoothing: f32,
    logits: &Array,
    targets: &Array,
    rows: &Array,
    scale: f64,
) -> Result<Vec<f64>> {
    let smoothing = f64::from(smoothing);
    let mut dlogits = Vec::with_capacity(logits.data().len());
    for ((x, &target), lse) in logits.row_iter().zip(targets.data()).zip(rows.row(0)) {
        if Some(target) == ignore.map(f64::from) {
            dlogits.resize(dlogits.len() + x.len(), 0.0);
            continue;
        }
        let target = checked_index("cross entropy gradient", target, x.len(), targets)?;
        for (v, x) in x.iter().enumerate() {
            let onehot = if v == target { 1.0 } else { 0.0 };
            let wanted = (1.0 - smoothing) * onehot + smoothing / logits.cols() as f64;
            dlogits.push(scale * ((x - lse).exp() - wanted));
        }
    }
    Ok(dlogits)
}

/// [`Op::LinearCrossEntropy`](crate::graph::Op::LinearCrossEntropy)
pub(super) fn linear_cross_entropy(
    layer: &LinearCrossEntropy,
    x: &Array,
    weight: &Array,
    bias: Option<&Array>,
    targets: &Array,
) -> Result<CrossEntropy> {
    let logits = logits(layer, x, weight, bias)?;
    cross_entropy(layer.ignore, layer.smoothing, &logits, targets)
}

/// [`Op::LinearCrossEntropyGrad`](crate::graph::Op::LinearCrossEntropyGrad); `scale` is dloss / max(count, 1).
pub(super) fn linear_cross_entropy_grad(
    layer: &LinearCrossEntropy,
    x: &Array,
    weight: &Array,
    bias: Option<&Array>,
    targets: &Array,
    rows: &Array,
    scale: f64,
) -> Result<Vec<Vec<f64>>> {
    let logits = logits(layer, x, weight, bias)?;
    let (ignore, smoothing) = (layer.ignore, layer.smoothing);
    let dlogits = cross_entropy_grad(ignore, smoothing, &logits, targets, rows, scale)?;
    let dlogits = stored(layer, logits.shape().dims(), dlogits)?;
    let mut gradients = vec![
        matmul(Trans::NN, &dlogits, weight),
        matmul(Trans::TN, &dlogits, x),
    ];
    gradients.extend(bias.map(|_| sum_rows(&dlogits)));
    Ok(gradients)
}

/// x·weightᵀ + bias, as it is stored.
fn logits(
    layer: &LinearCrossEntropy,
    x: &Array,
    weight: &Array,
    bias: Option<&Array>,
) -> Result<Array> {
    let mut logits = matmul(Trans::NT, x, weight);
    for (i, logit) in logits.iter_mut().enumerate() {
        *logit += bias.map_or(0.0, |bias| bias.data()[i % weight.rows()]);
    }
    stored(layer, &[x.rows(), weight.rows()], logits)
}

fn stored(layer: &LinearCrossEntropy, dims: &[usize], mut data: Vec<f64>) -> Result<Array> {
    for x in &mut data {
        *x = precision::store(*x, layer.logits);
    }
    Array::new(dims, data)
}

/// The largest x and ln Σ e^(x − largest), whose sum is ln Σ eˣ. The logarithm is NaN where there is NaN, +∞ or nothing but −∞: no softmax exists.
fn log_sum_exp(x: &[f64]) -> (f64, f64) {
    let largest = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = x.iter().map(|x| (x - largest).exp()).sum();
    (largest, sum.ln())
}
