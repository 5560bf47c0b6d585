use super::*;
use crate::types::{Trans, Window};

fn matmul(trans: Trans, a: &Array, b: &Array, dims: [usize; 2]) -> Result<Array> {
    let out = DType::F32;
    let batch = 1;
    apply_f32(Op::MatMul { batch, trans, out }, [a, b], &dims)
}

#[test]
fn products_by_hand() -> Result<()> {
    // [1 2 3; 4 5 6] · [1 0; 2 -1; 0 3]
    let a = Array::new(&[2, 3], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0])?;
    let at = Array::new(&[3, 2], vec![1.0, 4.0, 2.0, 5.0, 3.0, 6.0])?;
    let b = Array::new(&[3, 2], vec![1.0, 0.0, 2.0, -1.0, 0.0, 3.0])?;
    let bt = Array::new(&[2, 3], vec![1.0, 2.0, 0.0, 0.0, -1.0, 3.0])?;
    let expected = [5.0, 7.0, 14.0, 13.0];
    assert_eq!(matmul(Trans::NN, &a, &b, [2, 2])?.data(), expected);
    assert_eq!(matmul(Trans::NT, &a, &bt, [2, 2])?.data(), expected);
    assert_eq!(matmul(Trans::TN, &at, &b, [2, 2])?.data(), expected);
    Ok(())
}

#[test]
fn products_match_their_definition_at_odd_sizes() -> Result<()> {
    for (m, k, n) in [(1, 1, 1), (1, 7, 1), (5, 1, 3), (3, 4, 7), (8, 13, 2)] {
        let a = noise(&[m, k], 0.3)?;
        let bt = noise(&[n, k], 1.3)?;
        let mut expected = Vec::new();
        for i in 0..m {
            for j in 0..n {
                expected.push(
                    (0..k)
                        .map(|l| a.data()[i * k + l] * bt.data()[j * k + l])
                        .sum(),
                );
            }
        }
        assert_close(matmul(Trans::NT, &a, &bt, [m, n])?.data(), &expected, 1e-14);
    }
    Ok(())
}

#[test]
fn infinities_are_not_lost_against_zeros() -> Result<()> {
    let a = Array::new(&[1, 2], vec![0.0, 1.0])?;
    let b = Array::new(&[2, 1], vec![f64::INFINITY, 1.0])?;
    assert!(matmul(Trans::NN, &a, &b, [1, 1])?.data()[0].is_nan());
    Ok(())
}

/// PyTorch's definition with weights [out, in, k]: y[b, t, o] = Σ x[b, t − (k − 1 − j)·dilation, i]·w[o, i, j].
fn direct_convolution(x: &Array, w: &Array, dilation: usize) -> Vec<f64> {
    let (&[batch, time, channels], &[out, _, kernel]) = (x.shape().dims(), w.shape().dims()) else {
        return Vec::new();
    };
    let mut y = Vec::new();
    for b in 0..batch {
        for t in 0..time {
            for o in 0..out {
                let mut sum = 0.0;
                for i in 0..channels {
                    for j in 0..kernel {
                        let back = (kernel - 1 - j) * dilation;
                        if t >= back {
                            let x = x.data()[(b * time + t - back) * channels + i];
                            sum += x * w.data()[(o * channels + i) * kernel + j];
                        }
                    }
                }
                y.push(sum);
            }
        }
    }
    y
}

#[test]
fn im2col_and_gemm_are_a_convolution() -> Result<()> {
    for (batch, time, channels, out, kernel, dilation) in [
        (2, 8, 3, 4, 3, 2),
        (2, 11, 7, 5, 5, 1),
        (1, 3, 2, 2, 5, 4),
        (3, 4, 1, 1, 1, 1),
        (1, 1, 1, 1, 2, 1),
    ] {
        let window = Window::causal(time, kernel, dilation)?;
        let x = noise(&[batch, time, channels], 0.1)?;
        let w = noise(&[out, channels, kernel], 0.9)?;
        let columns = apply_f32(Op::Im2col(window), [&x], &[batch * time, kernel * channels])?;
        // Weights with columns in the order of im2col: tap, then channel.
        let mut taps = Vec::new();
        for o in 0..out {
            for j in 0..kernel {
                for i in 0..channels {
                    taps.push(w.data()[(o * channels + i) * kernel + j]);
                }
            }
        }
        let taps = Array::new(&[out, kernel * channels], taps)?;
        let y = matmul(Trans::NT, &columns, &taps, [batch * time, out])?;
        assert_close(y.data(), &direct_convolution(&x, &w, dilation), 1e-14);
    }
    Ok(())
}

#[test]
fn im2col_by_hand() -> Result<()> {
    let x = Array::new(&[2, 3, 1], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0])?;
    let window = Window::causal(3, 2, 2)?;
    let columns = apply_f32(Op::Im2col(window), [&x], &[6, 2])?;
    let expected = [0.0, 1.0, 0.0, 2.0, 1.0, 3.0, 0.0, 4.0, 0.0, 5.0, 4.0, 6.0];
    assert_eq!(columns.data(), expected);
    // Each x[0] is seen by its own step and two steps later.
    let x = apply_f32(Op::Col2im(window), [&columns], &[2, 3, 1])?;
    assert_eq!(x.data(), [2.0, 2.0, 3.0, 8.0, 5.0, 6.0]);
    Ok(())
}

#[test]
fn col2im_is_the_transpose_of_im2col() -> Result<()> {
    for (kernel, dilation) in [(1, 1), (3, 1), (3, 2), (5, 3)] {
        let window = Window::causal(5, kernel, dilation)?;
        let x = noise(&[2, 5, 3], 0.4)?;
        let dims: [usize; 2] = [10, 3 * kernel];
        let dy = noise(&dims, 0.8)?;
        let results: [(&[usize], DType); 1] = [(&dims, DType::F32)];
        let expected = numeric(Op::Im2col(window), &f32s([&x]), &results, &dy, 0)?;
        let dx = apply_f32(Op::Col2im(window), [&dy], &[2, 5, 3])?;
        assert_close(dx.data(), expected.data(), 1e-9);
    }
    Ok(())
}
