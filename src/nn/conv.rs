//! Causal, dilated 1-D convolution.

use super::weight_like;
use crate::error::{Error, Result};
use crate::graph::{Graph, Init, Trans, ValueId};

/// `y[t] = bias + Σ_j weight[.., .., j]·x[t − (kernel − 1 − j)·dilation]`, zeros before the start.
///
/// The weight is [outputs, inputs, kernel] for the host, as in PyTorch, the last tap being the current step.
/// Equivalent to PyTorch's `Conv1d` after padding (kernel − 1)·dilation steps on the left.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Conv1d {
    /// [outputs, kernel·inputs] in the graph.
    pub weight: ValueId,
    /// `[outputs]`
    pub bias: Option<ValueId>,
    /// Taps.
    pub kernel: usize,
    /// Time steps between taps.
    pub dilation: usize,
    outputs: usize,
}

impl Conv1d {
    /// Declares the parameters, both uniform in ±1/√(inputs·kernel).
    ///
    /// # Errors
    /// [`Error::Graph`] for a taken name or an extent of zero.
    pub fn new(
        graph: &mut Graph,
        name: &str,
        [inputs, outputs]: [usize; 2],
        kernel: usize,
        dilation: usize,
        bias: bool,
    ) -> Result<Self> {
        let init = Init::Uniform(1.0 / ((inputs * kernel) as f32).sqrt());
        let shape = [outputs, inputs, kernel];
        let weight = graph.conv_parameter(&format!("{name}.weight"), shape, init)?;
        let bias = bias
            .then(|| graph.parameter(&format!("{name}.bias"), &[outputs], init))
            .transpose()?;
        Ok(Self {
            weight,
            bias,
            kernel,
            dilation,
            outputs,
        })
    }

    /// x [B, L, inputs] → [B, L, outputs]. A single tap needs no windows: it is a matrix product.
    ///
    /// # Errors
    /// [`Error::Shape`] when x is no [B, L, inputs].
    pub fn forward(&self, graph: &mut Graph, x: ValueId) -> Result<ValueId> {
        let shape = &graph.value(x)?.shape;
        let [batch, time, _] = *shape.dims() else {
            return Err(Error::shape("conv1d", &[shape], "x must be [B, L, C]"));
        };
        let weight = weight_like(graph, self.weight, x)?;
        let windows = match self.kernel {
            1 => x,
            _ => graph.im2col(x, self.kernel, self.dilation)?,
        };
        let mut y = graph.matmul(windows, weight, Trans::NT)?;
        if let Some(bias) = self.bias {
            y = graph.add_bias(y, bias)?;
        }
        graph.reshape(y, &[batch, time, self.outputs])
    }
}
