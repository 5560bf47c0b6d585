//! Fine-tunes a teacher (a folder of sentence-transformers) or an encoder (a model folder of this crate) on pairs of texts.
//!
//! ```text
//! cargo run --release --example finetune -- --model all-MiniLM-L6-v2 --pairs pairs.jsonl
//! cargo run --release --example finetune -- --model out/model --pairs scored.tsv --largest-score 5 --learning-rate 5e-4
//! ```

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use clap::Parser;
use energyflow::text::{
    Batches, Card, Model, PairLoss, PairOptions, Pairs, Tokenizer, Trainer, TrainerOptions,
    TransformerModel, WordPiece,
};

mod shared {
    pub mod device;
    pub mod fit;
    pub mod hub;
    pub mod opened;
    pub mod options;
    pub mod program;
    pub mod report;
    pub mod training;
    pub mod validation;
}
use shared::hub::folder;
use shared::opened::Opened;
use shared::options::{Output, Training};
use shared::report::figures;
use shared::training::run;
use shared::validation::{Validation, limit_batch};

/// Fine-tune a sentence encoder on pairs of texts on the GPU.
///
/// A pair is an anchor and a positive, a text that is to be found by it, perhaps with a negative: the encoder learns to tell the positive from
/// all other texts of the batch. Or it is two texts and a score: the encoder learns that their cosine is the score. The file is JSON lines,
/// {"anchor": …, "positive": …, "negative": …} or {"a": …, "b": …, "score": …}, or a table of tab-separated values.
///
/// The result is a folder like the one it began with: OUT/model.
#[derive(Parser)]
#[command(
    version,
    mut_arg("epochs", |arg| arg.default_value("1")),
    mut_arg("learning_rate", |arg| arg.default_value("2e-5").help("Highest learning rate. 2e-5 suits a transformer; an encoder of this crate needs about 5e-4")),
    mut_arg("dropout", |arg| arg.default_value("0.1").help("Share of the elements that are dropped in training")),
    mut_arg("out", |arg| arg.default_value("out-finetune"))
)]
pub struct Options {
    /// What to fine-tune: a folder of sentence-transformers, a model folder of this crate, or with --features hub the name of a model on
    /// the Hugging Face hub, such as sentence-transformers/all-MiniLM-L6-v2
    #[arg(long, value_name = "DIR", help_heading = "Data")]
    model: String,
    /// Pairs of texts, as JSON lines or tab-separated values
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    pairs: PathBuf,
    /// Pairs for validation. Without it a part of --pairs
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with_all = ["validation_share", "validation_count"],
        help_heading = "Data"
    )]
    validation: Option<PathBuf>,
    #[command(flatten, next_help_heading = "Data")]
    size: Validation,
    /// The largest score that occurs; scores are divided by it, so that they are in [-1, 1]
    #[arg(
        long,
        value_name = "SCORE",
        default_value_t = 1.0,
        help_heading = "Data"
    )]
    largest_score: f32,
    /// Tokens per text in training; longer texts are cut. Without it 64, or less if the model has less. An encoder of this crate keeps its own
    #[arg(long, value_name = "L", help_heading = "Data")]
    length: Option<usize>,
    /// Factor of the cosines before the softmax, for pairs without scores
    #[arg(
        long,
        value_name = "FACTOR",
        default_value_t = 20.0,
        help_heading = "Training"
    )]
    scale: f32,
    /// Let positives find their anchors, too, for pairs without scores
    #[arg(long, help_heading = "Training")]
    symmetric: bool,
    #[command(flatten)]
    training: Training,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    device: shared::device::Device,
}

/// A tokenizer, and the content of its `tokenizer.json`.
type WithJson = (Arc<dyn Tokenizer>, Vec<u8>);

/// What is fine-tuned.
enum Network {
    Transformer(Box<TransformerModel>),
    Encoder(Box<Model>),
}

impl Network {
    fn load(folder: &Path) -> Result<Self, Box<dyn Error>> {
        let config = std::fs::read(folder.join("config.json")).unwrap_or_default();
        let config: serde_json::Value = serde_json::from_slice(&config).unwrap_or_default();
        let of_crate = config["format"] == "energyflow.model";
        if !of_crate {
            return Ok(Self::Transformer(Box::new(TransformerModel::load(folder)?)));
        }
        let model = Model::load(folder)?;
        if model.decoder.is_some() || model.encoder.is_none() {
            let shown = folder.display();
            return Err(
                format!("{shown}: the model has a decoder; pairs train an encoder alone").into(),
            );
        }
        Ok(Self::Encoder(Box::new(model)))
    }

    /// Tokens per text in training.
    fn length(&self, wanted: Option<usize>) -> Result<usize, Box<dyn Error>> {
        match self {
            Self::Transformer(model) => Ok(wanted.unwrap_or(64.min(model.options.length))),
            Self::Encoder(model) => {
                let own = model.encoder.as_ref().map_or(0, |encoder| encoder.length);
                match wanted.is_none_or(|wanted| wanted == own) {
                    true => Ok(own),
                    false => Err(format!("--length: the encoder is for {own} tokens").into()),
                }
            }
        }
    }

