//! Folders of sentence-transformers: embeddings against f64 from the definition, what is refused, and what is written back.
#![cfg(feature = "tokenizer")]

#[path = "common/bert.rs"]
mod bert;
mod common;

use std::fs;
use std::path::Path;

use bert::{Bert, WIDTH};
use energyflow::text::{Precision, SentenceTransformer, TextEncoderOptions, TransformerModel};
use energyflow::train::WeightType;
use energyflow::{Error, Result};
use serde_json::{Value, json};
use tempfile::TempDir;

fn folder(bert: Bert) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    bert.write(dir.path());
    dir
}

fn options() -> TextEncoderOptions {
    TextEncoderOptions::default()
        .lengths(vec![4, 6])
        .batches(vec![1, 4])
}

/// Texts of 0 to 12 words, of which 9 fit.
fn texts(n: usize) -> Vec<String> {
    let word = |i: usize, j: usize| format!("w{}", (7 * i + 3 * j + i * j) % 28);
    let text = |i: usize| (0..(5 * i) % 13).map(|j| word(i, j)).collect::<Vec<_>>();
    (0..n).map(|i| text(i).join(" ")).collect()
}

/// Largest difference from the embeddings in f64.
fn error(teacher: &SentenceTransformer, bert: Bert, texts: &[String]) -> f64 {
    let found = teacher.encode(texts).unwrap();
    let mut largest: f64 = 0.0;
    for (text, found) in texts.iter().zip(&found) {
        let ids = teacher.tokenizer().encode(text).unwrap();
        assert!((2..=11).contains(&ids.len()), "{ids:?}");
        for (a, b) in found.iter().zip(bert.embed(&ids)) {
            largest = largest.max((f64::from(*a) - b).abs());
        }
    }
    largest
}

#[test]
fn embeddings_are_those_of_the_definition() {
    let texts = texts(17);
    for (cls, normalize, prefix) in [(false, true, ""), (true, false, "bert.")] {
        let bert = Bert {
            cls,
            normalize,
            prefix,
            ..Bert::default()
        };
        let dir = folder(bert);
        let gpu = common::gpu();
        let teacher = SentenceTransformer::load_with(&gpu, dir.path(), &options()).unwrap();
        assert_eq!((teacher.width(), teacher.normalizes()), (WIDTH, normalize));
        assert_eq!(teacher.options().length, 11);
        let largest = error(&teacher, bert, &texts);
        assert!(largest < 3e-6, "{largest}");
        let half = options().precision(Precision::Mixed);
        let teacher = SentenceTransformer::load_with(&gpu, dir.path(), &half).unwrap();
        let largest = error(&teacher, bert, &texts);
        assert!(largest < if normalize { 4e-3 } else { 2e-2 }, "{largest}");
    }
}

#[test]
fn neighbours_buckets_and_cuts() {
    let bert = Bert::default();
    let dir = folder(bert);
    let gpu = common::gpu();
    let teacher = SentenceTransformer::load_with(&gpu, dir.path(), &options()).unwrap();
    let texts = texts(9);
    let all = teacher.encode(&texts).unwrap();
    let cut: Vec<usize> = all.truncated().iter().map(|cut| cut.text).collect();
    let long = |text: &&String| text.split_whitespace().count() > 9;
    let wanted = texts.iter().filter(long).count();
    assert_eq!(cut.len(), wanted);
    assert!(wanted > 0);
    // Alone, in another bucket of another size, and with the async form.
    let other = TextEncoderOptions::default()
        .lengths(vec![])
        .batches(vec![2]);
    let other = SentenceTransformer::load_with(&gpu, dir.path(), &other).unwrap();
    other.warm_up(2).unwrap();
    for (text, row) in texts.iter().zip(&all) {
        let alone = other.encode(std::slice::from_ref(text)).unwrap();
        let later = pollster_block(teacher.encode_async(std::slice::from_ref(text))).unwrap();
        for ((a, b), c) in row.iter().zip(alone.as_slice()).zip(later.as_slice()) {
            assert!((a - b).abs() < 2e-6 && (a - c).abs() < 2e-6, "{a} {b} {c}");
        }
    }
    fn shared<T: Send + Sync>(_: &T) {}
    shared(&teacher);
}

