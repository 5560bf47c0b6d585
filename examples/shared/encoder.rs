//! The options that load a text encoder.

use std::error::Error;
use std::path::PathBuf;

use clap::ValueEnum;
use energyflow::Gpu;
use energyflow::text::{Precision, TextEncoder, TextEncoderOptions};

use super::model::explain;

/// Element type of activations.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Storage {
    F32,
    F16,
}

/// Flatten it into the options of an example: `#[command(flatten)] encoder: Encoder`.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Encoder")]
pub struct Encoder {
    /// Model folder, as the training examples write it; without it the bundled model
    #[arg(long, value_name = "DIR", hide_default_value = true, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/data/model"))]
    pub model: PathBuf,
    /// Element type of activations; sums are f32
    #[arg(long, value_enum, default_value = "f32")]
    precision: Storage,
    /// Control tokens in texts, such as [SEP], become the tokens of that name instead of text
    #[arg(long)]
    pub control_tokens: bool,
}

impl Encoder {
    /// Loads the encoder; `normalize` overrides what the model says.
    pub fn load(&self, gpu: &Gpu, normalize: Option<bool>) -> Result<TextEncoder, Box<dyn Error>> {
        let options = TextEncoderOptions::default()
            .precision(match self.precision {
                Storage::F32 => Precision::F32,
                Storage::F16 => Precision::Mixed,
            })
            .normalize(normalize)
            .control_tokens(self.control_tokens);
        TextEncoder::load_with(gpu, &self.model, &options)
            .map_err(|error| explain(&self.model, "distill", error))
    }
}
