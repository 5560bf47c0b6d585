//! The options of a training, and the loop around [`Trainer::fit`]: progress, Ctrl-C, checkpoints, curves.

use std::error::Error;
use std::fs;
use std::io::{self, ErrorKind};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use energyflow::text::trainer::{Event, FitReport, Stop};
use energyflow::text::{
    Batches, Card, Dataset, Evaluation, FitOptions, Metrics, Model, OpenOptions, Precision,
    Tokenizer, Trainer, TrainerOptions, TrainingMode, WordPiece,
};
use energyflow::train::record::{Curves, JsonLinesLog, Recorder, Recorders, TensorBoard};
use energyflow::train::{AdamW, Checkpoint, LossScale, Schedule, WeightType};
use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

type Outcome<T> = Result<T, Box<dyn Error>>;

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum Storage {
    F32,
    F16,
}

/// What to train on.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Data")]
pub struct Data {
    /// Training data in any format of data/README.md: safetensors, EFB1, EFB2, JSON lines, texts with embeddings beside them
    #[arg(long, value_name = "FILE", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/data/wordnet_train.safetensors"))]
    train: PathBuf,
    /// Validation data
    #[arg(long, value_name = "FILE", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/data/wordnet_val.safetensors"))]
    validation: PathBuf,
    /// WordPiece vocabulary of the data
    #[arg(long, value_name = "FILE", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/data/tokenizer.json"))]
    tokenizer: PathBuf,
    /// Use only the first N training samples
    #[arg(long, value_name = "N")]
    samples: Option<usize>,
    /// Tokens per text; longer texts are cut
    #[arg(long, value_name = "L", default_value_t = 32)]
    pub length: usize,
}

/// How to train.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Training")]
pub struct Training {
    /// Passes over the training data
    #[arg(long, value_name = "N", default_value_t = 6)]
    epochs: u32,
    /// Highest learning rate
    #[arg(long, value_name = "RATE", default_value_t = 4e-3)]
    learning_rate: f32,
    /// Steps until the learning rate is at its highest
    #[arg(long, value_name = "STEPS", default_value_t = 100)]
    warmup: u32,
    /// Samples per batch
    #[arg(long, value_name = "N", default_value_t = 64)]
    batch: usize,
    /// Split every step into this many parts whose gradients are added up, to save memory
    #[arg(long, value_name = "N", default_value_t = 1)]
    micro_batches: usize,
    /// Decoupled weight decay
    #[arg(long, value_name = "RATE", default_value_t = 0.01)]
    weight_decay: f32,
    /// First loss scale of f16 training
    #[arg(long, value_name = "SCALE", default_value_t = LossScale::default().start)]
    loss_scale: f32,
    /// Seed of the parameters and of the order of the samples
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Storage of activations in training; sums and master weights are f32
    #[arg(long, value_enum, default_value = "f32")]
    precision: Storage,
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
    out: PathBuf,
    /// Storage of the model's weights
    #[arg(long, value_enum, default_value = "f32")]
    weights: Storage,
    /// Validate after every N steps instead of after every epoch
    #[arg(long, value_name = "N")]
    validate_every: Option<u64>,
    /// Keep the model that is best by this figure of the validation: cosine, precision_at_1, perplexity, accuracy, …
    #[arg(long, value_name = "FIGURE")]
    best_by: Option<String>,
    /// Stop when the figure has not become better in N validations
    #[arg(long, value_name = "N", requires = "best_by")]
    patience: Option<u64>,
    /// Save a checkpoint after every N steps instead of after every epoch
    #[arg(long, value_name = "N")]
    checkpoint_every: Option<u64>,
    /// Number of checkpoints to keep
    #[arg(long, value_name = "N", default_value_t = 2)]
    keep: usize,
    /// Go on from the newest checkpoint in the folder. Give the same options as before
    #[arg(long)]
    resume: bool,
}

/// The data of a training, open.
pub struct Opened {
    pub batches: Batches,
    pub validation: Dataset,
    pub tokenizer: WordPiece,
    pub tokenizer_json: Vec<u8>,
    description: String,
}

