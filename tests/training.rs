//! Whole training steps: against the reference, reproducible, able to learn, safe against gradients that are not finite.

mod common;

use common::network::array;
use common::{Tolerance, compare, gpu, tiled_gpu};
use energyflow::graph::{Graph, Source, ValueId};
use energyflow::reference::{Array, Interpreter, numeric_gradient};
use energyflow::runtime::{Host, Session};
use energyflow::text::{
    Batches, Dataset, Decoder, DecoderOptions, Encoder, EncoderOptions, Metrics, Precision,
    Trainer, TrainerOptions, TrainingMode,
};
use energyflow::train::{AdamW, LossScale, Schedule, StepOutputs};
use energyflow::types::DType;
use energyflow::{Error, Gpu};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const BATCH: usize = 3;

fn tiny() -> EncoderOptions {
    EncoderOptions::default()
        .vocabulary(17)
        .length(5)
        .width(6)
        .hidden(10)
        .kernel(3)
        .dilations(vec![1, 2])
        .embedding(7)
        .table_bound(1.0)
}

struct Tiny {
    graph: Graph,
    loss: ValueId,
    ids: Vec<u32>,
    mask: Vec<f32>,
    target: Vec<f32>,
}

/// Encoder and loss, without a step, and data for it.
fn tiny_graph(options: &EncoderOptions, dtype: DType) -> Tiny {
    let n = BATCH * options.length;
    let mut graph = Graph::new();
    let encoder = Encoder::new(&mut graph, options).unwrap();
    let ids = graph
        .index_input("ids", n, options.vocabulary as u32)
        .unwrap();
    let mask = graph.input("mask", &[n], DType::F32).unwrap();
    let target = graph
        .input("target", &[BATCH, options.embedding], DType::F32)
        .unwrap();
    let z = encoder.forward(&mut graph, ids, mask, dtype).unwrap();
    let kd = graph.kd_loss(z, target, 1.0, 0.5).unwrap();
    graph.output("loss", kd.loss).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let mut mask = vec![0.0; n];
    let mut ids = vec![0; n];
    for sample in 0..BATCH {
        for t in 0..options.length - sample {
            mask[sample * options.length + t] = 1.0;
            ids[sample * options.length + t] = rng.random_range(1..options.vocabulary as u32);
        }
    }
    let target = (0..BATCH * options.embedding)
        .map(|_| rng.random_range(-1.0..1.0))
        .collect();
    Tiny {
        graph,
        loss: kd.loss,
        ids,
        mask,
        target,
    }
}

