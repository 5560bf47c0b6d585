//! Searches a text file by meaning: indexes its lines once, then answers questions with the nearest ones.
//!
//! ```text
//! cargo run --release --example search -- texts.txt
//! cargo run --release --example search -- texts.txt --ask "a large animal" -k 3
//! ```

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::{Parser, ValueEnum};
use energyflow::text::{Index, IndexOptions, TextEncoder, fingerprint};
use energyflow::{DType, Gpu};
use serde::{Deserialize, Serialize};

mod shared {
    pub mod device;
    pub mod encoder;
    pub mod lines;
    pub mod model;
    pub mod program;
    pub mod questions;
}
use shared::lines::Lines;
use shared::program::Outcome;
use shared::questions::{converse, shown};

/// Find the lines of a text file that are nearest to a question in meaning.
///
/// The first call encodes all lines and saves the index beside the file. Later calls load it, unless the texts or the model have changed.
/// Without --ask every line of stdin is a question. An answer is the cosine, the number of the line and the line.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// Text file with one text per line; - is stdin, of which no index is saved
    file: PathBuf,
    /// Ask this (repeat for more) instead of reading questions from stdin
    #[arg(short, long, value_name = "QUESTION")]
    ask: Vec<String>,
    /// Number of lines to show per question
    #[arg(short, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=4096))]
    k: u16,
    /// File of the index. Without it FILE.index.safetensors, beside the text file
    #[arg(long, value_name = "FILE")]
    index: Option<PathBuf>,
    /// Element type of the embeddings in the index
    #[arg(long, value_enum, default_value = "f16")]
    store: Store,
    /// Encode all lines again, whatever the index is
    #[arg(long)]
    rebuild: bool,
    #[command(flatten)]
    encoder: shared::encoder::Encoder,
    #[command(flatten)]
    device: shared::device::Device,
}

#[derive(Clone, Copy, ValueEnum)]
enum Store {
    F16,
    F32,
}

/// Lines that are encoded at a time.
const BLOCK: usize = 1 << 17;

fn main() -> ExitCode {
    shared::program::main(run)
}

fn run(options: Options) -> Outcome {
    let stdin = options.file == Path::new("-");
    if stdin && options.ask.is_empty() {
        return Err("the texts come from stdin, so the questions cannot: give --ask".into());
    }
    if stdin && options.index.is_some() {
        return Err("no index is saved of texts from stdin: leave out --index".into());
    }
    let gpu = options.device.open()?;
    let encoder = options.encoder.load(&gpu, None)?;
    let index = find_index(&options, &gpu, &encoder)?;
    if index.is_empty() {
        return Err(format!("{}: there are no lines to search", options.file.display()).into());
    }
    converse(&options.ask, |question, out| {
        let start = Instant::now();
        let hits = index.search_texts(&encoder, &[question], options.k.into())?;
        let milliseconds = 1e3 * start.elapsed().as_secs_f64();
        for hit in &hits[0] {
            let text = shown(index.text(hit.index).unwrap_or("(no text)"));
            writeln!(out, "  {:.3}  {:>8}  {text}", hit.score, hit.index + 1)?;
        }
        eprintln!("  found in {milliseconds:.1} ms");
        Ok(())
    })
}

/// What an index was made of. It is kept as JSON beside the index, in INDEX.json.
#[derive(PartialEq, Serialize, Deserialize)]
struct Source {
    /// Fingerprint of the files of the model.
    model: String,
    control_tokens: bool,
    /// Fingerprint of the text file.
    texts: String,
}

impl Source {
    fn of(options: &Options) -> energyflow::Result<Self> {
        let folder = &options.encoder.model;
        let files = ["config.json", "model.safetensors", "tokenizer.json"];
        Ok(Self {
            model: fingerprint(&files.map(|name| folder.join(name)))?,
            control_tokens: options.encoder.control_tokens,
            texts: fingerprint(std::slice::from_ref(&options.file))?,
        })
    }

    /// Why an index of this source is not one of `now`.
    fn difference(&self, now: &Self) -> Option<&'static str> {
        if self.texts != now.texts {
            return Some("the texts have changed");
        }
        if self.model != now.model {
            return Some("it is of another model");
        }
        (self != now).then_some("--control-tokens has changed")
    }
}

/// Loads the index, or makes and saves it.
fn find_index(
    options: &Options,
    gpu: &Gpu,
    encoder: &TextEncoder,
) -> Result<Index, Box<dyn std::error::Error>> {
    if options.file == Path::new("-") {
        return make_index(options, gpu, encoder);
    }
    let beside = |path: &Path, ending: &str| {
        let mut name = path.to_owned().into_os_string();
        name.push(ending);
        PathBuf::from(name)
    };
    let path = match &options.index {
        Some(path) => path.clone(),
        None => beside(&options.file, ".index.safetensors"),
    };
    let path_of_source = beside(&path, ".json");
    // Before the lines are read, so that a later change of the file is noticed by the next call.
    let source = Source::of(options)?;
    let shown = path.display();
    if !options.rebuild && path.exists() {
        let index = Index::load(gpu, &path).map_err(|error| {
            format!("{error}; --rebuild makes the index again and replaces this file")
        })?;
        let before = fs::read(&path_of_source).ok();
        let before: Option<Source> = before.and_then(|json| serde_json::from_slice(&json).ok());
        let difference = match &before {
            Some(before) => before.difference(&source),
            None => Some("what it was made of is not known"),
        };
        match difference {
            None => {
                eprintln!("{shown}: {} lines", index.len());
                return Ok(index);
            }
            Some(difference) => eprintln!("{shown}: {difference}, so it is made again"),
        }
    }
    let start = Instant::now();
    let index = make_index(options, gpu, encoder)?;
    match save(&index, &path, &source, &path_of_source) {
        Ok(()) => eprintln!(
            "{shown}: {} lines in {:.2} s",
            index.len(),
            start.elapsed().as_secs_f64()
        ),
        Err(error) => {
            eprintln!("warning: the index is not saved: {error}; --index chooses another file");
        }
    }
    Ok(index)
}

fn make_index(
    options: &Options,
    gpu: &Gpu,
    encoder: &TextEncoder,
) -> Result<Index, Box<dyn std::error::Error>> {
    let dtype = match options.store {
        Store::F16 => DType::F16,
        Store::F32 => DType::F32,
    };
    let options_of_index = IndexOptions::default().dtype(dtype);
    let mut index = Index::new(gpu, encoder.width(), &options_of_index)?;
    let mut lines = Lines::open(&options.file)?;
    loop {
        let block = lines.next_lines(BLOCK)?;
        if block.is_empty() {
            break;
        }
        index.add_texts(encoder, &block)?;
    }
    Ok(index)
}

fn save(index: &Index, path: &Path, source: &Source, path_of_source: &Path) -> Outcome {
    let fail = |error: io::Error| format!("{}: {error}", path_of_source.display());
    // A new index never has the source of the old one beside it.
    match fs::remove_file(path_of_source) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(fail(error).into()),
        _ => {}
    }
    index.save(path)?;
    Ok(fs::write(path_of_source, serde_json::to_vec(source)?).map_err(fail)?)
}
