//! Training on pairs of texts: encoder and transformer, resumption, evaluation, what is refused.

mod common;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use common::gpu;
use energyflow::nn::Gelu;
use energyflow::text::trainer::{Event, PairScores};
use energyflow::text::{
    Batches, Contrastive, Dataset, EncoderOptions, FitOptions, InfoNce, Metrics, Model, PairLoss,
    PairOptions, Pairs, Precision, Trainer, TrainerOptions, TransformerModel, TransformerOptions,
    ValidationSize, Whitespace, metrics,
};
use energyflow::train::{AdamW, Checkpoint, LossScale, Schedule, WeightType, Weights};
use energyflow::{Error, Result};

const LENGTH: usize = 5;
const VOCABULARY: usize = 16;

fn tokenizer() -> Whitespace {
    let words = (0..VOCABULARY - 4).map(|i| format!("w{i}"));
    Whitespace::new(words, LENGTH).unwrap()
}

/// Which columns a file has beside the two texts.
#[derive(Clone, Copy, PartialEq)]
enum Third {
    Nothing,
    Negative,
    Score,
}

/// Pairs whose texts share a word, of twelve, in different company.
fn pairs(folder: &Path, third: Third, n: usize) -> Pairs {
    let line = |i: usize| {
        let topic = i % 12;
        let text = |j: usize| format!("w{topic} w{}", (5 * i + 7 * j) % 12);
        let more = match third {
            Third::Nothing => String::new(),
            Third::Negative => format!("\tw{} w3", (topic + 1) % 12),
            Third::Score => format!("\t{}", [0.9, -0.2, 0.4][i % 3]),
        };
        format!("{}\t{}{more}\n", text(1), text(2))
    };
    let path = folder.join("pairs.tsv");
    std::fs::write(&path, (0..n).map(line).collect::<String>()).unwrap();
    Pairs::open(&path, &tokenizer(), &PairOptions::new(LENGTH)).unwrap()
}

fn encoder() -> EncoderOptions {
    EncoderOptions::default()
        .vocabulary(VOCABULARY)
        .length(LENGTH)
        .width(8)
        .hidden(8)
        .kernel(2)
        .dilations(vec![1])
        .gelu(Gelu::Tanh)
        .embedding(6)
        .table_bound(0.5)
        .dropout(0.1)
}

fn transformer() -> TransformerOptions {
    TransformerOptions::default()
        .vocabulary(VOCABULARY)
        .length(7)
        .positions(8)
        .width(8)
        .heads(2)
        .hidden(12)
        .layers(2)
        .dropout(0.1)
}

/// A transformer with initial weights.
fn transformer_model() -> TransformerModel {
    let mut graph = energyflow::Graph::new();
    let empty = TransformerModel::new(transformer(), Weights::default());
    empty.build(&mut graph).unwrap();
    let all: Vec<_> = graph.parameters().map(|(id, _)| id).collect();
    let sums = all.iter().map(|&id| graph.sum_all(id).unwrap());
    for (i, sum) in sums.collect::<Vec<_>>().into_iter().enumerate() {
        graph.output(&format!("sum {i}"), sum).unwrap();
    }
    let mut session = energyflow::Session::new(&gpu(), 2);
    session.compile(&graph).unwrap();
    TransformerModel::new(transformer(), Weights::from_session(&session).unwrap())
}

fn options(loss: PairLoss) -> TrainerOptions {
    let optimizer = AdamW::default()
        .schedule(Schedule::Constant { rate: 2e-2 })
        .clip(Some(1.0));
    TrainerOptions::default()
        .batch(12)
        .seed(3)
        .optimizer(optimizer)
        .pair_loss(Some(loss))
}

fn batches(pairs: &Pairs) -> Batches {
    Batches::training(pairs.dataset().clone(), 12, pairs.tokens(), 5).unwrap()
}

fn contrastive(pairs: &Pairs) -> Contrastive {
    let PairLoss::Contrastive(loss) = pairs.loss() else {
        panic!("the pairs have scores");
    };
    loss
}

fn value(trainer: &Trainer, data: &Dataset, name: &str) -> f64 {
    trainer.evaluate(data).unwrap().get(name).unwrap()
}

