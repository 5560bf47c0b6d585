//! Elementwise functions, broadcasts and orientations of operands.

/// A function of one element. NaN gives NaN, except for [`UnaryOp::IsFinite`], and infinities give the limit; the same holds for the
/// derivative. Subnormal numbers may be taken for zero, and cosines are accurate for |x| ≤ 1e4.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum UnaryOp {
    /// x
    Identity,
    /// scale·x + offset
    Affine {
        /// Factor.
        scale: f32,
        /// Summand.
        offset: f32,
    },
    /// x limited to [min, max]
    Clamp {
        /// Lower bound.
        min: f32,
        /// Upper bound.
        max: f32,
    },
    /// |x|
    Abs,
    /// x²
    Square,
    /// √x
    Sqrt,
    /// 1/√x
    Rsqrt,
    /// 1/x
    Recip,
    /// eˣ
    Exp,
    /// ln x
    Log,
    /// cos x
    Cos,
    /// tanh x
    Tanh,
    /// 1/(1 + e⁻ˣ)
    Sigmoid,
    /// max(x, 0)
    Relu,
    /// GELU, tanh form: x/2·(1 + tanh(√(2/π)(x + 0.044715 x³))). Hendrycks & Gimpel, arXiv:1606.08415.
    GeluTanh,
    /// GELU, exact form: x/2·(1 + erf(x/√2)). Hendrycks & Gimpel, arXiv:1606.08415.
    GeluErf,
    /// x. Its derivative is 0 everywhere: no gradient passes through it.
    Detach,
    /// 1 where x is neither infinite nor NaN, else 0. Its derivative is 0 everywhere: no gradient passes through a test.
    IsFinite,
}

impl UnaryOp {
    /// The name in errors and listings.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.names()[0]
    }

    /// The names of the function and of its derivative.
    fn names(self) -> [&'static str; 2] {
        match self {
            Self::Identity => ["identity", "identity_grad"],
            Self::Affine { .. } => ["affine", "affine_grad"],
            Self::Clamp { .. } => ["clamp", "clamp_grad"],
            Self::Abs => ["abs", "abs_grad"],
            Self::Square => ["square", "square_grad"],
            Self::Sqrt => ["sqrt", "sqrt_grad"],
            Self::Rsqrt => ["rsqrt", "rsqrt_grad"],
            Self::Recip => ["recip", "recip_grad"],
            Self::Exp => ["exp", "exp_grad"],
            Self::Log => ["log", "log_grad"],
            Self::Cos => ["cos", "cos_grad"],
            Self::Tanh => ["tanh", "tanh_grad"],
            Self::Sigmoid => ["sigmoid", "sigmoid_grad"],
            Self::Relu => ["relu", "relu_grad"],
            Self::GeluTanh => ["gelu_tanh", "gelu_tanh_grad"],
            Self::GeluErf => ["gelu_erf", "gelu_erf_grad"],
            Self::Detach => ["detach", "detach_grad"],
            Self::IsFinite => ["is_finite", "is_finite_grad"],
        }
    }
}

/// A function of two elements. The second operand may be broadcast.
///
/// NaN in either operand gives NaN, except for [`BinaryOp::Greater`]. So a product with a mask is NaN where x is NaN or infinite, even if
/// the mask is 0 there, as in PyTorch.
///
/// The result has the element type of the first operand. Both operands have one element type, with these exceptions: a vector that
/// is broadcast (a bias, a mask, a scalar: [`Broadcast::Cols`], [`Broadcast::Rows`], [`Broadcast::Scalar`]) may be f32 beside f16 or f16
/// beside f32; a constant, which is always f32, may meet either type; and so may the gradient of [`BinaryOp::UnaryGrad`].
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum BinaryOp {
    /// a + b
    Add,
    /// a − b
    Sub,
    /// a·b
    Mul,
    /// a/b
    Div,
    /// the larger
    Max,
    /// the smaller
    Min,
    /// 1 where a > b, else 0, also where one of them is NaN. Its derivative is 0 for both operands everywhere: no gradient passes
    /// through a comparison.
    Greater,
    /// f′(a)·b: the derivative of a unary function at a, times the incoming gradient b. Where f has a kink, f′ is 0 for `Abs` and `Relu` and
    /// 1 for `Clamp`.
    UnaryGrad(UnaryOp),
}

impl BinaryOp {
    /// The name in errors and listings.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Sub => "sub",
            Self::Mul => "mul",
            Self::Div => "div",
            Self::Max => "max",
            Self::Min => "min",
            Self::Greater => "greater",
            Self::UnaryGrad(op) => op.names()[1],
        }
    }
}

/// Which element of the second operand meets element (r, c) of the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Broadcast {
    /// (r, c): same rows and columns.
    Same,
    /// c of a vector `[C]`: a bias.
    Cols,
    /// r of a vector `[rows]`: a mask.
    Rows,
    /// The only element of `[1]`.
    Scalar,
    /// (r / period, c) of a matrix [rows / period, C]: one row per sample, the same for all of its time steps.
    Groups {
        /// Rows that share one row of the operand.
        period: usize,
    },
    /// (r mod period, c) of a matrix [period, C]: one row per time step, the same for all samples. An operand that is not computed, such as
    /// a table of positions, may have more rows, which are not read.
    Tiles {
        /// Rows of the operand that are read.
        period: usize,
    },
}

/// Which operands of a matrix product are stored transposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Trans {
    /// A [M, K] · B [K, N]
    NN,
    /// A [M, K] · B [N, K]ᵀ: a linear layer, weights as in PyTorch.
    NT,
    /// A [K, M]ᵀ · B [K, N]: a weight gradient.
    TN,
}

/// How fast the operation `AdamW` changes one parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Factor on the learning rate, at least 0.
    pub lr_scale: f32,
    /// Decoupled weight decay wd, at least 0.
    pub weight_decay: f32,
}

impl Rates {
    /// The learning rate as it is, with this weight decay.
    #[must_use]
    pub fn decay(weight_decay: f32) -> Self {
        Self {
            lr_scale: 1.0,
            weight_decay,
        }
    }
}
