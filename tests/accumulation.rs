//! Gradients accumulated over micro-batches: against the reference, against one large batch, skipped whole.

mod common;

use common::toy::{self, ACTIVATIONS, Data, Toy, bits};
use common::{Tolerance, compare, gpu, tiled_gpu};
use energyflow::graph::{Graph, Init, Op, Source};
use energyflow::runtime::Host;
use energyflow::text::{
    Batches, Dataset, EncoderOptions, Metrics, Precision, Trainer, TrainerOptions,
};
use energyflow::train::{AdamW, LossScale, Schedule, StepOutputs};
use energyflow::types::{DType, Rates};
use energyflow::{Error, Gpu, Session};

const ROWS: usize = 7;
/// Targets that count in each micro-batch.
const COUNTED: [usize; 4] = [7, 1, 4, 5];

fn optimizer(loss_scale: bool) -> AdamW {
    AdamW::default()
        .schedule(Schedule::Constant { rate: 0.02 })
        .clip(Some(0.5))
        .weight_decay(0.1)
        // Large, so that rounding of vanishing gradients does not decide the direction of a step.
        .eps(1e-3)
        .loss_scale(loss_scale.then(LossScale::default))
}

fn parts(toy: &Toy, step: u64) -> Vec<Data> {
    let counted = COUNTED.iter().enumerate();
    counted
        .map(|(i, &counted)| toy.data(10 * step + i as u64, counted))
        .collect()
}

fn matches_the_reference(gpu: &Gpu) {
    let optimizer = optimizer(true);
    let accumulation = Toy::accumulation(ROWS, DType::F32, &optimizer);
    let update = toy::update(&optimizer);
    let mut session = Session::new(gpu, 3);
    let accumulate = session.compile(&accumulation.graph).unwrap();
    let step = session.compile(&update).unwrap();
    let mut reference = toy::interpreter(&session, &accumulation.graph);
    for (_, value) in update.values() {
        if let Source::State(start) = value.source {
            let start = f64::from(start);
            let array = energyflow::reference::Array::new(value.shape.dims(), vec![start]);
            reference.set(&value.name, array.unwrap());
        }
    }
    let tolerance = Tolerance {
        normalised: 1e-5,
        relative: 1e-4,
    };
    for number in 0..3 {
        for part in parts(&accumulation, number) {
            accumulate.poison().unwrap();
            part.run(&accumulate);
            reference.run(&accumulation.graph, &part.arrays()).unwrap();
        }
        step.poison().unwrap();
        let got = step.run(&[]).unwrap().wait().unwrap();
        let expected = reference.run(&update, &[]).unwrap();
        for (name, array) in &expected {
            compare(name, &got.get(name).unwrap(), array, tolerance, || {
                format!("step {number}")
            });
        }
        for graph in [&accumulation.graph, &update] {
            for (_, value) in graph.values() {
                if matches!(value.source, Source::Parameter(_) | Source::State(_)) {
                    let got = session.get(&value.name).unwrap();
                    let expected = reference.get(&value.name).unwrap();
                    compare(&value.name, &got, expected, tolerance, || {
                        format!("after step {number}")
                    });
                }
            }
        }
    }
}

#[test]
fn steps_match_the_reference() {
    matches_the_reference(&gpu());
}

#[test]
fn steps_match_the_reference_with_workgroup_tiles() {
    matches_the_reference(&tiled_gpu());
}

/// Whether `got` is `expected` up to `bound` of the largest element.
fn close(name: &str, got: &[f32], expected: &[f32], bound: f32) {
    let largest = expected.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
    for (i, (a, b)) in got.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= bound * largest, "{name} {i}: {a} {b}");
    }
}

