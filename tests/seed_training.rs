//! The training tests that the system's specification names, at its sizes, each with five seeds.

mod common;

use std::sync::Arc;

use common::network::array;
use common::{Tolerance, compare, gpu};
use energyflow::graph::{CrossEntropy, Graph, KdLoss, Source, ValueId};
use energyflow::nn::{Linear, TcnBlock};
use energyflow::reference::{Array, Interpreter};
use energyflow::runtime::{Host, Outputs};
use energyflow::text::{
    Batches, Dataset, Decoder, DecoderOptions, Efb1Writer, Encoder, EncoderOptions, Trainer,
    TrainerOptions, next_tokens,
};
use energyflow::train::{AdamW, Schedule};
use energyflow::types::DType;
use energyflow::{Executable, Session};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const SEEDS: std::ops::Range<u64> = 0..5;

const LENGTH: usize = 8;
const WIDTH: usize = 32;

/// What encoder and decoder share.
const SHARED: &str = "blocks.1";

fn encoder(vocabulary: usize) -> EncoderOptions {
    EncoderOptions::default()
        .vocabulary(vocabulary)
        .length(LENGTH)
        .width(WIDTH)
        .hidden(64)
        .kernel(3)
        .dilations(vec![1, 2])
        .embedding(WIDTH)
}

fn decoder(vocabulary: usize) -> DecoderOptions {
    DecoderOptions::default()
        .vocabulary(vocabulary)
        .length(LENGTH)
        .width(WIDTH)
        .hidden(64)
        .kernel(3)
        .dilations(vec![1, 2])
        .embedding(WIDTH)
}

fn constant(rate: f32) -> AdamW {
    AdamW::default()
        .schedule(Schedule::Constant { rate })
        .clip(Some(1.0))
}

/// Random texts, the first full, the others shorter, and teacher's embeddings of length 1.
struct Texts {
    ids: Vec<u32>,
    mask: Vec<f32>,
    targets: Vec<u32>,
    z: Vec<f32>,
}

impl Texts {
    fn new(batch: usize, vocabulary: usize, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(100 + seed);
        let n = batch * LENGTH;
        let (mut ids, mut mask, mut targets) = (vec![0; n], vec![0.0; n], vec![0; n]);
        for row in 0..batch {
            for i in row * LENGTH..(row + 1) * LENGTH - row % 4 {
                ids[i] = rng.random_range(1..vocabulary as u32);
                mask[i] = 1.0;
            }
        }
        next_tokens(&ids, &mask, LENGTH, vocabulary as u32, &mut targets).unwrap();
        let mut z: Vec<f32> = (0..batch * WIDTH)
            .map(|_| rng.random_range(-1.0..1.0))
            .collect();
        for row in z.chunks_mut(WIDTH) {
            let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt();
            row.iter_mut().for_each(|x| *x /= norm);
        }
        Self {
            ids,
            mask,
            targets,
            z,
        }
    }

    /// As a dataset in a file.
    fn dataset(&self, path: &std::path::Path) -> Dataset {
        let mut writer = Efb1Writer::create(path, WIDTH).unwrap();
        let rows = self.ids.chunks(LENGTH).zip(self.mask.chunks(LENGTH));
        for ((ids, mask), z) in rows.zip(self.z.chunks(WIDTH)) {
            let n = mask.iter().filter(|&&x| x == 1.0).count();
            writer.push(&ids[..n], &vec![1; n], z).unwrap();
        }
        writer.finish().unwrap();
        Dataset::open(path).unwrap()
    }

    /// Those that the graph has.
    fn hosts(&self, graph: &Graph) -> Vec<(&'static str, Host<'_>)> {
        let all = [
            ("ids", Host::from(&self.ids)),
            ("mask", Host::from(&self.mask)),
            ("targets", Host::from(&self.targets)),
            ("z", Host::from(&self.z)),
        ];
        let all = all.into_iter();
        all.filter(|(name, _)| graph.find(name).is_some()).collect()
    }

    fn arrays(&self, graph: &Graph) -> Vec<(&'static str, Array)> {
        let (n, batch) = (self.ids.len(), self.z.len() / WIDTH);
        let all = [
            ("ids", Array::from_u32(&[n], &self.ids)),
            ("mask", Array::from_f32(&[n], &self.mask)),
            ("targets", Array::from_u32(&[n], &self.targets)),
            ("z", Array::from_f32(&[batch, WIDTH], &self.z)),
        ];
        let all = all.into_iter();
        all.filter(|(name, _)| graph.find(name).is_some())
            .map(|(name, array)| (name, array.unwrap()))
            .collect()
    }
}