#[test]
fn an_encoder_learns_from_pairs_and_scores() {
    let folder = tempfile::tempdir().unwrap();
    for third in [Third::Nothing, Third::Score] {
        let pairs = pairs(folder.path(), third, 60);
        let trainer = Trainer::distill(&gpu(), &encoder(), &options(pairs.loss())).unwrap();
        let names: &[(&str, f64)] = match third {
            Third::Score => &[("spearman", 0.3), ("mse", -0.05)],
            _ => &[("mrr", 0.2), ("accuracy_at_1", 0.1), ("cosine", 0.0)],
        };
        let all = |trainer: &Trainer| -> Vec<f64> {
            let evaluation = trainer.evaluate(pairs.dataset()).unwrap();
            let values = names.iter().map(|(name, _)| evaluation.get(name).unwrap());
            values.collect()
        };
        let before = all(&trainer);
        let mut losses: Vec<Metrics> = Vec::new();
        let mut batches = batches(&pairs);
        for epoch in 0..8 {
            batches.start_epoch(epoch);
            trainer
                .epoch(&mut batches, |metrics| losses.push(*metrics))
                .unwrap();
        }
        let (first, last) = (losses[0], losses[losses.len() - 1]);
        assert!(last.loss < 0.8 * first.loss, "{first:?} {last:?}");
        assert!(last.cosine.is_finite() && last.cosine.abs() <= 1.0001);
        assert_eq!(
            last.mse,
            if third == Third::Score {
                last.loss
            } else {
                0.0
            }
        );
        for (((name, gain), before), after) in names.iter().zip(before).zip(all(&trainer)) {
            // Of the error less is better.
            let better = if *gain < 0.0 {
                before - after
            } else {
                after - before
            };
            assert!(better > gain.abs(), "{name}: {before} {after}");
        }
    }
}

#[test]
fn an_evaluation_agrees_with_its_definition() {
    let folder = tempfile::tempdir().unwrap();
    for third in [Third::Negative, Third::Score] {
        // More than a batch, and not whole ones. Some texts are there more than once.
        let pairs = pairs(folder.path(), third, 31);
        let trainer = Trainer::distill(&gpu(), &encoder(), &options(pairs.loss())).unwrap();
        let each = pairs.loss().texts();
        let samples = pairs.dataset().iter().map(Result::unwrap);
        let samples: Vec<_> = samples.collect();
        let texts: Vec<Vec<u32>> = samples
            .iter()
            .flat_map(|sample| {
                let tokens = sample
                    .ids()
                    .chunks(LENGTH)
                    .zip(sample.mask().chunks(LENGTH));
                let text = tokens.map(|(ids, mask)| {
                    let n = mask.iter().filter(|x| **x == 1).count();
                    ids[..n].to_vec()
                });
                text.collect::<Vec<_>>()
            })
            .collect();
        let z = trainer.embed(&texts).unwrap();
        let z: Vec<&[f32]> = z.chunks(6).collect();
        let cosine = |a: usize, b: usize| metrics::mean_cosine(z[a], z[b], 6).unwrap();
        let own: Vec<f64> = (0..31).map(|i| cosine(i * each, i * each + 1)).collect();
        let mean = own.iter().sum::<f64>() / 31.0;
        let scores = trainer.evaluate(pairs.dataset()).unwrap();
        assert!((scores.get("cosine").unwrap() - mean).abs() < 1e-6);
        match scores.pairs.unwrap() {
            PairScores::Retrieval {
                accuracy_at_1, mrr, ..
            } => {
                let mut ranks = Vec::new();
                for (i, &own) in own.iter().enumerate() {
                    let right = i * each + 1;
                    let mut nearer: Vec<&[u32]> = (0..texts.len())
                        .filter(|text| text % each != 0 && texts[*text] != texts[right])
                        .filter(|&text| cosine(i * each, text) >= own)
                        .map(|text| texts[text].as_slice())
                        .collect();
                    nearer.sort_unstable();
                    nearer.dedup();
                    ranks.push(nearer.len());
                }
                let first = ranks.iter().filter(|rank| **rank == 0).count() as f64 / 31.0;
                let reciprocal = ranks.iter().map(|rank| 1.0 / (rank + 1) as f64);
                assert!((accuracy_at_1 - first).abs() < 1e-9, "{ranks:?}");
                assert!((mrr - reciprocal.sum::<f64>() / 31.0).abs() < 1e-9);
            }
            PairScores::Similarity { mse, spearman, .. } => {
                let wanted: Vec<f64> = samples.iter().map(|s| f64::from(s.target()[0])).collect();
                let squares = own.iter().zip(&wanted).map(|(a, b)| (a - b).powi(2));
                assert!((mse - squares.sum::<f64>() / 31.0).abs() < 1e-6);
                let expected = metrics::spearman(&own, &wanted).unwrap();
                assert!((spearman - expected).abs() < 1e-3);
            }
            other => panic!("{other:?}"),
        }
    }
}

