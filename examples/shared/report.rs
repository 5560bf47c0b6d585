//! What a training says, and the errors that it explains.

use std::error::Error;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use energyflow::text::{Evaluation, Metrics, PairLoss, Trainer, TrainingMode};

use super::opened::Opened;
use super::training::More;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Names of [`Evaluation::values`].
const OF_ENCODER: [&str; 6] = [
    "cosine",
    "mse",
    "precision_at_1",
    "precision_at_5",
    "overlap_at_10",
    "spearman",
];
const OF_RETRIEVAL: [&str; 4] = ["cosine", "accuracy_at_1", "accuracy_at_10", "mrr"];
const OF_SIMILARITY: [&str; 4] = ["cosine", "mse", "spearman", "pearson"];
const OF_DECODER: [&str; 3] = ["cross_entropy", "perplexity", "accuracy"];

/// Whether the validation will have the figure to choose the best model by.
pub fn check_best_by(name: &str, trainer: &Trainer, data: &Opened, more: More<'_>) -> Outcome<()> {
    let mut names = Vec::new();
    match trainer.options().pair_loss {
        Some(PairLoss::Cosine) => names.extend(OF_SIMILARITY),
        Some(_) => names.extend(OF_RETRIEVAL),
        None if trainer.encoder().is_some() => names.extend(OF_ENCODER),
        None => {}
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
pub fn check_output(model: &Path, picture: &Path, of_transformer: bool) -> Outcome<()> {
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
        if of_transformer {
            break;
        }
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
    if of_transformer && !model.join("modules.json").exists() {
        return fail(
            model,
            "is no model of sentence-transformers, so it is not replaced",
        );
    }
    if !of_transformer && config["format"] != "energyflow.model" {
        return fail(model, "is no model of energyflow, so it is not replaced");
    }
    eprintln!("{}: this training will replace the model", model.display());
    Ok(())
}

/// The error of going on with other options, with the names of the options to repeat.
pub fn name_options(error: energyflow::Error) -> Box<dyn Error> {
    let energyflow::Error::Data { reason, .. } = &error else {
        return error.into();
    };
    let place = reason.split(' ').next().unwrap_or_default();
    let mut parts = place.split('.');
    let of = parts.next().unwrap_or_default();
    let field = parts.next().unwrap_or_default();
    let options = match (of, field) {
        _ if reason.starts_with("was trained on ") => {
            "the data, --batch, --length and --seed".into()
        }
        ("encoder" | "decoder", "vocabulary" | "padding") => "--tokenizer".into(),
        ("encoder" | "decoder", "embedding") => "--train".into(),
        ("options", "shared_last_block") => "--apart".into(),
        ("options", "condition") => "--z".into(),
        ("options", "pair_loss") => "--pairs, --scale and --symmetric".into(),
        ("options", "optimizer" | "decoder_optimizer") => match parts.next() {
            Some("weight_decay") => "--weight-decay".into(),
            Some("loss_scale") => "--precision and --loss-scale".into(),
            // `schedule`, the kind of schedule, its field.
            Some("schedule") => match parts.nth(1) {
                Some("peak" | "end") if field == "decoder_optimizer" => {
                    "--decoder-learning-rate".into()
                }
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
pub fn diverged(what: &str, checkpoints: &Path) -> Box<dyn Error> {
    format!(
        "the training diverged: {what}. No model is written; the checkpoints in {} are kept. A lower --learning-rate or a longer --warmup may help, with another --out",
        checkpoints.display()
    )
    .into()
}

/// What is not finite if the training has diverged. Other figures may be undefined without that.
pub fn divergence(evaluation: &Evaluation) -> Option<String> {
    let telling = ["cosine", "mse", "cross_entropy"];
    let mut values = evaluation.values();
    let (name, value) =
        values.find(|(name, value)| telling.contains(name) && !value.is_finite())?;
    Some(format!("{name} of the validation is {value}"))
}

/// Means of an epoch, by mode.
pub fn means(steps: &[Metrics]) -> String {
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

pub fn short(evaluation: &Evaluation) -> String {
    let mut parts = Vec::new();
    if let Some(encoder) = &evaluation.encoder {
        let (cosine, first) = (encoder.cosine, encoder.precision_at_1);
        parts.push(format!("cosine {cosine:.4}, P@1 {first:.3}"));
    }
    if evaluation.pairs.is_some() {
        let of_pairs = ["accuracy_at_1", "mrr", "spearman", "mse"];
        let values = evaluation
            .values()
            .filter(|(name, _)| of_pairs.contains(name));
        parts.extend(values.map(|(name, value)| format!("{name} {value:.4}")));
    }
    if let Some(decoder) = &evaluation.decoder {
        let (perplexity, accuracy) = (decoder.perplexity(), decoder.accuracy);
        parts.push(format!(
            "perplexity {perplexity:.2}, accuracy {accuracy:.4}"
        ));
    }
    parts.join(", ")
}

/// All figures of an evaluation, in one line.
pub fn figures(evaluation: &Evaluation) -> String {
    let figures = evaluation.values().map(|(name, value)| match name {
        "mse" => format!("mse {value:.6}"),
        "precision_at_1" => format!("P@1 {value:.3}"),
        "precision_at_5" => format!("P@5 {value:.3}"),
        "perplexity" => format!("perplexity {value:.2}"),
        name => format!("{name} {value:.4}"),
    });
    figures.collect::<Vec<_>>().join(", ")
}
