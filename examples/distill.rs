//! Mode A: distils a sentence encoder from a teacher's embeddings, entirely on the GPU, then answers questions with it.
//!
//! Without arguments: 12 000 WordNet sentences with MiniLM embeddings, a small encoder that starts from its teacher, three epochs.
//!
//! From a text file to a model:
//!
//! ```text
//! cargo run --release --example distill -- --texts my.txt --teacher all-MiniLM-L6-v2
//! ```

use std::error::Error;
use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use energyflow::Gpu;
use energyflow::text::metrics::nearest;
use energyflow::text::{
    Card, Evaluation, Index, IndexOptions, InfoNce, TeacherTable, TextEncoder, TextFile, Trainer,
};

mod shared {
    pub mod data;
    pub mod device;
    pub mod fit;
    pub mod hub;
    pub mod network;
    pub mod opened;
    pub mod options;
    pub mod program;
    pub mod questions;
    pub mod report;
    pub mod teacher;
    pub mod texts;
    pub mod training;
    pub mod validation;
}
use shared::data::Data;
use shared::opened::Opened;
use shared::options::{Output, Training};
use shared::questions::{converse, shown};
use shared::texts::Texts;
use shared::training::run;

/// Distil a sentence encoder from a teacher's embeddings on the GPU.
///
/// With --texts and --teacher a text file is all there is: the teacher embeds it, the encoder starts from the teacher, learns, is
/// written to OUT/model, and answers questions about the file.
#[derive(Parser)]
#[command(
    version,
    mut_arg("epochs", |arg| arg.default_value("3")),
    mut_arg("learning_rate", |arg| arg.default_value("3e-3")),
    mut_arg("validation_share", |arg| arg.requires("texts")),
    mut_arg("validation_count", |arg| arg.requires("texts"))
)]
pub struct Options {
    #[command(flatten)]
    texts: Texts,
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
    /// Ask this instead of the built-in questions (repeat for more). With --texts, questions are read from the terminal without it
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

/// The whole example.
pub fn distill(mut options: Options) -> Result<(), Box<dyn Error>> {
    let gpu = options.device.open()?;
    let length = options.data.length;
    let from_texts = options.texts.open(&gpu, length, &mut options.training)?;
    let mut data = match &from_texts {
        Some(from_texts) => from_texts.data.clone(),
        None => options.data.open(&options.training)?,
    };
    let encoder = options
        .network
        .options()
        .vocabulary(data.tokenizer.vocab_size() as usize)
        .length(options.data.length)
        .embedding(data.batches.dataset().width())
        .dropout(options.training.dropout)
        .padding(data.tokenizer.padding_id());
    let info_nce = (options.info_nce != 0.0).then(|| InfoNce::new(options.info_nce));
    let training = options
        .training
        .options(&data.batches, 1)?
        .info_nce(info_nce);
    let training = options.network.rates(training);
    let start = Instant::now();
    let mut trainer = Trainer::distill(&gpu, &encoder, &training)?;
    options.training.describe(&trainer, start);
    let table = from_texts.as_ref().map(|from_texts| || from_texts.table());
    let table = table
        .as_ref()
        .map(|table| table as &dyn Fn() -> Result<TeacherTable, Box<dyn Error>>);
    options
        .network
        .start(&mut trainer, data.batches.dataset(), table)?;
    let card = Card::default()
        .name("Sentence encoder")
        .description("Sentence embeddings, distilled from those of a transformer.");
    let none = |_: &Trainer, _: &Opened| Ok(Vec::new());
    let (how, output) = (&options.training, &options.output);
    let evaluation = run(&mut trainer, &mut data, how, output, card, &none)?;
    match from_texts {
        Some(from_texts) => search(
            &gpu,
            &output.out.join("model"),
            &from_texts.texts,
            &options.ask,
        ),
        None => answer(&options.ask, &trainer, &data, &evaluation),
    }
}

/// Answers questions with the nearest lines of the text file, by the model that was written.
fn search(gpu: &Gpu, model: &Path, texts: &TextFile, ask: &[String]) -> Result<(), Box<dyn Error>> {
    if ask.is_empty() && !std::io::stdin().is_terminal() {
        println!(
            "ask it: cargo run --release --example search -- --model {} {}",
            model.display(),
            texts.path().display()
        );
        return Ok(());
    }
    let encoder = TextEncoder::load(gpu, model)?;
    let mut index = Index::new(gpu, encoder.width(), &IndexOptions::default())?;
    let mut lines = texts.read()?;
    loop {
        let block: Vec<String> = lines.by_ref().take(BLOCK).collect::<Result<_, _>>()?;
        if block.is_empty() {
            break;
        }
        let texts = block.into_iter().filter(|line| !line.trim().is_empty());
        index.add_texts(&encoder, &texts.collect::<Vec<_>>())?;
    }
    converse(ask, |question, out| {
        for hit in &index.search_texts(&encoder, &[question], 5)?[0] {
            let text = shown(index.text(hit.index).unwrap_or_default());
            writeln!(out, "  {:.3}  {text}", hit.score)?;
        }
        Ok(())
    })
}

/// Lines that are encoded at a time.
const BLOCK: usize = 1 << 17;

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
            println!(
                "  {cosine:.3}  {}",
                shown(sample.text().unwrap_or("(no text)"))
            );
        }
    }
    Ok(())
}
