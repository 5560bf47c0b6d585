//! The operations a graph is made of.
//!
//! Every operation is defined here once, in words. Its shape rule is in `graph/infer.rs`, its builder in `graph/build.rs`, its derivative
//! in `graph/gradients.rs`, its kernel in `kernels/`, its f64 twin in `reference/`. "Row r" and "column c" refer to the matrix view
//! of a value ([`Shape::rows`](crate::types::Shape::rows), [`Shape::cols`](crate::types::Shape::cols)).

use super::{AttentionOptions, ValueId};
use crate::types::{BinaryOp, Broadcast, DType, Rates, Trans, UnaryOp, Window};

/// A linear layer and the cross entropy of its results, the logits. The matrix of logits is never materialised; it is computed in
/// chunks of rows.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct LinearCrossEntropy {
    /// A target that does not count.
    pub ignore: Option<u32>,
    /// Label smoothing s in [0, 1).
    pub smoothing: f32,
    /// Element type of the logits and of their gradient: f32 or f16.
    pub logits: DType,
    /// Upper bound on the size of a chunk in bytes. A chunk has at least 64 rows, even if that is larger, and is never larger than the
    /// adapter's largest binding.
    pub chunk_bytes: u64,
}

impl LinearCrossEntropy {
    /// 64 MiB. At common vocabularies this is enough rows for full tiles of a matrix product, and it is half of the largest binding that
    /// WebGPU guarantees.
    pub const CHUNK_BYTES: u64 = 64 << 20;

    /// Logits of this type (f32 or f16), in chunks of [`Self::CHUNK_BYTES`], where all targets count, without smoothing.
    #[must_use]
    pub fn new(logits: DType) -> Self {
        Self {
            ignore: None,
            smoothing: 0.0,
            logits,
            chunk_bytes: Self::CHUNK_BYTES,
        }
    }

    /// With a target that does not count.
    #[must_use]
    pub fn ignore(self, ignore: Option<u32>) -> Self {
        Self { ignore, ..self }
    }

    /// With this label smoothing, in [0, 1).
    #[must_use]
    pub fn smoothing(self, smoothing: f32) -> Self {
        Self { smoothing, ..self }
    }

    /// With this bound on the size of a chunk in bytes.
    #[must_use]
    pub fn chunk_bytes(self, chunk_bytes: u64) -> Self {
        Self {
            chunk_bytes,
            ..self
        }
    }
}

