//! The decoder predicts the next token from the tokens so far and a sentence embedding z: token embedding + linear(z) → TCN → linear.

use serde::{Deserialize, Serialize};

use super::encoder::check;
use crate::error::{Error, Result};
use crate::graph::{CrossEntropy, Graph, Init, ValueId};
use crate::nn::{Embedding, Gelu, Linear, Mode, Tcn, TcnBlock, TcnOptions};
use crate::setters::setters;
use crate::types::{DType, Padding};

/// Sizes of a [`Decoder`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct DecoderOptions {
    /// Exclusive upper bound of token ids, V.
    pub vocabulary: usize,
    /// Number of tokens per text, L; longer texts are cut.
    pub length: usize,
    /// Width of the network, D.
    pub width: usize,
    /// Width inside the blocks, H.
    pub hidden: usize,
    /// Number of taps of the convolutions, k.
    pub kernel: usize,
    /// Dilation of each block, one entry per block.
    pub dilations: Vec<usize>,
    /// Width of the embedding that is decoded, E.
    pub embedding: usize,
    /// Form of GELU.
    pub gelu: Gelu,
    /// The token table is initialised uniformly in ± this.
    pub table_bound: f32,
    /// Share of the elements that the blocks drop in training, in [0, 1).
    #[serde(default)]
    pub dropout: f32,
    /// An id whose row of the token table is never trained, like PyTorch's `padding_idx`. `None`: every row is trained.
    ///
    /// The mask alone says which positions count. But texts that are filled up with this id make the gradient of the table
    /// cheaper, since the row of the id need not be summed over all padded positions. Give the id of the tokenizer's padding
    /// token ([`Tokenizer::padding_id`](super::Tokenizer::padding_id)).
    #[serde(default)]
    pub padding: Option<u32>,
    /// Whether the head uses the token table as its weight. `decoder.head.weight` is then no parameter; the bias is one.
    #[serde(default)]
    pub tied: bool,
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
            padding: None,
            tied: false,
        }
    }
}

impl DecoderOptions {
    setters! {
        vocabulary: usize,
        length: usize,
        width: usize,
        hidden: usize,
        kernel: usize,
        dilations: Vec<usize>,
        embedding: usize,
        gelu: Gelu,
        table_bound: f32,
        dropout: f32,
        padding: Option<u32>,
        tied: bool,
    }

    /// The target of a position that has none to learn: V, which is no token.
    #[must_use]
    pub fn ignored_target(&self) -> u32 {
        // `Decoder::new` refuses a vocabulary that does not fit.
        u32::try_from(self.vocabulary).unwrap_or(u32::MAX)
    }

    /// Sizes of the blocks.
    #[must_use]
    pub fn tcn(&self) -> TcnOptions {
        TcnOptions::new(self.width, self.hidden, &self.dilations)
            .kernel(self.kernel)
            .gelu(self.gelu)
            .dropout(self.dropout)
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
    /// D → V; its weight is the token table if the two are tied.
    pub head: Linear,
    length: usize,
    width: usize,
    vocabulary: usize,
    ignored: u32,
}

impl Decoder {
    /// Declares the parameters.
    ///
    /// # Errors
    /// [`Error::Config`] for sizes of zero, no blocks, a padding outside the vocabulary or a vocabulary of 2³² − 1 or more;
    /// [`Error::Graph`] for taken names.
    pub fn new(graph: &mut Graph, options: &DecoderOptions) -> Result<Self> {
        Self::build(graph, options, None)
    }

    /// As [`Decoder::new`], with `last` as the last block: that of an [`Encoder`](super::Encoder) in the same graph, or one declared
    /// with [`TcnBlock::new`] under the name that it has in other graphs of the session. Its parameters then exist once, and so do
    /// their moments.
    ///
    /// # Errors
    /// As [`Decoder::new`]; [`Error::Config`] when the block has other taps or another dilation than the last one of `options`, is centred, or
    /// has a gate.
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
            &options.dilations,
            options.table_bound,
            options.padding,
        )?;
        let ignored = options.ignored_target();
        if ignored == u32::MAX {
            return Err(Error::Config {
                field: "vocabulary",
                reason: "must be below 2^32 - 1".into(),
            });
        }
        let (vocabulary, width) = (options.vocabulary, options.width);
        let embedding = Embedding::new(
            graph,
            "decoder.embedding",
            vocabulary,
            width,
            options.padding,
            Init::Uniform(options.table_bound),
        )?;
        Ok(Self {
            embedding,
            condition: Linear::new(graph, "decoder.condition", options.embedding, width, true)?,
            tcn: blocks(graph, options.tcn(), last)?,
            head: match options.tied {
                true => Linear::tied(graph, "decoder.head", embedding.weight)?,
                false => Linear::new(graph, "decoder.head", width, vocabulary, true)?,
            },
            length: options.length,
            width,
            vocabulary,
            ignored,
        })
    }

    /// ids [B·L], z [B, E] and, if there is one, mask [B·L] → states [B, L, D] in `dtype`, the operand of [`Decoder::loss`] and
    /// [`Decoder::logits`]. A state depends on the tokens up to its own, never on later ones, so that padding on the right needs no
    /// mask. A position with mask 0 changes no state that counts, whatever its id is.
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
        let mut x = graph.add_over_time(x, z)?;
        if let Some(mask) = mask {
            // Or a masked token before a counted one would reach it through the first convolution.
            x = graph.mul_rows(x, mask)?;
        }
        self.tcn.forward_in(graph, x, mask, mode)
    }

    /// Mean cross entropy of the next tokens over the targets that count: states from [`Decoder::forward`], targets u32 [B·L] as
    /// [`next_tokens`] makes them. A target that is [`DecoderOptions::ignored_target`] does not count; declare the input of the
    /// targets with a bound above it. The matrix of logits is never materialised; it is computed in chunks of rows.
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
            Some(self.ignored),
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

/// Blocks `decoder.blocks.N`; `last` takes the place of the last one.
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
    if conv.padding != Padding::Causal || last.gate.is_some() {
        return Err(Error::Config {
            field: "shared_last_block",
            reason: "must be causal and without a gate: a decoder sees no later tokens, and decodes step by step with blocks of two convolutions".into(),
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

/// Writes the target of every position of `ids`, texts of `length` tokens: the token after it, or `ignored` where there is none to
/// learn: at the last position of a text, and where the position or the token after it does not count (mask 0).
///
/// `ignored` must be no token: [`DecoderOptions::ignored_target`].
///
/// # Errors
/// [`Error::Data`] when the lengths differ or are no whole texts, or a token that counts is `ignored`.
pub fn next_tokens(
    ids: &[u32],
    mask: &[f32],
    length: usize,
    ignored: u32,
    targets: &mut [u32],
) -> Result<()> {
    let fail = |name: &str, reason: String| {
        Err(Error::Data {
            name: name.into(),
            reason,
        })
    };
    let n = ids.len();
    if mask.len() != n || targets.len() != n || length == 0 || !n.is_multiple_of(length) {
        let (m, t) = (mask.len(), targets.len());
        let reason = format!("{t} for {n} ids and {m} mask values in texts of {length}");
        return fail("targets", reason);
    }
    for (i, target) in targets.iter_mut().enumerate() {
        if mask[i] > 0.0 && ids[i] == ignored {
            let reason = format!("element {i} is {ignored}, which stands for no target");
            return fail("ids", reason);
        }
        let last = (i + 1) % length == 0;
        *target = match !last && mask[i] > 0.0 && mask[i + 1] > 0.0 {
            true => ids[i + 1],
            false => ignored,
        };
    }
    Ok(())
}
