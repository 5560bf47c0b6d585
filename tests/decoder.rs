//! The decoder with its loss, whole, against the reference; its targets; its training.

mod common;

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use common::network::Network;
use common::{Tolerance, baseline_gpu, gpu, tiled_gpu};
use energyflow::Error;
use energyflow::graph::Graph;
use energyflow::nn::{Gelu, TcnBlock};
use energyflow::runtime::{Host, Session};
use energyflow::text::{
    Batches, Dataset, Decoder, DecoderOptions, Efb1Writer, Encoder, EncoderOptions, Metrics,
    Precision, Trainer, TrainerOptions, next_tokens,
};
use energyflow::train::{AdamW, Schedule};
use energyflow::types::DType;
use tempfile::TempDir;

fn options() -> DecoderOptions {
    DecoderOptions::default()
        .vocabulary(19)
        .length(7)
        .width(6)
        .hidden(11)
        .kernel(3)
        // The second reaches over the start of most texts.
        .dilations(vec![1, 3])
        .embedding(5)
        .table_bound(1.0)
}

/// A full row, a short one, an empty one, one of a single token, which has no next.
const USED: [usize; 4] = [7, 4, 0, 1];

fn declare(
    options: &DecoderOptions,
    dtype: DType,
    smoothing: f32,
    masked: bool,
    optimizer: Option<&AdamW>,
) -> Network {
    let mut network = Network::new(4);
    let decoder = Decoder::new(&mut network.graph, options).unwrap();
    let (ids, mask) = network.tokens(&USED, options.length, options.vocabulary);
    let mut targets = vec![0; ids.len()];
    let ignored = options.ignored_target();
    next_tokens(&ids, &mask, options.length, ignored, &mut targets).unwrap();
    let n = ids.len();
    let ids = network.indices("ids", ids, options.vocabulary);
    let targets = network.indices("targets", targets, options.vocabulary + 1);
    let mask = masked.then(|| network.float("mask", &[n], mask));
    let z = network.uniform("z", &[USED.len(), options.embedding]);
    let g = &mut network.graph;
    let states = decoder.forward(g, ids, z, mask, dtype).unwrap();
    let logits = decoder.logits(g, states).unwrap();
    g.output("logits", logits).unwrap();
    let ce = decoder.loss(g, states, targets, smoothing).unwrap();
    g.output("count", ce.count).unwrap();
    match optimizer {
        Some(optimizer) => network.train(ce.loss, optimizer),
        None => network.differentiate(ce.loss),
    }
    network
}

fn network(options: &DecoderOptions, dtype: DType, smoothing: f32, masked: bool) -> Network {
    declare(options, dtype, smoothing, masked, None)
}