/// An operation. Inputs and outputs are listed in the order in which a [`Node`](super::Node) holds them.
/// A value is f32 unless said otherwise; "like x" includes the element type.
///
/// Two f16 and f32 operands meet only where that is said: in elementwise functions of a broadcast vector ([`BinaryOp`]), a
/// normalisation with its parameters, a mean with its mask, and a loss. Everywhere else it is an error, and
/// [`Graph::cast`](super::Graph::cast) resolves it.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Op {
    /// x → like x.
    Unary(UnaryOp),
    /// a, b → like a.
    Binary(BinaryOp, Broadcast),
    /// x → same shape in another element type. From f32 to f16, numbers beyond 65504 become infinite and NaN stays NaN, as
    /// everywhere a value is stored as f16.
    Cast(DType),
    /// x, counter `[1]` → like x: x/(1 − rate) where the element is kept, else 0, whatever x is. Srivastava et al., JMLR 15 (2014).
    ///
    /// Element (r, c) is dropped where its draw, 32 random bits, is less than rate·2³². The draws of columns 4i to 4i + 3 are the four
    /// results of pcg4d (Jarzynski & Olano, JCGT 9(3), 2020) for (r·⌈C/4⌉ + i, stream, counter, 0), modulo 2³². They depend only on the
    /// place in x, so they are equal in every kernel and element type. They are not stored for the gradient, which is the same
    /// operation on dy. The counter is an integer below 2²⁴ and has no gradient.
    Dropout {
        /// Share of the elements that is dropped, in [0, 1).
        rate: f32,
        /// Draws of other streams are independent.
        stream: u32,
    },
    /// x → the same elements in row-major order under another shape. Moves nothing while the numbers of rows and columns stay the same,
    /// and copies otherwise; see [`Graph::reshape`](super::Graph::reshape).
    Reshape,
    /// a, b → [M, N] in `out`. With a batch, one product per pair of matrices: operands [batch, ..] → [batch, M, N]. Both operands have one
    /// element type. Sums are f32.
    MatMul {
        /// Number of products. The operands of a single product may have rank 2 or 3.
        batch: usize,
        /// Stored orientation of the operands.
        trans: Trans,
        /// Element type of the product.
        out: DType,
    },
    /// x (f32 or f16), gamma `[C]`, beta `[C]` → y like x, statistics [3, rows]. y = x̂·gamma + beta with x̂ = (x − mean)·rstd.
    /// Ba, Kiros & Hinton, arXiv:1607.06450.
    ///
    /// The statistics of a row are its first element x₀, the mean of the differences x − x₀, called shift here, and
    /// rstd = 1/√(variance + eps). Then x̂ = ((x − x₀) − shift)·rstd, which keeps its digits when the mean is much larger than the
    /// deviations from it: a mean of 1e6 itself has no digits below 0.06 in f32. The mean is x₀ + shift.
    LayerNorm {
        /// Added to the (biased) variance.
        eps: f32,
    },
    /// x, gamma, statistics, dy → dx like x. With x̂ as in [`Op::LayerNorm`] and g = dy·gamma:
    /// dx = rstd·(g − mean_c(g) − x̂·mean_c(g·x̂)).
    LayerNormGrad,
    /// x, statistics, dy → dgamma `[C]` = Σ_r dy·x̂, dbeta `[C]` = Σ_r dy.
    LayerNormParamGrad,
    /// x [B, L, C] → [B·L', k·C] like x, where L' is the number of steps of the window. Column j·C + c of row (b, t) is
    /// x[b, t·stride + j·dilation − before, c], or zero outside of the sample.
    Im2col(Window),
    /// columns [B·L', k·C] → [B, L, C]: the transpose of [`Op::Im2col`] (overlapping windows add up).
    Col2im(Window),
    /// x [B, L, C], weight [H, k·C] → [B, L', H] in `out`: the product of [`Op::Im2col`] of x and weightᵀ. Both operands have one element
    /// type. Sums are f32.
    Conv {
        /// Which steps of x a step of the result reads.
        window: Window,
        /// Element type of the result.
        out: DType,
    },
    /// dy [B, L', H], weight [H, k·C] → [B, L, C] in `out`: [`Op::Col2im`] of dy·weight, the gradient of [`Op::Conv`] for x.
    ConvGradInput {
        /// As that of the convolution.
        window: Window,
        /// Element type of the result.
        out: DType,
    },
    /// x [B, L, C], dy [B, L', H] → [H, k·C] in `out`: dyᵀ times [`Op::Im2col`] of x, the gradient of [`Op::Conv`] for the weight.
    ConvGradWeight {
        /// As that of the convolution.
        window: Window,
        /// Element type of the result.
        out: DType,
    },
    /// table [V, C], ids u32 `[N]` → [N, C] in the table's element type: row `ids[n]`.
    Gather {
        /// An id whose row gets no gradient (its row is read like any other).
        padding: Option<u32>,
    },
    /// ids u32 `[N]`, dy [N, C] → [V, C]: row v is the sum of `dy[n]` over `ids[n] = v` in the order of n; zero for `padding`.
    GatherGrad {
        /// V.
        rows: usize,
        /// An id whose row gets no gradient.
        padding: Option<u32>,
    },
    /// x → `[C]`: sum over rows.
    SumRows,
    /// x → `[rows]`: sum over columns.
    SumCols,
    /// x (f32 or f16) → the largest element of each row `[rows]`, and its column `[rows]`, as f32. Of equal elements the first counts; NaN is
    /// larger than all numbers. Neither has a gradient.
    RowMax,
    /// x (f32 or f16) → like x: exp(x) / Σ exp(x) over the columns of each row, or its logarithm.
    ///
    /// A column of −∞ has probability 0. A row with NaN, with +∞ or with nothing but −∞ has no softmax: it is NaN.
    Softmax {
        /// Whether the result is the logarithm.
        log: bool,
    },
    /// y (from [`Op::Softmax`]), dy → dx like y: y·(dy − Σ_c dy·y), or dy − exp(y)·Σ_c dy for the logarithm.
    SoftmaxGrad {
        /// As that of the softmax.
        log: bool,
    },
    /// qkv [B, L, 3·W], and if there is one mask `[B·L]` → y [B, L, W] like qkv, statistics [2, B·heads·L].
    /// Of head h, with q, k and v its d = W / heads columns of the three parts of qkv, y_i = Σ_j p_ij·v_j with
    /// p_ij = exp(s_ij) / Σ_j exp(s_ij) and s_ij = scale·q_i·k_j, over the keys j that query i sees: those whose mask is not 0 and, if causal,
    /// j ≤ i. y_i is 0 where there are none, or where all of their scores are −∞.
    ///
    /// The statistics of query i, element (b·heads + h)·L + i of their rows, are the largest score and 1 / Σ_j exp(s_ij − largest), both 0 where
    /// y_i is 0 for that reason. A score of NaN or +∞ makes y_i NaN.
    ///
    /// Keys and values that the mask leaves out are not used, whatever they hold, and their gradients are 0. A value that only `causal` hides
    /// from a query must be finite: 0·NaN and 0·∞ are NaN. The mask has no gradient.
    Attention(AttentionOptions),
    /// qkv, y, statistics (both from [`Op::Attention`]), dy, and if there is one mask → dqkv like qkv.
    /// With D_i = dy_i·y_i and g_ij = p_ij·(dy_i·v_j − D_i): dq_i = scale·Σ_j g_ij·k_j, dk_j = scale·Σ_i g_ij·q_i, dv_j = Σ_i p_ij·dy_i.
    AttentionGrad(AttentionOptions),
    /// q [B, Lq, W], kv [B, Lk, 2·W], and if there is one mask `[B·Lk]` → y like q, statistics [2, B·heads·Lq], as [`Op::Attention`].
    CrossAttention(AttentionOptions),
    /// q, kv, y, statistics, dy, and if there is one mask → dq like q, dkv like kv, as [`Op::AttentionGrad`].
    CrossAttentionGrad(AttentionOptions),
    /// x → `[1]`: sum over everything.
    SumAll,
    /// x [rows, C] → [rows / period, C] like x: sum over each run of `period` rows.
    SumGroups {
        /// Rows added into one.
        period: usize,
    },
    /// x [.., C] (f32 or f16) → [rows, C] in f32: row t is the sum of the rows of x whose number is t modulo `period`, and zero from
    /// `period` on.
    SumTiles {
        /// Distance of the rows that are added.
        period: usize,
        /// Rows of the result, at least `period`.
        rows: usize,
    },
    /// x [B, L, C] (f32 or f16), mask [B·L] → [B, C] like x: Σ_t mask·x / max(Σ_t mask, 1). NaN where x is NaN or infinite at a step that the mask
    /// leaves out, since 0·NaN and 0·∞ are NaN; NaN in a mask makes its whole sample NaN.
    MaskedMean,
    /// dy [B, C], mask [B·L] → [B, L, C] like dy: mask·dy / max(Σ_t mask, 1).
    MaskedMeanGrad {
        /// L.
        time: usize,
    },
    /// scalars `[1]` … → `[n]`: side by side.
    Stack,
    /// y [B, E], t [B, E] → loss `[1]`, cosine `[1]`, mse `[1]`, rows [B, 4].
    /// cosine = mean_b cos(y, t) with norms at least 1e-6, mse = mean (y − t)², loss = alpha·(1 − cosine) + beta·mse;
    /// rows holds y·t, ‖y‖, ‖t‖ (both at least 1e-6) and Σ (y − t)² of each sample.
    KdLoss {
        /// Weight of the cosine term.
        alpha: f32,
        /// Weight of the squared error.
        beta: f32,
    },
    /// y, t, rows (from [`Op::KdLoss`]), dloss `[1]` → dy like y:
    /// dloss·( −alpha/B·(t/(‖y‖‖t‖) − (y·t)·y/(‖y‖³‖t‖)) + beta·2(y − t)/(B·E) ).
    /// Where ‖y‖ is its lower bound of 1e-6 it is constant, and the term with ‖y‖³ is left out.
    KdLossGrad {
        /// Weight of the cosine term.
        alpha: f32,
        /// Weight of the squared error.
        beta: f32,
    },
    /// logits [N, V], targets u32 `[N]` → loss `[1]`, count `[1]`, rows [2, N]: logsumexp, then the loss of each row (0 where ignored).
    /// Row loss = lse − (1 − s)·`x[target]` − s·mean(x); loss = Σ / max(count, 1) over targets that are not `ignore`.
    ///
    /// A logit of −∞ masks its class: its probability and, with s = 0, its gradient are 0. The loss is +∞ where the class is the target or
    /// where s > 0. A row with NaN, with +∞ or with nothing but −∞ has no softmax: its logsumexp, loss and gradient are NaN.
    CrossEntropy {
        /// A target that does not count.
        ignore: Option<u32>,
        /// Label smoothing s in [0, 1).
        smoothing: f32,
    },
    /// logits, targets, rows, count, dloss `[1]` → dlogits like logits:
    /// dloss/max(count, 1)·(softmax − (1 − s)·onehot − s/V), zero where ignored.
    CrossEntropyGrad {
        /// A target that does not count.
        ignore: Option<u32>,
        /// Label smoothing s in [0, 1).
        smoothing: f32,
    },
    /// x [.., D], weight [V, D], targets u32 `[N]`, and if there is one bias `[V]` → as [`Op::CrossEntropy`] of the logits
    /// x·weightᵀ + bias, N being the rows of x.
    LinearCrossEntropy(LinearCrossEntropy),
    /// x, weight, targets, rows, count (both from [`Op::LinearCrossEntropy`]), dloss `[1]`, and if there is one bias →
    /// dx [.., D] = dlogits·weight, dweight [V, D] = dlogitsᵀ·x in f32, and with a bias dbias `[V]` = Σ_n dlogits in f32;
    /// dlogits as in [`Op::CrossEntropyGrad`].
    LinearCrossEntropyGrad {
        /// As that of the loss.
        layer: LinearCrossEntropy,
        /// Element type of dx.
        dx: DType,
    },
    /// gradients (any number, f32) → `[1]`: √ Σ g².
    GlobalNorm,
    /// gradients (one per parameter, f32), hyper `[3]` → nothing; updates `params`, their moments m and v and their bias corrections c1
    /// and c2 in place. All of these begin as zero, and a session keeps them for each parameter.
    /// hyper = lr, scale, apply. Nothing changes when apply is 0; else with g = scale·gradient and r = lr·lr_scale:
    /// m ← β1·m + (1 − β1)·g, v ← β2·v + (1 − β2)·g², c1 ← β1·c1 + (1 − β1), c2 ← β2·c2 + (1 − β2),
    /// p ← p − r·wd·p − r·(m/c1)/(√(v/c2) + eps). After t updates of a parameter, c1 = 1 − β1ᵗ and c2 = 1 − β2ᵗ.
    /// Loshchilov & Hutter, arXiv:1711.05101.
    AdamW {
        /// The parameters, in the order of the gradients.
        params: Vec<ValueId>,
        /// β1
        beta1: f32,
        /// β2
        beta2: f32,
        /// Added to √v̂.
        eps: f32,
        /// Learning-rate factor and weight decay of each parameter, in the same order.
        rates: Vec<Rates>,
    },
    /// gradients (one per parameter, f32), weight `[1]` → nothing. Adds weight·gradient to the sum that the session keeps for each of
    /// `params`, which begins as zero.
    Accumulate {
        /// The parameters, in the order of the gradients.
        params: Vec<ValueId>,
    },
    /// nothing → the sum that has been accumulated for each of `params`, f32. It is zero again when the run ends.
    TakeAccumulated {
        /// The parameters, in the order of the results.
        params: Vec<ValueId>,
    },
    /// value → nothing. The state takes the value when the run ends. So every node and reshape that was declared before sees the old one.
    Assign {
        /// The state.
        state: ValueId,
    },
}

