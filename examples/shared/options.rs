//! The options of a training.

use std::error::Error;
use std::path::PathBuf;
use std::time::Instant;

use clap::ValueEnum;
use energyflow::text::{Batches, Precision, Trainer, TrainerOptions, TrainingMode};
use energyflow::train::{AdamW, LossScale, Schedule};

type Outcome<T> = Result<T, Box<dyn Error>>;

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum Storage {
    F32,
    F16,
}

/// Storage of the weights of a model.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Weights {
    F32,
    F16,
    Int8,
}

/// How to train.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Training")]
pub struct Training {
    /// Passes over the training data
    #[arg(long, value_name = "N", default_value_t = 6)]
    pub epochs: u32,
    /// Highest learning rate
    #[arg(long, value_name = "RATE", default_value_t = 4e-3)]
    pub learning_rate: f32,
    /// Steps until the learning rate is at its highest
    #[arg(long, value_name = "STEPS", default_value_t = 100)]
    warmup: u32,
    /// Samples per batch
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub batch: usize,
    /// Split every step into this many parts whose gradients are added up, to save memory
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub micro_batches: usize,
    /// Decoupled weight decay
    #[arg(long, value_name = "RATE", default_value_t = 0.01)]
    weight_decay: f32,
    /// First loss scale of f16 training
    #[arg(long, value_name = "SCALE", default_value_t = LossScale::default().start)]
    loss_scale: f32,
    /// Seed of the parameters and of the order of the samples
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Storage of activations in training; sums and master weights are f32
    #[arg(long, value_enum, default_value = "f32")]
    pub precision: Storage,
    /// Share of the elements that the blocks drop in training
    #[arg(long, value_name = "RATE", default_value_t = 0.0)]
    pub dropout: f32,
    /// Compute the values inside the blocks again for the backward pass, to save memory
    #[arg(long)]
    recompute: bool,
    /// Leave these parameters as they are: names or prefixes such as embedding or blocks.0
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    freeze: Vec<String>,
    /// Print what the adapter offers, the memory plan and the kernels
    #[arg(long)]
    show: bool,
    /// Time every kernel of the training steps on the GPU
    #[arg(long)]
    profile: bool,
}

/// When to validate and save, and where.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Validation, checkpoints, output")]
pub struct Output {
    /// Folder for the model, the checkpoints, the figures of all steps and their curves
    #[arg(long, value_name = "FOLDER", default_value = "out")]
    pub out: PathBuf,
    /// Storage of the model's weights
    #[arg(long, value_enum, default_value = "f32")]
    pub weights: Weights,
    /// Validate after every N steps instead of after every epoch
    #[arg(long, value_name = "N")]
    pub validate_every: Option<u64>,
    /// Keep the model that is best by this figure of the validation: cosine, precision_at_1, perplexity, accuracy, …
    #[arg(long, value_name = "FIGURE")]
    pub best_by: Option<String>,
    /// Stop when the figure has not become better in N validations
    #[arg(long, value_name = "N", requires = "best_by")]
    pub patience: Option<u64>,
    /// Save a checkpoint after every N steps instead of after every epoch
    #[arg(long, value_name = "N")]
    pub checkpoint_every: Option<u64>,
    /// Number of checkpoints to keep
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub keep: usize,
    /// Go on from the newest checkpoint in the folder. Give the same options as before
    #[arg(long)]
    pub resume: bool,
}

impl Training {
    /// The options that all modes share, with `chunks` steps per batch.
    pub fn options(&self, batches: &Batches, chunks: usize) -> Outcome<TrainerOptions> {
        if self.epochs == 0 {
            return Err("nothing to do: no epochs".into());
        }
        Ok(TrainerOptions::default()
            .batch(self.batch)
            .chunks(chunks)
            .micro_batches(self.micro_batches)
            .optimizer(self.optimizer(batches, chunks, self.learning_rate)?)
            .precision(match self.precision {
                Storage::F32 => Precision::F32,
                Storage::F16 => Precision::Mixed,
            })
            .seed(self.seed)
            .recompute(self.recompute)
            .freeze(self.freeze.clone()))
    }

    /// The optimizer of a mode with so many steps per batch, and this highest learning rate.
    pub fn optimizer(
        &self,
        batches: &Batches,
        steps_per_batch: usize,
        learning_rate: f32,
    ) -> Outcome<AdamW> {
        let per_epoch = u32::try_from(batches.per_epoch() * steps_per_batch).ok();
        let steps = per_epoch.and_then(|per_epoch| self.epochs.checked_mul(per_epoch));
        let steps = steps
            .ok_or("too many steps: fewer --epochs, fewer --samples or larger batches (--batch)")?;
        Ok(AdamW::default()
            .schedule(Schedule::WarmupCosine {
                peak: learning_rate,
                end: 1e-5_f32.min(learning_rate),
                warmup: self.warmup.min(steps / 2),
                total: steps.max(1),
            })
            .clip(Some(1.0))
            .weight_decay(self.weight_decay)
            .loss_scale(match self.precision {
                Storage::F32 => None,
                Storage::F16 => Some(LossScale::default().start(self.loss_scale)),
            }))
    }

    /// Says what was compiled.
    pub fn describe(&self, trainer: &Trainer, start: Instant) {
        let parameters = trainer.session().parameters();
        let count: usize = parameters
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum();
        println!(
            "network {:.2} million parameters, compiled in {:.1} s",
            count as f64 / 1e6,
            start.elapsed().as_secs_f64()
        );
        for (mode, name) in MODES {
            if let Some(step) = trainer.training_step(mode) {
                println!("step    {name}: {}", step.plan());
                if self.show {
                    println!("{}\n{step}", trainer.session().gpu().report());
                }
            }
        }
    }

    /// Times the kernels of the steps, if that is asked for.
    pub fn profile(&self, trainer: &Trainer) -> Outcome<()> {
        for (mode, name) in MODES {
            let Some(step) = trainer.training_step(mode).filter(|_| self.profile) else {
                continue;
            };
            println!(
                "kernels of a step of {name}: {}",
                step.profile()?.measured()
            );
        }
        Ok(())
    }
}

/// The modes and their names.
pub const MODES: [(TrainingMode, &str); 2] =
    [(TrainingMode::A, "mode A"), (TrainingMode::B, "mode B")];
