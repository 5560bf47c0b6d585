//! Matrix products: in one pass, or summed in parts.

use super::{Lowering, Place};
use crate::error::Result;
use crate::gpu::Layout;
use crate::graph::{DType, Shape};
use crate::kernels::Program;
use crate::kernels::gemm::Gemm;

/// What a product reads and writes: its operands, then what its program does.
pub(super) struct Operands {
    pub ab: [Place; 2],
    pub loads: Vec<Place>,
    pub stores: Vec<Place>,
}

impl Lowering<'_> {
    pub(super) fn matmul(&mut self, gemm: Gemm, program: &Program, x: &Operands) -> Result<()> {
        let rest = [x.loads.as_slice(), &x.stores].concat();
        if gemm.splits == 1 {
            let places = [x.ab.as_slice(), &rest].concat();
            self.step(gemm.single(program.clone()), places);
            return Ok(());
        }
        let shape = Shape::matrix(gemm.splits * program.rows, program.cols);
        let partial = Layout::of(&shape, DType::F32)?;
        let place = self.scratch(partial);
        self.step(gemm.partial(partial), vec![x.ab[0], x.ab[1], place]);
        let kernel = gemm.add_up(partial, program.clone());
        self.step(kernel, [vec![place], rest].concat());
        Ok(())
    }
}
