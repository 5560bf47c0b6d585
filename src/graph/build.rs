//! How a graph is written down: one method an operation.

use super::infer::infer;
use super::{Graph, Init, LinearCrossEntropy, Node, Op, Source, Value, ValueId};
use crate::error::{Error, Result};
use crate::fnv::fnv1a;
use crate::types::{BinaryOp, Broadcast, DType, Shape, Trans, UnaryOp, Window};

/// Results of [`Graph::kd_loss`], all `[1]`.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct KdLoss {
    /// alpha·(1 − cosine) + beta·mse
    pub loss: ValueId,
    /// Mean cosine similarity.
    pub cosine: ValueId,
    /// Mean squared error.
    pub mse: ValueId,
}

/// Results of [`Graph::cross_entropy`] and [`Graph::linear_cross_entropy`], both `[1]`.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct CrossEntropy {
    /// Mean negative log-likelihood over counted targets.
    pub loss: ValueId,
    /// Number of counted targets.
    pub count: ValueId,
}

impl Graph {
    pub(crate) fn push_value(&mut self, value: Value) -> ValueId {
        let id = ValueId(self.values.len() as u32);
        if !value.name.is_empty() {
            self.names.insert(value.name.clone(), id);
        }
        self.values.push(value);
        id
    }

    pub(crate) fn push_node(
        &mut self,
        op: Op,
        inputs: Vec<ValueId>,
        results: Vec<(Shape, DType)>,
    ) -> Vec<ValueId> {
        let node = self.nodes.len();
        let outputs: Vec<ValueId> = results
            .into_iter()
            .enumerate()
            .map(|(output, (shape, dtype))| {
                self.push_value(Value {
                    name: String::new(),
                    shape,
                    dtype,
                    source: Source::Node { node, output },
                    taps: None,
                })
            })
            .collect();
        self.nodes.push(Node {
            op,
            inputs,
            outputs: outputs.clone(),
        });
        outputs
    }

    fn named(
        &mut self,
        name: &str,
        dims: &[usize],
        dtype: DType,
        source: Source,
    ) -> Result<ValueId> {
        if name.is_empty() || self.names.contains_key(name) {
            return Err(Error::Graph(format!(
                "the name {name:?} is empty or taken already"
            )));
        }
        Ok(self.push_value(Value {
            name: name.to_owned(),
            shape: Shape::new(dims)?,
            dtype,
            source,
            taps: None,
        }))
    }

    /// A value given to every run: f32 or f16.
    ///
    /// # Errors
    /// [`Error::Graph`] for an invalid shape, a taken name, or u32 (see [`Graph::index_input`]).
    pub fn input(&mut self, name: &str, dims: &[usize], dtype: DType) -> Result<ValueId> {
        if dtype == DType::U32 {
            return Err(Error::Graph(format!(
                "input {name:?} holds indices: declare it with index_input and their bound"
            )));
        }
        self.named(name, dims, dtype, Source::Input { below: None })
    }

    /// Indices `[N]` given to every run, each checked to be less than `below`.
    ///
    /// # Errors
    /// As [`Graph::input`].
    pub fn index_input(&mut self, name: &str, n: usize, below: u32) -> Result<ValueId> {
        let below = Some(below);
        self.named(name, &[n], DType::U32, Source::Input { below })
    }

    /// A trainable f32 value, held by the [`Session`](crate::Session) under its name.
    ///
    /// # Errors
    /// [`Error::Graph`] for an invalid shape or a taken name.
    pub fn parameter(&mut self, name: &str, dims: &[usize], init: Init) -> Result<ValueId> {
        self.named(name, dims, DType::F32, Source::Parameter(init))
    }

    /// The weight of a 1-D convolution, exchanged with the host as [out, in, kernel] like PyTorch's, the last tap being the
    /// current step. As a value it is the matrix [out, kernel·in] that [`Graph::im2col`] needs.
    ///
    /// # Errors
    /// As [`Graph::parameter`].
    pub fn conv_parameter(
        &mut self,
        name: &str,
        [out, channels, kernel]: [usize; 3],
        init: Init,
    ) -> Result<ValueId> {
        let id = self.parameter(name, &[out, kernel * channels], init)?;
        self.values[id.0 as usize].taps = Some(kernel);
        Ok(id)
    }

    /// A persistent f32 value that starts as `start` everywhere and changes by [`Graph::assign`].
    ///
    /// # Errors
    /// [`Error::Graph`] for an invalid shape or a taken name.
    pub fn state(&mut self, name: &str, dims: &[usize], start: f32) -> Result<ValueId> {
        self.named(name, dims, DType::F32, Source::State(start))
    }

