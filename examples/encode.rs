//! Turns the lines of a text file into embeddings: a matrix for NumPy, or JSON lines.
//!
//! ```text
//! cargo run --release --example encode -- texts.txt --output embeddings.npy
//! cat texts.txt | cargo run --release --example encode > embeddings.jsonl
//! ```

use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use energyflow::text::Embeddings;
use serde::Serialize;
use tempfile::NamedTempFile;

mod shared {
    pub mod device;
    pub mod encoder;
    pub mod lines;
    pub mod model;
    pub mod program;
}
use shared::lines::Lines;
use shared::program::Outcome;

/// Turn every line of a text file into an embedding.
///
/// Row n of the result belongs to line n of the input; an empty line is an empty text. What is longer than the model's length is cut, and
/// counted at the end.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// Text file with one text per line; - is stdin
    #[arg(default_value = "-")]
    input: PathBuf,
    /// File to write: NAME.npy is a matrix [lines, E] of f32 for NumPy, any other name JSON lines; - is JSON lines to stdout
    #[arg(short, long, default_value = "-")]
    output: PathBuf,
    /// Divide every embedding by its norm, or do not. Without it the model says
    #[arg(long)]
    normalize: Option<bool>,
    #[command(flatten)]
    encoder: shared::encoder::Encoder,
    #[command(flatten)]
    device: shared::device::Device,
}

/// Lines that are in memory at a time.
const BLOCK: usize = 1 << 17;

fn main() -> ExitCode {
    shared::program::main(run)
}

fn run(options: Options) -> Outcome {
    let mut lines = Lines::open(&options.input)?;
    let gpu = options.device.open()?;
    let encoder = options.encoder.load(&gpu, options.normalize)?;
    let mut output = Output::create(&options.output, encoder.width())?;
    let start = Instant::now();
    let (mut texts, mut cut) = (0, 0);
    loop {
        let block = lines.next_lines(BLOCK)?;
        if block.is_empty() {
            break;
        }
        let embeddings = encoder.encode(&block)?;
        output.write(&block, &embeddings)?;
        texts += block.len();
        cut += embeddings.truncated().len();
    }
    output.finish(texts)?;
    let seconds = start.elapsed().as_secs_f64();
    eprintln!(
        "{texts} texts in {seconds:.2} s; {cut} had more than {} tokens and were cut",
        encoder.options().length
    );
    Ok(())
}

/// A line of JSON.
#[derive(Serialize)]
struct Line<'a> {
    text: &'a str,
    embedding: &'a [f32],
}

/// Where embeddings go. A file appears when it is complete.
enum Output {
    Npy {
        path: PathBuf,
        file: BufWriter<NamedTempFile>,
        width: usize,
    },
    Lines {
        path: PathBuf,
        file: BufWriter<NamedTempFile>,
    },
    Stdout(BufWriter<io::Stdout>),
}

impl Output {
    fn create(path: &Path, width: usize) -> Result<Self, String> {
        if path == Path::new("-") {
            return Ok(Self::Stdout(BufWriter::new(io::stdout())));
        }
        let fail = |error| format!("{}: {error}", path.display());
        if path.is_dir() {
            return Err(fail(io::ErrorKind::IsADirectory.into()));
        }
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        #[cfg_attr(not(unix), allow(unused_mut, reason = "only Unix has permissions"))]
        let mut temporary = tempfile::Builder::new();
        // What the umask leaves of it, as for any other file.
        #[cfg(unix)]
        temporary.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let file = temporary.tempfile_in(folder).map_err(fail)?;
        let mut file = BufWriter::with_capacity(1 << 20, file);
        let path = path.to_owned();
        if path
            .extension()
            .is_some_and(|ending| ending.eq_ignore_ascii_case("npy"))
        {
            // The number of lines is known at the end.
            file.write_all(&npy_header(0, width)).map_err(fail)?;
            return Ok(Self::Npy { path, file, width });
        }
        Ok(Self::Lines { path, file })
    }

    fn write(&mut self, texts: &[String], embeddings: &Embeddings) -> io::Result<()> {
        let file: &mut dyn Write = match self {
            Self::Npy { file, .. } => {
                for x in embeddings.as_slice() {
                    file.write_all(&x.to_le_bytes())?;
                }
                return Ok(());
            }
            Self::Lines { file, .. } => file,
            Self::Stdout(stdout) => stdout,
        };
        for (text, embedding) in texts.iter().zip(embeddings) {
            let line = serde_json::to_string(&Line { text, embedding })?;
            writeln!(file, "{line}")?;
        }
        file.flush()
    }

    fn finish(self, texts: usize) -> Outcome {
        let (path, file) = match self {
            Self::Stdout(mut stdout) => return Ok(stdout.flush()?),
            Self::Npy {
                path,
                mut file,
                width,
            } => {
                file.seek(SeekFrom::Start(0))?;
                file.write_all(&npy_header(texts, width))?;
                (path, file)
            }
            Self::Lines { path, file } => (path, file),
        };
        let fail = |error: io::Error| format!("{}: {error}", path.display());
        let file = file
            .into_inner()
            .map_err(|error| fail(error.into_error()))?;
        file.persist(&path).map_err(|error| fail(error.error))?;
        eprintln!("wrote {}", path.display());
        Ok(())
    }
}

/// The start of a `.npy` file, always 128 bytes. See https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
fn npy_header(rows: usize, cols: usize) -> Vec<u8> {
    let text = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {cols}), }}");
    let mut header = b"\x93NUMPY\x01\x00\x76\x00".to_vec();
    header.extend(format!("{text:117}\n").into_bytes());
    header
}
