//! The data of a training, open.

use std::sync::Arc;

use energyflow::text::{Batches, Dataset, Tokenizer};

/// Data, and what belongs to them.
#[allow(dead_code, reason = "not every example reads all of it")]
#[derive(Clone)]
pub struct Opened {
    pub batches: Batches,
    pub validation: Dataset,
    pub tokenizer: Arc<dyn Tokenizer>,
    pub tokenizer_json: Vec<u8>,
    /// What the data are, for the card.
    pub description: String,
}