    /// An f32 value that is the same number everywhere.
    ///
    /// # Errors
    /// [`Error::Graph`] for an invalid shape.
    pub fn constant(&mut self, dims: &[usize], number: f32) -> Result<ValueId> {
        Ok(self.push_value(Value {
            name: String::new(),
            shape: Shape::new(dims)?,
            dtype: DType::F32,
            source: Source::Constant(number),
            taps: None,
        }))
    }

    /// Names a result of every run.
    ///
    /// # Errors
    /// [`Error::Graph`] for a foreign value or a name that is taken by another output.
    pub fn output(&mut self, name: &str, value: ValueId) -> Result<()> {
        self.value(value)?;
        if name.is_empty() || self.outputs.iter().any(|(taken, _)| taken == name) {
            return Err(Error::Graph(format!(
                "the output name {name:?} is empty or taken already"
            )));
        }
        self.outputs.push((name.to_owned(), value));
        Ok(())
    }

    /// Adds any operation; the named methods below are shorthands for it.
    ///
    /// # Errors
    /// [`Error::Shape`] when the operands do not fit, [`Error::Graph`] for foreign values.
    pub fn apply(&mut self, op: Op, inputs: &[ValueId]) -> Result<Vec<ValueId>> {
        let results = infer(self, &op, inputs)?;
        self.check_current(inputs)?;
        let updates = match &op {
            Op::AdamW { params, .. } => params.as_slice(),
            Op::Assign { state } => std::slice::from_ref(state),
            _ => &[],
        };
        if let Some(id) = updates.iter().find(|id| self.updated.contains(id)) {
            return Err(Error::Graph(format!(
                "{:?} is updated twice in the same graph",
                self.value(*id)?.name
            )));
        }
        self.updated.extend(updates);
        Ok(self.push_node(op, inputs.to_vec(), results))
    }

    /// Parameters and states are not read once a node has updated them.
    pub(crate) fn check_current(&self, inputs: &[ValueId]) -> Result<()> {
        match inputs.iter().find(|id| self.updated.contains(id)) {
            None => Ok(()),
            Some(id) => Err(Error::Graph(format!(
                "{:?} is read after its update in the same graph",
                self.value(*id)?.name
            ))),
        }
    }

    fn apply1(&mut self, op: Op, inputs: &[ValueId]) -> Result<ValueId> {
        Ok(self.apply(op, inputs)?[0])
    }

    /// A function of every element.
    ///
    /// # Errors
    /// As [`Graph::apply`]; so for all methods below.
    pub fn unary(&mut self, op: UnaryOp, x: ValueId) -> Result<ValueId> {
        self.apply1(Op::Unary(op), &[x])
    }

    /// scale·x + offset
    pub fn affine(&mut self, x: ValueId, scale: f32, offset: f32) -> Result<ValueId> {
        self.unary(UnaryOp::Affine { scale, offset }, x)
    }

    /// A function of pairs of elements, the second operand broadcast.
    pub fn binary(
        &mut self,
        op: BinaryOp,
        broadcast: Broadcast,
        a: ValueId,
        b: ValueId,
    ) -> Result<ValueId> {
        self.apply1(Op::Binary(op, broadcast), &[a, b])
    }

    /// a + b, same shape.
    pub fn add(&mut self, a: ValueId, b: ValueId) -> Result<ValueId> {
        self.binary(BinaryOp::Add, Broadcast::Same, a, b)
    }

    /// a − b, same shape.
    pub fn sub(&mut self, a: ValueId, b: ValueId) -> Result<ValueId> {
        self.binary(BinaryOp::Sub, Broadcast::Same, a, b)
    }

    /// a·b, same shape.
    pub fn mul(&mut self, a: ValueId, b: ValueId) -> Result<ValueId> {
        self.binary(BinaryOp::Mul, Broadcast::Same, a, b)
    }

    /// a/b, same shape.
    pub fn div(&mut self, a: ValueId, b: ValueId) -> Result<ValueId> {
        self.binary(BinaryOp::Div, Broadcast::Same, a, b)
    }

    /// x [.., C] + bias `[C]`.
    pub fn add_bias(&mut self, x: ValueId, bias: ValueId) -> Result<ValueId> {
        self.binary(BinaryOp::Add, Broadcast::Cols, x, bias)
    }

    /// Every row of x times its element of `mask` `[rows]`.
    pub fn mul_rows(&mut self, x: ValueId, mask: ValueId) -> Result<ValueId> {
        self.binary(BinaryOp::Mul, Broadcast::Rows, x, mask)
    }

    /// x times the scalar s `[1]`.
    pub fn mul_scalar(&mut self, x: ValueId, s: ValueId) -> Result<ValueId> {
        self.binary(BinaryOp::Mul, Broadcast::Scalar, x, s)
    }

