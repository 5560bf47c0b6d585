//! A training that was interrupted goes on bit for bit; checkpoints of others are refused and kept.

use std::ops::ControlFlow;

use energyflow::Error;
use energyflow::text::trainer::{Event, Stop};
use energyflow::text::{Batches, FitOptions, Trainer, TrainerOptions};
use energyflow::train::Checkpoint;
use tempfile::TempDir;

use super::common::gpu;
use super::{LENGTH, batches, bits, decoder, encoder, fit, options, texts, trainer};

#[test]
fn a_panic_in_the_middle_of_a_batch_loses_nothing() {
    let folder = TempDir::new().unwrap();
    let data = texts(folder.path(), 30);
    let options = FitOptions::new(1);
    let mut whole = trainer(2);
    fit(&mut whole, &data, &options, u64::MAX);
    let mut broken = trainer(2);
    let panics = |event: Event<'_>| match event {
        Event::Step { step: 2, .. } => panic!("of the test"),
        _ => ControlFlow::Continue(()),
    };
    let run = || broken.fit(&mut batches(&data), &options, panics);
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).unwrap_err();
    assert!(!broken.steps().is_multiple_of(3), "{}", broken.steps());
    fit(&mut broken, &data, &options, u64::MAX);
    assert_eq!(broken.steps(), whole.steps());
    assert!(bits(&broken) == bits(&whole));
}

#[test]
fn checkpoints_of_a_later_training_are_kept() {
    let folder = TempDir::new().unwrap();
    let data = texts(folder.path(), 12);
    let path = folder.path().join("checkpoints");
    let options = FitOptions::new(1)
        .checkpoints(Some(path.clone()))
        .checkpoint_every(Some(1))
        .keep(1);
    let later = path.join("checkpoint-00000099.safetensors");
    let quiet = |_: Event<'_>| ControlFlow::Continue(());
    std::fs::create_dir(&path).unwrap();
    std::fs::write(&later, "another training's").unwrap();
    let mut trainer = trainer(1);
    let error = trainer
        .fit(&mut batches(&data), &options, quiet)
        .unwrap_err();
    assert!(
        matches!(error, Error::Config { .. }) && error.to_string().contains("99 steps"),
        "{error}"
    );
    assert_eq!(trainer.steps(), 0);
    std::fs::remove_file(&later).unwrap();
    // It comes while the training runs.
    let write = |event: Event<'_>| {
        if let Event::Step { step: 1, .. } = event {
            std::fs::write(&later, "another training's").unwrap();
        }
        ControlFlow::Continue(())
    };
    let report = trainer.fit(&mut batches(&data), &options, write).unwrap();
    assert!(later.exists());
    assert!(report.checkpoint.unwrap().exists());
    assert_eq!(std::fs::read_dir(&path).unwrap().count(), 2);
}

#[test]
fn a_training_goes_on_bit_for_bit() {
    let folder = TempDir::new().unwrap();
    let data = texts(folder.path(), 30);
    for kind in 0..4 {
        let path = folder.path().join(format!("{kind}"));
        let options = FitOptions::new(2)
            .validation(Some(data.take(7)))
            .best_by(Some(if kind == 1 { "perplexity" } else { "cosine" }.into()))
            .checkpoint_every(Some(4))
            .checkpoints(Some(path.clone()));
        let mut whole = trainer(kind);
        let (expected, end) = fit(&mut whole, &data, &options, u64::MAX);
        assert_eq!(end.stop, Stop::Finished);
        if kind == 0 || kind == 3 {
            let skipped = expected.iter().any(|(_, metrics)| metrics.skipped > 0.0);
            assert!(skipped, "no step of kind {kind} is skipped");
        }
        std::fs::remove_dir_all(&path).unwrap();

        let mut first = trainer(kind);
        let (mut history, stopped) = fit(&mut first, &data, &options, 2);
        assert_eq!(stopped.stop, Stop::Cancelled);
        // In the middle of an epoch.
        assert!((2..9).contains(&first.steps()), "{}", first.steps());
        let latest = Trainer::latest_checkpoint(&path).unwrap();
        assert_eq!(latest, stopped.checkpoint);
        drop(first);
        let mut second = trainer(kind);
        // What it has done before does not matter.
        second.epoch(&mut batches(&data), |_| ()).unwrap();
        second
            .resume(&Checkpoint::load(latest.unwrap()).unwrap())
            .unwrap();
        let (rest, report) = fit(&mut second, &data, &options, u64::MAX);
        history.extend(rest);
        // As text: the norm of a skipped step is NaN, which equals nothing. Digits are enough for all bits.
        let [history, expected] = [history, expected].map(|all| format!("{all:?}"));
        assert_eq!(history, expected, "kind {kind}");
        assert!(bits(&second) == bits(&whole), "kind {kind}");
        assert_eq!(report.best, end.best, "kind {kind}");
        assert_eq!(second.steps(), whole.steps());
    }
}

