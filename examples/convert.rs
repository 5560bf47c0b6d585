//! Converts a dataset to safetensors, the format that is read from the disk as it is needed.
//!
//! ```text
//! cargo run --example convert -- train.efb train.safetensors
//! cargo run --example convert -- val.efb val.safetensors --texts val.txt --vocab 30522
//! cargo run --example convert -- pairs.jsonl pairs.safetensors --tokenizer tokenizer.json --max-length 64
//! ```

use std::error::Error;
use std::path::{Path, PathBuf};

use clap::Parser;
use energyflow::DType;
use energyflow::text::{Dataset, DatasetWriter, OpenOptions, Tokenizer};

#[derive(Parser)]
#[command(
    about = "Converts a dataset (EFB1, JSON lines or safetensors, told by its content) to safetensors"
)]
struct Args {
    /// Dataset to read.
    input: PathBuf,
    /// File to write.
    output: PathBuf,
    /// Texts to store with the samples, one per line, in the same order.
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
    /// Store embeddings as f32 instead of f16.
    #[arg(long)]
    exact: bool,
}

fn main() {
    if let Err(error) = run(&Args::parse()) {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let tokenizer = match &args.tokenizer {
        Some(path) => Some(load_tokenizer(path, args.max_length)?),
        None => None,
    };
    let mut options = OpenOptions::default();
    options.vocab = args.vocab;
    options.tokenizer = tokenizer.as_deref();
    let dataset = Dataset::open_with(&args.input, options)?;
    let file = match &args.texts {
        Some(path) => {
            let read = std::fs::read_to_string(path);
            Some(read.map_err(|error| format!("{}: {error}", path.display()))?)
        }
        None => None,
    };
    let texts: Option<Vec<&str>> = file.as_ref().map(|texts| texts.lines().collect());
    if let Some(texts) = texts.as_ref().filter(|texts| texts.len() != dataset.len()) {
        return Err(format!("{} texts for {} samples", texts.len(), dataset.len()).into());
    }
    let dtype = if args.exact { DType::F32 } else { DType::F16 };
    let mut writer = DatasetWriter::create(&args.output, dataset.width(), dtype)?;
    for (index, sample) in dataset.iter().enumerate() {
        let sample = sample?;
        let text = texts.as_ref().map(|texts| texts[index]).or(sample.text());
        writer.push(sample.ids(), sample.mask(), sample.target(), text)?;
    }
    writer.finish()?;
    let written = Dataset::open_with(&args.output, options)?;
    println!(
        "{}: {} samples of width {}",
        args.output.display(),
        written.len(),
        written.width()
    );
    Ok(())
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
