//! Elementwise functions as WGSL, one definition each: values, derivatives, and what they do with NaN and infinities.
//!
//! NaN is never hidden: a function of NaN is NaN, except `IsFinite` and `Greater`, which are 0. WGSL lets compilers assume that no
//! float is NaN, and lets `min`, `max`, `clamp`, `exp` and others return a number for it. So these functions test the bits, about which
//! compilers may assume nothing, and `or_nan` passes NaN on. Sums, products and quotients pass it on by themselves.

use crate::types::{BinaryOp, UnaryOp};

/// Name and text of every helper function. A function comes before those that it calls.
const LIBRARY: [(&str, &str); 21] = [
    ("relu_grad", RELU_GRAD),
    ("abs_grad", ABS_GRAD),
    ("gelu_tanh_grad", GELU_TANH_GRAD),
    ("gelu_tanh", GELU_TANH),
    ("gelu_tanh_power", GELU_TANH_POWER),
    ("gelu_erf_grad", GELU_ERF_GRAD),
    ("gelu_erf", GELU_ERF),
    ("normal_tail", NORMAL_TAIL),
    ("tanh_grad", TANH_GRAD),
    ("tanh_value", TANH),
    ("sigmoid_grad", SIGMOID_GRAD),
    ("sigmoid", SIGMOID),
    ("logistic", LOGISTIC),
    ("quotient", QUOTIENT),
    ("greater", GREATER),
    ("logarithm", LOGARITHM),
    ("reduced_angle", REDUCED_ANGLE),
    ("pcg4d", PCG4D),
    ("or_undefined", OR_UNDEFINED),
    ("or_nan", OR_NAN),
    ("is_nan", IS_NAN),
];

/// The helper functions that `body` calls, and those that they call.
pub(super) fn library(body: &str) -> String {
    let mut text = String::new();
    for (name, function) in LIBRARY {
        let call = format!("{name}(");
        let calls = |text: &str| {
            let before = |at: usize| text[..at].chars().next_back();
            let mut places = text.match_indices(&call);
            places.any(|(at, _)| before(at).is_none_or(|c| !c.is_alphanumeric() && c != '_'))
        };
        if calls(body) || calls(&text) {
            text.push_str(function);
        }
    }
    text
}

const IS_NAN: &str = "\
fn is_nan(x: vec4<f32>) -> vec4<bool> {
    return (bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
}
";

/// y, or NaN if x is NaN.
const OR_NAN: &str = "\
fn or_nan(y: vec4<f32>, x: vec4<f32>) -> vec4<f32> {
    return select(y, x, is_nan(x));
}
";

/// y, or NaN if x is infinite or NaN.
const OR_UNDEFINED: &str = "\
fn or_undefined(y: vec4<f32>, x: vec4<f32>) -> vec4<f32> {
    let bits = bitcast<vec4<u32>>(x);
    let quiet = bitcast<vec4<f32>>(bits | vec4<u32>(0x00400000u));
    return select(y, quiet, (bits & vec4<u32>(0x7f800000u)) == vec4<u32>(0x7f800000u));
}
";

const RELU_GRAD: &str = "\
fn relu_grad(x: vec4<f32>) -> vec4<f32> {
    return or_nan(select(vec4<f32>(), vec4<f32>(1.0), x > vec4<f32>()), x);
}
";

const ABS_GRAD: &str = "\
fn abs_grad(x: vec4<f32>) -> vec4<f32> {
    return or_nan(sign(x), x);
}
";

/// 1/(1 + exp(−x)), computed without an exponential that overflows. Small results keep all their digits.
const LOGISTIC: &str = "\
fn logistic(x: vec4<f32>) -> vec4<f32> {
    let e = exp(-abs(x));
    return select(vec4<f32>(1.0), e, x < vec4<f32>()) / (1.0 + e);
}
";

const SIGMOID: &str = "\
fn sigmoid(x: vec4<f32>) -> vec4<f32> {
    return or_nan(logistic(x), x);
}
";

const SIGMOID_GRAD: &str = "\
fn sigmoid_grad(x: vec4<f32>) -> vec4<f32> {
    let e = exp(-abs(x));
    let d = 1.0 + e;
    return or_nan(e / (d * d), x);
}
";

/// Near zero, where 1 − exp(−2|x|) loses digits, it is the polynomial of Cephes' `tanhf` (Moshier 1989). Its relative error is 1e-7.
const TANH: &str = "\
fn tanh_value(x: vec4<f32>) -> vec4<f32> {
    let a = abs(x);
    let e = exp(-2.0 * a);
    let far = (1.0 - e) / (1.0 + e);
    let z = x * x;
    let p = -0.333332819 + z * (0.133314422 + z * (-0.0537397156 + z * (0.0206390888 + z * -0.00570498872)));
    let near = x + x * (z * p);
    return or_nan(select(select(far, -far, x < vec4<f32>()), near, a < vec4<f32>(0.625)), x);
}
";