/// Whole training steps. With a large epsilon a small error of a gradient is a small error of a step.
#[test]
fn training_steps_end_with_the_weights_of_the_reference() {
    let optimizer = AdamW::default()
        .schedule(Schedule::Constant { rate: 1e-2 })
        .eps(1e-2)
        .clip(1.0);
    for (dtype, error) in [(DType::F32, 1e-5), (DType::F16, 3e-3)] {
        let network = declare(&options(), dtype, 0.1, true, Some(&optimizer));
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
    let tolerance = Tolerance {
        normalised: 1e-5,
        relative: 1e-4,
    };
    for (smoothing, masked) in [(0.0, true), (0.1, false)] {
        let network = network(&options(), DType::F32, smoothing, masked);
        network.check_on(&gpu(), tolerance);
        network.check_on(&tiled_gpu(), tolerance);
    }
}

#[test]
fn loss_and_gradients_in_mixed_precision() {
    let network = network(&options(), DType::F16, 0.1, true);
    let tolerance = Tolerance {
        normalised: 3e-3,
        relative: 1e-2,
    };
    network.check_on(&gpu(), tolerance);
    network.check_on(&tiled_gpu(), tolerance);
    network.check_on(&baseline_gpu(), tolerance);
}

#[test]
fn gradients_match_finite_differences() {
    for (gelu, smoothing, masked) in [(Gelu::Tanh, 0.0, true), (Gelu::Erf, 0.1, false)] {
        let options = options().gelu(gelu);
        network(&options, DType::F32, smoothing, masked).check_finite_differences(1e-7);
    }
}

#[test]
fn targets_are_the_next_tokens() {
    let ids = [5, 6, 7, 8, 9, 4, 0, 0, 3, 2, 1, 2];
    let mask = [1., 1., 1., 1., 1., 1., 0., 0., 1., 1., 0., 1.];
    let mut targets = [99; 12];
    next_tokens(&ids, &mask, 4, 19, &mut targets).unwrap();
    assert_eq!(targets, [6, 7, 8, 19, 4, 19, 19, 19, 2, 19, 19, 19]);
    // Only the mask says what counts: 0 is a token like any other.
    next_tokens(&[5, 0, 6], &[1.; 3], 3, 19, &mut targets[..3]).unwrap();
    assert_eq!(targets[..3], [0, 6, 19]);
    next_tokens(&[0; 4], &[0., 1., 1., 0.], 4, 19, &mut targets[..4]).unwrap();
    assert_eq!(targets[..4], [19, 0, 19, 19]);
    for (n, m, t, length) in [(4, 4, 3, 4), (4, 3, 4, 4), (4, 4, 4, 3), (4, 4, 4, 0)] {
        let result = next_tokens(&ids[..n], &mask[..m], length, 19, &mut targets[..t]);
        assert!(matches!(result, Err(Error::Data { .. })));
    }
    // A token that counts cannot stand for no target; one that does not may have any id.
    let result = next_tokens(&[19, 1], &[1.; 2], 2, 19, &mut targets[..2]);
    assert!(matches!(result, Err(Error::Data { .. })));
    next_tokens(&[19, 1], &[0., 1.], 2, 19, &mut targets[..2]).unwrap();
}

/// No state sees a later token, z is seen everywhere, and the loss is that of the logits.
#[test]
fn the_decoder_is_causal() {
    let options = options();
    let (length, vocabulary) = (options.length, options.vocabulary);
    let mut graph = Graph::new();
    let decoder = Decoder::new(&mut graph, &options).unwrap();
    let ids = graph.index_input("ids", length, vocabulary as u32).unwrap();
    let targets = graph
        .index_input("targets", length, options.ignored_target() + 1)
        .unwrap();
    let z = graph
        .input("z", &[1, options.embedding], DType::F32)
        .unwrap();
    let states = decoder
        .forward(&mut graph, ids, z, None, DType::F32)
        .unwrap();
    let logits = decoder.logits(&mut graph, states).unwrap();
    let ce = decoder.loss(&mut graph, states, targets, 0.0).unwrap();
    graph.output("logits", logits).unwrap();
    graph.output("loss", ce.loss).unwrap();
    assert_eq!(
        graph.value(logits).unwrap().shape.dims(),
        [1, length, vocabulary]
    );
    let mut session = Session::new(&gpu(), 1);
    let executable = session.compile(&graph).unwrap();
    let run = |ids: &[u32], z: &[f32]| {
        let mut targets = vec![0; length];
        let ignored = options.ignored_target();
        next_tokens(ids, &vec![1.0; length], length, ignored, &mut targets).unwrap();
        let inputs = [
            ("ids", Host::from(ids)),
            ("targets", Host::from(&targets)),
            ("z", Host::from(z)),
        ];
        let outputs = executable.run(&inputs).unwrap().wait().unwrap();
        (
            outputs.get("logits").unwrap(),
            outputs.scalar("loss").unwrap(),
        )
    };
    let ids = [3, 1, 4, 1, 5, 9, 2];
    let (before, loss) = run(&ids, &[0.5; 5]);
    let negative_log_likelihood = |t: usize| {
        let row = &before[t * vocabulary..(t + 1) * vocabulary];
        let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
        sum.ln() - f64::from(row[ids[t + 1] as usize])
    };
    let mean = (0..6).map(negative_log_likelihood).sum::<f64>() / 6.0;
    assert!((mean - f64::from(loss)).abs() < 1e-5, "{mean} {loss}");
    for t in 0..length {
        let mut other = ids;
        other[t] = 17;
        let (after, _) = run(&other, &[0.5; 5]);
        for step in 0..length {
            let row = step * vocabulary..(step + 1) * vocabulary;
            let same = before[row.clone()] == after[row];
            assert_eq!(same, step < t || !reaches(step - t), "{step} {t}");
        }
    }
    let (after, _) = run(&ids, &[0.4; 5]);
    let mut pairs = before.chunks(vocabulary).zip(after.chunks(vocabulary));
    assert!(pairs.all(|(a, b)| a != b));
}

/// Whether a state depends on the token so many steps back, of the two blocks of [`options`]: taps 0, 1, 2 and 0, 3, 6 steps back.
fn reaches(steps: usize) -> bool {
    (0..3).any(|a| [0, 3, 6].iter().any(|b| a + b == steps))
}

#[test]
fn a_shared_block_has_one_set_of_parameters() {
    let options = options();
    let encoder_options = EncoderOptions::default()
        .vocabulary(options.vocabulary)
        .length(options.length)
        .width(options.width)
        .hidden(options.hidden)
        .kernel(options.kernel)
        .dilations(vec![2, 3])
        .embedding(options.embedding);
    let names = |graph: &Graph| -> Vec<String> {
        graph
            .parameters()
            .map(|(_, value)| value.name.clone())
            .collect()
    };
    let mut both = Graph::new();
    let encoder = Encoder::new(&mut both, &encoder_options).unwrap();
    let last = *encoder.tcn.blocks.last().unwrap();
    let count = names(&both).len();
    Decoder::sharing(&mut both, &options, last).unwrap();
    // The table; two vectors and four of two convolutions; weight and bias of two linear layers.
    assert_eq!(names(&both).len() - count, 1 + 6 + 4);

    let mut alone = Graph::new();
    let last = TcnBlock::new(&mut alone, "blocks.1", &options.tcn(), 3).unwrap();
    let decoder = Decoder::sharing(&mut alone, &options, last).unwrap();
    assert_eq!(decoder.tcn.blocks.len(), 2);
    let all = names(&both);
    assert!(names(&alone).iter().all(|name| all.contains(name)));

    // A decoder of the shared block alone.
    let single = options.clone().dilations(vec![3]);
    let mut graph = Graph::new();
    let last = TcnBlock::new(&mut graph, "blocks.1", &options.tcn(), 3).unwrap();
    let decoder = Decoder::sharing(&mut graph, &single, last).unwrap();
    assert_eq!(decoder.tcn.blocks.len(), 1);
}

#[test]
fn unusable_options_are_refused() {
    let bad = [
        options().vocabulary(0),
        options().embedding(0),
        options().dilations(vec![]),
        options().dilations(vec![1, 0]),
        options().table_bound(0.0),
    ];
    for options in bad {
        let result = Decoder::new(&mut Graph::new(), &options);
        assert!(matches!(result, Err(Error::Config { .. })), "{options:?}");
    }
    for dilations in [vec![1, 2], vec![]] {
        let mut graph = Graph::new();
        let last = TcnBlock::new(&mut graph, "blocks.1", &options().tcn(), 3).unwrap();
        let options = options().dilations(dilations);
        let result = Decoder::sharing(&mut graph, &options, last);
        assert!(matches!(result, Err(Error::Config { .. })));
    }
    let mut graph = Graph::new();
    let decoder = Decoder::new(&mut graph, &options()).unwrap();
    let ids = graph.index_input("ids", 8, 19).unwrap();
    let z = graph.input("z", &[1, 5], DType::F32).unwrap();
    let result = decoder.forward(&mut graph, ids, z, None, DType::F32);
    assert!(matches!(result, Err(Error::Shape { .. })));
    for training in [
        TrainerOptions::default().batch(0),
        TrainerOptions::default().micro_batches(0),
        TrainerOptions::default().batch(10).micro_batches(4),
        TrainerOptions::default().smoothing(1.0),
    ] {
        let result = Trainer::decode(&gpu(), &options(), &training);
        assert!(matches!(result, Err(Error::Config { .. })));
    }
}

/// A few texts with their teacher's embeddings, their tokens renumbered so that the vocabulary is small: dataset and vocabulary.
fn texts(path: &Path) -> (Dataset, usize) {
    let all = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/data/wordnet_train.safetensors"
    );
    let samples = Dataset::open(all).unwrap().take(21);
    let mut numbers = HashMap::new();
    let mut writer = Efb1Writer::create(path, samples.width()).unwrap();
    for sample in samples.iter() {
        let sample = sample.unwrap();
        let ids = sample.ids().iter().map(|&id| {
            let next = numbers.len() as u32 + 1;
            *numbers.entry(id).or_insert(next)
        });
        let ids: Vec<u32> = ids.collect();
        let mask = vec![1; ids.len()];
        writer.push(&ids, &mask, sample.target()).unwrap();
    }
    writer.finish().unwrap();
    (Dataset::open(path).unwrap(), numbers.len() + 1)
}

