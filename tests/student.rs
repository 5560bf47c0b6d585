//! Students with every option of the network: trained, interrupted, saved, loaded, used; and their start from a teacher.

mod common;

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use common::gpu;
use energyflow::text::trainer::{Event, Stop};
use energyflow::text::{
    Batches, Dataset, DecoderOptions, Efb1Writer, EncoderOptions, EncoderPooling, FitOptions,
    Model, Precision, StartOptions, TeacherTable, TextEncoder, TextEncoderOptions, Trainer,
    TrainerOptions, Whitespace,
};
use energyflow::train::{AdamW, Checkpoint, Schedule, WeightType};
use energyflow::{Error, Result};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tempfile::TempDir;

const VOCABULARY: usize = 23;
const LENGTH: usize = 9;
const WIDTH: usize = 6;

/// Everything at once.
fn rich() -> EncoderOptions {
    EncoderOptions::default()
        .vocabulary(VOCABULARY)
        .length(LENGTH)
        .width(8)
        .hidden(12)
        .kernel(3)
        .dilations(vec![1, 2])
        .embedding(WIDTH)
        .dropout(0.1)
        .centred(true)
        .gated(true)
        .pooling(EncoderPooling::Attention)
        .expansion(Some(20))
        .word_dropout(0.1)
}

fn fixed() -> EncoderOptions {
    EncoderOptions::default()
        .vocabulary(VOCABULARY)
        .length(LENGTH)
        .width(WIDTH)
        .dilations(vec![])
        .embedding(WIDTH)
}

fn options() -> TrainerOptions {
    let rate = Schedule::Constant { rate: 1e-2 };
    let optimizer = AdamW::default().schedule(rate).clip(Some(1.0));
    TrainerOptions::default()
        .batch(8)
        .seed(3)
        .optimizer(optimizer)
}

/// A table of random vectors.
fn table() -> TeacherTable {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let values = (0..VOCABULARY * WIDTH).map(|_| rng.random_range(-1.0..2.0));
    TeacherTable::new(WIDTH, values.collect()).unwrap()
}

/// Texts whose embedding is the mean of the rows of the table, a linear map of it and an offset.
fn texts(folder: &Path, samples: usize) -> Dataset {
    let path = folder.join(format!("{samples}.efb"));
    let table = table();
    let rows: Vec<&[f32]> = table.rows().collect();
    let mut rng = ChaCha8Rng::seed_from_u64(samples as u64);
    let mut writer = Efb1Writer::create(&path, WIDTH).unwrap();
    for _ in 0..samples {
        let n = rng.random_range(2..=LENGTH);
        let ids: Vec<u32> = (0..n)
            .map(|_| rng.random_range(1..VOCABULARY as u32))
            .collect();
        let mut target = [0.25_f32; WIDTH];
        for &id in &ids {
            for (e, target) in target.iter_mut().enumerate() {
                let row = rows[id as usize];
                *target += (row[e] - 0.5 * row[(e + 1) % WIDTH]) / n as f32;
            }
        }
        writer.push(&ids, &vec![1; n], &target).unwrap();
    }
    writer.finish().unwrap();
    Dataset::open(path).unwrap()
}

fn batches(data: &Dataset) -> Batches {
    Batches::training(data.clone(), 8, LENGTH, 5).unwrap()
}

fn bits(trainer: &Trainer) -> Vec<(String, Vec<u32>)> {
    let session = trainer.session();
    let of = |name: &str| {
        session
            .get(name)
            .unwrap()
            .iter()
            .map(|x| x.to_bits())
            .collect()
    };
    session
        .parameters()
        .map(|(name, _)| (name.to_owned(), of(name)))
        .collect()
}

