//! Texts to embeddings: any number, any length, in order, the same in every bucket.

mod common;

use std::collections::HashMap;
use std::sync::Arc;

use energyflow::gpu::{Layout, Tensor};
use energyflow::graph::Graph;
use energyflow::reference::Array;
use energyflow::text::{
    Embeddings, Encoder, EncoderOptions, Model, Precision, TextEncoder, TextEncoderOptions,
    Tokenizer, Whitespace,
};
use energyflow::train::Weights;
use energyflow::types::Shape;
use energyflow::{DType, Error, Gpu, Result, Session};

const LENGTH: usize = 11;

fn sizes() -> EncoderOptions {
    EncoderOptions::default()
        .vocabulary(40)
        .length(LENGTH)
        .width(8)
        .hidden(16)
        .kernel(3)
        .dilations(vec![1, 2])
        .embedding(5)
        .table_bound(1.0)
}

fn model(gpu: &Gpu) -> Result<Model> {
    let session = session(gpu)?;
    Ok(Model::new(Weights::from_session(&session)?).encoder(Some(sizes())))
}

fn session(gpu: &Gpu) -> Result<Session> {
    let mut graph = Graph::new();
    let encoder = Encoder::new(&mut graph, &sizes())?;
    let ids = graph.index_input("ids", LENGTH, 40)?;
    let mask = graph.input("mask", &[LENGTH], DType::F32)?;
    let z = encoder.forward(&mut graph, ids, mask, DType::F32)?;
    graph.output("z", z)?;
    let mut session = Session::new(gpu, 5);
    session.compile(&graph)?;
    Ok(session)
}

fn tokenizer() -> Arc<dyn Tokenizer> {
    let words = (0..30).map(|i| format!("w{i}"));
    Arc::new(Whitespace::new(words, LENGTH).unwrap())
}

fn options() -> TextEncoderOptions {
    TextEncoderOptions::default()
        .lengths(vec![4, 6])
        .batches(vec![1, 4])
}

fn encoder(gpu: &Gpu, options: &TextEncoderOptions) -> TextEncoder {
    TextEncoder::with_tokenizer(gpu, &model(gpu).unwrap(), tokenizer(), options).unwrap()
}

/// Texts of all lengths, 0 to 14 words.
fn texts(n: usize) -> Vec<String> {
    let word = |i: usize, j: usize| format!("w{}", (7 * i + 3 * j + i * j) % 33);
    let text = |i: usize| (0..(5 * i) % 15).map(|j| word(i, j)).collect::<Vec<_>>();
    (0..n).map(|i| text(i).join(" ")).collect()
}

/// Each text alone, at full length, in f64 on the CPU.
fn expected(gpu: &Gpu, texts: &[String]) -> Vec<f32> {
    let model = model(gpu).unwrap();
    let mut graph = Graph::new();
    let encoder = Encoder::new(&mut graph, &sizes()).unwrap();
    let ids = graph.index_input("ids", LENGTH, 40).unwrap();
    let mask = graph.input("mask", &[LENGTH], DType::F32).unwrap();
    let z = encoder.forward(&mut graph, ids, mask, DType::F32).unwrap();
    graph.output("z", z).unwrap();
    let variables = graph.parameters().map(|(_, value)| {
        let (shape, data) = model.weights.get(&value.name).unwrap();
        // The taps of a convolution lie apart in memory: [out, in, k] → [out, k·in].
        let order = |i: usize| match *shape {
            [_, inner, taps] => {
                i / (inner * taps) * inner * taps + i % inner * taps + i / inner % taps
            }
            _ => i,
        };
        let data: Vec<f32> = (0..data.len()).map(|i| data[order(i)]).collect();
        let array = Array::from_f32(value.shape.dims(), &data).unwrap();
        (value.name.clone(), array)
    });
    let variables: HashMap<String, Array> = variables.collect();
    let mut all = Vec::new();
    for text in texts {
        let mut ids = tokenizer().encode(text).unwrap();
        let mut mask = vec![1.0_f32; ids.len()];
        ids.resize(LENGTH, 0);
        mask.resize(LENGTH, 0.0);
        let ids = Array::from_u32(&[LENGTH], &ids).unwrap();
        let mask = Array::from_f32(&[LENGTH], &mask).unwrap();
        let outputs = graph
            .evaluate_cpu(&variables, &[("ids", ids), ("mask", mask)])
            .unwrap();
        all.extend(outputs["z"].data().iter().map(|&x| x as f32));
    }
    all
}

fn near(found: &Embeddings, wanted: &[f32], tolerance: f32) {
    assert_eq!(found.as_slice().len(), wanted.len());
    for (i, (a, b)) in found.as_slice().iter().zip(wanted).enumerate() {
        assert!((a - b).abs() <= tolerance, "value {i}: {a}, not {b}");
    }
}

