//! The k best numbers of every row, by pieces, as often as it takes until there is one piece.

use super::{Kernel, Target, View};
use crate::gpu::Layout;

/// Invocations of a workgroup.
const SIZE: usize = 256;
/// Numbers that a workgroup ranks against each other, so that they and their indices fit half of WebGPU's workgroup memory.
const LISTED: usize = 1024;
/// Numbers of an invocation with workgroup memory.
const MOST_EACH: usize = 16;
/// Numbers of a piece without workgroup memory, unless k asks for more.
const SPAN: usize = 256;

/// Which numbers a workgroup looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TopK {
    k: usize,
    /// Numbers of an invocation; 0 without workgroup memory.
    each: usize,
    /// Numbers of a piece.
    span: usize,
}

impl TopK {
    /// The largest k. A row of pieces gets shorter because a piece has at least twice as many numbers, and Mesa's software driver ends the
    /// loops of an invocation after 65 535 iterations.
    pub const MOST: usize = 4096;

    /// For `k` in `1..=MOST`.
    pub fn new(k: usize, target: Target) -> Self {
        if target.barrier_free || k > SIZE {
            return Self {
                k,
                each: 0,
                span: SPAN.max(2 * k),
            };
        }
        let each = (LISTED / k).clamp(1, MOST_EACH);
        Self {
            k,
            each,
            span: SIZE * each,
        }
    }

    /// Pieces of a row of so many numbers.
    pub fn pieces(&self, cols: usize) -> usize {
        cols.div_ceil(self.span)
    }

    /// x [rows, n], f32; the number of columns that are filled, u32 `[1]` → the k best of every piece, [rows, pieces · k], and their columns.
    pub fn first(&self, x: Layout, filled: Layout, [y, index]: [Layout; 2]) -> Kernel {
        self.kernel(x, true)
            .read("x", x, View::Scalar)
            .read("filled", filled, View::Scalar)
            .write("y", y, View::Scalar)
            .write("place", index, View::Scalar)
    }

    /// As [`TopK::first`], of numbers x whose indices are `from`.
    pub fn next(&self, [x, from]: [Layout; 2], [y, index]: [Layout; 2]) -> Kernel {
        self.kernel(x, false)
            .read("x", x, View::Scalar)
            .read("earlier", from, View::Scalar)
            .write("y", y, View::Scalar)
            .write("place", index, View::Scalar)
    }

    fn kernel(&self, x: Layout, first: bool) -> Kernel {
        let pieces = self.pieces(x.cols());
        let tasks = x.rows() * pieces;
        let kernel = match self.each {
            0 => Kernel::new("top_k_direct")
                .items(tasks * self.span, 64)
                .with("span", self.span),
            each => Kernel::new("top_k")
                .groups(tasks)
                .with("size", SIZE)
                .with("each", each),
        };
        kernel
            .with("k", self.k)
            .with("first", first)
            .with("rows", x.rows())
            .with("cols", x.cols())
            .with("pieces", pieces)
            .flops(x.len() as f64)
    }
}
