//! Dropout: the same elements on every device, in every kernel and element type and in the gradient, others in every run.

mod common;

use common::{Case, baseline_gpu, compare, gpu, packed_gpu, tiled_gpu, tolerance};
use energyflow::graph::{Graph, Op, ValueId};
use energyflow::nn::{Draws, Dropout, Gelu, Mode, Tcn, TcnOptions};
use energyflow::reference::{Array, Interpreter};
use energyflow::runtime::{Host, Session};
use energyflow::text::{
    Batch, Batches, Dataset, EncoderOptions, Precision, Trainer, TrainerOptions,
};
use energyflow::types::{DType, Trans};
use energyflow::{Error, Gpu};

/// Places of zeros.
fn dropped(data: &[f32]) -> Vec<bool> {
    data.iter().map(|x| *x == 0.0).collect()
}

/// The zeros of the named outputs of one run, equal on all devices and on the reference.
fn same_elements_everywhere(case: &Case, names: &[&str]) -> Vec<Vec<bool>> {
    let mut all = Vec::new();
    for gpu in [gpu(), tiled_gpu(), baseline_gpu(), packed_gpu()] {
        let (outputs, expected) = case.run_on(&gpu);
        all.clear();
        for &name in names {
            let got = outputs.get(name).unwrap();
            let own = dropped(&got);
            let reference = dropped(&expected[name].to_f32());
            assert!(own == reference, "{name}\n{}", case.graph);
            assert!(outputs.padding_is_zero(name).unwrap());
            let text = || case.graph.to_string();
            compare(name, &got, &expected[name], tolerance(DType::F16), text);
            all.push(own);
        }
    }
    all
}

#[test]
fn every_device_drops_the_same_elements_of_odd_shapes() {
    let shapes: [&[usize]; 6] = [&[1], &[7], &[1, 1], &[3, 5], &[2, 3, 33], &[65, 31]];
    for dtype in [DType::F32, DType::F16] {
        for dims in shapes {
            let mut case = Case::new(1, dtype);
            let x = case.input_in(dims, 0.5, 1.0);
            let counter = case.input_of(&[1], DType::F32, vec![16_777_215.0]);
            let rates = [("little", 0.1), ("half", 0.5), ("nearly all", 0.99)];
            for (name, rate) in rates {
                let y = case.graph.dropout(x, rate, counter, 3).unwrap();
                case.output(name, y);
            }
            same_elements_everywhere(&case, &rates.map(|(name, _)| name));
        }
    }
}

/// Behind products, LayerNorm and gathers, and alone, in f32 and f16: the places are the same, so the draws are.
#[test]
fn every_kernel_drops_the_same_elements() {
    // Tiles straddled; a product whose K is split.
    for [rows, cols, depth] in [[33, 70, 19], [8, 12, 4096]] {
        let mut masks = Vec::new();
        for dtype in [DType::F32, DType::F16] {
            let mut case = Case::new(2, dtype);
            let a = case.input_in(&[rows, depth], 0.5, 1.0);
            let b = case.input_in(&[cols, depth], 0.01, 0.02);
            let x = case.input_in(&[rows, cols], 0.5, 1.0);
            let (gamma, beta) = (case.parameter(&[cols]), case.parameter(&[cols]));
            let table = case.input_in(&[9, cols], 0.5, 1.0);
            let ids = case.ids(rows, 9);
            let counter = case.input_of(&[1], DType::F32, vec![5.0]);
            let g = &mut case.graph;
            let product = g.matmul(a, b, Trans::NT).unwrap();
            let normed = g.layer_norm(x, gamma, beta, 1e-5).unwrap();
            let gathered = g.gather(table, ids, None).unwrap();
            let values = [
                ("product", product),
                ("norm", normed),
                ("gather", gathered),
                ("alone", x),
            ];
            for (name, value) in values {
                let (rate, stream) = (0.4, 77);
                let op = Op::Dropout { rate, stream };
                let y = case.graph.apply(op, &[value, counter]).unwrap()[0];
                case.output(name, y);
            }
            masks.extend(same_elements_everywhere(
                &case,
                &values.map(|(name, _)| name),
            ));
        }
        assert!(masks.iter().all(|mask| *mask == masks[0]));
    }
}

