//! Datasets: round trips, every kind of damage, the bundled files, JSON lines.

use std::path::{Path, PathBuf};

use energyflow::Error;
use energyflow::text::{Compact, CompactWriter, Dataset, Efb1, Efb1Writer, JsonLines, OpenOptions};
use half::f16;
use proptest::prelude::*;
use tempfile::TempDir;

/// A sample in memory: ids, mask, target, text.
type Owned = (Vec<u32>, Vec<u8>, Vec<f32>, String);

fn samples() -> Vec<Owned> {
    vec![
        (vec![7, 8, 9], vec![1, 1, 0], vec![0.1, -2.0], "drei".into()),
        (vec![99], vec![1], vec![0.0, 1e-3], String::new()),
        (vec![1, 2], vec![0, 1], vec![-0.3, 65504.0], "ört ✓".into()),
    ]
}

fn write_efb1(path: &Path, samples: &[Owned]) {
    let mut writer = Efb1Writer::create(path, samples[0].2.len()).unwrap();
    for (ids, mask, target, _) in samples {
        writer.push(ids, mask, target).unwrap();
    }
    writer.finish().unwrap();
}

fn write_compact(path: &Path, samples: &[Owned], with_text: bool) {
    let mut writer = CompactWriter::create(path, samples[0].2.len()).unwrap();
    for (ids, mask, target, text) in samples {
        let text = with_text.then_some(text.as_str());
        writer.push(ids, mask, target, text).unwrap();
    }
    writer.finish().unwrap();
}

fn read(dataset: &Dataset) -> Vec<Owned> {
    let owned = dataset.iter().map(|sample| {
        (
            sample.ids().collect(),
            sample.mask().collect(),
            sample.target().collect(),
            sample.text().unwrap_or("-").into(),
        )
    });
    owned.collect()
}

/// A folder, and the bytes of the same three samples in each format.
fn fixtures() -> (TempDir, Vec<u8>, Vec<u8>) {
    let folder = TempDir::new().unwrap();
    let (efb1, compact) = (folder.path().join("a.efb"), folder.path().join("a.efc"));
    write_efb1(&efb1, &samples());
    write_compact(&compact, &samples(), true);
    let bytes = (
        std::fs::read(efb1).unwrap(),
        std::fs::read(compact).unwrap(),
    );
    (folder, bytes.0, bytes.1)
}

fn open_bytes(folder: &TempDir, bytes: &[u8], vocab: Option<u32>) -> Result<Dataset, Error> {
    let path = folder.path().join("damaged");
    std::fs::write(&path, bytes).unwrap();
    Dataset::open_with(path, OpenOptions::default().vocab(vocab))
}

/// The file must be refused as malformed, under its name; returns offset and reason.
fn refusal(folder: &TempDir, bytes: &[u8], vocab: Option<u32>) -> (u64, String) {
    match open_bytes(folder, bytes, vocab) {
        Err(Error::Format {
            path,
            offset,
            reason,
        }) => {
            assert_eq!(path, folder.path().join("damaged"));
            (offset, reason)
        }
        other => panic!("expected a format error, got {other:?}"),
    }
}

fn patched(bytes: &[u8], at: usize, new: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at..at + new.len()].copy_from_slice(new);
    bytes
}

fn bundled(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("data")
        .join(name)
}

#[test]
fn efb1_round_trip_is_exact() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.efb");
    write_efb1(&path, &samples());
    let mut expected = samples();
    for sample in &mut expected {
        sample.3 = "-".into();
    }
    assert_eq!(read(&Efb1::open(&path).unwrap().into()), expected);
    assert_eq!(read(&Dataset::open(&path).unwrap()), expected);
}

#[test]
fn efb1_layout_is_the_documented_one() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.efb");
    write_efb1(
        &path,
        &[(vec![258, 3], vec![1, 0], vec![1.0], String::new())],
    );
    let mut expected = b"EFB1".to_vec();
    expected.extend([1, 0, 0, 0, 1, 0, 0, 0]);
    expected.extend([2, 0, 0, 0, 2, 1, 0, 0, 3, 0, 0, 0, 1, 0]);
    expected.extend([0, 0, 0x80, 0x3f]);
    assert_eq!(std::fs::read(path).unwrap(), expected);
}