impl Tiny {
    fn hosts(&self) -> [(&str, Host<'_>); 3] {
        [
            ("ids", Host::from(&self.ids)),
            ("mask", Host::from(&self.mask)),
            ("target", Host::from(&self.target)),
        ]
    }

    fn arrays(&self) -> [(&str, Array); 3] {
        let n = self.ids.len();
        [
            ("ids", Array::from_u32(&[n], &self.ids).unwrap()),
            ("mask", Array::from_f32(&[n], &self.mask).unwrap()),
            (
                "target",
                Array::from_f32(&[BATCH, self.target.len() / BATCH], &self.target).unwrap(),
            ),
        ]
    }

    fn parameters(&self) -> Vec<ValueId> {
        self.graph.parameters().map(|(id, _)| id).collect()
    }
}

/// The values of a session's parameters, in the shapes and order that the graph has them in.
fn interpreter(session: &Session, graph: &Graph) -> Interpreter {
    let mut interpreter = Interpreter::new(graph);
    for (_, value) in graph.parameters() {
        let host = session.get(&value.name).unwrap();
        interpreter.set(&value.name, array(&host, value.shape.dims(), value.taps));
    }
    interpreter
}

fn adamw() -> AdamW {
    AdamW::default()
        .schedule(Schedule::WarmupCosine {
            peak: 0.02,
            end: 0.001,
            warmup: 2,
            total: 5,
        })
        .clip(Some(0.5))
        .weight_decay(0.1)
        // Large, so that rounding of vanishing gradients does not decide the direction of a step.
        .eps(1e-3)
}

fn steps_match_the_reference(gpu: &Gpu) {
    let mut tiny = tiny_graph(&tiny(), DType::F32);
    let parameters = tiny.parameters();
    adamw()
        .step(&mut tiny.graph, tiny.loss, &parameters)
        .unwrap();
    let mut session = Session::new(gpu, 3);
    let step = session.compile(&tiny.graph).unwrap();
    let mut reference = interpreter(&session, &tiny.graph);
    let tolerance = Tolerance {
        normalised: 1e-5,
        relative: 1e-4,
    };
    for number in 1..=6 {
        step.poison().unwrap();
        let got = step.run(&tiny.hosts()).unwrap().wait().unwrap();
        let expected = reference.run(&tiny.graph, &tiny.arrays()).unwrap();
        for (name, array) in &expected {
            compare(name, &got.get(name).unwrap(), array, tolerance, || {
                format!("step {number}")
            });
        }
        for (_, value) in tiny.graph.values() {
            let expected = match value.source {
                Source::Parameter(_) | Source::State(_) => reference.get(&value.name).unwrap(),
                _ => continue,
            };
            let host = session.get(&value.name).unwrap();
            let got = array(&host, value.shape.dims(), value.taps).to_f32();
            compare(&value.name, &got, expected, tolerance, || {
                format!("after step {number}")
            });
        }
    }
}

#[test]
fn six_steps_match_the_reference() {
    steps_match_the_reference(&gpu());
}

#[test]
fn six_steps_match_the_reference_with_workgroup_tiles() {
    steps_match_the_reference(&tiled_gpu());
}

#[test]
fn encoder_gradients_match_finite_differences() {
    let mut tiny = tiny_graph(&tiny(), DType::F32);
    let parameters = tiny.parameters();
    let gradients = tiny.graph.gradients(tiny.loss, &parameters).unwrap();
    let session = {
        let mut session = Session::new(&gpu(), 3);
        session.compile(&tiny.graph).unwrap();
        session
    };
    let reference = interpreter(&session, &tiny.graph);
    let values = reference
        .clone()
        .run_values(&tiny.graph, &tiny.arrays())
        .unwrap();
    for (&parameter, gradient) in parameters.iter().zip(gradients) {
        let name = &tiny.graph.value(parameter).unwrap().name;
        let numeric = numeric_gradient(
            &reference,
            &tiny.graph,
            &tiny.arrays(),
            tiny.loss,
            parameter,
        )
        .unwrap();
        for (a, b) in values[&gradient].data().iter().zip(numeric.data()) {
            assert!((a - b).abs() < 1e-7 * (1.0 + b.abs()), "{name}: {a} {b}");
        }
    }
}

fn data() -> Dataset {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/data/wordnet_train.safetensors"
    );
    Dataset::open(path).unwrap()
}

fn small() -> EncoderOptions {
    EncoderOptions::default()
        .length(16)
        // At least as wide as there are samples, or the projection's rank bounds the cosine.
        .width(128)
        .hidden(64)
        .kernel(3)
        .dilations(vec![1, 2])
        .embedding(384)
        .table_bound(0.05)
}

fn distill(precision: Precision, seed: u64, steps: u32) -> TrainerOptions {
    TrainerOptions::default()
        .batch(50)
        .optimizer(
            AdamW::default()
                .schedule(Schedule::WarmupCosine {
                    peak: 1e-2,
                    end: 1e-4,
                    warmup: 10,
                    total: steps,
                })
                .clip(Some(1.0)),
        )
        .precision(precision)
        .seed(seed)
}

fn overfits(precision: Precision) {
    let samples = data().take(100);
    let epochs = 60;
    let options = distill(precision, 1, 2 * epochs);
    let distiller = Trainer::distill(&gpu(), &small(), &options).unwrap();
    let mut batches = Batches::training(samples.clone(), 50, 16, 1).unwrap();
    let before = distiller.evaluate(&samples).unwrap().encoder.unwrap();
    let mut last = None;
    for epoch in 0..epochs {
        batches.start_epoch(u64::from(epoch));
        distiller
            .epoch(&mut batches, |metrics| last = Some(*metrics))
            .unwrap();
    }
    let after = distiller.evaluate(&samples).unwrap().encoder.unwrap();
    assert!(before.cosine < 0.3, "{}", before.cosine);
    assert!(after.cosine >= 0.95, "cosine {}", after.cosine);
    assert!(after.mse < before.mse, "{} {}", after.mse, before.mse);
    assert!(after.precision_at_1 > 0.99, "{}", after.precision_at_1);
    assert_eq!(last.unwrap().skipped, 0.0);
}