#[test]
fn dropout_joins_the_kernel_before_it() {
    let mut case = Case::new(3, DType::F32);
    let (a, b) = (case.input(&[40, 24]), case.input(&[36, 24]));
    let counter = case.input_of(&[1], DType::F32, vec![1.0]);
    let y = case.graph.matmul(a, b, Trans::NT).unwrap();
    let y = case.graph.dropout(y, 0.3, counter, 0).unwrap();
    case.output("y", y);
    assert_eq!(case.dispatches(), 1);
}

/// The gradient of Σ y is 1/(1 − rate) where y is not dropped.
#[test]
fn the_gradient_drops_what_the_forward_pass_dropped() {
    for dtype in [DType::F32, DType::F16] {
        let mut case = Case::new(4, dtype);
        let x = case.input_in(&[3, 13, 33], 0.5, 1.0);
        let counter = case.input_of(&[1], DType::F32, vec![9.0]);
        let y = case.graph.dropout(x, 0.5, counter, 8).unwrap();
        let loss = case.graph.sum_all(y).unwrap();
        let dx = case.graph.gradients(loss, &[x]).unwrap()[0];
        case.output("y", y);
        case.output("dx", dx);
        let masks = same_elements_everywhere(&case, &["y", "dx"]);
        assert!(masks[0] == masks[1]);
        let (outputs, _) = case.run_on(&gpu());
        let dx = outputs.get("dx").unwrap();
        assert!(dx.iter().all(|&d| d == 0.0 || d == 2.0));
    }
}

/// One more run of a graph with `streams` dropouts of ones.
struct Ones {
    graph: Graph,
    interpreter: Interpreter,
    streams: usize,
}

impl Ones {
    fn new(dims: &[usize], rate: f32, seed: u64, streams: usize) -> Self {
        let mut graph = Graph::new();
        let draws = Draws::new(&mut graph, seed).unwrap();
        let mode = Mode::train(Some(draws));
        let one = graph.constant(dims, 1.0).unwrap();
        for stream in 0..streams {
            let dropout = Dropout::new(rate).unwrap();
            let y = dropout.forward(&mut graph, one, mode).unwrap();
            graph.output(&stream.to_string(), y).unwrap();
        }
        Self {
            interpreter: Interpreter::new(&graph),
            graph,
            streams,
        }
    }

    fn run(&mut self) -> Vec<Vec<f32>> {
        let outputs = self.interpreter.run(&self.graph, &[]).unwrap();
        (0..self.streams)
            .map(|stream| outputs[&stream.to_string()].to_f32())
            .collect()
    }
}

/// Share of kept elements, and of pairs kept together: in neighbouring elements, rows, runs and streams.
#[test]
fn draws_are_frequent_as_asked_and_independent() {
    let [rows, cols] = [256, 100];
    let n = rows * cols;
    for rate in [0.01, 0.1, 0.5, 0.9] {
        let keep = 1.0 - f64::from(rate);
        let sigmas = |hits: usize, n: usize, p: f64| {
            (hits as f64 - n as f64 * p) / (n as f64 * p * (1.0 - p)).sqrt()
        };
        let mut ones = Ones::new(&[rows, cols], rate, 11, 2);
        let masks: Vec<Vec<bool>> = (0..3)
            .flat_map(|_| ones.run())
            .map(|y| y.iter().map(|x| *x != 0.0).collect())
            .collect();
        for mask in &masks {
            let kept = mask.iter().filter(|kept| **kept).count();
            let off = sigmas(kept, n, keep);
            assert!(off.abs() < 4.0, "rate {rate}: {kept} of {n} kept");
        }
        let correlation = |a: &[bool], b: &[bool]| {
            let centred = |x: &bool| f64::from(u8::from(*x)) - keep;
            let sum: f64 = a.iter().zip(b).map(|(a, b)| centred(a) * centred(b)).sum();
            sum / (keep * (1.0 - keep) * (a.len().min(b.len()) as f64).sqrt())
        };
        for lag in [1, 2, 3, 4, cols] {
            let off = correlation(&masks[0], &masks[0][lag..]);
            assert!(off.abs() < 4.0, "rate {rate}, {lag} apart: {off} sigma");
        }
        for (i, a) in masks.iter().enumerate() {
            for b in &masks[i + 1..] {
                let off = correlation(a, b);
                assert!(off.abs() < 4.0, "rate {rate}, runs or streams: {off} sigma");
            }
        }
    }
}

