//! Parameters, moments and states: what lives between runs, by name.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::shadow::Shadows;
use crate::compile::{
    Arena, Arenas, CORRECTION, Entry, Lowered, NewParameters, PAGE, Span, Table, binds,
};
use crate::error::{Error, Result};
use crate::fnv::fnv1a;
use crate::gpu::{Alignment, Buffer, BufferSlice, Gpu, Layout, OFFSET_ALIGNMENT, Tensor};
use crate::graph::{Graph, Init, Op, Source};
use crate::types::DType;

/// Where parameters begin: at a page, and their f16 shadows, half as large, where a binding may.
const PARAMETER_ALIGNMENT: u64 = PAGE;
const _: () = assert!(PAGE.is_multiple_of(2 * OFFSET_ALIGNMENT));

/// Consecutive parameters in one buffer, with parallel buffers for their moments.
#[derive(Clone, Debug)]
pub(crate) struct Block {
    parameters: Buffer,
    moments: Option<[Buffer; 2]>,
    /// Bias corrections; there where moments are.
    corrections: Option<Buffer>,
    accumulated: Option<Buffer>,
    /// f16 copies.
    shadow: Option<Buffer>,
    pub bytes: u64,
}

impl Block {
    /// The arenas that belong to the session.
    pub fn arena(&self, arena: Arena) -> Option<&Buffer> {
        match (arena, &self.moments) {
            (Arena::Parameters, _) => Some(&self.parameters),
            (Arena::FirstMoments, Some([m, _])) => Some(m),
            (Arena::SecondMoments, Some([_, v])) => Some(v),
            (Arena::Accumulated, _) => self.accumulated.as_ref(),
            (Arena::Shadows, _) => self.shadow.as_ref(),
            (Arena::Corrections, _) => self.corrections.as_ref(),
            _ => None,
        }
    }
}

/// Parameters, optimizer moments and states of a session.
///
/// All parameters of a graph lie one behind the other in one buffer, their gradients and moments in parallel ones, so that a
/// norm or an optimizer step is one dispatch for the whole network. A clone shares the buffers.
#[derive(Clone, Debug)]
pub(crate) struct Parameters {
    gpu: Gpu,
    seed: u64,
    blocks: Vec<Block>,
    entries: Vec<Entry>,
    by_name: HashMap<String, usize>,
    states: HashMap<String, Tensor>,
    shadows: Arc<Shadows>,
}

impl Parameters {
    pub fn new(gpu: &Gpu, seed: u64) -> Self {
        Self {
            gpu: gpu.clone(),
            seed,
            blocks: Vec::new(),
            entries: Vec::new(),
            by_name: HashMap::new(),
            states: HashMap::new(),
            shadows: Arc::default(),
        }
    }

    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// As [`Session::get`](super::Session::get).
    pub fn get(&self, name: &str) -> Result<Vec<f32>> {
        let tensor = self.tensor(name)?;
        let data = tensor.download::<f32>(&self.gpu)?.wait()?;
        Ok(match self.by_name.get(name) {
            Some(&index) => self.entries[index].to_host_order(&data),
            None => data,
        })
    }

    /// As [`Session::set`](super::Session::set).
    pub fn set(&mut self, name: &str, data: &[f32]) -> Result<()> {
        let tensor = self.tensor(name)?;
        check(name, data, tensor.layout().len())?;
        match self.by_name.get(name) {
            Some(&index) => {
                let entry = &self.entries[index];
                let data = entry.to_storage(data);
                self.shadows.write(&self.gpu, entry.span.block, || {
                    tensor.upload(&self.gpu, &data)
                })
            }
            None => tensor.upload(&self.gpu, data),
        }
    }

    /// As [`Session::moments`](super::Session::moments).
    pub fn moments(&self, name: &str) -> Result<Option<[Vec<f32>; 2]>> {
        let entry = self.entry(name)?;
        let Some(buffers) = &self.blocks[entry.span.block].moments else {
            return Ok(None);
        };
        let [m, v] = buffers;
        let read = |buffer: &Buffer| -> Result<Vec<f32>> {
            let slice = buffer.slice(entry.span.offset, entry.layout.size_bytes())?;
            let tensor = Tensor::from_slice(slice, entry.layout)?;
            Ok(entry.to_host_order(&tensor.download::<f32>(&self.gpu)?.wait()?))
        };
        Ok(Some([read(m)?, read(v)?]))
    }

