use super::*;
use crate::types::UnaryOp;

const SMOOTH: [UnaryOp; 12] = [
    UnaryOp::Identity,
    UnaryOp::Affine {
        scale: -1.5,
        offset: 0.25,
    },
    UnaryOp::Square,
    UnaryOp::Sqrt,
    UnaryOp::Rsqrt,
    UnaryOp::Recip,
    UnaryOp::Exp,
    UnaryOp::Log,
    UnaryOp::Cos,
    UnaryOp::Tanh,
    UnaryOp::GeluTanh,
    UnaryOp::GeluErf,
];

fn unary(op: UnaryOp, x: &[f64]) -> Result<Vec<f64>> {
    let x = Array::new(&[x.len()], x.to_vec())?;
    Ok(apply_f32(Op::Unary(op), [&x], x.shape().dims())?
        .data()
        .to_vec())
}

/// f′(x)·dy with dy = 3.
fn derivative(op: UnaryOp, x: &[f64]) -> Result<Vec<f64>> {
    let x = Array::new(&[x.len()], x.to_vec())?;
    let op = Op::Binary(BinaryOp::UnaryGrad(op), Broadcast::Scalar);
    Ok(apply_f32(op, [&x, &Array::scalar(3.0)], x.shape().dims())?
        .data()
        .to_vec())
}

fn check_against_differences(op: UnaryOp, x: &[f64]) -> Result<()> {
    let array = Array::new(&[x.len()], x.to_vec())?;
    let dims: &[usize] = &[x.len()];
    let weights = Array::filled(dims, 3.0)?;
    let expected = numeric(
        Op::Unary(op),
        &f32s([&array]),
        &[(dims, DType::F32)],
        &weights,
        0,
    )?;
    assert_close(&derivative(op, x)?, expected.data(), 1e-8);
    Ok(())
}

#[test]
fn values() -> Result<()> {
    let cases: [(UnaryOp, f64, f64); 14] = [
        (UnaryOp::Identity, -2.5, -2.5),
        (
            UnaryOp::Affine {
                scale: 2.0,
                offset: -1.0,
            },
            3.0,
            5.0,
        ),
        (UnaryOp::Abs, -2.0, 2.0),
        (UnaryOp::Square, -3.0, 9.0),
        (UnaryOp::Sqrt, 2.25, 1.5),
        (UnaryOp::Rsqrt, 4.0, 0.5),
        (UnaryOp::Recip, -8.0, -0.125),
        (UnaryOp::Exp, 1.0, std::f64::consts::E),
        (UnaryOp::Log, 10.0, std::f64::consts::LN_10),
        (UnaryOp::Cos, std::f64::consts::FRAC_PI_3, 0.5),
        (UnaryOp::Tanh, 0.5, 0.462_117_157_260_009_76),
        (UnaryOp::Sigmoid, -1.0, 0.268_941_421_369_995_1),
        // x Φ(x) with Φ(1) = 0.841344746068542948…
        (UnaryOp::GeluErf, 1.0, 0.841_344_746_068_543),
        // ½(1 + tanh(√(2/π)·1.044715))
        (UnaryOp::GeluTanh, 1.0, 0.841_191_990_608_276_7),
    ];
    for (op, x, expected) in cases {
        assert_close(&unary(op, &[x])?, &[expected], 1e-14);
    }
    Ok(())
}

#[test]
fn kinks_and_special_numbers() -> Result<()> {
    let clamp = UnaryOp::Clamp {
        min: -1.0,
        max: 2.0,
    };
    let inverted = UnaryOp::Clamp {
        min: 2.0,
        max: -1.0,
    };
    let x = [-3.0, -1.0, 0.0, 2.0, 5.0];
    assert_eq!(unary(clamp, &x)?, [-1.0, -1.0, 0.0, 2.0, 2.0]);
    assert_eq!(derivative(clamp, &x)?, [0.0, 3.0, 3.0, 3.0, 0.0]);
    assert!(unary(inverted, &x)?.iter().all(|&y| y == 2.0 || y == -1.0));
    assert!(unary(clamp, &[f64::NAN])?[0].is_nan());
    assert_eq!(unary(UnaryOp::Relu, &x)?, [0.0, 0.0, 0.0, 2.0, 5.0]);
    assert_eq!(derivative(UnaryOp::Relu, &x)?, [0.0, 0.0, 0.0, 3.0, 3.0]);
    assert_eq!(derivative(UnaryOp::Abs, &x)?, [-3.0, -3.0, 0.0, 3.0, 3.0]);
    let x = [1e30, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0];
    assert_eq!(unary(UnaryOp::IsFinite, &x)?, [1.0, 0.0, 0.0, 0.0, 1.0]);
    assert_eq!(derivative(UnaryOp::IsFinite, &[0.5])?, [0.0]);
    Ok(())
}