#[test]
fn the_seed_decides_and_the_counter_is_a_state() {
    let dims = [5, 40];
    let mut first = Ones::new(&dims, 0.5, 1, 2);
    let mut second = Ones::new(&dims, 0.5, 1, 2);
    let runs: Vec<_> = (0..3).map(|_| first.run()).collect();
    assert_eq!(runs[0], second.run());
    assert!(runs[0] != runs[1] && runs[1] != runs[2] && runs[0] != runs[2]);
    assert!(runs[0][0] != runs[0][1], "streams draw the same");
    assert!(Ones::new(&dims, 0.5, 2, 2).run() != runs[0]);
    // Resumed from the state; past the last number that f32 counts to, from the start again.
    let mut resumed = Ones::new(&dims, 0.5, 1, 2);
    resumed
        .interpreter
        .set(Draws::STATE, Array::filled(&[1], 2.0).unwrap());
    assert_eq!(resumed.run(), runs[2]);
    resumed
        .interpreter
        .set(Draws::STATE, Array::filled(&[1], 16_777_215.0).unwrap());
    resumed.run();
    assert_eq!(resumed.run(), runs[0]);

    let mut session = Session::new(&gpu(), 0);
    let executable = session.compile(&first.graph).unwrap();
    for expected in &runs {
        let got = executable.run(&[]).unwrap().wait().unwrap();
        for (stream, expected) in expected.iter().enumerate() {
            assert_eq!(&got.get(&stream.to_string()).unwrap(), expected);
        }
    }
    assert_eq!(session.get(Draws::STATE).unwrap(), [3.0]);
}

fn options(dropout: f32) -> TcnOptions {
    TcnOptions::new(6, 10, &[1, 2]).dropout(dropout)
}

#[test]
fn blocks_with_dropout_match_the_reference_and_finite_differences() {
    for dtype in [DType::F32, DType::F16] {
        let mut case = Case::new(5, dtype);
        let x = case.input(&[2, 7, 6]);
        let mask = case.mask(14);
        let counter = case.input_of(&[1], DType::F32, vec![3.0]);
        let (gamma, beta) = (case.parameter(&[6]), case.parameter(&[6]));
        let (w1, w2) = (case.parameter(&[10, 18]), case.parameter(&[6, 10]));
        let g = &mut case.graph;
        let cast = |g: &mut Graph, w: ValueId| g.cast(w, dtype).unwrap();
        let h = g.layer_norm(x, gamma, beta, 1e-5).unwrap();
        let h = g.im2col(h, 3, 2).unwrap();
        let w = cast(g, w1);
        let h = g.matmul(h, w, Trans::NT).unwrap();
        let h = Gelu::Tanh.forward(g, h).unwrap();
        let h = g.dropout(h, 0.3, counter, 1).unwrap();
        let w = cast(g, w2);
        let h = g.matmul(h, w, Trans::NT).unwrap();
        let h = g.dropout(h, 0.3, counter, 1).unwrap();
        let h = g.reshape(h, &[2, 7, 6]).unwrap();
        let y = g.add(h, x).unwrap();
        let y = g.mul_rows(y, mask).unwrap();
        let wrt = [x, gamma, beta, w1, w2];
        match dtype {
            DType::F32 => case.check_finite_differences(y, &wrt, 1e-7),
            _ => case.gradients(y, &wrt),
        }
        case.output("y", y);
        case.check(tolerance(dtype));
    }
}

#[test]
fn without_a_rate_or_outside_training_nothing_is_added() {
    let text = |dropout: f32, drawing: bool| {
        let mut graph = Graph::new();
        let draws = Draws::new(&mut graph, 0).unwrap();
        let mode = Mode::train(drawing.then_some(draws));
        let x = graph.input("x", &[2, 7, 6], DType::F32).unwrap();
        let tcn = Tcn::new(&mut graph, "blocks", &options(dropout)).unwrap();
        let y = tcn.forward_in(&mut graph, x, None, mode).unwrap();
        graph.output("y", y).unwrap();
        graph.to_string()
    };
    assert_eq!(text(0.0, true), text(0.0, false));
    assert_eq!(text(0.5, false), text(0.0, false));
    assert_eq!(text(0.5, true).matches("Dropout").count(), 4);
}