#[test]
fn any_number_of_texts_of_any_length_in_order() {
    let gpu = common::gpu();
    let texts = texts(23);
    let wanted = expected(&gpu, &texts);
    let encoder = encoder(&gpu, &options());
    for n in [0, 1, 2, 3, 9, 23] {
        let found = encoder.encode(&texts[..n]).unwrap();
        assert_eq!(
            (found.len(), found.is_empty(), found.width()),
            (n, n == 0, 5)
        );
        near(&found, &wanted[..5 * n], 2e-5);
        assert_eq!(found.iter().count(), n);
        assert!(found.get(n).is_none());
        for (i, row) in found.iter().enumerate() {
            assert_eq!(row, found.row(i));
        }
    }
    // The same bits again, whatever the number of threads.
    let once = encoder.encode(&texts).unwrap();
    let threads = self::encoder(&gpu, &options().threads(Some(3)));
    assert_eq!(threads.encode(&texts).unwrap(), once);
    // Without buckets the same but for rounding.
    let single = self::encoder(&gpu, &options().lengths(vec![]).batches(vec![3]));
    near(&single.encode(&texts).unwrap(), once.as_slice(), 2e-6);
    // f16 activations.
    let half = self::encoder(&gpu, &options().precision(Precision::Mixed));
    near(&half.encode(&texts).unwrap(), &wanted, 2e-2);
}

#[test]
fn what_is_cut_is_reported() {
    let gpu = common::gpu();
    let encoder = encoder(&gpu, &options());
    let long = ["w1"; 14].join(" ");
    let fits = ["w1"; 9].join(" ");
    let found = encoder.encode(&[fits.as_str(), &long, "", &long]).unwrap();
    let cuts: Vec<_> = found
        .truncated()
        .iter()
        .map(|cut| (cut.text, cut.tokens, cut.bytes))
        .collect();
    assert_eq!(cuts, [(1, 5, 0), (3, 5, 0)]);
    assert_eq!(found.row(0), found.row(1));
    // Ids that are given are cut, too, and checked.
    let ids = encoder
        .encode_ids(&[vec![2; 12], vec![2, 3], vec![]])
        .unwrap();
    assert_eq!(ids.truncated().len(), 1);
    assert_eq!((ids.truncated()[0].text, ids.truncated()[0].tokens), (0, 1));
    near(&encoder.encode_ids(&[[2, 3]]).unwrap(), found.row(2), 2e-6);
    let error = encoder.encode_ids(&[vec![1], vec![40]]).unwrap_err();
    assert!(
        error.to_string().contains("text 1") && error.to_string().contains("40"),
        "{error}"
    );
}

#[test]
fn control_words_are_words() {
    let gpu = common::gpu();
    let encoder = encoder(&gpu, &options());
    let found = encoder
        .encode(&["w1 [PAD] w2 [SEP]", "w1 unknown w2 unknown"])
        .unwrap();
    near(&found, &[found.row(1), found.row(1)].concat(), 1e-6);
}

#[test]
fn embeddings_are_normalised_on_request() {
    let gpu = common::gpu();
    let texts = texts(6);
    let plain = encoder(&gpu, &options()).encode(&texts).unwrap();
    let unit = encoder(&gpu, &options().normalize(Some(true)))
        .encode(&texts)
        .unwrap();
    for (plain, unit) in plain.iter().zip(&unit) {
        let norm = plain.iter().map(|x| x * x).sum::<f32>().sqrt();
        assert!((norm - 1.0).abs() > 1e-2);
        assert!(
            plain
                .iter()
                .zip(unit)
                .all(|(a, b)| (a / norm - b).abs() < 1e-6)
        );
    }
    // The model says so, unless the caller does.
    let model = model(&gpu).unwrap().normalize(true);
    let with = |options: &TextEncoderOptions| {
        TextEncoder::with_tokenizer(&gpu, &model, tokenizer(), options).unwrap()
    };
    assert!(with(&options()).normalizes());
    assert!(!with(&options().normalize(Some(false))).normalizes());
}

