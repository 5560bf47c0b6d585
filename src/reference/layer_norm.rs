//! Layer normalisation of rows, and its derivatives.

use super::array::Array;

/// [`Op::LayerNorm`](crate::graph::Op::LayerNorm): y and statistics.
pub(super) fn layer_norm(x: &Array, gamma: &Array, beta: &Array, eps: f32) -> (Vec<f64>, Vec<f64>) {
    let cols = x.cols() as f64;
    let mut y = Vec::with_capacity(x.data().len());
    let mut firsts = Vec::with_capacity(x.rows());
    let mut shifts = Vec::with_capacity(x.rows());
    let mut rstds = Vec::with_capacity(x.rows());
    for row in x.row_iter() {
        let mean = row.iter().sum::<f64>() / cols;
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / cols;
        let rstd = (variance + f64::from(eps)).sqrt().recip();
        for ((x, gamma), beta) in row.iter().zip(gamma.data()).zip(beta.data()) {
            y.push((x - mean) * rstd * gamma + beta);
        }
        firsts.push(row[0]);
        shifts.push(mean - row[0]);
        rstds.push(rstd);
    }
    (y, [firsts, shifts, rstds].concat())
}

/// [`Op::LayerNormGrad`](crate::graph::Op::LayerNormGrad)
pub(super) fn layer_norm_grad(
    x: &Array,
    gamma: &Array,
    statistics: &Array,
    dy: &Array,
) -> Vec<f64> {
    let cols = x.cols() as f64;
    let mut dx = Vec::with_capacity(x.data().len());
    for (r, dy_row) in dy.row_iter().enumerate() {
        let rstd = statistics.row(2)[r];
        let normalised = normalised_row(x, statistics, r);
        let g: Vec<f64> = dy_row
            .iter()
            .zip(gamma.data())
            .map(|(dy, gamma)| dy * gamma)
            .collect();
        let mean_g = g.iter().sum::<f64>() / cols;
        let mean_gx = g.iter().zip(&normalised).map(|(g, x)| g * x).sum::<f64>() / cols;
        for (g, x) in g.iter().zip(&normalised) {
            dx.push(rstd * (g - mean_g - x * mean_gx));
        }
    }
    dx
}

/// [`Op::LayerNormParamGrad`](crate::graph::Op::LayerNormParamGrad): dgamma and dbeta.
pub(super) fn layer_norm_param_grad(
    x: &Array,
    statistics: &Array,
    dy: &Array,
) -> (Vec<f64>, Vec<f64>) {
    let mut dgamma = vec![0.0; x.cols()];
    let mut dbeta = vec![0.0; x.cols()];
    for (r, dy_row) in dy.row_iter().enumerate() {
        let normalised = normalised_row(x, statistics, r);
        for (c, dy) in dy_row.iter().enumerate() {
            dgamma[c] += dy * normalised[c];
            dbeta[c] += dy;
        }
    }
    (dgamma, dbeta)
}

/// x̂ = (x − mean)·rstd of row `r`.
fn normalised_row(x: &Array, statistics: &Array, r: usize) -> Vec<f64> {
    let mean = statistics.row(0)[r] + statistics.row(1)[r];
    let rstd = statistics.row(2)[r];
    x.row(r).iter().map(|x| (x - mean) * rstd).collect()
}
