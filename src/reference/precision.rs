//! What storing a number in an element type does to it.

use crate::types::DType;

/// What is read back after `x` was stored as `dtype`. f32 is kept in f64, so that the interpreter is exact up to f16 storage.
pub(super) fn store(x: f64, dtype: DType) -> f64 {
    match dtype {
        DType::F32 => x,
        DType::F16 => round_to_f16(x),
        // Rust's conversion truncates towards zero and saturates, as WGSL's does.
        DType::U32 => f64::from(x as u32),
    }
}

/// The half-precision number nearest to `x`, ties to even, beyond the largest to infinity.
///
/// `half::f16::from_f64` is not used: on x86 it rounds to f32 first, and rounding twice misses some ties.
fn round_to_f16(x: f64) -> f64 {
    const LARGEST: f64 = 65504.0;
    if !x.is_finite() {
        return x;
    }
    // 10 fraction bits under the leading one; below 2⁻¹⁴ numbers are subnormal and the spacing stays the same.
    let exponent = exponent(x).max(-14);
    let spacing = power_of_two(exponent - 10);
    let rounded = (x / spacing).round_ties_even() * spacing;
    if rounded.abs() > LARGEST {
        return f64::INFINITY.copysign(x);
    }
    rounded
}

/// ⌊log₂|x|⌋ of a normal f64; below −1022 for a subnormal one.
fn exponent(x: f64) -> i32 {
    ((x.to_bits() >> 52) & 0x7ff) as i32 - 1023
}

/// 2ⁿ for n in −1022..=1023.
fn power_of_two(n: i32) -> f64 {
    f64::from_bits(((n + 1023) as u64) << 52)
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    #[test]
    fn every_half_is_a_fixed_point_and_every_midpoint_goes_to_even() {
        let largest = f16::MAX.to_bits();
        for bits in 0..largest {
            let low = f16::from_bits(bits).to_f64();
            let high = f16::from_bits(bits + 1).to_f64();
            let middle = f64::midpoint(low, high);
            let even = if bits % 2 == 0 { low } else { high };
            for sign in [1.0, -1.0] {
                assert_eq!(round_to_f16(sign * low), sign * low);
                assert_eq!(round_to_f16(sign * middle), sign * even);
                assert_eq!(round_to_f16(sign * middle.next_down()), sign * low);
                assert_eq!(round_to_f16(sign * middle.next_up()), sign * high);
            }
        }
        assert_eq!(round_to_f16(65504.0), 65504.0);
    }

    #[test]
    fn overflow_begins_half_a_step_above_the_largest() {
        assert_eq!(round_to_f16(65520f64.next_down()), 65504.0);
        assert_eq!(round_to_f16(65520.0), f64::INFINITY);
        assert_eq!(round_to_f16(-1e300), f64::NEG_INFINITY);
        assert_eq!(round_to_f16(f64::NEG_INFINITY), f64::NEG_INFINITY);
        assert!(round_to_f16(f64::NAN).is_nan());
    }

    #[test]
    fn subnormals_and_signed_zero() {
        let tiny = 2f64.powi(-24);
        assert_eq!(round_to_f16(tiny), tiny);
        assert_eq!(round_to_f16(0.5 * tiny), 0.0);
        assert_eq!(round_to_f16(0.51 * tiny), tiny);
        assert_eq!(round_to_f16(1.5 * tiny), 2.0 * tiny);
        assert_eq!(round_to_f16(8e-9), 0.0);
        assert!(round_to_f16(-1e-310).is_sign_negative());
    }

    #[test]
    fn unsigned_integers_truncate_and_saturate() {
        assert_eq!(store(3.9, DType::U32), 3.0);
        assert_eq!(store(-1.0, DType::U32), 0.0);
        assert_eq!(store(1e10, DType::U32), f64::from(u32::MAX));
        assert_eq!(store(f64::NAN, DType::U32), 0.0);
        assert_eq!(store(0.1, DType::F32), 0.1);
    }
}