const TANH_GRAD: &str = "\
fn tanh_grad(x: vec4<f32>) -> vec4<f32> {
    let e = exp(-2.0 * abs(x));
    let d = 1.0 + e;
    return or_nan(4.0 * e / (d * d), x);
}
";

/// (1 + tanh u)/2 is the logistic function of 2u, 1/(1 + 2^q), which does not cancel for negative x. At x = −11 the power
/// overflows, and the quotient is 0.
const GELU_TANH_POWER: &str = "\
fn gelu_tanh_power(x: vec4<f32>) -> vec4<f32> {
    return 1.0 + exp2(x * (-2.3022082 - 0.10294324 * x * x));
}
";

const GELU_TANH: &str = "\
fn gelu_tanh(x: vec4<f32>) -> vec4<f32> {
    let c = max(x, vec4<f32>(-11.0));
    return or_nan(c / gelu_tanh_power(c), x);
}
";

/// Beyond ±11 the result is 0 or 1. There x³ must not turn it into NaN.
const GELU_TANH_GRAD: &str = "\
fn gelu_tanh_grad(x: vec4<f32>) -> vec4<f32> {
    let c = min(max(x, vec4<f32>(-11.0)), vec4<f32>(11.0));
    let s = 1.0 / gelu_tanh_power(c);
    return or_nan(s + c * s * (1.0 - s) * (1.5957691 + 0.21406443 * c * c), x);
}
";

/// Φ(−|x|) of the normal distribution, given e = exp(−x²/2): Abramowitz & Stegun 7.1.26, absolute error at most 7.5e-8.
const NORMAL_TAIL: &str = "\
fn normal_tail(x: vec4<f32>, e: vec4<f32>) -> vec4<f32> {
    let t = 1.0 / (1.0 + 0.2316418882 * abs(x));
    return e * (t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))));
}
";

/// For x below −14 the product is zero in f32.
const GELU_ERF: &str = "\
fn gelu_erf(x: vec4<f32>) -> vec4<f32> {
    let c = max(x, vec4<f32>(-14.0));
    let tail = normal_tail(c, exp(-0.5 * c * c));
    return or_nan(c * select(1.0 - tail, tail, c < vec4<f32>()), x);
}
";

const GELU_ERF_GRAD: &str = "\
fn gelu_erf_grad(x: vec4<f32>) -> vec4<f32> {
    let c = min(max(x, vec4<f32>(-14.0)), vec4<f32>(14.0));
    let e = exp(-0.5 * c * c);
    let tail = normal_tail(c, e);
    return or_nan(select(1.0 - tail, tail, c < vec4<f32>()) + 0.3989422804 * c * e, x);
}
";

/// If b exceeds 2¹²⁶, its reciprocal is subnormal, and a device may replace it by zero. So a and b are scaled down first.
const QUOTIENT: &str = "\
fn quotient(a: vec4<f32>, b: vec4<f32>) -> vec4<f32> {
    let scale = select(vec4<f32>(1.0), vec4<f32>(0.0625), abs(b) > vec4<f32>(8.0e37));
    return (a * scale) / (b * scale);
}
";

/// Subnormal numbers are scaled up first, because the logarithm of some devices is wrong for them and does not treat them as zero either.
const LOGARITHM: &str = "\
fn logarithm(x: vec4<f32>) -> vec4<f32> {
    let small = x < vec4<f32>(1.1754944e-38);
    let y = log(select(x, 16777216.0 * x, small)) - select(vec4<f32>(), vec4<f32>(16.635532333438686), small);
    return or_nan(y, x);
}
";

const GREATER: &str = "\
fn greater(a: vec4<f32>, b: vec4<f32>) -> vec4<f32> {
    return select(vec4<f32>(), vec4<f32>(1.0), (a > b) & !(is_nan(a) | is_nan(b)));
}
";

/// x minus a multiple of 2π, within ±π for |x| up to 1e4. Hardware functions lose digits outside that range. NaN for infinities.
const REDUCED_ANGLE: &str = "\
fn reduced_angle(x: vec4<f32>) -> vec4<f32> {
    let turns = round(x * 0.15915494);
    // 2π in two parts; the first has 8 bits, so that its multiples are exact.
    return or_undefined((x - turns * 6.28125) - turns * 0.0019353071795864769, x);
}
";

/// Hashes four numbers into four (Jarzynski & Olano, Hash Functions for GPU Rendering, JCGT 9(3), 2020).
const PCG4D: &str = include_str!("../../wgsl/shared/pcg4d.wgsl");

/// A WGSL f32 literal. WGSL has no literals for infinities and NaN, so these are written as their bits.
pub(super) fn literal(number: f32) -> String {
    if number.is_finite() {
        format!("f32({number:?})")
    } else {
        format!("bitcast<f32>({}u)", number.to_bits())
    }
}

