//! How well a model does on a dataset.

use std::collections::BTreeMap;

use super::{Condition, PairScores, Trainer};
use crate::error::{Error, Result};
use crate::runtime::Host;
use crate::text::{Batches, Dataset, metrics, next_tokens};

/// How well encoder and decoder do on a dataset.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Evaluation {
    /// Of the encoder, if there is one, beside a teacher.
    pub encoder: Option<EncoderScores>,
    /// Of the encoder on pairs of texts, if it learns from pairs.
    pub pairs: Option<PairScores>,
    /// Of the decoder, if there is one.
    pub decoder: Option<DecoderScores>,
    /// Further figures by name. [`Event::Validation`](super::Event::Validation) lets the caller add some, such as the quality of
    /// generated texts.
    pub more: BTreeMap<String, f64>,
}

/// How well an encoder imitates its teacher on a dataset.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct EncoderScores {
    /// Mean cosine to the teacher.
    pub cosine: f64,
    /// Mean squared error.
    pub mse: f64,
    /// Share of texts whose own teacher embedding is the nearest of all teacher embeddings.
    pub precision_at_1: f64,
    /// Share of texts whose own teacher embedding is among the five nearest.
    pub precision_at_5: f64,
    /// Mean share of the ten nearest other texts that are the ten nearest by the teacher's embeddings, too, among the first
    /// [`EncoderScores::COMPARED`] texts; NaN for a single text.
    pub overlap_at_10: f64,
    /// Spearman's rank correlation of the cosines of all pairs of these texts with those of the teacher.
    pub spearman: f64,
    /// The embeddings [n, E].
    pub embeddings: Vec<f32>,
}

/// How well a decoder predicts the texts of a dataset, each given its z.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct DecoderScores {
    /// Mean cross entropy over all targets that count, without smoothing.
    pub cross_entropy: f64,
    /// Share of the targets that count whose token is the most probable one.
    pub accuracy: f64,
    /// Number of those targets.
    pub tokens: u64,
}

impl EncoderScores {
    /// Upper bound on the number of texts that are compared in pairs.
    pub const COMPARED: usize = 2000;
}

impl DecoderScores {
    /// e to the power of the cross entropy.
    #[must_use]
    pub fn perplexity(&self) -> f64 {
        self.cross_entropy.exp()
    }
}

impl Evaluation {
    /// All figures by name: cosine, mse, precision_at_1, precision_at_5, overlap_at_10, spearman; of pairs cosine, accuracy_at_1,
    /// accuracy_at_10, mrr, or cosine, mse, spearman, pearson; cross_entropy, perplexity, accuracy; and those of [`Evaluation::more`].
    pub fn values(&self) -> impl Iterator<Item = (&str, f64)> {
        let encoder = self.encoder.iter().flat_map(|scores| {
            [
                ("cosine", scores.cosine),
                ("mse", scores.mse),
                ("precision_at_1", scores.precision_at_1),
                ("precision_at_5", scores.precision_at_5),
                ("overlap_at_10", scores.overlap_at_10),
                ("spearman", scores.spearman),
            ]
        });
        let decoder = self.decoder.iter().flat_map(|scores| {
            [
                ("cross_entropy", scores.cross_entropy),
                ("perplexity", scores.perplexity()),
                ("accuracy", scores.accuracy),
            ]
        });
        let more = self
            .more
            .iter()
            .map(|(name, &value)| (name.as_str(), value));
        let pairs = self.pairs.iter().flat_map(PairScores::values);
        let pairs = pairs.map(|(name, value): (&str, f64)| (name, value));
        encoder.chain(pairs).chain(decoder).chain(more)
    }

    /// The figure of a name, if there is one.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<f64> {
        let mut values = self.values();
        values.find(|(own, _)| *own == name).map(|(_, value)| value)
    }
}

