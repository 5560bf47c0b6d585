//! Training and evaluation on pairs of texts.

use std::collections::HashMap;

use super::options::{Contrastive, PairLoss};
use super::step::Whole;
use super::{Trainer, TrainerOptions};
use crate::error::Result;
use crate::runtime::Host;
use crate::text::{Batches, Dataset, metrics};

/// The score of a text that is no candidate: its share of the softmax is 0.
const NEVER: f32 = -1e30;

/// What a step on pairs is given beside tokens and scores. It is the same for every micro-batch, and so for every step.
#[derive(Debug)]
pub(super) struct Labels {
    loss: PairLoss,
    /// The number of each sample's positive among the texts of its micro-batch.
    positives: Vec<u32>,
    /// Added to the score of each text: 0 for positives and negatives, [`NEVER`] for anchors.
    candidates: Vec<f32>,
    /// The number of each positive's sample in its micro-batch; for texts that are no positives, the number of samples in a micro-batch.
    anchors: Vec<u32>,
}

impl Labels {
    /// For batches of options that are checked.
    pub fn new(options: &TrainerOptions) -> Option<Self> {
        let loss = options.pair_loss?;
        let (each, part) = (loss.texts(), options.step() / options.micro_batches);
        let sample = |i: usize| i % part;
        let positives = (0..options.step()).map(|i| (sample(i) * each + 1) as u32);
        let candidates = (0..options.step() * each).map(|text| match text % each {
            0 => NEVER,
            _ => 0.0,
        });
        let anchors = (0..options.step() * each).map(|text| match text % each {
            1 => sample(text / each) as u32,
            _ => part as u32,
        });
        Some(Self {
            loss,
            positives: positives.collect(),
            candidates: candidates.collect(),
            anchors: anchors.collect(),
        })
    }

    /// Runs `submit` with the inputs of a step. `scores` are those of its samples.
    pub fn with<R>(
        &self,
        [ids, mask]: [Whole<'_>; 2],
        scores: &[f32],
        submit: impl FnOnce(&[Whole<'_>]) -> R,
    ) -> R {
        let each = self.loss.texts();
        let labels = ("labels", Host::from(&self.positives), 1);
        let candidates = ("candidates", Host::from(&self.candidates), each);
        match self.loss {
            PairLoss::Cosine => submit(&[ids, mask, ("score", Host::from(scores), 1)]),
            PairLoss::Contrastive(Contrastive {
                symmetric: false, ..
            }) => submit(&[ids, mask, labels, candidates]),
            PairLoss::Contrastive(_) => {
                let anchors = ("anchors", Host::from(&self.anchors), each);
                submit(&[ids, mask, labels, candidates, anchors])
            }
        }
    }
}

/// How well an encoder does on pairs of texts.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum PairScores {
    /// Of anchors, each with its positive: how well it is found among all different positives and negatives of the dataset.
    #[non_exhaustive]
    Retrieval {
        /// Mean cosine of an anchor and its positive.
        cosine: f64,
        /// Share of anchors whose own positive is the nearest candidate. Other candidates that are equally near count as nearer.
        accuracy_at_1: f64,
        /// Share of anchors whose own positive is among the ten nearest candidates.
        accuracy_at_10: f64,
        /// Mean reciprocal rank of the own positive.
        mrr: f64,
    },
    /// Of pairs with a score: how well the cosine agrees with it.
    #[non_exhaustive]
    Similarity {
        /// Mean cosine of the two texts of a pair.
        cosine: f64,
        /// Mean of (cosine − score)².
        mse: f64,
        /// Spearman's rank correlation of cosines and scores; NaN where one side is constant.
        spearman: f64,
        /// Pearson's correlation of cosines and scores; NaN where one side is constant.
        pearson: f64,
    },
}

impl PairScores {
    /// All figures by name.
    pub(super) fn values(&self) -> [(&'static str, f64); 4] {
        match *self {
            Self::Retrieval {
                cosine,
                accuracy_at_1,
                accuracy_at_10,
                mrr,
            } => [
                ("cosine", cosine),
                ("accuracy_at_1", accuracy_at_1),
                ("accuracy_at_10", accuracy_at_10),
                ("mrr", mrr),
            ],
            Self::Similarity {
                cosine,
                mse,
                spearman,
                pearson,
            } => [
                ("cosine", cosine),
                ("mse", mse),
                ("spearman", spearman),
                ("pearson", pearson),
            ],
        }
    }
}

impl Trainer {
    /// Embeds all texts of a dataset of pairs.
    pub(super) fn evaluate_pairs(&self, dataset: &Dataset, loss: PairLoss) -> Result<PairScores> {
        let ([length, width], [tokens, _]) = (self.sizes(), self.sample());
        let mut batches = Batches::evaluation(dataset.clone(), self.options.batch, tokens)?
            .padding(self.padding());
        let mut anchors = Vec::with_capacity(dataset.len() * width);
        // Equal texts are one candidate.
        let mut numbers: HashMap<Vec<u32>, usize> = HashMap::new();
        let mut candidates = Vec::with_capacity(dataset.len() * width);
        let (mut own, mut scores) = (Vec::new(), Vec::new());
        while let Some(batch) = batches.next_batch()? {
            let z = self.forward(&batch.ids, &batch.mask)?;
            let texts = batch.ids.chunks_exact(length);
            let texts = texts.zip(batch.mask.chunks_exact(length));
            let texts = texts.zip(z.chunks_exact(width));
            let of_sample = loss.texts();
            for (i, ((ids, mask), z)) in texts.take(batch.valid * of_sample).enumerate() {
                if i % of_sample == 0 {
                    anchors.extend_from_slice(z);
                    continue;
                }
                let counted = ids.iter().zip(mask).filter(|(_, mask)| **mask != 0.0);
                let key = counted.map(|(id, _)| *id).collect();
                let next = numbers.len();
                let number = *numbers.entry(key).or_insert(next);
                if number == next {
                    candidates.extend_from_slice(z);
                }
                if i % of_sample == 1 {
                    own.push(number);
                }
            }
            scores.extend_from_slice(&batch.targets[..batch.valid]);
        }
        let cosines: Vec<f64> = anchors
            .chunks_exact(width)
            .zip(&own)
            .map(|(anchor, own)| metrics::cosine(anchor, &candidates[own * width..][..width]))
            .collect();
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        let cosine = mean(&cosines);
        Ok(match loss {
            PairLoss::Cosine => {
                let scores: Vec<f64> = scores.into_iter().map(f64::from).collect();
                let differences = cosines.iter().zip(&scores);
                let squares: Vec<f64> = differences.map(|(a, b)| (a - b) * (a - b)).collect();
                PairScores::Similarity {
                    cosine,
                    mse: mean(&squares),
                    spearman: metrics::spearman(&cosines, &scores)?,
                    pearson: metrics::pearson(&cosines, &scores)?,
                }
            }
            PairLoss::Contrastive(_) => {
                let ranks = metrics::ranks_among(&anchors, &candidates, &own, width)?;
                let reciprocal: Vec<f64> =
                    ranks.iter().map(|&rank| 1.0 / (rank + 1) as f64).collect();
                PairScores::Retrieval {
                    cosine,
                    accuracy_at_1: metrics::precision_at(&ranks, 1),
                    accuracy_at_10: metrics::precision_at(&ranks, 10),
                    mrr: mean(&reciprocal),
                }
            }
        })
    }
}
