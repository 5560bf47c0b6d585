//! Weight files: exact, portable, refused when damaged or foreign.

mod common;

use std::fs;

use common::gpu;
use energyflow::Error;
use energyflow::text::{EncoderOptions, Trainer, TrainerOptions};
use energyflow::train::{WeightType, Weights};

fn options() -> EncoderOptions {
    EncoderOptions::default()
        .vocabulary(11)
        .length(4)
        .width(6)
        .hidden(5)
        .kernel(3)
        .dilations(vec![1])
        .embedding(3)
}

fn distiller(seed: u64, options: &EncoderOptions) -> Trainer {
    let distill = TrainerOptions::default().batch(2).seed(seed);
    Trainer::distill(&gpu(), options, &distill).unwrap()
}

#[test]
fn f32_files_are_exact_and_carry_the_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let texts: [&[u32]; 3] = [&[1, 2], &[10], &[3, 4, 5, 6, 7, 8]];
    let first = distiller(1, &options());
    let weights = first.weights().unwrap();
    weights.save(&path, WeightType::F32).unwrap();
    let loaded = Weights::load(&path).unwrap();
    assert!(loaded == weights);
    let read: EncoderOptions = serde_json::from_str(&loaded.description).unwrap();
    assert_eq!(read, options());
    let mut second = distiller(2, &read);
    let expected = first.embed(&texts).unwrap();
    assert_eq!(expected.len(), 9);
    assert!(second.embed(&texts).unwrap() != expected);
    second.set_weights(&loaded).unwrap();
    assert!(second.embed(&texts).unwrap() == expected);

    let again = folder.path().join("b.safetensors");
    second
        .weights()
        .unwrap()
        .save(&again, WeightType::F32)
        .unwrap();
    assert!(
        fs::read(&path).unwrap() == fs::read(&again).unwrap(),
        "equal weights, equal files"
    );
}

#[test]
fn names_and_shapes_are_those_of_pytorch() {
    let weights = distiller(1, &options()).weights().unwrap();
    let shapes: Vec<(&str, &[usize])> = weights
        .names()
        .map(|name| (name, weights.get(name).unwrap().0))
        .collect();
    let expected: [(&str, &[usize]); 9] = [
        ("blocks.0.conv1.bias", &[5]),
        ("blocks.0.conv1.weight", &[5, 6, 3]),
        ("blocks.0.conv2.bias", &[6]),
        ("blocks.0.conv2.weight", &[6, 5, 1]),
        ("blocks.0.norm.bias", &[6]),
        ("blocks.0.norm.weight", &[6]),
        ("embedding.weight", &[11, 6]),
        ("projection.bias", &[3]),
        ("projection.weight", &[3, 6]),
    ];
    assert_eq!(shapes, expected);
}

#[test]
fn f16_files_are_rounded_to_nearest() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("half.safetensors");
    let weights = distiller(1, &options()).weights().unwrap();
    weights.save(&path, WeightType::F16).unwrap();
    let loaded = Weights::load(&path).unwrap();
    for name in weights.names() {
        let (exact, half) = (weights.get(name).unwrap().1, loaded.get(name).unwrap().1);
        for (&x, &h) in exact.iter().zip(half) {
            assert_eq!(half::f16::from_f32(x).to_f32().to_bits(), h.to_bits());
        }
    }
    let f32_path = folder.path().join("full.safetensors");
    weights.save(&f32_path, WeightType::F32).unwrap();
    let (half, full) = (
        fs::metadata(&path).unwrap(),
        fs::metadata(&f32_path).unwrap(),
    );
    assert!(half.len() < full.len());
}

#[test]
fn int8_files_have_a_scale_per_row() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights");
    let weights = distiller(1, &options()).weights().unwrap();
    weights.save(&path, WeightType::Int8).unwrap();
    let back = Weights::load(&path).unwrap();
    assert!(back.names().eq(weights.names()));
    assert_eq!(back.skipped().count(), 0);
    for name in weights.names() {
        let (shape, exact) = weights.get(name).unwrap();
        let (same, found) = back.get(name).unwrap();
        assert_eq!(shape, same, "{name}");
        let width = exact.len() / shape[0];
        for (exact, found) in exact.chunks(width).zip(found.chunks(width)) {
            let largest = exact.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
            // Half a step; vectors are exact.
            let bound = if shape.len() > 1 {
                largest / 253.9
            } else {
                0.0
            };
            let near = exact.iter().zip(found).all(|(a, b)| (a - b).abs() <= bound);
            assert!(near, "{name}");
        }
    }
    let exact = folder.path().join("exact");
    weights.save(&exact, WeightType::F32).unwrap();
    let bytes = |path| std::fs::metadata(path).unwrap().len();
    // Tiny rows: their scales take a part of what is saved.
    assert!(bytes(&path) < bytes(&exact));
    // Names can be mapped, and a tensor of integers without scales is skipped.
    let table = Weights::load_with(&path, |name| {
        name.strip_prefix("embedding.").map(String::from)
    });
    assert!(table.unwrap().names().eq(["weight"]));
}

