//! Attention and its derivatives, with all scores of a query at hand.

use super::array::Array;
use crate::graph::AttentionOptions;

/// Queries, keys and values of one attention, and who sees whom.
pub(super) struct Heads<'a> {
    options: AttentionOptions,
    mask: Option<&'a Array>,
    batch: usize,
    /// Number of queries and of keys per sample.
    queries: usize,
    keys: usize,
    width: usize,
    /// Each with the first of its columns.
    q: (&'a Array, usize),
    k: (&'a Array, usize),
    v: (&'a Array, usize),
}

/// The matrices of the same rows and of `width` columns each, one beside the other.
pub(super) fn side_by_side(width: usize, parts: &[Vec<f64>]) -> Vec<f64> {
    let rows = parts.first().map_or(0, |part| part.len() / width);
    let row = |r: usize| {
        parts
            .iter()
            .flat_map(move |part| part[r * width..(r + 1) * width].to_vec())
    };
    (0..rows).flat_map(row).collect()
}

impl<'a> Heads<'a> {
    /// Of [`Op::Attention`](crate::graph::Op::Attention).
    pub fn packed(options: AttentionOptions, qkv: &'a Array, mask: Option<&'a Array>) -> Self {
        let (batch, time) = (qkv.shape().dims()[0], qkv.rows() / qkv.shape().dims()[0]);
        let width = qkv.cols() / 3;
        Self {
            options,
            mask,
            batch,
            queries: time,
            keys: time,
            width,
            q: (qkv, 0),
            k: (qkv, width),
            v: (qkv, 2 * width),
        }
    }

    /// Of [`Op::CrossAttention`](crate::graph::Op::CrossAttention).
    pub fn cross(
        options: AttentionOptions,
        q: &'a Array,
        kv: &'a Array,
        mask: Option<&'a Array>,
    ) -> Self {
        let (batch, width) = (q.shape().dims()[0], q.cols());
        Self {
            options,
            mask,
            batch,
            queries: q.rows() / batch,
            keys: kv.rows() / batch,
            width,
            q: (q, 0),
            k: (kv, 0),
            v: (kv, width),
        }
    }

    pub fn width(&self) -> usize {
        self.width
    }

    fn columns(&self) -> usize {
        self.width / self.options.heads
    }

    fn row(&self, (array, first): (&'a Array, usize), row: usize, head: usize) -> &'a [f64] {
        let first = first + head * self.columns();
        &array.row(row)[first..first + self.columns()]
    }

    fn scale(&self) -> f64 {
        match self.options.scale {
            Some(scale) => f64::from(scale),
            None => (self.columns() as f64).sqrt().recip(),
        }
    }

    fn sees(&self, b: usize, i: usize, j: usize) -> bool {
        let counts = |mask: &Array| mask.data()[b * self.keys + j] != 0.0;
        self.mask.is_none_or(counts) && !(self.options.causal && j > i)
    }

    /// Scores of one query: of the keys that it sees.
    fn scores(&self, b: usize, head: usize, i: usize) -> Vec<(usize, f64)> {
        let q = self.row(self.q, b * self.queries + i, head);
        (0..self.keys)
            .filter(|&j| self.sees(b, i, j))
            .map(|j| {
                let k = self.row(self.k, b * self.keys + j, head);
                (j, self.scale() * dot(q, k))
            })
            .collect()
    }

    /// Largest score, 1 / Σ exp(score − largest), and the probabilities of the keys that a query sees.
    fn probabilities(&self, b: usize, head: usize, i: usize) -> (f64, f64, Vec<(usize, f64)>) {
        let scores = self.scores(b, head, i);
        let max = scores
            .iter()
            .map(|(_, s)| *s)
            .fold(f64::NEG_INFINITY, f64::max);
        let invalid = scores.iter().any(|(_, s)| s.is_nan());
        if max == f64::NEG_INFINITY && !invalid {
            return (0.0, 0.0, Vec::new());
        }
        let sum: f64 = scores.iter().map(|(_, s)| (s - max).exp()).sum();
        let p = scores
            .into_iter()
            .map(|(j, s)| (j, (s - max).exp() / sum))
            .collect();
        (max, sum.recip(), p)
    }

    fn places(&self) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
        let (heads, queries) = (self.options.heads, self.queries);
        (0..self.batch * heads * queries)
            .map(move |n| (n / (heads * queries), n / queries % heads, n % queries))
    }

    /// y and the statistics.
    pub fn attention(&self) -> (Vec<f64>, Vec<f64>) {
        let d = self.columns();
        let mut y = vec![0.0; self.batch * self.queries * self.width];
        let (mut largest, mut inverses) = (Vec::new(), Vec::new());
        for (b, head, i) in self.places() {
            let (max, inverse, p) = self.probabilities(b, head, i);
            largest.push(max);
            inverses.push(inverse);
            let at = (b * self.queries + i) * self.width + head * d;
            for (j, p) in p {
                let v = self.row(self.v, b * self.keys + j, head);
                add(&mut y[at..at + d], p, v);
            }
        }
        (y, [largest, inverses].concat())
    }

    /// dq, dk, dv, each of W columns.
    pub fn gradients(&self, dy: &'a Array) -> [Vec<f64>; 3] {
        let (d, width) = (self.columns(), self.width);
        let mut dq = vec![0.0; self.batch * self.queries * width];
        let mut dk = vec![0.0; self.batch * self.keys * width];
        let mut dv = dk.clone();
        for (b, head, i) in self.places() {
            let (_, _, p) = self.probabilities(b, head, i);
            let row = b * self.queries + i;
            let (q, dy) = (self.row(self.q, row, head), self.row((dy, 0), row, head));
            let v = |j: usize| self.row(self.v, b * self.keys + j, head);
            let mean: f64 = p.iter().map(|&(j, p)| p * dot(dy, v(j))).sum();
            let to_q = row * width + head * d;
            for &(j, p) in &p {
                let ds = self.scale() * p * (dot(dy, v(j)) - mean);
                let key = b * self.keys + j;
                let to_k = key * width + head * d;
                add(&mut dq[to_q..to_q + d], ds, self.row(self.k, key, head));
                add(&mut dk[to_k..to_k + d], ds, q);
                add(&mut dv[to_k..to_k + d], p, dy);
            }
        }
        [dq, dk, dv]
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// sum += factor·x
fn add(sum: &mut [f64], factor: f64, x: &[f64]) {
    for (sum, x) in sum.iter_mut().zip(x) {
        *sum += factor * x;
    }
}
