//! Temporal convolutional network: pre-norm residual blocks of a dilated convolution and a pointwise one.

use super::{Conv1d, Dropout, Gelu, LayerNorm, Mode};
use crate::error::{Error, Result};
use crate::graph::{Graph, ValueId};
use crate::types::{Padding, UnaryOp};

/// Sizes of a [`Tcn`].
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct TcnOptions {
    /// Columns of input and output, D.
    pub width: usize,
    /// Columns between the two convolutions, H.
    pub hidden: usize,
    /// Taps of the first convolution.
    pub kernel: usize,
    /// Its dilation, one per block.
    pub dilations: Vec<usize>,
    /// Form of GELU.
    pub gelu: Gelu,
    /// LayerNorm's eps.
    pub eps: f32,
    /// Share of the elements that is dropped in training, in [0, 1).
    pub dropout: f32,
    /// Whether a time step sees as many steps after it as before it, instead of earlier ones only.
    pub centred: bool,
    /// Whether a block multiplies the result of its first convolution with the sigmoid of a second one, instead of taking GELU of it.
    pub gated: bool,
}

impl TcnOptions {
    /// Causal blocks of these widths, one per dilation, with 3 taps, GELU in tanh form, an eps of 1e-5 and no dropout.
    #[must_use]
    pub fn new(width: usize, hidden: usize, dilations: &[usize]) -> Self {
        Self {
            width,
            hidden,
            kernel: 3,
            dilations: dilations.to_vec(),
            gelu: Gelu::Tanh,
            eps: 1e-5,
            dropout: 0.0,
            centred: false,
            gated: false,
        }
    }

    /// With this number of taps.
    #[must_use]
    pub fn kernel(self, kernel: usize) -> Self {
        Self { kernel, ..self }
    }

    /// With this form of GELU.
    #[must_use]
    pub fn gelu(self, gelu: Gelu) -> Self {
        Self { gelu, ..self }
    }

    /// With this eps in LayerNorm.
    #[must_use]
    pub fn eps(self, eps: f32) -> Self {
        Self { eps, ..self }
    }

    /// With this share of dropped elements in training.
    #[must_use]
    pub fn dropout(self, dropout: f32) -> Self {
        Self { dropout, ..self }
    }

    /// With convolutions that see both sides of a time step, or with causal ones.
    #[must_use]
    pub fn centred(self, centred: bool) -> Self {
        Self { centred, ..self }
    }

    /// With gates, or with GELU.
    #[must_use]
    pub fn gated(self, gated: bool) -> Self {
        Self { gated, ..self }
    }
}

/// y = mask ⊙ (x + Conv2₁ₓ₁(f(LayerNorm(x)))), where f(x) is GELU(Conv1(x)), or in a gated block Conv1(x) ⊙ sigmoid(Gate(x)), as in
/// Dauphin et al., arXiv:1612.08083. In training there is dropout after f and after Conv2, as in
/// Bai, Kolter & Koltun, arXiv:1803.01271.
///
/// A centred block masks the result of LayerNorm as well, because LayerNorm of a step that does not count is not zero. So the result does
/// not depend on the number of steps that do not count. Of (kernel − 1)·dilation steps of padding, half lie before the sample, and one more
/// after it if their number is odd.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct TcnBlock {
    /// Normalises the input.
    pub norm: LayerNorm,
    /// Dilated, D → H.
    pub conv1: Conv1d,
    /// Of a gated block: like `conv1`.
    pub gate: Option<Conv1d>,
    /// Pointwise, H → D.
    pub conv2: Conv1d,
    gelu: Gelu,
    dropout: Dropout,
}

impl TcnBlock {
    /// Declares the parameters `NAME.norm`, `NAME.conv1`, `NAME.conv2`, and `NAME.gate` of a gated block.
    ///
    /// # Errors
    /// [`Error::Graph`] for a taken name, [`Error::Shape`] for an extent of zero, [`Error::Config`] for a rate of dropout outside of [0, 1).
    pub fn new(
        graph: &mut Graph,
        name: &str,
        options: &TcnOptions,
        dilation: usize,
    ) -> Result<Self> {
        let (width, hidden) = (options.width, options.hidden);
        let padding = match options.centred {
            true => Padding::Same,
            false => Padding::Causal,
        };
        let dilated = |graph: &mut Graph, part: &str| -> Result<Conv1d> {
            let name = format!("{name}.{part}");
            let conv = Conv1d::new(graph, &name, width, hidden, options.kernel, true)?;
            Ok(conv.dilation(dilation).padding(padding))
        };
        Ok(Self {
            norm: LayerNorm::new(graph, &format!("{name}.norm"), width, options.eps)?,
            conv1: dilated(graph, "conv1")?,
            gate: match options.gated {
                true => Some(dilated(graph, "gate")?),
                false => None,
            },
            conv2: Conv1d::new(graph, &format!("{name}.conv2"), hidden, width, 1, true)?,
            gelu: options.gelu,
            dropout: Dropout::new(options.dropout)?,
        })
    }