#[test]
fn a_student_is_trained_interrupted_saved_and_used() {
    let folder = TempDir::new().unwrap();
    let data = texts(folder.path(), 40);
    let options = options().precision(Precision::Mixed).recompute(true);
    let new = || {
        let mut trainer = Trainer::distill(&gpu(), &rich(), &options).unwrap();
        trainer
            .start(&table(), &data, &StartOptions::default())
            .unwrap();
        trainer
    };
    let path = folder.path().join("checkpoints");
    let fit = |trainer: &mut Trainer, cancel: u64| {
        let fit = FitOptions::new(2).checkpoints(Some(path.clone()));
        let watch = |event: Event<'_>| match event {
            Event::Step { step, .. } if step == cancel => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        };
        trainer.fit(&mut batches(&data), &fit, watch).unwrap().stop
    };
    let mut whole = new();
    let before = bits(&whole);
    assert_eq!(fit(&mut whole, 0), Stop::Finished);
    let after = bits(&whole);
    for ((name, before), (_, after)) in before.iter().zip(&after) {
        assert!(before != after, "{name} is not trained");
    }
    std::fs::remove_dir_all(&path).unwrap();
    assert_eq!(fit(&mut new(), 3), Stop::Cancelled);
    let latest = Trainer::latest_checkpoint(&path).unwrap().unwrap();
    // Without a start: the checkpoint has everything.
    let mut second = Trainer::distill(&gpu(), &rich(), &options).unwrap();
    second.resume(&Checkpoint::load(latest).unwrap()).unwrap();
    assert_eq!(fit(&mut second, 0), Stop::Finished);
    assert!(bits(&second) == after);

    let dir = folder.path().join("model");
    whole.model().unwrap().save(&dir, WeightType::F32).unwrap();
    let model = Model::load(&dir).unwrap();
    assert_eq!(model.encoder, Some(rich()));
    let words = (0..VOCABULARY - 4).map(|i| format!("w{i}"));
    let tokenizer = Arc::new(Whitespace::new(words, LENGTH).unwrap());
    let samples: Vec<Vec<u32>> = data
        .iter()
        .map(|sample| sample.unwrap().ids().to_vec())
        .collect();
    // Whatever the length that a text is filled up to.
    let encode = |lengths: Vec<usize>| {
        let options = TextEncoderOptions::default()
            .lengths(lengths)
            .batches(vec![8]);
        let encoder = TextEncoder::with_tokenizer(&gpu(), &model, tokenizer.clone(), &options);
        encoder.unwrap().encode_ids(&samples).unwrap()
    };
    let far = |a: &[f32], b: &[f32]| {
        let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
        differences.fold(0.0_f32, f32::max)
    };
    let single = encode(vec![]);
    assert!(far(single.as_slice(), encode(vec![3, 6]).as_slice()) < 1e-5);
    // The trainer computes in f16.
    assert!(far(single.as_slice(), &whole.embed(&samples).unwrap()) < 2e-2);
}

/// The head finds the linear map, so that nothing is left to learn.
#[test]
fn a_static_student_of_linear_targets_starts_at_its_goal() {
    let folder = TempDir::new().unwrap();
    let data = texts(folder.path(), 60);
    let exact = StartOptions::default().ridge(0.0);
    let mut trainer = Trainer::distill(&gpu(), &fixed(), &options()).unwrap();
    let cosine = |trainer: &Trainer| trainer.evaluate(&data).unwrap().encoder.unwrap().cosine;
    assert!(cosine(&trainer) < 0.9);
    trainer.start(&table(), &data, &exact).unwrap();
    assert!(cosine(&trainer) > 0.99999, "{}", cosine(&trainer));
    // So does one with blocks that pass their input on; with others it does not.
    let blocks = fixed().dilations(vec![1, 2]).hidden(7).centred(true);
    let mut trainer = Trainer::distill(&gpu(), &blocks, &options()).unwrap();
    trainer.start(&table(), &data, &exact).unwrap();
    assert!(cosine(&trainer) > 0.99999, "{}", cosine(&trainer));
    trainer
        .start(&table(), &data, &exact.block_scale(1.0))
        .unwrap();
    assert_eq!(
        trainer.session().get("blocks.0.conv2.weight").unwrap(),
        [0.0; 7 * WIDTH]
    );
    let mut trainer = Trainer::distill(&gpu(), &blocks, &options()).unwrap();
    trainer
        .start(&table(), &data, &exact.block_scale(1.0))
        .unwrap();
    assert!(cosine(&trainer) < 0.9999, "{}", cosine(&trainer));
    // A student that is wider than the teacher, or narrower.
    for width in [4, 8] {
        let sizes = fixed().width(width);
        let mut trainer = Trainer::distill(&gpu(), &sizes, &options()).unwrap();
        trainer
            .start(&table(), &data, &StartOptions::default())
            .unwrap();
        assert!(cosine(&trainer) > 0.8, "{width} {}", cosine(&trainer));
    }
}

