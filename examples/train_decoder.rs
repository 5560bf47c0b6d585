//! Mode B: trains a decoder that turns the teacher's embedding of a text back into the text.
//!
//! Without arguments: 12 000 WordNet sentences with MiniLM embeddings and a small decoder.
//! The full size is `--width 256 --hidden 512 --kernel 5 --dilations 1,2,4,8`.

use std::error::Error;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use energyflow::text::{Card, Trainer};

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

/// Train a decoder from sentence embeddings back to text on the GPU.
///
/// On a software driver a step takes seconds; try --samples 2560 --epochs 1 there.
#[derive(Parser)]
#[command(
    version,
    mut_arg("epochs", |epochs| epochs.default_value("3")),
    mut_arg("out", |out| out.default_value("out-decoder"))
)]
struct Options {
    #[command(flatten)]
    data: Data,
    #[command(flatten)]
    training: Training,
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
    let training = options.training.options(&data.batches, 1)?;
    let training = training.smoothing(options.decoder.smoothing);
    let start = Instant::now();
    let mut trainer = Trainer::decode(&gpu, &decoder, &training)?;
    options.training.describe(&trainer, start);
    let card = Card::default()
        .name("Text decoder")
        .description("Text from the sentence embeddings of a transformer.");
    let more = |trainer: &Trainer, data: &Opened| match options.decoder.generate {
        0 => Ok(Vec::new()),
        n => Ok(generate(trainer, data, n)?.figures),
    };
    let (how, output) = (&options.training, &options.output);
    run(&mut trainer, &mut data, how, output, card, &more)?;
    show(&trainer, &data)
}
