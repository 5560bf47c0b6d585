//! Plain text with embeddings beside it; `.npy`.

use energyflow::DType;
use energyflow::text::{NpyReader, NpyWriter, Records};

use super::*;

fn tokenizer() -> Whitespace {
    Whitespace::new(["one", "two"], 8).unwrap()
}

fn open(path: &Path) -> Result<Dataset, Error> {
    Dataset::open_with(path, OpenOptions::default().tokenizer(&tokenizer()))
}

/// Offset and reason of a format error in a file of this name.
fn refused(result: Result<impl Sized, Error>, name: &str) -> (u64, String) {
    match result {
        Err(Error::Format {
            path,
            offset,
            reason,
        }) if path.file_name().unwrap() == name => (offset, reason),
        Err(error) => panic!("not in {name}: {error}"),
        Ok(_) => panic!("{name} was read"),
    }
}

/// A version 1 file whose header has these words.
fn npy(descr: &str, order: &str, shape: &str, data: &[u8]) -> Vec<u8> {
    let header = format!("{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}\n");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.bytes());
    bytes.extend(data);
    bytes
}

#[test]
fn texts_find_their_embeddings_and_embeddings_their_texts() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    let [texts, embeddings] = ["a.txt", "a.npy"].map(at);
    std::fs::write(&texts, "\u{feff}one two\r\n\n  two  one\nlast").unwrap();
    let targets = [[0.5, -1.0], [0.25, 3.0], [1e-3, 0.0], [7.0, 8.0]];
    let mut writer = NpyWriter::create(&embeddings, 2, DType::F32).unwrap();
    for target in &targets {
        writer.push(target).unwrap();
    }
    writer.finish().unwrap();
    let expected: Vec<Owned> = ["one two", "", "  two  one", "last"]
        .into_iter()
        .zip(targets)
        .map(|(text, target)| {
            let ids = tokenizer().encode(text).unwrap();
            (ids.clone(), vec![1; ids.len()], target.into(), text.into())
        })
        .collect();
    for path in [&texts, &embeddings] {
        for in_memory in [0, 1 << 20] {
            let tokenizer = tokenizer();
            let options = OpenOptions::default().tokenizer(&tokenizer);
            let dataset = Dataset::open_with(path, options.in_memory(in_memory)).unwrap();
            assert_eq!(read(&dataset), expected);
            assert_eq!((dataset.width(), dataset.path()), (2, path.as_path()));
            assert_eq!(read(&dataset.split(1).1), expected[1..]);
        }
    }
    // Under other names they are named.
    let [other_texts, other] = ["b", "c.bin"].map(at);
    std::fs::rename(&texts, &other_texts).unwrap();
    let (_, reason) = refused(open(&embeddings), "a.npy");
    assert!(
        reason.contains("needs texts") && reason.contains("a.txt"),
        "{reason}"
    );
    std::fs::rename(&embeddings, &other).unwrap();
    let (_, reason) = refused(open(&other_texts), "b");
    assert!(
        reason.contains("b.npy or ") && reason.contains("OpenOptions::embeddings"),
        "{reason}"
    );
    let tokenizer = tokenizer();
    let options = OpenOptions::default().tokenizer(&tokenizer);
    let dataset = Dataset::open_with(&other_texts, options.embeddings(&other)).unwrap();
    assert_eq!(read(&dataset), expected);
    let dataset = Dataset::open_with(&other, options.texts(&other_texts)).unwrap();
    assert_eq!(read(&dataset), expected);
    // Without a tokenizer they are records, but no dataset.
    let options = OpenOptions::default().embeddings(&other);
    let (offset, reason) = refused(Dataset::open_with(&other_texts, options), "b");
    assert!(
        offset == 0 && reason.contains("line 1") && reason.contains("tokenizer"),
        "{reason}"
    );
    assert_eq!(
        Records::open_with(&other_texts, options).unwrap().count(),
        4
    );
}

