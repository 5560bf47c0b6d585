//! Text data on the host: datasets of tokens and teacher embeddings, batches of static shape, tokenisers, metrics.

mod atomic;
pub mod batches;
pub mod compact;
pub mod dataset;
pub mod efb1;
pub mod jsonl;
mod mapped;
pub mod metrics;
mod sample;
pub mod tokenizer;

pub use batches::{Batch, Batches};
pub use compact::{Compact, CompactWriter};
pub use dataset::Dataset;
pub use efb1::{Efb1, Efb1Writer};
pub use jsonl::{JsonLines, Record};
pub use sample::{OpenOptions, Sample};
#[cfg(feature = "tokenizer")]
pub use tokenizer::WordPiece;
pub use tokenizer::{Tokenizer, Whitespace};