#[test]
fn weights_of_another_network_are_refused_by_name() {
    let weights = distiller(1, &options()).weights().unwrap();
    let wider = options().hidden(8);
    let deeper = options().dilations(vec![1, 1]);
    let mut other = distiller(1, &wider);
    let before = other.weights().unwrap();
    let error = other.set_weights(&weights).unwrap_err();
    assert!(
        matches!(&error, Error::Data { name, .. } if name.starts_with("blocks.0.conv")),
        "{error}"
    );
    assert!(other.weights().unwrap() == before, "nothing is half loaded");
    let error = distiller(1, &deeper).set_weights(&weights).unwrap_err();
    assert!(
        matches!(&error, Error::Data { name, .. } if name.starts_with("blocks.1")),
        "{error}"
    );
    let deep = distiller(1, &deeper).weights().unwrap();
    let error = distiller(1, &options()).set_weights(&deep).unwrap_err();
    assert!(
        matches!(&error, Error::Data { name, .. } if name.starts_with("blocks.1")),
        "{error}"
    );
}

/// A file as other programs write it: the same parameters, one of them of another type, and a counter.
#[test]
fn a_parameter_of_another_type_says_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.safetensors");
    let weights = distiller(1, &options()).weights().unwrap();
    let write = |other: Option<&str>| {
        let mut header = serde_json::Map::new();
        let mut data: Vec<u8> = Vec::new();
        let mut add = |name: &str, dtype: &str, shape: &[usize], bytes: Vec<u8>| {
            let offsets = [data.len(), data.len() + bytes.len()];
            data.extend(bytes);
            let info = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
            header.insert(name.into(), info);
        };
        add("blocks.0.norm.steps", "I64", &[], vec![9; 8]);
        for name in weights.names() {
            let (shape, values) = weights.get(name).unwrap();
            if other == Some(name) {
                let bytes = values.iter().flat_map(|&x| (x as i64).to_le_bytes());
                add(name, "I64", shape, bytes.collect());
            } else {
                let bytes = values.iter().flat_map(|x| x.to_le_bytes());
                add(name, "F32", shape, bytes.collect());
            }
        }
        let header = serde_json::to_vec(&header).unwrap();
        let length = (header.len() as u64).to_le_bytes();
        fs::write(&path, [&length[..], &header, &data].concat()).unwrap();
    };
    let mut other = distiller(2, &options());
    write(None);
    other.set_weights(&Weights::load(&path).unwrap()).unwrap();
    assert_eq!(
        other.weights().unwrap().get("projection.bias"),
        weights.get("projection.bias")
    );
    write(Some("projection.bias"));
    let before = other.weights().unwrap();
    let loaded = Weights::load(&path).unwrap();
    let error = other.set_weights(&loaded).unwrap_err().to_string();
    assert!(
        error.contains("projection.bias") && error.contains("I64") && error.contains("convert"),
        "{error}"
    );
    assert!(other.weights().unwrap() == before);
}

#[test]
fn damaged_files_give_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.safetensors");
    distiller(1, &options())
        .weights()
        .unwrap()
        .save(&path, WeightType::F32)
        .unwrap();
    let good = fs::read(&path).unwrap();
    for end in 0..good.len() {
        fs::write(&path, &good[..end]).unwrap();
        let error = Weights::load(&path).unwrap_err();
        assert!(
            matches!(&error, Error::Format { path: p, .. } if *p == path),
            "{end}: {error}"
        );
    }
    let mut nan = good.clone();
    let last = good.len() - 4;
    nan[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, &nan).unwrap();
    let error = Weights::load(&path).unwrap_err();
    assert!(
        matches!(error, Error::Format { offset, .. } if offset == last as u64),
        "{error}"
    );
    let error = Weights::load(folder.path().join("missing")).unwrap_err();
    assert!(matches!(error, Error::Io { .. }));
    let nowhere = folder.path().join("no/such/folder/w.safetensors");
    let weights = distiller(1, &options()).weights().unwrap();
    assert!(matches!(
        weights.save(nowhere, WeightType::F32),
        Err(Error::Io { .. })
    ));
}

#[test]
fn texts_that_cannot_be_embedded_give_errors() {
    let distiller = distiller(1, &options());
    let unknown: [&[u32]; 1] = [&[11]];
    assert!(matches!(distiller.embed(&unknown), Err(Error::Data { .. })));
    let empty: [&[u32]; 2] = [&[1], &[]];
    assert!(matches!(distiller.embed(&empty), Err(Error::Data { .. })));
    let none: [&[u32]; 0] = [];
    assert!(distiller.embed(&none).unwrap().is_empty());
}
