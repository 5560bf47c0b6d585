//! Embeddings to text, with the decoder of a model folder.

mod shared {
    pub mod device;
    pub mod model;
    pub mod program;
}

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, ValueEnum};
use energyflow::text::{
    Dataset, DecodeOptions, Finish, Generation, Model, NpyReader, OpenOptions, Precision, Stop,
    TextDecoder, TextDecoderOptions, TextEncoder, TextEncoderOptions, WordPiece,
};
use serde::Serialize;
use shared::device::Device;
use shared::program::{self, Outcome};

/// Turns embeddings into text with the decoder of a model folder.
///
/// The embeddings come from a file (--embeddings, --dataset), or from texts, one per line, that the encoder of the same folder encodes:
/// a file, or stdin. Each text is printed on a line of its own, in the order of the embeddings; --json prints more of it. With a single
/// text on a terminal, words appear as they come.
///
///   echo "a man plays guitar" | decode
///   decode --model my-model --embeddings z.npy --temperature 0.8 --top-k 40 --seed 1 --json
#[derive(Parser)]
#[command(verbatim_doc_comment)]
struct Options {
    /// Model folder, as the examples train_joint and train_decoder write it
    #[arg(long, value_name = "DIR", default_value = "out-joint/model")]
    model: PathBuf,
    /// Texts to encode and decode again, one per line; without it, and without other embeddings, stdin
    #[arg(value_name = "TEXTS", conflicts_with_all = ["embeddings", "dataset"])]
    texts: Option<PathBuf>,
    /// Embeddings to decode, as .npy: a matrix with a row per text
    #[arg(long, value_name = "FILE", conflicts_with = "dataset")]
    embeddings: Option<PathBuf>,
    /// A data set, in any format, whose embeddings are decoded. Beside each text the original is printed, if the data set has it
    #[arg(long, value_name = "FILE")]
    dataset: Option<PathBuf>,
    /// Decode no more than this many
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Element type of weights and activations
    #[arg(long, value_enum, default_value_t = Type::F32)]
    precision: Type,
    #[command(flatten)]
    choice: Choice,
    /// Print a JSON object per line: text, tokens, how it ended, log-probability
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: Device,
}

#[derive(Clone, Copy, ValueEnum)]
enum Type {
    F32,
    F16,
}

/// How the next token is chosen, and when a text ends.
#[derive(Args)]
#[command(next_help_heading = "Choice of tokens")]
struct Choice {
    /// Most tokens per text
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_len: usize,
    /// 0 takes the most likely token; above 0 tokens are drawn, and more makes the draws more varied
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    temperature: f32,
    /// Draw from this many of the most likely tokens. Has an effect only with a --temperature above 0
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Draw from the most likely tokens that have this probability together. Has an effect only with a --temperature above 0
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f32,
    /// Above 1, tokens that a text already has become less likely
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    repetition_penalty: f32,
    /// Start of the random numbers. Has an effect only with a --temperature above 0
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// End a text before this; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// End a text at this token; may be given several times
    #[arg(long, value_name = "ID")]
    stop_token: Vec<u32>,
}

impl Choice {
    fn options(&self) -> DecodeOptions {
        let texts = self.stop.iter().map(|text| Stop::from(text.as_str()));
        let tokens = self.stop_token.iter().map(|&token| Stop::from(token));
        DecodeOptions::default()
            .max_len(self.max_len)
            .temperature(self.temperature)
            .top_k(self.top_k)
            .top_p(self.top_p)
            .repetition_penalty(self.repetition_penalty)
            .seed(self.seed)
            .stop(texts.chain(tokens).collect())
    }
}

/// What is decoded.
struct Source {
    /// Row after row.
    z: Vec<f32>,
    /// The texts that the embeddings are of, if they are known.
    originals: Vec<Option<String>>,
}

#[derive(Serialize)]
struct Line<'a> {
    text: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    original: Option<&'a str>,
    tokens: &'a [u32],
    finish: &'static str,
    log_prob: f64,
}

fn main() -> ExitCode {
    program::main(run)
}