#[test]
fn gelu_keeps_its_digits_in_the_tail() -> Result<()> {
    // x Φ(x) at −10 is −10·7.619853024160526e−24.
    let y = unary(UnaryOp::GeluErf, &[-10.0])?[0];
    assert!((y / -7.619_853_024_160_526e-23 - 1.0).abs() < 1e-12);
    assert_eq!(unary(UnaryOp::GeluTanh, &[-40.0, 40.0])?, [0.0, 40.0]);
    Ok(())
}

#[test]
fn derivatives_match_finite_differences() -> Result<()> {
    for op in SMOOTH {
        check_against_differences(op, &[0.3, 0.9, 1.0, 1.7, 2.6])?;
    }
    for op in [
        UnaryOp::Sigmoid,
        UnaryOp::GeluTanh,
        UnaryOp::GeluErf,
        UnaryOp::Tanh,
        UnaryOp::Cos,
    ] {
        check_against_differences(op, &[-6.0, -2.2, -0.4, 0.0, 0.8, 5.0])?;
    }
    for op in [
        UnaryOp::Abs,
        UnaryOp::Relu,
        UnaryOp::Clamp {
            min: -1.0,
            max: 1.0,
        },
    ] {
        check_against_differences(op, &[-2.0, -0.5, 0.5, 2.0])?;
    }
    Ok(())
}

#[test]
fn binary_values() -> Result<()> {
    let a = Array::new(&[4], vec![1.0, -2.0, 3.0, 4.0])?;
    let b = Array::new(&[4], vec![2.0, -4.0, 3.0, -0.5])?;
    let cases = [
        (BinaryOp::Add, [3.0, -6.0, 6.0, 3.5]),
        (BinaryOp::Sub, [-1.0, 2.0, 0.0, 4.5]),
        (BinaryOp::Mul, [2.0, 8.0, 9.0, -2.0]),
        (BinaryOp::Div, [0.5, 0.5, 1.0, -8.0]),
        (BinaryOp::Max, [2.0, -2.0, 3.0, 4.0]),
        (BinaryOp::Min, [1.0, -4.0, 3.0, -0.5]),
        (BinaryOp::Greater, [0.0, 1.0, 0.0, 1.0]),
        (
            BinaryOp::UnaryGrad(UnaryOp::Square),
            [4.0, 16.0, 18.0, -4.0],
        ),
    ];
    for (op, expected) in cases {
        let y = apply_f32(Op::Binary(op, Broadcast::Same), [&a, &b], &[4])?;
        assert_eq!(y.data(), expected, "{op:?}");
    }
    Ok(())
}

/// Function; f(−∞), f(∞), f′(−∞), f′(∞). Of NaN all are NaN.
#[test]
fn limits() -> Result<()> {
    const INF: f64 = f64::INFINITY;
    const NAN: f64 = f64::NAN;
    let affine = |scale| UnaryOp::Affine { scale, offset: 3.0 };
    let clamp = UnaryOp::Clamp {
        min: -1.0,
        max: 2.0,
    };
    let cases: [(UnaryOp, [f64; 4]); 18] = [
        (UnaryOp::Identity, [-INF, INF, 1.0, 1.0]),
        (affine(-2.0), [INF, -INF, -2.0, -2.0]),
        (affine(0.0), [NAN, NAN, 0.0, 0.0]),
        (clamp, [-1.0, 2.0, 0.0, 0.0]),
        (UnaryOp::Abs, [INF, INF, -1.0, 1.0]),
        (UnaryOp::Square, [INF, INF, -INF, INF]),
        (UnaryOp::Sqrt, [NAN, INF, NAN, 0.0]),
        (UnaryOp::Rsqrt, [NAN, 0.0, NAN, 0.0]),
        (UnaryOp::Recip, [0.0, 0.0, 0.0, 0.0]),
        (UnaryOp::Exp, [0.0, INF, 0.0, INF]),
        (UnaryOp::Log, [NAN, INF, 0.0, 0.0]),
        (UnaryOp::Cos, [NAN, NAN, NAN, NAN]),
        (UnaryOp::Tanh, [-1.0, 1.0, 0.0, 0.0]),
        (UnaryOp::Sigmoid, [0.0, 1.0, 0.0, 0.0]),
        (UnaryOp::Relu, [0.0, INF, 0.0, 1.0]),
        (UnaryOp::GeluTanh, [0.0, INF, 0.0, 1.0]),
        (UnaryOp::GeluErf, [0.0, INF, 0.0, 1.0]),
        (UnaryOp::IsFinite, [0.0, 0.0, 0.0, 0.0]),
    ];
    let same = |got: f64, want: f64| got == want || got.is_nan() && want.is_nan();
    for (op, expected) in cases {
        let x = [-INF, INF, NAN];
        let (y, slope) = (unary(op, &x)?, derivative(op, &x)?);
        for (i, want) in expected.into_iter().enumerate() {
            let got = if i < 2 { y[i] } else { slope[i - 2] / 3.0 };
            assert!(same(got, want), "{op:?} {i}: {got}, not {want}");
        }
        let hidden = if op == UnaryOp::IsFinite { 0.0 } else { NAN };
        assert!(
            same(y[2], hidden) && same(slope[2], hidden),
            "{op:?} of NaN"
        );
    }
    for op in [BinaryOp::Max, BinaryOp::Min, BinaryOp::Greater] {
        let a = Array::new(&[3], vec![NAN, 1.0, NAN])?;
        let b = Array::new(&[3], vec![1.0, NAN, NAN])?;
        let y = apply_f32(Op::Binary(op, Broadcast::Same), [&a, &b], &[3])?;
        let want = if op == BinaryOp::Greater { 0.0 } else { NAN };
        assert!(y.data().iter().all(|&y| same(y, want)), "{op:?}: {y:?}");
    }
    Ok(())
}

