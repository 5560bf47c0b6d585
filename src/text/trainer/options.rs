//! What a training learns, and how.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::setters::setters;
use crate::text::Model;
use crate::train::AdamW;
use crate::types::Precision;

/// What a step trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum TrainingMode {
    /// The encoder, from the teacher's embeddings.
    A,
    /// The decoder, from the tokens of the text.
    B,
}

/// The z that mode B gives to the decoder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Condition {
    /// The teacher's embedding of the text: [`Batch::targets`](crate::text::Batch::targets).
    #[default]
    Teacher,
    /// The encoder's embedding of the text. No gradient flows through it: mode B does not change the encoder, except for a shared last
    /// block, whose gradient is that of the decoder alone.
    Student,
    /// The encoder's embedding of the text, and its gradient flows into the encoder: mode B trains the encoder, too.
    TrainedStudent,
}

/// A contrastive term of mode A, InfoNCE (van den Oord et al., arXiv:1807.03748): for each text, the cross entropy of the softmax over
/// cos(z, t)/temperature of all teacher's embeddings t of the step, whose right answer is its own. With micro-batches the other texts are
/// those of the same micro-batch.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct InfoNce {
    /// Weight of the term, at least 0.
    pub weight: f32,
    /// Temperature, at least 1e-4.
    pub temperature: f32,
}

impl InfoNce {
    /// With this weight and a temperature of 0.05.
    #[must_use]
    pub fn new(weight: f32) -> Self {
        Self {
            weight,
            temperature: 0.05,
        }
    }

    setters! {
        weight: f32,
        temperature: f32,
    }
}

/// What mode A learns from pairs of texts, instead of a teacher's embeddings. Cosines are those of the embeddings; a norm below 1e-6 counts
/// as that.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum PairLoss {
    /// An anchor is to be nearer to its own positive than to all other texts of the step.
    Contrastive(Contrastive),
    /// The cosine of the two texts of a pair is to be the pair's score, in [−1, 1]: the mean of (cosine − score)², as
    /// `CosineSimilarityLoss` of sentence-transformers.
    Cosine,
}

impl PairLoss {
    /// Number of texts per sample: 2, or 3 with a negative.
    #[must_use]
    pub fn texts(&self) -> usize {
        match self {
            Self::Contrastive(Contrastive {
                negatives: true, ..
            }) => 3,
            _ => 2,
        }
    }
}

/// A contrastive loss with in-batch negatives (Henderson et al., arXiv:1705.00652), as `MultipleNegativesRankingLoss` of
/// sentence-transformers: for each anchor, the cross entropy of the softmax over scale·cos(anchor, c), where c are the positives of all
/// samples of the step, and their negatives if they have some. The right answer is the anchor's own positive. With micro-batches, c are those
/// of the same micro-batch.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Contrastive {
    /// Factor of the cosines, the inverse of a temperature; positive.
    pub scale: f32,
    /// Whether a sample has a negative, a text that is meant to be far from the anchor. It is a candidate of every anchor of the step.
    pub negatives: bool,
    /// Whether a positive is to find its anchor among all anchors as well. The loss is then the mean of both directions.
    pub symmetric: bool,
}

impl Default for Contrastive {
    /// Scale 20, without negatives, in one direction.
    fn default() -> Self {
        Self {
            scale: 20.0,
            negatives: false,
            symmetric: false,
        }
    }
}

impl Contrastive {
    setters! {
        scale: f32,
        negatives: bool,
        symmetric: bool,
    }
}

