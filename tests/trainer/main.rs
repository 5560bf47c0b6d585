//! One trainer for both modes: alternation, updates of each parameter, validation, checkpoints.

mod checkpoints;
mod choice;
#[path = "../common/mod.rs"]
mod common;
#[path = "../common/itself.rs"]
mod itself;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use common::gpu;
use energyflow::text::trainer::{Event, FitReport};
use energyflow::text::{
    Batches, Card, Condition, Dataset, DecoderOptions, Efb1Writer, EncoderOptions, FitOptions,
    InfoNce, Metrics, Precision, Trainer, TrainerOptions, TrainingMode,
};
use energyflow::train::{AdamW, LossScale, Schedule};
use energyflow::{Error, Result};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tempfile::TempDir;

const VOCABULARY: usize = 19;
const LENGTH: usize = 6;
const WIDTH: usize = 8;

/// Random texts with random embeddings of length 1.
fn texts(folder: &Path, samples: usize) -> Dataset {
    let path = folder.join(format!("{samples}.efb"));
    let mut rng = ChaCha8Rng::seed_from_u64(samples as u64);
    let mut writer = Efb1Writer::create(&path, WIDTH).unwrap();
    for _ in 0..samples {
        let n = rng.random_range(2..=LENGTH);
        let ids: Vec<u32> = (0..n)
            .map(|_| rng.random_range(1..VOCABULARY as u32))
            .collect();
        let target: Vec<f32> = (0..WIDTH).map(|_| rng.random_range(-1.0..1.0)).collect();
        let norm = target.iter().map(|x| x * x).sum::<f32>().sqrt();
        let target: Vec<f32> = target.iter().map(|x| x / norm).collect();
        writer.push(&ids, &vec![1; n], &target).unwrap();
    }
    writer.finish().unwrap();
    Dataset::open(path).unwrap()
}

fn encoder() -> EncoderOptions {
    EncoderOptions::default()
        .vocabulary(VOCABULARY)
        .length(LENGTH)
        .width(8)
        .hidden(12)
        .kernel(2)
        .dilations(vec![1, 2])
        .embedding(WIDTH)
        .dropout(0.1)
}

fn decoder() -> DecoderOptions {
    DecoderOptions::default()
        .vocabulary(VOCABULARY)
        .length(LENGTH)
        .width(8)
        .hidden(12)
        .kernel(2)
        .dilations(vec![1, 2])
        .embedding(WIDTH)
        .dropout(0.1)
}

fn options() -> TrainerOptions {
    let optimizer = AdamW::default()
        .schedule(Schedule::WarmupCosine {
            peak: 1e-2,
            end: 1e-4,
            warmup: 3,
            total: 40,
        })
        .clip(Some(1.0));
    TrainerOptions::default()
        .batch(6)
        .seed(3)
        .optimizer(optimizer)
}

fn batches(data: &Dataset) -> Batches {
    Batches::training(data.clone(), 6, LENGTH, 5).unwrap()
}

/// 1 − βᵗ of both betas.
fn corrections(updates: i32) -> [f32; 2] {
    [0.9_f64, 0.999].map(|beta| (1.0 - f64::from(beta as f32).powi(updates)) as f32)
}

/// A trainer of each kind. The kinds differ in what is accumulated, in the precision and in the terms of the loss.
fn trainer(kind: usize) -> Trainer {
    let mixed = |options: TrainerOptions| {
        // So that steps are skipped, and the scale moves.
        let scale = LossScale::default().start(1_048_576.0).interval(3);
        let optimizer = options.optimizer.clone().loss_scale(Some(scale));
        options.optimizer(optimizer).precision(Precision::Mixed)
    };
    let result = match kind {
        0 => {
            let options = mixed(options().info_nce(Some(InfoNce::new(0.1))));
            Trainer::distill(&gpu(), &encoder(), &options)
        }
        1 => {
            let options = options().micro_batches(2).smoothing(0.1);
            Trainer::decode(&gpu(), &decoder().tied(true), &options)
        }
        2 => {
            let options = options().chunks(3).micro_batches(2);
            Trainer::joint(&gpu(), &encoder(), &decoder(), &options)
        }
        _ => {
            let options = mixed(options().chunks(2).cycle(0.2));
            let options = options.condition(Condition::TrainedStudent).recompute(true);
            Trainer::joint(&gpu(), &encoder(), &decoder(), &options)
        }
    };
    result.unwrap()
}