    /// As [`Session::set_moments`](super::Session::set_moments).
    pub fn set_moments(&mut self, name: &str, moments: [&[f32]; 2]) -> Result<()> {
        let entry = self.entry(name)?;
        let Some(buffers) = &self.blocks[entry.span.block].moments else {
            return Err(no_moments(name));
        };
        for data in moments {
            check(name, data, entry.layout.len())?;
        }
        for (buffer, data) in buffers.iter().zip(moments) {
            let slice = buffer.slice(entry.span.offset, entry.layout.size_bytes())?;
            let tensor = Tensor::from_slice(slice, entry.layout)?;
            tensor.upload(&self.gpu, &entry.to_storage(data))?;
        }
        Ok(())
    }

    /// As [`Session::bias_corrections`](super::Session::bias_corrections).
    pub fn corrections(&self, name: &str) -> Result<Option<[f32; 2]>> {
        let Some((tensor, first, _)) = self.correction_pages(name)? else {
            return Ok(None);
        };
        let pages = tensor.download::<f32>(&self.gpu)?.wait()?;
        Ok(Some([pages[2 * first], pages[2 * first + 1]]))
    }

    /// As [`Session::set_bias_corrections`](super::Session::set_bias_corrections).
    pub fn set_corrections(&mut self, name: &str, corrections: [f32; 2]) -> Result<()> {
        let Some((tensor, first, count)) = self.correction_pages(name)? else {
            return Err(no_moments(name));
        };
        check(name, &corrections, 2)?;
        // What lies before is of other parameters.
        let mut pages = tensor.download::<f32>(&self.gpu)?.wait()?;
        let own = &mut pages.as_chunks_mut().0[first..first + count];
        own.fill(corrections);
        tensor.upload(&self.gpu, &pages)
    }

    /// The corrections of a parameter, from which page on they are its own, and how many pages it has.
    fn correction_pages(&self, name: &str) -> Result<Option<(Tensor, usize, usize)>> {
        let entry = self.entry(name)?;
        let Some(buffer) = &self.blocks[entry.span.block].corrections else {
            return Ok(None);
        };
        let (whole, first, count) = entry.span.corrections();
        let layout = Layout::new(1, 2 * (first + count), DType::F32, Alignment::Bytes16)?;
        let slice = buffer.slice(whole.offset_in(Arena::Corrections), layout.size_bytes())?;
        Ok(Some((Tensor::from_slice(slice, layout)?, first, count)))
    }

    pub fn has_moments(&self, name: &str) -> Result<bool> {
        Ok(self.blocks[self.entry(name)?.span.block].moments.is_some())
    }

    /// Names of all states in alphabetical order, with their numbers of elements.
    pub fn states(&self) -> BTreeMap<&str, usize> {
        let states = self.states.iter();
        states
            .map(|(name, tensor)| (name.as_str(), tensor.layout().len()))
            .collect()
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        let index = self.by_name.get(name).ok_or_else(|| Error::Data {
            name: name.to_owned(),
            reason: "no parameter of this name; compile a graph that declares it".into(),
        })?;
        Ok(&self.entries[*index])
    }

    /// Zeroes all accumulated gradients.
    pub fn clear_accumulated(&self) -> Result<()> {
        let mut recorder = self.gpu.recorder("clear accumulated gradients");
        for buffer in self
            .blocks
            .iter()
            .filter_map(|block| block.accumulated.as_ref())
        {
            recorder.clear(&buffer.whole());
        }
        recorder.submit().map(|_| ())
    }

    /// Zeroes a state, if there is one of this name.
    pub fn clear_state(&self, name: &str) -> Result<()> {
        match self.states.get(name) {
            Some(tensor) => tensor.upload(&self.gpu, &vec![0.0; tensor.layout().len()]),
            None => Ok(()),
        }
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        if let Some(&index) = self.by_name.get(name) {
            let entry = &self.entries[index];
            return Tensor::from_slice(self.slice(entry)?, entry.layout);
        }
        self.states.get(name).cloned().ok_or_else(|| Error::Data {
            name: name.to_owned(),
            reason: "no parameter or state of this name; compile a graph that declares it".into(),
        })
    }

    fn slice(&self, entry: &Entry) -> Result<BufferSlice> {
        let block = &self.blocks[entry.span.block];
        block
            .parameters
            .slice(entry.span.offset, entry.layout.size_bytes())
    }

    pub fn state(&self, name: &str) -> Result<BufferSlice> {
        Ok(self.tensor(name)?.slice().clone())
    }

