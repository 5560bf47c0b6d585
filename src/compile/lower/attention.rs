//! Attention: one kernel forward, one for the gradient of the queries and one for that of keys and values.

use super::Lowering;
use crate::compile::Place;
use crate::error::{Error, Result};
use crate::graph::{AttentionOptions, Node, Op};
use crate::kernels::attention::{AttentionKernel, Operands};
use crate::kernels::{Kernel, Program};
use crate::types::DType;

impl Lowering<'_> {
    /// The kernel's description, its operands, and the number of operands before those that only a gradient has.
    fn attends(&self, node: &Node) -> Result<(AttentionKernel, Operands, usize)> {
        let (options, packed, others) = match &node.op {
            Op::Attention(options) => (options, true, 1),
            Op::AttentionGrad(options) => (options, true, 4),
            Op::CrossAttention(options) => (options, false, 2),
            Op::CrossAttentionGrad(options) => (options, false, 5),
            op => return Err(Error::Graph(format!("{} is no attention", op.name()))),
        };
        let x = &node.inputs;
        let own = if packed { 1 } else { 2 };
        let (q, kv) = (self.graph().shape(x[0]), self.graph().shape(x[own - 1]));
        let (batch, width) = (q.dims()[0], if packed { q.cols() / 3 } else { q.cols() });
        let &AttentionOptions { heads, causal, .. } = options;
        let columns = width / heads;
        let kernel = AttentionKernel {
            batch,
            heads,
            queries: q.rows() / batch,
            keys: kv.rows() / batch,
            columns,
            causal,
            scale: options.factor(columns),
            packed,
        };
        let mask = x.get(others).map(|&mask| self.layout(mask)).transpose()?;
        let kv = match packed {
            true => None,
            false => Some(self.layout(x[1])?),
        };
        let q = self.layout(x[0])?;
        Ok((kernel, Operands { q, kv, mask }, own))
    }

    pub(crate) fn attention(&self, node: &Node, program: Program) -> Result<Kernel> {
        let (kernel, operands, _) = self.attends(node)?;
        let stats = self.layout(node.outputs[1])?;
        Ok(kernel.forward(operands, stats, program, self.target))
    }

    pub(crate) fn attention_grad(&mut self, node: &Node) -> Result<()> {
        let (kernel, operands, own) = self.attends(node)?;
        let places = self.places(&node.inputs)?;
        let [y, stats, dy] = self.layouts(&node.inputs[own..own + 3])?;
        let [y_place, stats_place, dy_place] = [0, 1, 2].map(|i| places[own + i]);
        let common = [&places[..own], &places[own + 3..]].concat();
        let dots = Self::vector(kernel.total(), DType::F32)?;
        let dots_place = self.scratch(dots);
        let results = &node.outputs;
        // Packed, both write their columns of the only result.
        let (dq, dkv) = (results[0], results[results.len() - 1]);
        let step = kernel.query_gradient(
            operands,
            [y, dy, stats],
            [self.layout(dq)?, dots],
            self.target,
        );
        let own = [y_place, dy_place, stats_place, Place::Value(dq), dots_place];
        self.step(step, [&common[..], &own].concat())?;
        let step = kernel.key_gradient(operands, [dy, stats, dots], self.layout(dkv)?, self.target);
        let own = [dy_place, stats_place, dots_place, Place::Value(dkv)];
        self.step(step, [&common[..], &own].concat())
    }
}
