use super::*;

fn forward(x: &Array, gamma: &Array, beta: &Array, eps: f32) -> Result<Vec<Array>> {
    let statistics: &[usize] = &[3, x.rows()];
    let results = [(x.shape().dims(), DType::F32), (statistics, DType::F32)];
    apply(Op::LayerNorm { eps }, &f32s([x, gamma, beta]), &results)
}

#[test]
fn by_hand() -> Result<()> {
    // Row [1, 3]: mean 2, variance 1. Row [0, 6]: mean 3, variance 9. eps 0.
    let x = Array::new(&[2, 2], vec![1.0, 3.0, 0.0, 6.0])?;
    let gamma = Array::new(&[2], vec![2.0, 10.0])?;
    let beta = Array::new(&[2], vec![0.5, -1.0])?;
    let y = forward(&x, &gamma, &beta, 0.0)?;
    assert_close(y[0].data(), &[-1.5, 9.0, -1.5, 9.0], 1e-15);
    // First elements, means of the differences to them, reciprocal deviations.
    assert_close(y[1].data(), &[1.0, 0.0, 1.0, 3.0, 1.0, 1.0 / 3.0], 1e-15);
    Ok(())
}

#[test]
fn a_single_column_is_beta() -> Result<()> {
    let x = Array::new(&[3, 1], vec![4.0, -1.0, 0.0])?;
    let y = forward(&x, &Array::scalar(3.0), &Array::scalar(0.25), 1e-5)?;
    assert_eq!(y[0].data(), [0.25; 3]);
    let rstd = f64::from(1e-5f32).sqrt().recip();
    assert_close(&y[1].data()[6..], &[rstd; 3], 1e-15);
    Ok(())
}

#[test]
fn gradients_match_finite_differences() -> Result<()> {
    for (rows, cols) in [(1, 2), (3, 5), (4, 1), (2, 8)] {
        let dims: &[usize] = &[rows, cols];
        let x = noise(dims, 0.2)?;
        let gamma = noise(&[cols], 1.2)?;
        let beta = noise(&[cols], 2.2)?;
        let dy = noise(dims, 3.2)?;
        let eps = 1e-2;
        let statistics = forward(&x, &gamma, &beta, eps)?.remove(1);

        let dx = apply_f32(Op::LayerNormGrad, [&x, &gamma, &statistics, &dy], dims)?;
        let vector: &[usize] = &[cols];
        let vectors = [(vector, DType::F32); 2];
        let parameters = apply(
            Op::LayerNormParamGrad,
            &f32s([&x, &statistics, &dy]),
            &vectors,
        )?;

        let results: [(&[usize], DType); 2] = [(dims, DType::F32), (&[3, rows], DType::F32)];
        let operands = f32s([&x, &gamma, &beta]);
        let expected = |operand| numeric(Op::LayerNorm { eps }, &operands, &results, &dy, operand);
        assert_close(dx.data(), expected(0)?.data(), 1e-8);
        assert_close(parameters[0].data(), expected(1)?.data(), 1e-8);
        assert_close(parameters[1].data(), expected(2)?.data(), 1e-8);
    }
    Ok(())
}
