//! Exact search: the same neighbours as comparing everything in f64, whatever the sizes.

mod common;

use energyflow::reference::top_k;
use energyflow::text::{Hit, Index, IndexOptions};
use energyflow::{DType, Error, Gpu};
use half::f16;
use tempfile::TempDir;

const NO_TEXTS: [&str; 0] = [];

/// Numbers in ±1 without a pattern.
fn numbers(n: usize, seed: u32) -> Vec<f32> {
    let mut x = seed.wrapping_mul(2_654_435_769) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        (x >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// Rows divided by their norm, as they are stored.
fn stored(rows: &[f32], width: usize, dtype: DType) -> Vec<f64> {
    let mut all = Vec::new();
    for row in rows.chunks_exact(width) {
        let norm = row
            .iter()
            .map(|&x| f64::from(x).powi(2))
            .sum::<f64>()
            .sqrt();
        let norm = if norm > 0.0 { norm } else { 1.0 };
        let unit = row.iter().map(|&x| (f64::from(x) / norm) as f32);
        all.extend(unit.map(|x| match dtype {
            DType::F16 => f16::from_f32(x).to_f64(),
            _ => f64::from(x),
        }));
    }
    all
}

/// Every hit is as good as that of the same rank when everything is compared, and its score is right.
fn check(index: &Index, rows: &[f32], queries: &[f32], k: usize) -> Vec<Vec<Hit>> {
    let (width, dtype) = (index.width(), index.dtype());
    let rows = stored(rows, width, dtype);
    let queries_stored = stored(queries, width, dtype);
    let hits = index.search(queries, k).unwrap();
    assert_eq!(hits.len(), queries_stored.len() / width);
    for (query, hits) in queries_stored.chunks_exact(width).zip(&hits) {
        let dot = |row: &[f64]| row.iter().zip(query).map(|(a, b)| a * b).sum::<f64>();
        let scores: Vec<f64> = rows.chunks_exact(width).map(dot).collect();
        let wanted = top_k(&scores, k);
        assert_eq!(hits.len(), wanted.len());
        for (hit, (_, score)) in hits.iter().zip(&wanted) {
            let tolerance = 2e-6;
            assert!(
                (f64::from(hit.score) - score).abs() < tolerance,
                "{hit:?}, not {score}"
            );
            assert!(
                (scores[hit.index] - score).abs() < tolerance,
                "{hit:?}, not {score}"
            );
        }
        assert!(hits.is_sorted_by(|a, b| a.score > b.score || (a.score == b.score && a.index < b.index)));
        let mut found: Vec<usize> = hits.iter().map(|hit| hit.index).collect();
        found.sort_unstable();
        found.dedup();
        assert_eq!(found.len(), hits.len(), "an embedding was found twice");
    }
    hits
}

fn index(gpu: &Gpu, width: usize, dtype: DType, chunk: usize) -> Index {
    let options = IndexOptions::default().dtype(dtype).chunk(chunk);
    Index::new(gpu, width, &options).unwrap()
}

#[test]
fn the_nearest_of_any_number_in_any_width() {
    let gpus = [common::gpu(), common::tiled_gpu(), common::baseline_gpu()];
    for (gpu, (n, width, q, k, dtype)) in gpus.iter().zip([
        (1500, 5, 3, 10, DType::F16),
        (4100, 33, 2, 7, DType::F32),
        (900, 16, 1, 3, DType::F16),
    ]) {
        let rows = numbers(n * width, 1);
        let mut index = index(gpu, width, dtype, 1 << 17);
        index.add(&rows, &NO_TEXTS).unwrap();
        assert_eq!(
            (index.len(), index.width(), index.text(0)),
            (n, width, None)
        );
        check(&index, &rows, &numbers(q * width, 2), k);
        // A row finds itself.
        let own = index.search(&rows[3 * width..4 * width], 1).unwrap();
        assert_eq!(own[0][0].index, 3);
        assert!((own[0][0].score - 1.0).abs() < 2e-3);
    }
}

#[test]
fn more_hits_than_workgroup_memory_ranks() {
    let rows = numbers(1200 * 3, 5);
    for gpu in [common::gpu(), common::tiled_gpu()] {
        let mut index = index(&gpu, 3, DType::F32, 1 << 17);
        index.add(&rows, &NO_TEXTS).unwrap();
        check(&index, &rows, &numbers(3, 6), 300);
    }
}

#[test]
fn chunks_and_additions_make_no_difference() {
    let gpu = common::gpu();
    let width = 4;
    let rows = numbers(157 * width, 3);
    let queries = numbers(66 * width, 4);
    let mut whole = index(&gpu, width, DType::F32, 1 << 17);
    whole.add(&rows, &NO_TEXTS).unwrap();
    let wanted = check(&whole, &rows, &queries, 9);
    let mut parts = index(&gpu, width, DType::F32, 50);
    for part in [0..1, 1..40, 40..40, 40..157] {
        parts
            .add(&rows[part.start * width..part.end * width], &NO_TEXTS)
            .unwrap();
    }
    assert_eq!(parts.len(), 157);
    let found = check(&parts, &rows, &queries, 9);
    for (found, wanted) in found.iter().flatten().zip(wanted.iter().flatten()) {
        assert!((found.score - wanted.score).abs() < 1e-6);
    }
    assert_eq!(parts.embeddings().unwrap(), whole.embeddings().unwrap());
    // All of them, and none.
    assert_eq!(check(&parts, &rows, &queries[..width], 1000)[0].len(), 157);
    assert_eq!(parts.search(&queries[..width], 0).unwrap(), [[]]);
    assert_eq!(parts.search(&[], 5).unwrap().len(), 0);
    let empty = index(&gpu, width, DType::F16, 50);
    assert!(empty.is_empty());
    assert_eq!(empty.search(&queries[..width], 5).unwrap(), [[]]);
}

#[test]
fn of_equal_embeddings_the_first_is_first() {
    for gpu in [common::gpu(), common::tiled_gpu()] {
        let mut index = index(&gpu, 2, DType::F16, 16);
        // Zero, four alike of different length, and their opposites; in several chunks.
        let rows: Vec<f32> = (0..60)
            .flat_map(|i| match i % 3 {
                0 => [0.0, 0.0],
                1 => [(i + 1) as f32, 0.0],
                _ => [-1.0, 0.0],
            })
            .collect();
        index.add(&rows, &NO_TEXTS).unwrap();
        let hits = index.search(&[2.0, 0.0, 0.0, 0.0], 23).unwrap();
        let found: Vec<usize> = hits[0].iter().map(|hit| hit.index).collect();
        let wanted = (1..60).step_by(3).chain([0, 3, 6]);
        assert_eq!(found, wanted.collect::<Vec<_>>());
        assert_eq!((hits[0][0].score, hits[0][20].score), (1.0, 0.0));
        // A zero query is equally near to all.
        let found: Vec<usize> = hits[1].iter().map(|hit| hit.index).collect();
        assert_eq!(found, (0..23).collect::<Vec<_>>());
    }
}

#[test]
fn an_index_comes_back_from_its_file() {
    let gpu = common::gpu();
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("index.safetensors");
    let width = 3;
    let rows = numbers(70 * width, 7);
    let texts: Vec<String> = (0..70).map(|i| format!("text {i} ä\n")).collect();
    for dtype in [DType::F16, DType::F32] {
        let mut index = index(&gpu, width, dtype, 32);
        index.add(&rows[..60 * width], &texts[..60]).unwrap();
        index.save(&path).unwrap();
        let mut loaded = Index::load(&gpu, &path).unwrap();
        assert_eq!(
            (loaded.len(), loaded.dtype(), loaded.width()),
            (60, dtype, width)
        );
        assert_eq!(loaded.embeddings().unwrap(), index.embeddings().unwrap());
        assert_eq!(loaded.text(59), Some("text 59 ä\n"));
        loaded.add(&rows[60 * width..], &texts[60..]).unwrap();
        check(&loaded, &rows, &rows[..2 * width], 5);
        assert_eq!(loaded.text(69), Some("text 69 ä\n"));
    }
    // Without texts, and without anything.
    for n in [2, 0] {
        let mut index = index(&gpu, width, DType::F16, 32);
        index.add(&rows[..n * width], &NO_TEXTS).unwrap();
        index.save(&path).unwrap();
        let loaded = Index::load(&gpu, &path).unwrap();
        assert_eq!((loaded.len(), loaded.text(0)), (n, None));
    }
    // Rows of another length.
    let mut index = self::index(&gpu, width, DType::F32, 32);
    index
        .add(&[1.0, 0.0, 0.0, 0.0, 1.0, 0.0], &NO_TEXTS)
        .unwrap();
    index.save(&path).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let one = bytes.len() - 8;
    assert_eq!(bytes[one..one + 4], 1.0_f32.to_le_bytes());
    bytes[one..one + 4].copy_from_slice(&1.5_f32.to_le_bytes());
    std::fs::write(&path, &bytes).unwrap();
    let error = Index::load(&gpu, &path).unwrap_err();
    assert!(
        matches!(&error, Error::Format { offset, reason, .. }
            if *offset == bytes.len() as u64 - 12 && reason.contains("embedding 1 has norm 1.5")),
        "{error}"
    );
    let mut index = self::index(&gpu, width, DType::F16, 32);
    index.add(&[0.0; 0], &NO_TEXTS).unwrap();
    index.save(&path).unwrap();
    // Other files.
    let good = std::fs::read(&path).unwrap();
    let fail = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        let error = Index::load(&gpu, &path).unwrap_err();
        assert!(
            matches!(&error, Error::Format { path: p, .. } if *p == path),
            "{error:?}"
        );
        error.to_string()
    };
    let replace = |from: &str, to: &str| {
        let at = good
            .windows(from.len())
            .position(|part| part == from.as_bytes());
        let at = at.unwrap();
        [&good[..at], to.as_bytes(), &good[at + from.len()..]].concat()
    };
    assert!(fail(&replace("energyflow.index", "energyflow.other")).contains("other"));
    assert!(fail(&replace("\"version\":\"1\"", "\"version\":\"2\"")).contains("update energyflow"));
    assert!(fail(&good[..good.len() / 2]).contains("header"));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn what_is_wrong_is_said_and_changes_nothing() {
    let gpu = common::gpu();
    let width = 3;
    let rows = numbers(5 * width, 8);
    let mut index = index(&gpu, width, DType::F16, 4);
    index.add(&rows, &["a", "b", "c", "d", "e"]).unwrap();
    let mut fail = |rows: &[f32], texts: &[&str], what: &str| {
        let error = index.add(rows, texts).unwrap_err();
        assert!(matches!(error, Error::Data { .. }), "{error:?}");
        assert!(error.to_string().contains(what), "{error}");
        assert_eq!(index.len(), 5);
        assert_eq!((index.text(4), index.text(5)), (Some("e"), None));
    };
    fail(&rows[..4], &[], "rows of 3");
    fail(&[0.0, f32::NAN, 0.0], &["x"], "row 0, column 1");
    fail(&rows, &["x"], "1 texts for 5");
    fail(&rows, &[], "have texts");
    let search = |queries: &[f32], k| index.search(queries, k).unwrap_err().to_string();
    assert!(search(&[f32::INFINITY, 0.0, 0.0], 1).contains("queries"));
    assert!(search(&[0.0; 4], 1).contains("rows of 3"));
    let options = IndexOptions::default();
    assert!(matches!(
        Index::new(&gpu, 0, &options),
        Err(Error::Config { .. })
    ));
    let u32s = options.clone().dtype(DType::U32);
    assert!(matches!(
        Index::new(&gpu, 3, &u32s),
        Err(Error::Config { .. })
    ));
    assert!(matches!(
        Index::new(&gpu, 3, &options.chunk(0)),
        Err(Error::Config { .. })
    ));
    // More than are ever found at once.
    let mut large = self::index(&gpu, 1, DType::F16, 1 << 17);
    large.add(&vec![1.0; 4097], &NO_TEXTS).unwrap();
    assert!(
        large
            .search(&[1.0], 4097)
            .unwrap_err()
            .to_string()
            .contains("4096")
    );
}

#[test]
fn any_thread_may_search() {
    let gpu = common::gpu();
    let width = 4;
    let rows = numbers(300 * width, 9);
    let mut index = index(&gpu, width, DType::F16, 128);
    index.add(&rows, &NO_TEXTS).unwrap();
    let queries = numbers(8 * width, 10);
    let wanted = check(&index, &rows, &queries, 4);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..5 {
                    assert_eq!(index.search(&queries, 4).unwrap(), wanted);
                }
            });
        }
    });
}
