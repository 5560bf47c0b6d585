//! Model folders: written whole or not at all, read anywhere, refused with the file and the reason.

mod common;
#[path = "common/itself.rs"]
mod itself;

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use energyflow::graph::Graph;
use energyflow::nn::TcnBlock;
use energyflow::text::{Card, Decoder, DecoderOptions, Encoder, EncoderOptions, Model};
use energyflow::train::{WeightType, Weights};
use energyflow::{Error, Result, Session};
use tempfile::TempDir;

fn encoder() -> EncoderOptions {
    EncoderOptions::default()
        .vocabulary(50)
        .length(8)
        .width(8)
        .hidden(16)
        .kernel(3)
        .dilations(vec![1, 2])
        .embedding(6)
}

fn decoder() -> DecoderOptions {
    DecoderOptions::default()
        .vocabulary(50)
        .length(8)
        .width(8)
        .hidden(16)
        .kernel(3)
        .dilations(vec![1, 2])
        .embedding(6)
}

/// Weights of what is declared.
fn weights(seed: u64, declare: impl FnOnce(&mut Graph) -> Result<()>) -> Weights {
    let mut graph = Graph::new();
    declare(&mut graph).unwrap();
    let parameters: Vec<_> = graph.parameters().map(|(id, _)| id).collect();
    for (number, id) in parameters.into_iter().enumerate() {
        graph.output(&format!("p{number}"), id).unwrap();
    }
    let mut session = Session::new(&common::gpu(), seed);
    session.compile(&graph).unwrap();
    Weights::from_session(&session).unwrap()
}

fn encoder_model(seed: u64) -> Model {
    let weights = weights(seed, |graph| Encoder::new(graph, &encoder()).map(|_| ()));
    Model::new(weights)
        .encoder(Some(encoder()))
        .normalize(true)
        .tokenizer(Some(b"{\"not\": \"looked at\"}".to_vec()))
        .card(
            Card::default()
                .name("small")
                .data("fifty words")
                .figure("cosine", 0.75)
                .seed(Some(seed))
                .license(Some("mit".into())),
        )
}

