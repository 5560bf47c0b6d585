//! The transformer encoder: layers in both orders, against the reference, against differences and against what the mask promises.

mod common;

use common::network::Network;
use common::{Case, Tolerance, baseline_gpu, gpu, tiled_gpu, tolerance};
use energyflow::graph::{Graph, ValueId};
use energyflow::nn::{
    Activation, Draws, Mode, NormOrder, TransformerEncoder, TransformerEncoderOptions,
};
use energyflow::text::{Pooling, Transformer, TransformerOptions};
use energyflow::train::{AdamW, Schedule};
use energyflow::types::{Padding, Trans, Window};
use energyflow::{DType, Error, Session};

fn sizes(norm: NormOrder, activation: Activation) -> TransformerEncoderOptions {
    TransformerEncoderOptions::new(8, 2, 2)
        .hidden(12)
        .norm(norm)
        .activation(activation)
        .eps(1e-5)
}

fn parameters(graph: &Graph) -> Vec<ValueId> {
    graph.parameters().map(|(id, _)| id).collect()
}

#[test]
fn layers_and_their_gradients() {
    for (norm, activation, dtype) in [
        (NormOrder::Post, Activation::GeluErf, DType::F32),
        (NormOrder::Pre, Activation::Relu, DType::F32),
        (NormOrder::Post, Activation::GeluTanh, DType::F16),
    ] {
        let mut case = Case::new(1, dtype);
        let encoder = TransformerEncoder::new(&mut case.graph, "t", &sizes(norm, activation));
        let encoder = encoder.unwrap();
        assert_eq!(encoder.norm.is_some(), norm == NormOrder::Pre);
        let x = case.input(&[2, 5, 8]);
        let mask = case.mask(10);
        let y = encoder
            .forward(&mut case.graph, x, Some(mask), Mode::Eval)
            .unwrap();
        case.output("y", y);
        case.fill_parameters(0.7);
        let wrt = [vec![x], parameters(&case.graph)].concat();
        case.gradients(y, &wrt);
        // The gradient of an f16 network adds up roundings of all its layers.
        let bound = match dtype {
            DType::F16 => Tolerance {
                normalised: 0.02,
                relative: 0.1,
            },
            _ => tolerance(dtype),
        };
        case.check(bound);
    }
}

#[test]
fn gradients_agree_with_differences() {
    let options = sizes(NormOrder::Post, Activation::GeluErf);
    let mut case = Case::new(2, DType::F32);
    let encoder = TransformerEncoder::new(&mut case.graph, "t", &options.causal(true)).unwrap();
    let x = case.input(&[1, 3, 8]);
    let y = encoder
        .forward(&mut case.graph, x, None, Mode::Eval)
        .unwrap();
    case.fill_parameters(0.7);
    let layer = &encoder.layers[0];
    let wrt = [
        x,
        layer.self_attn.in_proj.weight,
        layer.linear1.weight,
        layer.norm1.weight,
    ];
    case.check_finite_differences(y, &wrt, 1e-5);
}

fn tiny(pooling: Pooling) -> TransformerOptions {
    TransformerOptions::default()
        .vocabulary(20)
        .length(5)
        .positions(7)
        .width(8)
        .heads(2)
        .hidden(12)
        .layers(2)
        .dropout(0.0)
        .pooling(pooling)
}

#[test]
fn a_whole_transformer_and_its_gradients() {
    for pooling in [Pooling::Mean, Pooling::Attention] {
        let mut case = Case::new(3, DType::F32);
        let transformer = Transformer::new(&mut case.graph, &tiny(pooling)).unwrap();
        let ids = case.ids(15, 20);
        let mask = case.mask(15);
        let z = transformer
            .forward(&mut case.graph, ids, mask, DType::F32)
            .unwrap();
        case.output("z", z);
        case.fill_parameters(0.5);
        let wrt = parameters(&case.graph);
        case.gradients(z, &wrt);
        // Gradients pass through all layers, and a mean takes most of them out again.
        case.check(Tolerance {
            normalised: 2e-5,
            relative: 2e-4,
        });
    }
}

