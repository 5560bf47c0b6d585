//! 1-D convolution.

use super::{uniform, weight_like};
use crate::error::{Error, Result};
use crate::graph::{Graph, ValueId};
use crate::types::{Padding, Trans, Window};

/// How a convolution is computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConvMethod {
    /// The product gathers windows while it loads its tiles, [`Op::Conv`](crate::graph::Op::Conv).
    #[default]
    Implicit,
    /// Windows are stored as a matrix, [`Op::Im2col`](crate::graph::Op::Im2col), which takes k times the memory of the operand. Tests compare
    /// the other method with it.
    Columns,
}

/// `y[t] = bias + Σ_j weight[.., .., j]·x[t − (kernel − 1 − j)·dilation]`, with zeros before the start of a sample.
///
/// [`stride`](Self::stride) and [`padding`](Self::padding) change which steps are read, see [`Window`]. The host sees the weight as
/// [outputs, inputs, kernel], as in PyTorch. The last tap is the current step of a causal convolution. A causal convolution
/// is PyTorch's `Conv1d` after padding with (kernel − 1)·dilation steps on the left.
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
    /// Time steps between windows, 1 unless set.
    pub stride: usize,
    /// Zeros around a sample, before its start only unless set.
    pub padding: Padding,
    /// How it is computed.
    pub method: ConvMethod,
}

impl Conv1d {
    /// Declares `NAME.weight` and, with `bias`, `NAME.bias`. Both are uniform in ±1/√(inputs·kernel). The convolution is causal, with
    /// dilation and stride 1.
    ///
    /// # Errors
    /// [`Error::Graph`] for a taken name, [`Error::Shape`] for an extent of zero.
    pub fn new(
        graph: &mut Graph,
        name: &str,
        inputs: usize,
        outputs: usize,
        kernel: usize,
        bias: bool,
    ) -> Result<Self> {
        let init = uniform(inputs.saturating_mul(kernel));
        graph.declaring("Conv1d", name, |graph| {
            let shape = [outputs, inputs, kernel];
            let weight = graph.conv_parameter(&format!("{name}.weight"), shape, init)?;
            let bias = bias
                .then(|| graph.parameter(&format!("{name}.bias"), &[outputs], init))
                .transpose()?;
            Ok(Self {
                weight,
                bias,
                kernel,
                dilation: 1,
                stride: 1,
                padding: Padding::Causal,
                method: ConvMethod::Implicit,
            })
        })
    }

    /// With this distance between taps, in time steps.
    #[must_use]
    pub fn dilation(self, dilation: usize) -> Self {
        Self { dilation, ..self }
    }

    /// With this distance between windows, in time steps.
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

    /// x [B, L, inputs] → [B, L', outputs], L' being [`Window::steps`]. A convolution of one tap and stride 1 is computed as a matrix
    /// product.
    ///
    /// # Errors
    /// [`Error::Shape`] when x is no [B, L, inputs], [`Error::Config`] when no window fits.
    pub fn forward(&self, graph: &mut Graph, x: ValueId) -> Result<ValueId> {
        graph.scoped_like(self.weight, |graph| self.apply(graph, x))
    }

    fn apply(&self, graph: &mut Graph, x: ValueId) -> Result<ValueId> {
        let shape = &graph.value(x)?.shape;
        let [batch, time, channels] = *shape.dims() else {
            return Err(Error::shape("conv1d", &[shape], "x must be [B, L, C]"));
        };
        let weight = &graph.value(self.weight)?.shape;
        // As a check of its own, because the product of taps and channels says less.
        if channels.checked_mul(self.kernel) != Some(weight.cols()) {
            let inputs = weight.cols() / self.kernel.max(1);
            let reason = format!("{shape}: x has {channels} channels, the layer takes {inputs}");
            return Err(Error::shape("conv1d", &[shape], reason));
        }
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
