//! The graphs of a training: losses of both modes, and what is evaluated.

mod pairs;

use super::options::{Condition, InfoNce, TrainerOptions};
use crate::error::{Error, Result};
use crate::graph::{Graph, Op, ValueId};
use crate::nn::{Draws, Mode};
use crate::text::{Encoder, EncoderOptions, Model, Transformer, TransformerOptions};
use crate::types::{DType, Trans, UnaryOp, Window};

/// How a forward pass runs.
#[derive(Clone, Copy)]
pub(super) struct Pass {
    /// Samples of a run.
    pub samples: usize,
    /// Element type of activations.
    pub dtype: DType,
    pub mode: Mode,
}

impl Pass {
    pub fn train(samples: usize, dtype: DType, draws: Option<Draws>, recompute: bool) -> Self {
        Self {
            samples,
            dtype,
            mode: Mode::train(draws).recompute(recompute),
        }
    }

    pub fn evaluate(samples: usize, dtype: DType) -> Self {
        Self {
            samples,
            dtype,
            mode: Mode::Eval,
        }
    }
}

/// What makes z of a text.
#[derive(Clone, Copy)]
pub(super) enum Network<'a> {
    /// The encoder of a model that has one.
    Encoder(&'a Model),
    Transformer(&'a TransformerOptions),
}

impl Network<'_> {
    /// Whether anything is dropped in training.
    pub fn drops(self) -> bool {
        match self {
            Self::Encoder(model) => model.encoder.as_ref().is_some_and(EncoderOptions::drops),
            Self::Transformer(options) => options.dropout != 0.0,
        }
    }
}

