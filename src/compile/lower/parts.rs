//! Sums that are put off: parts of several results are added up in one dispatch, as late as the first of the results is read.

use super::Lowering;
use crate::compile::{Arena, Place, Span};
use crate::error::{Error, Result};
use crate::gpu::Layout;
use crate::kernels::parts::{Sum, sum_parts};
use crate::kernels::{Instruction, MAX_BINDINGS, Program};
use crate::types::DType;

/// Parts that are waiting to be added up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parts {
    /// Where they lie.
    pub source: Place,
    pub layout: Layout,
    /// Row of the first part.
    pub first: usize,
    /// Their number.
    pub parts: usize,
    /// Rows of the result that have parts; the rest becomes zero.
    pub rows: usize,
    /// Where the sum goes.
    pub to: Place,
    pub result: Layout,
}

/// Most bytes of parts that are kept waiting.
const MOST_BYTES: u64 = 64 << 20;

/// Whether a program does nothing but store what it is given.
pub(crate) fn only_stores(program: &Program) -> bool {
    program.instructions == [Instruction::Sum] && program.results.len() == 1
}

/// A result's buffer, or the stretch of the gradient arena that it lies in.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Destination {
    Whole(Place, Layout),
    Arena(Arena, Span),
}

/// Sources and targets of one dispatch.
#[derive(Default)]
struct Bound {
    sources: Vec<(Place, Layout)>,
    targets: Vec<Destination>,
}

