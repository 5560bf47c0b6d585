//! The decoder: tokens so far and a sentence embedding → the next token. Token embedding + linear(z) → TCN → linear.

use serde::{Deserialize, Serialize};

use super::encoder::{PADDING, check};
use crate::error::{Error, Result};
use crate::graph::{CrossEntropy, Graph, Init, ValueId};
use crate::nn::{Embedding, Gelu, Linear, Mode, Tcn, TcnBlock, TcnOptions};
use crate::types::DType;

/// Sizes of a [`Decoder`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DecoderOptions {
    /// Token ids are less than this, V.
    pub vocabulary: usize,
    /// Tokens of a text, L; longer texts are cut.
    pub length: usize,
    /// Width of the network, D.
    pub width: usize,
    /// Width inside a block, H.
    pub hidden: usize,
    /// Taps of the convolutions, k.
    pub kernel: usize,
    /// Dilation of each block.
    pub dilations: Vec<usize>,
    /// Width of the embedding that is decoded, E.
    pub embedding: usize,
    /// Form of GELU.
    pub gelu: Gelu,
    /// The token table starts uniform in ± this.
    pub table_bound: f32,
    /// Share of the elements that the blocks drop in training, in [0, 1).
    #[serde(default)]
    pub dropout: f32,
}

impl Default for DecoderOptions {
    /// D 256, H 512, four blocks of kernel 5 with dilations 1, 2, 4, 8, L 128, E 768, V 30522.
    fn default() -> Self {
        Self {
            vocabulary: 30_522,
            length: 128,
            width: 256,
            hidden: 512,
            kernel: 5,
            dilations: vec![1, 2, 4, 8],
            embedding: 768,
            gelu: Gelu::Tanh,
            table_bound: 0.02,
            dropout: 0.0,
        }
    }
}

impl DecoderOptions {
    /// Sizes of the blocks.
    #[must_use]
    pub fn tcn(&self) -> TcnOptions {
        TcnOptions {
            width: self.width,
            hidden: self.hidden,
            kernel: self.kernel,
            dilations: self.dilations.clone(),
            gelu: self.gelu,
            eps: 1e-5,
            dropout: self.dropout,
        }
    }
}

/// The layers of a decoder in one graph.
///
/// Names: `decoder.embedding`, `decoder.condition`, `decoder.blocks.N.norm|conv1|conv2`, `decoder.head`, none of which an
/// [`Encoder`](super::Encoder) has, so that both fit one session.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Decoder {
    /// Token table [V, D].
    pub embedding: Embedding,
    /// E → D, added at every time step.
    pub condition: Linear,
    /// The blocks.
    pub tcn: Tcn,
    /// D → V.
    pub head: Linear,
    length: usize,
    width: usize,
    vocabulary: usize,
}

impl Decoder {
    /// Declares the parameters.
    ///
    /// # Errors
    /// [`Error::Config`] for sizes of zero or no blocks, [`Error::Graph`] for taken names.
    pub fn new(graph: &mut Graph, options: &DecoderOptions) -> Result<Self> {
        Self::build(graph, options, None)
    }

    /// As [`Decoder::new`], with `last` as the last block: that of an [`Encoder`](super::Encoder) in the same graph, or one declared
    /// with [`TcnBlock::new`] under the name that it has in other graphs of the session. Its parameters then exist once, and so do
    /// their moments.
    ///
    /// # Errors
    /// As [`Decoder::new`]; [`Error::Config`] when the block has other taps or another dilation than the last one of `options`.
    pub fn sharing(graph: &mut Graph, options: &DecoderOptions, last: TcnBlock) -> Result<Self> {
        Self::build(graph, options, Some(last))
    }

    fn build(graph: &mut Graph, options: &DecoderOptions, last: Option<TcnBlock>) -> Result<Self> {
        check(
            &[
                ("vocabulary", options.vocabulary),
                ("length", options.length),
                ("width", options.width),
                ("hidden", options.hidden),
                ("kernel", options.kernel),
                ("embedding", options.embedding),
            ],
            options.table_bound,
        )?;
        let (vocabulary, width) = (options.vocabulary, options.width);
        Ok(Self {
            embedding: Embedding::new(
                graph,
                "decoder.embedding",
                vocabulary,
                width,
                Some(PADDING),
                Init::Uniform(options.table_bound),
            )?,
            condition: Linear::new(graph, "decoder.condition", options.embedding, width, true)?,
            tcn: blocks(graph, options.tcn(), last)?,
            head: Linear::new(graph, "decoder.head", width, vocabulary, true)?,
            length: options.length,
            width,
            vocabulary,
        })
    }

