//! The options of a training, and the loop around [`Trainer::fit`]: progress, Ctrl-C, checkpoints, curves.

use std::error::Error;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use energyflow::text::trainer::{Event, Stop};
use energyflow::text::{
    Batches, Card, Dataset, Evaluation, FitOptions, Metrics, Model, OpenOptions, Precision,
    Tokenizer, Trainer, TrainerOptions, TrainingMode, WordPiece,
};
use energyflow::train::{AdamW, Checkpoint, LossScale, Schedule, WeightType};
use indicatif::{HumanDuration, ProgressBar, ProgressStyle};
use plotters::prelude::*;

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
    /// Training data: safetensors, EFB1 or JSON lines, see data/README.md
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
    /// Folder for the model, the checkpoints and the picture of the curves
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
    tokenizer_json: Vec<u8>,
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
        let steps = self.epochs * u32::try_from(batches.per_epoch() * steps_per_batch)?;
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
            let mut timings = step.profile()?;
            let total: f64 = timings.iter().map(|t| t.nanoseconds).sum();
            timings.sort_by(|a, b| b.nanoseconds.total_cmp(&a.nanoseconds));
            println!("kernels of a step of {name}, {:.3} ms in all:", total / 1e6);
            for timing in timings.iter().take(24) {
                let label: String = timing.label.chars().take(140).collect();
                println!(
                    "{:9.3} ms {:5.1} %  {label}",
                    timing.nanoseconds / 1e6,
                    100.0 * timing.nanoseconds / total
                );
            }
        }
        Ok(())
    }
}

const MODES: [(TrainingMode, &str); 2] = [(TrainingMode::A, "mode A"), (TrainingMode::B, "mode B")];

/// Steps and validations of a training, with the number of the step.
#[derive(Default)]
struct History {
    steps: Vec<(u64, Metrics)>,
    checks: Vec<(u64, Vec<(String, f64)>)>,
}

/// Trains, validates at the end, and writes the model and the curves. `None` when the training was interrupted.
pub fn run(
    trainer: &mut Trainer,
    data: &mut Opened,
    training: &Training,
    output: &Output,
    card: Card,
) -> Outcome<Option<Evaluation>> {
    let start = Instant::now();
    let checkpoints = output.out.join("checkpoints");
    let out = output.out.display();
    fs::create_dir_all(&output.out).map_err(|error| format!("{out}: {error}"))?;
    match (output.resume, Trainer::latest_checkpoint(&checkpoints)?) {
        (true, Some(path)) => {
            trainer.resume(&Checkpoint::load(&path)?)?;
            println!("resume  {} after {} steps", path.display(), trainer.steps());
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
    let options = FitOptions::new(training.epochs.into())
        .validation(Some(data.validation.clone()))
        .validate_every(output.validate_every)
        .best_by(output.best_by.clone())
        .patience(output.patience)
        .checkpoint_every(output.checkpoint_every)
        .keep(output.keep)
        .checkpoints(Some(checkpoints.clone()));
    let (history, report) = fit(trainer, data, training, &options)?;
    if report.stop == Stop::Cancelled {
        let path = report.checkpoint.unwrap_or(checkpoints);
        println!(
            "stopped after {} steps, saved {}",
            trainer.steps(),
            path.display()
        );
        println!("go on with the same command and --resume");
        return Ok(None);
    }
    if let Some(best) = &report.best {
        let name = output.best_by.as_deref().unwrap_or_default();
        println!("best    {name} {:.4} after {} steps", best.value, best.step);
        trainer.set_weights(&best.weights)?;
    }
    let evaluation = trainer.evaluate(&data.validation)?;
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

    let figures = evaluation
        .values()
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
    let path = output.out.join("model");
    let dtype = match output.weights {
        Storage::F32 => WeightType::F32,
        Storage::F16 => WeightType::F16,
    };
    model.save(&path, dtype)?;
    let picture = output.out.join("training.svg");
    draw(&picture, &history)?;
    // A training that is done needs none.
    fs::remove_dir_all(&checkpoints)
        .map_err(|error| format!("{}: {error}", checkpoints.display()))?;
    println!("wrote {} and {}", path.display(), picture.display());
    training.profile(trainer)?;
    Ok(Some(evaluation))
}

fn fit(
    trainer: &mut Trainer,
    data: &mut Opened,
    training: &Training,
    options: &FitOptions,
) -> Outcome<(History, energyflow::text::trainer::FitReport)> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&interrupted);
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::SeqCst) {
            // The second time: at once.
            std::process::exit(130);
        }
        eprintln!("finishing the step and saving; once more to stop at once");
    })?;
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
    let mut history = History::default();
    // The first step of the epoch, in the history.
    let mut first = 0;
    let mut epoch_line = String::new();
    let report = trainer.fit(&mut data.batches, options, |event| {
        match event {
            Event::Step { step, metrics, .. } => {
                history.steps.push((step, *metrics));
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
                let seen = &history.steps[first..];
                first = history.steps.len();
                epoch_line = format!("epoch {epoch}: {}", means(seen));
                if options.validate_every.is_some() {
                    say(format!(
                        "{epoch_line}; {:.1} s",
                        start.elapsed().as_secs_f64()
                    ));
                }
            }
            Event::Validation {
                step, evaluation, ..
            } => {
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
                let values = evaluation
                    .values()
                    .map(|(name, value)| (name.to_owned(), value));
                history.checks.push((step, values.collect()));
            }
            _ => {}
        }
        match interrupted.load(Ordering::SeqCst) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    })?;
    bar.finish_and_clear();
    let seconds = (start.elapsed() - checking).as_secs_f64();
    println!(
        "trained {trained} steps in {seconds:.1} s: {:.0} tokens/s",
        trained as f64 * tokens / seconds
    );
    for (mode, name) in MODES {
        let last = history.steps.iter().rev().find(|(_, m)| m.mode == mode);
        if let Some((_, last)) = last.filter(|(_, last)| last.skipped > 0.0) {
            println!(
                "skipped {} steps of {name}, loss scale {}",
                last.skipped, last.loss_scale
            );
        }
    }
    Ok((history, report))
}