/// Mode A: the encoder's distance to its teacher.
fn distillation(batch: usize, vocabulary: usize) -> (Graph, KdLoss) {
    let mut graph = Graph::new();
    let encoder = Encoder::new(&mut graph, &encoder(vocabulary)).unwrap();
    let n = batch * LENGTH;
    let ids = graph.index_input("ids", n, vocabulary as u32).unwrap();
    let mask = graph.input("mask", &[n], DType::F32).unwrap();
    let teacher = graph.input("z", &[batch, WIDTH], DType::F32).unwrap();
    let z = encoder.forward(&mut graph, ids, mask, DType::F32).unwrap();
    let kd = graph.kd_loss(z, teacher, 1.0, 1.0).unwrap();
    graph.output("loss", kd.loss).unwrap();
    graph.output("cosine", kd.cosine).unwrap();
    (graph, kd)
}

/// Mode B: the decoder's next tokens; its last block may be the encoder's.
fn decoding(batch: usize, vocabulary: usize, shared: bool) -> (Graph, CrossEntropy) {
    let mut graph = Graph::new();
    let options = decoder(vocabulary);
    let decoder = if shared {
        let last = TcnBlock::new(&mut graph, SHARED, &options.tcn(), 2).unwrap();
        Decoder::sharing(&mut graph, &options, last)
    } else {
        Decoder::new(&mut graph, &options)
    };
    let n = batch * LENGTH;
    let ids = graph.index_input("ids", n, vocabulary as u32).unwrap();
    let mask = graph.input("mask", &[n], DType::F32).unwrap();
    let targets = graph
        .index_input("targets", n, vocabulary as u32 + 1)
        .unwrap();
    let z = graph.input("z", &[batch, WIDTH], DType::F32).unwrap();
    let decoder = decoder.unwrap();
    let states = decoder
        .forward(&mut graph, ids, z, Some(mask), DType::F32)
        .unwrap();
    let ce = decoder.loss(&mut graph, states, targets, 0.0).unwrap();
    graph.output("loss", ce.loss).unwrap();
    (graph, ce)
}

/// The graph with a step that trains the parameters whose names pass.
fn trained(
    (mut graph, loss): (Graph, ValueId),
    optimizer: &AdamW,
    trains: impl Fn(&str) -> bool,
) -> Graph {
    let parameters: Vec<ValueId> = graph
        .parameters()
        .filter(|(_, value)| trains(&value.name))
        .map(|(id, _)| id)
        .collect();
    optimizer.step(&mut graph, loss, &parameters).unwrap();
    graph
}

/// A graph in a session with the data of a seed.
struct Work<'a> {
    graph: &'a Graph,
    executable: Arc<Executable>,
    texts: &'a Texts,
}

impl<'a> Work<'a> {
    fn new(session: &mut Session, graph: &'a Graph, texts: &'a Texts) -> Self {
        let executable = session.compile(graph).unwrap();
        Self {
            graph,
            executable,
            texts,
        }
    }

    fn run(&self) -> Outputs {
        let inputs = self.texts.hosts(self.graph);
        self.executable.run(&inputs).unwrap().wait().unwrap()
    }

    fn times(&self, n: usize) {
        for _ in 0..n {
            self.run();
        }
    }

    fn loss(&self) -> f32 {
        self.run().scalar("loss").unwrap()
    }

    fn cosine(&self) -> f32 {
        self.run().scalar("cosine").unwrap()
    }
}

/// Name and bits of every parameter that passes.
fn bits(session: &Session, wanted: impl Fn(&str) -> bool) -> Vec<(String, Vec<u32>)> {
    let names: Vec<String> = session.parameters().map(|(name, _)| name.into()).collect();
    let parameters = names.into_iter().filter(|name| wanted(name));
    let bits = parameters.map(|name| {
        let data = session.get(&name).unwrap();
        (name, data.into_iter().map(f32::to_bits).collect())
    });
    bits.collect()
}

fn of_the_decoder(name: &str) -> bool {
    name.starts_with("decoder.")
}

