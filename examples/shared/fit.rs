//! The loop around [`Trainer::fit`]: progress, Ctrl-C, records.

use std::error::Error;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use energyflow::text::trainer::{Event, FitReport};
use energyflow::text::{Evaluation, FitOptions, Metrics, Trainer, TrainingMode};
use energyflow::train::record::{Recorder, Recorders};
use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

use super::opened::Opened;
use super::options::{MODES, Training};
use super::report::{diverged, divergence, means, name_options, short};
use super::training::More;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Trains, with a bar for the progress.
pub fn fit(
    trainer: &mut Trainer,
    data: &mut Opened,
    training: &Training,
    options: &FitOptions,
    recorders: &mut Recorders<'_>,
    more: More<'_>,
) -> Outcome<FitReport> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&interrupted);
    let handler = ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::SeqCst) {
            // The second time: at once.
            std::process::exit(130);
        }
        eprintln!("finishing the step and saving; once more to stop at once");
    });
    match handler {
        // Of an earlier training of the same process, which it is meant for.
        Ok(()) | Err(ctrlc::Error::MultipleHandlers) => {}
        Err(error) => return Err(error.into()),
    }
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

/// Adds figures to an evaluation.
pub fn add(evaluation: &mut Evaluation, more: Vec<(&'static str, f64)>) {
    let more = more
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value));
    evaluation.more.extend(more);
}

/// What is drawn of what is there.
pub const PANELS: [&str; 3] = ["loss", "cosine", "cross_entropy"];

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
