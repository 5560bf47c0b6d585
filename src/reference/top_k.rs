//! The k best numbers of every row.

/// Indices and numbers of the `k` greatest of `numbers`, greatest first. Of equal numbers the lower index comes first. NaN is below all
/// others.
#[must_use]
pub fn top_k(numbers: &[f64], k: usize) -> Vec<(usize, f64)> {
    let mut order: Vec<(usize, f64)> = numbers.iter().copied().enumerate().collect();
    let key = |x: f64| {
        if x.is_nan() {
            f64::NEG_INFINITY
        } else {
            x + 0.0
        }
    };
    order.sort_by(|a, b| key(b.1).total_cmp(&key(a.1)).then(a.0.cmp(&b.0)));
    order.truncate(k);
    order
}
