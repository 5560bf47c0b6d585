//! Validation chooses the best model and stops the training.

use std::ops::ControlFlow;

use energyflow::text::trainer::{Event, Stop};
use energyflow::text::{FitOptions, Trainer};
use energyflow::train::Checkpoint;
use tempfile::TempDir;

use super::{batches, fit, texts, trainer};

#[test]
fn another_figure_looks_for_the_best_anew() {
    let folder = TempDir::new().unwrap();
    let data = texts(folder.path(), 12);
    let path = folder.path().join("checkpoints");
    let options = |epochs, name: &str| {
        FitOptions::new(epochs)
            .validation(Some(data.take(6)))
            .best_by(Some(name.into()))
            .checkpoints(Some(path.clone()))
    };
    let resumed = || {
        let latest = Trainer::latest_checkpoint(&path).unwrap().unwrap();
        let mut trainer = trainer(1);
        trainer.resume(&Checkpoint::load(latest).unwrap()).unwrap();
        trainer
    };
    // A figure that nobody gives: the steps until then are saved.
    let mut first = trainer(1);
    let quiet = |_: Event<'_>| ControlFlow::Continue(());
    let wrong = options(1, "cosine");
    let error = first.fit(&mut batches(&data), &wrong, quiet).unwrap_err();
    assert!(error.to_string().contains("perplexity"), "{error}");
    assert_eq!(resumed().steps(), 2);
    let (_, report) = fit(&mut resumed(), &data, &options(2, "perplexity"), u64::MAX);
    assert_eq!(report.best.unwrap().step, 4);
    let (_, report) = fit(&mut resumed(), &data, &options(3, "accuracy"), u64::MAX);
    let best = report.best.unwrap();
    assert!(
        best.value <= 1.0 && best.step == 6,
        "{} {}",
        best.value,
        best.step
    );
    // Its weights are gone.
    std::fs::remove_file(path.join("best.safetensors")).unwrap();
    let (_, report) = fit(&mut resumed(), &data, &options(4, "accuracy"), u64::MAX);
    assert_eq!(report.best.unwrap().step, 8);
}

#[test]
fn validation_chooses_the_best_and_stops() {
    let folder = TempDir::new().unwrap();
    let data = texts(folder.path(), 30);
    let path = folder.path().join("checkpoints");
    let options = FitOptions::new(100)
        .validation(Some(data.take(6)))
        .validate_every(Some(2))
        .best_by(Some("quality".into()))
        .patience(Some(3))
        .checkpoint_every(Some(1))
        .keep(2)
        .checkpoints(Some(path.clone()));
    // By the number of the validation: the third is the best, an equal one is not better.
    let quality = [1.0, 0.5, 3.0, f64::NAN, 3.0, 2.0, 9.0];
    let mut trainer = trainer(1);
    let mut seen = Vec::new();
    let mut at_best = None;
    let mut saved = 0;
    let report = trainer
        .fit(&mut batches(&data), &options, |event| {
            match event {
                Event::Validation {
                    trainer,
                    step,
                    evaluation,
                } => {
                    let value = quality[seen.len()];
                    seen.push(step);
                    evaluation.more.insert("quality".into(), value);
                    assert!(evaluation.get("perplexity").unwrap() > 1.0);
                    if value == 3.0 && at_best.is_none() {
                        at_best = Some(trainer.weights().unwrap());
                    }
                }
                Event::Checkpoint { .. } => saved += 1,
                _ => (),
            }
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(report.stop, Stop::Early);
    assert_eq!(seen, [2, 4, 6, 8, 10, 12]);
    assert_eq!(saved, 12);
    let best = report.best.unwrap();
    assert_eq!((best.value, best.step), (3.0, 6));
    assert!(Some(&best.weights) == at_best.as_ref());
    trainer.set_weights(&best.weights).unwrap();
    let mut names: Vec<String> = std::fs::read_dir(&path)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(
        names,
        [
            "best.safetensors",
            "checkpoint-00000011.safetensors",
            "checkpoint-00000012.safetensors"
        ]
    );
    // Nothing is left to do, also for a training that was resumed.
    let latest = Trainer::latest_checkpoint(&path).unwrap().unwrap();
    let mut again = self::trainer(1);
    again.resume(&Checkpoint::load(latest).unwrap()).unwrap();
    let (history, report) = fit(&mut again, &data, &options, u64::MAX);
    assert!(history.is_empty());
    assert_eq!(report.stop, Stop::Early);
    assert!(report.best.unwrap() == best);

    let error = |options: FitOptions| {
        let mut trainer = self::trainer(1);
        let quiet = |_: Event<'_>| ControlFlow::Continue(());
        let result = trainer.fit(&mut batches(&data), &options, quiet);
        result.unwrap_err().to_string()
    };
    let some = FitOptions::new(1).validation(Some(data.take(6)));
    assert!(error(some.clone().best_by(Some("cosine".into()))).contains("perplexity"));
    assert!(error(some.clone().patience(Some(1))).contains("best_by"));
    assert!(error(some.clone().validate_every(Some(0))).contains("at least 1"));
    assert!(error(FitOptions::new(1).best_by(Some("cosine".into()))).contains("validation"));
    assert!(error(some.keep(0)).contains("keep"));
}
