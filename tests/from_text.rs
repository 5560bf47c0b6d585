//! The examples `distill` and `finetune`, from text files and a tiny teacher to models.
#![cfg(feature = "tokenizer")]
#![allow(clippy::duplicate_mod, reason = "the examples share files")]

#[path = "common/bert.rs"]
#[allow(dead_code)]
mod bert;
#[path = "../examples/distill.rs"]
#[allow(dead_code)]
mod distill;
#[path = "../examples/finetune.rs"]
#[allow(dead_code)]
mod finetune;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use bert::Bert;
use clap::Parser;
use energyflow::text::{Model, TextFile, TransformerModel, ValidationSize};

/// A folder with a teacher and a text file of these lines.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new(lines: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let place = Self { folder };
        let teacher = place.at("teacher");
        std::fs::create_dir(&teacher).unwrap();
        Bert::default().write(Path::new(&teacher));
        std::fs::write(place.at("my.txt"), lines).unwrap();
        place
    }

    fn at(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn changed(&self, name: &str) -> SystemTime {
        let metadata = std::fs::metadata(self.path(name)).unwrap();
        metadata.modified().unwrap()
    }

    fn distill(&self, more: &[&str]) -> Result<(), Box<dyn Error>> {
        let [texts, teacher, out] = ["my.txt", "teacher", "out"].map(|name| self.at(name));
        let mut words = vec![
            "distill",
            "--texts",
            &texts,
            "--teacher",
            &teacher,
            "--out",
            &out,
        ];
        words.extend("--width 8 --hidden 8 --kernel 2 --dilations 1 --expansion 0 --pooling mean --length 8 --epochs 2 --ask w1".split(' '));
        words.extend(more);
        distill::distill(distill::Options::try_parse_from(words)?)
    }
}

/// Texts of two to five words; each eleventh line is blank, and some texts are there twice.
fn lines(n: usize) -> String {
    let text = |i: usize| match i % 11 {
        10 => String::new(),
        _ => {
            let words = (0..2 + i % 4).map(|j| format!("w{}", (i % 31 * 7 + j * 5) % 25));
            words.collect::<Vec<_>>().join(" ")
        }
    };
    (0..n).map(|i| text(i) + "\n").collect()
}

#[test]
fn a_text_file_becomes_a_model() {
    let place = Place::new(&lines(50));
    place.distill(&[]).unwrap();
    let model = Model::load(place.path("out/model")).unwrap();
    let encoder = model.encoder.as_ref().unwrap();
    assert_eq!((encoder.length, encoder.embedding), (8, bert::WIDTH));
    assert!(model.tokenizer.is_some());
    assert!(model.card.data.contains("`my.txt`"), "{}", model.card.data);
    assert!(model.card.figures.contains_key("cosine"));
    // The second time nothing is embedded, but all else is done.
    let cache = "my.txt.teacher.safetensors";
    let before = place.changed(cache);
    let weights = place.changed("out/model/model.safetensors");
    place.distill(&["--seed", "1"]).unwrap();
    assert_eq!(place.changed(cache), before);
    assert!(place.changed("out/model/model.safetensors") > weights);
    // A damaged cache is made again, the same.
    let whole = std::fs::read(place.path(cache)).unwrap();
    let mut bytes = whole.clone();
    let at = bytes.len() - 20;
    bytes[at] ^= 4;
    std::fs::write(place.path(cache), bytes).unwrap();
    place.distill(&["--seed", "2"]).unwrap();
    assert!(std::fs::read(place.path(cache)).unwrap() == whole);
}