/// Bits of parameters and moments.
fn bits(trainer: &Trainer) -> BTreeMap<String, Vec<u32>> {
    let session = trainer.session();
    let all = session.parameters().map(|(name, _)| {
        let [m, v] = session.moments(name).unwrap().unwrap();
        let values = [session.get(name).unwrap(), m, v].concat();
        let bits = values.into_iter().map(f32::to_bits).collect();
        (name.to_owned(), bits)
    });
    all.collect()
}

/// Trains for two epochs, or until `cancel` steps were reported.
fn fit(trainer: &mut Trainer, pairs: &Pairs, folder: &Path, cancel: u64) -> Vec<String> {
    let options = FitOptions::new(2)
        .validation(Some(pairs.dataset().take(5)))
        .best_by(Some("cosine".into()))
        .checkpoints(Some(folder.to_owned()));
    let mut history = Vec::new();
    trainer
        .fit(&mut batches(pairs), &options, |event| {
            if let Event::Step { step, metrics, .. } = event {
                // As text: the norm of a skipped step is NaN, which equals nothing.
                history.push(format!("{step} {metrics:?}"));
                if step == cancel {
                    return ControlFlow::Break(());
                }
            }
            ControlFlow::Continue(())
        })
        .unwrap();
    history
}

#[test]
fn fine_tuning_goes_on_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let model = transformer_model();
    for of_transformer in [false, true] {
        let third = [Third::Negative, Third::Score][usize::from(of_transformer)];
        let pairs = pairs(folder.path(), third, 40);
        let scale = LossScale::default().start(1_048_576.0).interval(3);
        let make = || match of_transformer {
            false => {
                let loss = contrastive(&pairs).symmetric(true);
                let options = options(PairLoss::Contrastive(loss)).recompute(true);
                let optimizer = options.optimizer.clone().loss_scale(Some(scale));
                let options = options.optimizer(optimizer).precision(Precision::Mixed);
                Trainer::distill(&gpu(), &encoder(), &options).unwrap()
            }
            true => {
                let options = options(pairs.loss()).micro_batches(2).recompute(true);
                Trainer::from_transformer(&gpu(), &model, LENGTH, &options).unwrap()
            }
        };
        let at = |name: &str| folder.path().join(format!("{name} {of_transformer}"));
        let mut whole = make();
        let expected = fit(&mut whole, &pairs, &at("whole"), u64::MAX);
        assert_eq!(expected.len(), 6);
        let mut first = make();
        let mut history = fit(&mut first, &pairs, &at("parts"), 1);
        assert!(first.steps() < 6);
        let latest = Trainer::latest_checkpoint(at("parts")).unwrap().unwrap();
        let mut second = make();
        second.resume(&Checkpoint::load(latest).unwrap()).unwrap();
        history.extend(fit(&mut second, &pairs, &at("parts"), u64::MAX));
        assert_eq!(history, expected, "{of_transformer}");
        assert!(bits(&second) == bits(&whole), "{of_transformer}");
        // A checkpoint of another loss.
        let other = match of_transformer {
            false => PairLoss::Contrastive(contrastive(&pairs)),
            true => PairLoss::Contrastive(Contrastive::default()),
        };
        let mut other = Trainer::distill(&gpu(), &encoder(), &options(other)).unwrap();
        let error = other.resume(&whole.checkpoint().unwrap()).unwrap_err();
        assert!(matches!(error, Error::Data { .. }), "{error}");
    }
}

