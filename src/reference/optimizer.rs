//! AdamW on one parameter.

use crate::types::Rates;

/// The constants of [`Op::AdamW`](crate::graph::Op::AdamW) for one parameter.
pub(super) struct Constants {
    pub beta1: f32,
    pub beta2: f32,
    pub eps: f32,
    pub rates: Rates,
}

/// The operand `hyper` of [`Op::AdamW`](crate::graph::Op::AdamW).
pub(super) struct Hyper {
    pub lr: f64,
    pub scale: f64,
}

impl Constants {
    /// One step of the parameter `p`, its moments `m` and `v`, and its bias corrections `c`.
    pub(super) fn step(
        &self,
        hyper: &Hyper,
        gradient: &[f64],
        p: &mut [f64],
        m: &mut [f64],
        v: &mut [f64],
        c: &mut [f64; 2],
    ) {
        let beta1 = f64::from(self.beta1);
        let beta2 = f64::from(self.beta2);
        for (c, beta) in c.iter_mut().zip([beta1, beta2]) {
            *c = beta * *c + (1.0 - beta);
        }
        let rate = hyper.lr * f64::from(self.rates.lr_scale);
        for (i, gradient) in gradient.iter().enumerate() {
            let g = hyper.scale * gradient;
            m[i] = beta1 * m[i] + (1.0 - beta1) * g;
            v[i] = beta2 * v[i] + (1.0 - beta2) * g * g;
            let decay = f64::from(self.rates.weight_decay) * p[i];
            let update = (m[i] / c[0]) / ((v[i] / c[1]).sqrt() + f64::from(self.eps));
            p[i] -= rate * (decay + update);
        }
    }
}