    /// x [B, L, C] + z [B, C] at every time step.
    pub fn add_over_time(&mut self, x: ValueId, z: ValueId) -> Result<ValueId> {
        let shape = &self.value(x)?.shape;
        if shape.rank() != 3 {
            return Err(Error::shape(
                "add_over_time",
                &[shape],
                "x must be [B, L, C]",
            ));
        }
        let period = shape.dims()[1];
        self.binary(BinaryOp::Add, Broadcast::Groups { period }, x, z)
    }

    /// x in another element type; x itself when it has that type already.
    pub fn cast(&mut self, x: ValueId, dtype: DType) -> Result<ValueId> {
        if self.value(x)?.dtype == dtype {
            return Ok(x);
        }
        self.apply1(Op::Cast(dtype), &[x])
    }

    /// Dropout: zero with probability `rate`, else x/(1 − rate); x itself at rate 0.
    ///
    /// `counter` `[1]`, an integer below 2²⁴, is to differ from run to run, `seed` from training to training: every call on a graph draws
    /// from a stream of its own, which follows from `seed` and the number of calls before it. See [`Op::Dropout`];
    /// [`Draws`](crate::nn::Draws) keeps a counter.
    pub fn dropout(
        &mut self,
        x: ValueId,
        rate: f32,
        counter: ValueId,
        seed: u64,
    ) -> Result<ValueId> {
        if rate == 0.0 {
            self.value(x)?;
            return Ok(x);
        }
        let hash = fnv1a(&[seed.to_le_bytes(), self.dropouts.to_le_bytes()].concat());
        let stream = (hash ^ (hash >> 32)) as u32;
        let y = self.apply1(Op::Dropout { rate, stream }, &[x, counter])?;
        self.dropouts += 1;
        Ok(y)
    }

    /// x under another shape with the same number of rows and columns, such as [B, L, C] as [B·L, C]; moves nothing.
    pub fn reshape(&mut self, x: ValueId, dims: &[usize]) -> Result<ValueId> {
        let shape = Shape::new(dims)?;
        let value = self.value(x)?;
        let from = &value.shape;
        let vector = (shape.rank() == 1) != (from.rank() == 1);
        if shape.rows() != from.rows() || shape.cols() != from.cols() || vector {
            let reason = "a reshape keeps rows and columns, and vectors stay vectors";
            return Err(Error::shape("reshape", &[from, &shape], reason));
        }
        let dtype = value.dtype;
        Ok(self.push_node(Op::Reshape, vec![x], vec![(shape, dtype)])[0])
    }

    /// Matrix product in the element type of `a`, sums in f32; leading extents of `a` count as rows.
    pub fn matmul(&mut self, a: ValueId, b: ValueId, trans: Trans) -> Result<ValueId> {
        let out = self.value(a)?.dtype;
        self.matmul_as(a, b, trans, out)
    }

    /// Matrix product stored as `out`.
    pub fn matmul_as(
        &mut self,
        a: ValueId,
        b: ValueId,
        trans: Trans,
        out: DType,
    ) -> Result<ValueId> {
        let batch = 1;
        self.apply1(Op::MatMul { batch, trans, out }, &[a, b])
    }

    /// A product of each pair of matrices: a [batch, M, K], b [batch, K, N] → [batch, M, N] in the element type of `a`; either stored
    /// transposed as `trans` says.
    pub fn batch_matmul(&mut self, a: ValueId, b: ValueId, trans: Trans) -> Result<ValueId> {
        let value = self.value(a)?;
        if value.shape.rank() != 3 {
            let reason = "operands must be [batch, rows, columns]";
            return Err(Error::shape("batch_matmul", &[&value.shape], reason));
        }
        let (batch, out) = (value.shape.dims()[0], value.dtype);
        self.apply1(Op::MatMul { batch, trans, out }, &[a, b])
    }

    /// LayerNorm over the last extent with gamma `[C]` and beta `[C]`.
    pub fn layer_norm(
        &mut self,
        x: ValueId,
        gamma: ValueId,
        beta: ValueId,
        eps: f32,
    ) -> Result<ValueId> {
        self.apply1(Op::LayerNorm { eps }, &[x, gamma, beta])
    }

    /// Windows of a causal convolution: x [B, L, C] → [B·L, kernel·C].
    pub fn im2col(&mut self, x: ValueId, kernel: usize, dilation: usize) -> Result<ValueId> {
        let shape = &self.value(x)?.shape;
        let [_, time, _] = *shape.dims() else {
            return Err(Error::shape("im2col", &[shape], "x must be [B, L, C]"));
        };
        self.windows(x, Window::causal(time, kernel, dilation)?)
    }