fn of_the_shared_block(name: &str) -> bool {
    name.starts_with(SHARED)
}

fn of_the_encoder(name: &str) -> bool {
    !of_the_decoder(name) && !of_the_shared_block(name)
}

#[test]
fn encoder_and_decoder_in_alternation() {
    let (batch, vocabulary) = (4, 100);
    let (evaluate_a, kd) = distillation(batch, vocabulary);
    let (evaluate_b, ce) = decoding(batch, vocabulary, true);
    let optimizer = constant(3e-3);
    let step_a = trained((evaluate_a.clone(), kd.loss), &optimizer, |_| true);
    let step_b = trained((evaluate_b.clone(), ce.loss), &optimizer, |_| true);
    for seed in SEEDS {
        let texts = Texts::new(batch, vocabulary, seed);
        let mut session = Session::new(&gpu(), seed);
        let step_a = Work::new(&mut session, &step_a, &texts);
        let step_b = Work::new(&mut session, &step_b, &texts);
        let evaluate_a = Work::new(&mut session, &evaluate_a, &texts);
        let evaluate_b = Work::new(&mut session, &evaluate_b, &texts);

        let (kd, cosine) = (evaluate_a.loss(), evaluate_a.cosine());
        let decoder = bits(&session, of_the_decoder);
        let shared = bits(&session, of_the_shared_block);
        step_a.times(5);
        assert!(evaluate_a.loss() < kd, "seed {seed}");
        assert!(evaluate_a.cosine() > cosine, "seed {seed}");
        assert!(bits(&session, of_the_decoder) == decoder);
        let after_a = bits(&session, of_the_shared_block);
        let pairs = || shared.iter().zip(&after_a);
        assert_eq!(pairs().count(), 6);
        assert!(pairs().all(|(before, after)| before != after));

        let ce = evaluate_b.loss();
        let encoder = bits(&session, of_the_encoder);
        step_b.times(5);
        assert!(evaluate_b.loss() < ce, "seed {seed}");
        assert!(bits(&session, of_the_encoder) == encoder);
        let after_b = bits(&session, of_the_shared_block);
        let mut pairs = after_a.iter().zip(&after_b);
        assert!(pairs.all(|(before, after)| before != after));

        // Four micro-batches a batch, half of them in either mode.
        for _ in 0..10 {
            step_a.times(2);
            step_b.times(2);
        }
        let (kd_end, ce_end) = (evaluate_a.loss(), evaluate_b.loss());
        assert!(kd_end < 0.5 * kd, "seed {seed}: {kd} {kd_end}");
        assert!(ce_end < 0.5 * ce, "seed {seed}: {ce} {ce_end}");
        assert_eq!(session.get("train.step").unwrap(), [50.0]);
    }
}

/// The shared block has one set of moments: steps in turn are those of the reference, which keeps moments by name.
#[test]
fn alternation_matches_the_reference() {
    let (batch, vocabulary) = (4, 100);
    let optimizer = constant(1e-2)
        // Large, so that rounding of vanishing gradients does not decide the direction of a step.
        .eps(1e-3);
    let (a, kd) = distillation(batch, vocabulary);
    let (b, ce) = decoding(batch, vocabulary, true);
    let a = trained((a, kd.loss), &optimizer, |_| true);
    let b = trained((b, ce.loss), &optimizer, |_| true);
    let texts = Texts::new(batch, vocabulary, 9);
    let mut session = Session::new(&gpu(), 9);
    let on_gpu = [
        Work::new(&mut session, &a, &texts),
        Work::new(&mut session, &b, &texts),
    ];
    let mut reference = Interpreter::default();
    for (_, value) in a.values().chain(b.values()) {
        if matches!(value.source, Source::Parameter(_) | Source::State(_)) {
            let host = session.get(&value.name).unwrap();
            reference.set(&value.name, array(&host, value.shape.dims(), value.taps));
        }
    }
    let tolerance = Tolerance {
        normalised: 1e-5,
        relative: 2e-4,
    };
    for (number, mode) in [0, 0, 1, 1, 0, 1].into_iter().enumerate() {
        let graph = [&a, &b][mode];
        let loss = f64::from(on_gpu[mode].loss());
        let expected = reference.run(graph, &texts.arrays(graph)).unwrap();
        let expected = expected["loss"].data()[0];
        assert!(
            (loss - expected).abs() < 1e-5 * expected,
            "step {number}: {loss} {expected}"
        );
    }
    for (_, value) in a.parameters().chain(b.parameters()) {
        let host = session.get(&value.name).unwrap();
        let got = array(&host, value.shape.dims(), value.taps).to_f32();
        let expected = reference.get(&value.name).unwrap();
        compare(&value.name, &got, expected, tolerance, String::new);
    }
}

