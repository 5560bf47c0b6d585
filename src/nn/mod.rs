//! Layers: each declares its parameters in a graph once and adds its nodes wherever it is applied.
//!
//! Names of parameters are the layer's name and `.weight` or `.bias`, shapes and starting values those of PyTorch, so that
//! weights interchange. A layer computes in the element type of its input: f32 parameters are cast where that is f16.

mod conv;
mod dropout;
mod embedding;
mod linear;
mod norm;
mod tcn;

pub use conv::{Conv1d, ConvMethod};
pub use dropout::{Draws, Dropout, Training};
pub use embedding::Embedding;
pub use linear::Linear;
pub use norm::LayerNorm;
pub use tcn::{Tcn, TcnBlock, TcnOptions};

use crate::error::Result;
use crate::graph::{Graph, ValueId};
use crate::types::UnaryOp;

/// Which form of GELU.
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

/// `weight` in the element type of `x`.
fn weight_like(graph: &mut Graph, weight: ValueId, x: ValueId) -> Result<ValueId> {
    let dtype = graph.value(x)?.dtype;
    graph.cast(weight, dtype)
}