#[test]
fn micro_batches_change_nothing_but_rounding() {
    let folder = tempfile::tempdir().unwrap();
    let pairs = pairs(folder.path(), Third::Score, 12);
    let mut model = transformer_model();
    // Other parts of a step draw other numbers.
    model.options.dropout = 0.0;
    let [whole, parts] = [1, 3].map(|micro_batches| {
        let options = options(pairs.loss()).micro_batches(micro_batches);
        let trainer = Trainer::from_transformer(&gpu(), &model, LENGTH, &options).unwrap();
        trainer.epoch(&mut batches(&pairs), |_| ()).unwrap();
        let session = trainer.session();
        session.get("encoder.layers.0.linear2.weight").unwrap()
    });
    for (a, b) in whole.iter().zip(&parts) {
        assert!((a - b).abs() < 1e-4, "{a} {b}");
    }
}

#[test]
fn a_transformer_is_tuned_and_saved() {
    let folder = tempfile::tempdir().unwrap();
    let pairs = pairs(folder.path(), Third::Nothing, 48);
    let model = transformer_model();
    let mut trainer =
        Trainer::from_transformer(&gpu(), &model, LENGTH, &options(pairs.loss())).unwrap();
    assert_eq!(trainer.transformer().unwrap().length, LENGTH);
    assert!(trainer.encoder().is_none() && trainer.model().is_err());
    let (train, validation) = pairs.split(ValidationSize::Count(8)).unwrap();
    let mut batches = Batches::training(train, 12, pairs.tokens(), 1).unwrap();
    let before = value(&trainer, &validation, "mrr");
    let options = FitOptions::new(4)
        .validation(Some(validation.clone()))
        .best_by(Some("mrr".into()));
    let quiet = |_: Event<'_>| ControlFlow::Continue(());
    let report = trainer.fit(&mut batches, &options, quiet).unwrap();
    let best = report.best.unwrap();
    assert!(best.value >= before, "{before} {}", best.value);
    trainer.set_weights(&best.weights).unwrap();
    assert!((value(&trainer, &validation, "mrr") - best.value).abs() < 1e-9);
    let tuned = trainer.transformer_model().unwrap();
    assert_eq!(tuned.options, model.options, "its own length, too");
    let dir = folder.path().join("tuned");
    tuned.save(&dir, WeightType::F32).unwrap();
    let again = TransformerModel::load(&dir).unwrap();
    for name in tuned.weights.names() {
        assert_eq!(again.weights.get(name), tuned.weights.get(name), "{name}");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let pairs = pairs(folder.path(), Third::Nothing, 12);
    let loss = contrastive(&pairs);
    let made = |options: TrainerOptions| Trainer::distill(&gpu(), &encoder(), &options);
    let of = |loss: Contrastive| options(PairLoss::Contrastive(loss));
    for (options, word) in [
        (of(loss.scale(0.0)), "a scale of 0"),
        (of(loss.scale(f32::NAN)), "a scale of NaN"),
        (of(loss).micro_batches(12), "one sample only"),
        (of(loss).info_nce(Some(InfoNce::new(1.0))), "info_nce"),
    ] {
        let error = made(options).unwrap_err().to_string();
        assert!(
            error.contains("pair_loss") && error.contains(word),
            "{error}"
        );
    }
    let decoder = energyflow::text::DecoderOptions::default().vocabulary(VOCABULARY);
    let error = Trainer::decode(&gpu(), &decoder, &of(loss)).unwrap_err();
    assert!(error.to_string().contains("there is a decoder"), "{error}");
    // Batches of texts that are not in pairs, and pairs of another kind.
    let mut trainer = made(of(loss)).unwrap();
    let quiet = |_: Event<'_>| ControlFlow::Continue(());
    let mut single = Batches::training(pairs.dataset().clone(), 12, LENGTH, 5).unwrap();
    let error = trainer.fit(&mut single, &FitOptions::new(1), quiet);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("12 of 10 tokens"), "{error}");
    let mut first = single;
    let error = trainer.step(first.next_batch().unwrap().unwrap(), 0);
    assert!(matches!(error, Err(Error::Data { .. })), "{error:?}");
    // A model with its weights goes on.
    let model: Model = trainer.model().unwrap();
    let further = Trainer::from_model(&gpu(), &model, &of(loss.symmetric(true))).unwrap();
    assert_eq!(further.model().unwrap().weights, model.weights);
}