#[test]
fn compact_round_trip_is_exact_but_for_f16_targets() {
    let folder = TempDir::new().unwrap();
    for with_text in [true, false] {
        let path = folder.path().join("a.efc");
        write_compact(&path, &samples(), with_text);
        let mut expected = samples();
        for (_, _, target, text) in &mut expected {
            for value in target {
                *value = f16::from_f32(*value).to_f32();
            }
            if !with_text {
                *text = "-".into();
            }
        }
        assert_eq!(read(&Compact::open(&path).unwrap().into()), expected);
        assert_eq!(read(&Dataset::open(&path).unwrap()), expected);
    }
}

#[test]
fn compact_leaves_out_a_mask_of_ones() {
    let folder = TempDir::new().unwrap();
    let (masked, plain) = (folder.path().join("masked"), folder.path().join("plain"));
    let mut all_ones = samples();
    write_compact(&masked, &all_ones, false);
    for sample in &mut all_ones {
        sample.1.fill(1);
    }
    write_compact(&plain, &all_ones, false);
    assert!(plain.metadata().unwrap().len() < masked.metadata().unwrap().len());
    let dataset = Dataset::open(&plain).unwrap();
    assert!(
        dataset
            .iter()
            .all(|sample| sample.mask().all(|byte| byte == 1))
    );
}

#[test]
fn writers_refuse_what_readers_would() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a");
    let refused = |result: Result<(), Error>, word: &str| match result {
        Err(Error::Data { reason, .. }) => assert!(reason.contains(word), "{reason}"),
        other => panic!("expected {word:?}, got {other:?}"),
    };
    let mut efb1 = Efb1Writer::create(&path, 2).unwrap();
    let mut compact = CompactWriter::create(&path, 2).unwrap();
    let ok = [0.0, 1.0];
    type Case<'a> = (&'a [u32], &'a [u8], &'a [f32], &'a str);
    let cases: [Case; 5] = [
        (&[], &[], &ok, "no tokens"),
        (&[1, 2], &[1], &ok, "mask values"),
        (&[1], &[2], &ok, "neither 0 nor 1"),
        (&[1], &[1], &[0.0], "1 values instead of 2"),
        (&[1], &[1], &[0.0, f32::NAN], "not finite"),
    ];
    for (ids, mask, target, word) in cases {
        refused(efb1.push(ids, mask, target), word);
        refused(compact.push(ids, mask, target, None), word);
    }
    refused(compact.push(&[65536], &[1], &ok, None), "16 bits");
    refused(compact.push(&[1], &[1], &[0.0, 70000.0], None), "f16");
    compact.push(&[65535], &[1], &ok, Some("text")).unwrap();
    refused(compact.push(&[1], &[1], &ok, None), "a text, or none");
    refused(efb1.finish(), "0 samples");
    refused(Efb1Writer::create(&path, 0).map(drop), "0 values");
    refused(CompactWriter::create(&path, 0).map(drop), "0 values");
    drop(compact);
    assert_eq!(
        std::fs::read_dir(folder.path()).unwrap().count(),
        0,
        "an unfinished file leaves nothing behind"
    );
}

#[test]
fn an_unfinished_file_does_not_replace_the_old_one() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.efb");
    write_efb1(&path, &samples());
    let before = std::fs::read(&path).unwrap();
    let mut writer = Efb1Writer::create(&path, 1).unwrap();
    writer.push(&[1], &[1], &[0.5]).unwrap();
    drop(writer);
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

#[test]
fn truncated_at_every_byte() {
    let (folder, efb1, compact) = fixtures();
    for bytes in [efb1, compact] {
        assert_eq!(open_bytes(&folder, &bytes, None).unwrap().len(), 3);
        for length in 0..bytes.len() {
            let (offset, _) = refusal(&folder, &bytes[..length], None);
            assert!(offset <= length as u64, "offset {offset} of {length} bytes");
        }
        let mut longer = bytes.clone();
        longer.push(0);
        let (offset, reason) = refusal(&folder, &longer, None);
        assert_eq!(offset, bytes.len() as u64);
        assert!(reason.contains("1 bytes follow"), "{reason}");
    }
}

