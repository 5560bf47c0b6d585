//! Layers. Each declares its parameters in a graph once and adds its nodes wherever it is applied.
//!
//! Arguments come in one order: the graph, the name, the widths of input and output, then options; further options are builder
//! methods. Parameters are called like the layer, with `.weight` or `.bias` at the end. Their shapes and initial values are those of
//! PyTorch, so that weights interchange. Graphs of one session that declare the same names share the parameters.
//!
//! A layer computes in the element type of its input: f32 weights are cast where the input is f16, biases stay f32.
//! Nodes of a layer and errors carry its name, see [`Graph::scoped`].

mod attention;
mod conv;
mod dropout;
mod embedding;
mod linear;
mod mode;
mod norm;
mod pooling;
mod tcn;
mod transformer;

pub use attention::MultiHeadAttention;
pub use conv::{Conv1d, ConvMethod};
pub use dropout::{Draws, Dropout};
pub use embedding::Embedding;
pub use linear::Linear;
pub use mode::Mode;
pub use norm::LayerNorm;
pub use pooling::{AttentionPooling, first_step, normalize};
pub use tcn::{Tcn, TcnBlock, TcnOptions};
pub use transformer::{
    Activation, NormOrder, TransformerEncoder, TransformerEncoderLayer, TransformerEncoderOptions,
};

use crate::error::Result;
use crate::graph::{Graph, Init, ValueId};
use crate::types::UnaryOp;

/// The form of GELU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gelu {
    /// [`UnaryOp::GeluTanh`], the cheaper one.
    #[default]
    Tanh,
    /// [`UnaryOp::GeluErf`], the exact one.
    Erf,
}

impl Gelu {
    /// GELU of every element.
    ///
    /// # Errors
    /// As [`Graph::apply`].
    pub fn forward(self, graph: &mut Graph, x: ValueId) -> Result<ValueId> {
        let op = match self {
            Self::Tanh => UnaryOp::GeluTanh,
            Self::Erf => UnaryOp::GeluErf,
        };
        graph.unary(op, x)
    }
}

/// Uniform in ±1/√n for n inputs per output. Extents of zero and infinite ones are refused with the shape.
fn uniform(inputs: usize) -> Init {
    Init::Uniform(1.0 / (inputs.max(1) as f32).sqrt())
}

/// `weight` in the element type of `x`.
fn weight_like(graph: &mut Graph, weight: ValueId, x: ValueId) -> Result<ValueId> {
    let dtype = graph.value(x)?.dtype;
    graph.cast(weight, dtype)
}
