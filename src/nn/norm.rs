//! Layer normalisation.

use crate::error::Result;
use crate::graph::{Graph, Init, ValueId};

/// LayerNorm over the last extent with a learned scale and shift.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct LayerNorm {
    /// gamma `[C]`, initially 1.
    pub weight: ValueId,
    /// beta `[C]`, initially 0.
    pub bias: ValueId,
    /// Added to the variance.
    pub eps: f32,
}

impl LayerNorm {
    /// Declares the parameters for rows of `width`.
    ///
    /// # Errors
    /// [`Error::Graph`](crate::Error::Graph) for a taken name, [`Error::Shape`](crate::Error::Shape) for a width of zero.
    pub fn new(graph: &mut Graph, name: &str, width: usize, eps: f32) -> Result<Self> {
        graph.declaring("LayerNorm", name, |graph| {
            let (one, zero) = (Init::Constant(1.0), Init::Constant(0.0));
            Ok(Self {
                weight: graph.parameter(&format!("{name}.weight"), &[width], one)?,
                bias: graph.parameter(&format!("{name}.bias"), &[width], zero)?,
                eps,
            })
        })
    }

    /// x [.., C] → like x.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) when x has another width.
    pub fn forward(&self, graph: &mut Graph, x: ValueId) -> Result<ValueId> {
        graph.scoped_like(self.weight, |graph| {
            graph.layer_norm(x, self.weight, self.bias, self.eps)
        })
    }
}
