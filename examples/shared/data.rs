//! The data of a training.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use energyflow::text::{Batches, Dataset, OpenOptions, Tokenizer, WordPiece};

use super::opened::Opened;
use super::options::Training;

type Outcome<T> = Result<T, Box<dyn Error>>;

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
            tokenizer: Arc::new(tokenizer),
            tokenizer_json: json,
            description,
        })
    }
}
