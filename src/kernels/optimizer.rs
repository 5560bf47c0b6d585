//! Kernels over stretches of the flat arenas: norm, accumulation and AdamW.

use super::{BLOCK, Instruction, Kernel, Operand, Program, Target, View, elementwise};
use crate::error::Result;
use crate::gpu::{Alignment, Layout};
use crate::types::{BinaryOp, Broadcast, DType, Rates};

/// `vec4`s per page; see `compile/steps.rs`.
const PAGE: usize = 32;

const SIZE: usize = 64;
/// Invocations that share a partial sum of squares, and its `vec4`s.
fn norm_shares(target: Target) -> (usize, usize) {
    match target.barrier_free {
        true => (1, BLOCK * BLOCK),
        false => (256, 4096),
    }
}

/// Number of partial sums that [`norm_partial`] writes for a run of `elements`.
pub(crate) fn norm_parts(elements: usize, target: Target) -> usize {
    (elements / 4).div_ceil(norm_shares(target).1)
}

/// Squares of `x` `[n]` → elements `first..` of `parts`.
pub(crate) fn norm_partial(x: Layout, parts: Layout, first: usize, target: Target) -> Kernel {
    let count = x.row_stride() / 4;
    let groups = norm_parts(x.row_stride(), target);
    let (lanes, each) = norm_shares(target);
    let together = if target.barrier_free { 4 } else { 1 };
    Kernel::new("norm_partial")
        .items(groups * lanes, together * lanes)
        .with("lanes", lanes)
        .with("cols", 4)
        .with("count", count)
        .with("each", each)
        .with("block", BLOCK)
        .with("parts", groups)
        .with("first", first)
        .with("last", first + groups == parts.cols())
        .read("x", x, View::Vec4)
        .write("y", parts, View::Scalar)
        .flops(2.0 * x.len() as f64)
}

/// Constants of AdamW that are the same for all parameters.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdamWConstants {
    pub beta1: f32,
    pub beta2: f32,
    pub eps: f32,
}

/// Rates that hold from element `start`, a multiple of 4, of a run up to the next stretch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Stretch {
    pub start: usize,
    pub rates: Rates,
}

/// Upper bound on the stretches of one dispatch: every `vec4` is compared with the start of each.
pub(crate) const STRETCHES: usize = 32;

/// Where the bias corrections of a run lie: two elements per page, from page `first` on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Corrections {
    pub layout: Layout,
    pub first: usize,
}

/// hyper → the bias corrections of `pages` pages in place: c ← β·c + (1 − β), unless the step is skipped.
pub(crate) fn corrections(
    hyper: Layout,
    corrections: Corrections,
    pages: usize,
    options: AdamWConstants,
) -> Kernel {
    let (beta1, beta2) = (f64::from(options.beta1), f64::from(options.beta2));
    Kernel::new("corrections")
        .items(pages, SIZE)
        .with("count", pages)
        .with("first", corrections.first)
        .with("beta1", beta1)
        .with("one_minus_beta1", 1.0 - beta1)
        .with("beta2", beta2)
        .with("one_minus_beta2", 1.0 - beta2)
        .read("hyper", hyper, View::Scalar)
        .write("c", corrections.layout, View::Scalar)
}

/// g, hyper, corrections → p, m, v in place, over runs of equal layout, and p rounded to f16 where there is a `shadow`.
/// The first of `stretches` (1 to [`STRETCHES`], in order) starts at 0.
///
/// Parameters with different rates alternate in the arenas, as weights and biases do. One dispatch handles several
/// stretches, because a dispatch per stretch would cost more than the comparisons, which hide behind the memory traffic.
pub(crate) fn adamw(
    [run, hyper]: [Layout; 2],
    corrections: Corrections,
    shadow: Option<Layout>,
    options: AdamWConstants,
    stretches: &[Stretch],
) -> Kernel {
    let count = run.row_stride() / 4;
    let (beta1, beta2) = (f64::from(options.beta1), f64::from(options.beta2));
    let decays = stretches
        .iter()
        .map(|stretch| f64::from(stretch.rates.weight_decay));
    let scales = stretches
        .iter()
        .map(|stretch| f64::from(stretch.rates.lr_scale));
    let starts = stretches.iter().map(|stretch| stretch.start / 4);
    let same_rate = scales.clone().all(|scale| scale == 1.0);
    let kernel = Kernel::new("adamw")
        .items(count, SIZE)
        .with("count", count)
        .with("beta1", beta1)
        .with("one_minus_beta1", 1.0 - beta1)
        .with("beta2", beta2)
        .with("one_minus_beta2", 1.0 - beta2)
        .with("eps", f64::from(options.eps))
        .with("starts", starts.collect::<Vec<_>>())
        .with("decays", decays.collect::<Vec<_>>())
        .with("scales", scales.collect::<Vec<_>>())
        .with("same_rate", same_rate)
        .read("g", run, View::Vec4)
        .read("hyper", hyper, View::Scalar)
        .read("c", corrections.layout, View::Scalar)
        .with("first", corrections.first)
        .with("page", PAGE)
        .write("p", run, View::Vec4)
        .write("m", run, View::Vec4)
        .write("v", run, View::Vec4)
        .with("shadow", shadow.is_some())
        .flops(14.0 * run.len() as f64);
    match shadow {
        Some(shadow) => kernel.write("shadow", shadow, View::Vec4),
        None => kernel,
    }
}

/// What gradients are multiplied by before they are added up.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Weight {
    Constant(f32),
    Value(Layout),
}

/// g, (weight) → sum ← sum + weight·g, over runs of equal layout.
pub(crate) fn accumulate(run: Layout, weight: Weight, target: Target) -> Kernel {
    let operand = |layout, broadcast| Operand { layout, broadcast };
    let mut operands = vec![operand(run, Broadcast::Same)];
    let weight = match weight {
        Weight::Constant(number) => Instruction::Constant(number),
        Weight::Value(layout) => {
            operands.push(operand(layout, Broadcast::Scalar));
            Instruction::Load(1)
        }
    };
    let program = Program {
        rows: 1,
        cols: run.cols(),
        operands,
        instructions: vec![
            Instruction::Present(0),
            Instruction::Load(0),
            weight,
            Instruction::Binary(BinaryOp::Mul, 1, 2),
            Instruction::Binary(BinaryOp::Add, 0, 3),
        ],
        results: vec![(4, run)],
    };
    elementwise::elementwise(program, target)
}

/// `elements` of a block of parameters → their shadow.
pub(crate) fn shadow(elements: usize, target: Target) -> Result<Kernel> {
    let vector = |dtype| Layout::new(1, elements, dtype, Alignment::Bytes16);
    let parameters = Operand {
        layout: vector(DType::F32)?,
        broadcast: Broadcast::Same,
    };
    let program = Program {
        rows: 1,
        cols: elements,
        operands: vec![parameters],
        instructions: vec![Instruction::Load(0)],
        results: vec![(0, vector(DType::F16)?)],
    };
    Ok(elementwise::elementwise(program, target))
}
