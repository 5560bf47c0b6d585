//! Functions of one and two elements, and their derivatives.

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_PI, PI};

use super::array::Array;
use super::erf::erfc;
use crate::types::{BinaryOp, Broadcast, UnaryOp};

/// [`Op::Unary`](crate::graph::Op::Unary)
pub(super) fn unary(op: UnaryOp, x: &Array) -> Vec<f64> {
    x.data().iter().map(|&x| value(op, x)).collect()
}

/// [`Op::Binary`](crate::graph::Op::Binary)
pub(super) fn binary(op: BinaryOp, broadcast: Broadcast, a: &Array, b: &Array) -> Vec<f64> {
    let cols = a.cols();
    let mut out = Vec::with_capacity(a.data().len());
    for (r, row) in a.row_iter().enumerate() {
        for (c, &x) in row.iter().enumerate() {
            let index = match broadcast {
                Broadcast::Same => r * cols + c,
                Broadcast::Cols => c,
                Broadcast::Rows => r,
                Broadcast::Scalar => 0,
                Broadcast::Groups { period } => r / period * cols + c,
                Broadcast::Tiles { period } => r % period * cols + c,
            };
            out.push(combine(op, x, b.data()[index]));
        }
    }
    out
}

fn combine(op: BinaryOp, a: f64, b: f64) -> f64 {
    match op {
        BinaryOp::Add => a + b,
        BinaryOp::Sub => a - b,
        BinaryOp::Mul => a * b,
        BinaryOp::Div => a / b,
        // Not `f64::max` and `f64::min`, which hide NaN.
        BinaryOp::Max | BinaryOp::Min if a.is_nan() || b.is_nan() => f64::NAN,
        BinaryOp::Max => a.max(b),
        BinaryOp::Min => a.min(b),
        BinaryOp::Greater => indicator(a > b),
        BinaryOp::UnaryGrad(UnaryOp::IsFinite | UnaryOp::Detach) => 0.0,
        BinaryOp::UnaryGrad(op) => derivative(op, a) * b,
    }
}

/// f(x); NaN of NaN, but for `IsFinite`.
fn value(op: UnaryOp, x: f64) -> f64 {
    if let (UnaryOp::GeluTanh | UnaryOp::GeluErf, f64::NEG_INFINITY) = (op, x) {
        // The limit of −x·0.
        return 0.0;
    }
    match op {
        UnaryOp::Identity => x,
        UnaryOp::Affine { scale, offset } => f64::from(scale) * x + f64::from(offset),
        UnaryOp::Clamp { min, max } => clamp(x, f64::from(min), f64::from(max)),
        UnaryOp::Abs => x.abs(),
        UnaryOp::Square => x * x,
        UnaryOp::Sqrt => x.sqrt(),
        UnaryOp::Rsqrt => x.sqrt().recip(),
        UnaryOp::Recip => x.recip(),
        UnaryOp::Exp => x.exp(),
        UnaryOp::Log => x.ln(),
        UnaryOp::Cos => x.cos(),
        UnaryOp::Tanh => x.tanh(),
        UnaryOp::Sigmoid => sigmoid(x),
        UnaryOp::Relu => clamp(x, 0.0, f64::INFINITY),
        UnaryOp::GeluTanh => x * sigmoid(gelu_tanh_argument(x)),
        UnaryOp::GeluErf => x * normal_distribution(x),
        UnaryOp::Detach => x,
        UnaryOp::IsFinite => indicator(x.is_finite()),
    }
}

/// f′(x); NaN of NaN, but for `IsFinite`. Where f has a kink: 0 for Abs and Relu at 0, 1 for Clamp at its bounds.
fn derivative(op: UnaryOp, x: f64) -> f64 {
    if x.is_nan() && !matches!(op, UnaryOp::IsFinite | UnaryOp::Detach) {
        return f64::NAN;
    }
    if let (UnaryOp::GeluTanh | UnaryOp::GeluErf, true) = (op, x.is_infinite()) {
        // The second terms vanish, which infinity times zero does not say.
        return indicator(x > 0.0);
    }
    match op {
        UnaryOp::Identity => 1.0,
        UnaryOp::Affine { scale, .. } => f64::from(scale),
        UnaryOp::Clamp { min, max } => indicator(x >= f64::from(min) && x <= f64::from(max)),
        UnaryOp::Abs => indicator(x > 0.0) - indicator(x < 0.0),
        UnaryOp::Square => 2.0 * x,
        UnaryOp::Sqrt => 0.5 / x.sqrt(),
        UnaryOp::Rsqrt => -0.5 / (x * x.sqrt()),
        UnaryOp::Recip => -1.0 / (x * x),
        UnaryOp::Exp => x.exp(),
        UnaryOp::Log => x.recip(),
        UnaryOp::Cos => -x.sin(),
        UnaryOp::Tanh => x.cosh().powi(-2),
        UnaryOp::Sigmoid => sigmoid(x) * sigmoid(-x),
        UnaryOp::Relu => indicator(x > 0.0),
        UnaryOp::GeluTanh => {
            let u = gelu_tanh_argument(x);
            let slope = 2.0 * FRAC_2_PI.sqrt() * (1.0 + 3.0 * GELU_CUBIC * x * x);
            sigmoid(u) + x * sigmoid(u) * sigmoid(-u) * slope
        }
        UnaryOp::GeluErf => {
            let density = (-0.5 * x * x).exp() / (2.0 * PI).sqrt();
            normal_distribution(x) + x * density
        }
        UnaryOp::IsFinite | UnaryOp::Detach => 0.0,
    }
}

/// Unlike `f64::clamp`, does not panic when min > max.
fn clamp(x: f64, min: f64, max: f64) -> f64 {
    if x > max {
        max
    } else if x < min {
        min
    } else {
        x
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

const GELU_CUBIC: f64 = 0.044715;

/// u with (1 + tanh(√(2/π)(x + 0.044715 x³)))/2 = sigmoid(u); the sigmoid form does not cancel for negative x.
fn gelu_tanh_argument(x: f64) -> f64 {
    2.0 * FRAC_2_PI.sqrt() * (x + GELU_CUBIC * x * x * x)
}

/// Φ(x) = (1 + erf(x/√2))/2.
fn normal_distribution(x: f64) -> f64 {
    0.5 * erfc(-x * FRAC_1_SQRT_2)
}

fn indicator(condition: bool) -> f64 {
    f64::from(u8::from(condition))
}
