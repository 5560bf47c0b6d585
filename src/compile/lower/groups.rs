//! Sums and means over runs of rows, such as the steps of a sample, in as many passes as their length needs.

use super::{At, Lowering};
use crate::compile::Place;
use crate::error::Result;
use crate::gpu::Layout;
use crate::kernels::Program;
use crate::kernels::reduce::{self, GroupSums, Mask};
use crate::types::{DType, Shape};

impl Lowering<'_> {
    /// x [rows·period, C] → program([rows, C]). `mask`: means of the rows that it counts.
    pub(crate) fn group_sums(
        &mut self,
        (mut x, mut from): At,
        mut period: usize,
        mask: Option<At>,
        program: Program,
        rest: Vec<Place>,
    ) -> Result<()> {
        let target = self.target;
        let mut mask_place = mask.map(|(_, place)| place);
        let mut mask = mask.map_or(Mask::None, |(layout, _)| Mask::Weighs(layout));
        loop {
            let sums = GroupSums { period, mask };
            let pieces = sums.pieces(program.cols, target);
            if pieces == 1 {
                let kernel = sums.last(x, program, target);
                let reads = std::iter::once(from).chain(mask_place);
                return self.step(kernel, reads.chain(rest).collect());
            }
            let rows = program.rows * pieces;
            let partial = Layout::of(&Shape::matrix(rows, program.cols), DType::F32)?;
            let place = self.scratch(partial);
            let counts = match mask_place {
                Some(_) => {
                    let layout = Self::vector(rows, DType::F32)?;
                    Some((layout, self.scratch(layout)))
                }
                None => None,
            };
            let kernel = sums.first(x, partial, counts.map(|(layout, _)| layout), target);
            // The kernel's own results come before that of its program.
            let reads = std::iter::once(from).chain(mask_place);
            let writes = counts.map(|(_, place)| place).into_iter().chain([place]);
            self.step(kernel, reads.chain(writes).collect())?;
            (x, from, period) = (partial, place, pieces);
            if let Some((layout, place)) = counts {
                (mask, mask_place) = (Mask::Counts(layout), Some(place));
            }
        }
    }

    /// dy [B, C], mask [B·L] → program([B·L, C]).
    pub(crate) fn masked_mean_grad(
        &mut self,
        dy: At,
        mask: At,
        program: Program,
        rest: Vec<Place>,
    ) -> Result<()> {
        let (samples, time) = (dy.0.rows(), program.rows / dy.0.rows());
        let dy = match time > reduce::COUNTED {
            true => self.over_counts(dy, mask, samples)?,
            false => dy,
        };
        let kernel = reduce::masked_mean_grad(dy.0, mask.0, program);
        self.step(kernel, [vec![dy.1, mask.1], rest].concat())
    }

    /// dy [B, C] over the number of steps that each sample's mask counts.
    fn over_counts(&mut self, dy: At, mask: At, samples: usize) -> Result<At> {
        let (mut counts, mut period) = (mask, mask.0.cols() / samples);
        while period > 1 {
            let pieces = period.div_ceil(reduce::COUNTED);
            let layout = Self::vector(samples * pieces, DType::F32)?;
            let place = self.scratch(layout);
            let kernel = reduce::mask_counts(counts.0, layout, period, self.target);
            self.step(kernel, vec![counts.1, place])?;
            (counts, period) = ((layout, place), pieces);
        }
        let over = Layout::of(&Shape::matrix(samples, dy.0.cols()), DType::F32)?;
        let place = self.scratch(over);
        let kernel = reduce::over_counts(dy.0, counts.0, over, self.target);
        self.step(kernel, vec![dy.1, counts.1, place])?;
        Ok((over, place))
    }
}
