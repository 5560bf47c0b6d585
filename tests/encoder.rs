//! The encoder with its distillation loss, whole, against the reference.

mod common;

use common::network::Network;
use common::{Tolerance, baseline_gpu, gpu, tiled_gpu};
use energyflow::graph::Graph;
use energyflow::nn::Gelu;
use energyflow::nn::Mode;
use energyflow::runtime::{Host, Session};
use energyflow::text::{Encoder, EncoderOptions, EncoderPooling};
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

/// Every option alone, and together. The second dilation reaches over both ends of a text.
fn variants() -> Vec<EncoderOptions> {
    let attention = EncoderPooling::Attention;
    vec![
        // An even number of taps: one step of padding more after a text than before it.
        options().centred(true).kernel(2).dilations(vec![3]),
        options()
            .dilations(vec![])
            .pooling(attention)
            .expansion(Some(9)),
        options()
            .centred(true)
            .gated(true)
            .pooling(attention)
            .expansion(Some(13)),
        options().gated(true).dilations(vec![3]),
        options().dilations(vec![]),
    ]
}

#[test]
fn loss_and_gradients_of_all_options() {
    let tolerance = Tolerance {
        normalised: 1e-5,
        relative: 2e-4,
    };
    for options in &variants()[..3] {
        network(options, DType::F32).check_on(&gpu(), tolerance);
    }
    let all = &variants()[2];
    network(all, DType::F32).check_on(&tiled_gpu(), tolerance);
    let half = Tolerance {
        normalised: 5e-3,
        relative: 2e-2,
    };
    for gpu in [tiled_gpu(), baseline_gpu()] {
        network(all, DType::F16).check_on(&gpu, half);
    }
}

#[test]
fn gradients_of_all_options_match_finite_differences() {
    for options in variants() {
        network(&options, DType::F32).check_finite_differences(1e-7);
    }
}

/// z of texts without their padding and with more of it is the same, to the bit in f64.
#[test]
fn padding_does_not_leak() {
    for options in variants() {
        let texts: [&[u32]; 2] = [&[3, 16, 5, 9], &[7]];
        let mut found: Vec<Vec<f64>> = Vec::new();
        for length in [4, 7, 12] {
            let mut network = Network::new(3);
            let options = options.clone().length(length);
            let encoder = Encoder::new(&mut network.graph, &options).unwrap();
            let n = texts.len() * length;
            let (mut ids, mut mask) = (vec![11; n], vec![0.0; n]);
            for (row, text) in texts.iter().enumerate() {
                ids[row * length..][..text.len()].copy_from_slice(text);
                mask[row * length..][..text.len()].fill(1.0);
            }
            let ids = network.indices("ids", ids, 17);
            let mask = network.float("mask", &[n], mask);
            let g = &mut network.graph;
            let z = encoder.forward(g, ids, mask, DType::F32).unwrap();
            g.output("z", z).unwrap();
            let sum = g.sum_all(z).unwrap();
            network.differentiate(sum);
            found.push(network.evaluate("z"));
        }
        for other in &found[1..] {
            let same = found[0]
                .iter()
                .zip(other)
                .all(|(a, b)| (a - b).abs() < 1e-12);
            assert!(same, "{options:?}: {:?} {other:?}", found[0]);
        }
    }
}

/// In training, words are dropped whole; in evaluation none are.
#[test]
fn words_are_dropped_whole() {
    use energyflow::nn::Draws;

    let options = options()
        .length(64)
        .width(4)
        .dilations(vec![])
        .embedding(4)
        .word_dropout(0.25);
    let build = |rate: f32| {
        let mut graph = Graph::new();
        let encoder = Encoder::new(&mut graph, &options.clone().word_dropout(rate)).unwrap();
        let ids = graph.index_input("ids", 64, 17).unwrap();
        let mask = graph.input("mask", &[64], DType::F32).unwrap();
        let draws = Draws::new(&mut graph, 5).unwrap();
        let mode = Mode::train(Some(draws));
        let z = encoder
            .forward_in(&mut graph, ids, mask, DType::F32, mode)
            .unwrap();
        graph.output("z", z).unwrap();
        graph
    };
    let mut session = Session::new(&gpu(), 1);
    let mut run = |rate: f32| {
        let executable = session.compile(&build(rate)).unwrap();
        // A table whose rows are equal, and a head that passes them on: z is the share of the words that is left, times 1/(1 - rate).
        session.set("embedding.weight", &[1.0; 17 * 4]).unwrap();
        let one: Vec<f32> = (0..16).map(|i| f32::from(u8::from(i % 5 == 0))).collect();
        session.set("projection.weight", &one).unwrap();
        session.set("projection.bias", &[0.0; 4]).unwrap();
        let (ids, mask) = (vec![3_u32; 64], vec![1.0_f32; 64]);
        let hosts = [("ids", Host::from(&ids)), ("mask", Host::from(&mask))];
        executable
            .run(&hosts)
            .unwrap()
            .wait()
            .unwrap()
            .get("z")
            .unwrap()
    };
    assert!(run(0.0).iter().all(|z| (z - 1.0).abs() < 1e-6));
    let z = run(0.25);
    let kept = z[0] * 0.75 * 64.0;
    assert!(
        (kept - kept.round()).abs() < 1e-3 && (30.0..64.0).contains(&kept),
        "{kept}"
    );
    assert!(z.iter().all(|value| (value - z[0]).abs() < 1e-6), "{z:?}");
    let error = Encoder::new(&mut Graph::new(), &options.word_dropout(1.0)).unwrap_err();
    assert!(error.to_string().contains("word_dropout"), "{error}");
}