/// The whole of it: parts in other folders than usual, a vocabulary that is padded, and embeddings that are not kept beside the texts.
#[test]
fn another_teacher_and_another_place_for_the_embeddings() {
    let place = Place::new(&lines(50));
    let inner = place.path("teacher/0_Transformer");
    std::fs::create_dir(&inner).unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::rename(place.path("teacher").join(name), inner.join(name)).unwrap();
    }
    let edit = |path: PathBuf, from: &str, to: &str| {
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{text}");
        std::fs::write(&path, text.replacen(from, to, 1)).unwrap();
    };
    let modules = place.path("teacher/modules.json");
    edit(modules, "\"path\": \"\"", "\"path\": \"0_Transformer\"");
    // A tokenizer of fewer tokens than the table has rows.
    let tokenizer = inner.join("tokenizer.json");
    let text = std::fs::read_to_string(&tokenizer).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let vocabulary = json["model"]["vocab"].as_object_mut().unwrap();
    vocabulary.retain(|_, id| id.as_u64() != Some(bert::VOCABULARY as u64 - 1));
    std::fs::write(&tokenizer, json.to_string()).unwrap();

    std::fs::create_dir(place.path("kept")).unwrap();
    let cache = place.at("kept/embeddings");
    place.distill(&["--cache", &cache]).unwrap();
    let model = Model::load(place.path("out/model")).unwrap();
    assert_eq!(model.encoder.unwrap().vocabulary, bert::VOCABULARY - 1);
    let names = |folder: &str| std::fs::read_dir(place.path(folder)).unwrap().count();
    assert_eq!(names("kept"), 2, "embeddings and table");
    assert_eq!(names(""), 4, "teacher, texts, kept, out");

    // Pooling is part of the teacher.
    let before = std::fs::read(&cache).unwrap();
    let pooling = place.path("teacher/1_Pooling/config.json");
    edit(
        pooling.clone(),
        "\"pooling_mode_cls_token\": false",
        "\"pooling_mode_cls_token\": true",
    );
    edit(
        pooling,
        "\"pooling_mode_mean_tokens\": true",
        "\"pooling_mode_mean_tokens\": false",
    );
    std::fs::rename(place.path("teacher/1_Pooling"), place.path("teacher/pool")).unwrap();
    edit(place.path("teacher/modules.json"), "1_Pooling", "pool");
    place.distill(&["--cache", &cache]).unwrap();
    assert!(std::fs::read(&cache).unwrap() != before);

    // What is no cache is not replaced.
    let texts = place.at("my.txt");
    let error = place.distill(&["--cache", &texts]).unwrap_err().to_string();
    assert!(error.contains("not replaced"), "{error}");
    assert_eq!(std::fs::read_to_string(&texts).unwrap(), lines(50));
}

#[test]
fn a_file_that_cannot_be_split_is_refused_before_anything_is_made() {
    for (content, word) in [
        ("only one\n", "1 different texts are too few"),
        ("One  two\none two\n\n", "1 different texts are too few"),
        ("\n  \n", "all 2 lines are blank"),
        ("", "the file is empty"),
    ] {
        let place = Place::new(content);
        let error = place.distill(&[]).unwrap_err().to_string();
        assert!(error.contains(word) && error.contains("my.txt"), "{error}");
        let names = std::fs::read_dir(place.folder.path()).unwrap().count();
        assert_eq!(names, 2, "{content:?}");
    }
    std::fs::write(Place::new("").path("my.txt"), [b'a', b'\n', 0xff]).unwrap();
    // Two texts are enough: one to train, one to validate.
    let place = Place::new("w1 w2\nw3");
    let texts = TextFile::open(place.path("my.txt")).unwrap();
    let split = texts.split(ValidationSize::Share(0.05)).unwrap();
    assert_eq!((split.training.len(), split.validation.len()), (1, 1));
}

#[test]
fn options_that_do_not_go_together_are_refused() {
    for words in [
        "distill --texts a.txt",
        "distill --teacher folder",
        "distill --texts a.txt --teacher folder --train b.jsonl",
        "distill --texts a.txt --teacher folder --validation-share 0.1 --validation-count 3",
        "distill --cache a.safetensors",
        "distill --teacher-precision f16",
        "distill --validation-count 3",
    ] {
        assert!(
            distill::Options::try_parse_from(words.split(' ')).is_err(),
            "{words}"
        );
    }
}

#[test]
fn a_teacher_and_an_encoder_are_fine_tuned() {
    let place = Place::new(&lines(12));
    let pairs = (0..40).map(|i| format!("w{} w{}\tw{} w{}\n", i % 9, i % 25, i % 9, (i + 7) % 25));
    std::fs::write(place.path("pairs.tsv"), pairs.collect::<String>()).unwrap();
    let tune = |model: &str, out: &str| {
        let [model, pairs, out] = [model, "pairs.tsv", out].map(|name| place.at(name));
        let mut words = vec![
            "finetune", "--model", &model, "--pairs", &pairs, "--out", &out,
        ];
        words.extend(
            "--batch 8 --epochs 2 --learning-rate 1e-2 --best-by mrr --symmetric".split(' '),
        );
        finetune::finetune(finetune::Options::try_parse_from(words).unwrap()).unwrap();
    };
    tune("teacher", "tuned");
    let before = TransformerModel::load(place.path("teacher")).unwrap();
    let tuned = TransformerModel::load(place.path("tuned/model")).unwrap();
    assert_eq!(tuned.options.length, before.options.length);
    assert_eq!(tuned.tokenizer, before.tokenizer);
    assert_ne!(tuned.weights, before.weights);
    // It is a teacher like the first.
    place.distill(&[]).unwrap();
    tune("out/model", "tuned encoder");
    let before = Model::load(place.path("out/model")).unwrap();
    let tuned = Model::load(place.path("tuned encoder/model")).unwrap();
    assert_ne!(tuned.weights, before.weights);
    assert_eq!(tuned.card.name, before.card.name);
    assert!(tuned.card.figures.contains_key("mrr"));
}
