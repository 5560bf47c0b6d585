//! Work over the flat arenas: which gradients live there, their norm and accumulation, the optimizer step.

use std::collections::{HashMap, HashSet};

use super::Lowering;
use crate::compile::fuse::Fused;
use crate::compile::{Arena, Place, Span};
use crate::error::Result;
use crate::gpu::Layout;
use crate::graph::{Node, Op, Source, ValueId};
use crate::kernels;
use crate::kernels::optimizer::{AdamWConstants, Corrections, STRETCHES, Stretch};
use crate::types::{DType, Rates};

/// Accumulated gradients stay where they are. Gradients that only optimizers, norms and accumulation read are computed straight
/// into the gradient arena.
pub(crate) fn pin(fused: &Fused<'_>) -> Result<HashMap<ValueId, (Arena, ValueId)>> {
    let graph = fused.graph;
    let mut pinned = HashMap::new();
    for node in graph.nodes() {
        if let Op::TakeAccumulated { params } = &node.op {
            let taken = node.outputs.iter().zip(params);
            pinned.extend(taken.map(|(&id, &param)| (id, (Arena::Accumulated, param))));
        }
    }
    for node in graph.nodes() {
        let (Op::AdamW { params, .. } | Op::Accumulate { params }) = &node.op else {
            continue;
        };
        let mut uses: HashMap<ValueId, usize> = HashMap::new();
        for &id in &node.inputs {
            *uses.entry(fused.root(id)).or_default() += 1;
        }
        for (&gradient, &param) in node.inputs.iter().zip(params) {
            let root = fused.root(gradient);
            let value = graph.value(root)?;
            let computed = matches!(value.source, Source::Node { .. });
            let readers = fused.readers(root);
            let for_optimizer = readers.iter().all(|&reader| {
                matches!(
                    graph.nodes()[reader].op,
                    Op::AdamW { .. } | Op::Accumulate { .. } | Op::GlobalNorm
                )
            });
            let layout = Layout::of(&value.shape, value.dtype)?;
            let same = layout == Layout::of(graph.shape(param), DType::F32)?;
            if computed
                && for_optimizer
                && uses.get(&root) == Some(&1)
                && same
                && !pinned.contains_key(&root)
            {
                pinned.insert(root, (Arena::Gradients, param));
            }
        }
    }
    Ok(pinned)
}

/// A span of one of the arenas.
type ArenaSpan = (Arena, Span);

