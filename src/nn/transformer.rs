//! The transformer encoder: layers of self-attention and a network per position.

use serde::{Deserialize, Serialize};

use super::attention::check_heads;
use super::{Dropout, Gelu, LayerNorm, Linear, Mode, MultiHeadAttention};
use crate::error::Result;
use crate::graph::{Graph, ValueId};
use crate::setters::setters;
use crate::types::UnaryOp;

/// The function between the two products of a [`TransformerEncoderLayer`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Activation {
    /// [`UnaryOp::GeluErf`], BERT's.
    #[default]
    GeluErf,
    /// [`UnaryOp::GeluTanh`], cheaper.
    GeluTanh,
    /// [`UnaryOp::Relu`]
    Relu,
}

impl Activation {
    /// The function of every element.
    ///
    /// # Errors
    /// As [`Graph::apply`].
    pub fn forward(self, graph: &mut Graph, x: ValueId) -> Result<ValueId> {
        match self {
            Self::GeluErf => Gelu::Erf.forward(graph, x),
            Self::GeluTanh => Gelu::Tanh.forward(graph, x),
            Self::Relu => graph.unary(UnaryOp::Relu, x),
        }
    }
}

/// Where a [`TransformerEncoderLayer`] normalises.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormOrder {
    /// The sum of a branch and its input: x ← norm(x + branch(x)), as in BERT.
    #[default]
    Post,
    /// The input of a branch: x ← x + branch(norm(x)). Xiong et al., arXiv:2002.04745.
    Pre,
}

/// Sizes of a [`TransformerEncoder`].
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct TransformerEncoderOptions {
    /// Columns of input and output, W.
    pub width: usize,
    /// Heads of attention; they divide the width.
    pub heads: usize,
    /// Columns between the two products.
    pub hidden: usize,
    /// Number of layers.
    pub layers: usize,
    /// Function between the two products.
    pub activation: Activation,
    /// Where layers normalise.
    pub norm: NormOrder,
    /// LayerNorm's eps.
    pub eps: f32,
    /// Share of the elements of both branches that is dropped in training, in [0, 1).
    pub dropout: f32,
    /// Whether a position sees only itself and the positions before it.
    pub causal: bool,
}

impl TransformerEncoderOptions {
    /// So many layers of this width and number of heads; four times the width between the products, GELU in exact form, post-norm, an eps
    /// of 1e-12, no dropout.
    #[must_use]
    pub fn new(width: usize, heads: usize, layers: usize) -> Self {
        Self {
            width,
            heads,
            hidden: width.saturating_mul(4),
            layers,
            activation: Activation::GeluErf,
            norm: NormOrder::Post,
            eps: 1e-12,
            dropout: 0.0,
            causal: false,
        }
    }

    setters! {
        hidden: usize,
        activation: Activation,
        norm: NormOrder,
        eps: f32,
        dropout: f32,
        causal: bool,
    }
}

/// Self-attention, then two products with a function between them, each with a residual connection and LayerNorm.
///
/// In training there is dropout after each of the two branches. The probabilities of attention are not dropped, since they are never in
/// memory.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct TransformerEncoderLayer {
    /// Attention.
    pub self_attn: MultiHeadAttention,
    /// W → hidden.
    pub linear1: Linear,
    /// hidden → W.
    pub linear2: Linear,
    /// After (post-norm) or before (pre-norm) attention.
    pub norm1: LayerNorm,
    /// After or before the products.
    pub norm2: LayerNorm,
    activation: Activation,
    norm: NormOrder,
    dropout: Dropout,
}

impl TransformerEncoderLayer {
    /// Declares `NAME.self_attn`, `NAME.linear1`, `NAME.linear2`, `NAME.norm1` and `NAME.norm2`.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for heads that do not divide the width, or a rate of dropout outside of [0, 1);
    /// [`Error::Graph`](crate::Error::Graph) for a taken name, [`Error::Shape`](crate::Error::Shape) for an extent of zero.
    pub fn new(graph: &mut Graph, name: &str, options: &TransformerEncoderOptions) -> Result<Self> {
        let (width, hidden) = (options.width, options.hidden);
        let part = |part: &str| format!("{name}.{part}");
        Ok(Self {
            self_attn: MultiHeadAttention::new(graph, &part("self_attn"), width, options.heads)?
                .causal(options.causal),
            linear1: Linear::new(graph, &part("linear1"), width, hidden, true)?,
            linear2: Linear::new(graph, &part("linear2"), hidden, width, true)?,
            norm1: LayerNorm::new(graph, &part("norm1"), width, options.eps)?,
            norm2: LayerNorm::new(graph, &part("norm2"), width, options.eps)?,
            activation: options.activation,
            norm: options.norm,
            dropout: Dropout::new(options.dropout)?,
        })
    }

