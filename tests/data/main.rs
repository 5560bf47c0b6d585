//! Datasets: round trips, every kind of damage, files that change, the bundled files.

mod efb2;
mod json_lines;
mod records;
mod tensors;
mod texts;

use std::path::{Path, PathBuf};

use energyflow::Error;
use energyflow::text::{
    Batches, Dataset, DatasetWriter, Efb1Writer, EmbeddingType, JsonLines, OpenOptions, Tokenizer,
    Whitespace,
};
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

fn write_tensors(path: &Path, samples: &[Owned], dtype: EmbeddingType, with_text: bool) {
    let mut writer = DatasetWriter::create(path, samples[0].2.len(), dtype).unwrap();
    for (ids, mask, target, text) in samples {
        let text = with_text.then_some(text.as_str());
        writer.push(ids, mask, target, text).unwrap();
    }
    writer.finish().unwrap();
}

fn read(dataset: &Dataset) -> Vec<Owned> {
    let owned = dataset.iter().map(|sample| {
        let sample = sample.unwrap();
        assert_eq!(sample.len(), sample.ids().len());
        (
            sample.ids().to_vec(),
            sample.mask().to_vec(),
            sample.target().to_vec(),
            sample.text().unwrap_or("-").into(),
        )
    });
    owned.collect()
}

/// A folder, and the bytes of the same three samples in each format.
fn fixtures() -> (TempDir, Vec<u8>, Vec<u8>) {
    let folder = TempDir::new().unwrap();
    let (efb1, tensors) = (folder.path().join("a.efb"), folder.path().join("a.st"));
    write_efb1(&efb1, &samples());
    write_tensors(&tensors, &samples(), EmbeddingType::F16, true);
    let bytes = (
        std::fs::read(efb1).unwrap(),
        std::fs::read(tensors).unwrap(),
    );
    (folder, bytes.0, bytes.1)
}

fn open_bytes(folder: &TempDir, bytes: &[u8], vocab: Option<u32>) -> Result<Dataset, Error> {
    let path = folder.path().join("damaged");
    std::fs::write(&path, bytes).unwrap();
    // In memory or sample by sample: the same checks.
    let mut options = OpenOptions::default();
    options.vocab = vocab;
    let held = Dataset::open_with(&path, options);
    let read = Dataset::open_with(&path, options.in_memory(0));
    assert_eq!(
        held.map_or_else(
            |error| error.to_string(),
            |held| format!("{:?}", self::read(&held))
        ),
        read.as_ref().map_or_else(
            |error| error.to_string(),
            |read| format!("{:?}", self::read(read))
        )
    );
    read
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
fn tensors_round_trip_is_exact_but_for_f16_targets() {
    let folder = TempDir::new().unwrap();
    for (with_text, dtype) in [
        (true, EmbeddingType::F16),
        (false, EmbeddingType::F16),
        (true, EmbeddingType::F32),
        (false, EmbeddingType::F32),
    ] {
        let path = folder.path().join("a");
        write_tensors(&path, &samples(), dtype, with_text);
        let mut expected = samples();
        for (_, _, target, text) in &mut expected {
            if dtype == EmbeddingType::F16 {
                for value in target {
                    *value = f16::from_f32(*value).to_f32();
                }
            }
            if !with_text {
                *text = "-".into();
            }
        }
        assert_eq!(read(&Dataset::open(&path).unwrap()), expected);
    }
}

#[test]
fn large_ids_and_long_samples_round_trip() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a");
    let text = "é".repeat(40_000);
    let expected = vec![
        (vec![65_536, u32::MAX], vec![1, 1], vec![0.5], text),
        (vec![7; 70_000], vec![1; 70_000], vec![1.0], String::new()),
    ];
    write_tensors(&path, &expected, EmbeddingType::F32, true);
    assert!(read(&Dataset::open(&path).unwrap()) == expected);
}