/// Bits of all that a trainer keeps.
fn bits(trainer: &Trainer) -> BTreeMap<String, Vec<u32>> {
    let session = trainer.session();
    let mut all = BTreeMap::new();
    for (name, _) in session.parameters() {
        let [m, v] = session.moments(name).unwrap().unwrap();
        let c = session.bias_corrections(name).unwrap().unwrap();
        let values = [session.get(name).unwrap(), m, v, c.to_vec()].concat();
        all.insert(
            name.to_owned(),
            values.into_iter().map(f32::to_bits).collect(),
        );
    }
    all
}

/// Trains until `cancel` steps were reported.
fn fit(
    trainer: &mut Trainer,
    data: &Dataset,
    options: &FitOptions,
    cancel: u64,
) -> (Vec<(u64, Metrics)>, FitReport) {
    let mut history = Vec::new();
    let report = trainer
        .fit(&mut batches(data), options, |event| {
            if let Event::Step { step, metrics, .. } = event {
                history.push((step, *metrics));
                if step == cancel {
                    return ControlFlow::Break(());
                }
            }
            ControlFlow::Continue(())
        })
        .unwrap();
    (history, report)
}

#[test]
fn a_model_is_trained_further() {
    let folder = TempDir::new().unwrap();
    let data = texts(folder.path(), 12);
    let before = trainer(2);
    before.epoch(&mut batches(&data), |_| {}).unwrap();
    let model = before.model().unwrap();
    // Other options than the model has been trained with, but those that its weights depend on.
    let options = before.options().clone().seed(99).shared_last_block(false);
    let after = Trainer::from_model(&gpu(), &model, &options).unwrap();
    assert_eq!(after.model().unwrap(), model);
    let scores = |trainer: &Trainer| trainer.evaluate(&data).unwrap();
    assert_eq!(scores(&after), scores(&before));
    let mut first = None;
    let count = |metrics: &Metrics| _ = first.get_or_insert(metrics.learning_rate);
    after.epoch(&mut batches(&data), count).unwrap();
    let peak = 1e-2;
    assert!(
        first.unwrap() <= peak / 3.0 * 1.001,
        "the schedule begins anew"
    );
    assert_ne!(after.model().unwrap().weights, model.weights);
    // The card says nothing of the training before.
    let card = Card::default().name("small").data("x").training("y");
    let card = card.figure("cosine", 0.5).seed(Some(1));
    let options = TrainerOptions::default();
    let joint = Trainer::from_model(&gpu(), &model.card(card), &options).unwrap();
    assert_eq!(joint.options().chunks, 2);
    let kept = joint.model().unwrap().card;
    assert_eq!(kept, Card::default().name("small"));
    // Of one network, a checkpoint fits whatever is said of a shared block.
    let one = Trainer::distill(&gpu(), &encoder(), &options).unwrap();
    let again = Trainer::from_model(&gpu(), &one.model().unwrap(), &options).unwrap();
    let mut one = one;
    one.resume(&again.checkpoint().unwrap()).unwrap();
}

