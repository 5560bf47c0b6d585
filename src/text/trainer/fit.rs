//! A whole training: epochs, validation, early stop, checkpoints.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use super::progress::{checkpoint_path, checkpoints};
use super::{Evaluation, Metrics, PendingStep, Trainer};
use crate::error::{Error, Result};
use crate::runtime::Executable;
use crate::setters::setters;
use crate::text::{Batches, Dataset};
use crate::train::{WeightType, Weights};

/// What [`Trainer::fit`] does besides training.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct FitOptions {
    /// Passes over the data, those before a checkpoint included.
    pub epochs: u64,
    /// Data of the validation. Without them there is none.
    pub validation: Option<Dataset>,
    /// Validates after every so many steps; `None`: after every epoch. It happens between batches.
    pub validate_every: Option<u64>,
    /// The figure of [`Evaluation::values`] by which the best model is chosen and the training stopped early: `cosine`, `perplexity` or
    /// another, also one that the caller adds. Of `mse`, `cross_entropy` and `perplexity` less is better, of all others more. A training that
    /// goes on with another figure than before a checkpoint looks for the best model anew.
    pub best_by: Option<String>,
    /// Stops when so many validations in a row have not been better than the best one before.
    pub patience: Option<u64>,
    /// Folder for checkpoints, `checkpoint-STEP.safetensors`, and for the weights of the best model, `best.safetensors`. It is made if it
    /// is missing. It is for one training: checkpoints with more steps than the training has done are an error, and are never removed.
    pub checkpoints: Option<PathBuf>,
    /// Saves a checkpoint after every so many steps; `None`: after every epoch. It happens between batches. There is one more when the
    /// training ends or is cancelled.
    pub checkpoint_every: Option<u64>,
    /// Number of checkpoints that are kept, the newest ones; at least 1.
    pub keep: usize,
}

impl FitOptions {
    /// So many epochs, without validation and checkpoints. Of checkpoints, three are kept.
    #[must_use]
    pub fn new(epochs: u64) -> Self {
        Self {
            epochs,
            validation: None,
            validate_every: None,
            best_by: None,
            patience: None,
            checkpoints: None,
            checkpoint_every: None,
            keep: 3,
        }
    }

    setters! {
        epochs: u64,
        validation: Option<Dataset>,
        validate_every: Option<u64>,
        best_by: Option<String>,
        patience: Option<u64>,
        checkpoints: Option<PathBuf>,
        checkpoint_every: Option<u64>,
        keep: usize,
    }

    fn check(&self) -> Result<()> {
        let fail = |field, reason: &str| {
            Err(Error::Config {
                field,
                reason: reason.into(),
            })
        };
        let never = [
            ("validate_every", self.validate_every),
            ("checkpoint_every", self.checkpoint_every),
            ("patience", self.patience),
        ];
        if let Some((field, _)) = never.into_iter().find(|(_, every)| *every == Some(0)) {
            return fail(field, "must be at least 1");
        }
        if self.keep == 0 {
            return fail("keep", "must be at least 1");
        }
        if self.best_by.is_some() && self.validation.is_none() {
            return fail("best_by", "needs validation data");
        }
        if self.patience.is_some() && self.best_by.is_none() {
            return fail("patience", "needs a figure to watch: set best_by");
        }
        Ok(())
    }
}

/// What [`Trainer::fit`] tells its caller.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A step is done.
    Step {
        /// The training.
        trainer: &'a Trainer,
        /// Number of the step from 1 on.
        step: u64,
        /// Its metrics.
        metrics: &'a Metrics,
    },
    /// An epoch is done.
    Epoch {
        /// The training.
        trainer: &'a Trainer,
        /// Number of the epoch from 1 on.
        epoch: u64,
    },
    /// A validation is done. The caller may add figures to [`Evaluation::more`], such as the quality of generated texts; [`Trainer::model`]
    /// gives the present model.
    Validation {
        /// The training.
        trainer: &'a Trainer,
        /// Steps so far.
        step: u64,
        /// The figures.
        evaluation: &'a mut Evaluation,
    },
    /// A checkpoint is saved when the callback returns. All steps before it were reported.
    Checkpoint {
        /// The training.
        trainer: &'a Trainer,
        /// The file.
        path: &'a Path,
    },
}

/// Why a training has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stop {
    /// All epochs are done.
    Finished,
    /// The validation has not become better for too long: [`FitOptions::patience`].
    Early,
    /// The callback has returned [`ControlFlow::Break`].
    Cancelled,
}

/// The best model of a training.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Best {
    /// The figure that it was chosen by.
    pub value: f64,
    /// Steps until then.
    pub step: u64,
    /// Its weights. [`Trainer::set_weights`] takes them.
    pub weights: Weights,
}

/// How a training has ended.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct FitReport {
    /// Why.
    pub stop: Stop,
    /// The best model by [`FitOptions::best_by`].
    pub best: Option<Best>,
    /// The checkpoint that was saved last.
    pub checkpoint: Option<PathBuf>,
}

