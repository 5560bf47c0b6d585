//! Matrix products.

use super::array::Array;
use crate::types::Trans;

/// [`Op::MatMul`](crate::graph::Op::MatMul)
pub(super) fn batch_matmul(batch: usize, trans: Trans, a: &Array, b: &Array) -> Vec<f64> {
    let (a_rows, a_cols) = (a.rows() / batch, a.cols());
    let (b_rows, b_cols) = (b.rows() / batch, b.cols());
    let matrices = |x: &Array, each: usize| -> Vec<Vec<f64>> {
        x.data().chunks_exact(each).map(<[f64]>::to_vec).collect()
    };
    let pairs = matrices(a, a_rows * a_cols)
        .into_iter()
        .zip(matrices(b, b_rows * b_cols));
    pairs
        .flat_map(|(a, b)| match trans {
            Trans::NN => product(&a, &b, a_rows, a_cols, b_cols),
            Trans::NT => {
                let b = transpose(&b, b_rows, b_cols);
                product(&a, &b, a_rows, a_cols, b_rows)
            }
            Trans::TN => {
                let a = transpose(&a, a_rows, a_cols);
                product(&a, &b, a_cols, a_rows, b_cols)
            }
        })
        .collect()
}

/// A single product.
pub(super) fn matmul(trans: Trans, a: &Array, b: &Array) -> Vec<f64> {
    batch_matmul(1, trans, a, b)
}

/// A [m, k] · B [k, n], both row-major.
fn product(a: &[f64], b: &[f64], m: usize, k: usize, n: usize) -> Vec<f64> {
    let mut out = vec![0.0; m * n];
    for (out_row, a_row) in out.chunks_exact_mut(n).zip(a.chunks_exact(k)) {
        for (&x, b_row) in a_row.iter().zip(b.chunks_exact(n)) {
            for (sum, &y) in out_row.iter_mut().zip(b_row) {
                *sum += x * y;
            }
        }
    }
    out
}

fn transpose(matrix: &[f64], rows: usize, cols: usize) -> Vec<f64> {
    let mut out = vec![0.0; rows * cols];
    for (r, row) in matrix.chunks_exact(cols).enumerate() {
        for (c, &x) in row.iter().enumerate() {
            out[c * rows + r] = x;
        }
    }
    out
}