    /// x [B, L, D], mask [B·L] → like x.
    ///
    /// # Errors
    /// [`Error::Shape`] when the operands do not fit.
    pub fn forward(&self, graph: &mut Graph, x: ValueId, mask: Option<ValueId>) -> Result<ValueId> {
        self.forward_in(graph, x, mask, Mode::Eval)
    }

    /// As [`TcnBlock::forward`], in evaluation or training.
    ///
    /// # Errors
    /// As [`TcnBlock::forward`].
    pub fn forward_in(
        &self,
        graph: &mut Graph,
        x: ValueId,
        mask: Option<ValueId>,
        mode: Mode,
    ) -> Result<ValueId> {
        let name = graph.value(self.norm.weight)?.name.clone();
        let name = name.strip_suffix(".norm.weight").unwrap_or(&name);
        graph.scoped(name, |graph| {
            let mut x_norm = self.norm.forward(graph, x)?;
            if let (Some(mask), Padding::Same) = (mask, self.conv1.padding) {
                x_norm = graph.mul_rows(x_norm, mask)?;
            }
            let h = self.conv1.forward(graph, x_norm)?;
            let h = match self.gate {
                Some(gate) => {
                    let gate = gate.forward(graph, x_norm)?;
                    let gate = graph.unary(UnaryOp::Sigmoid, gate)?;
                    graph.mul(h, gate)?
                }
                None => self.gelu.forward(graph, h)?,
            };
            let h = self.dropout.forward(graph, h, mode)?;
            let h = self.conv2.forward(graph, h)?;
            let h = self.dropout.forward(graph, h, mode)?;
            let y = graph.add(h, x)?;
            match mask {
                Some(mask) => graph.mul_rows(y, mask),
                None => Ok(y),
            }
        })
    }
}

/// A sequence of blocks.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Tcn {
    /// In order.
    pub blocks: Vec<TcnBlock>,
}

impl Tcn {
    /// Declares blocks `NAME.0`, `NAME.1`, …
    ///
    /// # Errors
    /// [`Error::Config`] without dilations or for a rate of dropout outside of [0, 1); [`Error::Graph`] for a taken name;
    /// [`Error::Shape`] for an extent of zero.
    pub fn new(graph: &mut Graph, name: &str, options: &TcnOptions) -> Result<Self> {
        if options.dilations.is_empty() || options.dilations.contains(&0) {
            return Err(Error::Config {
                field: "dilations",
                reason: "must be positive numbers, one per block".into(),
            });
        }
        let dilations = options.dilations.iter().enumerate();
        let blocks = dilations
            .map(|(i, &dilation)| TcnBlock::new(graph, &format!("{name}.{i}"), options, dilation))
            .collect::<Result<_>>()?;
        Ok(Self { blocks })
    }

    /// x [B, L, D], mask [B·L] → like x.
    ///
    /// # Errors
    /// [`Error::Shape`] when the operands do not fit.
    pub fn forward(&self, graph: &mut Graph, x: ValueId, mask: Option<ValueId>) -> Result<ValueId> {
        self.forward_in(graph, x, mask, Mode::Eval)
    }

    /// As [`Tcn::forward`], in evaluation or training. With recomputation, every block except the last is a segment. The last one is
    /// differentiated first, when its values are still there.
    ///
    /// # Errors
    /// As [`Tcn::forward`].
    pub fn forward_in(
        &self,
        graph: &mut Graph,
        mut x: ValueId,
        mask: Option<ValueId>,
        mode: Mode,
    ) -> Result<ValueId> {
        for (i, block) in self.blocks.iter().enumerate() {
            x = match mode.recomputes() && i + 1 < self.blocks.len() {
                true => graph.recompute(|graph| block.forward_in(graph, x, mask, mode))?,
                false => block.forward_in(graph, x, mask, mode)?,
            };
        }
        Ok(x)
    }
}