impl Data {
    /// Opens the files, and says what is in them.
    pub fn open(&self, training: &Training) -> Outcome<Opened> {
        let tokenizer = WordPiece::from_file(&self.tokenizer, self.length)?;
        let open =
            |path: &Path| Dataset::open_with(path, OpenOptions::default().tokenizer(&tokenizer));
        let mut train = open(&self.train)?;
        if let Some(samples) = self.samples {
            train = train.take(samples);
        }
        let validation = open(&self.validation)?;
        if train.width() != validation.width() {
            return Err(format!(
                "{}: embeddings of {} numbers, but those of the validation data {} have {}: give --validation with embeddings of the same teacher",
                self.train.display(),
                train.width(),
                self.validation.display(),
                validation.width()
            )
            .into());
        }
        println!(
            "data    {} samples to train, {} to validate, teacher width {}",
            train.len(),
            validation.len(),
            train.width()
        );
        let name = self.train.file_name().unwrap_or_default();
        let description = format!("{} samples of `{}`.", train.len(), name.to_string_lossy());
        let batches = Batches::training(train, training.batch, self.length, training.seed)?
            .padding(tokenizer.padding_id().unwrap_or(0));
        let json = fs::read(&self.tokenizer)
            .map_err(|error| format!("{}: {error}", self.tokenizer.display()))?;
        Ok(Opened {
            batches,
            validation,
            tokenizer,
            tokenizer_json: json,
            description,
        })
    }
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
            .optimizer(self.optimizer(batches, chunks)?)
            .precision(match self.precision {
                Storage::F32 => Precision::F32,
                Storage::F16 => Precision::Mixed,
            })
            .seed(self.seed)
            .recompute(self.recompute)
            .freeze(self.freeze.clone()))
    }

    /// The optimizer of a mode with so many steps per batch.
    pub fn optimizer(&self, batches: &Batches, steps_per_batch: usize) -> Outcome<AdamW> {
        let per_epoch = u32::try_from(batches.per_epoch() * steps_per_batch).ok();
        let steps = per_epoch.and_then(|per_epoch| self.epochs.checked_mul(per_epoch));
        let steps = steps
            .ok_or("too many steps: fewer --epochs, fewer --samples or larger batches (--batch)")?;
        Ok(AdamW::default()
            .schedule(Schedule::WarmupCosine {
                peak: self.learning_rate,
                end: 1e-5_f32.min(self.learning_rate),
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

const MODES: [(TrainingMode, &str); 2] = [(TrainingMode::A, "mode A"), (TrainingMode::B, "mode B")];

/// Further figures of a validation, by name.
pub type More<'a> = &'a dyn Fn(&Trainer, &Opened) -> Outcome<Vec<(&'static str, f64)>>;

/// Names of [`Evaluation::values`].
const OF_ENCODER: [&str; 6] = [
    "cosine",
    "mse",
    "precision_at_1",
    "precision_at_5",
    "overlap_at_10",
    "spearman",
];
const OF_DECODER: [&str; 3] = ["cross_entropy", "perplexity", "accuracy"];

/// Whether the validation will have the figure to choose the best model by.
fn check_best_by(name: &str, trainer: &Trainer, data: &Opened, more: More<'_>) -> Outcome<()> {
    let mut names = Vec::new();
    if trainer.encoder().is_some() {
        names.extend(OF_ENCODER);
    }
    if trainer.decoder().is_some() {
        names.extend(OF_DECODER);
    }
    if !names.contains(&name) {
        names.extend(more(trainer, data)?.iter().map(|(name, _)| *name));
    }
    match names.contains(&name) {
        true => Ok(()),
        false => Err(format!("--best-by {name}: the validation has {}", names.join(", ")).into()),
    }
}

/// Whether the model and the curves can be written at the end. Says when a model will be replaced.
fn check_output(model: &Path, picture: &Path) -> Outcome<()> {
    let fail = |path: &Path, what: &str| {
        let path = path.display();
        Err(format!("{path}: {what}; choose another folder with --out").into())
    };
    if picture.is_dir() {
        return fail(
            picture,
            "is a folder, but the curves are to be written there",
        );
    }
    let entries = match fs::read_dir(model) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return fail(model, &error.to_string()),
    };
    let mut empty = true;
    for entry in entries {
        empty = false;
        let name = entry?.file_name();
        let known = [
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "README.md",
        ];
        if !known.iter().any(|known| name == *known) {
            let what = format!("holds {name:?}, which is no part of a model");
            return fail(model, &what);
        }
    }
    if empty {
        return Ok(());
    }
    let config = fs::read(model.join("config.json")).unwrap_or_default();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap_or_default();
    if config["format"] != "energyflow.model" {
        return fail(model, "is no model of energyflow, so it is not replaced");
    }
    eprintln!("{}: this training will replace the model", model.display());
    Ok(())
}

/// The error of going on with other options, with the names of the options to repeat.
fn name_options(error: energyflow::Error) -> Box<dyn Error> {
    let energyflow::Error::Data { reason, .. } = &error else {
        return error.into();
    };
    let place = reason.split(' ').next().unwrap_or_default();
    let mut parts = place.split('.');
    let of = parts.next().unwrap_or_default();
    let field = parts.next().unwrap_or_default();
    let options = match (of, field) {
        _ if reason.starts_with("was trained on ") => {
            "--train, --samples, --batch, --length and --seed".into()
        }
        ("encoder" | "decoder", "vocabulary" | "padding") => "--tokenizer".into(),
        ("encoder" | "decoder", "embedding") => "--train".into(),
        ("options", "shared_last_block") => "--apart".into(),
        ("options", "condition") => "--z".into(),
        ("options", "optimizer" | "decoder_optimizer") => match parts.next() {
            Some("weight_decay") => "--weight-decay".into(),
            Some("loss_scale") => "--precision and --loss-scale".into(),
            // `schedule`, the kind of schedule, its field.
            Some("schedule") => match parts.nth(1) {
                Some("peak" | "end") => "--learning-rate".into(),
                Some("warmup") => "--warmup, --epochs, --train, --samples and --batch".into(),
                _ => "--epochs, --train, --samples and --batch".into(),
            },
            _ => return error.into(),
        },
        ("encoder" | "decoder" | "options", field) if !field.is_empty() => {
            format!("--{}", field.replace('_', "-"))
        }
        _ => return error.into(),
    };
    format!("the training began with other options: {reason}; repeat {options}").into()
}

/// The error of a training that computes no numbers any more.
fn diverged(what: &str, checkpoints: &Path) -> Box<dyn Error> {
    format!(
        "the training diverged: {what}. No model is written; the checkpoints in {} are kept. A lower --learning-rate or a longer --warmup may help, with another --out",
        checkpoints.display()
    )
    .into()
}

/// What is not finite if the training has diverged. Other figures may be undefined without that.
fn divergence(evaluation: &Evaluation) -> Option<String> {
    let telling = ["cosine", "mse", "cross_entropy"];
    let mut values = evaluation.values();
    let (name, value) =
        values.find(|(name, value)| telling.contains(name) && !value.is_finite())?;
    Some(format!("{name} of the validation is {value}"))
}

/// Trains, validates at the end, and writes the model and the curves. An error of the kind [`ErrorKind::Interrupted`] says that the training
/// was interrupted and can go on.
pub fn run(
    trainer: &mut Trainer,
    data: &mut Opened,
    training: &Training,
    output: &Output,
    card: Card,
    more: More<'_>,
) -> Outcome<Evaluation> {
    let start = Instant::now();
    let checkpoints = output.out.join("checkpoints");
    let out = output.out.display();
    let path = output.out.join("model");
    let picture = output.out.join("training.svg");
    if let Some(name) = &output.best_by {
        check_best_by(name, trainer, data, more)?;
    }
    fs::create_dir_all(&output.out).map_err(|error| format!("{out}: {error}"))?;
    match (output.resume, Trainer::latest_checkpoint(&checkpoints)?) {
        (true, Some(path)) => {
            trainer
                .resume(&Checkpoint::load(&path)?)
                .map_err(name_options)?;
            println!("resume  {} after {} steps", path.display(), trainer.steps());
        }
        (true, None) if path.join("config.json").exists() => {
            return Err(format!(
                "{out}: nothing to resume: the training is finished, its model is {}",
                path.display()
            )
            .into());
        }
        (true, None) => {
            return Err(format!("{}: no checkpoint to resume", checkpoints.display()).into());
        }
        (false, Some(path)) => {
            return Err(format!(
                "{} is of a training that was interrupted: go on with --resume, choose another folder with --out, or delete it",
                path.display()
            )
            .into());
        }
        (false, None) => {}
    }
    check_output(&path, &picture)?;
    let log = output.out.join("metrics.jsonl");
    let board = output.out.join("tensorboard");
    // So that the curves of a training that goes on are whole.
    let mut curves = Curves::new().panels(PANELS);
    let recorders = match output.resume {
        true => {
            let step = trainer.steps();
            let lines = JsonLinesLog::resume(&log, step)?;
            curves.read(&log)?;
            Recorders::new()
                .with(lines)
                .with(TensorBoard::resume(&board, step)?)
        }
        false => Recorders::new()
            .with(JsonLinesLog::create(&log)?)
            .with(TensorBoard::create(&board)?),
    };
    let options = FitOptions::new(training.epochs.into())
        .validation(Some(data.validation.clone()))
        .validate_every(output.validate_every)
        .best_by(output.best_by.clone())
        .patience(output.patience)
        .checkpoint_every(output.checkpoint_every)
        .keep(output.keep)
        .checkpoints(Some(checkpoints.clone()));
    let mut recorders = recorders.with(&mut curves);
    let report = fit(trainer, data, training, &options, &mut recorders, more)?;
    drop(recorders);
    if report.stop == Stop::Cancelled {
        let path = report.checkpoint.unwrap_or(checkpoints);
        println!(
            "stopped after {} steps, saved {}",
            trainer.steps(),
            path.display()
        );
        println!("go on with the same command and --resume");
        return Err(io::Error::from(ErrorKind::Interrupted).into());
    }
    if let Some(best) = &report.best {
        let name = output.best_by.as_deref().unwrap_or_default();
        println!("best    {name} {:.4} after {} steps", best.value, best.step);
        trainer.set_weights(&best.weights)?;
    }
    let mut evaluation = trainer.evaluate(&data.validation)?;
    if let Some(what) = divergence(&evaluation) {
        return Err(diverged(&what, &checkpoints));
    }
    add(&mut evaluation, more(trainer, data)?);
    let figures: Vec<String> = evaluation
        .values()
        .map(|(name, value)| match name {
            "mse" => format!("mse {value:.6}"),
            "precision_at_1" => format!("P@1 {value:.3}"),
            "precision_at_5" => format!("P@5 {value:.3}"),
            "perplexity" => format!("perplexity {value:.2}"),
            name => format!("{name} {value:.4}"),
        })
        .collect();
    println!("validation: {}", figures.join(", "));
    println!("total time: {:.1} s", start.elapsed().as_secs_f64());

    // JSON has no other numbers.
    let figures = evaluation
        .values()
        .filter(|(_, value)| value.is_finite())
        .map(|(name, value)| (name.to_owned(), value));
    let card = card
        .data(data.description.clone())
        .training(format!(
            "{} steps, batches of {}, seed {}, {:?}.",
            trainer.steps(),
            training.batch,
            training.seed,
            training.precision
        ))
        .figures(figures.collect())
        .seed(Some(training.seed));
    let model: Model = trainer
        .model()?
        .tokenizer(Some(data.tokenizer_json.clone()))
        .card(card);
    let dtype = match output.weights {
        Storage::F32 => WeightType::F32,
        Storage::F16 => WeightType::F16,
    };
    model.save(&path, dtype)?;
    curves.draw_svg(&picture)?;
    // A training that is done needs none.
    fs::remove_dir_all(&checkpoints)
        .map_err(|error| format!("{}: {error}", checkpoints.display()))?;
    println!(
        "wrote {}, {}, {} and {}",
        path.display(),
        picture.display(),
        log.display(),
        board.display()
    );
    training.profile(trainer)?;
    Ok(evaluation)
}

fn fit(
    trainer: &mut Trainer,
    data: &mut Opened,
    training: &Training,
    options: &FitOptions,
    recorders: &mut Recorders<'_>,
    more: More<'_>,
) -> Outcome<FitReport> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&interrupted);
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::SeqCst) {
            // The second time: at once.
            std::process::exit(130);
        }
        eprintln!("finishing the step and saving; once more to stop at once");
    })?;
    let joint = trainer.encoder().is_some() && trainer.decoder().is_some();
    let per_batch = trainer.options().chunks as u64;
    let all = u64::from(training.epochs) * data.batches.per_epoch() as u64 * per_batch;
    let bar = ProgressBar::new(all);
    bar.set_style(ProgressStyle::with_template(
        "{elapsed_precise} [{bar:32}] {pos}/{len} {msg}",
    )?);
    let say = |line: String| match bar.is_hidden() {
        // Without a terminal the bar draws nothing.
        true => println!("{line}"),
        false => bar.println(line),
    };
    let tokens = (data.batches.batch_size() * data.batches.length()) as f64 / per_batch as f64;
    let start = Instant::now();
    let mut checking = Duration::ZERO;
    let mut last = start;
    let mut trained = 0_u64;
    // Of the epoch, and the last step of each mode.
    let mut seen: Vec<Metrics> = Vec::new();
    let mut failed: Option<Box<dyn Error>> = None;
    let folder = options.checkpoints.as_deref().unwrap_or(Path::new(""));
    // A training that diverges goes on if there may be a best model from before.
    let has_best = options.best_by.is_some();
    let mut epoch_line = String::new();
    // The trainer holds the batches while it trains.
    let mut batches = data.batches.clone();
    let report = trainer.fit(&mut batches, options, |event| {
        match event {
            Event::Step { step, metrics, .. } => {
                seen.push(*metrics);
                failed = failed
                    .take()
                    .or(boxed(record_step(recorders, step, metrics, joint)));
                trained += 1;
                last = Instant::now();
                let seconds = (start.elapsed() - checking).as_secs_f64();
                let left = seconds / trained as f64 * all.saturating_sub(step) as f64;
                bar.set_position(step);
                let what = match metrics.mode {
                    TrainingMode::A => format!("cos {:.4}", metrics.cosine),
                    TrainingMode::B => format!("ce {:.4}", metrics.cross_entropy),
                };
                bar.set_message(format!(
                    "loss {:.4} {what} {:.1}k tokens/s {} left",
                    metrics.loss,
                    trained as f64 * tokens / seconds / 1e3,
                    HumanDuration(Duration::from_secs_f64(left))
                ));
            }
            Event::Epoch { epoch, .. } => {
                epoch_line = format!("epoch {epoch}: {}", means(&seen));
                for (mode, name) in MODES {
                    let of_mode = || seen.iter().filter(|metrics| metrics.mode == mode);
                    let none = of_mode().all(|metrics| !metrics.loss.is_finite());
                    if none && of_mode().next().is_some() && !has_best {
                        let what = format!("no loss of {name} in epoch {epoch} is finite");
                        failed = failed.take().or(Some(diverged(&what, folder)));
                    }
                    let last = seen.iter().rfind(|metrics| metrics.mode == mode);
                    if let Some(last) = last.filter(|last| last.skipped > 0.0) {
                        let (skipped, scale) = (last.skipped, last.loss_scale);
                        epoch_line +=
                            &format!("; {name} skipped {skipped} steps, loss scale {scale}");
                    }
                }
                seen.clear();
                if options.validate_every.is_some() {
                    say(format!(
                        "{epoch_line}; {:.1} s",
                        start.elapsed().as_secs_f64()
                    ));
                }
            }
            Event::Validation {
                trainer,
                step,
                evaluation,
                ..
            } => {
                let diverged = divergence(evaluation).map(|what| diverged(&what, folder));
                match (diverged, more(trainer, data)) {
                    (Some(error), Err(_)) => failed = failed.take().or(Some(error)),
                    (Some(error), Ok(_)) if !has_best => failed = failed.take().or(Some(error)),
                    (_, Ok(more)) => add(evaluation, more),
                    (None, Err(error)) => failed = failed.take().or(Some(error)),
                }
                checking += last.elapsed();
                let before = match options.validate_every {
                    None => std::mem::take(&mut epoch_line),
                    Some(_) => format!("step {step}"),
                };
                let seconds = start.elapsed().as_secs_f64();
                say(format!(
                    "{before}; validation {}; {seconds:.1} s",
                    short(evaluation)
                ));
                let named: Vec<(String, f64)> = evaluation
                    .values()
                    .map(|(name, value)| (format!("validation/{name}"), value))
                    .collect();
                failed = failed.take().or(boxed(record(recorders, step, &named)));
            }
            // The records reach at least as far as the checkpoint.
            Event::Checkpoint { .. } => failed = failed.take().or(boxed(recorders.flush())),
            _ => {}
        }
        match failed.is_some() || interrupted.load(Ordering::SeqCst) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    });
    bar.finish_and_clear();
    let seconds = (start.elapsed() - checking).as_secs_f64();
    println!(
        "trained {trained} steps in {seconds:.1} s: {:.0} tokens/s",
        trained as f64 * tokens / seconds
    );
    recorders.flush()?;
    match failed {
        Some(error) => Err(error),
        None => report.map_err(name_options),
    }
}