impl Lowering<'_> {
    /// Runs of the arenas that cover the pinned gradients of `ids`, merged where they touch; and the other gradients.
    fn spans(
        &self,
        ids: &[ValueId],
        params: Option<&[ValueId]>,
    ) -> Result<(Vec<ArenaSpan>, Vec<usize>)> {
        let mut spans = Vec::new();
        let mut rest = Vec::new();
        for (i, &id) in ids.iter().enumerate() {
            match self.pinned.get(&self.fused.root(id)) {
                Some(&(arena, param)) if params.is_none_or(|params| params[i] == param) => {
                    spans.push((arena, self.arenas.span(param)?));
                }
                _ => rest.push(i),
            }
        }
        Ok((self.merged(spans), rest))
    }

    fn merged(&self, mut spans: Vec<ArenaSpan>) -> Vec<ArenaSpan> {
        spans.sort_by_key(|(arena, span)| (*arena, span.block, span.offset));
        let mut merged: Vec<ArenaSpan> = Vec::new();
        for (arena, span) in spans {
            match merged.last_mut() {
                Some((before, last))
                    if *before == arena
                        && last.block == span.block
                        && last.offset + last.bytes == span.offset
                        && last.bytes + span.bytes <= self.max_binding =>
                {
                    last.bytes += span.bytes;
                }
                _ => merged.push((arena, span)),
            }
        }
        merged
    }

    pub(crate) fn global_norm(&mut self, node: &Node) -> Result<()> {
        let (spans, rest) = self.spans(&node.inputs, None)?;
        let mut sources = Vec::new();
        for (arena, span) in spans {
            let layout = Self::vector(span.bytes as usize / 4, DType::F32)?;
            sources.push((layout, Place::Span(arena, span)));
        }
        for i in rest {
            let layout = self.layout(node.inputs[i])?;
            // Padding is zero, so rows and padding may be read as one vector.
            let flat = Self::vector(layout.size_bytes() as usize / 4, DType::F32)?;
            sources.push((flat, self.place(node.inputs[i])?));
        }
        let parts: usize = sources
            .iter()
            .map(|(layout, _)| kernels::optimizer::norm_parts(layout.row_stride(), self.target))
            .sum();
        let partial = Self::vector(parts, DType::F32)?;
        let place = self.scratch(partial);
        let mut first = 0;
        for (layout, source) in sources {
            let kernel = kernels::optimizer::norm_partial(layout, partial, first, self.target);
            self.step(kernel, vec![source, place])?;
            first += kernels::optimizer::norm_parts(layout.row_stride(), self.target);
        }
        let output = self.layout(node.outputs[0])?;
        let to = (output, Place::Value(node.outputs[0]));
        self.total((partial, place), to, true)
    }

    /// For each stretch of parameters, where its gradients lie.
    fn gradients(&mut self, ids: &[ValueId], params: &[ValueId]) -> Result<Vec<(Span, Place)>> {
        let (spans, rest) = self.spans(ids, Some(params))?;
        let mut work: Vec<(Span, Place)> = spans
            .into_iter()
            .map(|(arena, span)| (span, Place::Span(arena, span)))
            .collect();
        for i in rest {
            let span = self.arenas.span(params[i])?;
            // Without the gap behind the parameter, which the gradient's own buffer does not have.
            let bytes = self.layout(params[i])?.size_bytes();
            work.push((Span { bytes, ..span }, self.place(ids[i])?));
        }
        Ok(work)
    }

    pub(crate) fn accumulate(&mut self, node: &Node, params: &[ValueId]) -> Result<()> {
        let (gradients, weight) = node.inputs.split_at(params.len());
        let constant = |id: ValueId| match self.graph().value(self.fused.root(id))?.source {
            Source::Constant(number) => Ok(Some(number)),
            _ => Ok(None),
        };
        // A parameter that the loss does not depend on has zero as its gradient.
        let mut used = (Vec::new(), Vec::new());
        for (&gradient, &param) in gradients.iter().zip(params) {
            if constant(gradient)? != Some(0.0) {
                used.0.push(gradient);
                used.1.push(param);
            }
        }
        let weight = match constant(weight[0])? {
            Some(number) => kernels::optimizer::Weight::Constant(number),
            None => kernels::optimizer::Weight::Value(self.layout(weight[0])?),
        };
        let weight_place = match weight {
            kernels::optimizer::Weight::Constant(_) => None,
            kernels::optimizer::Weight::Value(_) => Some(self.place(node.inputs[params.len()])?),
        };
        for (span, gradient) in self.gradients(&used.0, &used.1)? {
            let layout = Self::vector(span.bytes as usize / 4, DType::F32)?;
            let kernel = kernels::optimizer::accumulate(layout, weight, self.target);
            let sum = Place::Span(Arena::Accumulated, span);
            let places = std::iter::once(gradient).chain(weight_place);
            self.step(kernel, places.chain([sum]).collect())?;
        }
        Ok(())
    }

    /// What was taken is zero when the run ends.
    pub(crate) fn clear_accumulated(&mut self) -> Result<()> {
        let mut spans = Vec::new();
        for node in self.graph().nodes() {
            if let Op::TakeAccumulated { params } = &node.op {
                for &param in params {
                    spans.push((Arena::Accumulated, self.arenas.span(param)?));
                }
            }
        }
        for (arena, span) in self.merged(spans) {
            let layout = Self::vector(span.bytes as usize / 4, DType::F32)?;
            self.fill(layout, 0.0, Place::Span(arena, span))?;
        }
        Ok(())
    }

    /// Blocks whose shadows the graph reads: an update has to write these, too.
    fn shadowed_blocks(&self) -> Result<HashSet<usize>> {
        let params = self.fused.shadows().values();
        params
            .map(|&param| Ok(self.arenas.span(param)?.block))
            .collect()
    }

    /// Rates of the parameters that lie in a span of the arenas, in stretches of equal rates.
    fn stretches(&self, whole: Span, params: &[ValueId], rates: &[Rates]) -> Result<Vec<Stretch>> {
        let mut all = Vec::new();
        for (&param, &rates) in params.iter().zip(rates) {
            let span = self.arenas.span(param)?;
            let inside = whole.offset..whole.offset + whole.bytes;
            if whole.block == span.block && inside.contains(&span.offset) {
                let start = (span.offset - whole.offset) as usize / 4;
                all.push(Stretch { start, rates });
            }
        }
        all.sort_by_key(|stretch| stretch.start);
        all.dedup_by_key(|stretch| stretch.rates);
        Ok(all)
    }

    pub(crate) fn adamw(&mut self, node: &Node) -> Result<()> {
        let Op::AdamW {
            params,
            beta1,
            beta2,
            eps,
            rates,
        } = &node.op
        else {
            return Ok(());
        };
        let options = AdamWConstants {
            beta1: *beta1,
            beta2: *beta2,
            eps: *eps,
        };
        let gradients = &node.inputs[..params.len()];
        let hyper = node.inputs[params.len()];
        let hyper = (self.layout(hyper)?, self.place(hyper)?);
        let shadowed = self.shadowed_blocks()?;
        for (span, gradient) in self.gradients(gradients, params)? {
            let (corrections, place, pages) = Self::corrections(span)?;
            let kernel = kernels::optimizer::corrections(hyper.0, corrections, pages, options);
            self.step(kernel, vec![hyper.1, place])?;
            let stretches = self.stretches(span, params, rates)?;
            let end = span.bytes as usize / 4;
            for (i, part) in stretches.chunks(STRETCHES).enumerate() {
                let next = stretches.get((i + 1) * STRETCHES);
                let first = part[0].start;
                let bytes = 4 * (next.map_or(end, |next| next.start) - first) as u64;
                let offset = 4 * first as u64;
                let span = Span {
                    offset: span.offset + offset,
                    bytes,
                    ..span
                };
                // A gradient outside of the arenas is that of one parameter, which is one stretch.
                let gradient = match gradient {
                    Place::Span(arena, _) => Place::Span(arena, span),
                    other => other,
                };
                let part: Vec<Stretch> = part
                    .iter()
                    .map(|stretch| Stretch {
                        start: stretch.start - first,
                        ..*stretch
                    })
                    .collect();
                let shadowed = shadowed.contains(&span.block);
                self.adamw_span(span, gradient, hyper, shadowed, (options, &part))?;
            }
        }
        Ok(())
    }

    /// The bias corrections of a span: their layout, where they are bound, and the number of pages.
    fn corrections(span: Span) -> Result<(Corrections, Place, usize)> {
        let (whole, first, pages) = span.corrections();
        let layout = Self::vector(2 * (first + pages), DType::F32)?;
        let place = Place::Span(Arena::Corrections, whole);
        Ok((Corrections { layout, first }, place, pages))
    }

    fn adamw_span(
        &mut self,
        span: Span,
        gradient: Place,
        (hyper_layout, hyper): (Layout, Place),
        shadowed: bool,
        (options, stretches): (AdamWConstants, &[Stretch]),
    ) -> Result<()> {
        let elements = span.bytes as usize / 4;
        let layout = Self::vector(elements, DType::F32)?;
        let arena = |arena| Place::Span(arena, span);
        let mut places = vec![
            gradient,
            hyper,
            arena(Arena::Parameters),
            arena(Arena::FirstMoments),
            arena(Arena::SecondMoments),
        ];
        let mut shadow = None;
        if shadowed {
            shadow = Some(Self::vector(elements, DType::F16)?);
            places.push(arena(Arena::Shadows));
        }
        let (corrections, place, _) = Self::corrections(span)?;
        places.insert(2, place);
        let layouts = [layout, hyper_layout];
        let kernel = kernels::optimizer::adamw(layouts, corrections, shadow, options, stretches);
        self.step(kernel, places)
    }
}
