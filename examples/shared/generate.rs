//! Figures of generated texts: z → text → z, and how much the texts repeat themselves.

use std::error::Error;

use energyflow::text::{
    DecodeOptions, Generation, TextDecoder, TextDecoderOptions, Trainer, metrics,
};

use super::opened::Opened;

/// Texts that were decoded from the teacher's embeddings of the first validation texts.
pub struct Generated {
    pub texts: Vec<Generation>,
    /// By name.
    pub figures: Vec<(&'static str, f64)>,
}

/// Decodes the embeddings of the first `n` validation texts, greedily.
pub fn generate(trainer: &Trainer, data: &Opened, n: usize) -> Result<Generated, Box<dyn Error>> {
    let n = n.min(data.validation.len());
    let width = data.validation.width();
    let mut z = Vec::with_capacity(n * width);
    for sample in data.validation.take(n).iter() {
        z.extend_from_slice(sample?.target());
    }
    let model = trainer
        .model()?
        .tokenizer(Some(data.tokenizer_json.clone()));
    let decoder = TextDecoder::new(
        trainer.session().gpu(),
        &model,
        &TextDecoderOptions::default(),
    )?;
    let options = DecodeOptions::default().max_len(data.batches.length());
    let texts = decoder.decode(&z, &options)?;
    let tokens: Vec<&[u32]> = texts.iter().map(|text| text.tokens.as_slice()).collect();
    let mut figures = vec![
        ("distinct_1", metrics::distinct_n(&tokens, 1)?),
        ("distinct_2", metrics::distinct_n(&tokens, 2)?),
    ];
    if trainer.encoder().is_some() {
        let ids = texts.iter().map(|text| data.tokenizer.encode(&text.text));
        let again = trainer.embed(&ids.collect::<Result<Vec<_>, _>>()?)?;
        figures.push(("cycle_cosine", metrics::mean_cosine(&again, &z, width)?));
        // The same texts beside the embeddings of others: what a decoder reaches that does not look at z.
        let mut others = z.clone();
        others.rotate_left(width);
        let shuffled = metrics::mean_cosine(&again, &others, width)?;
        figures.push(("shuffled_cosine", shuffled));
    }
    Ok(Generated { texts, figures })
}

/// Prints a few validation texts and what the decoder makes of their embeddings.
pub fn show(trainer: &Trainer, data: &Opened) -> Result<(), Box<dyn Error>> {
    const SHOWN: usize = 5;
    let generated = generate(trainer, data, SHOWN)?;
    println!("\nvalidation texts, and what the decoder makes of their embeddings:");
    for (i, text) in generated.texts.iter().enumerate() {
        let sample = data.validation.sample(i)?;
        println!(
            "\n{}\n  {}",
            sample.text().unwrap_or("(no text)"),
            text.text
        );
    }
    Ok(())
}
