//! Grids and indices of the largest layouts there are.

use super::super::corners;
use crate::error::Result;
use crate::gpu::{Alignment, Layout};
use crate::kernels::embedding::{Rows, Search};
use crate::kernels::loss::{Count, CrossEntropyKernel};
use crate::kernels::optimizer::Stretch;
use crate::kernels::reduce::{ColumnSums, GroupSums, Mask, RowSums};
use crate::kernels::{
    Instruction, Kernel, Operand, Program, Target, conv, elementwise, embedding, layer_norm, loss,
    optimizer, reduce,
};
use crate::types::{BinaryOp, Broadcast, DType, Rates, Window};

const ROWS: usize = (1 << 26) - 1;

fn matrix(rows: usize, cols: usize, dtype: DType) -> Result<Layout> {
    Layout::new(rows, cols, dtype, Alignment::Bytes64)
}

fn vector(n: usize, dtype: DType) -> Result<Layout> {
    Layout::new(1, n, dtype, Alignment::Bytes16)
}

/// Adds a value of its own layout to what a kernel yields.
fn add(layout: Layout) -> Program {
    Program {
        rows: layout.rows(),
        cols: layout.cols(),
        operands: vec![Operand {
            layout,
            broadcast: Broadcast::Same,
        }],
        instructions: vec![
            Instruction::Sum,
            Instruction::Load(0),
            Instruction::Binary(BinaryOp::Add, 0, 1),
        ],
        results: vec![(2, layout)],
    }
}

fn kernels(target: Target) -> Result<Vec<Kernel>> {
    let f32s = DType::F32;
    let tall = matrix(ROWS, 1, f32s)?;
    let halves = matrix(ROWS, 1, DType::F16)?;
    let four = matrix(ROWS, 4, f32s)?;
    let square = matrix((1 << 15) - 1, 1 << 15, f32s)?;
    let long = vector((1 << 30) - 16, f32s)?;
    let [one, three, unit] = [vector(1, f32s)?, vector(3, f32s)?, vector(4, f32s)?];
    let each = vector(ROWS, f32s)?;
    let ids = vector(ROWS, DType::U32)?;
    let pair = matrix(2, ROWS, f32s)?;
    let statistics = matrix(3, ROWS, f32s)?;
    let window = Window::causal(3, 2, 1)?;
    let mut all = Vec::new();
    for layout in [tall, halves, square, long] {
        all.push(elementwise::elementwise(add(layout), target));
    }
    for layout in [tall, square, long] {
        let sums = ColumnSums::new(layout.cols(), target);
        let chunks = sums.chunks(layout.rows(), layout.cols());
        let parts = match chunks {
            1 => vector(layout.cols(), f32s)?,
            _ => matrix(chunks, layout.cols(), f32s)?,
        };
        all.push(sums.sums(layout, parts));
    }
    let rows = RowSums::new(tall, target);
    assert_eq!(rows.pieces, 1);
    all.push(rows.sums(tall, each));
    for mask in [Mask::None, Mask::Weighs(each)] {
        let period = 1;
        all.push(GroupSums { period, mask }.last(tall, add(tall), target));
    }
    all.push(reduce::masked_mean_grad(tall, each, add(tall)));
    all.push(layer_norm::layer_norm(
        [tall, one, one],
        statistics,
        1e-5,
        add(tall),
        target,
    ));
    all.push(layer_norm::layer_norm_grad(
        [tall, one, statistics, tall],
        add(tall),
        target,
    ));
    all.push(loss::kd_rows(tall, tall, four, target));
    all.push(loss::kd_grad(
        [tall, tall, four, one],
        [0.5, 0.5],
        add(tall),
    ));
    for logits in [tall, halves] {
        let entropy = CrossEntropyKernel {
            ignore: Some(3),
            smoothing: 0.1,
        };
        all.push(entropy.rows(logits, ids, pair, target));
        all.push(entropy.grad([logits, ids, pair, one, one], add(logits)));
        let store = Program {
            operands: Vec::new(),
            instructions: vec![Instruction::Sum],
            results: vec![(0, logits)],
            ..add(logits)
        };
        let layouts = [logits, ids, pair, one];
        all.push(entropy.value_grad(layouts, Count::Value(one), store, false, target));
    }
    all.push(embedding::gather(tall, ids, add(tall)));
    let links = vector(2 * ROWS, DType::U32)?;
    all.push(embedding::gather_grad([ids, links, tall], tall));
    // Keys hold an id and a place, so that a small table may be read from many places.
    if let Search::Sort(run) = embedding::search(30, ROWS, target) {
        let sorted = vector(ROWS.next_multiple_of(run), DType::U32)?;
        all.push(embedding::sort(ids, sorted, run));
        all.push(embedding::merge(ids, [sorted; 2], run, true));
        let left = 2 * embedding::blocks(ROWS);
        let left = [vector(left, DType::U32)?, matrix(left, 1, f32s)?];
        let rows = Rows::Places([ids, sorted, tall]);
        let table = matrix(30, 1, f32s)?;
        all.push(embedding::segments(rows, ROWS, table, Some(left), None));
    }
    // 3 steps of a sample.
    let steps = matrix(ROWS / 3 * 3, 4, f32s)?;
    let columns = matrix(ROWS / 3 * 3, 8, f32s)?;
    let single = matrix(ROWS / 3 * 3, 1, f32s)?;
    all.push(conv::im2col(steps, window, add(columns)));
    all.push(conv::im2col(
        single,
        window,
        add(matrix(single.rows(), 2, f32s)?),
    ));
    all.push(conv::col2im(columns, window, add(steps)));
    let options = optimizer::AdamWConstants {
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-8,
    };
    let rates = Rates::decay(0.1);
    let corrections = optimizer::Corrections {
        layout: vector(2 * (long.cols().div_ceil(128) + 31), f32s)?,
        first: 31,
    };
    let pages = long.cols().div_ceil(128);
    all.push(optimizer::corrections(three, corrections, pages, options));
    all.push(optimizer::adamw(
        [long, three],
        corrections,
        Some(vector(long.cols(), DType::F16)?),
        options,
        &[Stretch { start: 0, rates }],
    ));
    let parts = vector(optimizer::norm_parts(long.cols(), target), f32s)?;
    all.push(optimizer::norm_partial(long, parts, 0, target));
    all.push(reduce::stack(&[one, one], 0, unit));
    Ok(all)
}

#[test]
fn the_largest_layouts_fit_grids_and_indices() -> Result<()> {
    for barrier_free in [true, false] {
        let target = Target {
            f16: true,
            barrier_free,
            matrix_units: None,
            invocations: 256,
            cores: 132,
        };
        for kernel in kernels(target)? {
            let grid = kernel.workgroups();
            let what = format!(
                "{} {grid:?}, barrier-free {barrier_free}",
                kernel.key(target)
            );
            assert!(
                grid.into_iter().all(|n| (1..=65_535).contains(&n)),
                "{what}"
            );
            let faults = corners(&kernel, target);
            assert!(faults.is_empty(), "{what}: {}", faults[0]);
        }
    }
    Ok(())
}
