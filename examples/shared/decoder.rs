//! The options of networks with a decoder.

use energyflow::text::DecoderOptions;

use super::opened::Opened;
use super::options::Training;

/// Sizes of the networks.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Network")]
pub struct Sizes {
    /// Width of the network
    #[arg(long, value_name = "D", default_value_t = 64)]
    width: usize,
    /// Width inside a block
    #[arg(long, value_name = "H", default_value_t = 128)]
    hidden: usize,
    /// Taps of the convolutions
    #[arg(long, value_name = "K", default_value_t = 3)]
    kernel: usize,
    /// Dilation of each block
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "1,2,4"
    )]
    dilations: Vec<usize>,
    /// The token tables start uniform in ± this
    #[arg(long, value_name = "BOUND", default_value_t = 0.05)]
    table_bound: f32,
}

/// What a decoder learns.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Decoder")]
pub struct Decoder {
    /// Label smoothing in training
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    pub smoothing: f32,
    /// Texts to generate at every validation, from the embeddings of the first validation texts; 0 generates none
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub generate: usize,
    /// Use the token table as the weight of the output layer
    #[arg(long)]
    tied: bool,
}

impl Decoder {
    /// The decoder for these data.
    pub fn network(&self, sizes: &Sizes, training: &Training, data: &Opened) -> DecoderOptions {
        DecoderOptions::default()
            .vocabulary(data.tokenizer.vocab_size() as usize)
            .length(data.batches.length())
            .width(sizes.width)
            .hidden(sizes.hidden)
            .kernel(sizes.kernel)
            .dilations(sizes.dilations.clone())
            .embedding(data.batches.dataset().width())
            .table_bound(sizes.table_bound)
            .dropout(training.dropout)
            .padding(data.tokenizer.padding_id())
            .tied(self.tied)
    }
}