    /// ids [B·L], z [B, E] and, if there is one, mask [B·L] → states [B, L, D] in `dtype`, from which [`Decoder::loss`] and
    /// [`Decoder::logits`] go on. A state depends on the tokens up to its own, never on later ones: padding on the right needs no
    /// mask.
    ///
    /// # Errors
    /// [`Error::Shape`] when the operands are not whole texts of length L, or do not fit each other.
    pub fn forward(
        &self,
        graph: &mut Graph,
        ids: ValueId,
        z: ValueId,
        mask: Option<ValueId>,
        dtype: DType,
    ) -> Result<ValueId> {
        self.forward_in(graph, [ids, z], mask, dtype, Mode::Eval)
    }

    /// As [`Decoder::forward`], in evaluation or training.
    ///
    /// # Errors
    /// As [`Decoder::forward`].
    pub fn forward_in(
        &self,
        graph: &mut Graph,
        [ids, z]: [ValueId; 2],
        mask: Option<ValueId>,
        dtype: DType,
        mode: Mode,
    ) -> Result<ValueId> {
        let shape = &graph.value(ids)?.shape;
        if !shape.cols().is_multiple_of(self.length) {
            let reason = format!("ids must be whole texts of {} tokens", self.length);
            return Err(Error::shape("decoder", &[shape], reason));
        }
        let batch = shape.cols() / self.length;
        let z = graph.cast(z, dtype)?;
        let z = self.condition.forward(graph, z)?;
        let x = self.embedding.forward(graph, ids, dtype)?;
        let x = graph.reshape(x, &[batch, self.length, self.width])?;
        let x = graph.add_over_time(x, z)?;
        self.tcn.forward_in(graph, x, mask, mode)
    }

    /// Mean cross entropy of the next tokens over the targets that count: states from [`Decoder::forward`], targets u32 [B·L] as
    /// [`next_tokens`] makes them, of which [`PADDING`] does not count. The logits never exist as a whole.
    ///
    /// # Errors
    /// [`Error::Shape`] when the operands do not fit, or `smoothing` is not in [0, 1).
    pub fn loss(
        &self,
        graph: &mut Graph,
        states: ValueId,
        targets: ValueId,
        smoothing: f32,
    ) -> Result<CrossEntropy> {
        let dtype = graph.value(states)?.dtype;
        let weight = graph.cast(self.head.weight, dtype)?;
        graph.linear_cross_entropy(
            states,
            weight,
            self.head.bias,
            targets,
            Some(PADDING),
            smoothing,
        )
    }

    /// states [B, L, D] from [`Decoder::forward`] → logits [B, L, V] in f32: those at time step t are for token t + 1.
    ///
    /// # Errors
    /// [`Error::Shape`] when states are no [B, L, D].
    pub fn logits(&self, graph: &mut Graph, states: ValueId) -> Result<ValueId> {
        let batch = graph.value(states)?.shape.rows() / self.length;
        let logits = self.head.forward_as(graph, states, DType::F32)?;
        graph.reshape(logits, &[batch, self.length, self.vocabulary])
    }
}

/// Blocks `decoder.blocks.N`, the last one replaced by the given one.
fn blocks(graph: &mut Graph, mut options: TcnOptions, last: Option<TcnBlock>) -> Result<Tcn> {
    const NAME: &str = "decoder.blocks";
    let Some(last) = last else {
        return Tcn::new(graph, NAME, &options);
    };
    let conv = last.conv1;
    if options.kernel != conv.kernel || options.dilations.pop() != Some(conv.dilation) {
        return Err(Error::Config {
            field: "dilations",
            reason: format!(
                "and kernel must end with those of the shared block: {} taps, dilation {}",
                conv.kernel, conv.dilation
            ),
        });
    }
    // A single block is a shared one.
    let mut tcn = match options.dilations.is_empty() {
        true => Tcn { blocks: Vec::new() },
        false => Tcn::new(graph, NAME, &options)?,
    };
    tcn.blocks.push(last);
    Ok(tcn)
}

/// Writes the target of every position of `ids`, texts of `length` tokens: the token after it, or [`PADDING`] where there is none to
/// learn: at the last position of a text, where the position or the token after it does not count (mask 0), and where that token is
/// padding.
///
/// # Errors
/// [`Error::Data`] when the three differ in length, or are no whole texts.
pub fn next_tokens(ids: &[u32], mask: &[f32], length: usize, targets: &mut [u32]) -> Result<()> {
    let n = ids.len();
    if mask.len() != n || targets.len() != n || length == 0 || !n.is_multiple_of(length) {
        let (m, t) = (mask.len(), targets.len());
        return Err(Error::Data {
            name: "targets".into(),
            reason: format!("{t} for {n} ids and {m} mask values in texts of {length}"),
        });
    }
    for (i, target) in targets.iter_mut().enumerate() {
        let last = (i + 1) % length == 0;
        *target = match !last && mask[i] > 0.0 && mask[i + 1] > 0.0 {
            true => ids[i + 1],
            false => PADDING,
        };
    }
    Ok(())
}