#[test]
fn a_start_that_does_not_fit_is_refused() {
    let folder = TempDir::new().unwrap();
    let data = texts(folder.path(), 10);
    let mut trainer = Trainer::distill(&gpu(), &fixed(), &options()).unwrap();
    let before = bits(&trainer);
    let mut fail = |table: &TeacherTable, options: StartOptions| {
        let error = trainer.start(table, &data, &options).unwrap_err();
        assert!(matches!(error, Error::Config { .. }), "{error}");
        assert!(bits(&trainer) == before, "{error}: the trainer has changed");
        error.to_string()
    };
    let default = StartOptions::default();
    let few = TeacherTable::new(2, vec![0.5; 8]).unwrap();
    assert!(fail(&few, default).contains("4 tokens"));
    assert!(fail(&table(), default.deviation(0.0)).contains("deviation"));
    assert!(fail(&table(), default.ridge(-1.0)).contains("ridge"));
    assert!(fail(&table(), default.block_scale(f32::NAN)).contains("block_scale"));
    assert!(fail(&table(), default.samples(0)).contains("samples"));
    let decoder = DecoderOptions::default()
        .vocabulary(VOCABULARY)
        .width(4)
        .hidden(4);
    let decoder = decoder.length(LENGTH).embedding(WIDTH).dilations(vec![1]);
    let mut trainer = Trainer::decode(&gpu(), &decoder, &options()).unwrap();
    let error = trainer.start(&table(), &data, &default).unwrap_err();
    assert!(error.to_string().contains("encoder"), "{error}");
}

/// A decoder sees no later tokens and keeps a past of two convolutions per block.
#[test]
fn a_decoder_shares_no_centred_or_gated_block() -> Result<()> {
    let decoder = DecoderOptions::default()
        .vocabulary(VOCABULARY)
        .length(LENGTH)
        .width(8)
        .hidden(12)
        .kernel(3)
        .dilations(vec![2])
        .embedding(WIDTH);
    let options = options().chunks(2);
    let joint = |encoder: EncoderOptions, options: &TrainerOptions| {
        Trainer::joint(&gpu(), &encoder, &decoder, options)
    };
    for (encoder, word) in [
        (rich().gated(false), "centred"),
        (rich().centred(false), "gated"),
        (rich().dilations(vec![]), "shared_last_block"),
    ] {
        let error = joint(encoder.clone(), &options).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
    // Without sharing, anything goes.
    joint(rich(), &options.shared_last_block(false))?;
    Ok(())
}

/// A folder of an older version has none of the new fields.
#[test]
fn a_model_without_the_new_fields_is_the_network_that_it_was() {
    let folder = TempDir::new().unwrap();
    let dir = folder.path().join("model");
    let old = EncoderOptions::default()
        .vocabulary(VOCABULARY)
        .length(LENGTH)
        .width(4)
        .hidden(4)
        .embedding(WIDTH);
    let trainer = Trainer::distill(&gpu(), &old, &options()).unwrap();
    let model = trainer.model().unwrap();
    model.save(&dir, WeightType::F32).unwrap();
    let path = dir.join("config.json");
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let encoder = config["encoder"].as_object_mut().unwrap();
    for field in ["centred", "gated", "pooling", "expansion", "word_dropout"] {
        assert!(encoder.remove(field).is_some(), "{field}");
    }
    std::fs::write(&path, config.to_string()).unwrap();
    assert_eq!(Model::load(&dir).unwrap(), model);
}