#[test]
fn a_hundred_samples_are_learnt_by_heart() {
    overfits(Precision::F32);
}

#[test]
fn a_hundred_samples_are_learnt_by_heart_in_mixed_precision() {
    overfits(Precision::Mixed);
}

fn history(precision: Precision, seed: u64) -> (Vec<Metrics>, Vec<u32>) {
    let options = distill(precision, seed, 20);
    let distiller = Trainer::distill(&gpu(), &small(), &options).unwrap();
    let mut batches = Batches::training(data().take(200), 50, 16, seed).unwrap();
    let mut history = Vec::new();
    for epoch in 0..2 {
        batches.start_epoch(epoch);
        distiller
            .epoch(&mut batches, |metrics| history.push(*metrics))
            .unwrap();
    }
    let weights = distiller.weights().unwrap();
    let bits = weights
        .names()
        .flat_map(|name| weights.get(name).unwrap().1.iter().map(|x| x.to_bits()))
        .collect();
    (history, bits)
}

#[test]
fn the_same_seed_gives_the_same_bits() {
    for precision in [Precision::F32, Precision::Mixed] {
        let (first, second) = (history(precision, 4), history(precision, 4));
        assert_eq!(first.0.len(), 8);
        assert!(first == second, "{precision:?} is not reproducible");
        let other = history(precision, 5);
        assert!(first.1 != other.1, "the seed changes nothing");
    }
}

#[test]
fn the_learning_rate_follows_its_schedule() {
    let mut tiny = tiny_graph(&tiny(), DType::F32);
    let parameters = tiny.parameters();
    let (peak, end, warmup, total) = (3e-4, 1e-5, 4, 20);
    let schedule = Schedule::WarmupCosine {
        peak,
        end,
        warmup,
        total,
    };
    let optimizer = AdamW::default().schedule(schedule);
    optimizer
        .step(&mut tiny.graph, tiny.loss, &parameters)
        .unwrap();
    let mut session = Session::new(&gpu(), 0);
    let step = session.compile(&tiny.graph).unwrap();
    let rates: Vec<f32> = (0..total + 3)
        .map(|_| {
            let outputs = step.run(&tiny.hosts()).unwrap().wait().unwrap();
            outputs.scalar(StepOutputs::LEARNING_RATE).unwrap()
        })
        .collect();
    for (i, rate) in rates.iter().enumerate() {
        let expected = schedule.at(i as u32 + 1);
        assert!(
            (rate - expected).abs() <= 1e-7 * peak.max(1.0),
            "step {i}: {rate} {expected}"
        );
    }
    assert!(rates.windows(2).take(3).all(|pair| pair[0] < pair[1]));
    assert!(rates.windows(2).skip(3).all(|pair| pair[0] >= pair[1]));
    assert!((rates[total as usize - 1] - end).abs() < 1e-7);
    assert!((rates[total as usize + 2] - end).abs() < 1e-7);
}