/// A decoder at a large rate, with its last block trained or not.
#[test]
fn steps_of_a_decoder() {
    const LAST: &str = "decoder.blocks.1.";
    let (batch, vocabulary) = (6, 80);
    let (evaluate, ce) = decoding(batch, vocabulary, false);
    let step = |frozen: bool| {
        let trains = |name: &str| !(frozen && name.starts_with(LAST));
        trained((evaluate.clone(), ce.loss), &constant(5e-2), trains)
    };
    for (frozen, step) in [(false, step(false)), (true, step(true))] {
        for seed in SEEDS {
            let texts = Texts::new(batch, vocabulary, seed);
            let mut session = Session::new(&gpu(), seed);
            let step = Work::new(&mut session, &step, &texts);
            let evaluate = Work::new(&mut session, &evaluate, &texts);
            let last = || bits(&session, |name| name.starts_with(LAST));
            let others = || bits(&session, |name| !name.starts_with(LAST));
            let (ce, last_before, others_before) = (evaluate.loss(), last(), others());
            // At this rate later steps go up and down.
            for number in 1..=2 {
                step.run();
                let after = evaluate.loss();
                assert!(
                    after < ce,
                    "frozen {frozen}, seed {seed}, step {number}: {ce} {after}"
                );
            }
            let (last, others) = (last(), others());
            assert_eq!(last.len(), 6);
            let changed = |(before, after): (&(String, Vec<u32>), _)| before != after;
            assert!(
                last_before
                    .iter()
                    .zip(&last)
                    .all(|pair| changed(pair) != frozen)
            );
            assert!(others_before.iter().zip(&others).all(changed));
        }
    }
}

/// Only the last block trains, so the gradient goes through projection and mean into it.
#[test]
fn the_last_block_alone() {
    let (batch, vocabulary) = (4, 100);
    let (evaluate, kd) = distillation(batch, vocabulary);
    let step = trained((evaluate.clone(), kd.loss), &constant(1e-3), |name| {
        of_the_shared_block(name)
    });
    for seed in SEEDS {
        let texts = Texts::new(batch, vocabulary, seed);
        let mut session = Session::new(&gpu(), seed);
        let step = Work::new(&mut session, &step, &texts);
        let evaluate = Work::new(&mut session, &evaluate, &texts);
        let others = bits(&session, |name| !of_the_shared_block(name));
        let before = evaluate.loss();
        step.times(10);
        let after = evaluate.loss();
        assert!(after < before, "seed {seed}: {before} {after}");
        assert!(bits(&session, |name| !of_the_shared_block(name)) == others);
    }
}

#[test]
fn a_linear_layer() {
    let (rows, inputs, outputs) = (32, 32, 5);
    let mut evaluate = Graph::new();
    let x = evaluate.input("x", &[rows, inputs], DType::F32).unwrap();
    let y = evaluate.input("y", &[rows, outputs], DType::F32).unwrap();
    let layer = Linear::new(&mut evaluate, "layer", inputs, outputs, true).unwrap();
    let z = layer.forward(&mut evaluate, x).unwrap();
    // The squared error alone.
    let loss = evaluate.kd_loss(z, y, 0.0, 1.0).unwrap().loss;
    evaluate.output("loss", loss).unwrap();
    let step = trained((evaluate.clone(), loss), &constant(1e-2), |_| true);
    for seed in SEEDS {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut uniform =
            |n: usize| -> Vec<f32> { (0..n).map(|_| rng.random_range(-1.0..1.0)).collect() };
        let (x, y) = (uniform(rows * inputs), uniform(rows * outputs));
        let data = [("x", Host::from(&x)), ("y", Host::from(&y))];
        let mut session = Session::new(&gpu(), seed);
        let step = session.compile(&step).unwrap();
        let evaluate = session.compile(&evaluate).unwrap();
        let loss = || {
            let outputs = evaluate.run(&data).unwrap().wait().unwrap();
            outputs.scalar("loss").unwrap()
        };
        let mut before = loss();
        for _ in 0..5 {
            for _ in 0..4 {
                step.run(&data).unwrap().wait().unwrap();
            }
            let after = loss();
            assert!(after < before, "seed {seed}: {before} {after}");
            before = after;
        }
    }
}

