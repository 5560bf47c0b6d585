//! TextBridge: an encoder from tokens to sentence embeddings and its distillation from a teacher, a decoder from an embedding back to
//! tokens and its training, and the data they need: datasets of tokens and teacher embeddings, batches of static shape, tokenisers,
//! metrics.

pub mod batches;
pub mod dataset;
mod decode;
pub mod decoder;
pub mod decoder_trainer;
pub mod distill;
pub mod efb1;
pub mod encoder;
pub mod jsonl;
pub mod metrics;
mod sample;
mod samples;
mod steps;
pub mod tensors;
pub mod tokenizer;

pub use crate::types::Precision;
pub use batches::{Batch, Batches};
pub use dataset::Dataset;
pub use decoder::{Decoder, DecoderOptions, next_tokens};
pub use decoder_trainer::{DecoderEvaluation, DecoderMetrics, DecoderTrainer, DecoderTraining};
pub use distill::{DistillOptions, Distiller, Evaluation, Metrics};
pub use efb1::Efb1Writer;
pub use encoder::{Encoder, EncoderOptions};
pub use jsonl::{JsonLines, Record};
pub use sample::{OpenOptions, Sample};
pub use tensors::DatasetWriter;
#[cfg(feature = "tokenizer")]
pub use tokenizer::WordPiece;
pub use tokenizer::{Tokenizer, Whitespace};
