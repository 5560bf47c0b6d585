//! Compares the embeddings of a trained encoder with its teacher's on a data set, and the predictions of a decoder with the texts.
//!
//! ```text
//! cargo run --release --example evaluate
//! cargo run --release --example evaluate -- --model out/model --data mine.jsonl --json
//! ```

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use energyflow::Gpu;
use energyflow::text::{Dataset, Model, OpenOptions, Trainer, TrainerOptions, WordPiece, metrics};
use serde::Serialize;

mod shared {
    pub mod device;
    pub mod encoder;
    pub mod model;
    pub mod program;
}
use shared::program::Outcome;

/// Compare the embeddings of a trained encoder with its teacher's, and the predictions of a decoder with the texts.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// Data set: texts or token ids with the teacher's embeddings, see data/README.md
    #[arg(long, value_name = "FILE", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/data/wordnet_val.safetensors"))]
    data: PathBuf,
    /// Use only the first N samples
    #[arg(long, value_name = "N")]
    samples: Option<usize>,
    /// Compute what compares all pairs (P@1, P@5, overlap@10, Spearman) on the first N samples only
    #[arg(long, value_name = "N", default_value_t = 4000)]
    pairs: usize,
    /// Print one line of JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    encoder: shared::encoder::Encoder,
    #[command(flatten)]
    device: shared::device::Device,
}

/// Of the encoder. Names as in the field's papers.
#[derive(Serialize)]
struct Embedded {
    cosine: f64,
    mse: f64,
    pair_samples: usize,
    p_at_1: f64,
    p_at_5: f64,
    overlap_at_10: Option<f64>,
    spearman: Option<f64>,
    truncated: usize,
}

/// Of the decoder, which is given the teacher's embeddings.
#[derive(Serialize)]
struct Decoded {
    cross_entropy: f64,
    perplexity: f64,
    accuracy: f64,
    tokens: u64,
}

#[derive(Serialize)]
struct Figures {
    samples: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    encoder: Option<Embedded>,
    #[serde(skip_serializing_if = "Option::is_none")]
    decoder: Option<Decoded>,
}

fn main() -> ExitCode {
    shared::program::main(run)
}

fn run(options: Options) -> Outcome {
    let gpu = options.device.open()?;
    let model = Model::load(&options.encoder.model)
        .map_err(|error| shared::model::explain(&options.encoder.model, "distill", error))?;
    let lengths = [
        model.encoder.as_ref().map(|encoder| encoder.length),
        model.decoder.as_ref().map(|decoder| decoder.length),
    ];
    let length = lengths.into_iter().flatten().max().unwrap_or(1);
    // Texts without token ids are tokenised by the model's tokenizer.
    let tokenizer = match &model.tokenizer {
        Some(json) => Some(WordPiece::from_bytes(json, length)?),
        None => None,
    };
    let open = match &tokenizer {
        Some(tokenizer) => OpenOptions::default().tokenizer(tokenizer),
        None => OpenOptions::default(),
    };
    let mut dataset = Dataset::open_with(&options.data, open)?;
    if let Some(samples) = options.samples {
        dataset = dataset.take(samples);
    }
    let encoder = match &model.encoder {
        Some(_) => Some(embed(&options, &gpu, &dataset)?),
        None => None,
    };
    let decoder = match &model.decoder {
        Some(_) => decode(&gpu, &model, &dataset)?,
        None => None,
    };
    let figures = Figures {
        samples: dataset.len(),
        encoder,
        decoder,
    };
    if options.json {
        println!("{}", serde_json::to_string(&figures)?);
        return Ok(());
    }
    print(&figures);
    Ok(())
}

fn embed(options: &Options, gpu: &Gpu, dataset: &Dataset) -> Result<Embedded, Box<dyn Error>> {
    // The teacher's embeddings are what they are, so the student's are compared as the network gives them.
    let encoder = options.encoder.load(gpu, Some(false))?;
    let width = encoder.width();
    if dataset.width() != width {
        return Err(format!(
            "{}: embeddings have width {}, but those of the model {width}",
            options.data.display(),
            dataset.width(),
        )
        .into());
    }
    let (mut ids, mut targets) = (Vec::new(), Vec::new());
    for sample in dataset.iter() {
        let sample = sample?;
        let counts = sample.ids().iter().zip(sample.mask());
        let counted: Vec<u32> = counts
            .filter(|&(_, &counts)| counts != 0)
            .map(|(&id, _)| id)
            .collect();
        ids.push(counted);
        targets.extend_from_slice(sample.target());
    }
    let embeddings = encoder.encode_ids(&ids)?;
    let pairs = options.pairs.min(ids.len());
    let (ours, theirs) = (
        &embeddings.as_slice()[..pairs * width],
        &targets[..pairs * width],
    );
    let ranks = metrics::retrieval_ranks(ours, theirs, width)?;
    let agree = pairs > 1;
    Ok(Embedded {
        cosine: metrics::mean_cosine(embeddings.as_slice(), &targets, width)?,
        mse: metrics::mean_squared_error(embeddings.as_slice(), &targets, width)?,
        pair_samples: pairs,
        p_at_1: metrics::precision_at(&ranks, 1),
        p_at_5: metrics::precision_at(&ranks, 5),
        overlap_at_10: match agree {
            true => Some(metrics::neighbor_overlap(ours, theirs, width, 10)?),
            false => None,
        },
        spearman: match agree {
            true => Some(metrics::similarity_correlation(ours, theirs, width)?),
            false => None,
        },
        truncated: embeddings.truncated().len(),
    })
}

/// Nothing for a data set without a token to predict.
fn decode(gpu: &Gpu, model: &Model, dataset: &Dataset) -> Result<Option<Decoded>, Box<dyn Error>> {
    // Two chunks, since a joint trainer has steps of both modes.
    let trainer = Trainer::from_model(gpu, model, &TrainerOptions::default().chunks(2))?;
    let scores = trainer.evaluate(dataset)?.decoder;
    Ok(scores.map(|scores| Decoded {
        cross_entropy: scores.cross_entropy,
        perplexity: scores.perplexity(),
        accuracy: scores.accuracy,
        tokens: scores.tokens,
    }))
}

fn print(figures: &Figures) {
    let show = |figure: Option<f64>| figure.map_or_else(|| "-".into(), |x| format!("{x:.4}"));
    if let Some(encoder) = &figures.encoder {
        println!(
            "cosine to the teacher    {:.4}  on {} samples",
            encoder.cosine, figures.samples
        );
        println!("mean squared error       {:.6}", encoder.mse);
        println!(
            "P@1, P@5                 {:.3}, {:.3}  among {}",
            encoder.p_at_1, encoder.p_at_5, encoder.pair_samples
        );
        println!("overlap@10               {}", show(encoder.overlap_at_10));
        println!("Spearman of similarities {}", show(encoder.spearman));
        if encoder.truncated > 0 {
            println!("{} texts were cut", encoder.truncated);
        }
    }
    if let Some(decoder) = &figures.decoder {
        println!(
            "perplexity               {:.2}  of {} tokens, given the teacher's embeddings",
            decoder.perplexity, decoder.tokens
        );
        println!("next-token accuracy      {:.4}", decoder.accuracy);
    }
}
