//! Work over the flat arenas: which gradients live there, their norm, the optimizer step.

use std::collections::{HashMap, HashSet};

use super::{Arena, Lowering, Place, Run};
use crate::error::Result;
use crate::gpu::Layout;
use crate::graph::fuse::Fused;
use crate::graph::{DType, Node, Op, Source, ValueId};
use crate::kernels;

/// Gradients that only optimizers and norms read are computed straight into the gradient arena.
pub(super) fn pin(fused: &Fused<'_>) -> Result<HashMap<ValueId, ValueId>> {
    let graph = fused.graph;
    let mut pinned = HashMap::new();
    for node in graph.nodes() {
        let Op::AdamW { params, .. } = &node.op else {
            continue;
        };
        for (&gradient, &param) in node.inputs.iter().zip(params) {
            let root = fused.root(gradient);
            let value = graph.value(root)?;
            let computed = matches!(value.source, Source::Node { .. });
            let readers = fused.readers(root);
            let for_optimizer = readers.iter().all(|&reader| {
                matches!(graph.nodes()[reader].op, Op::AdamW { .. } | Op::GlobalNorm)
            });
            let uses = node.inputs.iter().filter(|&&id| fused.root(id) == root);
            let layout = Layout::of(&value.shape, value.dtype)?;
            let same = layout == Layout::of(graph.shape(param), DType::F32)?;
            if computed && for_optimizer && uses.count() == 1 && same && !pinned.contains_key(&root)
            {
                pinned.insert(root, param);
            }
        }
    }
    Ok(pinned)
}

impl Lowering<'_> {
    /// Runs of the arena that cover the pinned gradients of `ids`, merged where they touch; and the other gradients.
    fn runs(&self, ids: &[ValueId], params: Option<&[ValueId]>) -> Result<(Vec<Run>, Vec<usize>)> {
        let mut runs: Vec<Run> = Vec::new();
        let mut rest = Vec::new();
        for (i, &id) in ids.iter().enumerate() {
            match self.pinned.get(&self.fused.root(id)) {
                Some(&param) if params.is_none_or(|params| params[i] == param) => {
                    runs.push(self.arenas.run(param)?);
                }
                _ => rest.push(i),
            }
        }
        runs.sort_by_key(|run| (run.block, run.offset));
        let mut merged: Vec<Run> = Vec::new();
        for run in runs {
            match merged.last_mut() {
                Some(last)
                    if last.block == run.block
                        && last.offset + last.bytes == run.offset
                        && last.bytes + run.bytes <= self.max_binding =>
                {
                    last.bytes += run.bytes;
                }
                _ => merged.push(run),
            }
        }
        Ok((merged, rest))
    }

    pub(super) fn global_norm(&mut self, node: &Node) -> Result<()> {
        let (runs, rest) = self.runs(&node.inputs, None)?;
        let mut sources = Vec::new();
        for run in runs {
            let layout = Self::vector(run.bytes as usize / 4, DType::F32)?;
            sources.push((layout, Place::Run(Arena::Gradients, run)));
        }
        for i in rest {
            let layout = self.layout(node.inputs[i])?;
            // Padding is zero, so rows and padding may be read as one vector.
            let flat = Self::vector(layout.size_bytes() as usize / 4, DType::F32)?;
            sources.push((flat, self.place(node.inputs[i])?));
        }
        let parts: usize = sources
            .iter()
            .map(|(layout, _)| kernels::optimizer::norm_parts(layout.row_stride()))
            .sum();
        let partial = Self::vector(parts, DType::F32)?;
        let place = self.scratch(partial);
        let mut first = 0;
        for (layout, source) in sources {
            let kernel = kernels::optimizer::norm_partial(layout, partial, first, self.target);
            self.step(kernel, vec![source, place]);
            first += kernels::optimizer::norm_parts(layout.row_stride());
        }
        let output = self.layout(node.outputs[0])?;
        let kernel = kernels::reduce::total(partial, output, true, self.target);
        self.step(kernel, vec![place, Place::Value(node.outputs[0])]);
        Ok(())
    }

    /// Blocks whose shadows the graph reads: an update has to write these, too.
    fn shadowed_blocks(&self) -> Result<HashSet<usize>> {
        let params = self.fused.shadows().values();
        params
            .map(|&param| Ok(self.arenas.run(param)?.block))
            .collect()
    }

    pub(super) fn adamw(&mut self, node: &Node) -> Result<()> {
        let Op::AdamW {
            params,
            beta1,
            beta2,
            eps,
            weight_decay,
        } = &node.op
        else {
            return Ok(());
        };
        let options = kernels::optimizer::AdamW {
            beta1: *beta1,
            beta2: *beta2,
            eps: *eps,
            weight_decay: *weight_decay,
        };
        let gradients = &node.inputs[..params.len()];
        let hyper = node.inputs[params.len()];
        let (hyper_layout, hyper) = (self.layout(hyper)?, self.place(hyper)?);
        let (runs, rest) = self.runs(gradients, Some(params))?;
        let mut work: Vec<(Run, Place)> = runs
            .into_iter()
            .map(|run| (run, Place::Run(Arena::Gradients, run)))
            .collect();
        for i in rest {
            let run = self.arenas.run(params[i])?;
            // Without the gap behind the parameter, which the gradient's own buffer does not have.
            let bytes = self.layout(params[i])?.size_bytes();
            let source = self.place(gradients[i])?;
            work.push((Run { bytes, ..run }, source));
        }
        let shadowed = self.shadowed_blocks()?;
        for (run, gradient) in work {
            let elements = run.bytes as usize / 4;
            let layout = Self::vector(elements, DType::F32)?;
            let arena = |arena| Place::Run(arena, run);
            let mut places = vec![
                gradient,
                hyper,
                arena(Arena::Parameters),
                arena(Arena::FirstMoments),
                arena(Arena::SecondMoments),
            ];
            let mut shadow = None;
            if shadowed.contains(&run.block) {
                shadow = Some(Self::vector(elements, DType::F16)?);
                places.push(arena(Arena::Shadows));
            }
            let kernel = kernels::optimizer::adamw(layout, hyper_layout, shadow, options);
            self.step(kernel, places);
        }
        Ok(())
    }
}
