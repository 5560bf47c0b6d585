//! Graphs on the CPU: the dispatches that an executable would make, in memory of exactly the planned sizes, compared with the reference.

use std::collections::{BTreeSet, HashMap};

use super::super::{Bound, Memory, run};
use crate::compile::{Arena, Arenas, CORRECTION, Lowered, PAGE, Place, Span, lower};
use crate::error::Result;
use crate::gpu::Layout;
use crate::graph::{Graph, Source, ValueId};
use crate::kernels::Target;
use crate::reference::{Array, Interpreter};
use crate::types::DType;

/// Parameters one behind the other, as a session lays them out.
struct Sequence {
    spans: HashMap<ValueId, Span>,
    bytes: u64,
}

impl Sequence {
    fn of(graph: &Graph) -> Result<Self> {
        let mut bytes = 0;
        let mut spans = HashMap::new();
        for (id, value) in graph.parameters() {
            let own = Layout::of(&value.shape, value.dtype)?.size_bytes();
            let span = Span {
                block: 0,
                offset: bytes,
                bytes: own.next_multiple_of(512),
            };
            bytes += span.bytes;
            spans.insert(id, span);
        }
        Ok(Self { spans, bytes })
    }
}

impl Arenas for Sequence {
    fn span(&self, parameter: ValueId) -> Result<Span> {
        Ok(self.spans[&parameter])
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Home {
    Value(ValueId),
    Scratch(usize),
    Arena(Arena),
}

/// What one run of a graph needs.
struct Network<'a> {
    graph: &'a Graph,
    lowered: Lowered,
    arenas: Sequence,
    index: HashMap<Home, usize>,
    memories: Vec<Memory>,
    data: Vec<(String, Array)>,
    variables: Interpreter,
}

/// Numbers around zero that no kernel cancels.
fn noise(n: usize, seed: usize) -> Vec<f32> {
    let number = |i: usize| ((i * 37 + i * i * 11 + seed * 29) % 97) as f32 / 64.0 - 0.75;
    (0..n).map(number).collect()
}

/// Runs the graph for `target` and returns the kernels that ran. Every access is checked, and every f32 output but those named in `apart`
/// is compared with the reference.
pub(super) fn check(
    graph: &Graph,
    target: Target,
    what: &str,
    apart: &[&str],
) -> BTreeSet<&'static str> {
    let mut network = Network::new(graph, target).unwrap();
    let mut ran = BTreeSet::new();
    let steps = std::mem::take(&mut network.lowered.steps);
    for (dispatch, step) in (1..).zip(&steps) {
        let bindings = step.kernel.bindings();
        let bound = step.places.iter().zip(&bindings);
        let bound: Vec<Bound> = bound
            .map(|(&place, binding)| network.bound(place, binding.layout.size_bytes()).unwrap())
            .collect();
        assert_eq!(bound.len(), bindings.len());
        let most = step.kernel.workgroups();
        assert!(
            most.into_iter().all(|n| (1..=65_535).contains(&n)),
            "{most:?}"
        );
        let memories = &mut network.memories;
        let faults = run(&step.kernel, target, &bound, memories, dispatch, None);
        for fault in &faults {
            eprintln!(
                "{what}: step {dispatch}, {}: {fault}",
                step.kernel.key(target)
            );
        }
        assert!(faults.is_empty(), "{what}: {}", step.kernel.name());
        ran.insert(step.kernel.name());
    }
    network.compare(what, apart);
    ran
}

impl<'a> Network<'a> {
    fn new(graph: &'a Graph, target: Target) -> Result<Self> {
        let arenas = Sequence::of(graph)?;
        let lowered = lower(graph, None, target, &arenas, 128 << 20)?;
        let mut network = Self {
            graph,
            lowered,
            arenas,
            index: HashMap::new(),
            memories: Vec::new(),
            data: Vec::new(),
            variables: Interpreter::new(graph),
        };
        let mut parameters = vec![0; network.arenas.bytes as usize];
        for (seed, (id, value)) in graph.values().enumerate() {
            let layout = Layout::of(&value.shape, value.dtype)?;
            let (dims, n) = (value.shape.dims(), layout.len());
            let bytes = match &value.source {
                Source::Input { below: Some(below) } => {
                    let ids: Vec<u32> = (0..n as u32).map(|i| (i * i + 3) % below).collect();
                    network
                        .data
                        .push((value.name.clone(), Array::from_u32(dims, &ids)?));
                    layout.pack(&ids)?
                }
                Source::Input { below: None } => {
                    let mut numbers = noise(n, seed);
                    if value.name == "mask" {
                        numbers.iter_mut().for_each(|x| *x = f32::from(*x > -0.3));
                    }
                    network
                        .data
                        .push((value.name.clone(), Array::from_f32(dims, &numbers)?));
                    layout.pack(&numbers)?
                }
                Source::State(start) => layout.pack(&vec![*start; n])?,
                Source::Parameter(_) => {
                    let numbers = noise(n, seed);
                    let array = Array::from_f32(dims, &numbers)?;
                    network.variables.set(value.name.clone(), array);
                    let at = network.arenas.span(id)?.offset as usize;
                    let bytes = layout.pack(&numbers)?;
                    parameters[at..at + bytes.len()].copy_from_slice(&bytes);
                    continue;
                }
                _ => continue,
            };
            network.place(Home::Value(id), || Memory::of(bytes));
        }
        // The shadows are up to date.
        let halves = parameters.chunks_exact(4).flat_map(|bytes| {
            let x = f32::from_le_bytes([0, 1, 2, 3].map(|i| bytes[i]));
            half::f16::from_f32(x).to_le_bytes()
        });
        let shadows = Memory::of(halves.collect());
        network.place(Home::Arena(Arena::Shadows), || shadows);
        let parameters = Memory::of(parameters);
        network.place(Home::Arena(Arena::Parameters), || parameters);
        Ok(network)
    }

