//! How a graph is written down: one method per operation.

use super::infer::{check_types, infer};
use super::{Declared, Graph, Init, LinearCrossEntropy, Node, Op, Source, Value, ValueId};
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
        let id = self.lineage.grow();
        if !value.name.is_empty() {
            let by = self.declaring.clone();
            self.names.insert(value.name.clone(), Declared { id, by });
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
            scope: self.scope.clone(),
        });
        outputs
    }

    /// The error for a name that cannot be given to `what`.
    fn check_name(&self, what: &str, name: &str) -> Result<()> {
        if name.is_empty() {
            return Err(Error::Graph(format!("{what} needs a name, not \"\"")));
        }
        let Some(taken) = self.names.get(name) else {
            return Ok(());
        };
        let kind = match self.values[taken.id.index()].source {
            Source::Input { .. } => "input",
            Source::State(_) => "state",
            _ => "parameter",
        };
        let by = match &taken.by {
            Some(layer) => format!(" (declared by {layer})"),
            None => String::new(),
        };
        let instead = match (kind, what) {
            ("parameter", "a parameter") => {
                "call forward of its layer again to share it, or give this parameter another name"
                    .to_owned()
            }
            _ => format!("{what} of this graph needs another name"),
        };
        Err(Error::Graph(format!(
            "{kind} {name:?} exists already in this graph{by}; {instead}"
        )))
    }

    fn named(
        &mut self,
        (what, name): (&str, &str),
        dims: &[usize],
        dtype: DType,
        source: Source,
    ) -> Result<ValueId> {
        self.check_name(what, name)?;
        Ok(self.push_value(Value {
            name: name.to_owned(),
            shape: shape_of(what, name, dims)?,
            dtype,
            source,
            taps: None,
        }))
    }

    /// A value given to every run: f32 or f16. An input that neither an output nor an update depends on may be left out of a run.
    ///
    /// # Errors
    /// [`Error::Shape`] for an invalid shape, [`Error::Graph`] for a taken name, or u32 (see [`Graph::index_input`]).
    pub fn input(&mut self, name: &str, dims: &[usize], dtype: DType) -> Result<ValueId> {
        if dtype == DType::U32 {
            return Err(Error::Graph(format!(
                "input {name:?} holds indices: declare it with index_input and their bound"
            )));
        }
        let source = Source::Input { below: None };
        self.named(("an input", name), dims, dtype, source)
    }

    /// Indices `[N]` given to every run. Each is checked to be less than `below`.
    ///
    /// # Errors
    /// As [`Graph::input`].
    pub fn index_input(&mut self, name: &str, n: usize, below: u32) -> Result<ValueId> {
        if below == 0 {
            return Err(Error::Graph(format!(
                "input {name:?}: no index is below 0; give the number of rows or classes"
            )));
        }
        let below = Some(below);
        let source = Source::Input { below };
        self.named(("an input", name), &[n], DType::U32, source)
    }

    /// A trainable f32 value. The [`Session`](crate::Session) holds it under its name and shares it among all graphs that declare it.
    ///
    /// # Errors
    /// [`Error::Shape`] for an invalid shape, [`Error::Graph`] for a taken name, [`Error::Config`] for an initial value that is not
    /// finite.
    pub fn parameter(&mut self, name: &str, dims: &[usize], init: Init) -> Result<ValueId> {
        let (number, sound) = match init {
            Init::Constant(number) => (number, number.is_finite()),
            Init::Uniform(bound) => (bound, bound.is_finite() && bound >= 0.0),
        };
        if !sound {
            return Err(Error::Config {
                field: "init",
                reason: format!(
                    "of parameter {name:?} must be finite, and not negative as a bound, but is {number}"
                ),
            });
        }
        let source = Source::Parameter(init);
        self.named(("a parameter", name), dims, DType::F32, source)
    }

    /// The weight of a 1-D convolution.
    ///
    /// The host sees it as [out, in, kernel], as in PyTorch; the last tap is the current step of a causal convolution. As a value it is
    /// the matrix [out, kernel·in] that [`Graph::conv1d`] and products with [`Graph::im2col`] need.
    ///
    /// # Errors
    /// As [`Graph::parameter`].
    pub fn conv_parameter(
        &mut self,
        name: &str,
        [out, channels, kernel]: [usize; 3],
        init: Init,
    ) -> Result<ValueId> {
        // Each extent by itself, since their product hides which is zero.
        shape_of("a parameter", name, &[out, channels, kernel])?;
        let id = self.parameter(name, &[out, kernel * channels], init)?;
        self.values[id.index()].taps = Some(kernel);
        Ok(id)
    }

    /// A persistent f32 value. All elements begin as `start`; [`Graph::assign`] changes them.
    ///
    /// # Errors
    /// [`Error::Shape`] for an invalid shape, [`Error::Graph`] for a taken name.
    pub fn state(&mut self, name: &str, dims: &[usize], start: f32) -> Result<ValueId> {
        let source = Source::State(start);
        self.named(("a state", name), dims, DType::F32, source)
    }

    /// An f32 value whose elements are all the same number. It may meet f16 operands, too.
    ///
    /// # Errors
    /// [`Error::Shape`] for an invalid shape.
    pub fn constant(&mut self, dims: &[usize], number: f32) -> Result<ValueId> {
        Ok(self.push_value(Value {
            name: String::new(),
            shape: shape_of("constant", "", dims)?,
            dtype: DType::F32,
            source: Source::Constant(number),
            taps: None,
        }))
    }

    /// Names a result of every run.
    ///
    /// An output of a parameter or state has the value before the updates that are declared later, and after those that are declared
    /// earlier. An output of a reshape of it has the value at the declaration of the reshape.
    ///
    /// # Errors
    /// [`Error::Graph`] for a foreign value or a name that another output has.
    pub fn output(&mut self, name: &str, value: ValueId) -> Result<()> {
        self.value(value)?;
        if name.is_empty() {
            return Err(Error::Graph("an output needs a name, not \"\"".into()));
        }
        if self.outputs.iter().any(|(taken, _)| taken == name) {
            return Err(Error::Graph(format!(
                "output {name:?} exists already in this graph; give this one another name"
            )));
        }
        self.outputs.push((name.to_owned(), value));
        Ok(())
    }

    /// Adds any operation. The methods below are shorthands for it.
    ///
    /// # Errors
    /// [`Error::Shape`] when the operands do not fit or f16 and f32 meet where they may not; [`Error::Graph`] for values of another
    /// graph, a read of a parameter or state after its update, and a second update.
    pub fn apply(&mut self, op: Op, inputs: &[ValueId]) -> Result<Vec<ValueId>> {
        let results = infer(self, &op, inputs)?;
        check_types(self, &op, inputs)?;
        self.append(op, inputs, results)
    }

    /// As [`Graph::apply`], but products may have operands of different element types: a gradient that is f32 meets f16 weights.
    pub(super) fn apply_mixed(&mut self, op: Op, inputs: &[ValueId]) -> Result<Vec<ValueId>> {
        let results = infer(self, &op, inputs)?;
        self.append(op, inputs, results)
    }

    fn append(
        &mut self,
        op: Op,
        inputs: &[ValueId],
        results: Vec<(Shape, DType)>,
    ) -> Result<Vec<ValueId>> {
        self.check_current(inputs)?;
        let updates = match &op {
            Op::AdamW { params, .. } => params.clone(),
            Op::Assign { state } => vec![*state],
            _ => Vec::new(),
        };
        if let Some(&id) = updates.iter().find(|id| self.updated.contains(id)) {
            return Err(Error::Graph(format!(
                "{:?} is updated twice in the same graph; a graph updates each parameter and state at most once",
                self.value(id)?.name
            )));
        }
        let inputs = self.before_update(&op, &updates, inputs);
        self.updated.extend(updates);
        Ok(self.push_node(op, inputs, results))
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

    /// x [B, L, C] + positions [P, C] with P ≥ L: row t of the table at step t of every sample. A table of more than L rows must be a
    /// parameter or an input.
    pub fn add_positions(&mut self, x: ValueId, positions: ValueId) -> Result<ValueId> {
        let shape = &self.value(x)?.shape;
        if shape.rank() != 3 {
            return Err(Error::shape(
                "add_positions",
                &[shape],
                "x must be [B, L, C]",
            ));
        }
        let period = shape.dims()[1];
        self.binary(BinaryOp::Add, Broadcast::Tiles { period }, x, positions)
    }

    /// x in another element type. Returns x itself when it has that type already. f16 is how a value is stored: one that only
    /// the kernel that computes it reads again is not rounded.
    pub fn cast(&mut self, x: ValueId, dtype: DType) -> Result<ValueId> {
        if self.value(x)?.dtype == dtype {
            return Ok(x);
        }
        self.apply1(Op::Cast(dtype), &[x])
    }

    /// Dropout: zero with probability `rate`, else x/(1 − rate). Returns x itself at rate 0.
    ///
    /// `counter` `[1]` is an integer below 2²⁴ that should differ from run to run; [`Draws`](crate::nn::Draws) keeps one. `seed` should
    /// differ from training to training. Every call on a graph draws from a stream of its own, which follows from `seed` and the
    /// number of calls before it. The formula is at [`Op::Dropout`].
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

    /// x under another shape with the same number of elements, in row-major order.
    ///
    /// Nothing is moved when the numbers of rows and columns stay the same, as from [B, L, C] to [B·L, C]. Otherwise, and between
    /// a vector and a matrix, the elements are copied, because rows are padded.
    pub fn reshape(&mut self, x: ValueId, dims: &[usize]) -> Result<ValueId> {
        let value = self.value(x)?;
        let from = &value.shape;
        let shape = match Shape::new(dims) {
            Ok(shape) if shape.len() == from.len() => shape,
            Ok(shape) => {
                let (had, needs) = (from.len(), shape.len());
                let reason = format!("{from} to {shape}: {had} elements cannot become {needs}");
                return Err(Error::shape("reshape", &[from, &shape], reason));
            }
            Err(Error::Shape { reason, .. }) => {
                let reason = format!("{from} to {reason}");
                return Err(Error::shape("reshape", &[from], reason));
            }
            Err(other) => return Err(other),
        };
        self.check_current(&[x])?;
        let dtype = value.dtype;
        Ok(self.push_node(Op::Reshape, vec![x], vec![(shape, dtype)])[0])
    }

    /// Matrix product in the element type of `a`, with sums in f32. Leading extents of `a` count as rows.
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

    /// One product per pair of matrices: a [batch, M, K], b [batch, K, N] → [batch, M, N] in the element type of `a`. `trans` says
    /// which operand is stored transposed.
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

    /// Convolution of x [B, L, C] with weight [H, k·C] (see [`Graph::conv_parameter`]) → [B, L', H] like x. No matrix of windows is
    /// stored.
    pub fn conv1d(&mut self, x: ValueId, weight: ValueId, window: Window) -> Result<ValueId> {
        let out = self.value(x)?.dtype;
        self.apply1(Op::Conv { window, out }, &[x, weight])
    }

    /// Rows of `table` [V, C] for `ids` `[N]` → [N, C]. The row of `padding` gets no gradient.
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

    /// The largest element of each row and its column: [.., C] → `[rows]`, `[rows]`. Neither has a gradient.
    pub fn row_max(&mut self, x: ValueId) -> Result<[ValueId; 2]> {
        let out = self.apply(Op::RowMax, &[x])?;
        Ok([out[0], out[1]])
    }

    /// ln Σ exp(x) over the columns of each row: x [.., C] in f32 → `[rows]`. ∞ where a row has ∞, −∞ where it has nothing but −∞, NaN
    /// where it has NaN.
    pub fn log_sum_exp(&mut self, x: ValueId) -> Result<ValueId> {
        let [max, _] = self.row_max(x)?;
        // Finite, since ∞ − ∞ is NaN.
        let (min, most) = (f32::MIN, f32::MAX);
        let max = self.unary(UnaryOp::Clamp { min, max: most }, max)?;
        // A constant for gradients, because the result does not depend on it.
        let max = self.detach(max)?;
        let x = self.binary(BinaryOp::Sub, Broadcast::Rows, x, max)?;
        let e = self.unary(UnaryOp::Exp, x)?;
        let sum = self.sum_cols(e)?;
        let log = self.unary(UnaryOp::Log, sum)?;
        self.add(log, max)
    }

    /// x, through which no gradient passes.
    pub fn detach(&mut self, x: ValueId) -> Result<ValueId> {
        self.unary(UnaryOp::Detach, x)
    }

    /// Sum of all elements → `[1]`.
    pub fn sum_all(&mut self, x: ValueId) -> Result<ValueId> {
        self.apply1(Op::SumAll, &[x])
    }

    /// Mean of the time steps where `mask` [B·L] is 1: [B, L, C] → [B, C]. If all of them count, the mask is a
    /// [`Graph::constant`] of 1.
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

    /// Mean cross entropy of logits [N, V] against targets `[N]` (see [`Graph::index_input`]).
    ///
    /// Targets equal to `ignore` do not count; it may be V or more, which pads a batch. `smoothing` in [0, 1) is the label smoothing:
    /// this share of the target's probability is spread over all classes.
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
    /// The result is that of a linear layer and [`Graph::cross_entropy`], but the matrix of logits [N, V] is never materialised. It is
    /// computed in chunks of rows of at most [`LinearCrossEntropy::CHUNK_BYTES`], in the element type of x, here and in the gradients.
    /// For another bound or type, pass [`Op::LinearCrossEntropy`] to [`Graph::apply`].
    pub fn linear_cross_entropy(
        &mut self,
        x: ValueId,
        weight: ValueId,
        bias: Option<ValueId>,
        targets: ValueId,
        ignore: Option<u32>,
        smoothing: f32,
    ) -> Result<CrossEntropy> {
        let layer = LinearCrossEntropy::new(self.value(x)?.dtype)
            .ignore(ignore)
            .smoothing(smoothing);
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

/// The shape of something that is declared; the error names it.
fn shape_of(what: &str, name: &str, dims: &[usize]) -> Result<Shape> {
    Shape::new(dims).map_err(|error| match error {
        Error::Shape { reason, .. } => {
            let reason = match name {
                "" => format!("{what} {reason}"),
                name => format!("{what} {name:?} {reason}"),
            };
            Error::shape("shape", &[], reason)
        }
        other => other,
    })
}
