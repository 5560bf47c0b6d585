//! Values of all invocations of a workgroup, and the operations on them.

use half::f16;
use naga::{BinaryOperator, MathFunction, RelationalFunction, ScalarKind, UnaryOperator};

/// Element types. Halves are kept as the f32 of the same value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scalar {
    Bool,
    U32,
    I32,
    F32,
    F16,
}

impl Scalar {
    pub fn new(scalar: naga::Scalar) -> Self {
        match (scalar.kind, scalar.width) {
            (ScalarKind::Bool, _) => Self::Bool,
            (ScalarKind::Uint, 4) => Self::U32,
            (ScalarKind::Sint, 4) => Self::I32,
            (ScalarKind::Float, 4) => Self::F32,
            (ScalarKind::Float, 2) => Self::F16,
            other => panic!("no kernel uses {other:?}"),
        }
    }

    /// Bytes in memory.
    pub fn size(self) -> u32 {
        if self == Self::F16 { 2 } else { 4 }
    }

    fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16)
    }

    fn rounded(self, x: f32) -> u32 {
        match self {
            Self::F16 => f16::from_f32(x).to_f32().to_bits(),
            _ => x.to_bits(),
        }
    }

    /// From memory.
    pub fn decode(self, bits: u32) -> u32 {
        match self {
            Self::F16 => f16::from_bits(bits as u16).to_f32().to_bits(),
            _ => bits,
        }
    }

    /// To memory.
    pub fn encode(self, bits: u32) -> u32 {
        match self {
            Self::F16 => u32::from(f16::from_f32(f32::from_bits(bits)).to_bits()),
            _ => bits,
        }
    }
}

/// Components of every invocation: component c of invocation l at c·lanes + l.
#[derive(Clone, Debug)]
pub(super) struct Value {
    pub lanes: usize,
    pub bits: Vec<u32>,
}

impl Value {
    pub fn zero(lanes: usize, components: usize) -> Self {
        Self::splat(lanes, components, 0)
    }

    pub fn splat(lanes: usize, components: usize, bits: u32) -> Self {
        Self {
            lanes,
            bits: vec![bits; lanes * components],
        }
    }

    pub fn components(&self) -> usize {
        self.bits.len() / self.lanes
    }

    pub fn component(&self, c: usize) -> &[u32] {
        &self.bits[c * self.lanes..(c + 1) * self.lanes]
    }

    /// Components one behind the other.
    pub fn join<'a>(lanes: usize, parts: impl Iterator<Item = &'a [u32]>) -> Self {
        let mut bits = Vec::with_capacity(4 * lanes);
        for part in parts {
            bits.extend_from_slice(part);
        }
        Self { lanes, bits }
    }

    fn map(&self, f: impl Fn(u32) -> u32) -> Self {
        Self {
            lanes: self.lanes,
            bits: self.bits.iter().map(|&x| f(x)).collect(),
        }
    }

    /// Component by component; one component is taken for all.
    fn zip(&self, other: &Self, f: impl Fn(u32, u32) -> u32) -> Self {
        let components = self.components().max(other.components());
        let mut bits = Vec::with_capacity(components * self.lanes);
        for c in 0..components {
            let a = self.component(c.min(self.components() - 1));
            let b = other.component(c.min(other.components() - 1));
            bits.extend(a.iter().zip(b).map(|(&a, &b)| f(a, b)));
        }
        Self {
            lanes: self.lanes,
            bits,
        }
    }
}

fn f(bits: u32) -> f32 {
    f32::from_bits(bits)
}

pub(super) fn unary(op: UnaryOperator, scalar: Scalar, x: &Value) -> Value {
    match (op, scalar.is_float()) {
        (UnaryOperator::Negate, true) => x.map(|x| (-f(x)).to_bits()),
        (UnaryOperator::Negate, false) => x.map(u32::wrapping_neg),
        (UnaryOperator::LogicalNot, _) => x.map(|x| u32::from(x == 0)),
        (UnaryOperator::BitwiseNot, _) => x.map(|x| !x),
    }
}