fn boxed(result: energyflow::Result<()>) -> Option<Box<dyn Error>> {
    result.err().map(Into::into)
}

fn add(evaluation: &mut Evaluation, more: Vec<(&'static str, f64)>) {
    let more = more
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value));
    evaluation.more.extend(more);
}

/// What is drawn of what is there.
const PANELS: [&str; 3] = ["loss", "cosine", "cross_entropy"];

/// In joint training both modes have figures of the same name.
fn record_step(
    recorders: &mut Recorders<'_>,
    step: u64,
    metrics: &Metrics,
    joint: bool,
) -> energyflow::Result<()> {
    let before = match (joint, metrics.mode) {
        (false, _) => "train",
        (true, TrainingMode::A) => "train_a",
        (true, TrainingMode::B) => "train_b",
    };
    let named: Vec<(String, f64)> = metrics
        .values()
        .map(|(name, value)| (format!("{before}/{name}"), value))
        .collect();
    record(recorders, step, &named)
}

fn record(
    recorders: &mut Recorders<'_>,
    step: u64,
    named: &[(String, f64)],
) -> energyflow::Result<()> {
    let scalars = named.iter().map(|(name, value)| (name.as_str(), *value));
    recorders.scalars(step, &scalars.collect::<Vec<_>>())
}

