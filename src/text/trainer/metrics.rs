//! What a step reports.

use super::options::TrainingMode;
use super::step::Step;
use crate::error::Result;
use crate::runtime::Outputs;
use crate::train::StepOutputs;

/// What one optimizer step reports. What its mode does not have is 0.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Metrics {
    /// What the step trained.
    pub mode: TrainingMode,
    /// What the step made smaller, with all its terms. Mode A: alpha·(1 − cosine) + beta·mse + weight·InfoNCE, or the
    /// [`PairLoss`](super::PairLoss); mode B: cross entropy + cycle·(1 − cycle cosine).
    pub loss: f32,
    /// Mode A: mean cosine to the teacher; of pairs, mean cosine of the two texts, or of anchor and positive.
    pub cosine: f32,
    /// Mode A: mean squared error; of pairs with scores, that of the cosines; of other pairs 0.
    pub mse: f32,
    /// Mode A: the contrastive term before its weight; 0 without it.
    pub info_nce: f32,
    /// Mode B: mean cross entropy of the next tokens, with the smoothing of the training.
    pub cross_entropy: f32,
    /// Mode B: mean cosine of z and the embedding of the decoder's text; 0 without the cycle term.
    pub cycle: f32,
    /// Mode B: number of targets that counted.
    pub tokens: f32,
    /// Global norm of the gradients before clipping; not finite when the step was skipped.
    pub gradient_norm: f32,
    /// Learning rate of this step.
    pub learning_rate: f32,
    /// Loss scale of this step; 1 without loss scaling.
    pub loss_scale: f32,
    /// Number of steps of this mode skipped so far.
    pub skipped: f32,
}

/// Upper bound on the metrics of a step that are means.
const MOST: usize = 4;

impl Metrics {
    pub(super) fn new(mode: TrainingMode, step: &Step, outputs: &Outputs) -> Result<Self> {
        let mut metrics = Self {
            mode,
            loss: 0.0,
            cosine: 0.0,
            mse: 0.0,
            info_nce: 0.0,
            cross_entropy: 0.0,
            cycle: 0.0,
            tokens: 0.0,
            gradient_norm: outputs.scalar(StepOutputs::GRADIENT_NORM)?,
            learning_rate: outputs.scalar(StepOutputs::LEARNING_RATE)?,
            loss_scale: outputs.scalar(StepOutputs::LOSS_SCALE)?,
            skipped: outputs.scalar(StepOutputs::SKIPPED)?,
        };
        // Means over micro-batches are one output.
        let means = outputs.contains(StepOutputs::METRICS);
        let mut values = [0.0; MOST];
        if means {
            let values = &mut values[..step.metrics.len()];
            outputs.get_into(StepOutputs::METRICS, values)?;
            if mode == TrainingMode::B {
                metrics.tokens = outputs.scalar(StepOutputs::WEIGHT)?;
            }
        }
        for (i, &name) in step.metrics.iter().enumerate() {
            let value = if means {
                values[i]
            } else {
                outputs.scalar(name)?
            };
            match name {
                "cosine" => metrics.cosine = value,
                "mse" => metrics.mse = value,
                "info_nce" => metrics.info_nce = value,
                "cross_entropy" => metrics.cross_entropy = value,
                "cycle" => metrics.cycle = value,
                "tokens" => metrics.tokens = value,
                _ => metrics.loss = value,
            }
        }
        Ok(metrics)
    }

    /// What the mode has, by name.
    pub fn values(&self) -> impl Iterator<Item = (&'static str, f64)> {
        let of_a = [
            ("cosine", self.cosine),
            ("mse", self.mse),
            ("info_nce", self.info_nce),
        ];
        let of_b = [
            ("cross_entropy", self.cross_entropy),
            ("cycle", self.cycle),
            ("tokens", self.tokens),
        ];
        let of_mode = match self.mode {
            TrainingMode::A => of_a,
            TrainingMode::B => of_b,
        };
        let always = [
            ("gradient_norm", self.gradient_norm),
            ("learning_rate", self.learning_rate),
            ("loss_scale", self.loss_scale),
            ("skipped", self.skipped),
        ];
        let all = [("loss", self.loss)].into_iter().chain(of_mode);
        all.chain(always).map(|(name, x)| (name, f64::from(x)))
    }
}
