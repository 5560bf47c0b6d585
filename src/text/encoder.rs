//! The attention-free text encoder: tokens → embedding → TCN → pooling → linear.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::graph::{Graph, Init, ValueId};
use crate::nn::{
    AttentionPooling, Dropout, Embedding, Gelu, LayerNorm, Linear, Mode, Tcn, TcnOptions,
    weighted_sum,
};
use crate::setters::setters;
use crate::types::{DType, UnaryOp};

/// How an [`Encoder`] makes one vector of the vectors of all tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum EncoderPooling {
    /// Their mean.
    #[default]
    Mean,
    /// Their mean with learned weights, [`AttentionPooling`], after a LayerNorm.
    Attention,
}

/// LayerNorm's eps.
const EPS: f32 = 1e-5;

/// Sizes of an [`Encoder`].
///
/// [`EncoderOptions::default`] is the smallest kind of network: causal, with the mean of the tokens and a linear layer. What measures better is
/// in [`EncoderOptions::centred`], [`EncoderOptions::pooling`], [`EncoderOptions::expansion`] and [`EncoderOptions::word_dropout`].
/// Without `dilations` there are no blocks, and the encoder is *static*: a token has the same vector in every text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct EncoderOptions {
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
    /// Dilation of each block, one entry per block. None: a static encoder, of which `hidden` and `kernel` say nothing.
    pub dilations: Vec<usize>,
    /// Width of the result, E: that of the teacher's embeddings.
    pub embedding: usize,
    /// Form of GELU.
    pub gelu: Gelu,
    /// Whether the result goes through tanh.
    pub tanh: bool,
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
    /// Whether a token sees as many tokens after it as before it, instead of earlier ones only. The last block of a centred encoder cannot be
    /// shared with a decoder.
    #[serde(default)]
    pub centred: bool,
    /// Whether the blocks have gates: [`TcnOptions::gated`]. The last block of such an encoder cannot be shared with a decoder.
    #[serde(default)]
    pub gated: bool,
    /// How one vector is made of all tokens.
    #[serde(default)]
    pub pooling: EncoderPooling,
    /// Width of an expanding head, W: each token goes through a linear layer D → W and GELU before the pooling, and the result has the
    /// rank of W instead of D. `None`: the head is the linear layer D → E after the pooling.
    #[serde(default)]
    pub expansion: Option<usize>,
    /// Share of the tokens whose vectors from the table become zero in training, in [0, 1).
    #[serde(default)]
    pub word_dropout: f32,
}

impl Default for EncoderOptions {
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
            tanh: false,
            table_bound: 0.02,
            dropout: 0.0,
            padding: None,
            centred: false,
            gated: false,
            pooling: EncoderPooling::Mean,
            expansion: None,
            word_dropout: 0.0,
        }
    }
}

impl EncoderOptions {
    setters! {
        vocabulary: usize,
        length: usize,
        width: usize,
        hidden: usize,
        kernel: usize,
        dilations: Vec<usize>,
        embedding: usize,
        gelu: Gelu,
        tanh: bool,
        table_bound: f32,
        dropout: f32,
        padding: Option<u32>,
        centred: bool,
        gated: bool,
        pooling: EncoderPooling,
        expansion: Option<usize>,
        word_dropout: f32,
    }

    /// Whether anything is dropped in training.
    pub(super) fn drops(&self) -> bool {
        self.dropout != 0.0 || self.word_dropout != 0.0
    }
}

/// The layers of an encoder in one graph. Names: `embedding`, `blocks.N.norm|conv1|gate|conv2`, `norm`, `pooling`, `expansion`, `projection`.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Encoder {
    /// Token table [V, D].
    pub embedding: Embedding,
    /// The blocks; none of a static encoder.
    pub tcn: Tcn,
    /// Of attention pooling: normalises the tokens, and weighs them.
    pub pooling: Option<(LayerNorm, AttentionPooling)>,
    /// Of an expanding head: D → W, per token.
    pub expansion: Option<Linear>,
    /// D or W → E.
    pub projection: Linear,
    length: usize,
    width: usize,
    gelu: Gelu,
    tanh: bool,
    word_dropout: Dropout,
}

