//! Elementwise programs as kernels of their own, and copies.

use super::{Kernel, Program, Target, View};
use crate::gpu::Layout;
use crate::types::DType;

/// An invocation computes several `vec4`s if there are many, because starting an invocation costs more than computing a `vec4`.
pub(crate) fn elementwise(program: Program, target: Target) -> Kernel {
    let (rows, width) = (program.rows, program.width());
    let (size, each) = match rows * width {
        _ if target.barrier_free => (64, 1),
        items if items >= 1 << 20 => (256, 4),
        _ => (64, 1),
    };
    Kernel::new("elementwise")
        .items((rows * width).div_ceil(each), size)
        .with("each", each)
        .with("rows", rows)
        .with("width", width)
        .finish(program)
}

/// Copies the elements of x to y in row-major order. Both have the same number of elements and the same element type.
pub(crate) fn reshape(x: Layout, y: Layout) -> Kernel {
    const SIZE: usize = 64;
    let width = y.row_stride() / 4;
    let number = match x.dtype() {
        DType::U32 => "u32",
        _ => "f32",
    };
    Kernel::new("reshape")
        .items(y.rows() * width, SIZE)
        .with("rows", y.rows())
        .with("cols", y.cols())
        .with("width", width)
        .with("from", x.cols())
        .with("number", number)
        .read("x", x, View::Scalar)
        .write("y", y, View::Vec4)
}