/// How to train.
///
/// A batch is cut into `chunks`, each of which is an optimizer step. In joint training the first round(chunks·ab_ratio) of them are steps of
/// mode A, the others of mode B. A chunk is cut into `micro_batches`, whose gradients add up.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct TrainerOptions {
    /// Samples per batch, B.
    pub batch: usize,
    /// Number of optimizer steps per batch, each on B / chunks samples.
    pub chunks: usize,
    /// Number of parts of a step. Their gradients are computed one after the other and added up: less memory for the same step up to
    /// rounding.
    pub micro_batches: usize,
    /// Joint training: share of the chunks that are steps of mode A, in [0, 1].
    pub ab_ratio: f64,
    /// Joint training: whether the decoder's last block is the encoder's. It then has one set of weights and moments, and steps of both
    /// modes train it.
    pub shared_last_block: bool,
    /// Mode A: weight of 1 − cosine, at least 0.
    pub alpha: f32,
    /// Mode A: weight of the mean squared error, at least 0.
    pub beta: f32,
    /// Mode A: a contrastive term.
    pub info_nce: Option<InfoNce>,
    /// Mode A: learns from pairs of texts instead of the teacher's embeddings, as [`Pairs`](crate::text::Pairs) reads them. It then has none of
    /// the terms above, and the trainer has no decoder.
    #[serde(default)]
    pub pair_loss: Option<PairLoss>,
    /// Mode B: label smoothing in [0, 1), used only in training.
    pub smoothing: f32,
    /// Mode B: the z that the decoder is given.
    pub condition: Condition,
    /// Mode B: weight of the cycle term, 1 − cos(z′, z). z′ is the encoder's embedding of the decoder's text, where each token is the mean of
    /// the rows of the encoder's token table, weighted with its probability. The term trains what mode B trains. 0 leaves it out; it
    /// needs the encoder, and the matrix of logits in memory.
    pub cycle: f32,
    /// Optimizer; [`Precision::Mixed`] adds a default loss scale where none is set. In joint training the states of mode A are named
    /// NAME.a.step and so on, those of mode B NAME.b.step. Each mode counts its own steps, also for the schedule.
    pub optimizer: AdamW,
    /// Joint training: the optimizer of mode B, if it differs in more than its counters. Its `name` is not used.
    pub decoder_optimizer: Option<AdamW>,
    /// Element type in which activations are stored.
    pub precision: Precision,
    /// Seed of the parameters' initial values and of dropout.
    pub seed: u64,
    /// Whether the backward pass computes the values inside the blocks again, instead of keeping them: less memory, more time.
    pub recompute: bool,
    /// Parameters that are not trained, by name or prefix; see [`trainable`](crate::train::trainable).
    pub freeze: Vec<String>,
}

impl TrainerOptions {
    setters! {
        batch: usize,
        chunks: usize,
        micro_batches: usize,
        ab_ratio: f64,
        shared_last_block: bool,
        alpha: f32,
        beta: f32,
        info_nce: Option<InfoNce>,
        pair_loss: Option<PairLoss>,
        smoothing: f32,
        condition: Condition,
        cycle: f32,
        optimizer: AdamW,
        decoder_optimizer: Option<AdamW>,
        precision: Precision,
        seed: u64,
        recompute: bool,
        freeze: Vec<String>,
    }
}

impl Default for TrainerOptions {
    /// Batches of 64 in one step (joint training needs at least two chunks), half of the chunks in either mode, a shared last block, alpha
    /// and beta 1, no further terms, the teacher's z, AdamW with gradients clipped to 1, f32.
    fn default() -> Self {
        Self {
            batch: 64,
            chunks: 1,
            micro_batches: 1,
            ab_ratio: 0.5,
            shared_last_block: true,
            alpha: 1.0,
            beta: 1.0,
            info_nce: None,
            pair_loss: None,
            smoothing: 0.0,
            condition: Condition::Teacher,
            cycle: 0.0,
            optimizer: AdamW {
                clip: Some(1.0),
                ..AdamW::default()
            },
            decoder_optimizer: None,
            precision: Precision::F32,
            seed: 0,
            recompute: false,
            freeze: Vec::new(),
        }
    }
}

impl TrainerOptions {
    /// Samples per step.
    pub(super) fn step(&self) -> usize {
        self.batch / self.chunks
    }