pub(super) fn binary(op: BinaryOperator, scalar: Scalar, a: &Value, b: &Value) -> Value {
    use BinaryOperator as Op;
    if scalar.is_float() {
        let float = |g: fn(f32, f32) -> f32| a.zip(b, |a, b| scalar.rounded(g(f(a), f(b))));
        let compare = |g: fn(f32, f32) -> bool| a.zip(b, |a, b| u32::from(g(f(a), f(b))));
        return match op {
            Op::Add => float(|a, b| a + b),
            Op::Subtract => float(|a, b| a - b),
            Op::Multiply => float(|a, b| a * b),
            Op::Divide => float(|a, b| a / b),
            Op::Modulo => float(|a, b| a % b),
            Op::Equal => compare(|a, b| a == b),
            Op::NotEqual => compare(|a, b| a != b),
            Op::Less => compare(|a, b| a < b),
            Op::LessEqual => compare(|a, b| a <= b),
            Op::Greater => compare(|a, b| a > b),
            Op::GreaterEqual => compare(|a, b| a >= b),
            _ => panic!("{op:?} of floats"),
        };
    }
    let signed = scalar == Scalar::I32;
    let compare = |u: fn(&u32, &u32) -> bool, i: fn(&i32, &i32) -> bool| {
        a.zip(b, |a, b| {
            u32::from(match signed {
                true => i(&(a as i32), &(b as i32)),
                false => u(&a, &b),
            })
        })
    };
    match op {
        Op::Add => a.zip(b, u32::wrapping_add),
        Op::Subtract => a.zip(b, u32::wrapping_sub),
        Op::Multiply => a.zip(b, u32::wrapping_mul),
        // What an invocation that takes no part divides by does not matter.
        Op::Divide if signed => a.zip(b, |a, b| {
            (a as i32).checked_div(b as i32).unwrap_or(0) as u32
        }),
        Op::Modulo if signed => a.zip(b, |a, b| {
            (a as i32).checked_rem(b as i32).unwrap_or(0) as u32
        }),
        Op::Divide => a.zip(b, |a, b| a.checked_div(b).unwrap_or(0)),
        Op::Modulo => a.zip(b, |a, b| a.checked_rem(b).unwrap_or(0)),
        Op::Equal => a.zip(b, |a, b| u32::from(a == b)),
        Op::NotEqual => a.zip(b, |a, b| u32::from(a != b)),
        Op::Less => compare(u32::lt, i32::lt),
        Op::LessEqual => compare(u32::le, i32::le),
        Op::Greater => compare(u32::gt, i32::gt),
        Op::GreaterEqual => compare(u32::ge, i32::ge),
        Op::And | Op::LogicalAnd => a.zip(b, |a, b| a & b),
        Op::InclusiveOr | Op::LogicalOr => a.zip(b, |a, b| a | b),
        Op::ExclusiveOr => a.zip(b, |a, b| a ^ b),
        Op::ShiftLeft => a.zip(b, |a, b| a.wrapping_shl(b)),
        Op::ShiftRight if signed => a.zip(b, |a, b| (a as i32).wrapping_shr(b) as u32),
        Op::ShiftRight => a.zip(b, |a, b| a.wrapping_shr(b)),
    }
}

pub(super) fn select(condition: &Value, accept: &Value, reject: &Value) -> Value {
    let lanes = accept.lanes;
    let components = accept.components();
    let mut bits = Vec::with_capacity(components * lanes);
    for c in 0..components {
        let chosen = condition.component(c.min(condition.components() - 1));
        let both = accept.component(c).iter().zip(reject.component(c));
        bits.extend(
            both.zip(chosen)
                .map(|((&a, &r), &c)| if c != 0 { a } else { r }),
        );
    }
    Value { lanes, bits }
}

pub(super) fn relational(fun: RelationalFunction, x: &Value) -> Value {
    let fold = |start: u32, g: fn(u32, u32) -> u32| {
        let lane = |l: usize| {
            (0..x.components()).fold(start, |sum, c| g(sum, u32::from(x.component(c)[l] != 0)))
        };
        Value {
            lanes: x.lanes,
            bits: (0..x.lanes).map(lane).collect(),
        }
    };
    match fun {
        RelationalFunction::All => fold(1, |a, b| a & b),
        RelationalFunction::Any => fold(0, |a, b| a | b),
        RelationalFunction::IsNan => x.map(|x| u32::from(f(x).is_nan())),
        RelationalFunction::IsInf => x.map(|x| u32::from(f(x).is_infinite())),
    }
}