    /// Whether a buffer is one of the arenas.
    pub fn holds(&self, buffer: &Buffer) -> bool {
        let arenas = [
            Arena::Parameters,
            Arena::FirstMoments,
            Arena::SecondMoments,
            Arena::Accumulated,
            Arena::Shadows,
            Arena::Corrections,
        ];
        let mut blocks = self.blocks.iter();
        blocks.any(|block| {
            let mut all = arenas.iter().filter_map(|&arena| block.arena(arena));
            all.any(|arena| arena.id() == buffer.id())
        })
    }

    pub fn block(&self, index: usize) -> &Block {
        &self.blocks[index]
    }

    pub fn shadows(&self) -> &Arc<Shadows> {
        &self.shadows
    }

    /// Where the parameters of a graph lie, or will, on a device with these limits.
    pub fn table(&self, graph: &Graph, limits: &wgpu::Limits) -> Result<Table> {
        self.check_states(graph)?;
        let new = self.new_parameters(graph, limits)?;
        let created = new
            .entries
            .iter()
            .map(|(entry, _)| (&entry.name, entry.span));
        let created: HashMap<&String, Span> = created.collect();
        let mut spans = HashMap::new();
        for (id, value) in graph.parameters() {
            let known = self.by_name.get(&value.name).map(|&i| self.entries[i].span);
            if let Some(span) = known.or_else(|| created.get(&value.name).copied()) {
                spans.insert(id, span);
            }
        }
        let blocks = self.blocks.iter().map(|block| block.bytes);
        Ok(Table {
            spans,
            blocks: blocks.chain(new.blocks).collect(),
        })
    }

    /// Where the parameters of a graph that the session does not know yet will lie.
    fn new_parameters(&self, graph: &Graph, limits: &wgpu::Limits) -> Result<NewParameters> {
        let largest = limits
            .max_storage_buffer_binding_size
            .min(limits.max_buffer_size);
        let mut blocks: Vec<u64> = Vec::new();
        let mut entries: Vec<(Entry, Init)> = Vec::new();
        self.check_kinds(graph)?;
        for (_, value) in graph.parameters() {
            if let Some(&known) = self.by_name.get(&value.name) {
                let known = &self.entries[known];
                if known.shape != value.shape || known.taps != value.taps {
                    return Err(Error::Graph(format!(
                        "parameter {:?} has shape {} here, but {} in this session",
                        value.name, value.shape, known.shape
                    )));
                }
                continue;
            }
            let Source::Parameter(init) = value.source else {
                continue;
            };
            let layout = Layout::of(&value.shape, DType::F32)?;
            let bytes = layout.size_bytes().next_multiple_of(PARAMETER_ALIGNMENT);
            let what = || format!("parameter {:?} {} f32", value.name, value.shape);
            binds(what, bytes, limits)?;
            // A block is bound as a whole: where the adapter's limit is reached, another begins.
            let offset = match blocks.last_mut() {
                Some(size) if *size + bytes <= largest => {
                    *size += bytes;
                    *size - bytes
                }
                _ => {
                    blocks.push(bytes);
                    0
                }
            };
            let entry = Entry {
                name: value.name.clone(),
                shape: value.shape.clone(),
                taps: value.taps,
                layout,
                span: Span {
                    block: self.blocks.len() + blocks.len() - 1,
                    offset,
                    bytes,
                },
            };
            entries.push((entry, init));
        }
        Ok(NewParameters { blocks, entries })
    }

    /// A name is that of a parameter or of a state, in all graphs of the session.
    fn check_kinds(&self, graph: &Graph) -> Result<()> {
        for (_, value) in graph.values() {
            let name = &value.name;
            let (kind, other, taken) = match value.source {
                Source::Parameter(_) => ("parameter", "state", self.states.contains_key(name)),
                Source::State(_) => ("state", "parameter", self.by_name.contains_key(name)),
                _ => continue,
            };
            if taken {
                return Err(Error::Graph(format!(
                    "{kind} {name:?} is a {other} in another graph of this session; give one of them another name"
                )));
            }
        }
        Ok(())
    }

