//! Quality of embeddings, computed on the host: cosine, squared error, retrieval, nearest neighbours.
//!
//! Matrices are dense and row-major, `[n, E]`. Sums are f64. Norms below [`MIN_NORM`] count as [`MIN_NORM`], so a zero vector has cosine 0
//! with every other. A value that is not finite makes means NaN and never counts as a hit in retrieval.

use crate::error::Result;

use super::sample::data;

/// Lower bound on the norms that a cosine divides by.
pub const MIN_NORM: f64 = 1e-6;

/// Rows and columns of a tile of scores: each value that is read serves this many products.
const TILE: usize = 4;

/// Mean over the rows of the cosine between `embeddings` and `targets`, both `[n, width]`.
///
/// # Errors
/// [`Data`](crate::Error::Data) if the two are not both `[n, width]` with n ≥ 1.
pub fn mean_cosine(embeddings: &[f32], targets: &[f32], width: usize) -> Result<f64> {
    let rows = check(embeddings, targets, width)?;
    let pairs = embeddings
        .chunks_exact(width)
        .zip(targets.chunks_exact(width));
    let sum: f64 = pairs.map(|(y, t)| cosine(y, t)).sum();
    Ok(sum / rows as f64)
}

/// Mean over all values of the squared difference of `embeddings` and `targets`, both `[n, width]`.
///
/// # Errors
/// [`Data`](crate::Error::Data) if the two are not both `[n, width]` with n ≥ 1.
pub fn mean_squared_error(embeddings: &[f32], targets: &[f32], width: usize) -> Result<f64> {
    check(embeddings, targets, width)?;
    let squares = embeddings.iter().zip(targets).map(|(&y, &t)| {
        let difference = f64::from(y) - f64::from(t);
        difference * difference
    });
    Ok(squares.sum::<f64>() / embeddings.len() as f64)
}

/// For each row of `embeddings`, the number of other rows of `targets` whose cosine to it is at least that of its own target. Both are
/// `[n, width]`. The best rank is 0; a tie counts against the row. The cost is n² · width products.
///
/// # Errors
/// [`Data`](crate::Error::Data) if the two are not both `[n, width]` with n ≥ 1.
pub fn retrieval_ranks(embeddings: &[f32], targets: &[f32], width: usize) -> Result<Vec<usize>> {
    let rows = check(embeddings, targets, width)?;
    // The norm of an embedding scales all of its scores alike, so only the norms of the targets are needed.
    let inverse_norms: Vec<f64> = targets
        .chunks_exact(width)
        .map(|target| 1.0 / norm(target))
        .collect();
    let own: Vec<f64> = (0..rows)
        .map(|i| dot(row(embeddings, i, width), row(targets, i, width)) * inverse_norms[i])
        .collect();
    let mut ranks = vec![0; rows];
    for i in (0..rows).step_by(TILE) {
        for j in (0..rows).step_by(TILE) {
            let dots = dot_tile(tile(embeddings, i, width), tile(targets, j, width));
            for (i, dots) in (i..rows).zip(dots) {
                for (j, dot) in (j..rows).zip(dots) {
                    // Not `>=`, so that a score that is no number counts against the row too.
                    let own_is_nearer = own[i] > dot * inverse_norms[j];
                    ranks[i] += usize::from(i != j && !own_is_nearer);
                }
            }
        }
    }
    Ok(ranks)
}

/// P@k: the share of rows whose own target is among their `k` nearest, computed from [`retrieval_ranks`]. It is 0 without rows.
#[must_use]
pub fn precision_at(ranks: &[usize], k: usize) -> f64 {
    let hits = ranks.iter().filter(|&&rank| rank < k).count();
    hits as f64 / ranks.len().max(1) as f64
}

/// Indices and cosines of the `k` rows of `matrix` `[n, E]` that are nearest to `query` `[E]` by cosine, nearest first. Of rows with equal
/// cosines the lower index comes first. If the matrix has fewer than `k` rows, all are returned.
///
/// # Errors
/// [`Data`](crate::Error::Data) if the query is empty or not finite, or the matrix is not `[n, E]`.
pub fn nearest(query: &[f32], matrix: &[f32], k: usize) -> Result<Vec<(usize, f32)>> {
    let width = query.len();
    if width == 0 || !matrix.len().is_multiple_of(width) {
        let reason = format!("{} values in rows of {width}", matrix.len());
        return Err(data("matrix", reason));
    }
    if !query.iter().all(|value| value.is_finite()) {
        return Err(data("query", "not finite"));
    }
    let mut scores: Vec<(usize, f32)> = matrix
        .chunks_exact(width)
        .map(|candidate| cosine(query, candidate) as f32)
        .enumerate()
        .collect();
    // Rows that are not finite come last. Adding zero turns −0 into +0, so that the two are equal.
    let key = |score: f32| {
        if score.is_nan() {
            f32::NEG_INFINITY
        } else {
            score + 0.0
        }
    };
    let order =
        |a: &(usize, f32), b: &(usize, f32)| key(b.1).total_cmp(&key(a.1)).then(a.0.cmp(&b.0));
    if k < scores.len() {
        scores.select_nth_unstable_by(k, order);
        scores.truncate(k);
    }
    scores.sort_unstable_by(order);
    Ok(scores)
}

/// Number of rows.
fn check(embeddings: &[f32], targets: &[f32], width: usize) -> Result<usize> {
    if embeddings.len() != targets.len() {
        let (found, wanted) = (embeddings.len(), targets.len());
        return Err(data(
            "embeddings",
            format!("{found} values for {wanted} of targets"),
        ));
    }
    if width == 0 || embeddings.is_empty() || !embeddings.len().is_multiple_of(width) {
        let reason = format!("{} values in rows of {width}", embeddings.len());
        return Err(data("embeddings", reason));
    }
    Ok(embeddings.len() / width)
}

fn row(matrix: &[f32], index: usize, width: usize) -> &[f32] {
    &matrix[index * width..(index + 1) * width]
}

/// Rows `first` to `first + TILE`; past the end the last row is repeated.
fn tile(matrix: &[f32], first: usize, width: usize) -> [&[f32]; TILE] {
    let last = matrix.len() / width - 1;
    std::array::from_fn(|offset| row(matrix, (first + offset).min(last), width))
}

/// All dot products of the rows of two tiles. Each is summed in the order of [`dot`], so that equal rows have equal scores.
fn dot_tile(a: [&[f32]; TILE], b: [&[f32]; TILE]) -> [[f64; TILE]; TILE] {
    let mut sums = [[0.0; TILE]; TILE];
    for e in 0..a[0].len() {
        let a: [f64; TILE] = std::array::from_fn(|i| f64::from(a[i][e]));
        let b: [f64; TILE] = std::array::from_fn(|j| f64::from(b[j][e]));
        // Plain indices: iterators here are ten times slower where loops are not unrolled, as in the dev profile.
        #[allow(clippy::needless_range_loop)]
        for i in 0..TILE {
            for j in 0..TILE {
                sums[i][j] += a[i] * b[j];
            }
        }
    }
    sums
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    let products = a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b));
    products.fold(0.0, |sum, product| sum + product)
}

fn norm(a: &[f32]) -> f64 {
    let norm = dot(a, a).sqrt();
    // `max` would turn a NaN norm into the lower bound.
    if norm < MIN_NORM { MIN_NORM } else { norm }
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    dot(a, b) / (norm(a) * norm(b))
}
