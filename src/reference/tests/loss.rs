use super::*;
use crate::error::Error;

const SCALAR: (&[usize], DType) = (&[1], DType::F32);

fn kd(y: &Array, t: &Array, alpha: f32, beta: f32) -> Result<Vec<Array>> {
    let rows: &[usize] = &[y.rows(), 4];
    let results = [SCALAR, SCALAR, SCALAR, (rows, DType::F32)];
    apply(Op::KdLoss { alpha, beta }, &f32s([y, t]), &results)
}

#[test]
fn kd_by_hand() -> Result<()> {
    // Row 0: y·t = 3·4 + 4·3 = 24, norms 5, cosine 0.96, Σ(y − t)² = 2. Row 1: orthogonal, Σ = 1 + 4 = 5.
    let y = Array::new(&[2, 2], vec![3.0, 4.0, 1.0, 0.0])?;
    let t = Array::new(&[2, 2], vec![4.0, 3.0, 0.0, 2.0])?;
    let results = kd(&y, &t, 0.5, 2.0)?;
    assert_close(
        results[0].data(),
        &[0.5 * (1.0 - 0.48) + 2.0 * 7.0 / 4.0],
        1e-15,
    );
    assert_close(results[1].data(), &[0.48], 1e-15);
    assert_close(results[2].data(), &[1.75], 1e-15);
    assert_close(
        results[3].data(),
        &[24.0, 5.0, 5.0, 2.0, 0.0, 1.0, 2.0, 5.0],
        1e-15,
    );
    Ok(())
}

#[test]
fn kd_gradient_matches_finite_differences() -> Result<()> {
    for (rows, cols) in [(1, 1), (1, 4), (3, 5)] {
        let dims: &[usize] = &[rows, cols];
        let y = noise(dims, 0.7)?;
        let t = noise(dims, 1.9)?;
        let (alpha, beta) = (0.75, 1.5);
        let kept = kd(&y, &t, alpha, beta)?.remove(3);
        let dloss = Array::scalar(-2.5);
        let op = Op::KdLossGrad { alpha, beta };
        let dy = apply_f32(op, [&y, &t, &kept, &dloss], dims)?;
        let results: [(&[usize], DType); 4] = [SCALAR, SCALAR, SCALAR, (&[rows, 4], DType::F32)];
        let op = Op::KdLoss { alpha, beta };
        let expected = numeric(op, &f32s([&y, &t]), &results, &dloss, 0)?;
        assert_close(dy.data(), expected.data(), 1e-8);
    }
    Ok(())
}

#[test]
fn kd_of_a_zero_vector_is_finite() -> Result<()> {
    let y = Array::filled(&[1, 2], 0.0)?;
    let t = Array::new(&[1, 2], vec![3.0, 4.0])?;
    let results = kd(&y, &t, 1.0, 1.0)?;
    assert_eq!(results[1].data(), [0.0]);
    assert_eq!(results[3].data(), [0.0, 1e-6, 5.0, 25.0]);
    let op = Op::KdLossGrad {
        alpha: 1.0,
        beta: 0.0,
    };
    let dy = apply_f32(op, [&y, &t, &results[3], &Array::scalar(1.0)], &[1, 2])?;
    // −t / (1e−6 · 5)
    assert_close(dy.data(), &[-6e5, -8e5], 1e-12);
    Ok(())
}

/// The steps of `numeric` are larger than these norms.
#[test]
fn kd_gradient_of_short_vectors_matches_finite_differences() -> Result<()> {
    let t = Array::new(&[1, 3], vec![0.5, -0.75, 0.25])?;
    for length in [0.0, 4e-7, 9e-7, 1.1e-6, 3e-6] {
        let direction = [0.6, -0.64, 0.48];
        let y = direction.map(|x| x * length);
        let cosine = |y: &[f64; 3]| -> Result<f64> {
            Ok(kd(&Array::new(&[1, 3], y.to_vec())?, &t, 1.0, 0.0)?[1].data()[0])
        };
        let op = Op::KdLossGrad {
            alpha: -1.0,
            beta: 0.0,
        };
        let array = Array::new(&[1, 3], y.to_vec())?;
        let kept = kd(&array, &t, 1.0, 0.0)?.remove(3);
        let dy = apply_f32(op, [&array, &t, &kept, &Array::scalar(1.0)], &[1, 3])?;
        for i in 0..3 {
            let step = 1e-11;
            let (mut above, mut below) = (y, y);
            above[i] += step;
            below[i] -= step;
            let expected = (cosine(&above)? - cosine(&below)?) / (above[i] - below[i]);
            let error = (dy.data()[i] - expected).abs() / (1e5 + expected.abs());
            assert!(error < 1e-5, "{length} {i}: {} {expected}", dy.data()[i]);
        }
    }
    Ok(())
}