/// Steps that are under way.
#[derive(Default)]
pub(super) struct Flight {
    pending: VecDeque<PendingStep>,
}

impl Flight {
    pub fn push(&mut self, step: PendingStep) {
        self.pending.push_back(step);
    }

    /// Waits for the oldest step.
    pub fn land(&mut self, trainer: &Trainer) -> Result<Option<Metrics>> {
        self.pending
            .pop_front()
            .map(|step| trainer.wait(step))
            .transpose()
    }

    /// Waits for the oldest step if as many are under way as there may be.
    pub fn make_room(&mut self, trainer: &Trainer) -> Result<Option<Metrics>> {
        match self.pending.len() < Executable::IN_FLIGHT {
            true => Ok(None),
            false => self.land(trainer),
        }
    }
}

impl Trainer {
    /// Trains until all epochs are done, from where the training is: at the beginning, or where [`Trainer::resume`] has put it.
    ///
    /// `watch` hears of every step, epoch, validation and checkpoint. When it returns [`ControlFlow::Break`], the batch at hand is finished,
    /// a checkpoint saved if there is a folder for it, and the training ends. Steps are reported up to [`Executable::IN_FLIGHT`] steps after
    /// they were submitted, but before any validation or checkpoint that comes after them.
    ///
    /// # Errors
    /// [`Error::Config`] for options out of range, batches of another shape or for evaluation, a folder with a checkpoint of more steps than
    /// this training has done, and, after the first validation and a checkpoint, a figure that the validation does not have; [`Error::Data`]
    /// for other data than before a checkpoint; as [`Trainer::submit`], [`Trainer::evaluate`] and [`Checkpoint::save`](crate::train::Checkpoint::save).
    pub fn fit(
        &mut self,
        batches: &mut Batches,
        options: &FitOptions,
        mut watch: impl FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> Result<FitReport> {
        options.check()?;
        let data = self.check_data(batches)?;
        if let Some(folder) = &options.checkpoints {
            self.check_folder(folder)?;
        }
        self.progress.data = Some(data);
        self.find_best(options)?;
        let mut run = Run {
            options,
            watch: &mut watch,
            flight: Flight::default(),
            reported: self.progress.steps,
            cancelled: false,
            saved: None,
        };
        // Each mode sees each sample equally often.
        let joint = self.a.is_some() && self.b.is_some();
        batches.set_chunks(if joint { self.options.chunks } else { 1 })?;
        batches.seek(self.progress.epoch, self.progress.batch);
        let mut early = run.is_early(self);
        while self.progress.epoch < options.epochs && !early && !run.cancelled {
            // An error or a panic may have ended an earlier call in the middle of this batch.
            let first = self.progress.steps % self.options.chunks as u64;
            let before = self.progress.steps - first;
            let mut trained = false;
            if let Some(batch) = batches.next_batch()? {
                for chunk in first as usize..self.options.chunks {
                    run.make_room(self)?;
                    run.flight.push(self.submit(batch, chunk)?);
                    self.progress.steps += 1;
                }
                trained = true;
            }
            let (_, position) = batches.position();
            let ends = position >= batches.per_epoch();
            self.progress.batch = position;
            if ends {
                self.progress.epoch += 1;
                self.progress.batch = 0;
                batches.start_epoch(self.progress.epoch);
            }
            let steps = self.progress.steps;
            let due = |every: Option<u64>| match every {
                None => ends && trained,
                Some(every) => steps / every > before / every,
            };
            if ends {
                run.land(self)?;
                let epoch = self.progress.epoch;
                run.tell(Event::Epoch {
                    trainer: self,
                    epoch,
                });
            }
            if due(options.validate_every) && options.validation.is_some() {
                run.land(self)?;
                run.validate(self)?;
                early = run.is_early(self);
            }
            if due(options.checkpoint_every) {
                run.save(self)?;
            }
        }
        run.land(self)?;
        if run
            .saved
            .as_ref()
            .is_none_or(|(steps, _)| *steps != self.progress.steps)
        {
            run.save(self)?;
        }
        let best = match (self.progress.best, &self.best) {
            (Some((value, step)), Some(weights)) => Some(Best {
                value,
                step,
                weights: weights.clone(),
            }),
            _ => None,
        };
        Ok(FitReport {
            stop: match (early, self.progress.epoch < options.epochs) {
                (true, _) => Stop::Early,
                (false, true) => Stop::Cancelled,
                (false, false) => Stop::Finished,
            },
            best,
            checkpoint: run.saved.map(|(_, path)| path),
        })
    }
}

impl Trainer {
    /// Makes the folder of the checkpoints if it is missing, and refuses one of a training that is further than this one.
    fn check_folder(&self, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder).map_err(|error| Error::io(folder, error))?;
        let steps = self.progress.steps;
        match checkpoints(folder)?.pop() {
            Some((later, path)) if later > steps => Err(Error::Config {
                field: "checkpoints",
                reason: format!(
                    "has {} of {later} steps, but this training has done {steps}: continue from it with Trainer::resume, choose another folder, or remove it",
                    path.display()
                ),
            }),
            _ => Ok(()),
        }
    }

