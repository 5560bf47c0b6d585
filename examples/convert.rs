//! Converts a dataset from any format to any other.
//!
//! ```text
//! cargo run --example convert -- train.efb train.safetensors
//! cargo run --example convert -- pairs.jsonl pairs.safetensors --tokenizer tokenizer.json --max-length 64
//! cargo run --example convert -- val.efb val.safetensors --texts val.txt --vocab 30522
//! cargo run --example convert -- sentences.txt train.efb2 --tokenizer tokenizer.json
//! cargo run --example convert -- train.safetensors train.txt
//! ```

use std::error::Error;
use std::path::{Path, PathBuf};

use clap::{Parser, ValueEnum};
use energyflow::text::{
    DatasetFormat, EmbeddingType, OpenOptions, RecordWriter, Records, Tokenizer,
};

/// Convert a dataset from one format to another.
///
/// The content of the input tells its format: safetensors, EFB1, EFB2, JSON lines, or texts (one per line) with their embeddings beside
/// them in a .npy or safetensors file of the same name. The ending of the output tells what is written:
///
///   .safetensors             token ids, embeddings and, if there are any, texts
///   .efb, .efb1              token ids and embeddings
///   .efb2                    embeddings with token ids, texts or both
///   .jsonl, .ndjson, .json   embeddings with token ids, texts or both
///   .txt, .npy               two files: texts, one per line, and their embeddings
///
/// Samples are read and written one by one, so the size of a dataset does not matter. The output appears under its name only when it is
/// complete.
#[derive(Parser)]
#[command(version, verbatim_doc_comment)]
struct Args {
    /// Dataset to read
    input: PathBuf,
    /// File to write
    output: PathBuf,
    /// Format to write, whatever the ending of the output
    #[arg(long, value_enum)]
    to: Option<To>,
    /// Make the token ids of texts that have none with this tokenizer.json
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Make all token ids anew from the texts
    #[arg(long, requires = "tokenizer")]
    retokenize: bool,
    /// Cut what the tokenizer makes to this many tokens
    #[arg(long, default_value_t = 64, value_name = "TOKENS")]
    max_length: usize,
    /// Size of the vocabulary, which token ids of the input must be below
    #[arg(long)]
    vocab: Option<u32>,
    /// Texts of the samples, one per line, in the same order
    #[arg(long, value_name = "FILE")]
    texts: Option<PathBuf>,
    /// Embeddings of the texts in the input, as .npy or safetensors
    #[arg(long, value_name = "FILE")]
    embeddings: Option<PathBuf>,
    /// How safetensors and .npy files store embeddings; the other formats store f32
    #[arg(long, value_enum, default_value = "f16")]
    store: Store,
    /// Convert only the first samples
    #[arg(long, value_name = "SAMPLES")]
    samples: Option<usize>,
}

#[derive(Clone, Copy, ValueEnum)]
enum To {
    Safetensors,
    Efb1,
    Efb2,
    Jsonl,
    Text,
}

#[derive(Clone, Copy, ValueEnum)]
enum Store {
    /// Exact
    F32,
    /// Half the size, rounded
    F16,
    /// A quarter of the size: integers with a scale per sample; safetensors only
    Int8,
}

fn main() {
    if let Err(error) = run(&Args::parse()) {
        // The library's names of what has an option of the same name here.
        let message = error.to_string().replace("OpenOptions::", "--");
        eprintln!(
            "error: {}",
            message.replace("give a tokenizer", "give --tokenizer")
        );
        std::process::exit(1);
    }
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let format = match args.to {
        Some(To::Safetensors) => DatasetFormat::Safetensors,
        Some(To::Efb1) => DatasetFormat::Efb1,
        Some(To::Efb2) => DatasetFormat::Efb2,
        Some(To::Jsonl) => DatasetFormat::JsonLines,
        Some(To::Text) => DatasetFormat::Text,
        None => DatasetFormat::of_path(&args.output).ok_or_else(|| {
            let output = args.output.display();
            format!("{output}: the ending tells no format; name one with --to, see --help")
        })?,
    };
    let store = match args.store {
        Store::F32 => EmbeddingType::F32,
        Store::F16 => EmbeddingType::F16,
        Store::Int8 => EmbeddingType::Int8,
    };
    let tokenizer = match &args.tokenizer {
        Some(path) => Some(load_tokenizer(path, args.max_length)?),
        None => None,
    };
    let mut options = OpenOptions::default();
    options.vocab = args.vocab;
    options.texts = args.texts.as_deref();
    options.embeddings = args.embeddings.as_deref();
    let mut writer = None;
    let mut samples = 0_usize;
    let most = args.samples.unwrap_or(usize::MAX);
    for record in Records::open_with(&args.input, options)?.take(most) {
        let mut record = record?;
        if let Some(tokenizer) = &tokenizer
            && (record.input_ids.is_none() || args.retokenize)
            && let Some(text) = &record.text
        {
            record.input_ids = Some(tokenizer.encode(text)?);
            record.attention_mask = None;
        }
        if writer.is_none() {
            let width = record.target.len();
            writer = Some(RecordWriter::create(&args.output, format, width, store)?);
        }
        if let Some(writer) = &mut writer {
            writer.push(&record)?;
        }
        samples += 1;
    }
    let Some(writer) = writer else {
        return Err(format!("{}: there are no samples", args.input.display()).into());
    };
    writer.finish()?;
    println!("{}: {samples} samples as {format}", args.output.display());
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
