//! Matrix products, the one operation with several kernels to choose from.

use super::Lowering;
use super::parts::{Parts, only_stores};
use crate::compile::{Place, Step};
use crate::error::Result;
use crate::gpu::Layout;
use crate::kernels::Program;
use crate::kernels::gemm::Gemm;
use crate::types::{DType, Shape};

/// What a product reads and writes, in binding order but for the operands.
pub(crate) struct ProductPlaces {
    pub ab: [Place; 2],
    pub loads: Vec<Place>,
    pub stores: Vec<Place>,
}

impl Lowering<'_> {
    /// The product `gemm`, or another way to cut it where the tuner finds that faster.
    pub(crate) fn matmul(
        &mut self,
        gemm: Gemm,
        program: &Program,
        x: &ProductPlaces,
    ) -> Result<()> {
        let scratch = Place::Scratch(self.scratch.len());
        let candidates = gemm.candidates(program, self.max_binding);
        let chosen = match self.tuner {
            None => candidates[0],
            Some(tuner) => {
                let key = gemm.single(program.clone()).key(self.target);
                let names: Vec<String> = candidates.iter().map(Gemm::to_string).collect();
                let build = |index: usize| Ok(steps(candidates[index], program, x, scratch)?.0);
                candidates[tuner.choose(&key, &names, &build)?]
            }
        };
        let (mut steps, partial) = steps(chosen, program, x, scratch)?;
        self.scratch.extend(partial);
        let put_off = partial.filter(|_| only_stores(program));
        if put_off.is_some() {
            steps.pop();
        }
        for Step { kernel, places, .. } in steps {
            self.step(kernel, places)?;
        }
        match put_off {
            None => Ok(()),
            Some(layout) => self.put_off(Parts {
                source: scratch,
                layout,
                first: 0,
                parts: chosen.splits(),
                rows: program.results[0].1.rows(),
                to: x.stores[0],
                result: program.results[0].1,
            }),
        }
    }
}

/// The steps, and the layout of `scratch` if they use it.
fn steps(
    gemm: Gemm,
    program: &Program,
    x: &ProductPlaces,
    scratch: Place,
) -> Result<(Vec<Step>, Option<Layout>)> {
    let step = |kernel, places| Step {
        kernel,
        places,
        layer: None,
    };
    let rest = [x.loads.as_slice(), &x.stores].concat();
    if gemm.splits() == 1 {
        let places = [x.ab.as_slice(), &rest].concat();
        return Ok((vec![step(gemm.single(program.clone()), places)], None));
    }
    let shape = Shape::matrix(gemm.splits() * program.rows, program.cols);
    let partial = Layout::of(&shape, DType::F32)?;
    let first = step(gemm.partial(partial), vec![x.ab[0], x.ab[1], scratch]);
    let places = [vec![scratch], rest].concat();
    let second = step(gemm.add_up(partial, program.clone()), places);
    Ok((vec![first, second], Some(partial)))
}