#[test]
fn four_micro_batches_are_one_batch() {
    for (dtype, bound) in [(DType::F32, 2e-5), (DType::F16, 5e-3)] {
        let optimizer = optimizer(dtype == DType::F16);
        let large = Toy::step(4 * ROWS, dtype, &optimizer);
        let small = Toy::accumulation(ROWS, dtype, &optimizer);
        let (mut one, mut four) = (Session::new(&gpu(), 1), Session::new(&gpu(), 1));
        let step = one.compile(&large.graph).unwrap();
        let accumulate = four.compile(&small.graph).unwrap();
        let update = four.compile(&toy::update(&optimizer)).unwrap();
        for number in 0..4 {
            let parts = parts(&small, number);
            let expected = Data::concat(&parts).run(&step);
            for part in &parts {
                part.run(&accumulate);
            }
            let got = update.run(&[]).unwrap().wait().unwrap();
            for (name, other) in [
                (StepOutputs::METRICS, "loss"),
                (StepOutputs::GRADIENT_NORM, StepOutputs::GRADIENT_NORM),
                (StepOutputs::LOSS_SCALE, StepOutputs::LOSS_SCALE),
                (StepOutputs::SKIPPED, StepOutputs::SKIPPED),
            ] {
                let expected = expected.get(other).unwrap();
                close(name, &got.get(name).unwrap(), &expected, bound);
            }
        }
        for (name, _) in one.parameters() {
            let (got, expected) = (four.get(name).unwrap(), one.get(name).unwrap());
            close(name, &got, &expected, bound);
            let moments = four.moments(name).unwrap().unwrap();
            for (got, expected) in moments.iter().zip(one.moments(name).unwrap().unwrap()) {
                close(name, got, &expected, 4.0 * bound);
            }
        }
    }
}

/// A micro-batch whose gradients are not finite spoils its step and nothing else.
#[test]
fn a_bad_micro_batch_skips_the_whole_step() {
    for (dtype, bad) in [(DType::F32, f32::NAN), (DType::F16, f32::INFINITY)] {
        let optimizer = optimizer(true);
        let accumulation = Toy::accumulation(ROWS, dtype, &optimizer);
        let names: Vec<String> = accumulation
            .injections
            .iter()
            .map(|(n, _)| n.clone())
            .collect();
        let update_graph = toy::update(&optimizer);
        let run = |skip: bool| {
            let mut session = Session::new(&gpu(), 1);
            let accumulate = session.compile(&accumulation.graph).unwrap();
            let update = session.compile(&update_graph).unwrap();
            let step = |number, bad: Option<(usize, &str, f32)>| {
                for (i, mut part) in parts(&accumulation, number).into_iter().enumerate() {
                    if let Some((at, name, x)) = bad
                        && at == i
                    {
                        part.inject(name, x);
                    }
                    part.run(&accumulate);
                }
                update.run(&[]).unwrap().wait().unwrap()
            };
            step(0, None);
            for (i, name) in names.iter().enumerate() {
                let scale = session.get("train.loss_scale").unwrap()[0];
                let before = bits(&session);
                if skip {
                    let out = step(1, Some((i % 4, name, bad)));
                    assert!(!out.scalar(StepOutputs::GRADIENT_NORM).unwrap().is_finite());
                    assert_eq!(out.scalar(StepOutputs::LOSS_SCALE).unwrap(), scale);
                    assert!(bits(&session) == before, "{dtype} {name}");
                    let after = session.get("train.loss_scale").unwrap()[0];
                    assert_eq!(after, 0.5 * scale, "{dtype} {name}");
                    assert_eq!(session.get("train.accumulated_weight").unwrap(), [0.0]);
                    assert_eq!(session.get("train.accumulated_metrics").unwrap(), [0.0]);
                    session.set("train.loss_scale", &[scale]).unwrap();
                }
            }
            let out = step(2, None);
            assert!(out.scalar(StepOutputs::GRADIENT_NORM).unwrap().is_finite());
            bits(&session)
        };
        assert!(
            run(true) == run(false),
            "{dtype}: something was left behind"
        );
    }
}

/// Only the update moves the scale; without anything accumulated it is a step with a gradient of zero.
#[test]
fn counters_move_in_the_update_alone() {
    let optimizer = optimizer(true).loss_scale(Some(LossScale::default().interval(1)));
    let accumulation = Toy::accumulation(ROWS, DType::F16, &optimizer);
    let mut session = Session::new(&gpu(), 1);
    let accumulate = session.compile(&accumulation.graph).unwrap();
    let update = session.compile(&toy::update(&optimizer)).unwrap();
    let mut weight = 0.0;
    for (part, counted) in parts(&accumulation, 0).iter().zip(COUNTED) {
        part.run(&accumulate);
        weight += counted as f32;
        assert_eq!(session.get("train.accumulated_weight").unwrap(), [weight]);
        assert_eq!(session.get("train.loss_scale").unwrap(), [1024.0]);
        assert_eq!(session.get("train.step").unwrap(), [0.0]);
    }
    update.run(&[]).unwrap().wait().unwrap();
    assert_eq!(session.get("train.loss_scale").unwrap(), [2048.0]);
    assert_eq!(session.get("train.step").unwrap(), [1.0]);
    let out = update.run(&[]).unwrap().wait().unwrap();
    assert_eq!(out.scalar(StepOutputs::GRADIENT_NORM).unwrap(), 0.0);
}

