//! Joint training: an encoder is distilled from a teacher's embeddings, and a decoder that shares its last block learns to turn embeddings
//! back into text. Every batch is cut into steps of both modes.
//!
//! Without arguments: 12 000 WordNet sentences with MiniLM embeddings and small networks.
//! The full size is `--width 256 --hidden 512 --kernel 5 --dilations 1,2,4,8`.

use std::error::Error;
use std::process::ExitCode;
use std::time::Instant;

use clap::{Parser, ValueEnum};
use energyflow::text::{Card, Condition, EncoderOptions, InfoNce, Trainer, TrainingMode};

mod shared {
    pub mod data;
    pub mod decoder;
    pub mod device;
    pub mod fit;
    pub mod generate;
    pub mod opened;
    pub mod options;
    pub mod program;
    pub mod report;
    pub mod training;
}
use shared::data::Data;
use shared::generate::{generate, show};
use shared::opened::Opened;
use shared::options::{Output, Training};
use shared::training::run;

#[derive(Clone, Copy, ValueEnum)]
enum Z {
    /// The teacher's embedding
    Teacher,
    /// The encoder's embedding, as a constant
    Student,
    /// The encoder's embedding, and the decoder trains the encoder, too
    TrainedStudent,
}

/// Train a sentence encoder and a decoder together on the GPU.
///
/// On a software driver a step takes seconds; try --samples 2560 --epochs 1 there.
#[derive(Parser)]
#[command(version, mut_arg("out", |out| out.default_value("out-joint")))]
struct Options {
    #[command(flatten)]
    data: Data,
    #[command(flatten)]
    training: Training,
    /// Steps per batch, each on its share of the samples
    #[arg(
        long,
        value_name = "N",
        default_value_t = 2,
        help_heading = "Joint training"
    )]
    chunks: usize,
    /// Share of the steps that train the encoder
    #[arg(
        long,
        value_name = "SHARE",
        default_value_t = 0.5,
        help_heading = "Joint training"
    )]
    ab_ratio: f64,
    /// Give the decoder a last block of its own
    #[arg(long, help_heading = "Joint training")]
    apart: bool,
    /// What the decoder is given
    #[arg(
        long,
        value_enum,
        default_value = "teacher",
        help_heading = "Joint training"
    )]
    z: Z,
    /// Weight of a contrastive term (InfoNCE) in the encoder's loss
    #[arg(
        long,
        value_name = "WEIGHT",
        default_value_t = 0.0,
        help_heading = "Joint training"
    )]
    info_nce: f32,
    /// Weight of the term z, decoder's text, encoder's z in the decoder's loss
    #[arg(
        long,
        value_name = "WEIGHT",
        default_value_t = 0.0,
        help_heading = "Joint training"
    )]
    cycle: f32,
    /// Highest learning rate of the decoder's steps. Without it --learning-rate
    #[arg(
        long,
        visible_alias = "decoder-lr",
        value_name = "RATE",
        help_heading = "Joint training"
    )]
    decoder_learning_rate: Option<f32>,
    #[command(flatten)]
    decoder: shared::decoder::Decoder,
    #[command(flatten)]
    sizes: shared::decoder::Sizes,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    device: shared::device::Device,
}

fn main() -> ExitCode {
    shared::program::main(train)
}

fn train(options: Options) -> Result<(), Box<dyn Error>> {
    let gpu = options.device.open()?;
    let mut data = options.data.open(&options.training)?;
    let decoder = options
        .decoder
        .network(&options.sizes, &options.training, &data);
    let encoder = EncoderOptions::default()
        .vocabulary(data.tokenizer.vocab_size() as usize)
        .length(decoder.length)
        .width(decoder.width)
        .hidden(decoder.hidden)
        .kernel(decoder.kernel)
        .dilations(decoder.dilations.clone())
        .embedding(decoder.embedding)
        .table_bound(decoder.table_bound)
        .dropout(decoder.dropout)
        .padding(decoder.padding);
    let of_a = (options.chunks as f64 * options.ab_ratio).round() as usize;
    let of_b = options.chunks.saturating_sub(of_a);
    let info_nce = (options.info_nce > 0.0).then(|| InfoNce::new(options.info_nce));
    // Each mode has its own schedule over its own steps.
    let rate = options.training.learning_rate;
    let of_decoder = options.decoder_learning_rate.unwrap_or(rate);
    let optimizer =
        |steps: usize, rate: f32| options.training.optimizer(&data.batches, steps, rate);
    let training = options
        .training
        .options(&data.batches, options.chunks)?
        .optimizer(optimizer(of_a, rate)?)
        .decoder_optimizer(Some(optimizer(of_b, of_decoder)?))
        .ab_ratio(options.ab_ratio)
        .shared_last_block(!options.apart)
        .condition(match options.z {
            Z::Teacher => Condition::Teacher,
            Z::Student => Condition::Student,
            Z::TrainedStudent => Condition::TrainedStudent,
        })
        .info_nce(info_nce)
        .cycle(options.cycle)
        .smoothing(options.decoder.smoothing);
    let start = Instant::now();
    let mut trainer = Trainer::joint(&gpu, &encoder, &decoder, &training)?;
    options.training.describe(&trainer, start);
    let modes = (0..options.chunks).map(|chunk| match trainer.mode(chunk) {
        TrainingMode::A => 'A',
        TrainingMode::B => 'B',
    });
    println!("batch   steps {}", modes.collect::<String>());
    let card = Card::default()
        .name("Sentence encoder and decoder")
        .description(
            "Sentence embeddings, distilled from those of a transformer, and text from embeddings.",
        );
    let more = |trainer: &Trainer, data: &Opened| match options.decoder.generate {
        0 => Ok(Vec::new()),
        n => Ok(generate(trainer, data, n)?.figures),
    };
    let (how, output) = (&options.training, &options.output);
    run(&mut trainer, &mut data, how, output, card, &more)?;
    show(&trainer, &data)
}