impl Encoder {
    /// Declares the parameters.
    ///
    /// # Errors
    /// [`Error::Config`] for sizes of zero, dilations that look too far, a padding outside the vocabulary or a rate of dropout outside [0, 1);
    /// [`Error::Graph`] for taken names.
    pub fn new(graph: &mut Graph, options: &EncoderOptions) -> Result<Self> {
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
        if options.expansion == Some(0) {
            return Err(Error::Config {
                field: "expansion",
                reason: "must be at least 1, or None".into(),
            });
        }
        let word_dropout = Dropout::new(options.word_dropout).map_err(|error| match error {
            Error::Config { reason, .. } => Error::Config {
                field: "word_dropout",
                reason,
            },
            other => other,
        })?;
        let (width, expansion) = (options.width, options.expansion);
        let embedding = Embedding::new(
            graph,
            "embedding",
            options.vocabulary,
            width,
            options.padding,
            Init::Uniform(options.table_bound),
        )?;
        let tcn = TcnOptions::new(width, options.hidden, &options.dilations)
            .kernel(options.kernel)
            .gelu(options.gelu)
            .eps(EPS)
            .dropout(options.dropout)
            .centred(options.centred)
            .gated(options.gated);
        let tcn = match options.dilations.is_empty() {
            true => Tcn { blocks: Vec::new() },
            false => Tcn::new(graph, "blocks", &tcn)?,
        };
        let pooling = match options.pooling {
            EncoderPooling::Mean => None,
            EncoderPooling::Attention => Some((
                LayerNorm::new(graph, "norm", width, EPS)?,
                AttentionPooling::new(graph, "pooling", width)?,
            )),
        };
        let expansion = expansion
            .map(|wide| Linear::new(graph, "expansion", width, wide, true))
            .transpose()?;
        let pooled = options.expansion.unwrap_or(width);
        Ok(Self {
            embedding,
            tcn,
            pooling,
            expansion,
            projection: Linear::new(graph, "projection", pooled, options.embedding, true)?,
            length: options.length,
            width,
            gelu: options.gelu,
            tanh: options.tanh,
            word_dropout,
        })
    }

    /// ids [B·L], mask [B·L] → z [B, E] in f32; the network between computes in `dtype`.
    ///
    /// A position with mask 0 does not count, whatever its id is: it changes no result, and its id gets no gradient from it.
    ///
    /// # Errors
    /// [`Error::Shape`] when the operands are not whole texts of length L.
    pub fn forward(
        &self,
        graph: &mut Graph,
        ids: ValueId,
        mask: ValueId,
        dtype: DType,
    ) -> Result<ValueId> {
        self.forward_in(graph, ids, mask, dtype, Mode::Eval)
    }

    /// As [`Encoder::forward`], in evaluation or training.
    ///
    /// # Errors
    /// As [`Encoder::forward`].
    pub fn forward_in(
        &self,
        graph: &mut Graph,
        ids: ValueId,
        mask: ValueId,
        dtype: DType,
        mode: Mode,
    ) -> Result<ValueId> {
        let batch = self.batch(graph, ids)?;
        let x = self.embedding.forward(graph, ids, dtype)?;
        let x = graph.reshape(x, &[batch, self.length, self.width])?;
        let keep = match self.word_dropout.rate > 0.0 && mode.draws().is_some() {
            true => self.word_dropout.forward(graph, mask, mode)?,
            false => mask,
        };
        let pooled = self.pool(graph, x, [keep, mask], mode)?;
        self.project(graph, pooled)
    }

    /// As [`Encoder::forward_in`], from embedded tokens x [B, L, D], which are mixtures of rows of the token table, for instance. No words are
    /// dropped.
    ///
    /// # Errors
    /// [`Error::Shape`] when the operands do not fit.
    pub fn forward_embedded(
        &self,
        graph: &mut Graph,
        x: ValueId,
        mask: ValueId,
        mode: Mode,
    ) -> Result<ValueId> {
        let pooled = self.pool(graph, x, [mask, mask], mode)?;
        self.project(graph, pooled)
    }