/// Means of an epoch, by mode.
fn means(steps: &[(u64, Metrics)]) -> String {
    let mean = |mode: TrainingMode, of: fn(&Metrics) -> f32| {
        let own = steps.iter().filter(|(_, metrics)| metrics.mode == mode);
        let values: Vec<f64> = own.map(|(_, metrics)| f64::from(of(metrics))).collect();
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

/// A curve of a figure of the steps, smoothed, and the same figure of the validations as circles.
type Curve = (
    &'static str,
    TrainingMode,
    fn(&Metrics) -> f32,
    &'static str,
);

const CURVES: [Curve; 3] = [
    ("loss", TrainingMode::A, |m| m.loss, ""),
    (
        "cosine to the teacher (circles: validation)",
        TrainingMode::A,
        |m| m.cosine,
        "cosine",
    ),
    (
        "cross entropy of the next token (circles: validation)",
        TrainingMode::B,
        |m| m.cross_entropy,
        "cross_entropy",
    ),
];

fn draw(path: &Path, history: &History) -> Outcome<()> {
    let has = |mode: TrainingMode| history.steps.iter().any(|(_, m)| m.mode == mode);
    let curves: Vec<&Curve> = CURVES.iter().filter(|curve| has(curve.1)).collect();
    let area = SVGBackend::new(path, (900, 320 * curves.len() as u32)).into_drawing_area();
    area.fill(&WHITE)?;
    let colors = [
        RGBColor(200, 60, 40),
        RGBColor(30, 100, 180),
        RGBColor(40, 130, 60),
    ];
    for (part, (title, mode, of, name)) in area.split_evenly((curves.len(), 1)).iter().zip(curves) {
        let own = history.steps.iter().filter(|(_, m)| m.mode == *mode);
        let mut mean = None;
        let points = own.map(|(step, m)| {
            let value = f64::from(of(m));
            let smooth = mean.map_or(value, |mean| mean + 0.1 * (value - mean));
            mean = Some(smooth);
            (*step as f64, smooth)
        });
        let points: Vec<(f64, f64)> = points.collect();
        let circles: Vec<(f64, f64)> = history
            .checks
            .iter()
            .filter_map(|(step, values)| {
                let value = values.iter().find(|(own, _)| own == name)?.1;
                Some((*step as f64, value))
            })
            .collect();
        let color = colors[CURVES
            .iter()
            .position(|curve| curve.0 == *title)
            .unwrap_or(0)];
        curve(part, title, points, &circles, color)?;
    }
    area.present()?;
    Ok(())
}

fn curve(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    title: &str,
    points: Vec<(f64, f64)>,
    circles: &[(f64, f64)],
    color: RGBColor,
) -> Outcome<()> {
    let steps = points.last().map_or(1.0, |point| point.0);
    let all = || points.iter().chain(circles).map(|point| point.1);
    let (low, high) = (all().fold(0.0, f64::min), all().fold(0.0, f64::max));
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(32)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..steps, low..high * 1.05 + 1e-9)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc("step")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.2}"))
        .draw()?;
    chart.draw_series(LineSeries::new(points, color.stroke_width(2)))?;
    let circle = |&point| Circle::new(point, 5, color.filled());
    chart.draw_series(circles.iter().map(circle))?;
    Ok(())
}
