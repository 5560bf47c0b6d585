//! Compares the embeddings of a trained encoder with its teacher's on a data set.
//!
//! ```text
//! cargo run --release --example evaluate -- --model out/model
//! cargo run --release --example evaluate -- --model out/model --data mine.jsonl --json
//! ```

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use energyflow::text::{Dataset, OpenOptions, metrics};
use serde::Serialize;

mod shared {
    pub mod device;
    pub mod encoder;
    pub mod program;
}
use shared::program::Outcome;

/// Compare the embeddings of a trained encoder with its teacher's.
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

/// Names as in the field's papers.
#[derive(Serialize)]
struct Figures {
    samples: usize,
    cosine: f64,
    mse: f64,
    pair_samples: usize,
    p_at_1: f64,
    p_at_5: f64,
    overlap_at_10: Option<f64>,
    spearman: Option<f64>,
}

fn main() -> ExitCode {
    shared::program::main(run)
}

fn run(options: Options) -> Outcome {
    let gpu = options.device.open()?;
    // The teacher's embeddings are what they are, so the student's are compared as the network gives them.
    let encoder = options.encoder.load(&gpu, Some(false))?;
    let open = OpenOptions::default().tokenizer(encoder.tokenizer());
    let mut dataset = Dataset::open_with(&options.data, open)?;
    if let Some(samples) = options.samples {
        dataset = dataset.take(samples);
    }
    if dataset.width() != encoder.width() {
        return Err(format!(
            "{}: embeddings have width {}, but those of the model {}",
            options.data.display(),
            dataset.width(),
            encoder.width()
        )
        .into());
    }
    let (mut ids, mut targets) = (Vec::new(), Vec::new());
    for sample in dataset.iter() {
        let sample = sample?;
        let counts = sample.ids().iter().zip(sample.mask());
        ids.push(
            counts
                .filter(|&(_, &counts)| counts != 0)
                .map(|(&id, _)| id)
                .collect::<Vec<u32>>(),
        );
        targets.extend_from_slice(sample.target());
    }
    let embeddings = encoder.encode_ids(&ids)?;
    let width = encoder.width();
    let pairs = options.pairs.min(ids.len());
    let (ours, theirs) = (
        &embeddings.as_slice()[..pairs * width],
        &targets[..pairs * width],
    );
    let ranks = metrics::retrieval_ranks(ours, theirs, width)?;
    let agree = pairs > 1;
    let figures = Figures {
        samples: ids.len(),
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
    };
    if options.json {
        println!("{}", serde_json::to_string(&figures)?);
        return Ok(());
    }
    let show = |figure: Option<f64>| figure.map_or_else(|| "-".into(), |x| format!("{x:.4}"));
    println!(
        "cosine to the teacher    {:.4}  on {} samples",
        figures.cosine, figures.samples
    );
    println!("mean squared error       {:.6}", figures.mse);
    println!(
        "P@1, P@5                 {:.3}, {:.3}  among {pairs}",
        figures.p_at_1, figures.p_at_5
    );
    println!("overlap@10               {}", show(figures.overlap_at_10));
    println!("Spearman of similarities {}", show(figures.spearman));
    if !embeddings.truncated().is_empty() {
        println!("{} texts were cut", embeddings.truncated().len());
    }
    Ok(())
}