#[test]
fn efb1_lying_fields() {
    let (folder, bytes, _) = fixtures();
    // The first sample: length at 12, ids at 16, mask at 28, target at 31.
    let max = u32::MAX.to_le_bytes();
    let cases: [(usize, &[u8], u64, &str); 14] = [
        (0, b"EFB2", 0, "neither"),
        (4, &[0; 4], 4, "samples is zero"),
        (4, &max, 4, "take at least"),
        (4, &[2, 0, 0, 0], 56, "bytes follow"),
        (4, &[4, 0, 0, 0], 4, "take at least"),
        (8, &[0; 4], 8, "width of the targets is zero"),
        (8, &max, 4, "take at least"),
        (12, &[0; 4], 12, "length of a sample is zero"),
        (12, &max, 16, "the file ends"),
        (12, &[0, 0, 0, 0x40], 16, "the file ends"),
        (30, &[2], 30, "mask byte is 2"),
        (31, &f32::NAN.to_le_bytes(), 31, "not finite"),
        (35, &f32::INFINITY.to_le_bytes(), 35, "not finite"),
        (35, &f32::NEG_INFINITY.to_le_bytes(), 35, "not finite"),
    ];
    for (at, new, offset, word) in cases {
        let (found, reason) = refusal(&folder, &patched(&bytes, at, new), None);
        assert!(reason.contains(word), "{at}: {reason}");
        assert_eq!(found, offset, "{at}: {reason}");
    }
}

#[test]
fn compact_lying_fields() {
    let (folder, _, bytes) = fixtures();
    // 3 samples, 6 tokens, 12 text bytes: bounds at 32..48, ids 48..60, mask 64..70, text bounds 80..96,
    // texts 96..108, targets 112..124.
    assert_eq!(bytes.len(), 124);
    let max = u32::MAX.to_le_bytes();
    let cases: [(usize, &[u8], u64, &str); 26] = [
        (0, b"EFC2", 0, "neither"),
        (4, &[0; 4], 4, "samples is zero"),
        (4, &max, 4, "do not fit"),
        (4, &[4, 0, 0, 0], 4, "do not fit"),
        (4, &[2, 0, 0, 0], 44, "padding is not zero"),
        (8, &[0; 4], 8, "width of the targets is zero"),
        (8, &max, 4, "do not fit"),
        (12, &[7], 12, "unknown flags"),
        (12, &[1], 20, "not flagged"),
        (16, &[0; 4], 16, "tokens is zero"),
        (16, &max, 4, "do not fit"),
        (16, &[5, 0, 0, 0], 58, "padding is not zero"),
        (44, &[5], 44, "header says 6"),
        (20, &max, 4, "do not fit"),
        (20, &[11, 0, 0, 0], 107, "padding is not zero"),
        (24, &[1], 24, "padding is not zero"),
        (60, &[1], 60, "padding is not zero"),
        (79, &[1], 79, "padding is not zero"),
        (32, &[1], 32, "first bound"),
        (36, &[0], 36, "follows bound"),
        (40, &[200], 44, "follows bound"),
        (65, &[2], 65, "mask byte is 2"),
        (84, &[13], 88, "follows bound"),
        (96, &[0xff], 96, "UTF-8"),
        (114, &f16::NAN.to_le_bytes(), 114, "not finite"),
        (122, &f16::INFINITY.to_le_bytes(), 122, "not finite"),
    ];
    for (at, new, offset, word) in cases {
        let (found, reason) = refusal(&folder, &patched(&bytes, at, new), None);
        assert!(reason.contains(word), "{at}: {reason}");
        assert_eq!(found, offset, "{at}: {reason}");
    }
    // A bound inside a character: both halves are invalid by themselves. "ört" starts at byte 4 of the texts.
    let (offset, reason) = refusal(&folder, &patched(&bytes, 88, &[5, 0, 0, 0]), None);
    assert_eq!((offset, reason.contains("UTF-8")), (100, true), "{reason}");
}

#[test]
fn ids_are_checked_against_the_vocabulary() {
    let (folder, efb1, compact) = fixtures();
    // Id 99 is the first of the second sample.
    for (bytes, at) in [(efb1, 43), (compact, 54)] {
        assert!(open_bytes(&folder, &bytes, Some(100)).is_ok());
        let (offset, reason) = refusal(&folder, &bytes, Some(99));
        assert_eq!(offset, at);
        assert!(
            reason.contains("token id 99") && reason.contains("99"),
            "{reason}"
        );
    }
}

