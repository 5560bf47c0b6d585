//! Mode A: distils a sentence encoder from a teacher's embeddings, entirely on the GPU, then answers questions with it.
//!
//! Without arguments: 12 000 WordNet sentences with MiniLM embeddings, a small encoder that starts from its teacher, three epochs.

use std::error::Error;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use energyflow::text::metrics::nearest;
use energyflow::text::{Card, Evaluation, InfoNce, Tokenizer, Trainer};

mod shared {
    pub mod device;
    pub mod network;
    pub mod program;
    pub mod training;
}
use shared::training::{Data, Opened, Output, Training, run};

/// Distil a sentence encoder from a teacher's embeddings on the GPU.
#[derive(Parser)]
#[command(
    version,
    mut_arg("epochs", |arg| arg.default_value("3")),
    mut_arg("learning_rate", |arg| arg.default_value("3e-3"))
)]
struct Options {
    #[command(flatten)]
    data: Data,
    #[command(flatten)]
    training: Training,
    /// Weight of a contrastive term (InfoNCE) among the samples of a step
    #[arg(
        long,
        value_name = "WEIGHT",
        default_value_t = 0.0,
        help_heading = "Training"
    )]
    info_nce: f32,
    #[command(flatten)]
    network: shared::network::Network,
    #[command(flatten)]
    output: Output,
    /// Ask this instead of the built-in questions (repeat for more)
    #[arg(long, value_name = "TEXT", help_heading = "Questions")]
    ask: Vec<String>,
    #[command(flatten)]
    device: shared::device::Device,
}

const QUESTIONS: [&str; 4] = [
    "a large animal that lives in the sea",
    "to speak in a very quiet voice",
    "money paid for work",
    "the bright light of early morning",
];

fn main() -> ExitCode {
    shared::program::main(distill)
}

fn distill(options: Options) -> Result<(), Box<dyn Error>> {
    let gpu = options.device.open()?;
    let mut data = options.data.open(&options.training)?;
    let encoder = options
        .network
        .options()
        .vocabulary(data.tokenizer.vocab_size() as usize)
        .length(options.data.length)
        .embedding(data.batches.dataset().width())
        .dropout(options.training.dropout)
        .padding(data.tokenizer.padding_id());
    let info_nce = (options.info_nce > 0.0).then(|| InfoNce::new(options.info_nce));
    let training = options
        .training
        .options(&data.batches, 1)?
        .info_nce(info_nce);
    let training = options.network.rates(training);
    let start = Instant::now();
    let mut trainer = Trainer::distill(&gpu, &encoder, &training)?;
    options.training.describe(&trainer, start);
    options
        .network
        .start(&mut trainer, data.batches.dataset())?;
    let card = Card::default()
        .name("Sentence encoder")
        .description("Sentence embeddings, distilled from those of a transformer.");
    let none = |_: &Trainer, _: &Opened| Ok(Vec::new());
    let (how, output) = (&options.training, &options.output);
    let evaluation = run(&mut trainer, &mut data, how, output, card, &none)?;
    answer(&options.ask, &trainer, &data, &evaluation)
}

/// The validation texts whose embeddings are nearest to each question's.
fn answer(
    ask: &[String],
    trainer: &Trainer,
    data: &Opened,
    evaluation: &Evaluation,
) -> Result<(), Box<dyn Error>> {
    let questions: Vec<&str> = match ask.is_empty() {
        true => QUESTIONS.to_vec(),
        false => ask.iter().map(String::as_str).collect(),
    };
    let ids: Vec<Vec<u32>> = questions
        .iter()
        .map(|question| data.tokenizer.encode(question))
        .collect::<Result<_, _>>()?;
    let width = data.validation.width();
    let embeddings = trainer.embed(&ids)?;
    let of_texts = evaluation.encoder.as_ref().map(|scores| &scores.embeddings);
    let of_texts = of_texts.map(Vec::as_slice).unwrap_or_default();
    for (question, embedding) in questions.iter().zip(embeddings.chunks_exact(width)) {
        println!("\n{question}");
        for (index, cosine) in nearest(embedding, of_texts, 3)? {
            let sample = data.validation.sample(index)?;
            println!("  {cosine:.3}  {}", sample.text().unwrap_or("(no text)"));
        }
    }
    Ok(())
}