#[test]
fn a_joint_batch_is_steps_of_both_modes() {
    let folder = TempDir::new().unwrap();
    let data = texts(folder.path(), 12);
    // (chunks, share of A, steps of A and B per batch)
    for (chunks, ratio, of_a, of_b) in [
        (1, 0.0, 0, 1),
        (1, 1.0, 1, 0),
        (3, 0.5, 2, 1),
        (6, 0.25, 2, 4),
    ] {
        let what = format!("{chunks} chunks, {ratio}");
        let options = options().chunks(chunks).ab_ratio(ratio);
        let trainer = Trainer::joint(&gpu(), &encoder(), &decoder(), &options).unwrap();
        let mut modes = Vec::new();
        let mut rates = Vec::new();
        for epoch in 0..2 {
            let mut batches = batches(&data);
            batches.start_epoch(epoch);
            trainer
                .epoch(&mut batches, |metrics| {
                    assert!(metrics.loss.is_finite());
                    modes.push(metrics.mode);
                    if metrics.mode == TrainingMode::A {
                        rates.push(metrics.learning_rate);
                    }
                })
                .unwrap();
        }
        let a_batch = [vec![TrainingMode::A; of_a], vec![TrainingMode::B; of_b]].concat();
        assert_eq!(modes, a_batch.repeat(4), "{what}");
        // The schedule of mode A counts its own steps.
        for (i, rate) in rates.into_iter().enumerate() {
            let expected = options.optimizer.schedule.at(i as u32 + 1);
            assert!((rate - expected).abs() < 1e-6, "{what}: step {i} {rate}");
        }
        let session = trainer.session();
        for (mode, steps) in [("a", of_a), ("b", of_b)] {
            let state = session.get(&format!("train.{mode}.step"));
            match steps {
                0 => assert!(state.is_err(), "{what}"),
                steps => assert_eq!(state.unwrap(), [4.0 * steps as f32], "{what}"),
            }
        }
        for (name, _) in session.parameters() {
            let updates = match name {
                name if name.starts_with("decoder.") => of_b,
                name if name.starts_with("blocks.1.") => of_a + of_b,
                _ => of_a,
            };
            // Without a step of its mode a parameter has no moments.
            let got = session.bias_corrections(name).unwrap().unwrap_or_default();
            for (got, want) in got.into_iter().zip(corrections(4 * updates as i32)) {
                assert!(
                    (got - want).abs() <= 1e-5 * want,
                    "{what} {name}: {got} {want}"
                );
            }
        }
        // Its last block is the encoder's.
        assert!(session.get("decoder.blocks.1.conv1.weight").is_err());
    }
}

#[test]
fn joint_training_learns_both() {
    let folder = TempDir::new().unwrap();
    let data = texts(folder.path(), 12);
    for (condition, precision) in [
        (Condition::Teacher, Precision::F32),
        (Condition::Student, Precision::Mixed),
    ] {
        let optimizer = AdamW::default().schedule(Schedule::Constant { rate: 1e-2 });
        let options = TrainerOptions::default()
            .batch(12)
            .chunks(2)
            .precision(precision)
            .condition(condition)
            .optimizer(optimizer.clip(Some(1.0)));
        let (encoder, decoder) = (encoder().dropout(0.0), decoder().dropout(0.0));
        let trainer = Trainer::joint(&gpu(), &encoder, &decoder, &options).unwrap();
        let before = trainer.evaluate(&data).unwrap();
        let mut batches = Batches::training(data.clone(), 12, LENGTH, 5).unwrap();
        for epoch in 0..120 {
            batches.start_epoch(epoch);
            trainer.epoch(&mut batches, |_| ()).unwrap();
        }
        let after = trainer.evaluate(&data).unwrap();
        for (name, least) in [("cosine", 0.5), ("accuracy", 0.4)] {
            let [before, after] = [&before, &after].map(|e| e.get(name).unwrap());
            assert!(
                after > least && after > before + 0.3,
                "{name} {before} {after}"
            );
        }
        let perplexity = after.decoder.unwrap().perplexity();
        assert!(perplexity < 6.0, "{condition:?}: {perplexity}");
        // What is saved is one model with one shared block.
        let model = trainer.model().unwrap();
        let path = folder.path().join(format!("{precision:?}"));
        model
            .save(&path, energyflow::train::WeightType::F32)
            .unwrap();
        assert!(energyflow::text::Model::load(&path).unwrap() == model);
    }
}