    /// The tokenizer for texts of so many tokens, and its description.
    fn tokenizer(&self, length: usize) -> Result<WithJson, Box<dyn Error>> {
        let json = match self {
            Self::Transformer(model) => &model.tokenizer,
            Self::Encoder(model) => &model.tokenizer,
        };
        let json = json.clone().ok_or("the model has no tokenizer.json")?;
        let tokenizer: Arc<dyn Tokenizer> = match self {
            Self::Transformer(model) => model.word_piece(length)?,
            Self::Encoder(_) => Arc::new(WordPiece::from_bytes(&json, length)?),
        };
        Ok((tokenizer, json))
    }

    fn trainer(
        &mut self,
        gpu: &energyflow::Gpu,
        length: usize,
        dropout: f32,
        options: &TrainerOptions,
    ) -> energyflow::Result<Trainer> {
        match self {
            Self::Transformer(model) => {
                model.options.dropout = dropout;
                Trainer::from_transformer(gpu, model, length, options)
            }
            Self::Encoder(model) => {
                if let Some(encoder) = &mut model.encoder {
                    encoder.dropout = dropout;
                }
                Trainer::from_model(gpu, model, options)
            }
        }
    }

    fn card(&self) -> Card {
        match self {
            Self::Transformer(_) => Card::default(),
            Self::Encoder(model) => Card::default()
                .name(model.card.name.clone())
                .description(model.card.description.clone())
                .license(model.card.license.clone())
                .languages(model.card.languages.clone()),
        }
    }
}

fn main() -> ExitCode {
    shared::program::main(finetune)
}

/// The whole example.
pub fn finetune(mut options: Options) -> Result<(), Box<dyn Error>> {
    let gpu = options.device.open()?;
    let mut network = Network::load(&folder(&options.model)?)?;
    let length = network.length(options.length)?;
    let (tokenizer, json) = network.tokenizer(length)?;
    let (mut data, loss) = open(&mut options, length, tokenizer, json)?;
    let training = options
        .training
        .options(&data.batches, 1)?
        .pair_loss(Some(loss));
    let start = Instant::now();
    let dropout = options.training.dropout;
    let mut trainer = network.trainer(&gpu, length, dropout, &training)?;
    options.training.describe(&trainer, start);
    if !options.output.resume {
        println!("before  {}", figures(&trainer.evaluate(&data.validation)?));
    }
    let none = |_: &Trainer, _: &Opened| Ok(Vec::new());
    let (how, output) = (&options.training, &options.output);
    run(&mut trainer, &mut data, how, output, network.card(), &none)?;
    Ok(())
}

/// Reads the pairs, and says what is in them.
fn open(
    options: &mut Options,
    length: usize,
    tokenizer: Arc<dyn Tokenizer>,
    tokenizer_json: Vec<u8>,
) -> Result<(Opened, PairLoss), Box<dyn Error>> {
    let how = PairOptions::new(length).largest_score(options.largest_score);
    let read = |path: &Path| -> Result<Pairs, Box<dyn Error>> {
        let pairs = Pairs::open(path, &*tokenizer, &how)?;
        let shown = path.display();
        if pairs.blank_lines() > 0 {
            println!(
                "data    {} blank lines of {shown} left out",
                pairs.blank_lines()
            );
        }
        if pairs.cut() > 0 {
            println!(
                "data    {} texts of {shown} cut to {length} tokens",
                pairs.cut()
            );
        }
        if !pairs.ignored().is_empty() {
            println!(
                "data    not read of {shown}: {}",
                pairs.ignored().join(", ")
            );
        }
        Ok(pairs)
    };
    let pairs = read(&options.pairs)?;
    let (train, validation) = match &options.validation {
        Some(path) => {
            let validation = read(path)?;
            if validation.loss() != pairs.loss() {
                return Err(format!(
                    "{} and {} have pairs of different kinds: both need a negative, a score, or neither",
                    options.pairs.display(),
                    path.display()
                )
                .into());
            }
            (pairs.dataset().clone(), validation.dataset().clone())
        }
        None => pairs.split(options.size.of(pairs.dataset().len()))?,
    };
    let loss = match pairs.loss() {
        PairLoss::Contrastive(loss) => {
            PairLoss::Contrastive(loss.scale(options.scale).symmetric(options.symmetric))
        }
        other => other,
    };
    let kind = match (pairs.has_scores(), pairs.has_negatives()) {
        (true, _) => "with scores",
        (_, true) => "with negatives",
        _ => "of anchor and positive",
    };
    println!(
        "data    {} pairs to train, {} to validate, {kind}",
        train.len(),
        validation.len()
    );
    limit_batch(&mut options.training, train.len());
    let name = options.pairs.file_name().unwrap_or_default();
    let description = format!("{} pairs of `{}`.", train.len(), name.to_string_lossy());
    let (batch, seed) = (options.training.batch, options.training.seed);
    let batches = Batches::training(train, batch, pairs.tokens(), seed)?
        .padding(tokenizer.padding_id().unwrap_or(0));
    let data = Opened {
        batches,
        validation,
        tokenizer,
        tokenizer_json,
        description,
    };
    Ok((data, loss))
}
