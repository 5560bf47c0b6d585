//! A transformer of the BERT family: tokens → embeddings of token, position and type → layers of self-attention → pooling.

use serde::{Deserialize, Serialize};

use super::engine::Network;
use crate::error::{Error, Result};
use crate::graph::{Graph, Init, ValueId};
use crate::nn::{
    Activation, AttentionPooling, Dropout, Embedding, LayerNorm, Mode, NormOrder,
    TransformerEncoder, TransformerEncoderOptions, first_step, normalize,
};
use crate::setters::setters;
use crate::types::{BinaryOp, Broadcast, DType};

/// How a [`Transformer`] makes one vector of the vectors of the tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Pooling {
    /// The mean of the tokens that count.
    #[default]
    Mean,
    /// The vector of the first token, `[CLS]`.
    Cls,
    /// A mean with learned weights, [`AttentionPooling`].
    Attention,
}

/// Sizes of a [`Transformer`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct TransformerOptions {
    /// Exclusive upper bound of token ids, V.
    pub vocabulary: usize,
    /// Number of tokens per text, L; longer texts are cut. At most `positions`.
    pub length: usize,
    /// Rows of the table of positions.
    pub positions: usize,
    /// Rows of the table of token types. All tokens are of type 0; with 0 there is no such table.
    pub types: usize,
    /// Width of the network and of the result, W.
    pub width: usize,
    /// Heads of attention; they divide the width.
    pub heads: usize,
    /// Columns between the two products of a layer.
    pub hidden: usize,
    /// Number of layers.
    pub layers: usize,
    /// Function between the two products of a layer.
    pub activation: Activation,
    /// Where layers normalise.
    pub norm: NormOrder,
    /// LayerNorm's eps.
    pub eps: f32,
    /// Share of the elements that is dropped in training after the embeddings and after both branches of a layer, in [0, 1). The
    /// probabilities of attention are not dropped.
    pub dropout: f32,
    /// From the vectors of the tokens to one.
    pub pooling: Pooling,
    /// Whether the result is divided by its norm.
    pub normalize: bool,
    /// An id whose row of the token table is never trained, see [`EncoderOptions::padding`](super::EncoderOptions::padding).
    pub padding: Option<u32>,
}

impl Default for TransformerOptions {
    /// The sizes of all-MiniLM-L6-v2: V 30522, L 256, 512 positions, 2 types, W 384, 12 heads, 1536 between the products, 6 layers, GELU in
    /// exact form, post-norm, an eps of 1e-12, dropout 0.1, mean pooling, normalised, padding 0.
    fn default() -> Self {
        Self {
            vocabulary: 30_522,
            length: 256,
            positions: 512,
            types: 2,
            width: 384,
            heads: 12,
            hidden: 1536,
            layers: 6,
            activation: Activation::GeluErf,
            norm: NormOrder::Post,
            eps: 1e-12,
            dropout: 0.1,
            pooling: Pooling::Mean,
            normalize: true,
            padding: Some(0),
        }
    }
}

impl TransformerOptions {
    setters! {
        vocabulary: usize,
        length: usize,
        positions: usize,
        types: usize,
        width: usize,
        heads: usize,
        hidden: usize,
        layers: usize,
        activation: Activation,
        norm: NormOrder,
        eps: f32,
        dropout: f32,
        pooling: Pooling,
        normalize: bool,
        padding: Option<u32>,
    }

    fn check(&self) -> Result<()> {
        let sizes = [
            ("vocabulary", self.vocabulary),
            ("length", self.length),
            ("positions", self.positions),
            ("width", self.width),
            ("hidden", self.hidden),
            ("layers", self.layers),
        ];
        let fail = |field, reason: String| Err(Error::Config { field, reason });
        if let Some((field, _)) = sizes.into_iter().find(|(_, size)| *size == 0) {
            return fail(field, "must be at least 1".into());
        }
        if self.length > self.positions {
            return fail(
                "length",
                format!(
                    "is {}, but there are {} positions",
                    self.length, self.positions
                ),
            );
        }
        if !self.eps.is_finite() || self.eps <= 0.0 {
            return fail("eps", format!("must be positive, not {}", self.eps));
        }
        match self.padding.filter(|&id| id as usize >= self.vocabulary) {
            Some(id) => fail(
                "padding",
                format!(
                    "is {id}, but the ids of the vocabulary are below {}",
                    self.vocabulary
                ),
            ),
            None => Ok(()),
        }
    }
}

/// Bound of the initial values of the tables: the deviation is BERT's 0.02.
const TABLE_BOUND: f32 = 0.034_641;

/// The layers of a transformer in one graph.
///
/// Names: `embeddings.word_embeddings.weight` [V, W], `embeddings.position_embeddings.weight`, `embeddings.token_type_embeddings.weight` and
/// `embeddings.LayerNorm` as in Hugging Face's `BertModel`; `encoder.layers.N` as [`TransformerEncoder`] names them; `pooling` for
/// [`Pooling::Attention`]. [`TransformerModel`](super::TransformerModel) translates the names, and packs q, k and v, where it reads and
/// writes files.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Transformer {
    /// Token table [V, W].
    pub words: Embedding,
    /// Table of positions [P, W].
    pub positions: ValueId,
    /// Table of token types [T, W].
    pub types: Option<ValueId>,
    /// Normalises the sum of the three.
    pub norm: LayerNorm,
    /// The layers.
    pub encoder: TransformerEncoder,
    /// The weight of [`Pooling::Attention`].
    pub attention_pooling: Option<AttentionPooling>,
    dropout: Dropout,
    pooling: Pooling,
    normalize: bool,
    length: usize,
    width: usize,
}

