//! Reverse-mode differentiation, source to source: gradients are more nodes of the same graph.

use std::ops::Range;

use super::{Graph, Node, Op, Source, ValueId};
use crate::error::{Error, Result};
use crate::types::{BinaryOp, Broadcast, DType, Trans, UnaryOp, Window};

impl Graph {
    /// Adds the nodes that compute ∂loss/∂v for every `v` of `wrt`. Results are in the order of `wrt`.
    ///
    /// A gradient has its value's shape and element type, except that the gradient of an f16 copy of an f32 value is f32. A value that
    /// the loss does not depend on has zero as its gradient.
    ///
    /// # Errors
    /// [`Error::Graph`] when `loss` is not a `[1]` or a path leads through an operation without a gradient.
    pub fn gradients(&mut self, loss: ValueId, wrt: &[ValueId]) -> Result<Vec<ValueId>> {
        let one = self.constant(&[1], 1.0)?;
        self.gradients_from(loss, one, wrt)
    }

    /// As [`Graph::gradients`], but starts from `seed` `[1]` instead of 1. The seed may be a loss scale.
    ///
    /// # Errors
    /// As [`Graph::gradients`].
    pub fn gradients_from(
        &mut self,
        loss: ValueId,
        seed: ValueId,
        wrt: &[ValueId],
    ) -> Result<Vec<ValueId>> {
        let found = self.reached_gradients(loss, seed, wrt)?;
        let gradients = found.into_iter().zip(wrt);
        gradients
            .map(|(gradient, &value)| match gradient {
                Some(gradient) => Ok(gradient),
                None => {
                    let dims = self.shape(value).dims().to_vec();
                    self.constant(&dims, 0.0)
                }
            })
            .collect()
    }

    /// As [`Graph::gradients_from`], but `None` for a value that `loss` does not depend on by any path that has a derivative,
    /// where the others give zeros. An optimizer leaves such a parameter as it is.
    ///
    /// # Errors
    /// As [`Graph::gradients`].
    pub fn reached_gradients(
        &mut self,
        loss: ValueId,
        seed: ValueId,
        wrt: &[ValueId],
    ) -> Result<Vec<Option<ValueId>>> {
        for value in [loss, seed] {
            if self.value(value)?.shape.dims() != [1] {
                return Err(Error::Graph(format!(
                    "gradients start from a [1], not from {}; reduce it first, for example with sum_all",
                    self.shape(value)
                )));
            }
        }
        let mut active = vec![false; self.values.len()];
        for &value in wrt {
            self.value(value)?;
            active[value.0 as usize] = true;
        }
        for node in &self.nodes {
            // Whatever is behind it is a constant.
            let passes = node.op != Op::Unary(UnaryOp::Detach);
            if passes && node.inputs.iter().any(|id| active[id.0 as usize]) {
                for id in &node.outputs {
                    active[id.0 as usize] = true;
                }
            }
        }
        let mut backward = Backward {
            gradients: vec![None; self.values.len()],
            active,
            graph: self,
        };
        backward.gradients[loss.0 as usize] = Some(seed);
        let mut index = backward.graph.nodes.len();
        while let Some(last) = index.checked_sub(1) {
            index = match backward.graph.recomputed.ending_at(last) {
                Some(segment) => {
                    backward.segment(segment.clone())?;
                    segment.start
                }
                None => {
                    let node = backward.graph.nodes[last].clone();
                    backward.in_layer(&node)?;
                    last
                }
            };
        }
        let found = backward.gradients;
        Ok(wrt.iter().map(|value| found[value.0 as usize]).collect())
    }
}

struct Backward<'a> {
    graph: &'a mut Graph,
    /// By value of the forward graph and of the copies of its segments.
    gradients: Vec<Option<ValueId>>,
    /// Values that depend on what is differentiated by.
    active: Vec<bool>,
}