#[test]
fn refused_trainings() {
    let joint = |encoder: &EncoderOptions, decoder: &DecoderOptions, options: &TrainerOptions| {
        Trainer::joint(&gpu(), encoder, decoder, options).map(|_| ())
    };
    let both = options().chunks(2);
    let cases: Vec<(Result<()>, &str)> = vec![
        (joint(&encoder(), &decoder(), &options()), "chunks is 1"),
        (
            joint(&encoder(), &decoder(), &options().chunks(4)),
            "divide",
        ),
        (
            joint(&encoder(), &decoder(), &options().chunks(0)),
            "chunks",
        ),
        (
            joint(&encoder(), &decoder(), &both.clone().ab_ratio(1.5)),
            "ab_ratio",
        ),
        (
            joint(&encoder(), &decoder(), &both.clone().ab_ratio(f64::NAN)),
            "ab_ratio",
        ),
        (
            joint(&encoder(), &decoder(), &both.clone().cycle(-1.0)),
            "cycle",
        ),
        (
            joint(&encoder(), &decoder(), &both.clone().micro_batches(2)),
            "micro_batches",
        ),
        (
            joint(&encoder(), &decoder().dilations(vec![1, 4]), &both),
            "shared_last_block",
        ),
        (
            joint(&encoder(), &decoder().hidden(16), &both),
            "shared_last_block",
        ),
        (joint(&encoder(), &decoder().length(7), &both), "length"),
        (
            joint(&encoder(), &decoder().vocabulary(20), &both),
            "vocabulary",
        ),
        (
            joint(&encoder(), &decoder().embedding(9), &both),
            "embedding",
        ),
        (
            joint(
                &encoder(),
                &decoder(),
                &both.clone().freeze(vec!["no".into()]),
            ),
            "freeze",
        ),
        (
            Trainer::decode(&gpu(), &decoder(), &options().condition(Condition::Student))
                .map(|_| ()),
            "condition",
        ),
        (
            Trainer::decode(&gpu(), &decoder(), &options().cycle(1.0)).map(|_| ()),
            "cycle",
        ),
        (
            Trainer::distill(
                &gpu(),
                &encoder(),
                &options().info_nce(Some(InfoNce::new(1.0).temperature(0.0))),
            )
            .map(|_| ()),
            "info_nce",
        ),
        (
            Trainer::distill(&gpu(), &encoder(), &options().alpha(-1.0)).map(|_| ()),
            "alpha",
        ),
        (
            Trainer::distill(&gpu(), &encoder(), &options().beta(-1.0)).map(|_| ()),
            "beta",
        ),
    ];
    for (result, what) in cases {
        let error = result.unwrap_err();
        let text = error.to_string();
        assert!(
            matches!(error, Error::Config { .. }) && text.contains(what),
            "{what}: {text}"
        );
    }
    // Unequal blocks that are not shared.
    let apart = both.shared_last_block(false);
    joint(&encoder(), &decoder().dilations(vec![4]), &apart).unwrap();
}

