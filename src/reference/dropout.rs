//! Dropout with draws from a counter.

use super::array::Array;

/// [`Op::Dropout`](crate::graph::Op::Dropout)
pub(super) fn dropout(rate: f32, stream: u32, x: &Array, counter: f64) -> Vec<f64> {
    let vectors = x.cols().div_ceil(4);
    let threshold = (f64::from(rate) * 2f64.powi(32)).round() as u32;
    // Rounded to f32, as kernels hold it.
    let scale = f64::from((1.0 / (1.0 - f64::from(rate))) as f32);
    let mut out = Vec::with_capacity(x.data().len());
    for (r, row) in x.row_iter().enumerate() {
        for (i, run) in row.chunks(4).enumerate() {
            let place = (r * vectors + i) as u32;
            let draws = pcg4d([place, stream, counter as u32, 0]);
            let kept = run
                .iter()
                .zip(draws)
                .map(|(&x, draw)| match draw < threshold {
                    true => 0.0,
                    false => scale * x,
                });
            out.extend(kept);
        }
    }
    out
}

/// Four numbers hashed into four: Jarzynski & Olano, Hash Functions for GPU Rendering, JCGT 9(3), 2020.
pub(super) fn pcg4d(numbers: [u32; 4]) -> [u32; 4] {
    let step = |n: u32| n.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
    mix(mix(numbers.map(step)).map(|n| n ^ (n >> 16)))
}

fn mix([mut x, mut y, mut z, mut w]: [u32; 4]) -> [u32; 4] {
    x = x.wrapping_add(y.wrapping_mul(w));
    y = y.wrapping_add(z.wrapping_mul(x));
    z = z.wrapping_add(x.wrapping_mul(y));
    w = w.wrapping_add(y.wrapping_mul(z));
    [x, y, z, w]
}
