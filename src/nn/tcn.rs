//! Temporal convolutional network: pre-norm residual blocks of a dilated convolution and a pointwise one.

use super::{Conv1d, Dropout, Gelu, LayerNorm, Training};
use crate::error::{Error, Result};
use crate::graph::{Graph, ValueId};

/// Sizes of a [`Tcn`].
#[derive(Clone, Debug, PartialEq)]
pub struct TcnOptions {
    /// Columns of input and output, D.
    pub width: usize,
    /// Columns between the two convolutions, H.
    pub hidden: usize,
    /// Taps of the first convolution.
    pub kernel: usize,
    /// Its dilation, a block each.
    pub dilations: Vec<usize>,
    /// Form of GELU.
    pub gelu: Gelu,
    /// LayerNorm's eps.
    pub eps: f32,
    /// Share of the elements that is dropped in training, in [0, 1).
    pub dropout: f32,
}

/// y = mask ⊙ (x + Conv2₁ₓ₁(GELU(Conv1(LayerNorm(x))))), in training with dropout behind GELU and behind Conv2, as in
/// Bai, Kolter & Koltun, arXiv:1803.01271.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct TcnBlock {
    /// On the way in.
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
    /// [`Error::Graph`] for a taken name or an extent of zero, [`Error::Config`] for a rate of dropout outside [0, 1).
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
            conv1: Conv1d::new(
                graph,
                &conv1,
                [width, hidden],
                options.kernel,
                dilation,
                true,
            )?,
            conv2: Conv1d::new(graph, &conv2, [hidden, width], 1, 1, true)?,
            gelu: options.gelu,
            dropout: Dropout::new(options.dropout)?,
        })
    }

    /// x [B, L, D], mask [B·L] → like x.
    ///
    /// # Errors
    /// [`Error::Shape`] when the operands do not fit.
    pub fn forward(&self, graph: &mut Graph, x: ValueId, mask: Option<ValueId>) -> Result<ValueId> {
        self.forward_in(graph, x, mask, &Training::default())
    }

    /// As [`TcnBlock::forward`], in training.
    ///
    /// # Errors
    /// As [`TcnBlock::forward`].
    pub fn forward_in(
        &self,
        graph: &mut Graph,
        x: ValueId,
        mask: Option<ValueId>,
        training: &Training,
    ) -> Result<ValueId> {
        let h = self.norm.forward(graph, x)?;
        let h = self.conv1.forward(graph, h)?;
        let h = self.gelu.forward(graph, h)?;
        let h = self.dropout.forward(graph, h, training)?;
        let h = self.conv2.forward(graph, h)?;
        let h = self.dropout.forward(graph, h, training)?;
        let y = graph.add(h, x)?;
        match mask {
            Some(mask) => graph.mul_rows(y, mask),
            None => Ok(y),
        }
    }
}

/// Blocks one after the other.
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
    /// [`Error::Config`] without dilations or for a rate of dropout outside [0, 1); [`Error::Graph`] for a taken name or an extent of zero.
    pub fn new(graph: &mut Graph, name: &str, options: &TcnOptions) -> Result<Self> {
        if options.dilations.is_empty() || options.dilations.contains(&0) {
            return Err(Error::Config {
                field: "dilations",
                reason: "must be positive numbers, one a block".into(),
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
        self.forward_in(graph, x, mask, &Training::default())
    }

    /// As [`Tcn::forward`], in training. With recomputation, every block but the last is a segment; the last is differentiated first, when
    /// there is nothing yet that its values would have to make room for.
    ///
    /// # Errors
    /// As [`Tcn::forward`].
    pub fn forward_in(
        &self,
        graph: &mut Graph,
        mut x: ValueId,
        mask: Option<ValueId>,
        training: &Training,
    ) -> Result<ValueId> {
        for (i, block) in self.blocks.iter().enumerate() {
            x = match training.recompute && i + 1 < self.blocks.len() {
                true => graph.recompute(|graph| block.forward_in(graph, x, mask, training))?,
                false => block.forward_in(graph, x, mask, training)?,
            };
        }
        Ok(x)
    }
}
