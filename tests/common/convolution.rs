//! What a 1-D convolution is.

/// bias[o] + Σ w[o, c, j]·x[b, t·stride + j·dilation − before, c], weights in the host's order.
/// Extents are samples, time steps, channels, outputs, taps, dilation.
pub fn by_definition(
    [b, time, channels, outputs, kernel, dilation]: [usize; 6],
    (steps, stride, before): (usize, usize, usize),
    x: &[f32],
    w: &[f32],
    bias: &[f32],
) -> Vec<f64> {
    let mut y = Vec::new();
    for sample in 0..b {
        for t in 0..steps {
            for o in 0..outputs {
                let mut sum = f64::from(bias[o]);
                for c in 0..channels {
                    for j in 0..kernel {
                        let place = t * stride + j * dilation;
                        if place >= before && place - before < time {
                            let x = x[(sample * time + place - before) * channels + c];
                            let w = w[(o * channels + c) * kernel + j];
                            sum += f64::from(x) * f64::from(w);
                        }
                    }
                }
                y.push(sum);
            }
        }
    }
    y
}
