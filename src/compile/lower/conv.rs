//! Convolutions: products that gather their windows while they load tiles, or, where a tap has not whole `vec4`s of columns, products
//! with a matrix of windows.

use super::Lowering;
use super::matmul::ProductPlaces;
use crate::compile::Place;
use crate::error::{Error, Result};
use crate::gpu::Layout;
use crate::graph::Op;
use crate::kernels::conv::{col2im, im2col};
use crate::kernels::gemm::Gemm;
use crate::kernels::gemm_windows::gathers;
use crate::kernels::{Instruction, Program};
use crate::types::{DType, Shape, Trans, Window};

impl Lowering<'_> {
    /// The step of a convolution or of one of its gradients; `layouts` and `x.ab` as in the operation.
    pub(crate) fn conv(
        &mut self,
        op: &Op,
        layouts: [Layout; 2],
        program: Program,
        mut x: ProductPlaces,
    ) -> Result<()> {
        let (target, width) = (self.target, program.width());
        let [first, second] = layouts;
        match *op {
            Op::ConvGradInput { window, .. } => {
                if gathers(first.cols()) && gathers(program.cols) {
                    let gemm = Gemm::conv_grad_input(window, layouts, width, target);
                    return self.matmul(gemm, &program, &x);
                }
                let columns = matrix(first.rows(), second.cols(), first.dtype())?;
                let place = self.scratch(columns);
                let gemm = Gemm::new(first, second, Trans::NN, columns.row_stride() / 4, target);
                let (loads, stores) = (Vec::new(), vec![place]);
                let product = ProductPlaces {
                    ab: x.ab,
                    loads,
                    stores,
                };
                self.matmul(gemm, &stored(columns), &product)?;
                let kernel = col2im(columns, window, program);
                self.step(kernel, [vec![place], x.loads, x.stores].concat())?;
                Ok(())
            }
            Op::ConvGradWeight { window, .. } => {
                x.ab.reverse();
                if gathers(first.cols()) {
                    let dy_x = [second, first];
                    let gemm = Gemm::conv_grad_weight(window, dy_x, width, target);
                    return self.matmul(gemm, &program, &x);
                }
                let (columns, place) = self.windows(window, first, x.ab[1])?;
                x.ab[1] = place;
                let gemm = Gemm::new(second, columns, Trans::TN, width, target);
                self.matmul(gemm, &program, &x)
            }
            Op::Conv { window, .. } => {
                if gathers(first.cols()) {
                    let gemm = Gemm::conv(window, layouts, width, target);
                    return self.matmul(gemm, &program, &x);
                }
                let (columns, place) = self.windows(window, first, x.ab[0])?;
                x.ab[0] = place;
                let gemm = Gemm::new(columns, second, Trans::NT, width, target);
                self.matmul(gemm, &program, &x)
            }
            _ => Err(Error::Graph(format!("{} is no convolution", op.name()))),
        }
    }

    /// The matrix of windows of x.
    fn windows(&mut self, window: Window, x: Layout, from: Place) -> Result<(Layout, Place)> {
        let rows = x.rows() / window.time * window.steps;
        let columns = matrix(rows, window.kernel * x.cols(), x.dtype())?;
        let place = self.scratch(columns);
        self.step(im2col(x, window, stored(columns)), vec![from, place])?;
        Ok((columns, place))
    }
}

fn matrix(rows: usize, cols: usize, dtype: DType) -> Result<Layout> {
    Layout::of(&Shape::matrix(rows, cols), dtype)
}

/// What a kernel computes, as it is.
fn stored(layout: Layout) -> Program {
    Program {
        rows: layout.rows(),
        cols: layout.cols(),
        operands: Vec::new(),
        instructions: vec![Instruction::Sum],
        results: vec![(0, layout)],
    }
}
