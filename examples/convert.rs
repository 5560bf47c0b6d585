//! Converts a dataset to the compact format.
//!
//! ```text
//! cargo run --example convert -- train.efb train.efc
//! cargo run --example convert -- val.efb val.efc --texts val.txt --vocab 30522
//! cargo run --example convert -- pairs.jsonl pairs.efc --tokenizer tokenizer.json --max-length 64
//! ```

use std::error::Error;
use std::path::{Path, PathBuf};

use clap::Parser;
use energyflow::text::{CompactWriter, Dataset, JsonLines, OpenOptions, Tokenizer};

#[derive(Parser)]
#[command(
    about = "Converts EFB1, or JSON lines if the name ends in .jsonl, to the compact format EFC1"
)]
struct Args {
    /// Dataset to read.
    input: PathBuf,
    /// Compact file to write.
    output: PathBuf,
    /// Texts to store with the samples, one a line, in the same order (EFB1 only).
    #[arg(long)]
    texts: Option<PathBuf>,
    /// Size of the vocabulary, which token ids must be below.
    #[arg(long)]
    vocab: Option<u32>,
    /// Tokeniser for JSON lines that have no ids.
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// Cut what the tokeniser makes to this many tokens.
    #[arg(long, default_value_t = 64)]
    max_length: usize,
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    if args.input.extension().is_some_and(|end| end == "jsonl") {
        convert_json_lines(&args)?;
    } else {
        convert_binary(&args)?;
    }
    let options = OpenOptions::default().vocab(args.vocab);
    let written = Dataset::open_with(&args.output, options)?;
    println!(
        "{}: {} samples of width {}",
        args.output.display(),
        written.len(),
        written.width()
    );
    Ok(())
}

fn convert_binary(args: &Args) -> Result<(), Box<dyn Error>> {
    let dataset = Dataset::open_with(&args.input, OpenOptions::default().vocab(args.vocab))?;
    let file = args
        .texts
        .as_ref()
        .map(std::fs::read_to_string)
        .transpose()?;
    let texts: Option<Vec<&str>> = file.as_ref().map(|texts| texts.lines().collect());
    if let Some(texts) = texts.as_ref().filter(|texts| texts.len() != dataset.len()) {
        return Err(format!("{} texts for {} samples", texts.len(), dataset.len()).into());
    }
    let mut writer = CompactWriter::create(&args.output, dataset.width())?;
    for (index, sample) in dataset.iter().enumerate() {
        let ids: Vec<u32> = sample.ids().collect();
        let mask: Vec<u8> = sample.mask().collect();
        let target: Vec<f32> = sample.target().collect();
        let text = texts.as_ref().map(|texts| texts[index]).or(sample.text());
        writer.push(&ids, &mask, &target, text)?;
    }
    Ok(writer.finish()?)
}

fn convert_json_lines(args: &Args) -> Result<(), Box<dyn Error>> {
    let tokenizer = match &args.tokenizer {
        Some(path) => Some(load_tokenizer(path, args.max_length)?),
        None => None,
    };
    let mut writer: Option<CompactWriter> = None;
    for record in JsonLines::open_with(&args.input, OpenOptions::default().vocab(args.vocab))? {
        let record = record?;
        let ids = match (record.input_ids, &record.text, &tokenizer) {
            (Some(ids), ..) => ids,
            (None, Some(text), Some(tokenizer)) => tokenizer.encode(text)?,
            _ => return Err("a line has no input_ids: give a --tokenizer".into()),
        };
        let mask = record.attention_mask.unwrap_or_else(|| vec![1; ids.len()]);
        let writer = match &mut writer {
            Some(writer) => writer,
            None => writer.insert(CompactWriter::create(&args.output, record.target.len())?),
        };
        writer.push(&ids, &mask, &record.target, record.text.as_deref())?;
    }
    Ok(writer.ok_or("no lines")?.finish()?)
}

#[cfg(feature = "tokenizer")]
fn load_tokenizer(path: &Path, max_length: usize) -> Result<Box<dyn Tokenizer>, Box<dyn Error>> {
    let tokenizer = energyflow::text::WordPiece::from_file(path, max_length)?;
    Ok(Box::new(tokenizer))
}

#[cfg(not(feature = "tokenizer"))]
fn load_tokenizer(_: &Path, _: usize) -> Result<Box<dyn Tokenizer>, Box<dyn Error>> {
    Err("built without the feature `tokenizer`".into())
}