#[test]
fn empty_and_missing_files() {
    let folder = TempDir::new().unwrap();
    assert_eq!(refusal(&folder, &[], None), (0, "the file is empty".into()));
    let missing = folder.path().join("missing");
    assert!(matches!(Dataset::open(&missing), Err(Error::Io { path, .. }) if path == missing));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutations_never_panic(
        compact: bool,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let (folder, efb1, compact_bytes) = fixtures();
        let mut bytes = if compact { compact_bytes } else { efb1 };
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len() + 1));
        }
        match open_bytes(&folder, &bytes, Some(1000)) {
            Ok(dataset) => {
                prop_assert_eq!(read(&dataset).len(), dataset.len());
                prop_assert!(dataset.iter().all(|sample| sample.target().all(f32::is_finite)));
            }
            Err(error) => prop_assert!(matches!(error, Error::Format { .. }), "{error}"),
        }
    }

    #[test]
    fn random_samples_round_trip(
        width in 1usize..5,
        tokens in prop::collection::vec(prop::collection::vec((0u32..65536, 0u8..2), 1..9), 1..6),
        values in prop::collection::vec(-100f32..100.0, 25),
    ) {
        let samples: Vec<Owned> = tokens.into_iter().enumerate().map(|(i, tokens)| {
            let (ids, mask) = tokens.into_iter().unzip();
            let target = values[i * width..(i + 1) * width].to_vec();
            (ids, mask, target, "-".into())
        }).collect();
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("a");
        write_efb1(&path, &samples);
        prop_assert_eq!(&read(&Dataset::open(&path).unwrap()), &samples);
        write_compact(&path, &samples, false);
        for (found, wanted) in read(&Dataset::open(&path).unwrap()).iter().zip(&samples) {
            prop_assert_eq!((&found.0, &found.1), (&wanted.0, &wanted.1));
            for (found, wanted) in found.2.iter().zip(&wanted.2) {
                prop_assert!((found - wanted).abs() <= wanted.abs() * 4.9e-4 + 3e-8);
            }
        }
    }
}

#[test]
fn bundled_files() {
    for (name, samples, has_texts) in [
        ("wordnet_train.efc", 12000, false),
        ("wordnet_val.efc", 1000, true),
    ] {
        let options = OpenOptions::default().vocab(Some(30522));
        let dataset = Dataset::open_with(bundled(name), options).unwrap();
        assert_eq!((dataset.len(), dataset.width()), (samples, 384));
        for sample in dataset.iter() {
            let squares: f64 = sample.target().map(|value| f64::from(value).powi(2)).sum();
            assert!((squares.sqrt() - 1.0).abs() < 1e-3, "{name}: {squares}");
            let ids: Vec<u32> = sample.ids().collect();
            assert!(
                (3..=64).contains(&ids.len()),
                "{name}: {} tokens",
                ids.len()
            );
            assert_eq!((ids[0], ids[ids.len() - 1]), (101, 102), "[CLS] and [SEP]");
            assert!(sample.mask().all(|byte| byte == 1));
            assert_eq!(sample.text().is_some(), has_texts);
        }
    }
}

#[test]
fn validation_is_not_in_training() {
    let ids = |name| -> std::collections::HashSet<Vec<u32>> {
        let dataset = Dataset::open(bundled(name)).unwrap();
        dataset
            .iter()
            .map(|sample| sample.ids().collect())
            .collect()
    };
    assert!(ids("wordnet_train.efc").is_disjoint(&ids("wordnet_val.efc")));
}

#[test]
fn parts_share_the_file_and_keep_the_order() {
    let dataset = Dataset::open(bundled("wordnet_val.efc")).unwrap();
    let (head, tail) = dataset.split(300);
    assert_eq!((head.len(), tail.len()), (300, 700));
    let ids =
        |dataset: &Dataset, index| -> Vec<u32> { dataset.sample(index).unwrap().ids().collect() };
    assert_eq!(ids(&tail, 5), ids(&dataset, 305));
    assert_eq!(ids(&tail.take(6), 5), ids(&dataset, 305));
    assert!(head.sample(300).is_none() && tail.sample(700).is_none());
    assert!(dataset.sample(usize::MAX).is_none() && tail.sample(usize::MAX).is_none());
    assert_eq!(dataset.take(5000).len(), 1000);
    assert!(dataset.split(1000).1.is_empty());
}