    /// Continues with the best model from before a checkpoint, if it was chosen by the same figure and its weights are there.
    fn find_best(&mut self, options: &FitOptions) -> Result<()> {
        let Some(name) = &options.best_by else {
            return Ok(());
        };
        let before = self.progress.best_by.replace(name.clone());
        let mut anew = before.is_some_and(|before| before != *name);
        if !anew && self.progress.best.is_some() && self.best.is_none() {
            let path = options.checkpoints.as_deref().map(best_path);
            match path.filter(|path| path.exists()) {
                Some(path) => self.best = Some(Weights::load(path)?),
                None => {
                    log::warn!(
                        "the weights of the best model so far are not in the folder of the checkpoints; the best one is looked for anew"
                    );
                    anew = true;
                }
            }
        }
        if anew {
            self.progress.best = None;
            self.progress.since_best = 0;
            self.best = None;
        }
        Ok(())
    }
}

/// A call of [`Trainer::fit`].
struct Run<'a> {
    options: &'a FitOptions,
    watch: &'a mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    flight: Flight,
    /// Steps that were reported.
    reported: u64,
    cancelled: bool,
    /// The last checkpoint, and the steps until it.
    saved: Option<(u64, PathBuf)>,
}

impl Run<'_> {
    fn tell(&mut self, event: Event<'_>) {
        self.cancelled |= (self.watch)(event).is_break();
    }

    fn report(&mut self, trainer: &Trainer, metrics: &Metrics) {
        self.reported += 1;
        let step = self.reported;
        self.tell(Event::Step {
            trainer,
            step,
            metrics,
        });
    }

    fn make_room(&mut self, trainer: &Trainer) -> Result<()> {
        if let Some(metrics) = self.flight.make_room(trainer)? {
            self.report(trainer, &metrics);
        }
        Ok(())
    }

    /// Waits for all steps under way.
    fn land(&mut self, trainer: &Trainer) -> Result<()> {
        while let Some(metrics) = self.flight.land(trainer)? {
            self.report(trainer, &metrics);
        }
        Ok(())
    }

    fn is_early(&self, trainer: &Trainer) -> bool {
        let since = trainer.progress.since_best;
        self.options
            .patience
            .is_some_and(|patience| since >= patience)
    }

    fn validate(&mut self, trainer: &mut Trainer) -> Result<()> {
        let Some(data) = &self.options.validation else {
            return Ok(());
        };
        let mut evaluation = trainer.evaluate(data)?;
        let step = trainer.progress.steps;
        self.tell(Event::Validation {
            trainer,
            step,
            evaluation: &mut evaluation,
        });
        let Some(name) = &self.options.best_by else {
            return Ok(());
        };
        let Some(value) = evaluation.get(name) else {
            let names: Vec<&str> = evaluation.values().map(|(name, _)| name).collect();
            // The steps so far are not lost.
            self.save(trainer)?;
            return Err(Error::Config {
                field: "best_by",
                reason: format!("is {name:?}, but the validation has {}", names.join(", ")),
            });
        };
        if value.is_nan() {
            log::warn!(
                "{name} of the validation after {step} steps is no number, so this model is not the best one"
            );
        }
        let less = ["mse", "cross_entropy", "perplexity"].contains(&name.as_str());
        let better = match trainer.progress.best {
            // A value that is no number is never the best.
            None => !value.is_nan(),
            Some((best, _)) if less => value < best,
            Some((best, _)) => value > best,
        };
        if !better {
            trainer.progress.since_best += 1;
            return Ok(());
        }
        let weights = trainer.weights()?;
        if let Some(folder) = &self.options.checkpoints {
            weights.save(best_path(folder), WeightType::F32)?;
        }
        trainer.progress.best = Some((value, step));
        trainer.progress.since_best = 0;
        trainer.best = Some(weights);
        Ok(())
    }

    /// Saves a checkpoint if there is a folder for it, and removes those that are too many.
    fn save(&mut self, trainer: &Trainer) -> Result<()> {
        let Some(folder) = &self.options.checkpoints else {
            return Ok(());
        };
        self.land(trainer)?;
        let steps = trainer.progress.steps;
        let path = checkpoint_path(folder, steps);
        self.tell(Event::Checkpoint {
            trainer,
            path: &path,
        });
        trainer.checkpoint()?.save(&path)?;
        let mut all = checkpoints(folder)?;
        // Later ones are not of this training.
        all.retain(|&(of, _)| of <= steps);
        let old = all.len().saturating_sub(self.options.keep);
        for (_, path) in &all[..old] {
            std::fs::remove_file(path).map_err(|error| Error::io(path, error))?;
        }
        self.saved = Some((steps, path));
        Ok(())
    }
}

fn best_path(folder: &Path) -> PathBuf {
    folder.join("best.safetensors")
}
