//! Multi-head self-attention.

use super::Linear;
use crate::error::{Error, Result};
use crate::graph::{AttentionOptions, Graph, ValueId};

/// Self-attention with several heads: y = out_proj(softmax(q·kᵀ/√d + mask)·v), where one product makes q, k and v. Vaswani et al.,
/// arXiv:1706.03762.
///
/// The probabilities are never in memory as a whole, so there is no dropout of them.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct MultiHeadAttention {
    /// W → 3·W: the columns of the result are q, then k, then v, each with the heads side by side. PyTorch's `in_proj_weight`.
    pub in_proj: Linear,
    /// W → W.
    pub out_proj: Linear,
    /// Number of heads; each has W/heads columns.
    pub heads: usize,
    /// Whether a position sees only itself and the positions before it.
    pub causal: bool,
}

impl MultiHeadAttention {
    /// Declares `NAME.in_proj.weight` [3·W, W], `NAME.in_proj.bias`, `NAME.out_proj.weight` [W, W] and `NAME.out_proj.bias`, all uniform in
    /// ±1/√W. It is not causal.
    ///
    /// # Errors
    /// [`Error::Config`] if the heads do not divide the width; [`Error::Graph`] for a taken name, [`Error::Shape`] for a width of zero.
    pub fn new(graph: &mut Graph, name: &str, width: usize, heads: usize) -> Result<Self> {
        check_heads(width, heads)?;
        graph.declaring("MultiHeadAttention", name, |graph| {
            let outputs = width.saturating_mul(3);
            let [in_proj, out_proj] = ["in_proj", "out_proj"].map(|part| format!("{name}.{part}"));
            Ok(Self {
                in_proj: Linear::new(graph, &in_proj, width, outputs, true)?,
                out_proj: Linear::new(graph, &out_proj, width, width, true)?,
                heads,
                causal: false,
            })
        })
    }

    /// Causal or not.
    #[must_use]
    pub fn causal(self, causal: bool) -> Self {
        Self { causal, ..self }
    }

    /// x [B, L, W], mask [B·L] → like x. Positions with mask 0 are never attended to; without a mask all are.
    ///
    /// # Errors
    /// [`Error::Shape`] when the operands do not fit.
    pub fn forward(&self, graph: &mut Graph, x: ValueId, mask: Option<ValueId>) -> Result<ValueId> {
        let shape = graph.value(x)?.shape.clone();
        let [batch, time, width] = *shape.dims() else {
            let reason = "x must be [B, L, W]";
            return Err(Error::shape("multi_head_attention", &[&shape], reason));
        };
        let packed = self.in_proj.forward(graph, x)?;
        let packed = graph.reshape(packed, &[batch, time, 3 * width])?;
        let options = AttentionOptions::new(self.heads).causal(self.causal);
        let mixed = graph.scoped_like(self.in_proj.weight, |graph| {
            graph.attention(packed, mask, options)
        })?;
        let y = self.out_proj.forward(graph, mixed)?;
        graph.reshape(y, &[batch, time, width])
    }
}

/// The heads share the columns equally.
pub(super) fn check_heads(width: usize, heads: usize) -> Result<()> {
    if heads > 0 && width.is_multiple_of(heads) {
        return Ok(());
    }
    Err(Error::Config {
        field: "heads",
        reason: format!("is {heads}, which must be positive and divide the width of {width}"),
    })
}