impl Transformer {
    /// Declares the parameters.
    ///
    /// # Errors
    /// [`Error::Config`] for sizes of zero, a length above the positions, heads that do not divide the width, a padding outside the
    /// vocabulary, or a rate of dropout outside of [0, 1); [`Error::Graph`] for taken names.
    pub fn new(graph: &mut Graph, options: &TransformerOptions) -> Result<Self> {
        options.check()?;
        let width = options.width;
        let init = Init::Uniform(TABLE_BOUND);
        let table = |graph: &mut Graph, name: &str, rows| {
            let name = format!("embeddings.{name}.weight");
            graph.parameter(&name, &[rows, width], init)
        };
        let words = Embedding::new(
            graph,
            "embeddings.word_embeddings",
            options.vocabulary,
            width,
            options.padding,
            init,
        )?;
        let positions = table(graph, "position_embeddings", options.positions)?;
        let types = match options.types {
            0 => None,
            rows => Some(table(graph, "token_type_embeddings", rows)?),
        };
        let layers = TransformerEncoderOptions::new(width, options.heads, options.layers)
            .hidden(options.hidden)
            .activation(options.activation)
            .norm(options.norm)
            .eps(options.eps)
            .dropout(options.dropout);
        let attention_pooling = match options.pooling {
            Pooling::Attention => Some(AttentionPooling::new(graph, "pooling", width)?),
            Pooling::Mean | Pooling::Cls => None,
        };
        Ok(Self {
            words,
            positions,
            types,
            norm: LayerNorm::new(graph, "embeddings.LayerNorm", width, options.eps)?,
            encoder: TransformerEncoder::new(graph, "encoder", &layers)?,
            attention_pooling,
            dropout: Dropout::new(options.dropout)?,
            pooling: options.pooling,
            normalize: options.normalize,
            length: options.length,
            width,
        })
    }

    /// ids [B·L], mask [B·L] → z [B, W] in f32; the network between computes in `dtype`.
    ///
    /// A position with mask 0 does not count, whatever its id is.
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

    /// As [`Transformer::forward`], in evaluation or training. With recomputation, every layer except the last is a segment.
    ///
    /// # Errors
    /// As [`Transformer::forward`].
    pub fn forward_in(
        &self,
        graph: &mut Graph,
        ids: ValueId,
        mask: ValueId,
        dtype: DType,
        mode: Mode,
    ) -> Result<ValueId> {
        let x = self.embed(graph, ids, dtype, mode)?;
        let x = self.encoder.forward(graph, x, Some(mask), mode)?;
        let z = graph.scoped("pooling", |graph| {
            let pooled = match (self.pooling, &self.attention_pooling) {
                (Pooling::Attention, Some(pooling)) => pooling.forward(graph, x, mask)?,
                (Pooling::Cls, _) => first_step(graph, x)?,
                _ => graph.masked_mean(x, mask)?,
            };
            graph.cast(pooled, DType::F32)
        })?;
        match self.normalize {
            true => graph.scoped("normalize", |graph| normalize(graph, z)),
            false => Ok(z),
        }
    }

    /// ids [B·L] → [B, L, W] in `dtype`. The sum of the three tables and its normalisation are f32.
    fn embed(&self, graph: &mut Graph, ids: ValueId, dtype: DType, mode: Mode) -> Result<ValueId> {
        let shape = &graph.value(ids)?.shape;
        if !shape.cols().is_multiple_of(self.length) {
            let reason = format!("ids must be whole texts of {} tokens", self.length);
            return Err(Error::shape("transformer", &[shape], reason));
        }
        let batch = shape.cols() / self.length;
        graph.scoped("embeddings", |graph| {
            let x = self.words.forward(graph, ids, DType::F32)?;
            let mut x = graph.reshape(x, &[batch, self.length, self.width])?;
            if let Some(types) = self.types {
                let first = Broadcast::Tiles { period: 1 };
                x = graph.binary(BinaryOp::Add, first, x, types)?;
            }
            let x = graph.add_positions(x, self.positions)?;
            let x = self.norm.forward(graph, x)?;
            let x = graph.cast(x, dtype)?;
            self.dropout.forward(graph, x, mode)
        })
    }
}

impl Network for TransformerOptions {
    fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    fn length(&self) -> usize {
        self.length
    }

    fn embedding(&self) -> usize {
        self.width
    }

    fn widest(&self) -> usize {
        self.hidden.max(3 * self.width)
    }

    fn padding(&self) -> Option<u32> {
        self.padding
    }

    /// The engine normalises on the host.
    fn forward(
        &self,
        graph: &mut Graph,
        length: usize,
        ids: ValueId,
        mask: ValueId,
        dtype: DType,
    ) -> Result<ValueId> {
        let options = self.clone().length(length).normalize(false);
        Transformer::new(graph, &options)?.forward(graph, ids, mask, dtype)
    }
}
