//! Safetensors files whose header or tensors lie.

use super::*;

/// A safetensors file with these tensors (name, type, shape, bytes) and metadata.
pub fn tensor_file(
    metadata: &[(&str, &str)],
    tensors: &[(&str, &str, &[usize], &[u8])],
) -> Vec<u8> {
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
            ("embeddings", "I64", &[1, 1], &[0; 8]),
            None,
            "is I64; it must be one of",
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
        (
            ("embeddings", "I8", &[8, 1], &[0; 8]),
            None,
            "\"scales\" is missing",
        ),
        (
            ("scales", "F32", &[2], &[0; 8]),
            None,
            "scales belong to embeddings of I8",
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
