//! 1-D convolution.

use super::weight_like;
use crate::error::{Error, Result};
use crate::graph::{Graph, Init, ValueId};
use crate::types::{Padding, Trans, Window};

/// How windows meet the weight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConvMethod {
    /// They are gathered while the product loads its tiles, [`Op::Conv`](crate::graph::Op::Conv).
    #[default]
    Implicit,
    /// As a matrix in memory, [`Op::Im2col`](crate::graph::Op::Im2col): k times the memory of the operand, and a check of the other.
    Columns,
}

/// `y[t] = bias + Σ_j weight[.., .., j]·x[t − (kernel − 1 − j)·dilation]`, zeros before the start, or what
/// [`stride`](Self::stride) and [`padding`](Self::padding) make of it ([`Window`]).
///
/// The weight is [outputs, inputs, kernel] for the host, as in PyTorch, the last tap being the current step of a causal convolution.
/// Equivalent to PyTorch's `Conv1d`, if causal after padding (kernel − 1)·dilation steps on the left.
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
    /// Time steps between windows, 1 at first.
    pub stride: usize,
    /// Zeros around a sample, at first before its start only.
    pub padding: Padding,
    /// How it is computed.
    pub method: ConvMethod,
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
            stride: 1,
            padding: Padding::Causal,
            method: ConvMethod::Implicit,
        })
    }

    /// With so many time steps between windows.
    #[must_use]
    pub fn stride(self, stride: usize) -> Self {
        Self { stride, ..self }
    }

    /// With these zeros around a sample.
    #[must_use]
    pub fn padding(self, padding: Padding) -> Self {
        Self { padding, ..self }
    }

    /// Computed like this.
    #[must_use]
    pub fn method(self, method: ConvMethod) -> Self {
        Self { method, ..self }
    }

    /// x [B, L, inputs] → [B, L', outputs], L' being [`Window::steps`]. A single tap needs no windows: it is a matrix product.
    ///
    /// # Errors
    /// [`Error::Shape`] when x is no [B, L, inputs], [`Error::Config`] when no window fits.
    pub fn forward(&self, graph: &mut Graph, x: ValueId) -> Result<ValueId> {
        let shape = &graph.value(x)?.shape;
        let [batch, time, _] = *shape.dims() else {
            return Err(Error::shape("conv1d", &[shape], "x must be [B, L, C]"));
        };
        let window = Window::new(time, self.kernel, self.dilation, self.stride, self.padding)?;
        let weight = weight_like(graph, self.weight, x)?;
        let mut y = match (self.kernel, self.stride, self.method) {
            (1, 1, _) => graph.matmul(x, weight, Trans::NT)?,
            (_, _, ConvMethod::Implicit) => graph.conv1d(x, weight, window)?,
            (_, _, ConvMethod::Columns) => {
                let columns = graph.windows(x, window)?;
                graph.matmul(columns, weight, Trans::NT)?
            }
        };
        if let Some(bias) = self.bias {
            y = graph.add_bias(y, bias)?;
        }
        let outputs = graph.value(y)?.shape.cols();
        graph.reshape(y, &[batch, window.steps, outputs])
    }
}
