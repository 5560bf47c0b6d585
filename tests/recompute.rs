//! Gradient checkpointing: the same gradients, less memory.

mod common;

use common::{Case, gpu, tiled_gpu, tolerance};
use energyflow::graph::{Graph, ValueId};
use energyflow::nn::{Draws, Mode};
use energyflow::runtime::{Host, Plan, Session};
use energyflow::text::{Encoder, EncoderOptions, Trainer, TrainerOptions, TrainingMode};
use energyflow::types::Precision;
use energyflow::types::{BinaryOp, Broadcast, DType, Trans};
use energyflow::{Error, Gpu};

fn options(blocks: usize, dropout: f32) -> EncoderOptions {
    EncoderOptions::default()
        .vocabulary(50)
        .length(24)
        .width(20)
        .hidden(36)
        .kernel(3)
        .dilations(vec![1; blocks])
        .embedding(7)
        .table_bound(1.0)
        .dropout(dropout)
}

const BATCH: usize = 3;

/// All gradients of an encoder's loss as outputs.
fn graph(options: &EncoderOptions, dtype: DType, recompute: bool) -> Graph {
    let mut graph = Graph::new();
    let draws = Draws::new(&mut graph, 4).unwrap();
    let mode = Mode::train(Some(draws)).recompute(recompute);
    let n = BATCH * options.length;
    let encoder = Encoder::new(&mut graph, options).unwrap();
    let below = options.vocabulary as u32;
    let ids = graph.index_input("ids", n, below).unwrap();
    let mask = graph.input("mask", &[n], DType::F32).unwrap();
    let dims = [BATCH, options.embedding];
    let target = graph.input("target", &dims, DType::F32).unwrap();
    let z = encoder.forward_in(&mut graph, ids, mask, dtype, mode);
    let kd = graph.kd_loss(z.unwrap(), target, 1.0, 0.5).unwrap();
    let parameters: Vec<ValueId> = graph.parameters().map(|(id, _)| id).collect();
    let gradients = graph.gradients(kd.loss, &parameters).unwrap();
    graph.output("loss", kd.loss).unwrap();
    for (i, gradient) in gradients.into_iter().enumerate() {
        graph.output(&i.to_string(), gradient).unwrap();
    }
    graph
}

/// Bits of all outputs of two runs, and the plan.
fn run(gpu: &Gpu, graph: &Graph, options: &EncoderOptions) -> (Vec<Vec<u32>>, Plan) {
    let n = BATCH * options.length;
    let ids: Vec<u32> = (0..n as u32).map(|i| i * 7 % 50).collect();
    let mask: Vec<f32> = (0..n).map(|i| f32::from(u8::from(i % 24 < 19))).collect();
    let target: Vec<f32> = (0..BATCH * options.embedding)
        .map(|i| (i as f32).sin())
        .collect();
    let mut session = Session::new(gpu, 1);
    let executable = session.compile(graph).unwrap();
    let mut bits = Vec::new();
    for _ in 0..2 {
        executable.poison().unwrap();
        let inputs = [
            ("ids", Host::from(&ids)),
            ("mask", Host::from(&mask)),
            ("target", Host::from(&target)),
        ];
        let outputs = executable.run(&inputs).unwrap().wait().unwrap();
        bits.extend(graph.outputs().iter().map(|(name, _)| {
            let data = outputs.get(name).unwrap();
            data.iter().map(|x| x.to_bits()).collect()
        }));
    }
    (bits, executable.plan().clone())
}

/// The kernels that compute a value again are those that computed it first, and the masks are drawn again: not a bit differs.
#[test]
fn checkpointed_gradients_are_those_of_the_plain_graph_in_less_memory() {
    for (gpu, dtype, dropout) in [
        (gpu(), DType::F32, 0.3),
        (gpu(), DType::F16, 0.3),
        (tiled_gpu(), DType::F32, 0.0),
    ] {
        let options = options(4, dropout);
        let (plain, whole) = run(&gpu, &graph(&options, dtype, false), &options);
        let (again, less) = run(&gpu, &graph(&options, dtype, true), &options);
        assert!(plain[1].iter().any(|&bits| bits != 0));
        for (i, (a, b)) in plain.iter().zip(&again).enumerate() {
            assert!(a == b, "output {i} in {dtype}, dropout {dropout}");
        }
        assert!(
            (less.lower_bound as f64) < 0.7 * whole.lower_bound as f64,
            "{whole}\n{less}"
        );
        assert!(
            less.intermediates() < whole.intermediates(),
            "{whole}\n{less}"
        );
    }
}