/// The gradients of a network are added up by one dispatch; norm, update and clearing take four.
#[test]
fn a_whole_network_takes_a_handful_of_dispatches() {
    let mut toy = Toy::new(ROWS, DType::F32);
    let parameters = toy::parameters(&toy.graph);
    let mut plain = toy.graph.clone();
    for gradient in plain.gradients(toy.loss, &parameters).unwrap() {
        let name = format!("gradient {gradient:?}");
        plain.output(&name, gradient).unwrap();
    }
    let gradients = toy.graph.gradients(toy.loss, &parameters).unwrap();
    let weight = toy.graph.constant(&[1], 2.0).unwrap();
    let params = parameters.clone();
    let operands = [gradients, vec![weight]].concat();
    toy.graph
        .apply(Op::Accumulate { params }, &operands)
        .unwrap();
    let mut update = Graph::new();
    let params: Vec<_> = parameters
        .iter()
        .map(|&id| {
            let value = toy.graph.value(id).unwrap();
            let dims = value.shape.dims();
            update
                .parameter(&value.name, dims, Init::Constant(0.0))
                .unwrap()
        })
        .collect();
    let hyper = update.input("hyper", &[3], DType::F32).unwrap();
    let taken = Op::TakeAccumulated {
        params: params.clone(),
    };
    let taken = update.apply(taken, &[]).unwrap();
    let norm = update.global_norm(&taken).unwrap();
    update.output("norm", norm).unwrap();
    let adamw = Op::AdamW {
        rates: vec![Rates::decay(0.0); params.len()],
        params,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
    };
    update.apply(adamw, &[taken, vec![hyper]].concat()).unwrap();
    let mut session = Session::new(&gpu(), 0);
    let mut dispatches = |graph: &Graph| session.compile(graph).unwrap().plan().dispatches;
    assert_eq!(dispatches(&toy.graph), dispatches(&plain) + 1);
    assert_eq!(dispatches(&update), 5);
}

/// A gradient that something else reads, one for two parameters, a parameter that the loss does not depend on.
#[test]
fn gradients_outside_the_arena() {
    let mut graph = Graph::new();
    let parameter =
        |graph: &mut Graph, name| graph.parameter(name, &[3, 5], Init::Constant(0.5)).unwrap();
    let [a, b, c, unused] = ["a", "b", "c", "unused"].map(|name| parameter(&mut graph, name));
    let x = graph.input("x", &[3, 5], DType::F32).unwrap();
    let weight = graph.input("weight", &[1], DType::F32).unwrap();
    let sum = graph.add(a, b).unwrap();
    let sum = graph.add(sum, c).unwrap();
    let product = graph.mul(sum, x).unwrap();
    let loss = graph.sum_all(product).unwrap();
    let all = [a, b, c, unused];
    let gradients = graph.gradients(loss, &all).unwrap();
    graph.output("gradient", gradients[2]).unwrap();
    let operands = [gradients, vec![weight]].concat();
    let params = all.to_vec();
    graph.apply(Op::Accumulate { params }, &operands).unwrap();
    let mut taking = Graph::new();
    let all = ["a", "b", "c", "unused"].map(|name| parameter(&mut taking, name));
    let params = all.to_vec();
    let taken = taking.apply(Op::TakeAccumulated { params }, &[]).unwrap();
    for (name, &value) in ["a", "b", "c", "unused"].iter().zip(&taken) {
        let copy = taking.affine(value, 1.0, 0.0).unwrap();
        taking.output(name, copy).unwrap();
    }
    let mut session = Session::new(&gpu(), 0);
    let accumulate = session.compile(&graph).unwrap();
    let take = session.compile(&taking).unwrap();
    let data: Vec<f32> = (0..15).map(|i| i as f32).collect();
    for _ in 0..2 {
        for weight in [1.0, 3.0] {
            let weight = vec![weight];
            let inputs = [("x", Host::from(&data)), ("weight", Host::from(&weight))];
            accumulate.run(&inputs).unwrap().wait().unwrap();
        }
        let out = take.run(&[]).unwrap().wait().unwrap();
        let expected: Vec<f32> = data.iter().map(|x| 4.0 * x).collect();
        for name in ["a", "b", "c"] {
            assert_eq!(out.get(name).unwrap(), expected);
        }
        assert_eq!(out.get("unused").unwrap(), [0.0; 15]);
    }
}