impl Trainer {
    /// The embeddings [n, E] of `n` tokenised texts; longer texts are cut to L at the end, and so lose the token that ends them.
    ///
    /// # Errors
    /// [`Error::Config`] without an encoder; [`Error::Data`] for a text without tokens or an id outside the vocabulary;
    /// [`Error::DeviceLost`].
    pub fn embed(&self, texts: &[impl AsRef<[u32]>]) -> Result<Vec<f32>> {
        let [length, width] = self.sizes();
        let batch = self.sample()[0] / length * self.options.batch;
        let padding = self.padding();
        let mut embeddings = Vec::with_capacity(texts.len() * width);
        for (number, chunk) in texts.chunks(batch).enumerate() {
            let mut ids = vec![padding; batch * length];
            let mut mask = vec![0.0; batch * length];
            for (i, text) in chunk.iter().enumerate() {
                let text = text.as_ref();
                if text.is_empty() {
                    return Err(Error::Data {
                        name: "ids".into(),
                        reason: format!("text {} has no tokens", number * batch + i),
                    });
                }
                let used = text.len().min(length);
                ids[i * length..][..used].copy_from_slice(&text[..used]);
                mask[i * length..][..used].fill(1.0);
            }
            let z = self.forward(&ids, &mask)?;
            embeddings.extend_from_slice(&z[..chunk.len() * width]);
        }
        Ok(embeddings)
    }

    /// Compares the embeddings of a dataset's texts with their teacher's, and the decoder's predictions with the texts. The decoder is
    /// given the z that it is trained with: the teacher's, or the encoder's. Long texts are cut as by [`Batches`]. With a
    /// [`PairLoss`](super::PairLoss), compares the embeddings of the texts of each sample with each other.
    ///
    /// # Errors
    /// [`Error::Config`] when the dataset has another embedding width; [`Error::Data`] for an id outside the vocabulary, and for a decoder
    /// where no target of the dataset counts; [`Error::DeviceLost`].
    pub fn evaluate(&self, dataset: &Dataset) -> Result<Evaluation> {
        let [_, width] = self.sample();
        if dataset.width() != width {
            return Err(Error::Config {
                field: "embedding",
                reason: format!(
                    "is {width}, but the embeddings of {} have {} values",
                    dataset.path().display(),
                    dataset.width()
                ),
            });
        }
        if let Some(loss) = self.options.pair_loss {
            return Ok(Evaluation {
                pairs: Some(self.evaluate_pairs(dataset, loss)?),
                ..Evaluation::default()
            });
        }
        let encoder = match self.embed {
            Some(_) => Some(self.evaluate_encoder(dataset, width)?),
            None => None,
        };
        let z = encoder.as_ref().map(|scores| scores.embeddings.as_slice());
        let z = z.filter(|_| self.options.condition != Condition::Teacher);
        let decoder = match self.score {
            Some(_) => Some(self.evaluate_decoder(dataset, z)?),
            None => None,
        };
        Ok(Evaluation {
            encoder,
            decoder,
            ..Evaluation::default()
        })
    }

    fn evaluate_encoder(&self, dataset: &Dataset, width: usize) -> Result<EncoderScores> {
        let (batch, [length, _]) = (self.options.batch, self.sizes());
        let mut batches =
            Batches::evaluation(dataset.clone(), batch, length)?.padding(self.padding());
        let mut embeddings = Vec::with_capacity(dataset.len() * width);
        let mut targets = Vec::with_capacity(dataset.len() * width);
        while let Some(batch) = batches.next_batch()? {
            let z = self.forward(&batch.ids, &batch.mask)?;
            embeddings.extend_from_slice(&z[..batch.valid * width]);
            targets.extend_from_slice(&batch.targets[..batch.valid * width]);
        }
        // Their cost and memory grow with the square of the texts.
        let compared = dataset.len().min(EncoderScores::COMPARED);
        let [own, teacher] = [&embeddings, &targets].map(|all| &all[..compared * width]);
        let (overlap_at_10, spearman) = match compared {
            0 | 1 => (f64::NAN, f64::NAN),
            _ => (
                metrics::neighbor_overlap(own, teacher, width, 10)?,
                metrics::similarity_correlation(own, teacher, width)?,
            ),
        };
        let ranks = metrics::retrieval_ranks(&embeddings, &targets, width)?;
        Ok(EncoderScores {
            cosine: metrics::mean_cosine(&embeddings, &targets, width)?,
            mse: metrics::mean_squared_error(&embeddings, &targets, width)?,
            precision_at_1: metrics::precision_at(&ranks, 1),
            precision_at_5: metrics::precision_at(&ranks, 5),
            overlap_at_10,
            spearman,
            embeddings,
        })
    }