#[test]
fn broadcasts() -> Result<()> {
    let a = Array::filled(&[2, 2, 3], 0.0)?;
    let add = |broadcast, b: &Array| {
        let sum = Op::Binary(BinaryOp::Add, broadcast);
        apply_f32(sum, [&a, b], &[2, 2, 3])
    };
    let b = Array::new(&[3], vec![1.0, 2.0, 3.0])?;
    let expected = [1.0, 2.0, 3.0].repeat(4);
    assert_eq!(add(Broadcast::Cols, &b)?.data(), expected);
    let b = Array::new(&[4], vec![1.0, 2.0, 3.0, 4.0])?;
    let expected = [1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 3.0, 3.0, 3.0, 4.0, 4.0, 4.0];
    assert_eq!(add(Broadcast::Rows, &b)?.data(), expected);
    assert_eq!(
        add(Broadcast::Scalar, &Array::scalar(7.0))?.data(),
        [7.0; 12]
    );
    let b = Array::new(&[2, 3], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0])?;
    let expected = [1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 4.0, 5.0, 6.0];
    assert_eq!(add(Broadcast::Groups { period: 2 }, &b)?.data(), expected);
    Ok(())
}

#[test]
fn casts_and_f16_results_round() -> Result<()> {
    let x = Array::new(&[4], vec![1.0 + 1.0 / 2048.0, 65520.0, 3e-8, -0.1])?;
    let cast = apply(Op::Cast(DType::F16), &f32s([&x]), &[(&[4], DType::F16)])?;
    let expected = [1.0, f64::INFINITY, 2f64.powi(-24), -0.099_975_585_937_5];
    assert_eq!(cast[0].data(), expected);

    // Inputs are rounded first, then the result: 2049 → 2048 before one is added.
    let x = Array::new(&[2], vec![2049.0, 60000.0])?;
    let y = Array::new(&[2], vec![1.0, 6000.0])?;
    let operands = [(&x, DType::F16), (&y, DType::F16)];
    let add = Op::Binary(BinaryOp::Add, Broadcast::Same);
    let sum = apply(add.clone(), &operands, &[(&[2], DType::F16)])?;
    assert_eq!(sum[0].data(), [2048.0, f64::INFINITY]);
    let sum = apply(add, &operands, &[(&[2], DType::F32)])?;
    assert_eq!(sum[0].data(), [2049.0, 66000.0]);

    let ids = Array::new(&[2], vec![2.75, 9.0])?;
    let cast = apply(Op::Cast(DType::U32), &f32s([&ids]), &[(&[2], DType::U32)])?;
    assert_eq!(cast[0].data(), [2.0, 9.0]);
    Ok(())
}

#[test]
fn reshape_moves_nothing() -> Result<()> {
    let x = noise(&[2, 3, 4], 1.0)?;
    let y = apply_f32(Op::Reshape, [&x], &[6, 4])?;
    assert_eq!(y.shape().dims(), [6, 4]);
    assert_eq!(y.data(), x.data());
    Ok(())
}