#[test]
fn rates_outside_their_range_and_foreign_counters_are_refused() {
    let mut graph = Graph::new();
    let x = graph.input("x", &[3, 4], DType::F32).unwrap();
    let count = graph.input("count", &[1], DType::F32).unwrap();
    for rate in [-0.1, 1.0, 1.5, f32::NAN, f32::INFINITY] {
        let result = graph.dropout(x, rate, count, 0);
        assert!(
            matches!(result, Err(Error::Shape { op: "dropout", .. })),
            "{rate}"
        );
        let result = Tcn::new(&mut Graph::new(), "blocks", &options(rate));
        assert!(
            matches!(
                result,
                Err(Error::Config {
                    field: "dropout",
                    ..
                })
            ),
            "{rate}"
        );
    }
    let result = graph.dropout(x, 0.5, x, 0);
    assert!(matches!(result, Err(Error::Shape { op: "dropout", .. })));
    Draws::new(&mut graph, 0).unwrap();
    assert!(matches!(Draws::new(&mut graph, 0), Err(Error::Graph(_))));
}

fn encoder(dropout: f32) -> EncoderOptions {
    EncoderOptions::default()
        .length(8)
        .width(12)
        .hidden(20)
        .kernel(3)
        .dilations(vec![1, 2])
        .embedding(384)
        .dropout(dropout)
}

fn distiller(gpu: &Gpu, dropout: f32, precision: Precision, seed: u64) -> Trainer {
    let options = TrainerOptions::default()
        .batch(6)
        .precision(precision)
        .seed(seed);
    Trainer::distill(gpu, &encoder(dropout), &options).unwrap()
}

fn batch() -> Batch {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/data/wordnet_train.safetensors"
    );
    let data = Dataset::open(path).unwrap().take(6);
    let mut batches = Batches::training(data, 6, 8, 1).unwrap();
    batches.start_epoch(0);
    batches.next_batch().unwrap().unwrap().clone()
}

#[test]
fn training_draws_anew_in_every_step_and_evaluation_not_at_all() {
    let batch = batch();
    for precision in [Precision::F32, Precision::Mixed] {
        let losses = |seed: u64| -> Vec<u32> {
            let distiller = distiller(&gpu(), 0.5, precision, seed);
            let steps = (0..3).map(|_| distiller.step(&batch, 0).unwrap().loss.to_bits());
            let losses = steps.collect();
            assert_eq!(distiller.session().get(Draws::STATE).unwrap(), [3.0]);
            losses
        };
        assert_eq!(losses(1), losses(1), "not reproducible");
        assert_ne!(losses(1), losses(2));
    }
    // Before any step both have the parameters of the seed.
    let texts = [[7, 8, 9], [3, 2, 1]];
    let with = distiller(&gpu(), 0.5, Precision::F32, 1)
        .embed(&texts)
        .unwrap();
    let without = distiller(&gpu(), 0.0, Precision::F32, 1)
        .embed(&texts)
        .unwrap();
    assert_eq!(with, without);
}

#[test]
fn older_descriptions_have_no_dropout() {
    let mut json = serde_json::to_value(encoder(0.25)).unwrap();
    let read: EncoderOptions = serde_json::from_value(json.clone()).unwrap();
    assert_eq!(read.dropout, 0.25);
    json.as_object_mut().unwrap().remove("dropout");
    let read: EncoderOptions = serde_json::from_value(json).unwrap();
    assert_eq!(read, encoder(0.0));
}

#[test]
fn hosts_may_give_the_counter_themselves() {
    let mut graph = Graph::new();
    let x = graph.constant(&[4, 8], 1.0).unwrap();
    let count = graph.input("count", &[1], DType::F32).unwrap();
    let y = graph.dropout(x, 0.5, count, 0).unwrap();
    graph.output("y", y).unwrap();
    let mut session = Session::new(&gpu(), 0);
    let executable = session.compile(&graph).unwrap();
    let run = |count: f32| {
        let pending = executable.run(&[("count", Host::F32(&[count]))]).unwrap();
        pending.wait().unwrap().get("y").unwrap()
    };
    assert_eq!(run(1.0), run(1.0));
    assert_ne!(run(1.0), run(2.0));
}
