//! all-MiniLM-L6-v2 with its real weights, which are not part of this repository. Run by `scripts/test --teacher DIR`.
#![cfg(feature = "tokenizer")]

mod common;

use energyflow::text::{Dataset, Precision, SentenceTransformer, TextEncoderOptions};

/// The folder of the model.
const FOLDER: &str = "ENERGYFLOW_TEACHER";

/// Mean and minimum over the texts of the cosine with PyTorch's embeddings.
fn cosines(precision: Precision) -> (f64, f64) {
    let folder = std::env::var(FOLDER).expect("set ENERGYFLOW_TEACHER to the folder of the model");
    let dataset = concat!(env!("CARGO_MANIFEST_DIR"), "/data/wordnet_val.safetensors");
    let dataset = Dataset::open(dataset).unwrap();
    let samples: Vec<_> = dataset.iter().map(Result::unwrap).collect();
    let texts: Vec<&str> = samples
        .iter()
        .map(|sample| sample.text().unwrap())
        .collect();
    assert_eq!(texts.len(), 1000);
    let options = TextEncoderOptions::default().precision(precision);
    let gpu = common::gpu();
    let teacher = SentenceTransformer::load_with(&gpu, folder, &options).unwrap();
    let embeddings = teacher.encode(&texts).unwrap();
    assert!(embeddings.truncated().is_empty());
    let cosine = |(a, b): (&[f32], &[f32])| {
        let sum = |a: &[f32], b: &[f32]| -> f64 {
            let products = a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b));
            products.sum()
        };
        sum(a, b) / (sum(a, a) * sum(b, b)).sqrt()
    };
    let targets = samples.iter().map(|sample| sample.target());
    let cosines: Vec<f64> = embeddings.iter().zip(targets).map(cosine).collect();
    let mean = cosines.iter().sum::<f64>() / cosines.len() as f64;
    let least = cosines.iter().copied().fold(f64::INFINITY, f64::min);
    println!(
        "{precision:?}: 1 - cosine is {:.2e} in the mean, {:.2e} at most",
        1.0 - mean,
        1.0 - least
    );
    (mean, least)
}

#[test]
#[ignore = "needs the weights of all-MiniLM-L6-v2: scripts/test --teacher DIR"]
fn f32_embeddings_are_those_of_pytorch() {
    let (mean, least) = cosines(Precision::F32);
    assert!(mean >= 0.999_99 && least >= 0.999_99, "{mean} {least}");
}

#[test]
#[ignore = "needs the weights of all-MiniLM-L6-v2: scripts/test --teacher DIR"]
fn f16_embeddings_are_those_of_pytorch() {
    let (mean, least) = cosines(Precision::Mixed);
    assert!(mean >= 0.9999 && least >= 0.9999, "{mean} {least}");
}