    /// Windows of any convolution: x [B, L, C] → [B·L', k·C].
    pub fn windows(&mut self, x: ValueId, window: Window) -> Result<ValueId> {
        self.apply1(Op::Im2col(window), &[x])
    }

    /// Convolution x [B, L, C], weight [H, k·C] (see [`Graph::conv_parameter`]) → [B, L', H] like x, without a matrix of windows
    /// in memory.
    pub fn conv1d(&mut self, x: ValueId, weight: ValueId, window: Window) -> Result<ValueId> {
        let out = self.value(x)?.dtype;
        self.apply1(Op::Conv { window, out }, &[x, weight])
    }

    /// Rows of `table` [V, C] for `ids` `[N]` → [N, C]; the row of `padding` gets no gradient.
    pub fn gather(
        &mut self,
        table: ValueId,
        ids: ValueId,
        padding: Option<u32>,
    ) -> Result<ValueId> {
        self.apply1(Op::Gather { padding }, &[table, ids])
    }

    /// Sum over rows: [.., C] → `[C]`.
    pub fn sum_rows(&mut self, x: ValueId) -> Result<ValueId> {
        self.apply1(Op::SumRows, &[x])
    }

    /// Sum over columns: [.., C] → `[rows]`.
    pub fn sum_cols(&mut self, x: ValueId) -> Result<ValueId> {
        self.apply1(Op::SumCols, &[x])
    }

    /// Sum of all elements → `[1]`.
    pub fn sum_all(&mut self, x: ValueId) -> Result<ValueId> {
        self.apply1(Op::SumAll, &[x])
    }

    /// Mean of the time steps where `mask` [B·L] is 1: [B, L, C] → [B, C].
    pub fn masked_mean(&mut self, x: ValueId, mask: ValueId) -> Result<ValueId> {
        self.apply1(Op::MaskedMean, &[x, mask])
    }

    /// Scalars side by side: n × `[1]` → `[n]`.
    pub fn stack(&mut self, scalars: &[ValueId]) -> Result<ValueId> {
        self.apply1(Op::Stack, scalars)
    }

    /// Knowledge-distillation loss of y [B, E] against t [B, E].
    pub fn kd_loss(&mut self, y: ValueId, t: ValueId, alpha: f32, beta: f32) -> Result<KdLoss> {
        let out = self.apply(Op::KdLoss { alpha, beta }, &[y, t])?;
        Ok(KdLoss {
            loss: out[0],
            cosine: out[1],
            mse: out[2],
        })
    }

    /// Mean cross entropy of logits [N, V] against targets `[N]`.
    pub fn cross_entropy(
        &mut self,
        logits: ValueId,
        targets: ValueId,
        ignore: Option<u32>,
        smoothing: f32,
    ) -> Result<CrossEntropy> {
        let op = Op::CrossEntropy { ignore, smoothing };
        let out = self.apply(op, &[logits, targets])?;
        Ok(CrossEntropy {
            loss: out[0],
            count: out[1],
        })
    }

    /// Mean cross entropy of the logits x·weightᵀ (+ bias) against targets `[N]`, for x [.., D] of N rows, weight [V, D] and bias `[V]`.
    ///
    /// As a linear layer and [`Graph::cross_entropy`], but the logits [N, V] never exist as a whole: neither here nor in the
    /// gradients do more than [`LinearCrossEntropy::CHUNK_BYTES`] of them, in the element type of x. Another bound or type goes
    /// through [`Graph::apply`] with [`Op::LinearCrossEntropy`].
    pub fn linear_cross_entropy(
        &mut self,
        x: ValueId,
        weight: ValueId,
        bias: Option<ValueId>,
        targets: ValueId,
        ignore: Option<u32>,
        smoothing: f32,
    ) -> Result<CrossEntropy> {
        let layer = LinearCrossEntropy {
            ignore,
            smoothing,
            logits: self.value(x)?.dtype,
            chunk_bytes: LinearCrossEntropy::CHUNK_BYTES,
        };
        let operands: Vec<ValueId> = [x, weight, targets].into_iter().chain(bias).collect();
        let out = self.apply(Op::LinearCrossEntropy(layer), &operands)?;
        Ok(CrossEntropy {
            loss: out[0],
            count: out[1],
        })
    }

    /// √ Σ g² over all elements of all operands → `[1]`.
    pub fn global_norm(&mut self, values: &[ValueId]) -> Result<ValueId> {
        self.apply1(Op::GlobalNorm, values)
    }

    /// The state takes `value` once all earlier nodes have read it.
    pub fn assign(&mut self, state: ValueId, value: ValueId) -> Result<()> {
        self.apply(Op::Assign { state }, &[value]).map(|_| ())
    }
}
