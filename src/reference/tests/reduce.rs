use super::*;
use crate::error::Error;

#[test]
fn sums() -> Result<()> {
    let x = Array::new(&[2, 2, 3], (1..=12).map(f64::from).collect())?;
    assert_eq!(
        apply_f32(Op::SumRows, [&x], &[3])?.data(),
        [22.0, 26.0, 30.0]
    );
    assert_eq!(
        apply_f32(Op::SumCols, [&x], &[4])?.data(),
        [6.0, 15.0, 24.0, 33.0]
    );
    assert_eq!(apply_f32(Op::SumAll, [&x], &[1])?.data(), [78.0]);
    let groups = apply_f32(Op::SumGroups { period: 2 }, [&x], &[2, 3])?;
    assert_eq!(groups.data(), [5.0, 7.0, 9.0, 17.0, 19.0, 21.0]);
    let groups = apply_f32(Op::SumGroups { period: 1 }, [&x], &[4, 3])?;
    assert_eq!(groups.data(), x.data());
    Ok(())
}

#[test]
fn sums_of_one_element() -> Result<()> {
    let x = Array::scalar(-4.0);
    for op in [
        Op::SumRows,
        Op::SumCols,
        Op::SumAll,
        Op::SumGroups { period: 1 },
        Op::Stack,
    ] {
        assert_eq!(apply_f32(op, [&x], &[1])?.data(), [-4.0]);
    }
    assert_eq!(apply_f32(Op::GlobalNorm, [&x], &[1])?.data(), [4.0]);
    Ok(())
}

#[test]
fn masked_mean_counts_only_the_mask() -> Result<()> {
    let x = Array::new(
        &[3, 2, 2],
        vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 9.0, 9.0, 9.0],
    )?;
    let mask = Array::new(&[6], vec![1.0, 1.0, 0.0, 1.0, 0.0, 0.0])?;
    let mean = apply_f32(Op::MaskedMean, [&x, &mask], &[3, 2])?;
    assert_eq!(mean.data(), [2.0, 3.0, 7.0, 8.0, 0.0, 0.0]);
    let dy = Array::new(&[3, 2], vec![2.0, 4.0, 5.0, 6.0, 7.0, 8.0])?;
    let dx = apply_f32(Op::MaskedMeanGrad { time: 2 }, [&dy, &mask], &[3, 2, 2])?;
    let expected = [1.0, 2.0, 1.0, 2.0, 0.0, 0.0, 5.0, 6.0, 0.0, 0.0, 0.0, 0.0];
    assert_eq!(dx.data(), expected);
    let results: [(&[usize], DType); 1] = [(&[3, 2], DType::F32)];
    let numeric = numeric(Op::MaskedMean, &f32s([&x, &mask]), &results, &dy, 0)?;
    assert_close(dx.data(), numeric.data(), 1e-8);
    Ok(())
}

#[test]
fn stack_and_global_norm() -> Result<()> {
    let scalars = [1.0, -2.0, 0.5].map(Array::scalar);
    let stacked = apply_f32(Op::Stack, scalars.each_ref(), &[3])?;
    assert_eq!(stacked.data(), [1.0, -2.0, 0.5]);
    let a = Array::new(&[2, 2], vec![1.0, 2.0, 2.0, 4.0])?;
    let b = Array::new(&[3], vec![10.0, 0.0, 10.0])?;
    // 1 + 4 + 4 + 16 + 100 + 100 = 225
    assert_eq!(apply_f32(Op::GlobalNorm, [&a, &b], &[1])?.data(), [15.0]);
    let bad = Array::new(&[1], vec![f64::NAN])?;
    assert!(apply_f32(Op::GlobalNorm, [&a, &bad], &[1])?.data()[0].is_nan());
    Ok(())
}

fn gather(table: &Array, ids: &Array, dtype: DType) -> Result<Array> {
    let dims: &[usize] = &[ids.data().len(), table.cols()];
    let operands = [(table, dtype), (ids, DType::U32)];
    Ok(apply(Op::Gather { padding: None }, &operands, &[(dims, dtype)])?.remove(0))
}

fn gather_grad(rows: usize, padding: Option<u32>, ids: &Array, dy: &Array) -> Result<Array> {
    let op = Op::GatherGrad { rows, padding };
    let operands = [(ids, DType::U32), (dy, DType::F32)];
    Ok(apply(op, &operands, &[(&[rows, dy.cols()], DType::F32)])?.remove(0))
}

#[test]
fn gather_reads_rows() -> Result<()> {
    let table = Array::new(&[3, 2], vec![0.1, 1.0, 2.0, 3.0, 4.0, 5.0])?;
    let ids = Array::from_u32(&[4], &[2, 0, 2, 1])?;
    let rows = gather(&table, &ids, DType::F32)?;
    assert_eq!(rows.data(), [4.0, 5.0, 0.1, 1.0, 4.0, 5.0, 2.0, 3.0]);
    let rows = gather(&table, &ids, DType::F16)?;
    assert_eq!(rows.data()[2], half::f16::from_f32(0.1).to_f64());
    Ok(())
}

#[test]
fn gather_gradient_adds_repeated_ids_and_skips_padding() -> Result<()> {
    let ids = Array::from_u32(&[5], &[2, 0, 2, 1, 0])?;
    let dy = Array::new(
        &[5, 2],
        vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0],
    )?;
    let sums = gather_grad(4, None, &ids, &dy)?;
    assert_eq!(sums.data(), [12.0, 14.0, 7.0, 8.0, 6.0, 8.0, 0.0, 0.0]);
    let sums = gather_grad(4, Some(0), &ids, &dy)?;
    assert_eq!(sums.data(), [0.0, 0.0, 7.0, 8.0, 6.0, 8.0, 0.0, 0.0]);

    let table = noise(&[4, 2], 0.6)?;
    let operands = [(&table, DType::F32), (&ids, DType::U32)];
    let numeric = numeric(
        Op::Gather { padding: None },
        &operands,
        &[(&[5, 2], DType::F32)],
        &dy,
        0,
    )?;
    assert_close(
        gather_grad(4, None, &ids, &dy)?.data(),
        numeric.data(),
        1e-8,
    );
    Ok(())
}

#[test]
fn an_index_outside_its_table_is_an_error() -> Result<()> {
    let table = noise(&[3, 2], 0.6)?;
    let ids = Array::from_u32(&[2], &[0, 3])?;
    assert!(matches!(
        gather(&table, &ids, DType::F32),
        Err(Error::Shape { .. })
    ));
    let dy = noise(&[2, 2], 0.6)?;
    assert!(matches!(
        gather_grad(3, None, &ids, &dy),
        Err(Error::Shape { .. })
    ));
    assert!(gather_grad(3, Some(3), &ids, &dy).is_ok());
    Ok(())
}