fn pollster_block<T>(future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    loop {
        if let std::task::Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return output;
        }
        std::thread::yield_now();
    }
}

/// The content of a safetensors file by name.
fn tensors(path: &Path) -> Vec<(String, Vec<usize>, Vec<u8>)> {
    let bytes = fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut all: Vec<_> = file
        .tensors()
        .into_iter()
        .map(|(name, view)| (name, view.shape().to_vec(), view.data().to_vec()))
        .collect();
    all.sort();
    all
}

#[test]
fn a_saved_folder_is_what_was_loaded() {
    let bert = Bert::default();
    let dir = folder(bert);
    fs::write(dir.path().join("special_tokens_map.json"), "{}").unwrap();
    let gpu = common::gpu();
    let teacher = SentenceTransformer::load_with(&gpu, dir.path(), &options()).unwrap();
    let out = dir.path().join("out");
    for _ in 0..2 {
        // The second time it is replaced.
        teacher.save(&out, WeightType::F32).unwrap();
    }
    let weights = "model.safetensors";
    let before: Vec<_> = tensors(&dir.path().join(weights));
    let before: Vec<_> = before
        .into_iter()
        .filter(|(name, ..)| !name.ends_with("position_ids"))
        .collect();
    assert_eq!(tensors(&out.join(weights)), before);
    let bytes = fs::read(out.join(weights)).unwrap();
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    // Without it, transformers refuses the file.
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
    let read = |dir: &Path, name: &str| -> Value {
        serde_json::from_slice(&fs::read(dir.join(name)).unwrap()).unwrap()
    };
    for name in [
        "modules.json",
        "sentence_bert_config.json",
        "tokenizer.json",
        "special_tokens_map.json",
    ] {
        assert_eq!(read(&out, name), read(dir.path(), name), "{name}");
    }
    let (old, new) = (read(dir.path(), "config.json"), read(&out, "config.json"));
    for (field, value) in old.as_object().unwrap() {
        match (value.as_f64(), new[field].as_f64()) {
            (Some(a), Some(b)) => assert!((a - b).abs() <= 1e-6 * a.abs(), "{field}"),
            _ => assert_eq!(&new[field], value, "{field}"),
        }
    }
    let again = SentenceTransformer::load_with(&gpu, &out, &options()).unwrap();
    let texts = texts(3);
    let [a, b] = [&teacher, &again].map(|teacher| teacher.encode(&texts).unwrap());
    assert_eq!(a, b);

    teacher.save(&out, WeightType::F16).unwrap();
    let half = SentenceTransformer::load_with(&gpu, &out, &options()).unwrap();
    assert!(error(&half, bert, &texts) < 1e-3);

    // Not over something else.
    fs::write(out.join("notes.txt"), "mine").unwrap();
    let text = teacher.save(&out, WeightType::F32).unwrap_err().to_string();
    assert!(text.contains("notes.txt"), "{text}");
    assert_eq!(fs::read_to_string(out.join("notes.txt")).unwrap(), "mine");
}

/// Loads a folder after a change of one of its JSON files.
fn changed(file: &str, change: impl FnOnce(&mut Value)) -> Error {
    let dir = folder(Bert::default());
    let path = dir.path().join(file);
    let mut value: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut value);
    fs::write(&path, value.to_string()).unwrap();
    TransformerModel::load(dir.path()).map(|_| ()).unwrap_err()
}