#[test]
fn into_a_tensor_async_and_from_many_threads() {
    fn is_shared(_: &(impl Send + Sync)) {}
    fn is_sent<T: Send>(future: T) -> T {
        future
    }
    let gpu = common::gpu();
    let encoder = encoder(&gpu, &options());
    is_shared(&encoder);
    encoder.warm_up(2).unwrap();
    let texts = texts(17);
    let wanted = encoder.encode(&texts).unwrap();
    let found = pollster::block_on(is_sent(encoder.encode_async(&texts))).unwrap();
    assert_eq!(found, wanted);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| assert_eq!(encoder.encode(&texts).unwrap(), wanted));
        }
    });
    for dtype in [DType::F32, DType::F16] {
        let tensor = |rows| {
            let layout = Layout::of(&Shape::new(&[rows, 5]).unwrap(), dtype).unwrap();
            Tensor::zeroed(&gpu, layout).unwrap()
        };
        let tensor = (tensor(17), tensor(16));
        let cut = encoder.encode_to(&texts, &tensor.0).unwrap();
        assert_eq!(cut, wanted.truncated());
        let found: Vec<f32> = tensor.0.download(&gpu).unwrap().wait().unwrap();
        let tolerance = if dtype == DType::F16 { 1e-3 } else { 0.0 };
        assert!(
            found
                .iter()
                .zip(wanted.as_slice())
                .all(|(a, b)| (a - b).abs() <= tolerance * b.abs().max(1.0))
        );
        assert!(matches!(
            encoder.encode_to(&texts, &tensor.1),
            Err(Error::Layout { .. })
        ));
    }
}

#[test]
fn an_embedding_that_is_no_number_is_an_error() {
    let gpu = common::gpu();
    let mut session = session(&gpu).unwrap();
    let table: Vec<f32> = (0..40 * 8)
        .map(|i| if i % 2 == 0 { 3e38 } else { -3e38 })
        .collect();
    session.set("embedding.weight", &table).unwrap();
    let model = Model::new(Weights::from_session(&session).unwrap()).encoder(Some(sizes()));
    let texts = texts(6);
    for (precision, advice) in [
        (Precision::Mixed, "use Precision::F32"),
        (Precision::F32, "too large for f32"),
    ] {
        let options = options().precision(precision);
        let encoder = TextEncoder::with_tokenizer(&gpu, &model, tokenizer(), &options).unwrap();
        let error = encoder.encode(&texts).unwrap_err();
        let text = error.to_string();
        assert!(
            matches!(error, Error::Data { .. }) && text.contains("that of text "),
            "{text}"
        );
        assert!(text.contains(advice), "{text}");
    }
}

#[test]
fn what_does_not_fit_is_said() {
    let gpu = common::gpu();
    let fail = |model: &Model, options: &TextEncoderOptions| {
        TextEncoder::with_tokenizer(&gpu, model, tokenizer(), options)
            .unwrap_err()
            .to_string()
    };
    let good = model(&gpu).unwrap();
    assert!(fail(&good.clone().encoder(None), &options()).contains("decoder only"));
    let few = good.clone().encoder(Some(sizes().vocabulary(30)));
    assert!(fail(&few, &options()).contains("34"));
    assert!(fail(&good, &options().batches(vec![])).contains("batches"));
    assert!(fail(&good, &options().lengths(vec![0])).contains("lengths"));
    let wide = good.clone().encoder(Some(sizes().width(16)));
    assert!(fail(&wide, &options()).contains("embedding.weight"));
}

#[cfg(feature = "tokenizer")]
#[test]
fn a_folder_is_all_that_is_needed() {
    let gpu = common::gpu();
    let sizes = sizes().vocabulary(30_522).width(4).hidden(4);
    let mut graph = Graph::new();
    let layers = Encoder::new(&mut graph, &sizes).unwrap();
    graph.output("bias", layers.projection.weight).unwrap();
    let mut session = Session::new(&gpu, 5);
    session.compile(&graph).unwrap();
    let json = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/data/tokenizer.json")).unwrap();
    let model = Model::new(Weights::from_session(&session).unwrap())
        .encoder(Some(sizes))
        .tokenizer(Some(json));
    let folder = tempfile::TempDir::new().unwrap();
    let dir = folder.path().join("model");
    model
        .save(&dir, energyflow::train::WeightType::F16)
        .unwrap();
    let encoder = TextEncoder::load(&gpu, &dir).unwrap();
    let long = "word ".repeat(100_000);
    let texts = [
        "",
        "a text",
        "a [PAD] b",
        "\0\u{1}\u{301}",
        &"x".repeat(10_000),
        &long,
    ];
    let found = encoder.encode(&texts).unwrap();
    assert!(found.as_slice().iter().all(|x| x.is_finite()));
    assert_eq!(found.truncated().len(), 1);
    assert_eq!(found.truncated()[0].text, 5);
    assert!(found.truncated()[0].bytes > 490_000);
    let bare = model.tokenizer(None);
    let error = TextEncoder::new(&gpu, &bare, &TextEncoderOptions::default()).unwrap_err();
    assert!(error.to_string().contains("tokenizer"), "{error}");
}