impl Op {
    /// The name in errors and listings: `relu`, `add`, `matmul`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Unary(op) => op.name(),
            Self::Binary(op, _) => op.name(),
            Self::Cast(_) => "cast",
            Self::Dropout { .. } => "dropout",
            Self::Reshape => "reshape",
            Self::MatMul { .. } => "matmul",
            Self::LayerNorm { .. } => "layer_norm",
            Self::LayerNormGrad => "layer_norm_grad",
            Self::LayerNormParamGrad => "layer_norm_param_grad",
            Self::Im2col(_) => "im2col",
            Self::Col2im(_) => "col2im",
            Self::Conv { .. } => "conv",
            Self::ConvGradInput { .. } => "conv_grad_input",
            Self::ConvGradWeight { .. } => "conv_grad_weight",
            Self::Gather { .. } => "gather",
            Self::GatherGrad { .. } => "gather_grad",
            Self::SumRows => "sum_rows",
            Self::SumCols => "sum_cols",
            Self::RowMax => "row_max",
            Self::Softmax { log: false } => "softmax",
            Self::Softmax { log: true } => "log_softmax",
            Self::SoftmaxGrad { log: false } => "softmax_grad",
            Self::SoftmaxGrad { log: true } => "log_softmax_grad",
            Self::Attention(_) => "attention",
            Self::AttentionGrad(_) => "attention_grad",
            Self::CrossAttention(_) => "cross_attention",
            Self::CrossAttentionGrad(_) => "cross_attention_grad",
            Self::SumAll => "sum_all",
            Self::SumGroups { .. } => "sum_groups",
            Self::SumTiles { .. } => "sum_tiles",
            Self::MaskedMean => "masked_mean",
            Self::MaskedMeanGrad { .. } => "masked_mean_grad",
            Self::Stack => "stack",
            Self::KdLoss { .. } => "kd_loss",
            Self::KdLossGrad { .. } => "kd_loss_grad",
            Self::CrossEntropy { .. } => "cross_entropy",
            Self::CrossEntropyGrad { .. } => "cross_entropy_grad",
            Self::LinearCrossEntropy(_) => "linear_cross_entropy",
            Self::LinearCrossEntropyGrad { .. } => "linear_cross_entropy_grad",
            Self::GlobalNorm => "global_norm",
            Self::AdamW { .. } => "adamw",
            Self::Accumulate { .. } => "accumulate",
            Self::TakeAccumulated { .. } => "take_accumulated",
            Self::Assign { .. } => "assign",
        }
    }

    /// How operand `i` of an elementwise operation meets the result.
    pub(crate) fn broadcast_of(&self, i: usize) -> Broadcast {
        match (self, i) {
            (Self::Binary(_, broadcast), 1) => *broadcast,
            (Self::Dropout { .. }, 1) => Broadcast::Scalar,
            _ => Broadcast::Same,
        }
    }

    /// Parameters that the operation changes.
    pub(crate) fn updated(&self) -> &[ValueId] {
        match self {
            Self::AdamW { params, .. } => params,
            _ => &[],
        }
    }

    /// Parameters whose accumulated gradients the operation changes.
    pub(crate) fn accumulated(&self) -> &[ValueId] {
        match self {
            Self::Accumulate { params } | Self::TakeAccumulated { params } => params,
            _ => &[],
        }
    }

    /// Whether the operation changes something that outlives the run.
    pub(crate) fn has_effect(&self) -> bool {
        matches!(
            self,
            Self::AdamW { .. }
                | Self::Assign { .. }
                | Self::Accumulate { .. }
                | Self::TakeAccumulated { .. }
        )
    }
}