    /// Checks the numbers, and returns how many chunks are steps of mode A. `encodes`: whether there is an encoder or a transformer.
    pub(super) fn check(&self, model: &Model, encodes: bool) -> Result<usize> {
        let fail = |field, reason: String| Err(Error::Config { field, reason });
        if self.batch == 0 {
            return fail("batch", "must be at least 1".into());
        }
        if self.chunks == 0 || !self.batch.is_multiple_of(self.chunks) {
            let (chunks, batch) = (self.chunks, self.batch);
            let reason = format!("is {chunks}, but must divide the batch of {batch}");
            return fail("chunks", reason);
        }
        let (micro, step) = (self.micro_batches, self.step());
        if micro == 0 || !step.is_multiple_of(micro) {
            let what = if self.chunks == 1 { "batch" } else { "chunk" };
            let reason = format!("is {micro}, but must divide the {what} of {step}");
            return fail("micro_batches", reason);
        }
        if !(0.0..1.0).contains(&self.smoothing) {
            let reason = format!("is {}, but must be in [0, 1)", self.smoothing);
            return fail("smoothing", reason);
        }
        let weights = [
            ("alpha", self.alpha),
            ("beta", self.beta),
            ("cycle", self.cycle),
        ];
        for (field, weight) in weights {
            if !weight.is_finite() || weight < 0.0 {
                return fail(field, format!("is {weight}, but must be finite and >= 0"));
            }
        }
        if let Some(InfoNce {
            weight,
            temperature,
        }) = self.info_nce
        {
            let sound = weight.is_finite() && weight >= 0.0;
            if !sound || !temperature.is_finite() || temperature < 1e-4 {
                let reason = "needs a finite weight >= 0 and a finite temperature >= 1e-4";
                return fail("info_nce", reason.into());
            }
        }
        self.check_pairs(model)?;
        let (Some(encoder), Some(decoder)) = (&model.encoder, &model.decoder) else {
            if self.condition != Condition::Teacher {
                return fail("condition", needs_encoder());
            }
            if self.cycle > 0.0 {
                return fail("cycle", needs_encoder());
            }
            return Ok(if encodes { self.chunks } else { 0 });
        };
        let same = [
            ("vocabulary", encoder.vocabulary, decoder.vocabulary),
            ("length", encoder.length, decoder.length),
            ("embedding", encoder.embedding, decoder.embedding),
        ];
        for (field, of_encoder, of_decoder) in same {
            if of_encoder != of_decoder {
                let reason =
                    format!("is {of_encoder} in the encoder, but {of_decoder} in the decoder");
                return fail(field, reason);
            }
        }
        if !(0.0..=1.0).contains(&self.ab_ratio) {
            let reason = format!("is {}, but must be in [0, 1]", self.ab_ratio);
            return fail("ab_ratio", reason);
        }
        let of_a = (self.chunks as f64 * self.ab_ratio).round() as usize;
        let never = match (of_a, self.ab_ratio) {
            (0, ratio) if ratio > 0.0 => "A",
            (of_a, ratio) if of_a == self.chunks && ratio < 1.0 => "B",
            _ => return Ok(of_a),
        };
        let reason = format!(
            "is {}, too few for an ab_ratio of {}: no chunk is a step of mode {never}",
            self.chunks, self.ab_ratio
        );
        fail("chunks", reason)
    }
}

impl TrainerOptions {
    /// Checks the loss of pairs.
    fn check_pairs(&self, model: &Model) -> Result<()> {
        let Some(loss) = self.pair_loss else {
            return Ok(());
        };
        let fail = |reason: String| {
            Err(Error::Config {
                field: "pair_loss",
                reason,
            })
        };
        if model.decoder.is_some() {
            return fail("trains an encoder, but there is a decoder, too".into());
        }
        if self.info_nce.is_some() {
            return fail("takes the place of info_nce, a term of the distillation".into());
        }
        let PairLoss::Contrastive(Contrastive {
            scale, negatives, ..
        }) = loss
        else {
            return Ok(());
        };
        if !scale.is_finite() || scale <= 0.0 {
            return fail(format!("has a scale of {scale}, which must be positive"));
        }
        let pairs = self.step() / self.micro_batches;
        match pairs == 1 && !negatives {
            true => fail(format!(
                "compares the samples of a step with each other, but each of {} micro-batches has one sample only",
                self.micro_batches
            )),
            false => Ok(()),
        }
    }
}

fn needs_encoder() -> String {
    "needs an encoder beside the decoder; use Trainer::joint, with an ab_ratio of 0 to train the decoder only".into()
}