#[test]
fn embeddings_may_be_safetensors() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("a.txt"), "one\ntwo\n").unwrap();
    let floats: Vec<u8> = [0.5_f32, 1.0, 2.0, 4.0]
        .iter()
        .flat_map(|x| x.to_le_bytes())
        .collect();
    let doubles: Vec<u8> = [0.5_f64, 1.0, 2.0, 4.0]
        .iter()
        .flat_map(|x| x.to_le_bytes())
        .collect();
    let brain = [0x00, 0x3f, 0x80, 0x3f, 0x00, 0x40, 0x80, 0x40];
    let scales: Vec<u8> = [0.5_f32, 2.0]
        .iter()
        .flat_map(|x| x.to_le_bytes())
        .collect();
    type Files<'a> = Vec<(&'a str, &'a str, &'a [usize], &'a [u8])>;
    let cases: [Files; 5] = [
        vec![("anything", "F32", &[2, 2], &floats)],
        vec![("embeddings", "F64", &[2, 2], &doubles)],
        vec![
            ("embeddings", "F32", &[2, 2], &floats),
            ("other", "U8", &[1], &[0]),
        ],
        vec![("x", "BF16", &[2, 2], &brain)],
        vec![
            ("scales", "F32", &[2], &scales),
            ("x", "I8", &[2, 2], &[1, 2, 1, 2]),
        ],
    ];
    for case in cases {
        std::fs::write(at("a.safetensors"), super::tensors::tensor_file(&[], &case)).unwrap();
        for name in ["a.txt", "a.safetensors"] {
            let samples = read(&open(&at(name)).unwrap());
            assert_eq!(
                (&*samples[0].2, &*samples[1].2),
                (&[0.5, 1.0][..], &[2.0, 4.0][..])
            );
            assert_eq!(samples[1].3, "two");
        }
    }
    std::fs::write(at("a.npy"), npy("<f4", "False", "(2, 2)", &floats)).unwrap();
    let (_, reason) = refused(open(&at("a.txt")), "a.txt");
    assert!(
        reason.contains("both ") && reason.contains("are there"),
        "{reason}"
    );
    std::fs::remove_file(at("a.npy")).unwrap();
    for (tensors, word) in [
        (
            vec![("x", "I8", &[2, 2][..], &[1; 4][..])],
            "\"scales\" is missing",
        ),
        (vec![("x", "F32", &[4], &floats)], "not 2 dimensions"),
        (
            vec![("x", "U8", &[1], &[0]), ("y", "U8", &[1], &[0])],
            "or the only one",
        ),
    ] {
        std::fs::write(
            at("a.safetensors"),
            super::tensors::tensor_file(&[], &tensors),
        )
        .unwrap();
        let (_, reason) = refused(open(&at("a.txt")), "a.safetensors");
        assert!(reason.contains(word), "{reason}");
    }
}

#[test]
fn texts_and_embeddings_must_be_as_many() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("a.npy"), npy("<f4", "False", "(2, 1)", &[0; 8])).unwrap();
    for (texts, offset, words) in [
        ("one\n", 4, ["line 1: ", "1 texts, but", "has 2 embeddings"]),
        (
            "one\ntwo\nthree",
            8,
            ["line 3: ", "one text too many", "has 2 samples"],
        ),
        (
            "one\ntwo\n\n",
            8,
            ["line 3: ", "one text too many", "has 2 samples"],
        ),
    ] {
        std::fs::write(at("a.txt"), texts).unwrap();
        let (found, reason) = refused(open(&at("a.txt")), "a.txt");
        assert!(
            words.iter().all(|word| reason.contains(word)),
            "{texts:?}: {reason}"
        );
        assert_eq!(found, offset, "{texts:?}: {reason}");
    }
    std::fs::write(at("a.txt"), b"one\nt\xffwo\n").unwrap();
    let (offset, reason) = refused(open(&at("a.npy")), "a.txt");
    assert_eq!((offset, &*reason), (5, "line 2: not valid UTF-8"));
    // By the name of such a file alone, nothing says that it is meant to be text.
    let (offset, reason) = refused(open(&at("a.txt")), "a.txt");
    assert!(offset == 0 && reason.contains("nor text"), "{reason}");
}

