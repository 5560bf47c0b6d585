//! TextBridge. An encoder turns tokens into a sentence embedding and is distilled from a teacher. A decoder turns an embedding back
//! into tokens. Both need the rest of this module: datasets of tokens and teacher embeddings, batches of static shape, tokenisers
//! and metrics.
//!
//! The mask of a text says which of its positions count. Where it is 0, the token id has no influence.

pub mod batches;
mod card;
pub mod dataset;
mod decode;
pub mod decoder;
pub mod efb1;
pub mod encoder;
pub mod jsonl;
pub mod metrics;
mod model;
mod sample;
mod samples;
pub mod tensors;
pub mod tokenizer;
pub mod trainer;

pub use crate::types::Precision;
pub use batches::{Batch, Batches};
pub use card::Card;
pub use dataset::Dataset;
pub use decoder::{Decoder, DecoderOptions, next_tokens};
pub use efb1::Efb1Writer;
pub use encoder::{Encoder, EncoderOptions};
pub use jsonl::{JsonLines, Record};
pub use model::Model;
pub use sample::{OpenOptions, Sample};
pub use tensors::DatasetWriter;
#[cfg(feature = "tokenizer")]
pub use tokenizer::WordPiece;
pub use tokenizer::{Tokenizer, Whitespace};
pub use trainer::{
    Condition, Evaluation, FitOptions, InfoNce, Metrics, Trainer, TrainerOptions, TrainingMode,
};
