//! Temporal convolutional network: pre-norm residual blocks of a dilated convolution and a pointwise one.

use super::{Conv1d, Dropout, Gelu, LayerNorm, Mode};
use crate::error::{Error, Result};
use crate::graph::{Graph, ValueId};

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
}

impl TcnOptions {
    /// Blocks of these widths, one per dilation, with 3 taps, GELU in tanh form, an eps of 1e-5 and no dropout.
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
}

/// y = mask ⊙ (x + Conv2₁ₓ₁(GELU(Conv1(LayerNorm(x))))). In training there is dropout after GELU and after Conv2, as in
/// Bai, Kolter & Koltun, arXiv:1803.01271.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct TcnBlock {
    /// Normalises the input.
    pub norm: LayerNorm,
    /// Causal and dilated, D → H.
    pub conv1: Conv1d,
    /// Pointwise, H → D.
    pub conv2: Conv1d,
    gelu: Gelu,
    dropout: Dropout,
}

impl TcnBlock {
    /// Declares the parameters `NAME.norm`, `NAME.conv1`, `NAME.conv2`.
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
        let conv1 = format!("{name}.conv1");
        let conv2 = format!("{name}.conv2");
        Ok(Self {
            norm: LayerNorm::new(graph, &format!("{name}.norm"), width, options.eps)?,
            conv1: Conv1d::new(graph, &conv1, width, hidden, options.kernel, true)?
                .dilation(dilation),
            conv2: Conv1d::new(graph, &conv2, hidden, width, 1, true)?,
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
            let h = self.norm.forward(graph, x)?;
            let h = self.conv1.forward(graph, h)?;
            let h = self.gelu.forward(graph, h)?;
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