#[test]
fn a_mask_of_ones_is_left_out() {
    let folder = TempDir::new().unwrap();
    let (masked, plain) = (folder.path().join("masked"), folder.path().join("plain"));
    let mut all_ones = samples();
    write_tensors(&masked, &all_ones, EmbeddingType::F16, false);
    for sample in &mut all_ones {
        sample.1.fill(1);
    }
    write_tensors(&plain, &all_ones, EmbeddingType::F16, false);
    assert!(plain.metadata().unwrap().len() < masked.metadata().unwrap().len());
    let dataset = Dataset::open(&plain).unwrap();
    assert!(
        dataset
            .iter()
            .all(|sample| sample.unwrap().mask().iter().all(|&byte| byte == 1))
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
    let mut tensors = DatasetWriter::create(&path, 2, EmbeddingType::F16).unwrap();
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
        refused(tensors.push(ids, mask, target, None), word);
    }
    refused(tensors.push(&[1], &[1], &[0.0, 70000.0], None), "f16");
    tensors.push(&[65536], &[1], &ok, Some("text")).unwrap();
    refused(tensors.push(&[1], &[1], &ok, None), "a text, or none");
    refused(efb1.finish(), "0 samples");
    refused(Efb1Writer::create(&path, 0).map(drop), "0 values");
    let create = |width, dtype| DatasetWriter::create(&path, width, dtype);
    refused(create(0, EmbeddingType::F16).map(drop), "0 values");
    refused(create(2, EmbeddingType::F16).unwrap().finish(), "0 samples");
    drop(tensors);
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
    let (folder, efb1, tensors) = fixtures();
    for bytes in [efb1, tensors] {
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
    let cases: [(usize, &[u8], u64, &str); 16] = [
        (0, b"EFB3", 0, "a newer energyflow wrote this file"),
        (0, b"EFB0", 0, "neither"),
        (0, b"EFC1", 0, "no longer read"),
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
fn files_of_no_known_format_are_named() {
    let folder = TempDir::new().unwrap();
    for (bytes, word) in [
        (
            &b"PK\x03\x04 zipped"[..],
            "begins with \"PK\\x03\\x04 zip\"",
        ),
        (b"\xff\xfe{\0\"\0", "UTF-16"),
        (
            b"text,target\n\x00",
            "neither a safetensors file, nor EFB1 or EFB2, nor JSON lines",
        ),
        (b"\x80", "begins with"),
        (
            b"text,target\n",
            "taken for texts, one per line, the file needs embeddings",
        ),
        (b"\n", "damaged.npy or "),
        (
            b" [\n{\"text\": \"a\"}]",
            "a JSON array is not read: write JSON lines",
        ),
    ] {
        let (offset, reason) = refusal(&folder, bytes, None);
        assert!(offset == 0 && reason.contains(word), "{reason}");
    }
}

#[test]
fn ids_are_checked_against_the_vocabulary() {
    let (folder, efb1, tensors) = fixtures();
    // Id 99 is the first of the second sample. The tensors: 12 bytes of targets, then ids by the order of their names.
    let ids = tensors.len() as u64 - (12 + 6 + 6 + 6 + 12);
    for (bytes, at) in [(efb1, 43), (tensors, ids + 6)] {
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
        tensors: bool,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let (folder, efb1, tensor_bytes) = fixtures();
        let mut bytes = if tensors { tensor_bytes } else { efb1 };
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
                prop_assert!(dataset.iter().all(|sample| sample.unwrap().target().iter().all(|x| x.is_finite())));
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
        write_tensors(&path, &samples, EmbeddingType::F16, false);
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
        ("wordnet_train.safetensors", 12000, false),
        ("wordnet_val.safetensors", 1000, true),
    ] {
        let options = OpenOptions::default().vocab(30522);
        let dataset = Dataset::open_with(bundled(name), options).unwrap();
        assert_eq!((dataset.len(), dataset.width()), (samples, 384));
        for sample in dataset.iter() {
            let sample = sample.unwrap();
            let target = sample.target().iter();
            let squares: f64 = target.map(|&value| f64::from(value).powi(2)).sum();
            assert!((squares.sqrt() - 1.0).abs() < 1e-3, "{name}: {squares}");
            let ids = sample.ids();
            assert!(
                (3..=64).contains(&ids.len()),
                "{name}: {} tokens",
                ids.len()
            );
            assert_eq!((ids[0], ids[ids.len() - 1]), (101, 102), "[CLS] and [SEP]");
            assert!(sample.mask().iter().all(|&byte| byte == 1));
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
            .map(|sample| sample.unwrap().ids().to_vec())
            .collect()
    };
    assert!(ids("wordnet_train.safetensors").is_disjoint(&ids("wordnet_val.safetensors")));
}

#[test]
fn parts_share_the_file_and_keep_the_order() {
    let dataset = Dataset::open(bundled("wordnet_val.safetensors")).unwrap();
    let (head, tail) = dataset.split(300);
    assert_eq!((head.len(), tail.len()), (300, 700));
    let ids =
        |dataset: &Dataset, index| -> Vec<u32> { dataset.sample(index).unwrap().ids().to_vec() };
    assert_eq!(ids(&tail, 5), ids(&dataset, 305));
    assert_eq!(ids(&tail.take(6), 5), ids(&dataset, 305));
    for (part, index) in [
        (&head, 300),
        (&tail, 700),
        (&dataset, usize::MAX),
        (&tail, usize::MAX),
    ] {
        let error = part.sample(index).unwrap_err();
        assert!(matches!(&error, Error::Data { reason, .. } if reason.contains("past the end")));
    }
    assert_eq!(dataset.take(5000).len(), 1000);
    assert!(dataset.split(1000).1.is_empty());
}

#[test]
fn copies_check_their_lengths() {
    let dataset = Dataset::open(bundled("wordnet_val.safetensors")).unwrap();
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
fn a_file_that_changes_while_it_is_open_gives_errors() {
    let (folder, efb1, tensors) = fixtures();
    for bytes in [&efb1, &tensors] {
        let dataset = open_bytes(&folder, bytes, Some(100)).unwrap();
        let path = folder.path().join("damaged");
        let mut batches = Batches::evaluation(dataset.clone(), 3, 2).unwrap();
        let whole = batches.next_batch().unwrap().unwrap().clone();
        batches.start_epoch(0);

        // Shorter: the first sample that is affected says so, with the length that is left.
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        let length = bytes.len() as u64 - 13;
        file.set_len(length).unwrap();
        for error in [
            dataset.iter().find_map(Result::err).unwrap(),
            batches.next_batch().unwrap_err(),
        ] {
            match error {
                Error::Format {
                    path: named,
                    offset,
                    ..
                } => {
                    assert_eq!(named, path);
                    assert!(offset >= length - 13, "{offset}");
                    assert!(offset < bytes.len() as u64, "{offset}");
                }
                error => panic!("{error}"),
            }
        }
        // As it was: the same batch is read again.
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(batches.next_batch().unwrap(), Some(&whole));
        assert!(batches.next_batch().unwrap().is_none());

        // Other content: nothing that opening would have refused gets through.
        std::fs::write(&path, vec![0xff; bytes.len()]).unwrap();
        for index in 0..3 {
            let error = dataset.sample(index).unwrap_err();
            assert!(matches!(&error, Error::Format { .. }), "{error}");
        }
        // Empty.
        std::fs::write(&path, []).unwrap();
        assert!(dataset.sample(2).is_err());
    }
}

#[test]
fn samples_are_read_from_several_threads() {
    let dataset = Dataset::open(bundled("wordnet_val.safetensors")).unwrap();
    let expected: Vec<_> = dataset.iter().map(Result::unwrap).collect();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (dataset, expected) = (&dataset, &expected);
            scope.spawn(move || {
                for index in (0..1000).map(|i| (i * 7 + thread * 251) % 1000) {
                    assert!(dataset.sample(index).unwrap() == expected[index]);
                }
            });
        }
    });
}