fn run(options: Options) -> Outcome {
    let gpu = options.device.open()?;
    let model = Model::load(&options.model)
        .map_err(|error| shared::model::explain(&options.model, "train_joint", error))?;
    let shown = options.model.display();
    if model.decoder.is_none() {
        return Err(format!(
            "{shown}: this model has no decoder; the examples train_joint and train_decoder train one"
        )
        .into());
    }
    let from_texts = options.embeddings.is_none() && options.dataset.is_none();
    if from_texts && model.encoder.is_none() {
        return Err(format!(
            "{shown}: this model has a decoder only, so it cannot encode texts: give --embeddings or --dataset"
        )
        .into());
    }
    let precision = match options.precision {
        Type::F32 => Precision::F32,
        Type::F16 => Precision::Mixed,
    };
    let decoder = TextDecoder::new(
        &gpu,
        &model,
        &TextDecoderOptions::default().precision(precision),
    )?;
    let limit = options.limit.unwrap_or(usize::MAX);
    let source = match (&options.embeddings, &options.dataset) {
        (Some(path), _) => from_npy(path, decoder.embedding(), limit)?,
        (None, Some(path)) => from_dataset(path, &model, decoder.embedding(), limit)?,
        (None, None) => {
            let texts = lines(options.texts.as_deref(), limit)?;
            let encoder = TextEncoderOptions::default().precision(precision);
            let encoder = TextEncoder::new(&gpu, &model, &encoder)?;
            Source {
                z: encoder.encode(&texts)?.into_vec(),
                originals: texts.into_iter().map(Some).collect(),
            }
        }
    };
    let choice = options.choice.options();
    let mut out = BufWriter::new(std::io::stdout().lock());
    if source.originals.len() == 1 && !options.json && std::io::stdout().is_terminal() {
        for piece in decoder.stream(&source.z, &choice)? {
            write!(out, "{}", piece?.text)?;
            out.flush()?;
        }
        writeln!(out)?;
        return Ok(());
    }
    // In parts, so that results of a long list appear as they are there.
    const PART: usize = 1024;
    let width = decoder.embedding();
    let parts = source.z.chunks(PART * width);
    for (i, (z, originals)) in parts.zip(source.originals.chunks(PART)).enumerate() {
        let choice = choice.clone().first_stream((i * PART) as u64);
        let show_original = options.dataset.is_some();
        for (generation, original) in decoder.decode(z, &choice)?.iter().zip(originals) {
            print(
                &mut out,
                generation,
                original.as_deref(),
                show_original,
                options.json,
            )?;
        }
        out.flush()?;
    }
    Ok(())
}

fn print(
    out: &mut impl Write,
    generation: &Generation,
    original: Option<&str>,
    show_original: bool,
    json: bool,
) -> Outcome {
    if json {
        let line = Line {
            text: &generation.text,
            original,
            tokens: &generation.tokens,
            finish: match generation.finish {
                Finish::Length => "length",
                _ => "stop",
            },
            log_prob: generation.log_prob,
        };
        writeln!(out, "{}", serde_json::to_string(&line)?)?;
        return Ok(());
    }
    // A text stays on its line, whatever its tokens are.
    let text = generation.text.replace(['\n', '\r'], " ");
    match original.filter(|_| show_original) {
        Some(original) => writeln!(out, "{}\t{text}", original.replace(['\n', '\r', '\t'], " "))?,
        None => writeln!(out, "{text}")?,
    }
    Ok(())
}

fn check_width(path: &Path, width: usize, wanted: usize) -> Outcome {
    match width == wanted {
        true => Ok(()),
        false => Err(format!(
            "{}: embeddings of {width} numbers, but the decoder takes {wanted}",
            path.display()
        )
        .into()),
    }
}

fn from_npy(path: &Path, width: usize, limit: usize) -> Result<Source, Box<dyn std::error::Error>> {
    let reader = NpyReader::open(path)?;
    check_width(path, reader.width(), width)?;
    let n = reader.rows().min(limit);
    let mut z = Vec::with_capacity(n * width);
    let mut row = Vec::new();
    for i in 0..n {
        reader.read(i, &mut row)?;
        z.extend_from_slice(&row);
    }
    Ok(Source {
        z,
        originals: vec![None; n],
    })
}

fn from_dataset(
    path: &Path,
    model: &Model,
    width: usize,
    limit: usize,
) -> Result<Source, Box<dyn std::error::Error>> {
    // Texts without token ids are tokenised by the model's tokenizer.
    let length = model.decoder.as_ref().map_or(1, |decoder| decoder.length);
    let tokenizer = match &model.tokenizer {
        Some(json) => Some(WordPiece::from_bytes(json, length)?),
        None => None,
    };
    let open = match &tokenizer {
        Some(tokenizer) => OpenOptions::default().tokenizer(tokenizer),
        None => OpenOptions::default(),
    };
    let dataset = Dataset::open_with(path, open)?;
    check_width(path, dataset.width(), width)?;
    let (mut z, mut originals) = (Vec::new(), Vec::new());
    for sample in dataset.iter().take(limit) {
        let sample = sample?;
        z.extend_from_slice(sample.target());
        originals.push(sample.text().map(str::to_owned));
    }
    Ok(Source { z, originals })
}

fn lines(path: Option<&Path>, limit: usize) -> Result<Vec<String>, Box<dyn std::error::Error>> {
    let name = path.map_or_else(|| "stdin".into(), |path| path.display().to_string());
    let reader: Box<dyn BufRead> = match path {
        Some(path) => {
            let file = File::open(path).map_err(|error| format!("{name}: {error}"))?;
            Box::new(BufReader::new(file))
        }
        None => Box::new(std::io::stdin().lock()),
    };
    let mut texts = Vec::new();
    for (number, line) in (1..).zip(reader.lines()).take(limit) {
        texts.push(line.map_err(|error| format!("{name}, line {number}: {error}"))?);
    }
    Ok(texts)
}