pub(super) fn math(fun: MathFunction, scalar: Scalar, args: &[&Value]) -> Value {
    use MathFunction as Fun;
    let x = args[0];
    let float = |g: fn(f32) -> f32| x.map(|x| scalar.rounded(g(f(x))));
    let signed = scalar == Scalar::I32;
    let least = |a: u32, b: u32| match (scalar.is_float(), signed) {
        (true, _) => f(a).min(f(b)).to_bits(),
        (false, true) => (a as i32).min(b as i32) as u32,
        (false, false) => a.min(b),
    };
    let most = |a: u32, b: u32| match (scalar.is_float(), signed) {
        (true, _) => f(a).max(f(b)).to_bits(),
        (false, true) => (a as i32).max(b as i32) as u32,
        (false, false) => a.max(b),
    };
    match fun {
        Fun::Min => x.zip(args[1], least),
        Fun::Max => x.zip(args[1], most),
        Fun::Clamp => x.zip(args[1], most).zip(args[2], least),
        Fun::Abs if signed => x.map(|x| (x as i32).unsigned_abs()),
        Fun::Abs if scalar.is_float() => float(f32::abs),
        Fun::Abs => x.clone(),
        Fun::Sign => float(|x| if x == 0.0 { 0.0 } else { x.signum() }),
        Fun::Exp => float(f32::exp),
        Fun::Exp2 => float(f32::exp2),
        Fun::Log => float(f32::ln),
        Fun::Log2 => float(f32::log2),
        Fun::Sqrt => float(f32::sqrt),
        Fun::InverseSqrt => float(|x| 1.0 / x.sqrt()),
        Fun::Sin => float(f32::sin),
        Fun::Cos => float(f32::cos),
        Fun::Tanh => float(f32::tanh),
        Fun::Floor => float(f32::floor),
        Fun::Ceil => float(f32::ceil),
        Fun::Round => float(f32::round_ties_even),
        Fun::Trunc => float(f32::trunc),
        Fun::Fma => {
            let product = binary(BinaryOperator::Multiply, scalar, x, args[1]);
            binary(BinaryOperator::Add, scalar, &product, args[2])
        }
        Fun::Dot => {
            let products = binary(BinaryOperator::Multiply, scalar, x, args[1]);
            let lane = |l: usize| {
                let terms = (0..products.components()).map(|c| f(products.component(c)[l]));
                scalar.rounded(terms.sum())
            };
            Value {
                lanes: x.lanes,
                bits: (0..x.lanes).map(lane).collect(),
            }
        }
        Fun::CountOneBits => x.map(u32::count_ones),
        Fun::CountLeadingZeros => x.map(u32::leading_zeros),
        Fun::CountTrailingZeros => x.map(u32::trailing_zeros),
        Fun::Pack2x16float => {
            let halves = x.component(0).iter().zip(x.component(1));
            let pack = |(&low, &high): (&u32, &u32)| {
                Scalar::F16.encode(low) | Scalar::F16.encode(high) << 16
            };
            Value {
                lanes: x.lanes,
                bits: halves.map(pack).collect(),
            }
        }
        Fun::Unpack2x16float => {
            let low = x.map(|x| Scalar::F16.decode(x & 0xffff));
            let high = x.map(|x| Scalar::F16.decode(x >> 16));
            Value::join(x.lanes, [low.component(0), high.component(0)].into_iter())
        }
        _ => panic!("{fun:?} is not known here: add it"),
    }
}

/// A conversion, or, where `bits`, the same bits.
pub(super) fn cast(from: Scalar, to: Scalar, bits: bool, x: &Value) -> Value {
    if bits {
        assert!(from.size() == 4 && to.size() == 4, "halves to other bits");
        return x.clone();
    }
    match (from, to) {
        (from, Scalar::F16) if from.is_float() => x.map(|x| Scalar::F16.rounded(f(x))),
        (from, Scalar::F32) if from.is_float() => x.clone(),
        (Scalar::I32, to) if to.is_float() => x.map(|x| to.rounded(x as i32 as f32)),
        (Scalar::U32 | Scalar::Bool, to) if to.is_float() => x.map(|x| to.rounded(x as f32)),
        (from, Scalar::U32) if from.is_float() => x.map(|x| f(x) as u32),
        (from, Scalar::I32) if from.is_float() => x.map(|x| f(x) as i32 as u32),
        (from, Scalar::Bool) if from.is_float() => x.map(|x| u32::from(f(x) != 0.0)),
        (_, Scalar::Bool) => x.map(|x| u32::from(x != 0)),
        _ => x.clone(),
    }
}