#[test]
fn misuse_gives_errors() {
    let optimizer = optimizer(true);
    let mut toy = Toy::accumulation(ROWS, DType::F32, &optimizer);
    let parameters = toy::parameters(&toy.graph);
    let params = parameters.clone();
    let error = toy
        .graph
        .apply(Op::TakeAccumulated { params }, &[])
        .unwrap_err();
    assert!(
        error.to_string().contains("twice in the same graph"),
        "{error}"
    );
    let mut toy = Toy::new(ROWS, DType::F32);
    let loss = toy.loss;
    let parameters = toy::parameters(&toy.graph);
    let result = optimizer.accumulate(&mut toy.graph, loss, parameters[0], &parameters, &[]);
    assert!(
        matches!(
            result,
            Err(Error::Shape {
                op: "accumulate",
                ..
            })
        ),
        "{result:?}"
    );
    let mut graph = Graph::new();
    let p = graph.parameter("p", &[3], Init::Constant(0.0)).unwrap();
    let params = vec![p];
    let taken = graph.apply(Op::TakeAccumulated { params }, &[]).unwrap();
    graph.output("taken", taken[0]).unwrap();
    let error = Session::new(&gpu(), 0).compile(&graph).unwrap_err();
    assert!(error.to_string().contains("taken"), "{error}");
    let result = optimizer.update(&[&Graph::new()]);
    assert!(matches!(result, Err(Error::Graph(_))));
}

fn small() -> EncoderOptions {
    EncoderOptions::default()
        .length(8)
        .width(12)
        .hidden(8)
        .kernel(3)
        .dilations(vec![1])
        .embedding(384)
}

fn distill(micro_batches: usize, precision: Precision) -> TrainerOptions {
    TrainerOptions::default()
        .batch(12)
        .micro_batches(micro_batches)
        .optimizer(optimizer(false))
        .precision(precision)
}

#[test]
fn a_distiller_splits_its_batches() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/data/wordnet_train.safetensors"
    );
    let data = Dataset::open(path).unwrap().take(24);
    for (precision, bound) in [(Precision::F32, 2e-5), (Precision::Mixed, 1e-2)] {
        let run = |micro: usize, spoilt: bool| -> (Vec<Metrics>, Vec<Vec<f32>>) {
            let distiller = Trainer::distill(&gpu(), &small(), &distill(micro, precision)).unwrap();
            let mut batches = Batches::training(data.clone(), 12, 8, 1).unwrap();
            let mut history = Vec::new();
            for epoch in 0..2 {
                batches.start_epoch(epoch);
                if spoilt {
                    let mut batch = batches.next_batch().unwrap().unwrap().clone();
                    // The last micro-batch is refused: the others must be forgotten.
                    *batch.ids.last_mut().unwrap() = u32::MAX;
                    assert!(matches!(distiller.step(&batch, 0), Err(Error::Data { .. })));
                    batches.start_epoch(epoch);
                }
                distiller
                    .epoch(&mut batches, |metrics| history.push(*metrics))
                    .unwrap();
            }
            let weights = distiller.weights().unwrap();
            let names = weights.names();
            (
                history,
                names
                    .map(|name| weights.get(name).unwrap().1.to_vec())
                    .collect(),
            )
        };
        let one = run(1, false);
        let four = run(4, false);
        assert_eq!(one.0.len(), 4);
        for (a, b) in four.0.iter().zip(&one.0) {
            let numbers = |m: &Metrics| [m.loss, m.cosine, m.mse, m.gradient_norm, m.learning_rate];
            close("metrics", &numbers(a), &numbers(b), bound);
        }
        for (a, b) in four.1.iter().zip(&one.1) {
            close("weights", a, b, bound);
        }
        assert!(
            run(4, true) == four,
            "a refused batch leaves nothing behind"
        );
    }
    for micro in [0, 5, 24] {
        let result = Trainer::distill(&gpu(), &small(), &distill(micro, Precision::F32));
        let field = "micro_batches";
        assert!(matches!(result, Err(Error::Config { field: f, .. }) if f == field));
    }
}

#[test]
fn injections_reach_the_gradients() {
    let optimizer = optimizer(false);
    let toy = Toy::step(ROWS, DType::F32, &optimizer);
    let mut session = Session::new(&gpu(), 1);
    let step = session.compile(&toy.graph).unwrap();
    let mut data = toy.data(0, ROWS);
    data.inject(ACTIVATIONS, f32::INFINITY);
    let out = data.run(&step);
    assert!(!out.scalar(StepOutputs::GRADIENT_NORM).unwrap().is_finite());
}