#[test]
fn checkpoints_of_other_trainings_are_refused() {
    let folder = TempDir::new().unwrap();
    let data = texts(folder.path(), 30);
    let checkpoint = |trainer: &Trainer| trainer.checkpoint().unwrap();
    let mut joint = trainer(2);
    let before = bits(&joint);
    let other = |change: fn(TrainerOptions) -> TrainerOptions| {
        let options = change(options().chunks(3).micro_batches(2));
        checkpoint(&Trainer::joint(&gpu(), &encoder(), &decoder(), &options).unwrap())
    };
    let longer = encoder().length(7);
    let mut cases = vec![
        (checkpoint(&trainer(0)), "decoder"),
        (
            other(|options| options.seed(4)),
            "options.seed was 4, but is 3",
        ),
        (other(|options| options.alpha(0.5)), "options.alpha was 0.5"),
        (
            other(|options| {
                let optimizer = options.optimizer.clone().weight_decay(0.5);
                options.optimizer(optimizer)
            }),
            "options.optimizer.weight_decay was 0.5",
        ),
        (
            checkpoint(&Trainer::distill(&gpu(), &longer, &options()).unwrap()),
            "decoder",
        ),
        (Checkpoint::default(), "not made by a Trainer"),
    ];
    // A file whose text is right, but not its tensors.
    let mut foreign = checkpoint(&trainer(1));
    foreign.metadata = checkpoint(&joint).metadata;
    cases.push((foreign, "the checkpoint lacks the parameter"));
    for (checkpoint, what) in cases {
        let error = joint.resume(&checkpoint).unwrap_err().to_string();
        assert!(error.contains(what), "{what}: {error}");
        assert!(bits(&joint) == before, "{what}");
    }
    // Other data.
    let (_, _) = fit(&mut joint, &data, &FitOptions::new(1), 1);
    let mut fresh = trainer(2);
    fresh.resume(&checkpoint(&joint)).unwrap();
    let mut less = Batches::training(data.take(20), 6, LENGTH, 5).unwrap();
    let quiet = |_: Event<'_>| ControlFlow::Continue(());
    let error = fresh
        .fit(&mut less, &FitOptions::new(1), quiet)
        .unwrap_err();
    assert!(error.to_string().contains("samples: 20"), "{error}");
    let mut ordered = Batches::evaluation(data.clone(), 6, LENGTH).unwrap();
    let error = fresh
        .fit(&mut ordered, &FitOptions::new(1), quiet)
        .unwrap_err();
    assert!(error.to_string().contains("Batches::training"), "{error}");
    let mut others = Batches::training(data, 6, LENGTH, 6).unwrap();
    let error = fresh
        .fit(&mut others, &FitOptions::new(1), quiet)
        .unwrap_err();
    assert!(error.to_string().contains("seed"), "{error}");
}
