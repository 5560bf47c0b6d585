//! Distils a sentence encoder from a teacher's embeddings, entirely on the GPU, then answers questions with it.
//!
//! Without arguments: 12 000 WordNet sentences with MiniLM embeddings, a small encoder, six epochs.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Parser, ValueEnum};
use energyflow::text::metrics::nearest;
use energyflow::text::{
    Batches, Dataset, DistillOptions, Distiller, EncoderOptions, Evaluation, Metrics, OpenOptions,
    Precision, Tokenizer, WordPiece,
};
use energyflow::train::{AdamW, LossScale, Schedule, WeightType};
use energyflow::{Gpu, GpuOptions};
use indicatif::{HumanDuration, ProgressBar, ProgressStyle};
use plotters::prelude::*;

#[derive(Clone, Copy, ValueEnum)]
enum Storage {
    F32,
    F16,
}

/// Distil a sentence encoder from a teacher's embeddings on the GPU.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// Training data: safetensors, EFB1 or JSON lines, see data/README.md
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/data/wordnet_train.safetensors"))]
    train: PathBuf,
    /// Validation data; questions are answered from its texts
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/data/wordnet_val.safetensors"))]
    validation: PathBuf,
    /// WordPiece vocabulary of the data
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/data/tokenizer.json"))]
    tokenizer: PathBuf,
    /// Use only the first N training samples
    #[arg(long)]
    samples: Option<usize>,
    /// Folder for weights and the picture of the curves
    #[arg(long, default_value = "out")]
    out: PathBuf,
    /// Passes over the training data
    #[arg(long, default_value_t = 6)]
    epochs: u32,
    /// Highest learning rate
    #[arg(long, default_value_t = 4e-3)]
    learning_rate: f32,
    /// Steps until the learning rate is at its highest
    #[arg(long, default_value_t = 100)]
    warmup: u32,
    /// Samples a step
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// Split a batch into so many parts whose gradients are added up, to save memory
    #[arg(long, default_value_t = 1)]
    micro_batches: usize,
    /// Decoupled weight decay
    #[arg(long, default_value_t = 0.01)]
    weight_decay: f32,
    /// First loss scale of f16 training
    #[arg(long, default_value_t = LossScale::default().start)]
    loss_scale: f32,
    /// Seed of the parameters and of the order of the samples
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Storage of activations while training; sums and master weights are f32
    #[arg(long, value_enum, default_value = "f32")]
    precision: Storage,
    /// Storage of the weight file
    #[arg(long, value_enum, default_value = "f32")]
    weights: Storage,
    /// Tokens of a text; longer ones are cut
    #[arg(long, default_value_t = 32)]
    length: usize,
    /// Width of the network
    #[arg(long, default_value_t = 128)]
    width: usize,
    /// Width inside a block
    #[arg(long, default_value_t = 256)]
    hidden: usize,
    /// Taps of the convolutions
    #[arg(long, default_value_t = 3)]
    kernel: usize,
    /// Dilation of each block
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    dilations: Vec<usize>,
    /// Share of the elements that the blocks drop while training
    #[arg(long, default_value_t = 0.0)]
    dropout: f32,
    /// Compute the values inside the blocks again for the backward pass, to save memory
    #[arg(long)]
    recompute: bool,
    /// Leave these parameters as they are: names or prefixes such as embedding or blocks.0
    #[arg(long, value_delimiter = ',')]
    freeze: Vec<String>,
    /// The token table starts uniform in ± this
    #[arg(long, default_value_t = 0.05)]
    table_bound: f32,
    /// Use the adapter with this index (#1) or PCI address (0000:01:00.0), or one whose name contains this
    #[arg(long)]
    adapter: Option<String>,
    /// Ask this instead of the built-in questions (repeat for more)
    #[arg(long)]
    ask: Vec<String>,
    /// Print what the adapter offers, the memory plan and the kernels
    #[arg(long)]
    show: bool,
    /// Time every kernel of the training step on the GPU
    #[arg(long)]
    profile: bool,
}

const QUESTIONS: [&str; 4] = [
    "a large animal that lives in the sea",
    "to speak in a very quiet voice",
    "money paid for work",
    "the bright light of early morning",
];