/// Means of an epoch, by mode.
fn means(steps: &[Metrics]) -> String {
    let mean = |mode: TrainingMode, of: fn(&Metrics) -> f32| {
        let own = steps.iter().filter(|metrics| metrics.mode == mode);
        let values: Vec<f64> = own.map(|metrics| f64::from(of(metrics))).collect();
        (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
    };
    let mut parts = Vec::new();
    if let (Some(loss), Some(cosine)) = (
        mean(TrainingMode::A, |m| m.loss),
        mean(TrainingMode::A, |m| m.cosine),
    ) {
        parts.push(format!("loss {loss:.4}, cosine {cosine:.4}"));
    }
    if let Some(loss) = mean(TrainingMode::B, |m| m.cross_entropy) {
        parts.push(format!("cross entropy {loss:.4}"));
    }
    parts.join(", ")
}

fn short(evaluation: &Evaluation) -> String {
    let mut parts = Vec::new();
    if let Some(encoder) = &evaluation.encoder {
        let (cosine, first) = (encoder.cosine, encoder.precision_at_1);
        parts.push(format!("cosine {cosine:.4}, P@1 {first:.3}"));
    }
    if let Some(decoder) = &evaluation.decoder {
        let (perplexity, accuracy) = (decoder.perplexity(), decoder.accuracy);
        parts.push(format!(
            "perplexity {perplexity:.2}, accuracy {accuracy:.4}"
        ));
    }
    parts.join(", ")
}