fn small(vocabulary: usize, embedding: usize) -> DecoderOptions {
    DecoderOptions::default()
        .vocabulary(vocabulary)
        .length(8)
        .width(32)
        .hidden(32)
        .kernel(3)
        .dilations(vec![1, 2])
        .embedding(embedding)
        .table_bound(0.05)
}

fn training(precision: Precision) -> TrainerOptions {
    TrainerOptions::default()
        .batch(10)
        .optimizer(
            AdamW::default()
                .schedule(Schedule::Constant { rate: 1e-2 })
                .clip(Some(1.0)),
        )
        .precision(precision)
        .seed(1)
}

/// All begin alike, so only the embedding tells how they go on.
fn learns_by_heart(precision: Precision) {
    let folder = TempDir::new().unwrap();
    let (samples, vocabulary) = texts(&folder.path().join("texts.efb"));
    let decoder = small(vocabulary, samples.width());
    let training = training(precision);
    let mut trainer = Trainer::decode(&gpu(), &decoder, &training).unwrap();
    let before = trainer.evaluate(&samples).unwrap().decoder.unwrap();
    // Near uniform over the vocabulary.
    assert!(
        (before.cross_entropy - (vocabulary as f64).ln()).abs() < 0.3,
        "{before:?}"
    );
    let counted = samples
        .iter()
        .map(|sample| sample.unwrap().len().min(8) as u64 - 1);
    assert_eq!(before.tokens, counted.sum::<u64>());
    let mut batches = Batches::training(samples.clone(), 10, 8, 1).unwrap();
    let mut last = None;
    for epoch in 0..40 {
        batches.start_epoch(epoch);
        trainer
            .epoch(&mut batches, |metrics| last = Some(*metrics))
            .unwrap();
    }
    let last = last.unwrap();
    assert_eq!(last.skipped, 0.0);
    assert!(last.tokens > 0.0);
    let after = trainer.evaluate(&samples).unwrap().decoder.unwrap();
    assert!(after.perplexity() < 1.2, "{after:?}");
    let weights = trainer.weights().unwrap();
    let sizes: DecoderOptions = serde_json::from_str(&weights.description).unwrap();
    assert_eq!(sizes, decoder);
    trainer.set_weights(&weights).unwrap();
    assert_eq!(trainer.evaluate(&samples).unwrap().decoder.unwrap(), after);
}