impl Lowering<'_> {
    /// Adds parts up, now or later, but before anything reads the sum.
    pub(crate) fn put_off(&mut self, parts: Parts) -> Result<()> {
        let mut all = self.parts.clone();
        all.push(parts);
        let bound = self.bound(&all)?;
        let fits = bound.sources.len() + bound.targets.len() <= MAX_BINDINGS;
        if !fits {
            self.add_up()?;
        }
        self.parts.push(parts);
        // What waits is alive beside whatever comes next.
        let waiting = self.parts.iter().map(|parts| parts.layout.size_bytes());
        if waiting.sum::<u64>() > MOST_BYTES {
            self.add_up()?;
        }
        Ok(())
    }

    /// Adds up what is waiting if `place` is one of the sums.
    pub(crate) fn settle(&mut self, place: Place) -> Result<()> {
        let pinned = |parts: &Parts| match parts.to {
            Place::Value(id) => self.pinned.contains_key(&id),
            _ => false,
        };
        let mut waiting = self.parts.iter();
        let touched = match place {
            Place::Span(..) => waiting.any(pinned),
            Place::Part { value, .. } | Place::Value(value) => {
                waiting.any(|parts| match parts.to {
                    Place::Value(id) => id == value,
                    Place::Part { value: id, .. } => id == value,
                    _ => false,
                })
            }
            Place::Scratch(_) => waiting.any(|parts| parts.to == place),
        };
        match touched {
            true => self.add_up(),
            false => Ok(()),
        }
    }

    /// Adds up everything that is waiting.
    pub(crate) fn add_up(&mut self) -> Result<()> {
        let waiting = std::mem::take(&mut self.parts);
        if waiting.is_empty() {
            return Ok(());
        }
        let bound = self.bound(&waiting)?;
        let mut sums = Vec::with_capacity(waiting.len());
        for parts in &waiting {
            let own = (parts.source, parts.layout);
            let source = bound.sources.iter().position(|source| *source == own);
            let missing = || Error::Graph("parts without a source".into());
            let source = source.ok_or_else(missing)?;
            let (result, offset) = self.target(&bound.targets, parts)?;
            sums.push(Sum {
                source,
                first: parts.first,
                parts: parts.parts,
                rows: parts.rows,
                result,
                offset,
                layout: parts.result,
            });
        }
        let sources: Vec<Layout> = bound.sources.iter().map(|&(_, layout)| layout).collect();
        let mut results = Vec::new();
        let mut places: Vec<Place> = bound.sources.iter().map(|&(place, _)| place).collect();
        for target in bound.targets {
            match target {
                Destination::Whole(place, layout) => {
                    results.push(layout);
                    places.push(place);
                }
                Destination::Arena(arena, span) => {
                    results.push(Self::vector(span.bytes as usize / 4, DType::F32)?);
                    places.push(Place::Span(arena, span));
                }
            }
        }
        let kernel = sum_parts(&sums, &sources, &results);
        // The sums are those of several layers.
        let layer = self.layer.take();
        self.push(kernel, places);
        self.layer = layer;
        Ok(())
    }

    fn arena_of(&self, place: Place) -> Result<Option<(Arena, Span)>> {
        match place {
            Place::Value(id) => match self.pinned.get(&id) {
                Some(&(arena, param)) => Ok(Some((arena, self.arenas.span(param)?))),
                None => Ok(None),
            },
            _ => Ok(None),
        }
    }

    fn bound(&self, waiting: &[Parts]) -> Result<Bound> {
        let mut bound = Bound::default();
        for parts in waiting {
            let source = (parts.source, parts.layout);
            if !bound.sources.contains(&source) {
                bound.sources.push(source);
            }
            let Some((arena, span)) = self.arena_of(parts.to)? else {
                bound
                    .targets
                    .push(Destination::Whole(parts.to, parts.result));
                continue;
            };
            let mut joined = false;
            for target in &mut bound.targets {
                if let Destination::Arena(other, whole) = target
                    && *other == arena
                    && whole.block == span.block
                {
                    let start = whole.offset.min(span.offset);
                    let end = (whole.offset + whole.bytes).max(span.offset + span.bytes);
                    if end - start <= self.max_binding {
                        *whole = Span {
                            block: span.block,
                            offset: start,
                            bytes: end - start,
                        };
                        joined = true;
                        break;
                    }
                }
            }
            if !joined {
                bound.targets.push(Destination::Arena(arena, span));
            }
        }
        Ok(bound)
    }

    /// Number of the target and bytes from its beginning.
    fn target(&self, targets: &[Destination], parts: &Parts) -> Result<(usize, u64)> {
        let own = self.arena_of(parts.to)?;
        let found = targets
            .iter()
            .enumerate()
            .find_map(|(i, target)| match (target, own) {
                (Destination::Whole(place, _), None) => (*place == parts.to).then_some((i, 0)),
                (Destination::Arena(arena, whole), Some((own, span))) => {
                    let inside = *arena == own
                        && whole.block == span.block
                        && whole.offset <= span.offset
                        && span.offset + span.bytes <= whole.offset + whole.bytes;
                    inside.then(|| (i, span.offset - whole.offset))
                }
                _ => None,
            });
        let missing = || crate::Error::Graph("a sum has no place".into());
        found.ok_or_else(missing)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashMap};

    use super::*;
    use crate::compile::{Arenas, Lowered, lower};
    use crate::gpu::MatrixUnits;
    use crate::graph::{Graph, ValueId};
    use crate::kernels::Target;
    use crate::nn::{Linear, Tcn, TcnOptions};
    use crate::text::{Transformer, TransformerOptions};
    use crate::train::AdamW;

    /// Parameters one behind the other.
    struct Sequence(HashMap<ValueId, Span>);

    impl Sequence {
        fn of(graph: &Graph) -> Result<Self> {
            let mut offset = 0;
            let mut spans = HashMap::new();
            for (id, value) in graph.parameters() {
                let bytes = Layout::of(&value.shape, value.dtype)?.size_bytes();
                let bytes = bytes.next_multiple_of(512);
                spans.insert(
                    id,
                    Span {
                        block: 0,
                        offset,
                        bytes,
                    },
                );
                offset += bytes;
            }
            Ok(Self(spans))
        }
    }

    impl Arenas for Sequence {
        fn span(&self, parameter: ValueId) -> Result<Span> {
            Ok(self.0[&parameter])
        }
    }

    fn lower_for_large_gpu(graph: &Graph) -> Result<Lowered> {
        let units = MatrixUnits {
            size: 16,
            lanes: 32,
            f16: true,
            f32: false,
            scalar: false,
            storage: 48 << 10,
            invocations: 256,
        };
        let target = Target {
            f16: true,
            barrier_free: false,
            matrix_units: Some(units),
            invocations: 256,
            cores: 132,
        };
        lower(graph, None, target, &Sequence::of(graph)?, 1 << 31)
    }

    /// Dispatches of a stack on a large GPU, which splits most of its products; and kernels by name.
    fn dispatches(blocks: usize, dtype: DType, train: bool) -> Result<(usize, Vec<&'static str>)> {
        let dilations: Vec<usize> = (0..blocks).map(|i| 1 << i).collect();
        let options = TcnOptions::new(256, 512, &dilations).kernel(5);
        let mut graph = Graph::new();
        let tcn = Tcn::new(&mut graph, "blocks", &options)?;
        let x = graph.input("x", &[64, 128, 256], dtype)?;
        let mask = graph.input("mask", &[64 * 128], DType::F32)?;
        let y = tcn.forward(&mut graph, x, Some(mask))?;
        if train {
            let loss = graph.sum_all(y)?;
            train_all(&mut graph, loss)?;
        } else {
            graph.output("y", y)?;
        }
        let lowered = lower_for_large_gpu(&graph)?;
        let names: Vec<_> = lowered
            .steps
            .iter()
            .map(|step| step.kernel.name())
            .collect();
        Ok((names.len(), names))
    }

    fn train_all(graph: &mut Graph, loss: ValueId) -> Result<()> {
        let parameters: Vec<_> = graph.parameters().map(|(id, _)| id).collect();
        AdamW::default().step(graph, loss, &parameters)
    }

    #[test]
    fn a_block_takes_at_most_four_dispatches_forward_and_ten_backward() -> Result<()> {
        for dtype in [DType::F32, DType::F16] {
            let each = |train| -> Result<usize> {
                let (few, _) = dispatches(2, dtype, train)?;
                let (many, _) = dispatches(6, dtype, train)?;
                Ok((many - few).div_ceil(4))
            };
            let (forward, both) = (each(false)?, each(true)?);
            assert!(forward <= 4, "{dtype}: {forward} forward");
            assert!(both - forward <= 10, "{dtype}: {} backward", both - forward);
        }
        Ok(())
    }

    /// Kernels of a transformer with the sizes of MiniLM on a large GPU.
    fn transformer(
        layers: usize,
        [batch, length]: [usize; 2],
        dtype: DType,
        train: bool,
    ) -> Result<Vec<&'static str>> {
        let options = TransformerOptions::default().layers(layers).length(length);
        let mut graph = Graph::new();
        let transformer = Transformer::new(&mut graph, &options)?;
        let ids = graph.index_input("ids", batch * length, 30_522)?;
        let mask = graph.input("mask", &[batch * length], DType::F32)?;
        let z = transformer.forward(&mut graph, ids, mask, dtype)?;
        if train {
            let loss = graph.sum_all(z)?;
            train_all(&mut graph, loss)?;
        } else {
            graph.output("z", z)?;
        }
        let steps = lower_for_large_gpu(&graph)?.steps;
        Ok(steps.iter().map(|step| step.kernel.name()).collect())
    }

    #[test]
    fn a_transformer_layer_takes_seven_dispatches_forward() -> Result<()> {
        for dtype in [DType::F32, DType::F16] {
            let each = |shape, train| -> Result<usize> {
                let few = transformer(2, shape, dtype, train)?.len();
                let many = transformer(6, shape, dtype, train)?.len();
                Ok((many - few).div_ceil(4))
            };
            for shape in [[256, 32], [64, 128]] {
                assert_eq!(each(shape, false)?, 7, "{dtype} {shape:?}");
            }
            let both = each([128, 64], true)?;
            assert!(both <= 7 + 26, "{dtype}: {both}");
        }
        Ok(())
    }

    #[test]
    fn parts_of_several_results_are_one_dispatch() -> Result<()> {
        let (_, names) = dispatches(4, DType::F16, true)?;
        let sums = names.iter().filter(|name| **name == "sum_parts").count();
        let parts = names.iter().filter(|name| **name == "column_sums").count();
        // Two biases and a LayerNorm a block leave parts, besides split products.
        assert_eq!(parts, 4 * 3);
        assert!((1..=5).contains(&sums), "{names:?}");
        Ok(())
    }

    #[test]
    fn large_parts_are_not_kept_waiting() -> Result<()> {
        let mut graph = Graph::new();
        let x = graph.input("x", &[4096, 768], DType::F32)?;
        let [first, second] = ["first", "second"]
            .map(|name| Linear::new(&mut graph, name, 768, 768, true))
            .map(Result::unwrap);
        let head = Linear::new(&mut graph, "head", 768, 30_522, true)?;
        let targets = graph.index_input("targets", 4096, 30_522)?;
        let h = first.forward(&mut graph, x)?;
        let h = second.forward(&mut graph, h)?;
        let logits = head.forward(&mut graph, h)?;
        let loss = graph.cross_entropy(logits, targets, None, 0.0)?.loss;
        train_all(&mut graph, loss)?;
        let lowered = lower_for_large_gpu(&graph)?;

        let mut users: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (at, step) in lowered.steps.iter().enumerate() {
            for (place, binding) in step.places.iter().zip(step.kernel.bindings()) {
                match *place {
                    Place::Scratch(number) if binding.layout.size_bytes() > MOST_BYTES => {
                        users.entry(number).or_default().push(at);
                    }
                    _ => {}
                }
            }
        }
        // Parts of the gradients of the head's weight and of its operand.
        assert_eq!(users.len(), 2, "{users:?}");
        // One is summed before the other is computed.
        let users: Vec<Vec<usize>> = users.into_values().collect();
        assert!(users[0].last() < users[1].first(), "{users:?}");
        Ok(())
    }
}
