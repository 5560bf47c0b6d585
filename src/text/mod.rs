//! TextBridge: text to vectors, search, and vectors to text. An encoder turns tokens into a sentence embedding and is distilled from a
//! teacher. A decoder turns an embedding back into tokens.
//!
//! - Use: [`TextEncoder`], [`TextDecoder`] and [`Index`] load a [`Model`] folder; [`SentenceTransformer`] loads a transformer.
//! - Training: [`Trainer`], with a [`TextFile`] and a [`TeacherCache`], or with a [`Dataset`] and [`Batches`].
//!
//! The mask of a text says which of its positions count. Where it is 0, the token id has no influence.

pub mod batches;
mod bert;
mod buckets;
mod card;
pub mod dataset;
mod dataset_writer;
mod decode;
pub mod decoder;
mod efb;
pub mod efb1;
pub mod efb2;
mod embeddings;
pub mod encoder;
mod engine;
mod engine_methods;
mod fingerprint;
mod generate;
#[cfg(feature = "hub")]
pub mod hub;
mod index;
mod index_file;
pub mod jsonl;
pub mod metrics;
mod model;
pub mod npy;
mod offsets;
mod pairs;
mod prefetch;
mod record_writer;
mod records;
mod rows;
mod sample;
mod samples;
mod sentence_transformer;
mod split;
mod store;
mod teacher_cache;
mod teacher_table;
pub mod tensors;
mod text_encoder;
mod text_file;
mod text_lines;
pub mod tokenizer;
pub mod trainer;
pub mod transformer;
mod transformer_model;
#[cfg(feature = "tokenizer")]
mod word_piece;

pub use crate::types::Precision;
pub use batches::{Batch, Batches};
pub use card::Card;
pub use dataset::Dataset;
pub use dataset_writer::{DatasetWriter, EmbeddingType};
pub use decoder::{Decoder, DecoderOptions, next_tokens};
pub use efb1::Efb1Writer;
pub use efb2::Efb2Writer;
pub use embeddings::{Embeddings, Truncation};
pub use encoder::{Encoder, EncoderOptions, EncoderPooling};
pub use fingerprint::fingerprint;
pub use generate::{
    DecodeOptions, Finish, Generation, Piece, Stop, Stream, TextDecoder, TextDecoderOptions,
    TokenStep,
};
pub use index::{Hit, Index, IndexOptions};
pub use jsonl::{JsonLines, JsonLinesWriter, Record};
pub use model::Model;
pub use npy::{NpyReader, NpyWriter};
pub use pairs::{PairOptions, Pairs};
pub use record_writer::{DatasetFormat, RecordWriter};
pub use records::Records;
pub use sample::{OpenOptions, Sample};
pub use sentence_transformer::SentenceTransformer;
pub use split::{Split, ValidationSize, normalized, split_key};
pub use teacher_cache::{CacheState, TeacherCache};
pub use teacher_table::TeacherTable;
pub use text_encoder::{TextEncoder, TextEncoderOptions};
pub use text_file::TextFile;
pub use tokenizer::{Tokenizer, Tokens, Whitespace};
pub use trainer::{
    Condition, Contrastive, Evaluation, FitOptions, InfoNce, Metrics, PairLoss, StartOptions,
    Trainer, TrainerOptions, TrainingMode,
};
pub use transformer::{Pooling, Transformer, TransformerOptions};
pub use transformer_model::TransformerModel;
#[cfg(feature = "tokenizer")]
pub use word_piece::WordPiece;