#[test]
fn npy_types_and_sizes() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.npy");
    let halves: Vec<u8> = [0.5, -2.0]
        .iter()
        .flat_map(|&x| f16::from_f32(x).to_le_bytes())
        .collect();
    let floats: Vec<u8> = [0.5_f32, -2.0]
        .iter()
        .flat_map(|x| x.to_le_bytes())
        .collect();
    let doubles: Vec<u8> = [0.5_f64, -2.0]
        .iter()
        .flat_map(|x| x.to_le_bytes())
        .collect();
    for (descr, data) in [("<f2", &halves), ("<f4", &floats), ("<f8", &doubles)] {
        for (order, shape, rows) in [
            ("False", "(1, 2)", [&[0.5, -2.0][..]].as_slice()),
            ("False", "(2, 1)", &[&[0.5], &[-2.0]]),
            ("True", "(2, 1)", &[&[0.5], &[-2.0]]),
        ] {
            std::fs::write(&path, npy(descr, order, shape, data)).unwrap();
            let npy = NpyReader::open(&path).unwrap();
            assert_eq!((npy.rows(), npy.width()), (rows.len(), rows[0].len()));
            let mut values = vec![9.0];
            for (row, expected) in rows.iter().enumerate() {
                npy.read(row, &mut values).unwrap();
                assert_eq!(values, *expected);
            }
            assert!(matches!(
                npy.read(rows.len(), &mut values),
                Err(Error::Data { .. })
            ));
        }
    }
    for (bytes, offset, word) in [
        (
            npy("<f4", "False", "(1, 3)", &floats),
            69,
            "take 12 bytes, but 8 follow",
        ),
        (
            npy("<f4", "False", "(1, 1)", &floats),
            69,
            "take 4 bytes, but 8 follow",
        ),
        (
            npy("<f4", "False", "(9223372036854775807, 9)", &[]),
            0,
            "more than 2^64",
        ),
        (npy("<i4", "False", "(1, 2)", &floats), 10, "\"<i4\""),
        (npy("<f4", "True", "(1, 2)", &[0; 9]), 0, "follow"),
        (
            npy("<f4", "False", "(1, 2)", &floats)[..9].to_vec(),
            8,
            "the header",
        ),
        (b"\x93NUMPY\x09\x00".to_vec(), 6, "version 9"),
        (
            b"\x93NUMPY\x02\x00\xff\xff\xff\x7f".to_vec(),
            8,
            "2147483647 bytes",
        ),
        (b"\x93NUMP".to_vec(), 0, "the header"),
    ] {
        std::fs::write(&path, &bytes).unwrap();
        let (found, reason) = refused(NpyReader::open(&path), "a.npy");
        assert!(reason.contains(word), "{reason}");
        assert!(
            offset == 0 || found.abs_diff(offset) <= 1,
            "{found} {offset} {reason}"
        );
    }
    // Values are checked when a dataset is opened.
    std::fs::write(folder.path().join("a.txt"), "one").unwrap();
    for (descr, data) in [
        ("<f4", f64::NAN.to_le_bytes()),
        ("<f8", 1e39_f64.to_le_bytes()),
    ] {
        let shape = if descr == "<f4" { "(1, 2)" } else { "(1, 1)" };
        std::fs::write(&path, npy(descr, "False", shape, &data)).unwrap();
        let (_, reason) = refused(open(&path), "a.npy");
        assert!(reason.contains("not finite"), "{reason}");
    }
}

#[test]
fn npy_files_are_written_as_numpy_writes_them() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("a.npy");
    for (dtype, descr, size) in [(DType::F32, "<f4", 4), (DType::F16, "<f2", 2)] {
        let mut writer = NpyWriter::create(&path, 3, dtype).unwrap();
        writer.push(&[1.0, 2.0, 0.5]).unwrap();
        assert!(writer.push(&[1.0]).is_err());
        assert!(writer.push(&[1.0, f32::NAN, 0.0]).is_err());
        assert_eq!(writer.push(&[1e6, 0.0, 0.0]).is_err(), dtype == DType::F16);
        writer.finish().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let rows = if dtype == DType::F16 { 1 } else { 2 };
        assert_eq!(bytes.len(), 128 + rows * 3 * size);
        let header = std::str::from_utf8(&bytes[10..128]).unwrap();
        let expected =
            format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({rows}, 3), }}");
        assert!(
            header.starts_with(&expected) && header.ends_with(" \n"),
            "{header}"
        );
        let mut row = Vec::new();
        NpyReader::open(&path).unwrap().read(0, &mut row).unwrap();
        assert_eq!(row, [1.0, 2.0, 0.5]);
    }
    NpyWriter::create(&path, 3, DType::F32)
        .unwrap()
        .finish()
        .unwrap();
    assert_eq!(NpyReader::open(&path).unwrap().rows(), 0);
    assert!(matches!(
        NpyWriter::create(&path, 3, DType::U32),
        Err(Error::Config { .. })
    ));
}