fn joint_model() -> Model {
    let weights = weights(3, |graph| {
        let encoder = Encoder::new(graph, &encoder())?;
        Decoder::sharing(graph, &decoder(), *encoder.tcn.blocks.last().unwrap())?;
        Ok(())
    });
    Model::new(weights)
        .encoder(Some(encoder()))
        .decoder(Some(decoder()))
        .shared_last_block(true)
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_model_comes_back_as_it_was() {
    let folder = TempDir::new().unwrap();
    let dir = folder.path().join("runs").join("model");
    let model = encoder_model(1);
    model.save(&dir, WeightType::F32).unwrap();
    let files = [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ];
    assert_eq!(names(&dir), files);
    assert_eq!(Model::load(&dir).unwrap(), model);
    let page = fs::read_to_string(dir.join("README.md")).unwrap();
    for part in [
        "---\n",
        "# small",
        "fifty words",
        "| cosine | 0.7500 |",
        "seed 1",
        "license: \"mit\"",
        env!("CARGO_PKG_VERSION"),
    ] {
        assert!(page.contains(part), "{part:?} in\n{page}");
    }
    // Rounded to f16, and half as large.
    let bytes = |dir: &Path| fs::metadata(dir.join("model.safetensors")).unwrap().len();
    let exact = bytes(&dir);
    model.save(&dir, WeightType::F16).unwrap();
    assert!(bytes(&dir) < exact * 3 / 4);
    let half = Model::load(&dir).unwrap();
    for name in model.weights.names() {
        let (shape, exact) = model.weights.get(name).unwrap();
        let (same, half) = half.weights.get(name).unwrap();
        assert_eq!(shape, same);
        assert!(
            exact
                .iter()
                .zip(half)
                .all(|(a, b)| (a - b).abs() <= 5e-4 * a.abs() + 1e-7)
        );
    }
    // It loads anywhere.
    let elsewhere = folder.path().join("elsewhere");
    fs::rename(&dir, &elsewhere).unwrap();
    Model::load(&elsewhere).unwrap();
    assert_eq!(names(&folder.path().join("runs")), [""; 0]);
}

#[test]
fn encoder_and_decoder_share_a_block_once() {
    let folder = TempDir::new().unwrap();
    let dir = folder.path().join("model");
    let model = joint_model();
    assert!(model.weights.get("decoder.blocks.1.conv1.weight").is_none());
    model.save(&dir, WeightType::F32).unwrap();
    assert_eq!(
        names(&dir),
        ["README.md", "config.json", "model.safetensors"]
    );
    let loaded = Model::load(&dir).unwrap();
    assert_eq!(loaded, model);

    // The decoder alone.
    let mut graph = Graph::new();
    loaded.build_decoder(&mut graph, None).unwrap();
    for name in [
        "blocks.1.conv1.weight",
        "decoder.blocks.0.conv1.weight",
        "decoder.head.weight",
    ] {
        assert!(graph.find(name).is_some(), "{name}");
    }
    assert!(graph.find("blocks.0.conv1.weight").is_none());
    assert!(graph.find("embedding.weight").is_none());
    // Both in one graph.
    let mut graph = Graph::new();
    let encoder = loaded.build_encoder(&mut graph).unwrap();
    loaded.build_decoder(&mut graph, Some(&encoder)).unwrap();
    assert_eq!(graph.parameters().count(), model.weights.names().count());

    // What does not fit is no model.
    let message = |model: Model| model.save(&dir, WeightType::F32).unwrap_err().to_string();
    let other = decoder().dilations(vec![1, 4]);
    let wrong = message(model.clone().decoder(Some(other)));
    assert!(wrong.contains("shared_last_block"), "{wrong}");
    let wrong = message(model.clone().shared_last_block(false));
    assert!(
        wrong.contains("decoder.blocks.1.norm.weight") && wrong.contains("missing"),
        "{wrong}"
    );
    let wrong = message(model.clone().decoder(Some(decoder().embedding(7))));
    assert!(wrong.contains("embedding"), "{wrong}");
    let wrong = message(model.clone().decoder(None).shared_last_block(false));
    assert!(
        wrong.contains("decoder.") && wrong.contains("no parameter"),
        "{wrong}"
    );
    let wrong = message(model.clone().encoder(None).decoder(None));
    assert!(wrong.contains("encoder"), "{wrong}");
    let card = Card::default().figure("loss", f64::NAN);
    let wrong = message(model.clone().card(card));
    assert!(wrong.contains("loss"), "{wrong}");
    assert_eq!(Model::load(&dir).unwrap(), model, "nothing was written");
    assert_eq!(names(folder.path()), ["model"]);
}

#[test]
fn parameters_go_to_a_session_that_declares_some_of_them() {
    let model = joint_model();
    let mut graph = Graph::new();
    let last = TcnBlock::new(&mut graph, "blocks.1", &decoder().tcn(), 2).unwrap();
    graph.output("norm", last.norm.weight).unwrap();
    let mut session = Session::new(&common::gpu(), 9);
    session.compile(&graph).unwrap();
    model.apply(&mut session).unwrap();
    let name = "blocks.1.conv1.weight";
    assert_eq!(
        session.get(name).unwrap(),
        model.weights.get(name).unwrap().1
    );
    let mut graph = Graph::new();
    let more = TcnBlock::new(&mut graph, "blocks.7", &decoder().tcn(), 2).unwrap();
    graph.output("norm", more.norm.weight).unwrap();
    session.compile(&graph).unwrap();
    let error = model.apply(&mut session).unwrap_err();
    assert!(
        matches!(&error, Error::Data { name, .. } if name.starts_with("blocks.7")),
        "{error}"
    );
}

#[test]
fn what_is_wrong_with_a_folder_is_said_with_the_file() {
    let folder = TempDir::new().unwrap();
    let dir = folder.path().join("model");
    let error = Model::load(&dir).unwrap_err();
    assert!(
        matches!(&error, Error::Io { path, .. } if path.ends_with("config.json")),
        "{error}"
    );
    encoder_model(1).save(&dir, WeightType::F32).unwrap();
    let config = dir.join("config.json");
    let good = fs::read_to_string(&config).unwrap();
    let with = |from: &str, to: &str| {
        assert!(good.contains(from), "{from} in {good}");
        fs::write(&config, good.replacen(from, to, 1)).unwrap();
        let error = Model::load(&dir).unwrap_err();
        assert!(
            matches!(&error, Error::Format { path, .. } if path.parent() == Some(&dir)),
            "{error:?}"
        );
        error.to_string()
    };
    let message = with("\"version\": 1", "\"version\": 2, \"new\": 3");
    assert!(
        message.contains("newer") && message.contains("update energyflow"),
        "{message}"
    );
    let message = with("\"version\": 1", "\"version\": 0");
    assert!(message.contains("version"), "{message}");
    let message = with("energyflow.model", "other.model");
    assert!(message.contains("other.model"), "{message}");
    let message = with("\"length\"", "\"lengths\"");
    assert!(message.contains("lengths"), "{message}");
    let message = with("\"width\": 8", "\"width\": 16");
    assert!(
        message.contains("embedding.weight") && message.contains("model.safetensors"),
        "{message}"
    );
    let message = with("\"kernel\": 3", "\"kernel\": 0");
    assert!(
        message.contains("kernel") && message.contains("config.json"),
        "{message}"
    );
    let message = with("\"dilations\": [", "\"dilations\": [ 1,");
    assert!(message.contains("blocks.2"), "{message}");
    // The offset is where JSON ends to be right.
    fs::write(&config, &good[..good.len() - 3]).unwrap();
    let error = Model::load(&dir).unwrap_err();
    assert!(
        matches!(&error, Error::Format { offset, .. } if *offset >= good.len() as u64 - 5),
        "{error}"
    );
    fs::write(&config, &good).unwrap();
    fs::write(dir.join("model.safetensors"), b"short").unwrap();
    let error = Model::load(&dir).unwrap_err().to_string();
    assert!(error.contains("model.safetensors"), "{error}");
    fs::remove_file(dir.join("model.safetensors")).unwrap();
    let error = Model::load(&dir).unwrap_err().to_string();
    assert!(error.contains("model.safetensors"), "{error}");
    // A damaged model may be replaced.
    encoder_model(2).save(&dir, WeightType::F32).unwrap();
    assert_eq!(Model::load(&dir).unwrap(), encoder_model(2));
}

#[test]
fn a_convolution_that_looks_back_too_far_is_refused() {
    for dilation in [usize::MAX, 1 << 30] {
        let dilations = vec![1, dilation];
        let decoder = decoder().dilations(dilations.clone());
        let encoder = encoder().dilations(dilations);
        for result in [
            Decoder::new(&mut Graph::new(), &decoder).map(|_| ()),
            Encoder::new(&mut Graph::new(), &encoder).map(|_| ()),
        ] {
            let error = result.unwrap_err();
            assert!(
                matches!(
                    error,
                    Error::Config {
                        field: "dilations",
                        ..
                    }
                ),
                "{error}"
            );
        }
    }
}

#[test]
fn a_folder_inside_a_model_is_not_replaced() {
    let folder = TempDir::new().unwrap();
    let dir = folder.path().join("model");
    let model = encoder_model(1);
    model.save(&dir, WeightType::F32).unwrap();
    fs::remove_file(dir.join("README.md")).unwrap();
    let notes = dir.join("README.md").join("notes.txt");
    fs::create_dir(dir.join("README.md")).unwrap();
    fs::write(&notes, "of the user").unwrap();
    let error = model.save(&dir, WeightType::F32).unwrap_err();
    assert!(error.to_string().contains("README.md"), "{error}");
    assert_eq!(fs::read_to_string(notes).unwrap(), "of the user");
}

#[test]
fn a_folder_of_something_else_is_not_replaced() {
    let folder = TempDir::new().unwrap();
    let dir = folder.path().join("home");
    let model = encoder_model(1);
    let refuse = |what: &str| {
        let before = names(&dir);
        let error = model.save(&dir, WeightType::F32).unwrap_err();
        assert!(
            matches!(&error, Error::Io { path, .. } if *path == dir),
            "{error}"
        );
        assert!(error.to_string().contains(what), "{error}");
        assert_eq!(names(&dir), before);
    };
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("letter.txt"), "dear").unwrap();
    refuse("letter.txt");
    fs::remove_file(dir.join("letter.txt")).unwrap();
    // A model of others has files of the same names.
    fs::write(
        dir.join("config.json"),
        "{\"architectures\": [\"BertModel\"]}",
    )
    .unwrap();
    refuse("no model of energyflow");
    fs::remove_file(dir.join("config.json")).unwrap();
    // An empty folder may be.
    model.save(&dir, WeightType::F32).unwrap();
    fs::write(dir.join("training.svg"), "").unwrap();
    refuse("training.svg");
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(matches!(
        model.save(&file, WeightType::F32),
        Err(Error::Io { .. })
    ));
    assert_eq!(names(folder.path()), ["file", "home"]);
}