/// Mean over pairs of texts, which follow each other in z [n, E], of the cross entropy of each first text's cosines with the others.
fn contrastive(network: &mut Network, z: ValueId, texts: usize) -> ValueId {
    let (pairs, far) = (texts / 2, -1e4);
    let candidates = (0..texts).map(|i| if i % 2 == 0 { far } else { 0.0 });
    let candidates = network.float("candidates", &[texts], candidates.collect());
    let labels = (0..pairs as u32).map(|i| 2 * i + 1).collect();
    let labels = network.indices("labels", labels, texts);
    let g = &mut network.graph;
    let width = g.value(z).unwrap().shape.cols();
    let series = g.reshape(z, &[1, texts, width]).unwrap();
    let first = Window::new(texts, 1, 1, 2, Padding::Valid).unwrap();
    let anchors = g.windows(series, first).unwrap();
    let anchors = g.reshape(anchors, &[pairs, width]).unwrap();
    let scores = g.matmul(anchors, z, Trans::NT).unwrap();
    let scores = g.affine(scores, 5.0, 0.0).unwrap();
    let scores = g.add_bias(scores, candidates).unwrap();
    g.cross_entropy(scores, labels, None, 0.0).unwrap().loss
}

/// Whole training steps of a teacher, on pairs of texts with dropout, and towards embeddings without. With a large epsilon a small error
/// of a gradient is a small error of a step.
#[test]
fn training_steps_end_with_the_weights_of_the_reference() {
    let optimizer = AdamW::default()
        .schedule(Schedule::Constant { rate: 1e-2 })
        .eps(1e-2)
        .clip(1.0);
    for (dtype, error, pairs, dropout) in [
        (DType::F32, 1e-5, true, 0.2),
        (DType::F16, 5e-3, false, 0.0),
    ] {
        let mut network = Network::new(5);
        let options = tiny(Pooling::Mean).dropout(dropout);
        let transformer = Transformer::new(&mut network.graph, &options).unwrap();
        let used = [5, 3, 1, 5, 2, 4];
        let (ids, mask) = network.tokens(&used, options.length, options.vocabulary);
        let n = ids.len();
        let ids = network.indices("ids", ids, options.vocabulary);
        let mask = network.float("mask", &[n], mask);
        let draws = Draws::new(&mut network.graph, 1).unwrap();
        let mode = Mode::train((dropout > 0.0).then_some(draws));
        let z = transformer
            .forward_in(&mut network.graph, ids, mask, dtype, mode)
            .unwrap();
        let loss = if pairs {
            contrastive(&mut network, z, used.len())
        } else {
            let target = network.uniform("target", &[used.len(), options.width]);
            network.graph.kd_loss(z, target, 1.0, 0.5).unwrap().loss
        };
        network.train(loss, &optimizer);
        let tolerance = Tolerance {
            normalised: error,
            relative: 10.0 * error,
        };
        network.check_steps_on(&gpu(), 5, tolerance);
        network.check_steps_on(&tiled_gpu(), 5, tolerance);
        network.check_steps_on(&baseline_gpu(), 5, tolerance);
    }
}

/// Recomputed layers give the same bits with the same dropout, and less memory.
#[test]
fn recomputation_changes_nothing() {
    let run = |recompute| {
        let mut graph = Graph::new();
        let options = tiny(Pooling::Mean).layers(4).dropout(0.2);
        let transformer = Transformer::new(&mut graph, &options).unwrap();
        let ids = graph.index_input("ids", 40, 20).unwrap();
        let mask = graph.input("mask", &[40], DType::F32).unwrap();
        let draws = Draws::new(&mut graph, 1).unwrap();
        let mode = Mode::train(Some(draws)).recompute(recompute);
        let z = transformer
            .forward_in(&mut graph, ids, mask, DType::F32, mode)
            .unwrap();
        let weights = graph.input("weights", &[8, 8], DType::F32).unwrap();
        let product = graph.mul(z, weights).unwrap();
        let loss = graph.sum_all(product).unwrap();
        let wrt = parameters(&graph);
        let gradients = graph.gradients(loss, &wrt).unwrap();
        for (i, gradient) in gradients.into_iter().enumerate() {
            graph.output(&format!("{i}"), gradient).unwrap();
        }
        let mut session = Session::new(&gpu(), 3);
        let executable = session.compile(&graph).unwrap();
        let ids: Vec<u32> = (0..40).map(|i| i * 7 % 20).collect();
        let mask: Vec<f32> = (0..40).map(|i| f32::from(u8::from(i % 5 < 4))).collect();
        let weights: Vec<f32> = (0..64).map(|i| (i as f32).sin()).collect();
        let inputs = [
            ("ids", energyflow::Host::from(&ids)),
            ("mask", energyflow::Host::from(&mask)),
            ("weights", energyflow::Host::from(&weights)),
        ];
        let outputs = executable.run(&inputs).unwrap().wait().unwrap();
        let all: Vec<f32> = (0..wrt.len())
            .flat_map(|i| outputs.get(&i.to_string()).unwrap())
            .collect();
        (all, executable.plan().intermediates())
    };
    let (kept, more) = run(false);
    let (recomputed, less) = run(true);
    assert!(kept.iter().any(|x| x.abs() > 1e-3));
    assert_eq!(kept, recomputed);
    assert!(less < more, "{less} {more}");
}