impl Backward<'_> {
    fn wants(&self, value: ValueId) -> bool {
        self.active[value.0 as usize]
    }

    /// Element type for the gradient of `value`: an f16 copy of an f32 value passes f32 on.
    fn dtype_for(&self, value: ValueId) -> DType {
        if let Source::Node { node, .. } = self.graph.values[value.0 as usize].source
            && let Op::Cast(_) = self.graph.nodes[node].op
        {
            return self.graph.dtype(self.graph.nodes[node].inputs[0]);
        }
        self.graph.dtype(value)
    }

    fn accumulate(&mut self, value: ValueId, gradient: ValueId) -> Result<()> {
        let dtype = self.dtype_for(value);
        let dims = self.graph.shape(value).dims().to_vec();
        let mut gradient = gradient;
        if self.graph.shape(gradient) != self.graph.shape(value) {
            gradient = self.graph.reshape(gradient, &dims)?;
        }
        gradient = self.graph.cast(gradient, dtype)?;
        let slot = value.0 as usize;
        self.gradients[slot] = Some(match self.gradients[slot] {
            Some(sum) => self.graph.add(sum, gradient)?,
            None => gradient,
        });
        Ok(())
    }

    /// Sums the gradient of a broadcast operand back to its shape.
    fn reduce(
        &mut self,
        operand: ValueId,
        gradient: ValueId,
        broadcast: Broadcast,
    ) -> Result<ValueId> {
        match broadcast {
            Broadcast::Tiles { period } => {
                let rows = self.graph.shape(operand).rows();
                Ok(self
                    .graph
                    .apply(Op::SumTiles { period, rows }, &[gradient])?[0])
            }
            Broadcast::Same => Ok(gradient),
            Broadcast::Cols => self.graph.sum_rows(gradient),
            Broadcast::Rows => self.graph.sum_cols(gradient),
            Broadcast::Scalar => self.graph.sum_all(gradient),
            Broadcast::Groups { period } => {
                Ok(self.graph.apply(Op::SumGroups { period }, &[gradient])?[0])
            }
        }
    }

    /// The nodes of a recomputed segment, by way of copies that compute its values again.
    fn segment(&mut self, segment: Range<usize>) -> Result<()> {
        let outputs = |node: &Node| node.outputs.clone();
        let mut values = self.graph.nodes[segment.clone()].iter().flat_map(outputs);
        if !values.any(|id| self.wants(id) && self.gradients[id.0 as usize].is_some()) {
            return Ok(());
        }
        let (nodes, copy_of) = self.graph.copy_segment(segment)?;
        self.gradients.resize(self.graph.values.len(), None);
        self.active.resize(self.graph.values.len(), false);
        for (value, copy) in &copy_of {
            self.gradients[copy.0 as usize] = self.gradients[value.0 as usize];
            self.active[copy.0 as usize] = self.active[value.0 as usize];
        }
        for node in nodes.iter().rev() {
            self.in_layer(node)?;
        }
        // The caller may have asked for the gradient of a value of the segment.
        for (value, copy) in &copy_of {
            self.gradients[value.0 as usize] = self.gradients[copy.0 as usize];
        }
        Ok(())
    }

    /// `dy` spread over the shape of `x`: the gradient of a sum.
    fn spread(&mut self, x: ValueId, dy: ValueId, broadcast: Broadcast) -> Result<()> {
        if !self.wants(x) {
            return Ok(());
        }
        let dims = self.graph.shape(x).dims().to_vec();
        let zero = self.graph.constant(&dims, 0.0)?;
        let dx = self.graph.binary(BinaryOp::Add, broadcast, zero, dy)?;
        self.accumulate(x, dx)
    }

    /// The gradient of a node, in the layer of the node.
    fn in_layer(&mut self, node: &Node) -> Result<()> {
        let outer = std::mem::replace(&mut self.graph.scope, node.scope.clone());
        let result = self.node(node);
        self.graph.scope = outer;
        match &node.scope {
            Some(path) => result.map_err(|error| error.in_layer(path)),
            None => result,
        }
    }

    fn node(&mut self, node: &Node) -> Result<()> {
        let dy: Vec<Option<ValueId>> = node
            .outputs
            .iter()
            .map(|id| self.gradients[id.0 as usize])
            .collect();
        if dy.iter().all(Option::is_none) || !node.inputs.iter().any(|&id| self.wants(id)) {
            return Ok(());
        }
        let none = || {
            Err(Error::Graph(format!(
                "{} has no gradient, but the loss depends on it",
                node.op.name()
            )))
        };
        // All of a loss but its statistics; of everything else the first result.
        let differentiable = match node.op {
            Op::KdLoss { .. } => 3,
            Op::CrossEntropy { .. } | Op::LinearCrossEntropy(_) => 2,
            _ => 1,
        };
        if dy.iter().skip(differentiable).any(Option::is_some) {
            return none();
        }
        let x = node.inputs.as_slice();
        let Some(&Some(d)) = dy.first() else {
            return match node.op {
                Op::KdLoss { alpha, beta } => self.kd_loss(node, &dy, alpha, beta),
                // The count does not depend on the logits.
                Op::CrossEntropy { .. } | Op::LinearCrossEntropy(_) => Ok(()),
                _ => none(),
            };
        };
        match &node.op {
            Op::Unary(op) => match op {
                UnaryOp::Identity => self.accumulate(x[0], d),
                UnaryOp::Affine { scale, .. } => {
                    let dx = self.graph.affine(d, *scale, 0.0)?;
                    self.accumulate(x[0], dx)
                }
                UnaryOp::IsFinite | UnaryOp::Detach => Ok(()),
                op => {
                    let op = BinaryOp::UnaryGrad(*op);
                    let dx = self.graph.binary(op, Broadcast::Same, x[0], d)?;
                    self.accumulate(x[0], dx)
                }
            },
            Op::Binary(op, broadcast) => self.binary(node, *op, *broadcast, d),
            Op::Cast(_) | Op::Reshape => self.accumulate(x[0], d),
            Op::Dropout { .. } => {
                let dx = self.graph.apply(node.op.clone(), &[d, x[1]])?[0];
                self.accumulate(x[0], dx)
            }
            Op::MatMul { batch, trans, .. } => self.matmul(x[0], x[1], (*batch, *trans), d),
            Op::LayerNorm { .. } => {
                let statistics = node.outputs[1];
                if self.wants(x[0]) {
                    let operands = [x[0], x[1], statistics, d];
                    let dx = self.graph.apply(Op::LayerNormGrad, &operands)?[0];
                    self.accumulate(x[0], dx)?;
                }
                if self.wants(x[1]) || self.wants(x[2]) {
                    let operands = [x[0], statistics, d];
                    let out = self.graph.apply(Op::LayerNormParamGrad, &operands)?;
                    for i in [1, 2] {
                        if self.wants(x[i]) {
                            self.accumulate(x[i], out[i - 1])?;
                        }
                    }
                }
                Ok(())
            }
            Op::Im2col(window) => {
                let dx = self.graph.apply(Op::Col2im(*window), &[d])?[0];
                self.accumulate(x[0], dx)
            }
            Op::Col2im(window) => {
                let dx = self.graph.apply(Op::Im2col(*window), &[d])?[0];
                self.accumulate(x[0], dx)
            }
            Op::Conv { window, .. } => self.conv(*window, [x[0], x[1]], d),
            Op::ConvGradInput { .. } | Op::ConvGradWeight { .. } => Err(Error::Graph(
                "second derivatives are not implemented".into(),
            )),
            Op::Gather { padding } => {
                let (rows, padding) = (self.graph.shape(x[0]).rows(), *padding);
                let op = Op::GatherGrad { rows, padding };
                let dx = self.graph.apply(op, &[x[1], d])?[0];
                self.accumulate(x[0], dx)
            }
            Op::SumRows => self.spread(x[0], d, Broadcast::Cols),
            Op::SumCols => self.spread(x[0], d, Broadcast::Rows),
            Op::SumAll => self.spread(x[0], d, Broadcast::Scalar),
            Op::SumGroups { period } => {
                let period = *period;
                self.spread(x[0], d, Broadcast::Groups { period })
            }
            Op::SumTiles { period, rows } if period == rows => {
                let dims = self.graph.shape(x[0]).dims().to_vec();
                let zero = self.graph.constant(&dims, 0.0)?;
                let tiles = Broadcast::Tiles { period: *period };
                let dx = self.graph.binary(BinaryOp::Add, tiles, zero, d)?;
                self.accumulate(x[0], dx)
            }
            Op::MaskedMean | Op::MaskedMeanGrad { .. } if self.wants(x[1]) => none(),
            Op::MaskedMean => {
                let time = self.graph.shape(x[0]).dims()[1];
                let op = Op::MaskedMeanGrad { time };
                let dx = self.graph.apply(op, &[d, x[1]])?[0];
                self.accumulate(x[0], dx)
            }
            Op::MaskedMeanGrad { .. } => {
                let dx = self.graph.masked_mean(d, x[1])?;
                self.accumulate(x[0], dx)
            }
            Op::Softmax { log } => {
                let op = Op::SoftmaxGrad { log: *log };
                let dx = self.graph.apply(op, &[node.outputs[0], d])?[0];
                self.accumulate(x[0], dx)
            }
            Op::Attention(options) => self.attention(node, 1, Op::AttentionGrad(*options), d),
            Op::CrossAttention(options) => {
                self.attention(node, 2, Op::CrossAttentionGrad(*options), d)
            }
            Op::KdLoss { alpha, beta } => self.kd_loss(node, &dy, *alpha, *beta),
            Op::CrossEntropy { ignore, smoothing } => {
                let op = Op::CrossEntropyGrad {
                    ignore: *ignore,
                    smoothing: *smoothing,
                };
                let operands = [x[0], x[1], node.outputs[2], node.outputs[1], d];
                let dx = self.graph.apply(op, &operands)?[0];
                self.accumulate(x[0], dx)
            }
            Op::LinearCrossEntropy(layer) => {
                let op = Op::LinearCrossEntropyGrad {
                    layer: *layer,
                    dx: self.dtype_for(x[0]),
                };
                let statistics = [node.outputs[2], node.outputs[1], d];
                let operands = [&x[..3], &statistics, &x[3..]].concat();
                let gradients = self.graph.apply(op, &operands)?;
                let differentiable = [x[0], x[1]].into_iter().chain(x.get(3).copied());
                for (value, gradient) in differentiable.zip(gradients) {
                    if self.wants(value) {
                        self.accumulate(value, gradient)?;
                    }
                }
                Ok(())
            }
            _ => none(),
        }
    }

    fn binary(
        &mut self,
        node: &Node,
        op: BinaryOp,
        broadcast: Broadcast,
        d: ValueId,
    ) -> Result<()> {
        let (a, b, y) = (node.inputs[0], node.inputs[1], node.outputs[0]);
        let (want_a, want_b) = (self.wants(a), self.wants(b));
        let (da, db) = match op {
            BinaryOp::Greater => return Ok(()),
            BinaryOp::UnaryGrad(_) => {
                return Err(Error::Graph(
                    "second derivatives are not implemented".into(),
                ));
            }
            BinaryOp::Add => (Some(d), Some(d)),
            BinaryOp::Sub => {
                let db = want_b
                    .then(|| self.graph.affine(d, -1.0, 0.0))
                    .transpose()?;
                (Some(d), db)
            }
            BinaryOp::Mul | BinaryOp::Div => {
                let da = want_a
                    .then(|| self.graph.binary(op, broadcast, d, b))
                    .transpose()?;
                let db = if !want_b {
                    None
                } else if op == BinaryOp::Mul {
                    Some(self.graph.mul(d, a)?)
                } else {
                    let product = self.graph.mul(d, y)?;
                    let quotient = self.graph.binary(op, broadcast, product, b)?;
                    Some(self.graph.affine(quotient, -1.0, 0.0)?)
                };
                (da, db)
            }
            BinaryOp::Max | BinaryOp::Min => {
                let greater = self.graph.binary(BinaryOp::Greater, broadcast, a, b)?;
                let rest = self.graph.affine(greater, -1.0, 1.0)?;
                let (to_a, to_b) = match op {
                    BinaryOp::Max => (greater, rest),
                    _ => (rest, greater),
                };
                (
                    Some(self.graph.mul(d, to_a)?),
                    Some(self.graph.mul(d, to_b)?),
                )
            }
        };
        if let (true, Some(da)) = (want_a, da) {
            self.accumulate(a, da)?;
        }
        if let (true, Some(db)) = (want_b, db) {
            let db = self.reduce(b, db, broadcast)?;
            self.accumulate(b, db)?;
        }
        Ok(())
    }

    fn matmul(
        &mut self,
        a: ValueId,
        b: ValueId,
        (batch, trans): (usize, Trans),
        d: ValueId,
    ) -> Result<()> {
        let (for_a, for_b) = match trans {
            Trans::NN => ((d, b, Trans::NT), (a, d, Trans::TN)),
            Trans::NT => ((d, b, Trans::NN), (d, a, Trans::TN)),
            Trans::TN => ((b, d, Trans::NT), (a, d, Trans::NN)),
        };
        for (operand, (left, right, trans)) in [(a, for_a), (b, for_b)] {
            if self.wants(operand) {
                let out = self.dtype_for(operand);
                let op = Op::MatMul { batch, trans, out };
                let gradient = self.graph.apply_mixed(op, &[left, right])?[0];
                self.accumulate(operand, gradient)?;
            }
        }
        Ok(())
    }

    /// The first `count` operands of an attention have gradients, the mask has none.
    fn attention(&mut self, node: &Node, count: usize, op: Op, d: ValueId) -> Result<()> {
        let (values, mask) = node.inputs.split_at(count);
        if mask.iter().any(|&mask| self.wants(mask)) {
            return Err(Error::Graph(format!(
                "{} has no gradient for its mask",
                node.op.name()
            )));
        }
        let operands = [values, &node.outputs, &[d], mask].concat();
        let gradients = self.graph.apply(op, &operands)?;
        for (&value, gradient) in values.iter().zip(gradients) {
            if self.wants(value) {
                self.accumulate(value, gradient)?;
            }
        }
        Ok(())
    }

    fn conv(&mut self, window: Window, [x, weight]: [ValueId; 2], d: ValueId) -> Result<()> {
        if self.wants(x) {
            let out = self.dtype_for(x);
            let op = Op::ConvGradInput { window, out };
            let dx = self.graph.apply_mixed(op, &[d, weight])?[0];
            self.accumulate(x, dx)?;
        }
        if self.wants(weight) {
            let out = self.dtype_for(weight);
            let op = Op::ConvGradWeight { window, out };
            let gradient = self.graph.apply_mixed(op, &[x, d])?[0];
            self.accumulate(weight, gradient)?;
        }
        Ok(())
    }

    /// ∂cosine/∂y is the loss gradient at alpha −1, beta 0; ∂mse/∂y at alpha 0, beta 1.
    fn kd_loss(
        &mut self,
        node: &Node,
        dy: &[Option<ValueId>],
        alpha: f32,
        beta: f32,
    ) -> Result<()> {
        let (y, target, rows) = (node.inputs[0], node.inputs[1], node.outputs[3]);
        if self.wants(target) {
            return Err(Error::Graph(
                "kd_loss has no gradient for its target".into(),
            ));
        }
        let weights = [(alpha, beta), (-1.0, 0.0), (0.0, 1.0)];
        for (d, (alpha, beta)) in dy.iter().zip(weights) {
            if let Some(d) = *d {
                let op = Op::KdLossGrad { alpha, beta };
                let dx = self.graph.apply(op, &[y, target, rows, d])?[0];
                self.accumulate(y, dx)?;
            }
        }
        Ok(())
    }
}
