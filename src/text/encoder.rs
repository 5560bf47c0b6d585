//! The attention-free text encoder: tokens → embedding → TCN → masked mean → linear.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::graph::{Graph, Init, ValueId};
use crate::nn::{Embedding, Gelu, Linear, Mode, Tcn, TcnOptions};
use crate::setters::setters;
use crate::types::{DType, UnaryOp};

/// Sizes of an [`Encoder`].
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
    /// Dilation of each block, one entry per block.
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
    }
}

/// The layers of an encoder in one graph. Names: `embedding`, `blocks.N.norm|conv1|conv2`, `projection`.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Encoder {
    /// Token table [V, D].
    pub embedding: Embedding,
    /// The blocks.
    pub tcn: Tcn,
    /// D → E.
    pub projection: Linear,
    length: usize,
    width: usize,
    tanh: bool,
}

impl Encoder {
    /// Declares the parameters.
    ///
    /// # Errors
    /// [`Error::Config`] for sizes of zero, no blocks, dilations that look too far back, a padding outside the vocabulary or a rate of dropout
    /// outside [0, 1);
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
        let tcn = TcnOptions {
            width: options.width,
            hidden: options.hidden,
            kernel: options.kernel,
            dilations: options.dilations.clone(),
            gelu: options.gelu,
            eps: 1e-5,
            dropout: options.dropout,
        };
        Ok(Self {
            embedding: Embedding::new(
                graph,
                "embedding",
                options.vocabulary,
                options.width,
                options.padding,
                Init::Uniform(options.table_bound),
            )?,
            tcn: Tcn::new(graph, "blocks", &tcn)?,
            projection: Linear::new(graph, "projection", options.width, options.embedding, true)?,
            length: options.length,
            width: options.width,
            tanh: options.tanh,
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
        let shape = &graph.value(ids)?.shape;
        if !shape.cols().is_multiple_of(self.length) {
            let reason = format!("ids must be whole texts of {} tokens", self.length);
            return Err(Error::shape("encoder", &[shape], reason));
        }
        let batch = shape.cols() / self.length;
        let x = self.embedding.forward(graph, ids, dtype)?;
        let x = graph.reshape(x, &[batch, self.length, self.width])?;
        self.forward_embedded(graph, x, mask, mode)
    }

    /// As [`Encoder::forward_in`], from embedded tokens x [B, L, D], which are mixtures of rows of the token table, for instance.
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
        // Or a masked token before a counted one would reach it through the first convolution.
        let x = graph.mul_rows(x, mask)?;
        let x = self.tcn.forward_in(graph, x, Some(mask), mode)?;
        let pooled = graph.masked_mean(x, mask)?;
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
