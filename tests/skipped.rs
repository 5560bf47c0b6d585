//! Skipped steps give warnings in the log, each once.

mod common;

use std::sync::Mutex;

use common::gpu;
use energyflow::text::{Batches, Dataset, Efb1Writer, EncoderOptions, Trainer, TrainerOptions};
use energyflow::train::{AdamW, LossScale};
use energyflow::types::Precision;
use log::{Level, LevelFilter, Log, Metadata, Record};
use tempfile::TempDir;

struct Warnings(Mutex<Vec<String>>);

impl Log for Warnings {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() == Level::Warn
    }

    fn log(&self, record: &Record<'_>) {
        let text = record.args().to_string();
        if self.enabled(record.metadata()) && text.contains("skipped") {
            self.0.lock().unwrap().push(text);
        }
    }

    fn flush(&self) {}
}

static WARNINGS: Warnings = Warnings(Mutex::new(Vec::new()));

fn taken() -> Vec<String> {
    std::mem::take(&mut WARNINGS.0.lock().unwrap())
}

#[test]
fn skipped_steps_warn_once() {
    log::set_logger(&WARNINGS).unwrap();
    log::set_max_level(LevelFilter::Warn);
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("texts.efb");
    let mut writer = Efb1Writer::create(&path, 4).unwrap();
    for i in 0..10 {
        writer
            .push(&[i, 9 - i], &[1, 1], &[0.1, 0.2, 0.3, 0.4])
            .unwrap();
    }
    writer.finish().unwrap();
    let mut batches = Batches::training(Dataset::open(path).unwrap(), 2, 2, 0).unwrap();

    let encoder = EncoderOptions::default()
        .vocabulary(10)
        .length(2)
        .width(8)
        .hidden(8)
        .kernel(2)
        .dilations(vec![1])
        .embedding(4)
        .table_bound(1.0);
    // The first step overflows f16, those at 64 do not.
    let scale = LossScale::default().start(16_777_216.0).max(64.0);
    let options = TrainerOptions::default()
        .batch(2)
        .precision(Precision::Mixed)
        .optimizer(AdamW::default().loss_scale(Some(scale)));
    let mut distiller = Trainer::distill(&gpu(), &encoder, &options).unwrap();
    let mut reported = Vec::new();
    distiller
        .epoch(&mut batches, |metrics| reported.push(metrics.skipped))
        .unwrap();
    assert_eq!(reported, [1.0; 5]);
    let warnings = taken();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(
        warnings[0].contains("loss scale 16777216, skipped steps so far: 1"),
        "{warnings:?}"
    );

    // What a checkpoint has counted is no news.
    let checkpoint = distiller.checkpoint().unwrap();
    distiller = Trainer::distill(&gpu(), &encoder, &options).unwrap();
    distiller.resume(&checkpoint).unwrap();
    batches.start_epoch(1);
    let metrics = distiller
        .step(batches.next_batch().unwrap().unwrap(), 0)
        .unwrap();
    assert_eq!(metrics.skipped, 1.0);
    assert_eq!(taken(), Vec::<String>::new());
}
