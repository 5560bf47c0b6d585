//! Metrics on the host, against values worked out by hand or the slow way.

use energyflow::text::Dataset;
use energyflow::text::metrics::{
    self, mean_cosine, mean_squared_error, nearest, precision_at, retrieval_ranks,
};
use energyflow::{Error, Result};

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

/// Neighbours and correlations of the same rows in another order of similarity, counted by hand.
#[test]
fn overlap_of_neighbours() -> Result<()> {
    // Angles on the unit circle, in degrees.
    let circle = |degrees: &[f64]| -> Vec<f32> {
        let radians = degrees.iter().map(|x| x.to_radians());
        radians
            .flat_map(|x| [x.cos() as f32, x.sin() as f32])
            .collect()
    };
    let ours = circle(&[0.0, 10.0, 30.0, 70.0]);
    let theirs = circle(&[0.0, 50.0, 30.0, 10.0]);
    // One neighbour each. Ours: 1, 0, 1, 2. Theirs: 3, 2, 3 (20 degrees, as 1, and 1 is first), 0.
    // Exactly equal cosines are left out of this test: 30 − 10 and 50 − 30 may differ in the last bit.
    let theirs_apart = circle(&[0.0, 51.0, 30.0, 10.0]);
    let overlap = metrics::neighbor_overlap(&ours, &theirs_apart, 2, 1)?;
    assert_eq!(overlap, 0.0);
    // Two neighbours each. Ours: {1,2} {0,2} {1,0} {2,1}. Theirs: {3,2} {2,3} {3,1} {0,2}: 1 + 1 + 1 + 1 of 8.
    let overlap = metrics::neighbor_overlap(&ours, &theirs_apart, 2, 2)?;
    assert_eq!(overlap, 0.5);
    // Three neighbours are all others, and so are ten.
    for k in [3, 10] {
        assert_eq!(metrics::neighbor_overlap(&ours, &theirs, 2, k)?, 1.0);
    }
    assert_eq!(metrics::neighbor_overlap(&ours, &ours, 2, 1)?, 1.0);
    // Scale does not matter; a row that is not finite has no neighbours, but is nobody's either.
    let mut scaled: Vec<f32> = ours.iter().map(|x| 3.0 * x).collect();
    assert_eq!(metrics::neighbor_overlap(&scaled, &ours, 2, 1)?, 1.0);
    scaled[6] = f32::NAN;
    assert_eq!(metrics::neighbor_overlap(&scaled, &ours, 2, 1)?, 0.75);
    assert!(metrics::neighbor_overlap(&ours, &theirs, 2, 0).is_err());
    assert!(metrics::neighbor_overlap(&ours[..2], &theirs[..2], 2, 1).is_err());
    assert!(metrics::neighbor_overlap(&ours, &theirs[..4], 2, 1).is_err());
    Ok(())
}

#[test]
fn correlation_of_similarities() -> Result<()> {
    // Cosines of the pairs (0,1) (0,2) (1,2): ours 0, 0.6, 0.8 and theirs 0.6, 0, 0.8 in exact thirds of ranks.
    let ours = [1.0, 0.0, 0.0, 1.0, 0.6, 0.8];
    let theirs = [1.0, 0.0, 0.6, 0.8, 0.0, 1.0];
    // Ranks 0 1 2 and 1 0 2: 1 − 6 · (1 + 1 + 0) / (3 · 8) = 0.5
    let near = |found: f64, wanted: f64| assert!((found - wanted).abs() < 1e-12, "{found}");
    near(metrics::similarity_correlation(&ours, &theirs, 2)?, 0.5);
    near(metrics::similarity_correlation(&ours, &ours, 2)?, 1.0);
    // Ties have their mean rank. Cosines of the pairs ours: 0, 1, 0; theirs: 0, 0.6, 0.8.
    let tied = [1.0, 0.0, 0.0, 2.0, 3.0, 0.0];
    // Ranks 0.5 2 0.5 and 0 1 2: the covariance is (−0.5)(−1) + 1 · 0 + (−0.5)(1) = 0.
    near(metrics::similarity_correlation(&tied, &ours, 2)?, 0.0);
    // Ranks 0.5 2 0.5 and 1 0 2: (−0.5)(0) + (1)(−1) + (−0.5)(1) = −1.5, over √1.5 · √2.
    near(
        metrics::similarity_correlation(&tied, &theirs, 2)?,
        -1.5 / (1.5f64.sqrt() * 2f64.sqrt()),
    );
    // All similarities are equal, or one is no number.
    assert!(metrics::similarity_correlation(&[1.0; 6], &ours, 2)?.is_nan());
    assert!(
        metrics::similarity_correlation(&[1.0, 0.0, f32::NAN, 1.0, 0.6, 0.8], &ours, 2)?.is_nan()
    );
    assert!(metrics::similarity_correlation(&ours[..2], &ours[..2], 2).is_err());
    Ok(())
}

#[test]
fn distinct_n_grams() -> Result<()> {
    let texts: [&[u32]; 4] = [&[1, 2, 1, 2], &[1, 2, 3], &[7], &[]];
    // 1 2 3 7 of eight; 12 21 23 of five; 121 212 123 of three.
    assert_eq!(metrics::distinct_n(&texts, 1)?, 4.0 / 8.0);
    assert_eq!(metrics::distinct_n(&texts, 2)?, 3.0 / 5.0);
    assert_eq!(metrics::distinct_n(&texts, 3)?, 1.0);
    assert_eq!(metrics::distinct_n(&texts, 5)?, 0.0);
    assert!(metrics::distinct_n(&texts, 0).is_err());
    Ok(())
}

/// Noise lowers both, and of unrelated rows only chance remains.
#[test]
fn agreement_of_many_rows() -> Result<()> {
    let mut x = 1u32;
    let mut next = || {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (x >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    let (rows, width) = (300, 64);
    let ours: Vec<f32> = (0..rows * width).map(|_| next()).collect();
    let theirs: Vec<f32> = ours.iter().map(|x| x + 0.1 * next()).collect();
    let overlap = metrics::neighbor_overlap(&ours, &theirs, width, 10)?;
    let correlation = metrics::similarity_correlation(&ours, &theirs, width)?;
    assert!(overlap > 0.6 && overlap < 1.0, "{overlap}");
    assert!(correlation > 0.9 && correlation < 1.0, "{correlation}");
    let noise: Vec<f32> = (0..rows * width).map(|_| next()).collect();
    let overlap = metrics::neighbor_overlap(&ours, &noise, width, 10)?;
    let correlation = metrics::similarity_correlation(&ours, &noise, width)?;
    // By chance 10 of 299.
    assert!(
        overlap < 0.06 && correlation.abs() < 0.05,
        "{overlap} {correlation}"
    );
    Ok(())
}
