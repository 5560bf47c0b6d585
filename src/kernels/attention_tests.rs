//! Attention on matrix units translates to what Vulkan and Metal compile, on adapters that are not here.

use super::attention::{AttentionKernel, Operands};
use super::gemm::tests::translation::{target, translate, units};
use super::{Instruction, Kernel, Program, Target};
use crate::error::Result;
use crate::gpu::Layout;
use crate::types::{DType, Shape};

fn kernels(columns: usize, masked: bool, target: Target) -> Result<Vec<Kernel>> {
    let (batch, heads, queries, keys) = (2, 3, 37, 64);
    let attention = AttentionKernel {
        batch,
        heads,
        queries,
        keys,
        columns,
        causal: masked,
        scale: 0.25,
        packed: false,
    };
    let matrix = |rows: usize, cols: usize, dtype| Layout::of(&Shape::matrix(rows, cols), dtype);
    let vector = |n: usize| Layout::of(&Shape::vector(n), DType::F32);
    let q = matrix(batch * queries, heads * columns, DType::F16)?;
    let kv = matrix(batch * keys, 2 * heads * columns, DType::F16)?;
    let mask = masked.then(|| vector(batch * keys)).transpose()?;
    let (stats, dots) = (
        matrix(2, attention.total(), DType::F32)?,
        vector(attention.total())?,
    );
    let operands = Operands {
        q,
        kv: Some(kv),
        mask,
    };
    let program = Program {
        rows: q.rows(),
        cols: q.cols(),
        operands: Vec::new(),
        instructions: vec![Instruction::Sum],
        results: vec![(0, q)],
    };
    Ok(vec![
        attention.forward(operands, stats, program, target),
        attention.query_gradient(operands, [q, q, stats], [q, dots], target),
        attention.key_gradient(operands, [q, stats, dots], kv, target),
    ])
}

#[test]
fn attention_on_matrix_units_translates() -> Result<()> {
    for (size, lanes, scalar) in [(16, 32, false), (8, 8, false), (8, 32, true)] {
        let target = target(true, Some(units(size, lanes, scalar)));
        for (columns, masked) in [(32, false), (20, true), (64, true)] {
            for kernel in kernels(columns, masked, target)? {
                assert!(kernel.name().ends_with("_cooperative"), "{}", kernel.name());
                let translated = translate(&kernel, target, false);
                match scalar {
                    true => assert!(translated.metal.contains("simdgroup_multiply_accumulate")),
                    // OpCapability CooperativeMatrixKHR
                    false => assert!(translated.spirv.contains(&6022)),
                }
            }
        }
    }
    Ok(())
}