#[test]
fn norms_and_counts_do_not_hide_nan() -> Result<()> {
    let y = Array::new(&[2, 2], vec![1.0, 2.0, 3.0, f64::NAN])?;
    let t = Array::filled(&[2, 2], 1.0)?;
    let results = kd(&y, &t, 1.0, 1.0)?;
    assert!(results[0].data()[0].is_nan() && results[1].data()[0].is_nan());
    assert!(results[3].data()[5].is_nan());
    let mask = Array::new(&[2], vec![1.0, f64::NAN])?;
    let op = Op::MaskedMeanGrad { time: 2 };
    let dx = apply_f32(op, [&Array::filled(&[1, 1], 1.0)?, &mask], &[1, 2, 1])?;
    assert!(dx.data().iter().all(|x| x.is_nan()), "{dx:?}");
    Ok(())
}

struct Ce {
    ignore: Option<u32>,
    smoothing: f32,
}

impl Ce {
    fn forward(&self, logits: &Array, targets: &Array) -> Result<Vec<Array>> {
        let rows: &[usize] = &[2, logits.rows()];
        let results = [SCALAR, SCALAR, (rows, DType::F32)];
        let operands = [(logits, DType::F32), (targets, DType::U32)];
        apply(self.op(), &operands, &results)
    }

    fn op(&self) -> Op {
        Op::CrossEntropy {
            ignore: self.ignore,
            smoothing: self.smoothing,
        }
    }

    fn gradient(&self, logits: &Array, targets: &Array, dloss: &Array) -> Result<Array> {
        let kept = self.forward(logits, targets)?;
        let op = Op::CrossEntropyGrad {
            ignore: self.ignore,
            smoothing: self.smoothing,
        };
        let mut operands = f32s([logits, targets, &kept[2], &kept[1], dloss]);
        operands[1].1 = DType::U32;
        let mut results = apply(op, &operands, &[(logits.shape().dims(), DType::F32)])?;
        Ok(results.remove(0))
    }
}

#[test]
fn cross_entropy_by_hand() -> Result<()> {
    // Softmax of [ln 1, ln 2, ln 5] is [1/8, 2/8, 5/8]; a common shift changes nothing.
    let logs = [1f64, 2.0, 5.0].map(f64::ln);
    let shifted = logs.map(|x| x + 1000.0);
    let logits = Array::new(&[3, 3], [logs, shifted, logs].concat())?;
    let targets = Array::from_u32(&[3], &[2, 1, 0])?;
    let ce = Ce {
        ignore: Some(0),
        smoothing: 0.0,
    };
    let results = ce.forward(&logits, &targets)?;
    let losses = [(8.0 / 5.0f64).ln(), 4f64.ln()];
    assert_close(results[0].data(), &[(losses[0] + losses[1]) / 2.0], 1e-12);
    assert_eq!(results[1].data(), [2.0]);
    let lse = 8f64.ln();
    let rows = [lse, lse + 1000.0, lse, losses[0], losses[1], 0.0];
    assert_close(results[2].data(), &rows, 1e-12);

    let dlogits = ce.gradient(&logits, &targets, &Array::scalar(2.0))?;
    let expected = [0.125, 0.25, -0.375, 0.125, -0.75, 0.625, 0.0, 0.0, 0.0];
    assert_close(dlogits.data(), &expected, 1e-12);
    Ok(())
}

