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
    /// 1 where x is neither infinite nor NaN, else 0; its derivative is 0
    IsFinite,
}

/// A function of two elements. The second operand may be broadcast. NaN in either operand gives NaN, except for
/// [`BinaryOp::Greater`]. So a product with a mask is NaN where x is NaN or infinite, even if the mask is 0 there, as in PyTorch.
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
    /// 1 where a > b, else 0, also where one of them is NaN; its derivative is 0
    Greater,
    /// f′(a)·b: the derivative of a unary function at a, times the incoming gradient. Where f has a kink, f′ is 0 for `Abs` and `Relu` and
    /// 1 for `Clamp`.
    UnaryGrad(UnaryOp),
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
    /// (r / period, c) of a matrix [rows / period, C]: one row for all time steps of a sample.
    Groups {
        /// Rows that share one row of the operand.
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
