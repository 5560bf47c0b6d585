//! Frozen parameters: not a bit changes, and nothing is computed for them.

mod common;

use std::collections::HashMap;

use common::gpu;
use energyflow::Error;
use energyflow::graph::{Graph, Init};
use energyflow::runtime::Host;
use energyflow::text::{EncoderOptions, Trainer, TrainerOptions, TrainingMode};
use energyflow::train::{AdamW, Schedule, trainable};
use energyflow::types::Precision;

fn encoder() -> EncoderOptions {
    EncoderOptions::default()
        .vocabulary(30)
        .length(6)
        .width(8)
        .hidden(12)
        .kernel(3)
        .dilations(vec![1, 2])
        .embedding(5)
        .table_bound(1.0)
}

fn distiller(freeze: &[&str], precision: Precision) -> Result<Trainer, Error> {
    let options = TrainerOptions::default()
        .batch(4)
        // Decay alone would change every parameter but those that are zero.
        .optimizer(
            AdamW::default()
                .schedule(Schedule::Constant { rate: 0.05 })
                .weight_decay(0.5),
        )
        .precision(precision)
        .freeze(freeze.iter().map(|&name| name.to_owned()).collect());
    Trainer::distill(&gpu(), &encoder(), &options)
}

fn bits(distiller: &Trainer) -> HashMap<String, Vec<u32>> {
    let session = distiller.session();
    let names: Vec<String> = session.parameters().map(|(n, _)| n.to_owned()).collect();
    let bits = |name: &String| {
        session
            .get(name)
            .unwrap()
            .iter()
            .map(|x| x.to_bits())
            .collect()
    };
    names
        .iter()
        .map(|name| (name.clone(), bits(name)))
        .collect()
}

#[test]
fn frozen_parameters_keep_their_bits() {
    let cases: [&[&str]; 3] = [
        &["embedding", "blocks.0"],
        &["blocks.1.conv1.weight", "projection.bias"],
        &[],
    ];
    for precision in [Precision::F32, Precision::Mixed] {
        for freeze in cases {
            let distiller = distiller(freeze, precision).unwrap();
            let before = bits(&distiller);
            let ids: Vec<u32> = (0..24).map(|i| 1 + i * 5 % 29).collect();
            let target: Vec<f32> = (0..20).map(|i| (i as f32).sin()).collect();
            for _ in 0..4 {
                let inputs = [
                    ("ids", Host::from(&ids)),
                    ("mask", Host::F32(&[1.0; 24])),
                    ("target", Host::from(&target)),
                ];
                let step = distiller
                    .training_step(TrainingMode::A)
                    .unwrap()
                    .run(&inputs)
                    .unwrap();
                let outputs = step.wait().unwrap();
                assert_eq!(outputs.scalar("skipped").unwrap(), 0.0);
            }
            for (name, after) in bits(&distiller) {
                let frozen = freeze
                    .iter()
                    .any(|prefix| name == *prefix || name.starts_with(&format!("{prefix}.")));
                assert_eq!(after == before[&name], frozen, "{name} in {precision:?}");
            }
        }
    }
}

/// Nothing before the first trained parameter is differentiated.
#[test]
fn frozen_layers_cost_no_backward_pass() {
    let dispatches = |freeze: &[&str]| {
        let distiller = distiller(freeze, Precision::F32).unwrap();
        distiller
            .training_step(TrainingMode::A)
            .unwrap()
            .plan()
            .dispatches
    };
    let all = dispatches(&[]);
    let half = dispatches(&["embedding", "blocks.0"]);
    let head = dispatches(&["embedding", "blocks"]);
    assert!(head + 5 < half && half + 5 < all, "{head} {half} {all}");
}

#[test]
fn names_are_whole_or_end_before_a_dot() {
    let mut graph = Graph::new();
    for name in ["blocks.1.w", "blocks.1.b", "blocks.10.w", "head"] {
        graph.parameter(name, &[2], Init::Constant(0.0)).unwrap();
    }
    let left = |frozen: &[&str]| {
        let frozen: Vec<String> = frozen.iter().map(|&name| name.to_owned()).collect();
        trainable(&graph, &frozen).map(|ids| {
            let name = |id| graph.value(id).unwrap().name.clone();
            ids.into_iter().map(name).collect::<Vec<String>>()
        })
    };
    assert_eq!(left(&[]).unwrap().len(), 4);
    assert_eq!(left(&["blocks.1"]).unwrap(), ["blocks.10.w", "head"]);
    assert_eq!(left(&["blocks"]).unwrap(), ["head"]);
    assert_eq!(
        left(&["head", "blocks.1.b"]).unwrap(),
        ["blocks.1.w", "blocks.10.w"]
    );
    for unknown in ["", "block", "blocks.", "blocks.1.w.x", "hea", "blocks.2"] {
        let Err(Error::Config { field, reason }) = left(&["head", unknown]) else {
            panic!("{unknown:?} is accepted");
        };
        assert_eq!(field, "freeze");
        assert!(reason.contains(&format!("{unknown:?}")), "{reason}");
    }
    let everything = left(&["blocks", "head"]);
    assert!(matches!(
        everything,
        Err(Error::Config {
            field: "freeze",
            ..
        })
    ));
    let refused = distiller(&["embeding"], Precision::F32);
    assert!(matches!(
        refused,
        Err(Error::Config {
            field: "freeze",
            ..
        })
    ));
}
