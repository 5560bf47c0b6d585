//! The complementary error function to double precision.
//!
//! Two expansions of Abramowitz & Stegun, *Handbook of Mathematical Functions*, chapter 7, neither of which cancels:
//! series 7.1.6 near zero, continued fraction 7.1.14 beyond.

use std::f64::consts::FRAC_2_SQRT_PI;

/// Where the continued fraction takes over from the series.
const SWITCH: f64 = 2.0;

/// Levels of the continued fraction; at [`SWITCH`], where it converges most slowly, 60 reach double precision.
const LEVELS: u32 = 80;

/// 1 − erf x, where erf x = 2/√π ∫₀ˣ e^(−t²) dt; keeps its digits where it is small.
pub(super) fn erfc(x: f64) -> f64 {
    if x.abs() < SWITCH {
        1.0 - series(x)
    } else if x < 0.0 {
        2.0 - tail(-x)
    } else {
        tail(x)
    }
}

/// erf x = 2/√π e^(−x²) Σₙ 2ⁿ x²ⁿ⁺¹ / (1·3·…·(2n + 1)), all terms of one sign (A&S 7.1.6).
fn series(x: f64) -> f64 {
    let mut term = x;
    let mut sum = x;
    let mut denominator = 1.0;
    while term.abs() > f64::EPSILON / 4.0 * sum.abs() {
        denominator += 2.0;
        term *= 2.0 * x * x / denominator;
        sum += term;
    }
    FRAC_2_SQRT_PI * (-x * x).exp() * sum
}

/// erfc x for x ≥ [`SWITCH`]: √π e^(x²) erfc x = 1/(x + (1/2)/(x + 1/(x + (3/2)/(x + 2/(x + …))))) (A&S 7.1.14).
fn tail(x: f64) -> f64 {
    let mut fraction = x;
    for level in (1..=LEVELS).rev() {
        fraction = x + 0.5 * f64::from(level) / fraction;
    }
    0.5 * FRAC_2_SQRT_PI * (-x * x).exp() / fraction
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Computed with mpmath at 40 digits.
    const ERF: [(f64, f64); 10] = [
        (0.0, 0.0),
        (1e-10, 1.128_379_167_095_512_6e-10),
        (0.1, 0.112_462_916_018_284_9),
        (0.5, 0.520_499_877_813_046_5),
        (1.0, 0.842_700_792_949_714_9),
        (1.5, 0.966_105_146_475_310_7),
        (1.9999, 0.995_320_197_907_029_4),
        (2.5, 0.999_593_047_982_555),
        (3.0, 0.999_977_909_503_001_4),
        (4.0, 0.999_999_984_582_742_1),
    ];
    const ERFC: [(f64, f64); 7] = [
        (0.5, 0.479_500_122_186_953_5),
        (1.5, 0.033_894_853_524_689_27),
        (2.0, 0.004_677_734_981_047_266),
        (3.0, 2.209_049_699_858_544e-5),
        (5.0, 1.537_459_794_428_035e-12),
        (10.0, 2.088_487_583_762_545e-45),
        (20.0, 5.395_865_611_607_901e-176),
    ];

    #[test]
    fn erf_is_exact_to_1e_14() {
        for (x, expected) in ERF {
            let positive = 1.0 - erfc(x);
            let negative = erfc(-x) - 1.0;
            assert!((positive - expected).abs() < 1e-14, "{x}: {positive}");
            assert!((negative - expected).abs() < 1e-14, "{x}: {negative}");
        }
        assert!((series(1e-10) / 1.128_379_167_095_512_6e-10 - 1.0).abs() < 1e-15);
    }

    #[test]
    fn the_tail_keeps_its_relative_precision() {
        for (x, expected) in ERFC {
            let relative = erfc(x) / expected - 1.0;
            assert!(relative.abs() < 5e-14, "{x}: {relative}");
        }
    }

    #[test]
    fn both_expansions_agree_where_they_meet() {
        assert!((1.0 - series(SWITCH) - tail(SWITCH)).abs() < 1e-15);
    }

    #[test]
    fn limits() {
        assert_eq!(erfc(f64::INFINITY), 0.0);
        assert_eq!(erfc(f64::NEG_INFINITY), 2.0);
        assert!(erfc(f64::NAN).is_nan());
    }
}