#[test]
fn small_epochs() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/data/wordnet_train.safetensors"
    );
    let samples = Dataset::open(path).unwrap().take(36);
    let options = encoder(EncoderOptions::default().vocabulary).embedding(samples.width());
    for seed in SEEDS {
        let distill = TrainerOptions::default()
            .batch(12)
            .optimizer(constant(5e-3))
            .seed(seed);
        let distiller = Trainer::distill(&gpu(), &options, &distill).unwrap();
        let mut batches = Batches::training(samples.clone(), 12, LENGTH, seed).unwrap();
        let mut losses = Vec::new();
        for epoch in 0..3 {
            batches.start_epoch(epoch);
            let mut sum = 0.0;
            distiller.epoch(&mut batches, |m| sum += m.loss).unwrap();
            losses.push(sum / 3.0);
        }
        assert!(losses.is_sorted_by(|a, b| a > b), "seed {seed}: {losses:?}");
    }
}

/// The same two tests by the trainer: batches of four micro-batches of four texts in alternation, and a decoder at a large rate. Losses are
/// evaluated again after the steps.
#[test]
fn the_trainer_in_alternation() {
    let folder = tempfile::tempdir().unwrap();
    let (batch, vocabulary) = (16, 100);
    for seed in SEEDS {
        let texts = Texts::new(batch, vocabulary, seed);
        let data = texts.dataset(&folder.path().join(format!("{seed}.efb")));
        let options = TrainerOptions::default()
            .batch(batch)
            .chunks(4)
            .seed(seed)
            .optimizer(constant(3e-3));
        let (encoder, decoder) = (encoder(vocabulary), decoder(vocabulary));
        let trainer = Trainer::joint(&gpu(), &encoder, &decoder, &options).unwrap();
        let mut batches = Batches::training(data.clone(), batch, LENGTH, seed).unwrap();
        let mut before = trainer.evaluate(&data).unwrap();
        for epoch in [0, 10, 20] {
            for epoch in epoch..epoch + 10 {
                batches.start_epoch(epoch);
                trainer.epoch(&mut batches, |_| ()).unwrap();
            }
            let after = trainer.evaluate(&data).unwrap();
            let pair = |name: &str| (before.get(name).unwrap(), after.get(name).unwrap());
            for (name, rises) in [("cosine", true), ("mse", false), ("cross_entropy", false)] {
                let (before, after) = pair(name);
                assert_eq!(
                    after > before,
                    rises,
                    "seed {seed}, {name}: {before} {after}"
                );
            }
            before = after;
        }
        assert_eq!(trainer.session().get("train.a.step").unwrap(), [60.0]);
        assert_eq!(trainer.session().get("train.b.step").unwrap(), [60.0]);
    }
}

#[test]
fn steps_of_a_decoder_by_the_trainer() {
    let folder = tempfile::tempdir().unwrap();
    let (batch, vocabulary) = (6, 80);
    for freeze in [vec![], vec!["decoder.blocks.1".to_owned()]] {
        for seed in SEEDS {
            let texts = Texts::new(batch, vocabulary, seed);
            let data = texts.dataset(&folder.path().join(format!("{seed}.efb")));
            let options = TrainerOptions::default()
                .batch(batch)
                .seed(seed)
                .freeze(freeze.clone())
                .optimizer(constant(5e-2));
            let trainer = Trainer::decode(&gpu(), &decoder(vocabulary), &options).unwrap();
            let ce = || {
                trainer
                    .evaluate(&data)
                    .unwrap()
                    .get("cross_entropy")
                    .unwrap()
            };
            let before = ce();
            let mut batches = Batches::training(data.clone(), batch, LENGTH, seed).unwrap();
            trainer.epoch(&mut batches, |_| ()).unwrap();
            let after = ce();
            assert!(after < before, "{freeze:?}, seed {seed}: {before} {after}");
        }
    }
}
