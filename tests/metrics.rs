//! Metrics on the host, against values worked out by hand or the slow way.

use energyflow::Error;
use energyflow::text::Dataset;
use energyflow::text::metrics::{
    mean_cosine, mean_squared_error, nearest, precision_at, retrieval_ranks,
};

#[test]
fn cosine_and_error_by_hand() {
    let (y, t) = ([3.0, 4.0, 1.0, 0.0], [4.0, 3.0, 0.0, 2.0]);
    assert!((mean_cosine(&y, &t, 2).unwrap() - 0.48).abs() < 1e-12);
    assert!((mean_squared_error(&y, &t, 2).unwrap() - 7.0 / 4.0).abs() < 1e-12);
    assert_eq!(mean_cosine(&[0.0; 2], &[1.0, 0.0], 2).unwrap(), 0.0);
    assert!(
        mean_cosine(&[f32::NAN, 0.0], &[1.0, 0.0], 2)
            .unwrap()
            .is_nan()
    );
}

#[test]
fn ranks_by_hand() {
    // Row 0 is nearest to its own, row 1 to that of row 0, row 2 is zero, row 3 no number.
    let targets = [1.0, 0.0, 0.0, 1.0, -1.0, 0.0, 0.0, -1.0];
    let embeddings = [9.0, 1.0, 2.0, 1.0, 0.0, 0.0, f32::NAN, 1.0];
    let ranks = retrieval_ranks(&embeddings, &targets, 2).unwrap();
    assert_eq!(ranks, [0, 1, 3, 3]);
    assert_eq!(precision_at(&ranks, 0), 0.0);
    assert_eq!(precision_at(&ranks, 1), 0.25);
    assert_eq!(precision_at(&ranks, 2), 0.5);
    assert_eq!(precision_at(&ranks, 4), 1.0);
    assert_eq!(precision_at(&[], 1), 0.0);
}

#[test]
fn ranks_agree_with_nearest() {
    // 1 to 9 rows straddle the tile of 4.
    for rows in 1..=9usize {
        let width = 3;
        let value = |i: usize| ((i * 37 + rows * 11) % 101) as f32 / 50.0 - 1.0;
        let targets: Vec<f32> = (0..rows * width).map(value).collect();
        let embeddings: Vec<f32> = (0..rows * width)
            .map(|i| value(i + 5) + targets[i])
            .collect();
        let ranks = retrieval_ranks(&embeddings, &targets, width).unwrap();
        for (i, query) in embeddings.chunks_exact(width).enumerate() {
            let order = nearest(query, &targets, rows).unwrap();
            assert_eq!(order.iter().position(|&(j, _)| j == i), Some(ranks[i]));
        }
    }
}

#[test]
fn nearest_in_order() {
    let matrix = [
        0.0,
        1.0,
        2.0,
        0.0,
        0.0,
        0.0,
        1.0,
        1.0,
        5.0,
        0.0,
        f32::NAN,
        0.0,
        -1.0,
        0.0,
    ];
    let found = nearest(&[1.0, 0.0], &matrix, 3).unwrap();
    let rows: Vec<usize> = found.iter().map(|&(row, _)| row).collect();
    assert_eq!(rows, [1, 4, 3], "the lower index first where equal");
    assert!((found[2].1 - std::f32::consts::FRAC_1_SQRT_2).abs() < 1e-6);
    let all = nearest(&[1.0, 0.0], &matrix, 100).unwrap();
    let rows: Vec<usize> = all.iter().map(|&(row, _)| row).collect();
    assert_eq!(rows, [1, 4, 3, 0, 2, 6, 5], "no number comes last");
    assert!(nearest(&[1.0, 0.0], &matrix, 0).unwrap().is_empty());
    assert!(nearest(&[1.0, 0.0], &[], 3).unwrap().is_empty());
}

#[test]
fn lengths_that_do_not_match_are_errors() {
    for (y, t, width) in [(4, 6, 2), (3, 3, 2), (0, 0, 2), (4, 4, 0)] {
        let (y, t) = (vec![1.0; y], vec![1.0; t]);
        assert!(matches!(
            mean_cosine(&y, &t, width),
            Err(Error::Data { .. })
        ));
        assert!(matches!(
            mean_squared_error(&y, &t, width),
            Err(Error::Data { .. })
        ));
        assert!(matches!(
            retrieval_ranks(&y, &t, width),
            Err(Error::Data { .. })
        ));
    }
    assert!(matches!(nearest(&[], &[1.0], 1), Err(Error::Data { .. })));
    assert!(matches!(
        nearest(&[1.0, 2.0], &[1.0], 1),
        Err(Error::Data { .. })
    ));
    assert!(matches!(
        nearest(&[f32::NAN], &[1.0], 1),
        Err(Error::Data { .. })
    ));
}

/// The teacher retrieves itself, and a wrong order does not.
#[test]
fn retrieval_of_the_validation_set() {
    let path =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("data/wordnet_val.safetensors");
    let dataset = Dataset::open(path).unwrap();
    let targets: Vec<f32> = dataset
        .iter()
        .flat_map(|sample| sample.unwrap().target().to_vec())
        .collect();
    let mut shifted = targets.clone();
    shifted.rotate_left(dataset.width());
    let ranks = retrieval_ranks(&targets, &targets, dataset.width()).unwrap();
    assert_eq!(precision_at(&ranks, 1), 1.0);
    let ranks = retrieval_ranks(&shifted, &targets, dataset.width()).unwrap();
    assert!(precision_at(&ranks, 1) < 0.01);
    assert!(precision_at(&ranks, 1000) == 1.0);
}