fn main() {
    let filter = env_logger::Env::default().default_filter_or("energyflow=info,warn");
    env_logger::init_from_env(filter);
    if let Err(error) = run(&Options::parse()) {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}

fn run(options: &Options) -> Result<(), Box<dyn Error>> {
    let tokenizer = WordPiece::from_file(&options.tokenizer, options.length)?;
    let open = |path: &Path| Dataset::open_with(path, OpenOptions::default().tokenizer(&tokenizer));
    let mut train = open(&options.train)?;
    if let Some(samples) = options.samples {
        train = train.take(samples);
    }
    let validation = open(&options.validation)?;
    let out = options.out.display();
    fs::create_dir_all(&options.out).map_err(|error| format!("{out}: {error}"))?;

    let mut gpu = GpuOptions::from_env()?;
    if let Some(adapter) = &options.adapter {
        gpu = gpu.select(adapter)?;
    }
    let gpu = Gpu::new(&gpu)?;
    let capabilities = gpu.capabilities();
    println!(
        "adapter {} ({}), kernels: {}",
        capabilities.adapter,
        capabilities.driver,
        capabilities.kernel_tier()
    );
    println!(
        "data    {} samples to train, {} to validate, teacher width {}",
        train.len(),
        validation.len(),
        train.width()
    );

    let mut batches = Batches::training(train, options.batch, options.length, options.seed)?
        .padding(tokenizer.padding_id().unwrap_or(0));
    let steps = options.epochs * u32::try_from(batches.per_epoch())?;
    let (encoder, distill) = configure(options, &batches, &tokenizer, steps)?;
    let start = Instant::now();
    let distiller = Distiller::new(&gpu, &encoder, &distill)?;
    let parameters: usize = distiller
        .session()
        .parameters()
        .map(|(_, shape)| shape.iter().product::<usize>())
        .sum();
    println!(
        "network {:.2} million parameters, compiled in {:.1} s",
        parameters as f64 / 1e6,
        start.elapsed().as_secs_f64()
    );
    println!("step    {}", distiller.training_step().plan());
    if options.show {
        println!("{}\n{}", gpu.report(), distiller.training_step());
    }

    let history = train_all(options, &distiller, &mut batches, &validation, steps)?;
    let evaluation = distiller.evaluate(&validation)?;
    println!(
        "validation: cosine {:.4}, mse {:.6}, P@1 {:.3}, P@5 {:.3}",
        evaluation.cosine, evaluation.mse, evaluation.precision_at_1, evaluation.precision_at_5
    );
    println!("total time: {:.1} s", start.elapsed().as_secs_f64());

    let weights = options.out.join("encoder.safetensors");
    let dtype = match options.weights {
        Storage::F32 => WeightType::F32,
        Storage::F16 => WeightType::F16,
    };
    distiller.weights()?.save(&weights, dtype)?;
    let picture = options.out.join("training.svg");
    draw(&picture, &history)?;
    println!("wrote {} and {}", weights.display(), picture.display());
    if options.profile {
        profile(&distiller)?;
    }
    answer(options, &distiller, &tokenizer, &validation, &evaluation)
}

fn configure(
    options: &Options,
    batches: &Batches,
    tokenizer: &WordPiece,
    steps: u32,
) -> Result<(EncoderOptions, DistillOptions), Box<dyn Error>> {
    let encoder = EncoderOptions::default()
        .vocabulary(tokenizer.vocab_size() as usize)
        .length(options.length)
        .width(options.width)
        .hidden(options.hidden)
        .kernel(options.kernel)
        .dilations(options.dilations.clone())
        .embedding(batches.dataset().width())
        .table_bound(options.table_bound)
        .dropout(options.dropout)
        .padding(tokenizer.padding_id());
    if steps == 0 {
        return Err("nothing to do: no epochs".into());
    }
    let distill = DistillOptions::default()
        .batch(options.batch)
        .optimizer(
            AdamW::default()
                .schedule(Schedule::WarmupCosine {
                    peak: options.learning_rate,
                    end: 1e-5_f32.min(options.learning_rate),
                    warmup: options.warmup.min(steps / 2),
                    total: steps,
                })
                .clip(Some(1.0))
                .weight_decay(options.weight_decay)
                .loss_scale(match options.precision {
                    Storage::F32 => None,
                    Storage::F16 => Some(LossScale::default().start(options.loss_scale)),
                }),
        )
        .micro_batches(options.micro_batches)
        .precision(match options.precision {
            Storage::F32 => Precision::F32,
            Storage::F16 => Precision::Mixed,
        })
        .seed(options.seed)
        .recompute(options.recompute)
        .freeze(options.freeze.clone());
    Ok((encoder, distill))
}

/// Every step, and (steps done, cosine) on the validation data after every epoch.
struct History {
    steps: Vec<Metrics>,
    validation: Vec<(f64, f64)>,
}

fn train_all(
    options: &Options,
    distiller: &Distiller,
    batches: &mut Batches,
    validation: &Dataset,
    steps: u32,
) -> Result<History, Box<dyn Error>> {
    let bar = ProgressBar::new(u64::from(steps));
    bar.set_style(ProgressStyle::with_template(
        "{elapsed_precise} [{bar:32}] {pos}/{len} {msg}",
    )?);
    let tokens = options.batch * options.length;
    let mut history: Vec<Metrics> = Vec::new();
    let mut checks = Vec::new();
    let mut checking = 0.0;
    let start = Instant::now();
    for epoch in 0..options.epochs {
        batches.start_epoch(u64::from(epoch));
        let first = history.len();
        distiller.epoch(batches, |metrics| {
            history.push(*metrics);
            let done = history.len();
            let seconds = start.elapsed().as_secs_f64();
            let left = seconds / done as f64 * (f64::from(steps) - done as f64);
            bar.set_position(done as u64);
            bar.set_message(format!(
                "loss {:.4} cos {:.4} {:.1}k tokens/s {} left",
                metrics.loss,
                metrics.cosine,
                (done * tokens) as f64 / seconds / 1e3,
                HumanDuration(std::time::Duration::from_secs_f64(left))
            ));
        })?;
        let seen = &history[first..];
        let mean = |of: fn(&Metrics) -> f32| {
            seen.iter().map(|m| f64::from(of(m))).sum::<f64>() / seen.len() as f64
        };
        let trained = start.elapsed().as_secs_f64();
        let check = distiller.evaluate(validation)?;
        checking += start.elapsed().as_secs_f64() - trained;
        checks.push((history.len() as f64, check.cosine));
        let line = format!(
            "epoch {}: loss {:.4}, cosine {:.4}; validation cosine {:.4}, P@1 {:.3}; {trained:.1} s",
            epoch + 1,
            mean(|m| m.loss),
            mean(|m| m.cosine),
            check.cosine,
            check.precision_at_1,
        );
        // Without a terminal the bar draws nothing.
        match bar.is_hidden() {
            true => println!("{line}"),
            false => bar.println(line),
        }
    }
    bar.finish_and_clear();
    let seconds = start.elapsed().as_secs_f64() - checking;
    println!(
        "trained {} steps in {seconds:.1} s: {:.0} tokens/s",
        history.len(),
        (history.len() * tokens) as f64 / seconds
    );
    if let Some(last) = history.last()
        && last.skipped > 0.0
    {
        println!(
            "skipped {} steps, loss scale {}",
            last.skipped, last.loss_scale
        );
    }
    Ok(History {
        steps: history,
        validation: checks,
    })
}

fn profile(distiller: &Distiller) -> Result<(), Box<dyn Error>> {
    let mut timings = distiller.training_step().profile()?;
    let total: f64 = timings.iter().map(|t| t.nanoseconds).sum();
    timings.sort_by(|a, b| b.nanoseconds.total_cmp(&a.nanoseconds));
    println!("kernels of a step, {:.3} ms in all:", total / 1e6);
    for timing in timings.iter().take(24) {
        let label: String = timing.label.chars().take(140).collect();
        println!(
            "{:9.3} ms {:5.1} %  {label}",
            timing.nanoseconds / 1e6,
            100.0 * timing.nanoseconds / total
        );
    }
    Ok(())
}

/// Loss and cosine over the steps, smoothed; the cosine on the validation data after every epoch as circles.
fn draw(path: &Path, history: &History) -> Result<(), Box<dyn Error>> {
    let smooth = |of: fn(&Metrics) -> f32| -> Vec<(f64, f64)> {
        let mut mean = history.steps.first().map_or(0.0, |m| f64::from(of(m)));
        let points = history.steps.iter().enumerate();
        points
            .map(|(i, m)| {
                mean += 0.1 * (f64::from(of(m)) - mean);
                (i as f64, mean)
            })
            .collect()
    };
    let area = SVGBackend::new(path, (900, 640)).into_drawing_area();
    area.fill(&WHITE)?;
    let (top, bottom) = area.split_vertically(320);
    let (red, blue) = (RGBColor(200, 60, 40), RGBColor(30, 100, 180));
    curve(&top, "loss", smooth(|m| m.loss), &[], red)?;
    let title = "cosine to the teacher (circles: validation)";
    let points = smooth(|m| m.cosine);
    curve(&bottom, title, points, &history.validation, blue)?;
    area.present()?;
    Ok(())
}

fn curve(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    title: &str,
    points: Vec<(f64, f64)>,
    circles: &[(f64, f64)],
    color: RGBColor,
) -> Result<(), Box<dyn Error>> {
    let steps = points.len() as f64;
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

/// The validation texts whose embeddings are nearest to each question's.
fn answer(
    options: &Options,
    distiller: &Distiller,
    tokenizer: &WordPiece,
    validation: &Dataset,
    evaluation: &Evaluation,
) -> Result<(), Box<dyn Error>> {
    let questions: Vec<&str> = match options.ask.is_empty() {
        true => QUESTIONS.to_vec(),
        false => options.ask.iter().map(String::as_str).collect(),
    };
    let ids: Vec<Vec<u32>> = questions
        .iter()
        .map(|question| tokenizer.encode(question))
        .collect::<Result<_, _>>()?;
    let width = distiller.encoder().embedding;
    let embeddings = distiller.embed(&ids)?;
    for (question, embedding) in questions.iter().zip(embeddings.chunks_exact(width)) {
        println!("\n{question}");
        for (index, cosine) in nearest(embedding, &evaluation.embeddings, 3)? {
            let sample = validation.sample(index)?;
            println!("  {cosine:.3}  {}", sample.text().unwrap_or("(no text)"));
        }
    }
    Ok(())
}