/// WGSL expression for `op` of the register `x`.
pub(super) fn unary(op: UnaryOp, x: &str) -> String {
    match op {
        UnaryOp::Identity => x.to_owned(),
        UnaryOp::Affine { scale, offset } => {
            let scaled = match scale {
                1.0 => x.to_owned(),
                // Compilers may take 0·x for zero, whatever x is.
                0.0 => format!("or_undefined(vec4<f32>(), {x})"),
                scale => format!("{} * {x}", literal(scale)),
            };
            match offset {
                0.0 => scaled,
                offset => format!("{scaled} + {}", literal(offset)),
            }
        }
        UnaryOp::Clamp { min, max } => format!(
            "or_nan(min(max({x}, vec4<f32>({})), vec4<f32>({})), {x})",
            literal(min),
            literal(max)
        ),
        UnaryOp::Abs => format!("abs({x})"),
        UnaryOp::Square => format!("{x} * {x}"),
        UnaryOp::Sqrt => format!("or_nan(sqrt({x}), {x})"),
        UnaryOp::Rsqrt => format!("or_nan(inverseSqrt({x}), {x})"),
        UnaryOp::Recip => format!("1.0 / {x}"),
        UnaryOp::Exp => format!("or_nan(exp({x}), {x})"),
        UnaryOp::Log => format!("logarithm({x})"),
        UnaryOp::Cos => format!("or_undefined(cos(reduced_angle({x})), {x})"),
        UnaryOp::Tanh => format!("tanh_value({x})"),
        UnaryOp::Sigmoid => format!("sigmoid({x})"),
        UnaryOp::Relu => format!("or_nan(max({x}, vec4<f32>()), {x})"),
        UnaryOp::GeluTanh => format!("gelu_tanh({x})"),
        UnaryOp::GeluErf => format!("gelu_erf({x})"),
        UnaryOp::Detach => x.to_owned(),
        // From the bits: compilers may assume that floats are finite.
        UnaryOp::IsFinite => format!(
            "select(vec4<f32>(), vec4<f32>(1.0), (bitcast<vec4<u32>>({x}) & vec4<u32>(0x7f800000u)) != vec4<u32>(0x7f800000u))"
        ),
    }
}

/// WGSL expression for `op` of the registers `a` and `b`.
pub(super) fn binary(op: BinaryOp, a: &str, b: &str) -> String {
    match op {
        BinaryOp::Add => format!("{a} + {b}"),
        BinaryOp::Sub => format!("{a} - {b}"),
        BinaryOp::Mul => format!("{a} * {b}"),
        BinaryOp::Div => format!("quotient({a}, {b})"),
        BinaryOp::Max => format!("or_nan(or_nan(max({a}, {b}), {a}), {b})"),
        BinaryOp::Min => format!("or_nan(or_nan(min({a}, {b}), {a}), {b})"),
        BinaryOp::Greater => format!("greater({a}, {b})"),
        BinaryOp::UnaryGrad(UnaryOp::IsFinite | UnaryOp::Detach) => "vec4<f32>()".to_owned(),
        BinaryOp::UnaryGrad(op) => format!("{b} * ({})", derivative(op, a)),
    }
}

fn derivative(op: UnaryOp, x: &str) -> String {
    match op {
        UnaryOp::Identity => format!("or_nan(vec4<f32>(1.0), {x})"),
        UnaryOp::Affine { scale, .. } => format!("or_nan(vec4<f32>({}), {x})", literal(scale)),
        UnaryOp::Clamp { min, max } => format!(
            "or_nan(select(vec4<f32>(), vec4<f32>(1.0), ({x} >= vec4<f32>({})) & ({x} <= vec4<f32>({}))), {x})",
            literal(min),
            literal(max)
        ),
        UnaryOp::Abs => format!("abs_grad({x})"),
        UnaryOp::Square => format!("2.0 * {x}"),
        UnaryOp::Sqrt => format!("or_nan(0.5 * inverseSqrt({x}), {x})"),
        UnaryOp::Rsqrt => format!("or_nan(-0.5 * inverseSqrt({x}) / {x}, {x})"),
        // Not −1/x², whose square overflows and vanishes where the derivative does not.
        UnaryOp::Recip => format!("-(1.0 / {x}) * (1.0 / {x})"),
        UnaryOp::Exp => format!("or_nan(exp({x}), {x})"),
        UnaryOp::Log => format!("1.0 / {x}"),
        UnaryOp::Cos => format!("or_undefined(-sin(reduced_angle({x})), {x})"),
        UnaryOp::Tanh => format!("tanh_grad({x})"),
        UnaryOp::Sigmoid => format!("sigmoid_grad({x})"),
        UnaryOp::Relu => format!("relu_grad({x})"),
        UnaryOp::GeluTanh => format!("gelu_tanh_grad({x})"),
        UnaryOp::GeluErf => format!("gelu_erf_grad({x})"),
        UnaryOp::IsFinite | UnaryOp::Detach => "vec4<f32>()".to_owned(),
    }
}