#[test]
fn copies_check_their_lengths() {
    let dataset = Dataset::open(bundled("wordnet_val.efc")).unwrap();
    let sample = dataset.sample(0).unwrap();
    assert!(matches!(
        sample.copy_tokens(&mut [0; 3], &mut [0.0; 4], 0),
        Err(Error::Data { .. })
    ));
    assert!(matches!(
        sample.copy_target(&mut [0.0; 383]),
        Err(Error::Data { .. })
    ));
    assert!(sample.copy_target(&mut [0.0; 384]).is_ok());
}

#[test]
fn json_lines_are_read_in_order() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.jsonl");
    let lines = concat!(
        r#"{"text": "ört", "target": [0.5, -1]}"#,
        "\n",
        r#"{"input_ids": [3, 4], "attention_mask": [1, 0], "target": [0, 1e-3], "more": null}"#,
    );
    std::fs::write(&path, lines).unwrap();
    let records: Result<Vec<_>, _> = JsonLines::open(&path).unwrap().collect();
    let records = records.unwrap();
    assert_eq!(records.len(), 2);
    assert_eq!(records[0].text.as_deref(), Some("ört"));
    assert_eq!(
        (&records[0].input_ids, &records[0].target),
        (&None, &vec![0.5, -1.0])
    );
    assert_eq!(records[1].input_ids, Some(vec![3, 4]));
    assert_eq!(records[1].attention_mask, Some(vec![1, 0]));
    assert_eq!(records[1].target, [0.0, 1e-3]);
}

#[test]
fn bad_json_lines_are_named() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.jsonl");
    let good = r#"{"text": "a", "target": [1]}"#;
    let cases = [
        (r#"{"text": "a", "target": [1}"#, 26, "expected"),
        ("", 0, "EOF"),
        (r#"{"text""#, 6, "EOF"),
        (r#"[null, null, null, [1]]"#, 0, "not an object"),
        (r#"{"text": "a"}"#, 12, "missing field `target`"),
        (r#"{"text": "a", "target": []}"#, 0, "empty"),
        (r#"{"text": "a", "target": [1, 2]}"#, 0, "first line's 1"),
        (r#"{"text": "a", "target": [1e39]}"#, 0, "not finite"),
        (r#"{"text": "a", "target": [NaN]}"#, 25, "expected value"),
        (r#"{"target": [1]}"#, 0, "neither text nor input_ids"),
        (
            r#"{"text": "a", "attention_mask": [1], "target": [1]}"#,
            0,
            "without input_ids",
        ),
        (
            r#"{"input_ids": [], "target": [1]}"#,
            0,
            "input_ids is empty",
        ),
        (r#"{"input_ids": [-1], "target": [1]}"#, 16, "invalid value"),
        (
            r#"{"input_ids": [10], "target": [1]}"#,
            0,
            "token id 10 is not below the vocabulary size 10",
        ),
        (
            r#"{"input_ids": [1], "attention_mask": [1, 1], "target": [1]}"#,
            0,
            "2 values in attention_mask",
        ),
        (
            r#"{"input_ids": [1], "attention_mask": [2], "target": [1]}"#,
            0,
            "neither 0 nor 1",
        ),
    ];
    for (bad, column, word) in cases {
        std::fs::write(&path, format!("{good}\n{bad}\n{good}\n")).unwrap();
        let options = OpenOptions::default().vocab(Some(10));
        let mut lines = JsonLines::open_with(&path, options).unwrap();
        assert!(lines.next().unwrap().is_ok());
        match lines.next() {
            Some(Err(Error::Format {
                path: named,
                offset,
                reason,
            })) => {
                assert_eq!(named, path);
                assert!(
                    reason.starts_with("line 2: ") && reason.contains(word),
                    "{bad}: {reason}"
                );
                assert_eq!(offset, good.len() as u64 + 1 + column, "{bad}: {reason}");
            }
            other => panic!("{bad}: {other:?}"),
        }
        assert!(lines.next().is_none(), "ends after the first bad line");
    }
}

#[test]
fn a_json_line_without_end_is_not_read_whole() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.jsonl");
    std::fs::write(&path, vec![b' '; energyflow::text::jsonl::MAX_LINE + 10]).unwrap();
    match JsonLines::open(&path).unwrap().next() {
        Some(Err(Error::Format {
            offset: 0, reason, ..
        })) => assert!(reason.contains("longer")),
        other => panic!("{other:?}"),
    }
}