/// Elementwise nodes at the start of a segment, several results, values of the segment that are read outside and differentiated by.
#[test]
fn any_segment_has_the_gradients_of_the_reference() {
    let mut case = Case::new(1, DType::F32);
    let x = case.input(&[9, 13]);
    let (w, gamma, beta) = (
        case.parameter(&[13, 13]),
        case.parameter(&[13]),
        case.parameter(&[13]),
    );
    let counter = case.input_of(&[1], DType::F32, vec![2.0]);
    let g = &mut case.graph;
    let start = g.matmul(x, w, Trans::NN).unwrap();
    let (y, inner) = g
        .recompute(|g| {
            let a = g.affine(start, 0.5, 0.25)?;
            let b = g.binary(BinaryOp::Max, Broadcast::Same, a, x)?;
            let b = g.dropout(b, 0.4, counter, 0)?;
            let c = g.layer_norm(b, gamma, beta, 1e-5)?;
            let d = g.mul(c, a)?;
            Ok((g.matmul(d, w, Trans::NT)?, c))
        })
        .unwrap();
    let y = g.mul(y, inner).unwrap();
    case.check_finite_differences(y, &[x, w, gamma, beta], 1e-6);
    case.output("y", y);
    let loss = case.random_loss(y);
    let gradients = case.graph.gradients(loss, &[x, w, inner, gamma]).unwrap();
    for (i, gradient) in gradients.into_iter().enumerate() {
        case.output(&format!("gradient {i}"), gradient);
    }
    assert!(case.graph.to_string().contains(", again"));
    case.check(tolerance(DType::F32));
}

/// The first node computed again reads only what is outside: were it to join the kernel before the segment, its result would
/// live from there on.
#[test]
fn nothing_is_computed_again_ahead_of_time() {
    let live = |recompute: bool| {
        let mut case = Case::new(2, DType::F32);
        let (x, w) = (case.input(&[64, 32]), case.parameter(&[32, 32]));
        let g = &mut case.graph;
        let mut y = g.matmul(x, w, Trans::NT).unwrap();
        for _ in 0..5 {
            let build = |g: &mut Graph| {
                let a = g.unary(energyflow::types::UnaryOp::Tanh, y)?;
                let b = g.unary(energyflow::types::UnaryOp::GeluTanh, a)?;
                g.matmul(b, w, Trans::NT)
            };
            y = match recompute {
                true => g.recompute(build).unwrap(),
                false => build(g).unwrap(),
            };
        }
        case.gradients(y, &[w]);
        let mut session = Session::new(&gpu(), 0);
        let executable = session.compile(&case.graph).unwrap();
        executable.plan().lower_bound
    };
    assert!(
        (live(true) as f64) < 0.75 * live(false) as f64,
        "{} {}",
        live(true),
        live(false)
    );
}

#[test]
fn segments_do_not_nest() {
    let mut graph = Graph::new();
    let x = graph.input("x", &[2, 3], DType::F32).unwrap();
    let nested = graph.recompute(|g| g.recompute(|g| g.affine(x, 2.0, 0.0)));
    assert!(matches!(nested, Err(Error::Graph(_))));
    // Neither the failure nor a segment without nodes leaves anything open.
    graph.recompute(|_| Ok(())).unwrap();
    let y = graph.recompute(|g| g.affine(x, 2.0, 0.0)).unwrap();
    let loss = graph.sum_all(y).unwrap();
    graph.gradients(loss, &[x]).unwrap();
}

#[test]
fn a_checkpointed_training_is_the_plain_one() {
    for precision in [Precision::F32, Precision::Mixed] {
        let weights = |recompute: bool| {
            let encoder = options(3, 0.1);
            let distill = TrainerOptions::default()
                .batch(BATCH)
                .precision(precision)
                .recompute(recompute);
            let distiller = Trainer::distill(&gpu(), &encoder, &distill).unwrap();
            let n = BATCH * encoder.length;
            for step in 0..3 {
                let ids: Vec<u32> = (0..n as u32).map(|i| (i * 7 + step) % 50).collect();
                let target: Vec<f32> = (0..BATCH * 7).map(|i| (i as f32).cos()).collect();
                let inputs = [
                    ("ids", Host::from(&ids)),
                    ("mask", Host::F32(&vec![1.0; n])),
                    ("target", Host::from(&target)),
                ];
                let step = distiller
                    .training_step(TrainingMode::A)
                    .unwrap()
                    .run(&inputs)
                    .unwrap();
                step.wait().unwrap();
            }
            let weights = distiller.weights().unwrap();
            let bits: Vec<u32> = weights
                .names()
                .flat_map(|name| weights.get(name).unwrap().1.iter().map(|x| x.to_bits()))
                .collect();
            bits
        };
        assert!(weights(true) == weights(false), "{precision:?}");
    }
}