    fn place(&mut self, home: Home, make: impl FnOnce() -> Memory) -> usize {
        let memories = &mut self.memories;
        *self.index.entry(home).or_insert_with(|| {
            memories.push(make());
            memories.len() - 1
        })
    }

    /// As [`Memory::slice`](crate::runtime) finds the bytes of a place.
    fn bound(&mut self, place: Place, bytes: u64) -> Result<Bound> {
        let size = |id: ValueId| -> Result<u64> {
            let value = self.graph.value(id)?;
            Ok(Layout::of(&value.shape, value.dtype)?.size_bytes())
        };
        let (home, offset, len, whole) = match place {
            Place::Part {
                value,
                offset,
                bytes,
            } => (Home::Value(value), offset, bytes, size(value)?),
            Place::Scratch(number) => (Home::Scratch(number), 0, bytes, bytes),
            Place::Span(arena, span) => {
                let all = match arena {
                    Arena::Shadows => self.arenas.bytes / 2,
                    Arena::Corrections => {
                        (self.arenas.bytes / PAGE * CORRECTION).next_multiple_of(16)
                    }
                    _ => self.arenas.bytes,
                };
                (Home::Arena(arena), span.offset_in(arena), bytes, all)
            }
            Place::Value(id) => {
                let parameter = self.arenas.spans.contains_key(&id);
                let arena = match (self.lowered.pinned.get(&id), self.lowered.shadows.get(&id)) {
                    (Some(&(arena, parameter)), _) => Some((arena, parameter)),
                    (None, Some(&parameter)) => Some((Arena::Shadows, parameter)),
                    (None, None) => parameter.then_some((Arena::Parameters, id)),
                };
                match arena {
                    Some((arena, parameter)) => {
                        let span = self.arenas.span(parameter)?;
                        return self.bound(Place::Span(arena, span), bytes);
                    }
                    None => (Home::Value(id), 0, bytes, size(id)?),
                }
            }
        };
        let memory = self.place(home, || match home {
            Home::Arena(_) => Memory::of(vec![0; whole as usize]),
            _ => Memory::poisoned(whole),
        });
        let whole = self.memories[memory].len();
        assert!(
            offset + len <= whole,
            "{place:?}: {offset} + {len} of {whole}"
        );
        Ok(Bound {
            memory,
            offset,
            len,
        })
    }

    fn compare(&mut self, what: &str, apart: &[&str]) {
        let graph = self.graph;
        let data: Vec<(&str, Array)> = self
            .data
            .iter()
            .map(|(name, array)| (name.as_str(), array.clone()))
            .collect();
        let wanted = self.variables.run(graph, &data).unwrap();
        for (name, id) in graph.outputs() {
            let root = self.lowered.roots[id.0 as usize];
            let value = graph.value(root).unwrap();
            if value.dtype != DType::F32 || apart.contains(&name.as_str()) {
                continue;
            }
            let layout = Layout::of(&value.shape, value.dtype).unwrap();
            let bound = self.bound(Place::Value(root), layout.size_bytes()).unwrap();
            let from = bound.offset as usize;
            let bytes = &self.memories[bound.memory].bytes()[from..from + bound.len as usize];
            let got: Vec<f32> = layout.unpack(bytes).unwrap();
            let wanted = wanted[name].data();
            let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
            let pairs = got.iter().zip(wanted);
            let error = norm(&mut pairs.map(|(&x, &y)| f64::from(x) - y));
            let size = norm(&mut wanted.iter().copied());
            if !size.is_finite() {
                continue;
            }
            let halves = graph.values().any(|(_, value)| value.dtype == DType::F16);
            let allowed = if halves { 2e-2 } else { 1e-4 };
            assert!(
                error <= allowed * size + 1e-6,
                "{what}: {name} is off by {error:e} of {size:e}"
            );
        }
    }
}