    /// These parameters and states with those that a graph adds, and with the arenas that its dispatches use. What is here already
    /// stays as it is, also on failure.
    pub fn grown(&self, graph: &Graph, lowered: &Lowered, table: &Table) -> Result<Self> {
        let mut grown = self.clone();
        let new = self.new_parameters(graph, &self.gpu.capabilities().limits)?;
        for bytes in new.blocks {
            grown.blocks.push(Block {
                parameters: self.gpu.zeroed_buffer(bytes, "parameters")?,
                moments: None,
                corrections: None,
                accumulated: None,
                shadow: None,
                bytes,
            });
        }
        grown.shadows.reserve(grown.blocks.len());
        for (entry, init) in new.entries {
            let data = grown.initial(&entry, init);
            let slice = grown.slice(&entry)?;
            Tensor::from_slice(slice, entry.layout)?.upload(&self.gpu, &data)?;
            let number = grown.entries.len();
            grown.by_name.insert(entry.name.clone(), number);
            grown.entries.push(entry);
        }
        let any = |test: fn(&Op) -> bool| graph.nodes().iter().any(|node| test(&node.op));
        let trains = any(|op| !op.updated().is_empty());
        let accumulates = any(|op| !op.accumulated().is_empty());
        for block in &mut grown.blocks {
            if trains && block.moments.is_none() {
                block.moments = Some([
                    self.gpu.zeroed_buffer(block.bytes, "first moments")?,
                    self.gpu.zeroed_buffer(block.bytes, "second moments")?,
                ]);
                // Vectors are bound in whole `vec4`s.
                let bytes = (block.bytes / PAGE * CORRECTION).next_multiple_of(16);
                block.corrections = Some(self.gpu.zeroed_buffer(bytes, "bias corrections")?);
            }
            if accumulates && block.accumulated.is_none() {
                // Zeroed: accumulation begins there, and the gaps between parameters are part of the norm.
                let buffer = self
                    .gpu
                    .zeroed_buffer(block.bytes, "accumulated gradients")?;
                block.accumulated = Some(buffer);
            }
        }
        for &param in lowered.shadows.values() {
            let block = &mut grown.blocks[table.span(param)?.block];
            if block.shadow.is_none() {
                let buffer = self.gpu.zeroed_buffer(block.bytes / 2, "f16 shadows")?;
                block.shadow = Some(buffer);
            }
        }
        for (_, value) in graph.values() {
            let Source::State(start) = value.source else {
                continue;
            };
            if !grown.states.contains_key(&value.name) {
                let layout = Layout::of(&value.shape, DType::F32)?;
                let tensor = Tensor::zeroed(&self.gpu, layout)?;
                tensor.upload(&self.gpu, &vec![start; layout.len()])?;
                grown.states.insert(value.name.clone(), tensor);
            }
        }
        Ok(grown)
    }

    fn initial(&self, entry: &Entry, init: Init) -> Vec<f32> {
        let n = entry.layout.len();
        match init {
            Init::Constant(number) => vec![number; n],
            Init::Uniform(bound) if bound > 0.0 => {
                let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
                rng.set_stream(fnv1a(entry.name.as_bytes()));
                // The generator needs a finite width: wider ranges are drawn at half their size.
                let factor = if bound > f32::MAX / 2.0 { 2.0 } else { 1.0 };
                let half = bound / factor;
                let draws = (0..n).map(|_| factor * rng.random_range(-half..half));
                // Drawn in host order, so that the storage order does not show.
                let data: Vec<f32> = draws.collect();
                entry.to_storage(&data)
            }
            Init::Uniform(_) => vec![0.0; n],
        }
    }

    /// Fails where a state of a graph is known with another shape.
    fn check_states(&self, graph: &Graph) -> Result<()> {
        for (_, value) in graph.values() {
            if !matches!(value.source, Source::State(_)) {
                continue;
            }
            let layout = Layout::of(&value.shape, DType::F32)?;
            if let Some(known) = self.states.get(&value.name)
                && *known.layout() != layout
            {
                let (rows, cols) = (known.layout().rows(), known.layout().cols());
                return Err(Error::Graph(format!(
                    "state {:?} has shape {} here, but {rows} rows of {cols} in this session",
                    value.name, value.shape
                )));
            }
        }
        Ok(())
    }
}

fn no_moments(name: &str) -> Error {
    Error::Data {
        name: name.to_owned(),
        reason: "has no moments; compile a graph that trains".into(),
    }
}

/// What a parameter or state takes: `expected` finite numbers.
fn check(name: &str, data: &[f32], expected: usize) -> Result<()> {
    let fail = |reason: String| {
        Err(Error::Data {
            name: name.to_owned(),
            reason,
        })
    };
    if data.len() != expected {
        return fail(format!("needs {expected} elements, got {}", data.len()));
    }
    match data.iter().position(|x| !x.is_finite()) {
        Some(i) => fail(format!("element {i} is {}", data[i])),
        None => Ok(()),
    }
}