#[test]
fn texts_are_learnt() {
    learns_by_heart(Precision::F32);
}

#[test]
fn texts_are_learnt_in_mixed_precision() {
    learns_by_heart(Precision::Mixed);
}

/// Bits of all parameters.
fn bits(trainer: &Trainer) -> Vec<Vec<u32>> {
    let weights = trainer.weights().unwrap();
    let names = weights.names();
    names
        .map(|name| {
            let (_, data) = weights.get(name).unwrap();
            data.iter().map(|x| x.to_bits()).collect()
        })
        .collect()
}

fn epochs(trainer: &mut Trainer, batches: &mut Batches, epochs: Range<u64>) -> Vec<Metrics> {
    let mut history = Vec::new();
    for epoch in epochs {
        batches.start_epoch(epoch);
        trainer
            .epoch(batches, |metrics| history.push(*metrics))
            .unwrap();
    }
    history
}

/// Texts have different lengths, so that micro-batches have different numbers of targets.
#[test]
fn micro_batches_are_one_batch() {
    let folder = TempDir::new().unwrap();
    let (samples, vocabulary) = texts(&folder.path().join("texts.efb"));
    let decoder = small(vocabulary, samples.width());
    for (precision, bound) in [(Precision::F32, 2e-5), (Precision::Mixed, 1e-2)] {
        let run = |micro_batches: usize| {
            let options = training(precision)
                .micro_batches(micro_batches)
                .smoothing(0.1)
                .optimizer(
                    AdamW::default()
                        .schedule(Schedule::Constant { rate: 1e-3 })
                        .clip(Some(1.0)),
                );
            let mut trainer = Trainer::decode(&gpu(), &decoder, &options).unwrap();
            let mut batches = Batches::training(samples.clone(), 10, 8, 1).unwrap();
            let history = epochs(&mut trainer, &mut batches, 0..2);
            batches.start_epoch(3);
            let mut batch = batches.next_batch().unwrap().unwrap().clone();
            // The last micro-batch is refused: nothing of it stays behind.
            *batch.ids.last_mut().unwrap() = u32::MAX;
            let before = bits(&trainer);
            assert!(matches!(trainer.step(&batch, 0), Err(Error::Data { .. })));
            batch.ids.pop();
            assert!(matches!(trainer.step(&batch, 0), Err(Error::Data { .. })));
            assert!(bits(&trainer) == before);
            assert!(trainer.checkpoint().is_ok());
            history
        };
        let (one, five) = (run(1), run(5));
        assert_eq!(one.len(), 4);
        for (a, b) in five.iter().zip(&one) {
            let numbers = |m: &Metrics| [m.loss, m.gradient_norm, m.learning_rate];
            assert_eq!(a.tokens, b.tokens);
            for (a, b) in numbers(a).into_iter().zip(numbers(b)) {
                assert!((a - b).abs() <= bound * b.abs(), "{a} {b}");
            }
        }
    }
}

#[test]
fn a_resumed_training_is_the_same_bit_for_bit() {
    let folder = TempDir::new().unwrap();
    let (samples, vocabulary) = texts(&folder.path().join("texts.efb"));
    let decoder = small(vocabulary, samples.width()).dropout(0.1);
    for (precision, micro_batches) in [(Precision::F32, 1), (Precision::Mixed, 2)] {
        let options = training(precision).micro_batches(micro_batches);
        let mut batches = Batches::training(samples.clone(), 10, 8, 1).unwrap();
        let mut whole = Trainer::decode(&gpu(), &decoder, &options).unwrap();
        epochs(&mut whole, &mut batches, 0..2);
        let checkpoint = whole.checkpoint().unwrap();
        let expected = epochs(&mut whole, &mut batches, 2..4);

        let mut resumed = Trainer::decode(&gpu(), &decoder, &options).unwrap();
        epochs(&mut resumed, &mut batches, 0..1);
        resumed.resume(&checkpoint).unwrap();
        assert_eq!(epochs(&mut resumed, &mut batches, 2..4), expected);
        assert!(bits(&resumed) == bits(&whole));
    }
}
