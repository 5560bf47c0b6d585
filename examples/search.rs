//! Searches a text file by meaning: indexes its lines once, then answers questions with the nearest ones.
//!
//! ```text
//! cargo run --release --example search -- --model out/model texts.txt
//! cargo run --release --example search -- --model out/model texts.txt --ask "a large animal" -k 3
//! ```

use std::io::{self, BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Instant, SystemTime};

use clap::{Parser, ValueEnum};
use energyflow::text::{Index, IndexOptions, TextEncoder};
use energyflow::{DType, Gpu};

mod shared {
    pub mod device;
    pub mod encoder;
    pub mod lines;
    pub mod program;
}
use shared::lines::Lines;
use shared::program::Outcome;

/// Find the lines of a text file that are nearest to a question in meaning.
///
/// The first call encodes all lines and saves the index beside the file. Later calls load it, unless the file has changed since.
/// Without --ask every line of stdin is a question.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// Text file with one text per line
    file: PathBuf,
    /// Ask this (repeat for more) instead of reading questions from stdin
    #[arg(short, long, value_name = "QUESTION")]
    ask: Vec<String>,
    /// Number of lines to show per question
    #[arg(short, default_value_t = 5)]
    k: usize,
    /// File of the index. Without it FILE.index.safetensors, beside the text file
    #[arg(long, value_name = "FILE")]
    index: Option<PathBuf>,
    /// Element type of the embeddings in the index
    #[arg(long, value_enum, default_value = "f16")]
    store: Store,
    /// Encode all lines again. Needed after a change of the model
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
    let gpu = options.device.open()?;
    let encoder = options.encoder.load(&gpu, None)?;
    let index = find_index(&options, &gpu, &encoder)?;
    let answer = |question: &str| -> Outcome {
        let start = Instant::now();
        let hits = index.search_texts(&encoder, &[question], options.k)?;
        let milliseconds = 1e3 * start.elapsed().as_secs_f64();
        for hit in &hits[0] {
            let text = index.text(hit.index).unwrap_or("(no text)");
            println!("  {:.3}  {:>8}  {text}", hit.score, hit.index + 1);
        }
        eprintln!("{milliseconds:.1} ms");
        Ok(())
    };
    for question in &options.ask {
        println!("{question}");
        answer(question)?;
    }
    if options.ask.is_empty() {
        let terminal = io::stdin().is_terminal();
        let mut questions = io::stdin().lock().lines();
        loop {
            if terminal {
                print!("? ");
                io::stdout().flush()?;
            }
            let Some(question) = questions.next().transpose()? else {
                break;
            };
            answer(&question)?;
        }
    }
    Ok(())
}

/// Loads the index, or makes and saves it.
fn find_index(
    options: &Options,
    gpu: &Gpu,
    encoder: &TextEncoder,
) -> Result<Index, Box<dyn std::error::Error>> {
    let path = options.index.clone().unwrap_or_else(|| {
        let mut name = options.file.clone().into_os_string();
        name.push(".index.safetensors");
        name.into()
    });
    if !options.rebuild && is_newer(&path, &options.file) {
        let index = Index::load(gpu, &path)?;
        if index.width() == encoder.width() {
            eprintln!("{}: {} lines", path.display(), index.len());
            return Ok(index);
        }
        eprintln!("{} is of another model", path.display());
    }
    let dtype = match options.store {
        Store::F16 => DType::F16,
        Store::F32 => DType::F32,
    };
    let start = Instant::now();
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
    index.save(&path)?;
    eprintln!(
        "{}: {} lines in {:.2} s",
        path.display(),
        index.len(),
        start.elapsed().as_secs_f64()
    );
    Ok(index)
}

/// Whether a file is there and was written after another.
fn is_newer(file: &Path, other: &Path) -> bool {
    let written = |path: &Path| -> io::Result<SystemTime> { path.metadata()?.modified() };
    matches!((written(file), written(other)), (Ok(file), Ok(other)) if file > other)
}