/// A parameter whose first update comes after 50 of another optimizer is corrected as if it had been alone, and a shared one counts all.
#[test]
fn a_late_parameter_is_corrected_by_its_own_updates() {
    use energyflow::graph::{Graph, Init};
    use energyflow::{DType, Host, Session};
    let graph = |names: &[&str], optimizer: &AdamW| {
        let mut graph = Graph::new();
        let x = graph.input("x", &[3], DType::F32).unwrap();
        let mut sum = None;
        let mut parameters = Vec::new();
        for name in names {
            let p = graph.parameter(name, &[3], Init::Constant(1.0)).unwrap();
            parameters.push(p);
            let product = graph.mul(p, x).unwrap();
            let loss = graph.sum_all(product).unwrap();
            sum = Some(match sum {
                Some(sum) => graph.add(sum, loss).unwrap(),
                None => loss,
            });
        }
        optimizer
            .step(&mut graph, sum.unwrap(), &parameters)
            .unwrap();
        graph
    };
    let rate = 1e-2;
    let optimizer = |name: &str| {
        AdamW::named(name)
            .schedule(Schedule::Constant { rate })
            .weight_decay(0.0)
    };
    let mut session = Session::new(&gpu(), 0);
    let first = session.compile(&graph(&["p"], &optimizer("a"))).unwrap();
    let both = session
        .compile(&graph(&["p", "q"], &optimizer("b")))
        .unwrap();
    let x = [0.5, -2.0, 0.25];
    let run = |step: &energyflow::Executable| {
        step.run(&[("x", Host::F32(&x))]).unwrap().wait().unwrap();
    };
    (0..50).for_each(|_| run(&first));
    let p = session.get("p").unwrap();
    for _ in 0..3 {
        run(&both);
    }
    // With a constant gradient every update is the rate against its sign.
    let q = session.get("q").unwrap();
    let p_after = session.get("p").unwrap();
    for i in 0..3 {
        let update = 3.0 * rate * f32::signum(x[i]);
        assert!((1.0 - q[i] - update).abs() < 1e-5, "{q:?}");
        assert!(
            (p[i] - p_after[i] - update).abs() < 1e-5,
            "{p:?} {p_after:?}"
        );
    }
    for (name, updates) in [("p", 53), ("q", 3)] {
        let got = session.bias_corrections(name).unwrap().unwrap();
        for (got, want) in got.into_iter().zip(corrections(updates)) {
            assert!((got - want).abs() <= 1e-5 * want, "{name}: {got} {want}");
        }
    }
    assert_eq!(session.get("a.step").unwrap(), [50.0]);
    assert_eq!(session.get("b.step").unwrap(), [3.0]);
}

#[cfg(unix)]
mod killed {
    use std::io::{BufRead, BufReader};
    use std::process::Stdio;
    use std::time::{Duration, Instant};

    use energyflow::train::Checkpoint;

    use super::*;

    const FOLDER: &str = "ENERGYFLOW_TEST_CHECKPOINTS";
    const READY: &str = "it has saved once";

    #[test]
    fn process_that_saves_checkpoints_for_ever() {
        let Some(folder) = std::env::var_os(FOLDER) else {
            return;
        };
        let folder = Path::new(&folder);
        let checkpoint = Checkpoint::load(folder.join("source")).unwrap();
        let target = folder.join("saved/checkpoint-00000001.safetensors");
        checkpoint.save(&target).unwrap();
        println!("\n{READY}");
        // Not for ever, in case that nobody kills it.
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(60) {
            checkpoint.save(&target).unwrap();
        }
    }

    #[test]
    fn the_last_checkpoint_survives() {
        let folder = TempDir::new().unwrap();
        let saved = folder.path().join("saved");
        std::fs::create_dir(&saved).unwrap();
        let mut expected = trainer(0).checkpoint().unwrap();
        // So that writing takes a while.
        expected.metadata = "x".repeat(500_000);
        expected.save(folder.path().join("source")).unwrap();
        let files = || std::fs::read_dir(&saved).unwrap().count();
        let mut left = 0;
        for round in 0..50 {
            let mut child = crate::itself::command()
                .args([
                    "--exact",
                    "killed::process_that_saves_checkpoints_for_ever",
                    "--nocapture",
                ])
                .env(FOLDER, folder.path())
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let lines = BufReader::new(child.stdout.take().unwrap()).lines();
            let ready = lines.map_while(Result::ok).any(|line| line == READY);
            assert!(ready, "round {round}");
            std::thread::sleep(Duration::from_micros(round * 397 % 5000));
            child.kill().unwrap();
            child.wait().unwrap();
            left += files() - 1;
            assert!(files() <= 2, "round {round}");
            let latest = Trainer::latest_checkpoint(&saved).unwrap().unwrap();
            let found = Checkpoint::load(latest).unwrap();
            assert!(found == expected, "round {round}");
        }
        assert!(left > 0, "no process was killed while it wrote");
        expected
            .save(saved.join("checkpoint-00000001.safetensors"))
            .unwrap();
        assert_eq!(files(), 1);
    }
}