#[test]
fn what_is_masked_does_not_count() {
    for pooling in [Pooling::Mean, Pooling::Cls, Pooling::Attention] {
        let mut graph = Graph::new();
        let transformer = Transformer::new(&mut graph, &tiny(pooling)).unwrap();
        let ids = graph.index_input("ids", 5, 20).unwrap();
        let mask = graph.input("mask", &[5], DType::F32).unwrap();
        let z = transformer
            .forward(&mut graph, ids, mask, DType::F32)
            .unwrap();
        graph.output("z", z).unwrap();
        let mut session = Session::new(&gpu(), 3);
        let executable = session.compile(&graph).unwrap();
        let run = |ids: [u32; 5], mask: [f32; 5]| {
            let inputs = [
                ("ids", energyflow::Host::from(&ids[..])),
                ("mask", energyflow::Host::from(&mask[..])),
            ];
            executable
                .run(&inputs)
                .unwrap()
                .wait()
                .unwrap()
                .get("z")
                .unwrap()
        };
        let mask = [1.0, 1.0, 1.0, 0.0, 0.0];
        let one = run([3, 4, 5, 0, 0], mask);
        assert_eq!(one, run([3, 4, 5, 17, 9], mask));
        assert_ne!(one, run([3, 4, 6, 0, 0], mask));
        assert_ne!(one, run([3, 4, 5, 17, 9], [1.0; 5]));
    }
}

/// What a layer costs in dispatches: q, k and v, attention, its projection, LayerNorm, two products, LayerNorm.
#[test]
fn a_layer_takes_seven_dispatches() {
    let dispatches = |layers| {
        let mut graph = Graph::new();
        let options = tiny(Pooling::Mean).layers(layers).normalize(false);
        let transformer = Transformer::new(&mut graph, &options).unwrap();
        let ids = graph.index_input("ids", 10, 20).unwrap();
        let mask = graph.input("mask", &[10], DType::F32).unwrap();
        let z = transformer
            .forward(&mut graph, ids, mask, DType::F32)
            .unwrap();
        graph.output("z", z).unwrap();
        Session::new(&gpu(), 0).plan(&graph).unwrap().dispatches
    };
    assert_eq!(dispatches(3) - dispatches(2), 7);
    // Gather with both other tables, LayerNorm, mean.
    assert_eq!(dispatches(1), 7 + 3);
}

#[test]
fn options_are_checked() {
    let build = |options: TransformerOptions| {
        Transformer::new(&mut Graph::new(), &options)
            .map(|_| ())
            .unwrap_err()
    };
    let mean = || tiny(Pooling::Mean);
    for (options, field) in [
        (mean().heads(3), "heads"),
        (mean().heads(0), "heads"),
        (mean().layers(0), "layers"),
        (mean().length(8), "length"),
        (mean().eps(0.0), "eps"),
        (mean().dropout(1.0), "dropout"),
        (mean().padding(Some(20)), "padding"),
    ] {
        let error = build(options);
        assert!(
            matches!(&error, Error::Config { field: found, .. } if *found == field),
            "{error}"
        );
    }
    let mut graph = Graph::new();
    let transformer = Transformer::new(&mut graph, &mean()).unwrap();
    let ids = graph.index_input("ids", 7, 20).unwrap();
    let mask = graph.input("mask", &[7], DType::F32).unwrap();
    let error = transformer
        .forward(&mut graph, ids, mask, DType::F32)
        .unwrap_err();
    assert!(
        error.to_string().contains("whole texts of 5 tokens"),
        "{error}"
    );
}
