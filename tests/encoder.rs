//! The encoder with its distillation loss, whole, against the reference.

mod common;

use common::network::Network;
use common::{Tolerance, baseline_gpu, gpu, tiled_gpu};
use energyflow::graph::Graph;
use energyflow::nn::Gelu;
use energyflow::runtime::{Host, Session};
use energyflow::text::{Encoder, EncoderOptions};
use energyflow::train::{AdamW, Schedule};
use energyflow::types::DType;

fn options() -> EncoderOptions {
    EncoderOptions::default()
        .vocabulary(17)
        .length(7)
        .width(6)
        .hidden(11)
        .kernel(3)
        // The second reaches over the start of most texts.
        .dilations(vec![1, 3])
        .embedding(5)
        .table_bound(1.0)
}

/// A full row, a short one, an empty one, one of a single token.
const USED: [usize; 4] = [7, 4, 0, 1];

fn declare(options: &EncoderOptions, dtype: DType, optimizer: Option<&AdamW>) -> Network {
    let mut network = Network::new(3);
    let encoder = Encoder::new(&mut network.graph, options).unwrap();
    let (ids, mask) = network.tokens(&USED, options.length, options.vocabulary);
    let n = ids.len();
    let ids = network.indices("ids", ids, options.vocabulary);
    let mask = network.float("mask", &[n], mask);
    let target = network.uniform("target", &[USED.len(), options.embedding]);
    let g = &mut network.graph;
    let z = encoder.forward(g, ids, mask, dtype).unwrap();
    let kd = g.kd_loss(z, target, 1.0, 0.5).unwrap();
    g.output("z", z).unwrap();
    match optimizer {
        Some(optimizer) => network.train(kd.loss, optimizer),
        None => network.differentiate(kd.loss),
    }
    network
}

fn network(options: &EncoderOptions, dtype: DType) -> Network {
    declare(options, dtype, None)
}

/// Whole training steps. With a large epsilon a small error of a gradient is a small error of a step.
#[test]
fn training_steps_end_with_the_weights_of_the_reference() {
    let optimizer = AdamW::default()
        .schedule(Schedule::Constant { rate: 1e-2 })
        .eps(1e-2)
        .clip(1.0);
    for (dtype, error) in [(DType::F32, 1e-5), (DType::F16, 3e-3)] {
        let network = declare(&options(), dtype, Some(&optimizer));
        let tolerance = Tolerance {
            normalised: error,
            relative: 10.0 * error,
        };
        network.check_steps_on(&gpu(), 5, tolerance);
        network.check_steps_on(&tiled_gpu(), 5, tolerance);
        network.check_steps_on(&baseline_gpu(), 5, tolerance);
    }
}

#[test]
fn loss_and_gradients() {
    let network = network(&options(), DType::F32);
    let tolerance = Tolerance {
        normalised: 1e-5,
        relative: 1e-4,
    };
    network.check_on(&gpu(), tolerance);
    network.check_on(&tiled_gpu(), tolerance);
}

#[test]
fn loss_and_gradients_in_mixed_precision() {
    let network = network(&options(), DType::F16);
    let tolerance = Tolerance {
        normalised: 3e-3,
        relative: 1e-2,
    };
    network.check_on(&gpu(), tolerance);
    network.check_on(&tiled_gpu(), tolerance);
    network.check_on(&baseline_gpu(), tolerance);
}

/// An activation that overflows f16 becomes infinite and then NaN in the next normalisation. The result must show it: −1 everywhere would
/// look like an embedding.
#[test]
fn an_overflow_in_f16_is_no_embedding() {
    let options = options().tanh(true);
    let mut graph = Graph::new();
    let encoder = Encoder::new(&mut graph, &options).unwrap();
    let n = 2 * options.length;
    let ids = graph.index_input("ids", n, 17).unwrap();
    let mask = graph.input("mask", &[n], DType::F32).unwrap();
    let z = encoder.forward(&mut graph, ids, mask, DType::F16).unwrap();
    graph.output("z", z).unwrap();
    for gpu in [gpu(), baseline_gpu()] {
        let mut session = Session::new(&gpu, 1);
        let executable = session.compile(&graph).unwrap();
        let (ids, mask) = (vec![3_u32; n], vec![1.0_f32; n]);
        let run = || {
            let hosts = [("ids", Host::from(&ids)), ("mask", Host::from(&mask))];
            let outputs = executable.run(&hosts).unwrap().wait().unwrap();
            outputs.get("z").unwrap()
        };
        assert!(run().iter().all(|z| z.is_finite()));
        let bias = vec![1e5; options.hidden];
        session.set("blocks.0.conv1.bias", &bias).unwrap();
        let z = run();
        assert!(z.iter().all(|z| z.is_nan()), "{z:?}");
    }
}

#[test]
fn gradients_match_finite_differences() {
    for (gelu, tanh) in [(Gelu::Tanh, false), (Gelu::Erf, true)] {
        let options = options().gelu(gelu).tanh(tanh);
        network(&options, DType::F32).check_finite_differences(1e-7);
    }
}