#[test]
fn overflow_skips_the_step_whole_and_lowers_the_scale() {
    let mut tiny = tiny_graph(&tiny(), DType::F16);
    let parameters = tiny.parameters();
    let scale = LossScale::default()
        .start(16_777_216.0)
        .min(1.0)
        .max(65_536.0)
        .interval(4);
    let optimizer = AdamW::default()
        .loss_scale(Some(scale))
        .schedule(Schedule::Constant { rate: 1e-2 });
    optimizer
        .step(&mut tiny.graph, tiny.loss, &parameters)
        .unwrap();
    let mut session = Session::new(&gpu(), 2);
    let step = session.compile(&tiny.graph).unwrap();
    let names: Vec<String> = session
        .parameters()
        .map(|(name, _)| name.to_owned())
        .collect();
    let weights = |session: &Session| -> Vec<Vec<f32>> {
        names
            .iter()
            .map(|name| session.get(name).unwrap())
            .collect()
    };
    let mut before = weights(&session);
    let (mut expected, mut skipped, mut good) = (scale.start, 0.0, 0);
    let mut losses = Vec::new();
    for _ in 0..60 {
        let out = step.run(&tiny.hosts()).unwrap().wait().unwrap();
        assert_eq!(out.scalar(StepOutputs::LOSS_SCALE).unwrap(), expected);
        let after = weights(&session);
        if out.scalar(StepOutputs::GRADIENT_NORM).unwrap().is_finite() {
            assert!(after != before, "a good step changes the weights");
            good += 1;
            if good == scale.interval {
                expected = (2.0 * expected).min(scale.max);
                good = 0;
            }
        } else {
            assert!(after == before, "a skipped step changes nothing");
            skipped += 1.0;
            // Only the first scale may be above the largest.
            expected = (0.5 * expected).min(scale.max);
            good = 0;
        }
        assert_eq!(out.scalar(StepOutputs::SKIPPED).unwrap(), skipped);
        losses.push(out.scalar("loss").unwrap());
        before = after;
    }
    let done = session.get("train.step").unwrap()[0];
    assert!(skipped > 0.0, "2^24 must overflow f16");
    assert_eq!(done, 60.0 - skipped, "skipped steps do not count");
    assert!(losses[59] < 0.5 * losses[0], "{losses:?}");
}

#[test]
fn unusable_options_are_refused() {
    let mut tiny = tiny_graph(&tiny(), DType::F32);
    let parameters = tiny.parameters();
    let base = AdamW::default();
    let cosine = |warmup, total| Schedule::WarmupCosine {
        peak: 1.0,
        end: 0.0,
        warmup,
        total,
    };
    let bad = [
        base.clone().beta1(1.0),
        base.clone().beta2(-0.1),
        base.clone().eps(0.0),
        base.clone().weight_decay(f32::NAN),
        base.clone().clip(Some(0.0)),
        base.clone().schedule(cosine(5, 5)),
        base.clone().schedule(Schedule::Constant { rate: -1.0 }),
        base.clone()
            .loss_scale(Some(LossScale::default().interval(0))),
    ];
    for options in bad {
        let result = options.step(&mut tiny.graph, tiny.loss, &parameters);
        assert!(matches!(result, Err(Error::Config { .. })), "{options:?}");
    }
    let result = base.step(&mut tiny.graph, tiny.loss, &[]);
    assert!(matches!(result, Err(Error::Graph(_))));
    base.step(&mut tiny.graph, tiny.loss, &parameters).unwrap();
    let result = base.step(&mut tiny.graph, tiny.loss, &parameters);
    assert!(matches!(result, Err(Error::Graph(_))), "one step a graph");
    let no_dilation = small().dilations(vec![1, 0]);
    let result = Encoder::new(&mut Graph::new(), &no_dilation);
    assert!(matches!(result, Err(Error::Config { .. })));
    // Without blocks it is a static encoder. A decoder needs them.
    let no_blocks = small().dilations(vec![]);
    assert!(Encoder::new(&mut Graph::new(), &no_blocks).is_ok());
    let no_blocks = DecoderOptions::default().dilations(vec![]);
    let result = Decoder::new(&mut Graph::new(), &no_blocks);
    assert!(matches!(result, Err(Error::Config { .. })));
}

#[test]
fn a_training_step_stays_small() {
    let distiller = Trainer::distill(&gpu(), &small(), &distill(Precision::F32, 0, 20)).unwrap();
    let plan = distiller.training_step(TrainingMode::A).unwrap().plan();
    // Products with a long K take a second dispatch where they are split.
    let most = if gpu().capabilities().barrier_free {
        59
    } else {
        70
    };
    assert!(plan.dispatches <= most, "{plan}");
    assert!(plan.intermediates() >= plan.lower_bound);
    assert!(
        plan.intermediates() as f64 <= 1.15 * plan.lower_bound as f64,
        "{plan}"
    );
}
