//! A transformer with the sizes of all-MiniLM-L6-v2: the forward pass, and a step of contrastive fine-tuning.

use energyflow::nn::{Draws, Mode};
use energyflow::text::{Transformer, TransformerOptions};
use energyflow::types::Trans;
use energyflow::{DType, Result};

use crate::cases::optimizer;
use crate::workload::Workload;

/// Ids, and a mask of which three quarters of every text count, to normalised embeddings.
pub fn forward(w: &mut Workload, dtype: DType, batch: usize, length: usize) -> Result<()> {
    let options = TransformerOptions::default().length(length);
    let transformer = Transformer::new(&mut w.graph, &options)?;
    let ids = w.indices("ids", batch * length, options.vocabulary)?;
    let counted = length * 3 / 4;
    let mask = (0..batch * length).map(|i| f32::from(u8::from(i % length < counted)));
    let mask = w.given("mask", mask.collect())?;
    let z = transformer.forward(&mut w.graph, ids, mask, dtype)?;
    w.flops = flops(&options, batch, length);
    w.bytes += (layer_weights(&options) * options.layers * dtype.size()) as f64;
    w.output("z", z)
}

/// Pairs of a batch, and tokens of a text.
const PAIRS: usize = 64;
const LENGTH: usize = 64;
/// Factor on the cosines.
const SCALE: f32 = 20.0;

/// Cross entropy of the cosines of each anchor with the positives of all pairs, the gradients, and AdamW with clipping.
pub fn train(w: &mut Workload, dtype: DType) -> Result<()> {
    let texts = 2 * PAIRS;
    let options = TransformerOptions::default().length(LENGTH);
    let transformer = Transformer::new(&mut w.graph, &options)?;
    let ids = w.indices("ids", texts * LENGTH, options.vocabulary)?;
    let mask = w.given("mask", vec![1.0; texts * LENGTH])?;
    // Anchors are the first half of the texts. A text meets only the texts of the other half.
    let other = |i: usize| match (i / texts < PAIRS) == (i % texts < PAIRS) {
        true => -1e9,
        false => 0.0,
    };
    let others = w.given("others", (0..texts * texts).map(other).collect())?;
    let targets = w.indices("targets", texts, texts)?;
    let draws = Draws::new(&mut w.graph, 0)?;
    let mode = Mode::train(Some(draws));
    let z = transformer.forward_in(&mut w.graph, ids, mask, dtype, mode)?;
    let graph = &mut w.graph;
    let cosines = graph.matmul(z, z, Trans::NT)?;
    let logits = graph.affine(cosines, SCALE, 0.0)?;
    let others = graph.reshape(others, &[texts, texts])?;
    let logits = graph.add(logits, others)?;
    let loss = graph.cross_entropy(logits, targets, None, 0.0)?.loss;
    w.flops = 3.0 * flops(&options, texts, LENGTH);
    w.train(loss, &optimizer(dtype, Some(1.0)))
}

/// Multiply-adds of the layers, counted as two.
fn flops(options: &TransformerOptions, batch: usize, length: usize) -> f64 {
    let rows = (batch * length) as f64;
    let attention = 4.0 * rows * (length * options.width) as f64;
    options.layers as f64 * (2.0 * rows * layer_weights(options) as f64 + attention)
}

/// Elements of the weights of a layer's products.
fn layer_weights(options: &TransformerOptions) -> usize {
    4 * options.width * options.width + 2 * options.width * options.hidden
}
