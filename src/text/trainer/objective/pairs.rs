//! Losses over the embeddings of pairs of texts.
//!
//! The texts of a sample follow each other: anchor, positive and, if there is one, negative.

use super::{Network, Objective, Pass, encode, normalised};
use crate::error::{Error, Result};
use crate::graph::{Graph, Op, ValueId};
use crate::text::trainer::options::{Contrastive, PairLoss};
use crate::types::{DType, Padding, Trans, UnaryOp, Window};

/// `pass` counts samples; the network sees their texts.
pub fn objective(
    graph: &mut Graph,
    network: Network<'_>,
    loss: PairLoss,
    pass: Pass,
) -> Result<Objective> {
    let (samples, each) = (pass.samples, loss.texts());
    let texts = samples.checked_mul(each).ok_or_else(|| Error::Config {
        field: "batch",
        reason: format!("of {samples} samples of {each} texts is too large"),
    })?;
    let of_texts = Pass {
        samples: texts,
        ..pass
    };
    let z = encode(graph, network, of_texts)?;
    let metrics = graph.scoped("pairs", |graph| {
        let z = normalised(graph, z)?;
        let width = graph.value(z)?.shape.cols();
        let series = graph.reshape(z, &[1, texts, width])?;
        let first = Window::new(texts, 1, 1, each, Padding::Valid)?;
        let anchors = graph.windows(series, first)?;
        let anchors = graph.reshape(anchors, &[samples, width])?;
        match loss {
            PairLoss::Contrastive(options) => contrastive(graph, z, anchors, options),
            PairLoss::Cosine => similarity(graph, z, anchors),
        }
    })?;
    Ok(Objective {
        loss: metrics[0].1,
        // All micro-batches have the same number of samples.
        weight: graph.constant(&[1], 1.0)?,
        metrics,
        parameters: graph.parameters().map(|(id, _)| id).collect(),
    })
}

type Metrics = Vec<(&'static str, ValueId)>;

/// z [n·k, E] and anchors [n, E], both of norm 1. Inputs: `labels` `[n]`, the number of each anchor's positive among the n·k texts;
/// `candidates` `[n·k]`, 0 for a positive or negative, and for an anchor a number that makes its share of the softmax 0; and in the symmetric
/// form `anchors` `[n·k]`, the number of each positive's anchor, and n for texts that are no positives.
fn contrastive(
    graph: &mut Graph,
    z: ValueId,
    anchors: ValueId,
    options: Contrastive,
) -> Result<Metrics> {
    let texts = graph.value(z)?.shape.rows();
    let samples = graph.value(anchors)?.shape.rows();
    let scores = graph.matmul(anchors, z, Trans::NT)?;
    let scores = graph.affine(scores, options.scale, 0.0)?;
    let candidates = graph.input("candidates", &[texts], DType::F32)?;
    let scores = graph.add_bias(scores, candidates)?;
    let labels = graph.index_input("labels", samples, index(texts)?)?;
    let forward = graph.cross_entropy(scores, labels, None, 0.0)?.loss;
    // A row's loss is its logsumexp less the score of its label.
    let all = graph.log_sum_exp(scores)?;
    let all = graph.sum_all(all)?;
    let all = graph.affine(all, 1.0 / samples as f32, 0.0)?;
    let cosine = graph.sub(all, forward)?;
    let cosine = graph.affine(cosine, 1.0 / options.scale, 0.0)?;
    let mut loss = forward;
    if options.symmetric {
        let scores = graph.matmul(z, anchors, Trans::NT)?;
        let scores = graph.affine(scores, options.scale, 0.0)?;
        let none = index(samples)?;
        let labels = graph.index_input("anchors", texts, none + 1)?;
        let backward = graph.cross_entropy(scores, labels, Some(none), 0.0)?.loss;
        let both = graph.add(forward, backward)?;
        loss = graph.affine(both, 0.5, 0.0)?;
    }
    Ok(vec![("loss", loss), ("cosine", cosine)])
}

/// z [n·2, E] and anchors [n, E], both of norm 1. Input: `score` `[n]`.
fn similarity(graph: &mut Graph, z: ValueId, anchors: ValueId) -> Result<Metrics> {
    let samples = graph.value(anchors)?.shape.rows();
    let sums = graph.apply(Op::SumGroups { period: 2 }, &[z])?[0];
    let others = graph.sub(sums, anchors)?;
    let products = graph.mul(anchors, others)?;
    let cosines = graph.sum_cols(products)?;
    let score = graph.input("score", &[samples], DType::F32)?;
    let difference = graph.sub(cosines, score)?;
    let squares = graph.unary(UnaryOp::Square, difference)?;
    let [loss, cosine] = [squares, cosines].map(|values| {
        let sum = graph.sum_all(values)?;
        graph.affine(sum, 1.0 / samples as f32, 0.0)
    });
    let loss = loss?;
    Ok(vec![("loss", loss), ("cosine", cosine?), ("mse", loss)])
}

/// Indices have 32 bits, and one more than the largest is used.
fn index(n: usize) -> Result<u32> {
    match u32::try_from(n) {
        Ok(n) if n < u32::MAX => Ok(n),
        _ => Err(Error::Config {
            field: "batch",
            reason: format!("has {n} texts, more than 32 bits count"),
        }),
    }
}