    /// x [B, L, W], mask [B·L] → like x. Positions with mask 0 are never attended to; what the layer gives for them does not count.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) when the operands do not fit.
    pub fn forward(
        &self,
        graph: &mut Graph,
        x: ValueId,
        mask: Option<ValueId>,
        mode: Mode,
    ) -> Result<ValueId> {
        let name = graph.value(self.norm1.weight)?.name.clone();
        let name = name.strip_suffix(".norm1.weight").unwrap_or(&name);
        graph.scoped(name, |graph| match self.norm {
            NormOrder::Post => {
                let h = self.attend(graph, x, mask, mode)?;
                let h = graph.add(h, x)?;
                let x = self.norm1.forward(graph, h)?;
                let h = self.transform(graph, x, mode)?;
                let h = graph.add(h, x)?;
                self.norm2.forward(graph, h)
            }
            NormOrder::Pre => {
                let h = self.norm1.forward(graph, x)?;
                let h = self.attend(graph, h, mask, mode)?;
                let x = graph.add(h, x)?;
                let h = self.norm2.forward(graph, x)?;
                let h = self.transform(graph, h, mode)?;
                graph.add(h, x)
            }
        })
    }

    fn attend(
        &self,
        graph: &mut Graph,
        x: ValueId,
        mask: Option<ValueId>,
        mode: Mode,
    ) -> Result<ValueId> {
        let h = self.self_attn.forward(graph, x, mask)?;
        self.dropout.forward(graph, h, mode)
    }

    fn transform(&self, graph: &mut Graph, x: ValueId, mode: Mode) -> Result<ValueId> {
        let dims = graph.value(x)?.shape.dims().to_vec();
        let h = self.linear1.forward(graph, x)?;
        let h = self.activation.forward(graph, h)?;
        let h = self.linear2.forward(graph, h)?;
        let h = graph.reshape(h, &dims)?;
        self.dropout.forward(graph, h, mode)
    }
}

/// A sequence of layers; pre-norm layers are followed by one more LayerNorm.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct TransformerEncoder {
    /// In order.
    pub layers: Vec<TransformerEncoderLayer>,
    /// Normalises the result of pre-norm layers.
    pub norm: Option<LayerNorm>,
}

impl TransformerEncoder {
    /// Declares layers `NAME.layers.0`, `NAME.layers.1`, … and, for pre-norm layers, `NAME.norm`. The names are those of PyTorch's
    /// `TransformerEncoder`, but for `in_proj_weight` and `in_proj_bias`, which are `in_proj.weight` and `in_proj.bias` here.
    ///
    /// # Errors
    /// As [`TransformerEncoderLayer::new`].
    pub fn new(graph: &mut Graph, name: &str, options: &TransformerEncoderOptions) -> Result<Self> {
        check_heads(options.width, options.heads)?;
        let layers = (0..options.layers)
            .map(|i| TransformerEncoderLayer::new(graph, &format!("{name}.layers.{i}"), options));
        let layers = layers.collect::<Result<_>>()?;
        let norm = match options.norm {
            NormOrder::Post => None,
            NormOrder::Pre => {
                let name = format!("{name}.norm");
                Some(LayerNorm::new(graph, &name, options.width, options.eps)?)
            }
        };
        Ok(Self { layers, norm })
    }

    /// x [B, L, W], mask [B·L] → like x. With recomputation, every layer except the last is a segment. The last one is differentiated
    /// first, when its values are still there.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) when the operands do not fit.
    pub fn forward(
        &self,
        graph: &mut Graph,
        mut x: ValueId,
        mask: Option<ValueId>,
        mode: Mode,
    ) -> Result<ValueId> {
        for (i, layer) in self.layers.iter().enumerate() {
            x = match mode.recomputes() && i + 1 < self.layers.len() {
                true => graph.recompute(|graph| layer.forward(graph, x, mask, mode))?,
                false => layer.forward(graph, x, mask, mode)?,
            };
        }
        match &self.norm {
            Some(norm) => norm.forward(graph, x),
            None => Ok(x),
        }
    }
}