#[test]
fn what_is_not_supported_is_refused_with_the_file() {
    let set = |field: &'static str, value: Value| move |config: &mut Value| config[field] = value;
    let cases: Vec<(&str, Error, &str)> = vec![
        (
            "config.json",
            changed("config.json", set("model_type", json!("roberta"))),
            "\"roberta\"",
        ),
        (
            "config.json",
            changed("config.json", set("hidden_act", json!("silu"))),
            "\"silu\"",
        ),
        (
            "config.json",
            changed(
                "config.json",
                set("position_embedding_type", json!("relative_key")),
            ),
            "relative_key",
        ),
        (
            "config.json",
            changed("config.json", set("is_decoder", json!(true))),
            "is_decoder",
        ),
        (
            "config.json",
            changed("config.json", set("num_attention_heads", json!(3))),
            "heads",
        ),
        (
            "config.json",
            changed("config.json", set("hidden_size", json!("x"))),
            "invalid type",
        ),
        (
            "model.safetensors",
            changed("config.json", set("intermediate_size", json!(23))),
            "linear1",
        ),
        (
            "config.json",
            changed("config.json", set("num_hidden_layers", json!(3))),
            "is 3, but model.safetensors has 2 layers",
        ),
        // Layers that are left out would change every embedding.
        (
            "config.json",
            changed("config.json", set("num_hidden_layers", json!(1))),
            "is 1, but model.safetensors has 2 layers",
        ),
        // Nothing is made for each of them.
        (
            "config.json",
            changed("config.json", set("num_hidden_layers", json!(1_u64 << 60))),
            "has 2 layers",
        ),
        (
            "1_Pooling",
            changed(
                "1_Pooling/config.json",
                set("pooling_mode_max_tokens", json!(true)),
            ),
            "pooling_mode_max_tokens",
        ),
        (
            "modules.json",
            changed("modules.json", |modules| {
                modules[2]["type"] = json!("sentence_transformers.models.Dense")
            }),
            "Dense",
        ),
        (
            "modules.json",
            changed("modules.json", |modules| {
                modules[1]["path"] = json!("../1_Pooling")
            }),
            "inside",
        ),
    ];
    for (file, error, word) in cases {
        let text = error.to_string();
        assert!(matches!(error, Error::Format { .. }), "{error:?}");
        assert!(text.contains(file) && text.contains(word), "{text}");
    }
}

/// Loads a folder after a change of the types and names of its weights.
fn renamed(change: impl Fn(&str) -> (safetensors::Dtype, String)) -> String {
    let dir = folder(Bert::default());
    let path = dir.path().join("model.safetensors");
    let tensors = tensors(&path);
    let views = tensors
        .iter()
        .filter(|(name, ..)| !name.ends_with("position_ids"));
    let views = views.map(|(name, shape, bytes)| {
        let (dtype, name) = change(name);
        let view = safetensors::tensor::TensorView::new(dtype, shape.clone(), bytes).unwrap();
        (name, view)
    });
    safetensors::serialize_to_file(views.collect::<Vec<_>>(), None, &path).unwrap();
    TransformerModel::load(dir.path()).unwrap_err().to_string()
}

#[test]
fn weights_of_another_kind_are_called_what_they_are() {
    let text = renamed(|name| (safetensors::Dtype::I32, name.to_owned()));
    assert!(text.contains("is I32, which is not read"), "{text}");
    // What only some other network computes is not left out without a word.
    let more = |name: &str| name.replace("pooler.dense", "encoder.layer.1.adapter");
    let text = renamed(|name| (safetensors::Dtype::F32, more(name)));
    assert!(text.contains("1.adapter.bias\" is no parameter"), "{text}");
}

#[test]
fn missing_files_are_named() -> Result<()> {
    for (file, word) in [
        ("config.json", "config.json"),
        ("model.safetensors", "model.safetensors"),
        ("1_Pooling/config.json", "1_Pooling"),
    ] {
        let dir = folder(Bert::default());
        fs::remove_file(dir.path().join(file)).unwrap();
        let error = TransformerModel::load(dir.path()).unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{error:?}");
        assert!(error.to_string().contains(word), "{error}");
    }
    let dir = folder(Bert::default());
    fs::rename(
        dir.path().join("model.safetensors"),
        dir.path().join("pytorch_model.bin"),
    )
    .unwrap();
    let text = TransformerModel::load(dir.path()).unwrap_err().to_string();
    assert!(text.contains("safe_serialization"), "{text}");

    // Without modules.json the folders say what there is.
    let dir = folder(Bert::default());
    fs::remove_file(dir.path().join("modules.json")).unwrap();
    assert!(!TransformerModel::load(dir.path())?.options.normalize);
    fs::create_dir(dir.path().join("2_Normalize")).unwrap();
    assert!(TransformerModel::load(dir.path())?.options.normalize);

    let dir = folder(Bert::default());
    fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    let error = SentenceTransformer::load(&common::gpu(), dir.path()).unwrap_err();
    assert!(error.to_string().contains("with_tokenizer"), "{error}");
    Ok(())
}