    /// `student` [n, E] takes the place of the teacher's embeddings.
    fn evaluate_decoder(
        &self,
        dataset: &Dataset,
        student: Option<&[f32]>,
    ) -> Result<DecoderScores> {
        let (Some(score), Some(decoder)) = (&self.score, &self.model.decoder) else {
            return Err(missing("decoder"));
        };
        let (size, length, width) = (self.scored, decoder.length, decoder.embedding);
        let ignored = decoder.ignored_target();
        let mut batches =
            Batches::evaluation(dataset.clone(), size, length)?.padding(self.padding());
        let mut targets = vec![ignored; size * length];
        let mut best = vec![0.0; size * length];
        let mut z = vec![0.0; size * width];
        let (mut sum, mut tokens, mut right) = (0.0, 0.0, 0_u64);
        let mut rest = student;
        while let Some(batch) = batches.next_batch()? {
            next_tokens(&batch.ids, &batch.mask, length, ignored, &mut targets)?;
            // What fills up the last batch does not count.
            targets[batch.valid * length..].fill(ignored);
            z.copy_from_slice(&batch.targets);
            if let Some(student) = rest {
                let (own, others) = student.split_at(batch.valid * width);
                z[..own.len()].copy_from_slice(own);
                rest = Some(others);
            }
            let inputs = [
                ("ids", Host::from(&batch.ids)),
                ("mask", Host::from(&batch.mask)),
                ("z", Host::from(&z)),
                ("targets", Host::from(&targets)),
            ];
            let outputs = score.run(&inputs)?.wait()?;
            let count = f64::from(outputs.scalar("tokens")?);
            sum += count * f64::from(outputs.scalar("loss")?);
            tokens += count;
            outputs.get_into("best", &mut best)?;
            let hits = best.iter().zip(&targets);
            right += hits
                .filter(|&(&best, &target)| best as u32 == target)
                .count() as u64;
        }
        if tokens == 0.0 {
            return Err(Error::Data {
                name: "targets".into(),
                reason: "no text has a token that counts after another that counts".into(),
            });
        }
        Ok(DecoderScores {
            cross_entropy: sum / tokens,
            accuracy: right as f64 / tokens,
            tokens: tokens as u64,
        })
    }

    pub(super) fn forward(&self, ids: &[u32], mask: &[f32]) -> Result<Vec<f32>> {
        let Some(embed) = &self.embed else {
            return Err(missing("encoder"));
        };
        let inputs = [("ids", Host::from(ids)), ("mask", Host::from(mask))];
        embed.run(&inputs)?.wait()?.get("z")
    }

    pub(super) fn padding(&self) -> u32 {
        let encoder = self.model.encoder.as_ref().map(|encoder| encoder.padding);
        let decoder = self.model.decoder.as_ref().map(|decoder| decoder.padding);
        let transformer = self.transformer().map(|transformer| transformer.padding);
        encoder.or(transformer).or(decoder).flatten().unwrap_or(0)
    }
}

fn missing(field: &'static str) -> Error {
    Error::Config {
        field,
        reason: "is missing: this trainer has none".into(),
    }
}
