//! Weights of other programs: renamed, of every float type, as far as they fit.

mod common;

use std::path::Path;

use common::gpu;
use energyflow::nn::{Conv1d, Linear};
use energyflow::train::{Mapping, Weights};
use energyflow::{DType, Error, Graph, Session};
use half::{bf16, f16};

/// Parameters `head.weight` [2, 3], `head.bias` [2] and `conv.weight` [2, 3, 2].
fn session() -> Session {
    let mut graph = Graph::new();
    let x = graph.input("x", &[4, 3], DType::F32).unwrap();
    let head = Linear::new(&mut graph, "head", 3, 2, true).unwrap();
    let y = head.forward(&mut graph, x).unwrap();
    graph.output("y", y).unwrap();
    let x = graph.input("sequence", &[1, 4, 3], DType::F32).unwrap();
    let conv = Conv1d::new(&mut graph, "conv", 3, 2, 2, false).unwrap();
    let y = conv.forward(&mut graph, x).unwrap();
    graph.output("z", y).unwrap();
    let mut session = Session::new(&gpu(), 0);
    session.compile(&graph).unwrap();
    session
}

type Tensor<'a> = (&'a str, &'a str, &'a [usize], Vec<u8>);

fn write(path: &Path, tensors: &[Tensor]) {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        data.extend(bytes);
        let info = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
        header.insert((*name).into(), info);
    }
    let header = serde_json::to_vec(&header).unwrap();
    let length = (header.len() as u64).to_le_bytes();
    std::fs::write(path, [&length[..], &header, &data].concat()).unwrap();
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn all(session: &Session) -> Vec<Vec<f32>> {
    let names: Vec<String> = session
        .parameters()
        .map(|(name, _)| name.to_owned())
        .collect();
    names
        .iter()
        .map(|name| session.get(name).unwrap())
        .collect()
}

#[test]
fn what_fits_is_loaded_and_the_rest_reported() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("foreign.safetensors");
    let table: Vec<f32> = (0..12_u8).map(f32::from).collect();
    write(
        &path,
        &[
            (
                "model.head.weight",
                "F32",
                &[2, 3],
                floats(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
            ),
            ("model.head.bias", "F32", &[3], floats(&[7.0; 3])),
            (
                "model.convolution.weight",
                "F32",
                &[2, 3, 2],
                floats(&table),
            ),
            ("model.other", "F32", &[1], floats(&[1.0])),
            ("model.steps", "I64", &[], vec![1; 8]),
            ("model.small", "F8_E4M3", &[3], vec![1; 3]),
        ],
    );
    let mapping = Mapping::new()
        .rename("model.convolution.weight", "conv.weight")
        .strip("model.");
    let weights = Weights::load_mapped(&path, &mapping).unwrap();
    let mut session = session();
    let before = session.get("head.bias").unwrap();
    let error = weights.apply(&mut session).unwrap_err();
    assert!(
        matches!(&error, Error::Data { name, .. } if name == "head.bias"),
        "{error}"
    );
    let fitting = weights.apply_fitting(&mut session).unwrap();
    assert_eq!(fitting.loaded, ["conv.weight", "head.weight"]);
    assert_eq!(fitting.missing, [""; 0]);
    assert_eq!(fitting.left_over, ["other"]);
    let other = &fitting.other_shape[0];
    assert_eq!(
        (&*other.name, &*other.weights, &*other.session),
        ("head.bias", &[3][..], &[2][..])
    );
    let skipped = [("small", "F8_E4M3"), ("steps", "I64")];
    assert!(
        fitting
            .skipped
            .iter()
            .map(|(a, b)| (&**a, &**b))
            .eq(skipped)
    );
    assert!(!fitting.is_complete());
    assert_eq!(
        fitting.to_string(),
        "2 parameters loaded; left over: other; of another shape: head.bias ([3] instead of [2]); not read: small (F8_E4M3), steps (I64)"
    );
    assert_eq!(
        session.get("head.weight").unwrap(),
        [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    );
    // [out, in, tap], as in PyTorch.
    assert_eq!(session.get("conv.weight").unwrap(), table);
    assert_eq!(session.get("head.bias").unwrap(), before);
}

#[test]
fn one_tensor_alone_is_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("foreign.safetensors");
    // The others are not even read: NaN in them does not matter.
    write(
        &path,
        &[
            ("a", "F32", &[2], floats(&[0.5, -0.5])),
            ("b", "F32", &[1], floats(&[f32::NAN])),
        ],
    );
    let mut session = session();
    let weights = Weights::load_mapped(&path, &Mapping::only("a", "head.bias")).unwrap();
    let fitting = weights.apply_fitting(&mut session).unwrap();
    assert_eq!((fitting.loaded.len(), fitting.missing.len()), (1, 2));
    assert_eq!(session.get("head.bias").unwrap(), [0.5, -0.5]);
    let named = |name: &str| (name == "a").then(|| "head.bias".to_owned());
    assert!(Weights::load_with(&path, named).unwrap() == weights);
    let error = Weights::load(&path).unwrap_err();
    assert!(matches!(error, Error::Format { .. }));
    let error = Weights::load_with(&path, |_| Some("x".into())).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("\"a\" and \"b\" both become \"x\""),
        "{error}"
    );
}

#[test]
fn nothing_changes_when_nothing_fits_or_a_value_is_bad() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("foreign.safetensors");
    let mut session = session();
    let before = all(&session);
    write(
        &path,
        &[("model.head.bias", "F32", &[2], floats(&[0.5, 0.5]))],
    );
    let weights = Weights::load(&path).unwrap();
    let error = weights.apply_fitting(&mut session).unwrap_err().to_string();
    assert!(
        error.contains("no tensor fits")
            && error.contains("left over: model.head.bias")
            && error.contains("missing: conv.weight"),
        "{error}"
    );
    write(
        &path,
        &[(
            "head.bias",
            "F64",
            &[2],
            [0.5_f64, 1e300]
                .iter()
                .flat_map(|x| x.to_le_bytes())
                .collect(),
        )],
    );
    let error = Weights::load(&path).unwrap_err();
    assert!(
        matches!(&error, Error::Format { reason, .. } if reason.contains("element 1 is inf as f32")),
        "{error}"
    );
    assert_eq!(all(&session), before);
    let mut empty = Session::new(&gpu(), 0);
    assert!(matches!(
        weights.apply_fitting(&mut empty),
        Err(Error::Graph(_))
    ));
}

#[test]
fn every_float_type_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("foreign.safetensors");
    let values = [1.5_f32, -0.1];
    let bytes = |each: fn(f32) -> Vec<u8>| values.iter().flat_map(|&x| each(x)).collect();
    write(
        &path,
        &[
            (
                "f16",
                "F16",
                &[2],
                bytes(|x| f16::from_f32(x).to_le_bytes().into()),
            ),
            (
                "bf16",
                "BF16",
                &[2],
                bytes(|x| bf16::from_f32(x).to_le_bytes().into()),
            ),
            ("f32", "F32", &[2], bytes(|x| x.to_le_bytes().into())),
            (
                "f64",
                "F64",
                &[2],
                bytes(|x| (f64::from(x) + 1e-12).to_le_bytes().into()),
            ),
        ],
    );
    let weights = Weights::load(&path).unwrap();
    for (name, second) in [
        ("f16", f16::from_f32(-0.1).to_f32()),
        ("bf16", bf16::from_f32(-0.1).to_f32()),
        ("f32", -0.1),
        ("f64", -0.1),
    ] {
        assert_eq!(
            weights.get(name).unwrap(),
            (&[2][..], &[1.5, second][..]),
            "{name}"
        );
    }
}
