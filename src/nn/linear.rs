//! The linear layer.

use super::{uniform, weight_like};
use crate::error::Result;
use crate::graph::{Graph, ValueId};
use crate::types::{DType, Trans};

/// y = x·weightᵀ + bias, weight [outputs, inputs].
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Linear {
    /// [outputs, inputs]
    pub weight: ValueId,
    /// `[outputs]`
    pub bias: Option<ValueId>,
}

impl Linear {
    /// Declares `NAME.weight` and, with `bias`, `NAME.bias`. Both are uniform in ±1/√inputs.
    ///
    /// # Errors
    /// [`Error::Graph`](crate::Error::Graph) for a taken name, [`Error::Shape`](crate::Error::Shape) for an extent of zero.
    pub fn new(
        graph: &mut Graph,
        name: &str,
        inputs: usize,
        outputs: usize,
        bias: bool,
    ) -> Result<Self> {
        let init = uniform(inputs);
        graph.declaring("Linear", name, |graph| {
            let weight = graph.parameter(&format!("{name}.weight"), &[outputs, inputs], init)?;
            let bias = bias
                .then(|| graph.parameter(&format!("{name}.bias"), &[outputs], init))
                .transpose()?;
            Ok(Self { weight, bias })
        })
    }

    /// With a weight [outputs, inputs] that exists already, such as a token table. Declares `NAME.bias`, uniform in ±1/√inputs.
    ///
    /// # Errors
    /// As [`Linear::new`].
    pub fn tied(graph: &mut Graph, name: &str, weight: ValueId) -> Result<Self> {
        let shape = &graph.value(weight)?.shape;
        let (outputs, inputs) = (shape.rows(), shape.cols());
        graph.declaring("Linear", name, |graph| {
            let bias = graph.parameter(&format!("{name}.bias"), &[outputs], uniform(inputs))?;
            let bias = Some(bias);
            Ok(Self { weight, bias })
        })
    }

    /// x [.., inputs] → [rows, outputs] in the element type of x. [`Graph::reshape`] gives the result the leading extents of x again.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) when x has another number of columns.
    pub fn forward(&self, graph: &mut Graph, x: ValueId) -> Result<ValueId> {
        let out = graph.value(x)?.dtype;
        self.forward_as(graph, x, out)
    }

    /// As [`Linear::forward`], stored as `out`.
    ///
    /// # Errors
    /// As [`Linear::forward`].
    pub fn forward_as(&self, graph: &mut Graph, x: ValueId, out: DType) -> Result<ValueId> {
        graph.scoped_like(self.weight, |graph| {
            let weight = weight_like(graph, self.weight, x)?;
            let y = graph.matmul_as(x, weight, Trans::NT, out)?;
            match self.bias {
                Some(bias) => graph.add_bias(y, bias),
                None => Ok(y),
            }
        })
    }
}