/// What a step learns.
pub(super) struct Objective {
    /// A mean over `weight` samples or tokens.
    pub loss: ValueId,
    pub weight: ValueId,
    /// Means over the same, by the names that they have as outputs. The loss is the first.
    pub metrics: Vec<(&'static str, ValueId)>,
    /// What the step may train.
    pub parameters: Vec<ValueId>,
}

/// Tokens of a batch, B·L.
pub(super) fn tokens(batch: usize, length: usize) -> Result<usize> {
    batch.checked_mul(length).ok_or_else(|| Error::Config {
        field: "batch",
        reason: format!("of {batch} texts of {length} tokens is too large"),
    })
}

/// The inputs ids and mask, for texts of `length` tokens.
fn texts(graph: &mut Graph, pass: Pass, vocabulary: usize, length: usize) -> Result<[ValueId; 2]> {
    let n = tokens(pass.samples, length)?;
    let below = u32::try_from(vocabulary).map_err(|_| Error::Config {
        field: "vocabulary",
        reason: format!("is {vocabulary}, but token ids have 32 bits"),
    })?;
    let ids = graph.index_input("ids", n, below)?;
    let mask = graph.input("mask", &[n], DType::F32)?;
    Ok([ids, mask])
}

/// Adds inputs and network: z [B, E].
fn encode(graph: &mut Graph, network: Network<'_>, pass: Pass) -> Result<ValueId> {
    let Pass { dtype, mode, .. } = pass;
    match network {
        Network::Encoder(model) => {
            let encoder = model.build_encoder(graph)?;
            let options = options_of(&model.encoder, "encoder")?;
            let [ids, mask] = texts(graph, pass, options.vocabulary, options.length)?;
            graph.scoped("encoder", |graph| {
                encoder.forward_in(graph, ids, mask, dtype, mode)
            })
        }
        Network::Transformer(options) => {
            let transformer = Transformer::new(graph, options)?;
            let [ids, mask] = texts(graph, pass, options.vocabulary, options.length)?;
            transformer.forward_in(graph, ids, mask, dtype, mode)
        }
    }
}

/// The forward pass of the encoder, with the output z.
pub(super) fn embed(graph: &mut Graph, network: Network<'_>, pass: Pass) -> Result<()> {
    let z = encode(graph, network, pass)?;
    graph.output("z", z)
}

/// The operand of the encoder's last linear layer, with the output features. Returns its width.
pub(super) fn features(graph: &mut Graph, model: &Model, pass: Pass) -> Result<usize> {
    let encoder = model.build_encoder(graph)?;
    let options = options_of(&model.encoder, "encoder")?;
    let [ids, mask] = texts(graph, pass, options.vocabulary, options.length)?;
    let features = encoder.features(graph, ids, mask, pass.dtype)?;
    graph.output("features", features)?;
    Ok(graph.value(features)?.shape.cols())
}

/// Mode A: z against the teacher's embedding, or the embeddings of pairs against each other.
pub(super) fn distill(
    graph: &mut Graph,
    network: Network<'_>,
    options: &TrainerOptions,
    pass: Pass,
) -> Result<Objective> {
    if let Some(loss) = options.pair_loss {
        return pairs::objective(graph, network, loss, pass);
    }
    let z = encode(graph, network, pass)?;
    let width = graph.value(z)?.shape.cols();
    let target = graph.input("target", &[pass.samples, width], DType::F32)?;
    let kd = graph.kd_loss(z, target, options.alpha, options.beta)?;
    let mut metrics = vec![("cosine", kd.cosine), ("mse", kd.mse)];
    let mut loss = kd.loss;
    if let Some(info_nce) = options.info_nce {
        let contrast = graph.scoped("info_nce", |graph| contrast(graph, z, target, info_nce))?;
        let weighted = graph.affine(contrast, info_nce.weight, 0.0)?;
        loss = graph.add(loss, weighted)?;
        metrics.push(("info_nce", contrast));
    }
    metrics.insert(0, ("loss", loss));
    Ok(Objective {
        loss,
        // All micro-batches have the same number of samples.
        weight: graph.constant(&[1], 1.0)?,
        metrics,
        parameters: graph.parameters().map(|(id, _)| id).collect(),
    })
}

/// Mean over the samples of ln Σⱼ exp(cos(zᵢ, tⱼ)/τ) − cos(zᵢ, tᵢ)/τ.
fn contrast(graph: &mut Graph, z: ValueId, t: ValueId, options: InfoNce) -> Result<ValueId> {
    let samples = graph.value(z)?.shape.rows();
    let [z, t] = [normalised(graph, z)?, normalised(graph, t)?];
    let scale = 1.0 / options.temperature;
    let cosines = graph.matmul(z, t, Trans::NT)?;
    let scores = graph.affine(cosines, scale, 0.0)?;
    let all = graph.log_sum_exp(scores)?;
    let own = graph.mul(z, t)?;
    let own = graph.sum_cols(own)?;
    let own = graph.affine(own, scale, 0.0)?;
    let losses = graph.sub(all, own)?;
    let sum = graph.sum_all(losses)?;
    graph.affine(sum, 1.0 / samples as f32, 0.0)
}

/// Every row over its norm; squares of norms below 1e-12 count as that.
fn normalised(graph: &mut Graph, x: ValueId) -> Result<ValueId> {
    let squares = graph.unary(UnaryOp::Square, x)?;
    let sums = graph.sum_cols(squares)?;
    let (min, max) = (1e-12, f32::MAX);
    let sums = graph.unary(UnaryOp::Clamp { min, max }, sums)?;
    let inverse = graph.unary(UnaryOp::Rsqrt, sums)?;
    graph.mul_rows(x, inverse)
}

/// Mode B: the decoder against the next tokens.
pub(super) fn decode(
    graph: &mut Graph,
    model: &Model,
    options: &TrainerOptions,
    pass: Pass,
) -> Result<Objective> {
    let sizes = options_of(&model.decoder, "decoder")?;
    let with_encoder = options.condition != Condition::Teacher || options.cycle > 0.0;
    let encoder = match with_encoder {
        true => Some(model.build_encoder(graph)?),
        false => None,
    };
    let decoder = model.build_decoder(graph, encoder.as_ref())?;
    let [ids, mask] = texts(graph, pass, sizes.vocabulary, sizes.length)?;
    let z = match (options.condition, &encoder) {
        (Condition::Student | Condition::TrainedStudent, Some(encoder)) => {
            let trained = options.condition == Condition::TrainedStudent;
            let mode = if trained { pass.mode } else { Mode::Eval };
            let z = graph.scoped("encoder", |graph| {
                encoder.forward_in(graph, ids, mask, pass.dtype, mode)
            })?;
            if trained { z } else { graph.detach(z)? }
        }
        _ => graph.input("z", &[pass.samples, sizes.embedding], DType::F32)?,
    };
    let n = tokens(pass.samples, sizes.length)?;
    // `Decoder::new` has refused a vocabulary without room for one more.
    let targets = graph.index_input("targets", n, sizes.ignored_target() + 1)?;
    let (states, ce) = graph.scoped("decoder", |graph| {
        let states = decoder.forward_in(graph, [ids, z], Some(mask), pass.dtype, pass.mode)?;
        let ce = decoder.loss(graph, states, targets, options.smoothing)?;
        Ok((states, ce))
    })?;
    let mut metrics = vec![("cross_entropy", ce.loss)];
    let mut loss = ce.loss;
    if let (Some(encoder), true) = (&encoder, options.cycle > 0.0) {
        let logits = graph.scoped("decoder", |graph| decoder.logits(graph, states))?;
        let cosine = graph.scoped("cycle", |graph| {
            cycle(graph, encoder, [logits, ids, mask, z], pass.dtype)
        })?;
        let term = graph.affine(cosine, -options.cycle, options.cycle)?;
        loss = graph.add(loss, term)?;
        metrics.push(("cycle", cosine));
    }
    metrics.insert(0, ("loss", loss));
    if options.micro_batches == 1 {
        // With several, their number is the sum of the weights.
        metrics.push(("tokens", ce.count));
    }
    let shared = shared_block(model);
    let trains = |name: &str| {
        let shared = shared.as_deref().and_then(|block| name.strip_prefix(block));
        options.condition == Condition::TrainedStudent
            || name.starts_with("decoder.")
            || shared.is_some_and(|rest| rest.starts_with('.'))
    };
    let parameters = graph.parameters();
    Ok(Objective {
        loss,
        weight: ce.count,
        metrics,
        parameters: parameters
            .filter(|(_, value)| trains(&value.name))
            .map(|(id, _)| id)
            .collect(),
    })
}

/// The name of the shared block, if there is one.
pub(super) fn shared_block(model: &Model) -> Option<String> {
    let encoder = model.encoder.as_ref().filter(|_| model.shared_last_block)?;
    Some(format!(
        "blocks.{}",
        encoder.dilations.len().checked_sub(1)?
    ))
}

/// Mean cosine of z and the encoder's embedding of the expected text: the first token as it is, and each later one as the mean of the token
/// table under the softmax of the logits [B, L, V] of the time step before.
fn cycle(
    graph: &mut Graph,
    encoder: &Encoder,
    [logits, ids, mask, z]: [ValueId; 4],
    dtype: DType,
) -> Result<ValueId> {
    let &[samples, time, classes] = graph.value(logits)?.shape.dims() else {
        return Err(Error::Graph("logits are [B, L, V]".into()));
    };
    let logits = graph.reshape(logits, &[samples * time, classes])?;
    let probabilities = graph.softmax(logits)?;
    let probabilities = graph.cast(probabilities, dtype)?;
    let table = graph.cast(encoder.embedding.weight, dtype)?;
    let width = graph.value(table)?.shape.cols();
    let expected = graph.matmul(probabilities, table, Trans::NN)?;
    let expected = graph.reshape(expected, &[samples, time, width])?;
    let before = Window::delay(time)?;
    let expected = graph.windows(expected, before)?;
    // The mask is 1 from the first token on, so that its difference to the step before is 1 there only.
    let steps = graph.reshape(mask, &[samples, time, 1])?;
    let earlier = graph.windows(steps, before)?;
    let earlier = graph.reshape(earlier, &[samples * time])?;
    let first = graph.sub(mask, earlier)?;
    let first = graph.unary(UnaryOp::Relu, first)?;
    // What follows a step that does not count is not predicted from it.
    let expected = graph.mul_rows(expected, earlier)?;
    let given = encoder.embedding.forward(graph, ids, dtype)?;
    let given = graph.mul_rows(given, first)?;
    let x = graph.add(expected, given)?;
    let x = graph.reshape(x, &[samples, time, width])?;
    // Nothing is dropped: the encoder is a measure here.
    let again = encoder.forward_embedded(graph, x, mask, Mode::Eval)?;
    let z = graph.detach(z)?;
    Ok(graph.kd_loss(again, z, 1.0, 0.0)?.cosine)
}

/// What a decoder is evaluated by: the outputs loss, tokens, and best `[B·L]`, the most probable next token.
pub(super) fn score(graph: &mut Graph, model: &Model, pass: Pass) -> Result<()> {
    let sizes = options_of(&model.decoder, "decoder")?;
    let decoder = model.build_decoder(graph, None)?;
    let [ids, mask] = texts(graph, pass, sizes.vocabulary, sizes.length)?;
    let z = graph.input("z", &[pass.samples, sizes.embedding], DType::F32)?;
    let n = tokens(pass.samples, sizes.length)?;
    let targets = graph.index_input("targets", n, sizes.ignored_target() + 1)?;
    graph.scoped("decoder", |graph| {
        let states = decoder.forward_in(graph, [ids, z], Some(mask), pass.dtype, pass.mode)?;
        let logits = decoder.logits(graph, states)?;
        let logits = graph.reshape(logits, &[n, sizes.vocabulary])?;
        let ignore = Some(sizes.ignored_target());
        let ce = graph.cross_entropy(logits, targets, ignore, 0.0)?;
        let best = graph.apply(Op::RowMax, &[logits])?[1];
        graph.output("loss", ce.loss)?;
        graph.output("tokens", ce.count)?;
        graph.output("best", best)
    })
}

/// The sizes of a network that the caller has checked to be there.
fn options_of<'a, T>(options: &'a Option<T>, field: &'static str) -> Result<&'a T> {
    options.as_ref().ok_or_else(|| Error::Config {
        field,
        reason: "is missing".into(),
    })
}

#[cfg(test)]
mod tests;
