//! Sums of parts: the second pass of products with a split K and of sums over many rows.

use super::{Kernel, View};
use crate::gpu::Layout;

const SIZE: usize = 64;

/// One result: row r < rows is the sum of rows first + r, first + rows + r, first + 2·rows + r, … of the source; further rows are zero.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sum {
    /// Index of the source.
    pub source: usize,
    /// Its first row.
    pub first: usize,
    /// Number of summands.
    pub parts: usize,
    /// Rows of the result that have summands.
    pub rows: usize,
    /// Index of the buffer that holds the result.
    pub result: usize,
    /// Offset of the result in that buffer, in bytes.
    pub offset: u64,
    /// Layout of the result.
    pub layout: Layout,
}

/// sources, f32 → results. Each result is a whole buffer or a part of one.
pub(crate) fn sum_parts(sums: &[Sum], sources: &[Layout], results: &[Layout]) -> Kernel {
    const SOURCES: [&str; 7] = ["s0", "s1", "s2", "s3", "s4", "s5", "s6"];
    const RESULTS: [&str; 7] = ["q0", "q1", "q2", "q3", "q4", "q5", "q6"];
    let mut begin = 0;
    let mut flops = 0;
    let mut segments = Vec::with_capacity(sums.len());
    for sum in sums {
        let layout = sum.layout;
        let (all, width) = (layout.rows(), layout.row_stride() / 4);
        let element = layout.dtype().size();
        segments.push(vec![
            sum.source,
            sum.first,
            sum.parts,
            layout.cols().div_ceil(4),
            sum.result,
            sum.offset as usize / (4 * element),
            width,
            sum.rows,
            width,
            all,
            begin,
        ]);
        begin += (all * width).next_multiple_of(SIZE);
        flops += sum.parts * sum.rows * layout.cols();
    }
    let mut kernel = Kernel::new("sum_parts")
        .items(begin, SIZE)
        .with("segments", segments)
        .flops(flops as f64);
    for (name, layout) in SOURCES.into_iter().zip(sources) {
        kernel = kernel.read(name, *layout, View::Vec4);
    }
    for (name, layout) in RESULTS.into_iter().zip(results) {
        kernel = kernel.write(name, *layout, View::Vec4);
    }
    kernel
}