    /// As [`Encoder::forward`], without the last linear layer: the operand of `projection` [B, D], or [B, W] with an expanding head.
    ///
    /// # Errors
    /// As [`Encoder::forward`].
    pub fn features(
        &self,
        graph: &mut Graph,
        ids: ValueId,
        mask: ValueId,
        dtype: DType,
    ) -> Result<ValueId> {
        let batch = self.batch(graph, ids)?;
        let x = self.embedding.forward(graph, ids, dtype)?;
        let x = graph.reshape(x, &[batch, self.length, self.width])?;
        self.pool(graph, x, [mask, mask], Mode::Eval)
    }

    /// Texts of ids [B·L].
    fn batch(&self, graph: &Graph, ids: ValueId) -> Result<usize> {
        let shape = &graph.value(ids)?.shape;
        if !shape.cols().is_multiple_of(self.length) {
            let reason = format!("ids must be whole texts of {} tokens", self.length);
            return Err(Error::shape("encoder", &[shape], reason));
        }
        Ok(shape.cols() / self.length)
    }

    /// x [B, L, D], factors of the tokens and mask [B·L] → what is projected.
    fn pool(
        &self,
        graph: &mut Graph,
        x: ValueId,
        [factors, mask]: [ValueId; 2],
        mode: Mode,
    ) -> Result<ValueId> {
        // Or a masked token before a counted one would reach it through the first convolution.
        let x = graph.mul_rows(x, factors)?;
        let mut x = self.tcn.forward_in(graph, x, Some(mask), mode)?;
        let mut weights = None;
        if let Some((norm, pooling)) = &self.pooling {
            x = norm.forward(graph, x)?;
            weights = Some(pooling.weights(graph, x, mask)?);
        }
        if let Some(expansion) = &self.expansion {
            let dims = graph.value(x)?.shape.dims().to_vec();
            let wide = expansion.forward(graph, x)?;
            let wide = self.gelu.forward(graph, wide)?;
            let columns = graph.value(wide)?.shape.cols();
            x = graph.reshape(wide, &[dims[0], dims[1], columns])?;
        }
        match weights {
            Some(weights) => weighted_sum(graph, x, weights),
            None => graph.masked_mean(x, mask),
        }
    }

    fn project(&self, graph: &mut Graph, pooled: ValueId) -> Result<ValueId> {
        let z = self.projection.forward_as(graph, pooled, DType::F32)?;
        match self.tanh {
            true => graph.unary(UnaryOp::Tanh, z),
            false => Ok(z),
        }
    }
}

/// Upper bound on the time steps that a convolution looks back. Rings of a decoder, and products with the size of a batch, stay countable.
const FARTHEST: usize = 1 << 24;

/// Checks the sizes, and the bound and padding of the token table, of encoder and decoder. The vocabulary is the first size.
pub(super) fn check(
    sizes: &[(&'static str, usize)],
    dilations: &[usize],
    table_bound: f32,
    padding: Option<u32>,
) -> Result<()> {
    if let Some(&(field, _)) = sizes.iter().find(|(_, size)| *size == 0) {
        return Err(Error::Config {
            field,
            reason: "must be at least 1".into(),
        });
    }
    let mut fields = sizes.iter();
    let kernel = fields.find(|(field, _)| *field == "kernel");
    let kernel = kernel.map_or(1, |&(_, kernel)| kernel);
    for &dilation in dilations {
        let farthest = (kernel - 1).checked_mul(dilation);
        if farthest.is_none_or(|steps| steps > FARTHEST) {
            return Err(Error::Config {
                field: "dilations",
                reason: format!(
                    "has {dilation}: with {kernel} taps a convolution looks back more than {FARTHEST} tokens"
                ),
            });
        }
    }
    if !table_bound.is_finite() || table_bound <= 0.0 {
        return Err(Error::Config {
            field: "table_bound",
            reason: "must be positive".into(),
        });
    }
    let vocabulary = sizes[0].1;
    if let Some(id) = padding.filter(|&id| id as usize >= vocabulary) {
        return Err(Error::Config {
            field: "padding",
            reason: format!("is {id}, but the ids of the vocabulary are below {vocabulary}"),
        });
    }
    Ok(())
}
