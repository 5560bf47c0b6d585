//! How much of a file is for validation, and for a batch.

use energyflow::text::ValidationSize;

use super::options::Training;

/// Texts for validation, if the share is not given.
const USUAL: f64 = 1000.0;

/// Flatten it into the options of an example: `#[command(flatten)] size: Validation`.
#[derive(clap::Args, Clone, Debug)]
pub struct Validation {
    /// Share of the file for validation, chosen by a hash of the text, so that equal texts are on one side. Without it 0.05, and at most
    /// about 1000 texts
    #[arg(long, value_name = "SHARE", conflicts_with = "validation_count")]
    validation_share: Option<f64>,
    /// Number of texts or pairs for validation, instead of a share
    #[arg(long, value_name = "N")]
    validation_count: Option<usize>,
}

impl Validation {
    /// The size for a file of so many texts or pairs.
    pub fn of(&self, samples: usize) -> ValidationSize {
        match (self.validation_count, self.validation_share) {
            (Some(count), _) => ValidationSize::Count(count),
            (None, Some(share)) => ValidationSize::Share(share),
            (None, None) => ValidationSize::Share((USUAL / samples as f64).min(0.05)),
        }
    }
}

/// Makes the batch smaller if there are fewer samples to train on.
pub fn limit_batch(training: &mut Training, samples: usize) {
    if training.batch > samples && samples > 0 {
        println!(
            "batch   {samples} instead of {}: there are no more samples to train on",
            training.batch
        );
        training.batch = samples;
        // A part of a step is whole samples.
        training.micro_batches = 1;
    }
}