/// Logits, target, smoothing; then the loss and the gradient.
#[test]
fn masked_classes() -> Result<()> {
    const INF: f64 = f64::INFINITY;
    const NAN: f64 = f64::NAN;
    let softmax = [0.546_549_387, 0.0, 0.331_498_960, 0.121_951_652];
    let hot = |x: [f64; 4], target: usize, smoothing: f64| {
        let mut x = x.map(|p| p - smoothing / 4.0);
        x[target] -= 1.0 - smoothing;
        x
    };
    let masked = [1.0, -INF, 0.5, -0.5];
    for (logits, target, smoothing, loss, gradient) in [
        (masked, 0, 0.0, 0.604_130_605, hot(softmax, 0, 0.0)),
        (masked, 1, 0.0, INF, hot(softmax, 1, 0.0)),
        (masked, 0, 0.125, INF, hot(softmax, 0, 0.125)),
        ([-INF, -INF, 5.0, -INF], 2, 0.0, 0.0, [0.0; 4]),
        ([-INF; 4], 0, 0.0, NAN, [NAN; 4]),
        ([-INF; 4], 0, 0.125, NAN, [NAN; 4]),
        ([0.0, INF, 0.0, 0.0], 1, 0.0, NAN, [NAN; 4]),
        ([0.0, INF, 0.0, 0.0], 0, 0.0, NAN, [NAN; 4]),
        ([0.0, NAN, 0.0, 0.0], 0, 0.0, NAN, [NAN; 4]),
        ([0.0, NAN, -INF, 0.0], 0, 0.125, NAN, [NAN; 4]),
    ] {
        let name = format!("{logits:?} {target} {smoothing}");
        let logits = Array::new(&[1, 4], logits.to_vec())?;
        let targets = Array::from_u32(&[1], &[target as u32])?;
        let ce = Ce {
            ignore: None,
            smoothing: smoothing as f32,
        };
        let same = |got: f64, want: f64| {
            (got - want).abs() < 1e-8 || got == want || got.is_nan() && want.is_nan()
        };
        let got = ce.forward(&logits, &targets)?[0].data()[0];
        assert!(same(got, loss), "{name}: {got}");
        // Of the separate gradient it is the logsumexp that is NaN.
        let got = ce.gradient(&logits, &targets, &Array::scalar(1.0))?;
        for (got, want) in got.data().iter().zip(gradient) {
            assert!(same(*got, want), "{name}: {got} {want}");
        }
    }
    Ok(())
}

#[test]
fn smoothing_mixes_in_the_mean() -> Result<()> {
    let logits = Array::new(&[1, 4], vec![0.0, 1.0, 2.0, 5.0])?;
    let targets = Array::from_u32(&[1], &[1])?;
    let ce = Ce {
        ignore: None,
        smoothing: 0.25,
    };
    let results = ce.forward(&logits, &targets)?;
    let lse = (1.0 + 1f64.exp() + 2f64.exp() + 5f64.exp()).ln();
    // −Σ q ln p with q = 0.75·onehot + 0.25/4
    let expected: f64 = [0.0625, 0.8125, 0.0625, 0.0625]
        .iter()
        .zip(logits.data())
        .map(|(q, x)| q * (lse - x))
        .sum();
    assert_close(results[0].data(), &[expected], 1e-14);
    Ok(())
}

#[test]
fn cross_entropy_gradient_matches_finite_differences() -> Result<()> {
    for (vocabulary, ids, smoothing) in [
        (5, [3, 0, 4], 0.0),
        (5, [0, 0, 2], 0.1),
        (1, [0, 0, 0], 0.5),
    ] {
        for ignore in [None, Some(0)] {
            let dims: &[usize] = &[3, vocabulary];
            let logits = noise(dims, 2.4)?;
            let targets = Array::from_u32(&[3], &ids)?;
            let ce = Ce { ignore, smoothing };
            let dloss = Array::scalar(3.0);
            let results: [(&[usize], DType); 3] = [SCALAR, SCALAR, (&[2, 3], DType::F32)];
            let operands = [(&logits, DType::F32), (&targets, DType::U32)];
            let expected = numeric(ce.op(), &operands, &results, &dloss, 0)?;
            let dlogits = ce.gradient(&logits, &targets, &dloss)?;
            assert_close(dlogits.data(), expected.data(), 1e-8);
        }
    }
    Ok(())
}

#[test]
fn nothing_but_padding_has_loss_and_gradient_zero() -> Result<()> {
    let logits = noise(&[2, 3], 0.5)?;
    let targets = Array::from_u32(&[2], &[7, 7])?;
    let ce = Ce {
        ignore: Some(7),
        smoothing: 0.1,
    };
    let results = ce.forward(&logits, &targets)?;
    assert_eq!(
        (results[0].data(), results[1].data()),
        (&[0.0][..], &[0.0][..])
    );
    let dlogits = ce.gradient(&logits, &targets, &Array::scalar(1.0))?;
    assert_eq!(dlogits.data(), [0.0; 6]);
    let ce = Ce {
        ignore: None,
        smoothing: 0.1,
    };
    assert!(matches!(
        ce.forward(&logits, &targets),
        Err(Error::Shape { .. })
    ));
    Ok(())
}
