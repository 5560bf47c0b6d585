//! Quality of embeddings and texts, computed on the host: cosine, squared error, retrieval, nearest neighbours, agreement of
//! similarities, diversity of texts.
//!
//! Matrices are dense and row-major, `[n, E]`. Sums are f64. Norms below [`MIN_NORM`] count as [`MIN_NORM`], so a zero vector has cosine 0
//! with every other. A value that is not finite makes means NaN and never counts as a hit in retrieval.

use std::collections::HashSet;

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
    let own: Vec<usize> = (0..rows).collect();
    ranks_among(embeddings, targets, &own, width)
}

/// As [`retrieval_ranks`], for `embeddings` `[n, width]` among `candidates` `[m, width]`, where the target of row i is candidate number `own[i]`.
///
/// # Errors
/// [`Data`](crate::Error::Data) if these are not whole rows, n is 0, or a number is not below m.
pub fn ranks_among(
    embeddings: &[f32],
    candidates: &[f32],
    own: &[usize],
    width: usize,
) -> Result<Vec<usize>> {
    let rows = check(embeddings, embeddings, width)?;
    let count = check(candidates, candidates, width)?;
    if own.len() != rows || own.iter().any(|&own| own >= count) {
        let reason = format!("needs {rows} numbers below {count}");
        return Err(data("own", reason));
    }
    // The norm of an embedding scales all of its scores alike, so only the norms of the targets are needed.
    let inverse_norms: Vec<f64> = candidates
        .chunks_exact(width)
        .map(|candidate| 1.0 / norm(candidate))
        .collect();
    let scores: Vec<f64> = own
        .iter()
        .enumerate()
        .map(|(i, &j)| dot(row(embeddings, i, width), row(candidates, j, width)) * inverse_norms[j])
        .collect();
    let mut ranks = vec![0; rows];
    for i in (0..rows).step_by(TILE) {
        for j in (0..count).step_by(TILE) {
            let dots = dot_tile(tile(embeddings, i, width), tile(candidates, j, width));
            for (i, dots) in (i..rows).zip(dots) {
                for (j, dot) in (j..count).zip(dots) {
                    // Not `>=`, so that a score that is no number counts against the row too.
                    let own_is_nearer = scores[i] > dot * inverse_norms[j];
                    ranks[i] += usize::from(own[i] != j && !own_is_nearer);
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

/// Overlap@k: the mean over the rows of the share of their `k` nearest other rows that `embeddings` and `targets`, both `[n, width]`, have in
/// common. Of rows with equal cosines the lower index is nearer. With fewer than `k` other rows all of them count. A row whose cosines are
/// not finite has nothing in common. The cost is n² · width products.
///
/// # Errors
/// [`Data`](crate::Error::Data) if the two are not both `[n, width]` with n ≥ 2, or `k` is 0.
pub fn neighbor_overlap(
    embeddings: &[f32],
    targets: &[f32],
    width: usize,
    k: usize,
) -> Result<f64> {
    let rows = check_pairs(embeddings, targets, width)?;
    if k == 0 {
        return Err(data("k", "must be at least 1"));
    }
    let k = k.min(rows - 1);
    let (ours, theirs) = (cosines(embeddings, width), cosines(targets, width));
    let mut common = 0;
    let mut nearest = [Vec::new(), Vec::new()];
    for i in 0..rows {
        for (all, nearest) in [&ours, &theirs].into_iter().zip(&mut nearest) {
            let others = (0..rows).filter(|&j| j != i);
            let others = others.map(|j| (all[i * rows + j], j));
            nearest.clear();
            nearest.extend(others.filter(|(cosine, _)| cosine.is_finite()));
            let order =
                |a: &(f64, usize), b: &(f64, usize)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
            if k < nearest.len() {
                nearest.select_nth_unstable_by(k, order);
                nearest.truncate(k);
            }
            nearest.sort_unstable_by_key(|&(_, j)| j);
        }
        let [ours, theirs] = &nearest;
        let found = |&&(_, j): &&(f64, usize)| theirs.binary_search_by_key(&j, |x| x.1).is_ok();
        common += ours.iter().filter(found).count();
    }
    Ok(common as f64 / (rows * k) as f64)
}

/// Spearman's rank correlation of the cosines of all n · (n − 1) / 2 pairs of rows in `embeddings` with those in `targets`, both `[n, width]`:
/// Pearson's correlation of their ranks, where equal cosines have the mean of their ranks. It is NaN if a cosine is not finite, or all
/// cosines of one side are equal. The cost is n² · width products.
///
/// # Errors
/// [`Data`](crate::Error::Data) if the two are not both `[n, width]` with n ≥ 2.
pub fn similarity_correlation(embeddings: &[f32], targets: &[f32], width: usize) -> Result<f64> {
    let rows = check_pairs(embeddings, targets, width)?;
    let pairs = |matrix| {
        let all = cosines(matrix, width);
        let above = (0..rows).flat_map(|i| (i + 1..rows).map(move |j| (i, j)));
        above.map(|(i, j)| all[i * rows + j]).collect::<Vec<f64>>()
    };
    let (ours, theirs) = (pairs(embeddings), pairs(targets));
    spearman(&ours, &theirs)
}

/// Spearman's rank correlation of two lists of as many values: [Pearson's](pearson) of their ranks, where equal values have the mean of their
/// ranks. It is NaN if a value is not finite, or all values of one side are equal.
///
/// # Errors
/// [`Data`](crate::Error::Data) if the lists differ in length, or are empty.
pub fn spearman(a: &[f64], b: &[f64]) -> Result<f64> {
    check_lists(a, b)?;
    if a.iter().chain(b).any(|value| !value.is_finite()) {
        return Ok(f64::NAN);
    }
    pearson(&ranks(a), &ranks(b))
}

/// Distinct-n: the number of different n-grams of tokens divided by the number of all n-grams, over all texts together. It is 0 if no
/// text has `n` tokens. The lower it is, the more the texts repeat each other and themselves.
///
/// # Errors
/// [`Data`](crate::Error::Data) if `n` is 0.
pub fn distinct_n(texts: &[impl AsRef<[u32]>], n: usize) -> Result<f64> {
    if n == 0 {
        return Err(data("n", "must be at least 1"));
    }
    let grams = || texts.iter().flat_map(|text| text.as_ref().windows(n));
    let distinct: HashSet<&[u32]> = grams().collect();
    Ok(distinct.len() as f64 / grams().count().max(1) as f64)
}

/// Number of rows, which form at least one pair.
fn check_pairs(embeddings: &[f32], targets: &[f32], width: usize) -> Result<usize> {
    match check(embeddings, targets, width)? {
        1 => Err(data("embeddings", "a single row has no neighbours")),
        rows => Ok(rows),
    }
}

/// The cosines of all pairs of rows, [n, n].
fn cosines(matrix: &[f32], width: usize) -> Vec<f64> {
    let rows = matrix.len() / width;
    let inverse_norms: Vec<f64> = matrix
        .chunks_exact(width)
        .map(|row| 1.0 / norm(row))
        .collect();
    let mut all = vec![0.0; rows * rows];
    for i in (0..rows).step_by(TILE) {
        for j in (i..rows).step_by(TILE) {
            let dots = dot_tile(tile(matrix, i, width), tile(matrix, j, width));
            for (i, dots) in (i..rows).zip(dots) {
                for (j, dot) in (j..rows).zip(dots) {
                    // Adding zero turns −0 into +0, so that the two are equal.
                    let cosine = dot * inverse_norms[i] * inverse_norms[j] + 0.0;
                    all[i * rows + j] = cosine;
                    all[j * rows + i] = cosine;
                }
            }
        }
    }
    all
}

/// The rank of each value from 0; equal values have the mean of their ranks.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<(f64, usize)> = values.iter().copied().zip(0..).collect();
    order.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
    let mut ranks = vec![0.0; values.len()];
    let mut first = 0;
    for equal in order.chunk_by(|a, b| a.0 == b.0) {
        let mean = first as f64 + (equal.len() - 1) as f64 / 2.0;
        for &(_, index) in equal {
            ranks[index] = mean;
        }
        first += equal.len();
    }
    ranks
}

/// Pearson's correlation of two lists of as many values. It is NaN if a value is not finite, or all values of one side are equal.
///
/// # Errors
/// [`Data`](crate::Error::Data) if the lists differ in length, or are empty.
pub fn pearson(a: &[f64], b: &[f64]) -> Result<f64> {
    check_lists(a, b)?;
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
    let (mean_a, mean_b) = (mean(a), mean(b));
    let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
    for (a, b) in a.iter().zip(b) {
        let (a, b) = (a - mean_a, b - mean_b);
        ab += a * b;
        aa += a * a;
        bb += b * b;
    }
    Ok(ab / (aa.sqrt() * bb.sqrt()))
}

fn check_lists(a: &[f64], b: &[f64]) -> Result<()> {
    match a.len() == b.len() && !a.is_empty() {
        true => Ok(()),
        false => {
            let reason = format!("{} values beside {}", a.len(), b.len());
            Err(data("lists", reason))
        }
    }
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

pub(super) fn cosine(a: &[f32], b: &[f32]) -> f64 {
    dot(a, b) / (norm(a) * norm(b))
}
