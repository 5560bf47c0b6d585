//! A whole training: checkpoints, validation, model, curves.

use std::error::Error;
use std::fs;
use std::io::{self, ErrorKind};
use std::time::Instant;

use energyflow::text::trainer::Stop;
use energyflow::text::{Card, Evaluation, FitOptions, Trainer};
use energyflow::train::record::{Curves, JsonLinesLog, Recorders, TensorBoard};
use energyflow::train::{Checkpoint, WeightType};

use super::fit::{PANELS, add, fit};
use super::opened::Opened;
use super::options::{Output, Training, Weights};
use super::report::{check_best_by, check_output, diverged, divergence, figures, name_options};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Further figures of a validation, by name.
pub type More<'a> = &'a dyn Fn(&Trainer, &Opened) -> Outcome<Vec<(&'static str, f64)>>;

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
    let of_transformer = trainer.transformer().is_some();
    if of_transformer && matches!(output.weights, Weights::Int8) {
        return Err("--weights int8: sentence-transformers cannot load it; give f32 or f16".into());
    }
    check_output(&path, &picture, of_transformer)?;
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
    let name = output.best_by.as_deref().unwrap_or_default();
    if report.stop == Stop::Early {
        println!("stopped early: {name} of the last validations was not better than the best one");
    }
    if let Some(best) = &report.best {
        println!("best    {name} {:.4} after {} steps", best.value, best.step);
        trainer.set_weights(&best.weights)?;
    }
    let mut evaluation = trainer.evaluate(&data.validation)?;
    if let Some(what) = divergence(&evaluation) {
        return Err(diverged(&what, &checkpoints));
    }
    add(&mut evaluation, more(trainer, data)?);
    println!("validation: {}", figures(&evaluation));
    println!(
        "training and validation took {:.1} s",
        start.elapsed().as_secs_f64()
    );

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
    let dtype = match output.weights {
        Weights::F32 => WeightType::F32,
        Weights::F16 => WeightType::F16,
        Weights::Int8 => WeightType::Int8,
    };
    match trainer.transformer() {
        // Its folder has no place for a card.
        Some(_) => trainer.transformer_model()?.save(&path, dtype)?,
        None => {
            let json = data.tokenizer_json.clone();
            let model = trainer.model()?.tokenizer(Some(json)).card(card);
            model.save(&path, dtype)?;
        }
    }
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
