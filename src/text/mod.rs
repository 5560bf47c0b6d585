//! TextBridge. An encoder turns tokens into a sentence embedding and is distilled from a teacher. A decoder turns an embedding back
//! into tokens. Both need the rest of this module: datasets of tokens and teacher embeddings, batches of static shape, tokenisers
//! and metrics.
//!
//! The mask of a text says which of its positions count. Where it is 0, the token id has no influence.

pub mod batches;
mod buckets;
mod card;
pub mod dataset;
mod decode;
pub mod decoder;
pub mod decoder_trainer;
pub mod distill;
pub mod efb1;
mod embeddings;
pub mod encoder;
mod index;
mod index_file;
pub mod jsonl;
pub mod metrics;
mod model;
mod sample;
mod samples;
mod steps;
pub mod tensors;
mod text_encoder;
pub mod tokenizer;
#[cfg(feature = "tokenizer")]
mod word_piece;

pub use crate::types::Precision;
pub use batches::{Batch, Batches};
pub use card::Card;
pub use dataset::Dataset;
pub use decoder::{Decoder, DecoderOptions, next_tokens};
pub use decoder_trainer::{DecoderEvaluation, DecoderMetrics, DecoderTrainer, DecoderTraining};
pub use distill::{DistillOptions, Distiller, Evaluation, Metrics};
pub use efb1::Efb1Writer;
pub use embeddings::{Embeddings, Truncation};
pub use encoder::{Encoder, EncoderOptions};
pub use index::{Hit, Index, IndexOptions};
pub use jsonl::{JsonLines, Record};
pub use model::Model;
pub use sample::{OpenOptions, Sample};
pub use tensors::DatasetWriter;
pub use text_encoder::{TextEncoder, TextEncoderOptions};
pub use tokenizer::{Tokenizer, Tokens, Whitespace};
#[cfg(feature = "tokenizer")]
pub use word_piece::WordPiece;
