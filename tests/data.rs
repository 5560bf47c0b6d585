//! Datasets: round trips, every kind of damage, the bundled files, JSON lines.

use std::path::{Path, PathBuf};

use energyflow::text::{
    Batches, Dataset, DatasetWriter, Efb1Writer, JsonLines, OpenOptions, Tokenizer, Whitespace,
};
use energyflow::{DType, Error};
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

fn write_tensors(path: &Path, samples: &[Owned], dtype: DType, with_text: bool) {
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
    write_tensors(&tensors, &samples(), DType::F16, true);
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
        (true, DType::F16),
        (false, DType::F16),
        (true, DType::F32),
        (false, DType::F32),
    ] {
        let path = folder.path().join("a");
        write_tensors(&path, &samples(), dtype, with_text);
        let mut expected = samples();
        for (_, _, target, text) in &mut expected {
            if dtype == DType::F16 {
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
    write_tensors(&path, &expected, DType::F32, true);
    assert!(read(&Dataset::open(&path).unwrap()) == expected);
}

#[test]
fn a_mask_of_ones_is_left_out() {
    let folder = TempDir::new().unwrap();
    let (masked, plain) = (folder.path().join("masked"), folder.path().join("plain"));
    let mut all_ones = samples();
    write_tensors(&masked, &all_ones, DType::F16, false);
    for sample in &mut all_ones {
        sample.1.fill(1);
    }
    write_tensors(&plain, &all_ones, DType::F16, false);
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
    let mut tensors = DatasetWriter::create(&path, 2, DType::F16).unwrap();
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
    refused(create(0, DType::F16).map(drop), "0 values");
    refused(create(2, DType::F16).unwrap().finish(), "0 samples");
    assert!(matches!(
        create(2, DType::U32).map(drop),
        Err(Error::Config { field: "dtype", .. })
    ));
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
        (0, b"EFB2", 0, "a newer energyflow wrote this file"),
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

/// A safetensors file with these tensors (name, type, shape, bytes) and metadata.
fn tensor_file(metadata: &[(&str, &str)], tensors: &[(&str, &str, &[usize], &[u8])]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let metadata = metadata
        .iter()
        .map(|&(key, value)| (key.to_owned(), value.into()));
    header.insert(
        "__metadata__".into(),
        serde_json::Value::Object(metadata.collect()),
    );
    let mut data = Vec::new();
    for (name, dtype, shape, bytes) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        data.extend_from_slice(bytes);
        let info = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
        header.insert((*name).into(), info);
    }
    let header = serde_json::to_vec(&header).unwrap();
    let length = (header.len() as u64).to_le_bytes();
    [&length[..], &header, &data].concat()
}

const DATASET: [(&str, &str); 2] = [("format", "energyflow.dataset"), ("version", "1")];

type Tensor = (&'static str, &'static str, &'static [usize], &'static [u8]);

/// Two samples of one and two tokens; 26 bytes of tensors.
fn good_tensors() -> Vec<Tensor> {
    vec![
        ("embeddings", "F32", &[2, 1], &[0; 8]),
        ("lengths", "U16", &[2], &[1, 0, 2, 0]),
        ("ids", "U16", &[3], &[5, 0, 6, 0, 7, 0]),
        ("mask", "BOOL", &[3], &[1, 0, 1]),
        ("text_lengths", "U16", &[2], &[1, 0, 0, 0]),
        ("text", "U8", &[1], b"x"),
    ]
}

#[test]
fn tensors_that_lie_are_refused() {
    let folder = TempDir::new().unwrap();
    let open = |tensors: &[Tensor]| open_bytes(&folder, &tensor_file(&DATASET, tensors), None);
    let dataset = open(&good_tensors()).unwrap();
    let expected = [
        (vec![5], vec![1], vec![0.0], "x".to_owned()),
        (vec![6, 7], vec![0, 1], vec![0.0], String::new()),
    ];
    assert_eq!(read(&dataset), expected);

    // What replaces the tensor of this name, how far from the end of the file the error is if not at a whole tensor or
    // the header, and its words.
    let nan: &[u8] = &[0, 0, 0, 0, 0, 0, 0xc0, 0x7f];
    let cases: Vec<(Tensor, Option<u64>, &str)> = vec![
        (
            ("embeddings", "F64", &[1, 1], &[0; 8]),
            None,
            "is F64; it must be one of",
        ),
        (
            ("embeddings", "F32", &[2], &[0; 8]),
            None,
            "not 2 dimensions",
        ),
        (
            ("embeddings", "F32", &[0, 1], &[]),
            None,
            "must be a sample",
        ),
        (
            ("embeddings", "F32", &[2, 0], &[]),
            None,
            "must be a sample",
        ),
        (
            ("embeddings", "F32", &[1, 1], &[0; 4]),
            None,
            "there are 1 embeddings",
        ),
        (("embeddings", "F32", &[2, 1], nan), Some(22), "not finite"),
        (
            ("lengths", "I64", &[1], &[1; 8]),
            None,
            "is I64; it must be one of [U16, U32]",
        ),
        (
            ("lengths", "U16", &[2], &[0, 0, 3, 0]),
            Some(18),
            "length 0 is 0",
        ),
        (
            ("lengths", "U16", &[2], &[3, 0, 0, 0]),
            Some(16),
            "length 1 is 0",
        ),
        (
            ("lengths", "U16", &[2], &[1, 0, 3, 0]),
            Some(18),
            "sum of lengths is 4, but ids has 3",
        ),
        (
            ("lengths", "U16", &[3], &[1, 0, 1, 0, 1, 0]),
            None,
            "there are 2 embeddings",
        ),
        (
            ("lengths", "U32", &[2], &[0xff; 8]),
            None,
            "sum of lengths is 8589934590",
        ),
        (
            ("ids", "U16", &[2], &[0; 4]),
            None,
            "mask has shape [3], ids have [2]",
        ),
        (("ids", "I32", &[3], &[0; 12]), None, "is I32"),
        (
            ("mask", "BOOL", &[3], &[1, 0, 2]),
            Some(6),
            "mask byte is 2",
        ),
        (
            ("mask", "U8", &[1, 3], &[1, 0, 1]),
            None,
            "not 1 dimensions",
        ),
        (
            ("text_lengths", "U16", &[2], &[0; 4]),
            None,
            "sum of text_lengths is 0",
        ),
        (("text", "U8", &[1], &[0xff]), Some(1), "UTF-8"),
        (("text", "U8", &[2], b"xy"), None, "text has 2 elements"),
        (
            ("masks", "U8", &[3], &[1; 3]),
            None,
            "tensor \"masks\" has no place",
        ),
    ];
    for (tensor, from_end, word) in cases {
        let mut tensors = good_tensors();
        match tensors.iter_mut().find(|(name, ..)| *name == tensor.0) {
            Some(place) => *place = tensor,
            None => tensors.push(tensor),
        }
        let bytes = tensor_file(&DATASET, &tensors);
        let (offset, reason) = refusal(&folder, &bytes, None);
        assert!(reason.contains(word), "{tensor:?}: {reason}");
        if let Some(from_end) = from_end {
            assert_eq!(
                offset,
                bytes.len() as u64 - from_end,
                "{tensor:?}: {reason}"
            );
        }
    }
    for missing in ["embeddings", "lengths", "ids", "text", "text_lengths"] {
        let mut tensors = good_tensors();
        tensors.retain(|(name, ..)| *name != missing);
        let (_, reason) = refusal(&folder, &tensor_file(&DATASET, &tensors), None);
        let word = match missing.starts_with("text") {
            true => "together",
            false => "is missing",
        };
        assert!(reason.contains(word), "{missing}: {reason}");
    }
    // A bound inside a character: both halves are invalid by themselves.
    let mut tensors = good_tensors();
    tensors[4] = ("text_lengths", "U16", &[2], &[1, 0, 1, 0]);
    tensors[5] = ("text", "U8", &[2], "é".as_bytes());
    let (_, reason) = refusal(&folder, &tensor_file(&DATASET, &tensors), None);
    assert!(reason.contains("UTF-8"), "{reason}");
}

#[test]
fn headers_that_lie_are_refused() {
    let folder = TempDir::new().unwrap();
    let good = tensor_file(&DATASET, &good_tensors());
    let text = String::from_utf8_lossy(&good[8..good.len() - 26]).into_owned();
    let with = |from: &str, to: &str| {
        assert!(text.contains(from), "{from} is not in {text}");
        let header = text.replace(from, to);
        let length = (header.len() as u64).to_le_bytes();
        [&length[..], header.as_bytes(), &good[good.len() - 26..]].concat()
    };
    assert!(open_bytes(&folder, &with("\"1\"", "\"1\""), None).is_ok());
    for (from, to, word) in [
        ("[0,8]", "[0,18446744073709551615]", "malformed"),
        ("[0,8]", "[8,0]", "malformed"),
        ("[2,1]", "[4611686018427387904,4]", "malformed"),
        (
            "[2,1]",
            "[18446744073709551615,18446744073709551615]",
            "malformed",
        ),
        ("\"F32\"", "\"F99\"", "malformed"),
        ("[25,26]", "[25,27]", "malformed"),
        (
            "\"version\":\"1\"",
            "\"version\":\"2\"",
            "a newer energyflow wrote this file: dataset format 2",
        ),
        (
            "\"version\":\"1\"",
            "\"version\":\"x\"",
            "version of the dataset format is \"x\"",
        ),
        (
            "\"version\":\"1\"",
            "\"other\":\"1\"",
            "version of the dataset format is \"\"",
        ),
        (
            "energyflow.dataset",
            "energyflow.weights",
            "format \"weights\", not of \"dataset\"",
        ),
        (
            "energyflow.dataset",
            "pt",
            "\"format\": \"energyflow.dataset\"",
        ),
    ] {
        let (_, reason) = refusal(&folder, &with(from, to), None);
        assert!(reason.contains(word), "{to}: {reason}");
    }
    for length in [u64::MAX, 1 << 40, 200_000_000, good.len() as u64] {
        let mut bytes = good.clone();
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        refusal(&folder, &bytes, None);
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
            b"text,target\n",
            "neither a safetensors file, nor EFB1, nor JSON lines",
        ),
        (b"\n", "begins with"),
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
        write_tensors(&path, &samples, DType::F16, false);
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
        let options = OpenOptions::default().vocab(10);
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
fn marks_blank_lines_and_line_ends_of_json_lines_are_accepted() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.jsonl");
    let first = r#"{"input_ids": [3], "target": [0.5]}"#;
    let second = r#"{"input_ids": [4], "target": [1.5]}"#;
    let read_all = |content: &str| {
        std::fs::write(&path, content).unwrap();
        let records: Result<Vec<_>, _> = JsonLines::open(&path).unwrap().collect();
        records.map(|records| {
            let targets = records.into_iter().map(|record| record.target[0]);
            targets.collect::<Vec<f32>>()
        })
    };
    for content in [
        format!("{first}\n{second}"),
        format!("\u{feff}{first}\n{second}\n"),
        format!("\u{feff}\n\n  \t\n{first}\r\n\r\n{second}\r\n\n\n"),
        format!("  {first}  \n {second} \r\n "),
    ] {
        assert_eq!(read_all(&content).unwrap(), [0.5, 1.5], "{content:?}");
        assert_eq!(Dataset::open(&path).unwrap().len(), 2, "{content:?}");
    }
    // Lines and bytes are those of the file, blank lines and mark included.
    for (content, line, at) in [
        (format!("\u{feff}{{\"target\": x}}"), "line 1: ", 3 + 11),
        (
            format!("\u{feff}\r\n\n{first}\r\n\n{{\"target\": x}}"),
            "line 5: ",
            44 + 11,
        ),
    ] {
        match read_all(&content) {
            Err(Error::Format { offset, reason, .. }) => {
                assert!(reason.starts_with(line), "{reason}");
                assert_eq!(offset, at, "{reason}");
            }
            other => panic!("{other:?}"),
        }
    }
    // A mark counts at the start of the file alone.
    assert!(read_all(&format!("{first}\n\u{feff}{second}")).is_err());
}

#[test]
fn json_lines_are_a_dataset() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("your data");
    let lines = concat!(
        "\u{feff}\n",
        r#"{"text": "the cat sat", "target": [0.5, -1]}"#,
        "\r\n\r\n",
        r#"{"input_ids": [4, 5], "attention_mask": [1, 0], "target": [0, 1e-3]}"#,
    );
    std::fs::write(&path, lines).unwrap();
    let error = Dataset::open(&path).unwrap_err();
    assert!(
        matches!(&error, Error::Format { offset: 4, reason, .. } if reason.contains("line 2") && reason.contains("tokenizer")),
        "{error}"
    );
    let tokenizer = Whitespace::new(["the", "cat", "sat"], 8).unwrap();
    let options = OpenOptions::default().tokenizer(&tokenizer);
    let dataset = Dataset::open_with(&path, options).unwrap();
    let expected = [
        (
            tokenizer.encode("the cat sat").unwrap(),
            vec![1; 5],
            vec![0.5, -1.0],
            "the cat sat".to_owned(),
        ),
        (vec![4, 5], vec![1, 0], vec![0.0, 1e-3], "-".into()),
    ];
    assert_eq!(read(&dataset), expected);
    assert_eq!((dataset.width(), dataset.path()), (2, path.as_path()));
    assert_eq!(read(&dataset.split(1).1), expected[1..]);
    let mut batches = Batches::evaluation(dataset, 2, 3).unwrap();
    let batch = batches.next_batch().unwrap().unwrap();
    assert_eq!(batch.targets, [0.5, -1.0, 0.0, 1e-3]);
    assert_eq!(batch.mask, [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]);

    // The vocabulary is the tokenizer's where no other is given.
    std::fs::write(&path, r#"{"input_ids": [7], "target": [1]}"#).unwrap();
    let error = Dataset::open_with(&path, options).unwrap_err();
    assert!(error.to_string().contains("vocabulary size 7"), "{error}");
    assert!(Dataset::open_with(&path, options.vocab(8)).is_ok());

    let (offset, reason) = refusal(&folder, b" { \n", None);
    assert!(
        offset == 1 && reason.starts_with("line 1: EOF"),
        "{offset} {reason}"
    );
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