#[cfg(unix)]
#[test]
fn a_link_to_a_folder_stays_a_link() {
    let folder = TempDir::new().unwrap();
    let (dir, link) = (folder.path().join("model"), folder.path().join("latest"));
    encoder_model(1).save(&dir, WeightType::F32).unwrap();
    std::os::unix::fs::symlink(&dir, &link).unwrap();
    encoder_model(2).save(&link, WeightType::F32).unwrap();
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(Model::load(&dir).unwrap(), encoder_model(2));
    assert_eq!(names(folder.path()), ["latest", "model"]);
}

const CHILD: &str = "ENERGYFLOW_TEST_MODEL_FOLDER";

/// Not a test: the process that is killed below. It replaces a model by another as fast as it can.
#[test]
fn child() {
    let Some(folder) = std::env::var_os(CHILD) else {
        return;
    };
    let folder = Path::new(&folder);
    let models = ["b", "a"].map(|name| Model::load(folder.join(name)).unwrap());
    fs::write(folder.join("started"), "").unwrap();
    for model in models.iter().cycle() {
        model.save(folder.join("model"), WeightType::F32).unwrap();
    }
}

#[test]
fn a_process_that_is_killed_leaves_one_whole_model() {
    let folder = TempDir::new().unwrap();
    let models = [1, 2].map(encoder_model);
    for (name, model) in ["a", "b"].iter().zip(&models) {
        model
            .save(folder.path().join(name), WeightType::F32)
            .unwrap();
    }
    let dir = folder.path().join("model");
    models[0].save(&dir, WeightType::F32).unwrap();
    let mut seen = [0, 0];
    for round in 0..50 {
        let mut child = itself::command()
            .args(["--exact", "child"])
            .env(CHILD, folder.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let started = folder.path().join("started");
        while !started.exists() {
            std::thread::sleep(Duration::from_millis(1));
        }
        fs::remove_file(started).unwrap();
        std::thread::sleep(Duration::from_micros(500 + 2_117 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        let found = Model::load(&dir).unwrap();
        let which = models.iter().position(|model| *model == found);
        seen[which.expect("one of the two")] += 1;
    }
    assert!(seen[1] > 0, "the child saved nothing: {seen:?}");
    // The next save removes what was left behind.
    models[1].save(&dir, WeightType::F32).unwrap();
    assert_eq!(names(folder.path()), ["a", "b", "model"]);
}
