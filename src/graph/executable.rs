//! A compiled graph: a list of dispatches with every buffer, pipeline and binding in place.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use super::lower::{Arena, Arenas, Lowered, Place, lower};
use super::plan::{Plan, plan};
use super::session::{Session, Table};
use super::shadow::ShadowUse;
use super::{DType, Graph, Source, ValueId};
use crate::error::{Error, Result};
use crate::gpu::{
    BindGroup, Buffer, BufferSlice, Gpu, Layout, Pipeline, ProfileStep, Readback, Recorder, Tensor,
    Timing,
};
use crate::kernels::{self, Cost, Kernel, MAX_BINDINGS, Target};

/// Data for an input, dense and row-major.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Host<'a> {
    /// For f32 inputs, and for f16 inputs (rounded to nearest even).
    F32(&'a [f32]),
    /// For f16 inputs.
    F16(&'a [half::f16]),
    /// For index inputs.
    U32(&'a [u32]),
}

impl<'a> From<&'a [f32]> for Host<'a> {
    fn from(data: &'a [f32]) -> Self {
        Self::F32(data)
    }
}

impl<'a> From<&'a Vec<f32>> for Host<'a> {
    fn from(data: &'a Vec<f32>) -> Self {
        Self::F32(data)
    }
}

impl<'a> From<&'a [half::f16]> for Host<'a> {
    fn from(data: &'a [half::f16]) -> Self {
        Self::F16(data)
    }
}

impl<'a> From<&'a [u32]> for Host<'a> {
    fn from(data: &'a [u32]) -> Self {
        Self::U32(data)
    }
}

impl<'a> From<&'a Vec<u32>> for Host<'a> {
    fn from(data: &'a Vec<u32>) -> Self {
        Self::U32(data)
    }
}

#[derive(Debug)]
pub(super) struct Dispatch {
    name: &'static str,
    pub(super) pipeline: Arc<Pipeline>,
    pub(super) bind_group: BindGroup,
    pub(super) workgroups: [u32; 3],
    cost: Cost,
}

impl Dispatch {
    fn new(gpu: &Gpu, target: Target, kernel: &Kernel, slices: &[BufferSlice]) -> Result<Self> {
        let pipeline = gpu.pipeline(&kernel.key(target), || kernel.source(target))?;
        Ok(Self {
            name: kernel.name(),
            bind_group: gpu.bind_group(&pipeline, slices)?,
            pipeline,
            workgroups: kernel.workgroups(),
            cost: kernel.cost(),
        })
    }

    fn record(&self, recorder: &mut Recorder) -> Result<()> {
        recorder.dispatch(&self.pipeline, &self.bind_group, self.workgroups)
    }
}

#[derive(Debug)]
pub(super) struct Input {
    pub(super) tensor: Tensor,
    below: Option<u32>,
}

/// A graph ready to run: one submission a run, nothing left to decide.
///
/// Runs of one executable follow each other in the order of their [`Executable::run`] calls, from any thread.
#[derive(Debug)]
pub struct Executable {
    gpu: Gpu,
    pub(super) dispatches: Vec<Dispatch>,
    pub(super) inputs: HashMap<String, Input>,
    pub(super) outputs: Vec<(String, BufferSlice, Layout)>,
    assigns: Vec<(BufferSlice, BufferSlice)>,
    shadows: ShadowUse,
    /// Everything a run overwrites, for [`Executable::poison`].
    intermediates: Vec<BufferSlice>,
    plan: Plan,
    /// Uploads and the submission that reads them belong together.
    order: Mutex<()>,
}

impl Executable {
    pub(super) fn new(session: &Session, graph: &Graph) -> Result<Self> {
        let gpu = session.gpu();
        let capabilities = gpu.capabilities();
        let target = Target::new(capabilities);
        let table = session.table(graph);
        let max_binding = capabilities.limits.max_storage_buffer_binding_size;
        let lowered = lower(graph, Some(gpu), target, &table, max_binding)?;
        let plan = plan(graph, &lowered)?;
        let memory = Memory::new(session, graph, &lowered, &plan, table)?;
        let mut dispatches = Vec::with_capacity(lowered.steps.len());
        for step in &lowered.steps {
            let kernel = &step.kernel;
            let bindings = kernel.bindings();
            debug_assert!(bindings.len() <= MAX_BINDINGS, "{}", kernel.key(target));
            let slices: Vec<BufferSlice> = step
                .places
                .iter()
                .zip(&bindings)
                .map(|(&place, binding)| memory.slice(place, binding.layout.size_bytes()))
                .collect::<Result<_>>()?;
            dispatches.push(Dispatch::new(gpu, target, kernel, &slices)?);
        }
        let mut outputs = Vec::new();
        for (name, id) in graph.outputs() {
            let root = lowered.roots[id.0 as usize];
            let value = graph.value(root)?;
            if let Source::Constant(_) = value.source {
                return Err(Error::Graph(format!("output {name:?} is a constant")));
            }
            if let Some((Arena::Accumulated, _)) = lowered.pinned.get(&root) {
                return Err(Error::Graph(format!(
                    "output {name:?} is an accumulated gradient, which is zero when the run ends: output a copy"
                )));
            }
            let layout = Layout::of(&value.shape, value.dtype)?;
            let slice = memory.slice(Place::Value(root), layout.size_bytes())?;
            outputs.push((name.clone(), slice, layout));
        }
        let mut assigns = Vec::new();
        for &(value, state) in &lowered.assigns {
            let state = &graph.value(state)?.name;
            let to = session.state(state)?;
            assigns.push((memory.slice(Place::Value(value), to.size())?, to));
        }
        Ok(Self {
            gpu: gpu.clone(),
            dispatches,
            inputs: memory.inputs_by_name(graph)?,
            outputs,
            assigns,
            shadows: memory.shadow_use(graph, target)?,
            intermediates: memory.intermediates(graph)?,
            plan,
            order: Mutex::new(()),
        })
    }

    /// Buffers and dispatches.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Key and WGSL text of every dispatch, in order of execution; a kernel that runs twice occurs twice.
    pub fn sources(&self) -> impl ExactSizeIterator<Item = (&str, &str)> {
        self.dispatches
            .iter()
            .map(|dispatch| (dispatch.pipeline.key(), dispatch.pipeline.wgsl()))
    }

    /// Uploads the inputs, submits everything, returns at once.
    ///
    /// # Errors
    /// [`Error::Data`] for a missing, unknown, wrongly sized or out-of-range input; [`Error::OutOfMemory`],
    /// [`Error::DeviceLost`].
    pub fn run(&self, inputs: &[(&str, Host<'_>)]) -> Result<Pending> {
        let _order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        let mut recorder = self.gpu.recorder("run");
        self.check(inputs)?;
        for (name, data) in inputs {
            let tensor = &self.inputs[*name].tensor;
            match data {
                Host::F32(data) => recorder.upload(tensor, data),
                Host::F16(data) => recorder.upload(tensor, data),
                Host::U32(data) => recorder.upload(tensor, data),
            }?;
        }
        let shadows = self.shadows.begin();
        for dispatch in shadows.refreshes() {
            dispatch.record(&mut recorder)?;
        }
        for dispatch in &self.dispatches {
            dispatch.record(&mut recorder)?;
        }
        for (from, to) in &self.assigns {
            recorder.copy(from, to)?;
        }
        if self.outputs.is_empty() {
            recorder.submit()?;
            shadows.submitted();
            return Ok(Pending(None));
        }
        let slices: Vec<BufferSlice> = self.outputs.iter().map(|(_, s, _)| s.clone()).collect();
        let names: Vec<(String, Layout)> = self
            .outputs
            .iter()
            .map(|(name, _, layout)| (name.clone(), *layout))
            .collect();
        let readback = recorder.read_back(&slices, move |pieces| {
            let values = names.into_iter().zip(pieces);
            Ok(Outputs(
                values
                    .map(|((name, layout), bytes)| (name, (layout, bytes.to_vec())))
                    .collect(),
            ))
        })?;
        shadows.submitted();
        Ok(Pending(Some(readback)))
    }

    fn check(&self, inputs: &[(&str, Host<'_>)]) -> Result<()> {
        let fail = |name: &str, reason: String| {
            Err(Error::Data {
                name: name.to_owned(),
                reason,
            })
        };
        for name in self.inputs.keys() {
            let given = inputs.iter().filter(|(given, _)| given == name).count();
            if given != 1 {
                return fail(name, format!("the input is given {given} times"));
            }
        }
        for (name, data) in inputs {
            let Some(input) = self.inputs.get(*name) else {
                return fail(name, "the graph has no such input".into());
            };
            let layout = input.tensor.layout();
            let (len, fits) = match data {
                Host::F32(data) => (data.len(), layout.dtype() != DType::U32),
                Host::F16(data) => (data.len(), layout.dtype() == DType::F16),
                Host::U32(data) => (data.len(), layout.dtype() == DType::U32),
            };
            if !fits || len != layout.len() {
                return fail(
                    name,
                    format!(
                        "needs {} elements of {}, got {len} of another kind or number",
                        layout.len(),
                        layout.dtype()
                    ),
                );
            }
            if let (Host::U32(data), Some(below)) = (data, input.below)
                && let Some(i) = data.iter().position(|&id| id >= below)
            {
                return fail(
                    name,
                    format!("element {i} is {}, the bound is {below}", data[i]),
                );
            }
        }
        Ok(())
    }

    /// Fills everything that a run computes with NaN, padding included: for tests that a run writes all it should.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::DeviceLost`]
    pub fn poison(&self) -> Result<()> {
        let mut recorder = self.gpu.recorder("poison");
        for slice in &self.intermediates {
            recorder.write(slice, &vec![0xff; slice.size() as usize])?;
        }
        recorder.submit()?;
        Ok(())
    }

    /// Runs the dispatches once on whatever the inputs hold, and times each on the GPU. Parameters are updated as in a run.
    ///
    /// # Errors
    /// [`Error::Unsupported`] without timestamps; [`Error::DeviceLost`].
    pub fn profile(&self) -> Result<Vec<Timing>> {
        self.measure(Gpu::profile)
    }

    /// Runs the dispatches once on whatever the inputs hold, in one pass as a run does, and returns its GPU time in nanoseconds.
    /// Parameters are updated as in a run; states keep their values.
    ///
    /// # Errors
    /// As [`Executable::profile`].
    pub fn time(&self) -> Result<f64> {
        self.measure(Gpu::time)
    }

    /// Outdated shadows are copied before, in a submission of their own.
    fn measure<T>(&self, measure: impl Fn(&Gpu, &[ProfileStep]) -> Result<T>) -> Result<T> {
        let shadows = self.shadows.begin();
        let mut recorder = self.gpu.recorder("refresh shadows");
        for dispatch in shadows.refreshes() {
            dispatch.record(&mut recorder)?;
        }
        recorder.submit()?;
        let measured = measure(&self.gpu, &self.steps())?;
        shadows.submitted();
        Ok(measured)
    }

    /// The dispatches of a run, for timing them together with others through [`Gpu::time`] and [`Gpu::profile`].
    #[must_use]
    pub fn steps(&self) -> Vec<ProfileStep> {
        self.dispatches
            .iter()
            .map(|dispatch| ProfileStep {
                label: dispatch.pipeline.key().to_owned(),
                pipeline: Arc::clone(&dispatch.pipeline),
                bind_group: dispatch.bind_group.clone(),
                workgroups: dispatch.workgroups,
            })
            .collect()
    }
}

/// The dispatches: kernel, grid, work.
impl fmt::Display for Executable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.plan)?;
        for dispatch in &self.dispatches {
            let [x, y, z] = dispatch.workgroups;
            writeln!(
                f,
                "{:18} {x}x{y}x{z} groups, {:.3} Mflop, {:.3} MB  {}",
                dispatch.name,
                dispatch.cost.flops / 1e6,
                dispatch.cost.bytes / 1e6,
                dispatch.pipeline.key()
            )?;
        }
        Ok(())
    }
}

/// Buffers of one executable.
struct Memory<'a> {
    session: &'a Session,
    table: Table,
    inputs: HashMap<ValueId, Tensor>,
    gradients: HashMap<usize, Buffer>,
    /// By block, of those whose f16 copy is read.
    shadows: HashMap<usize, Buffer>,
    slots: Vec<Buffer>,
    /// Names of states by value.
    states: HashMap<ValueId, String>,
    lowered: &'a Lowered,
    plan: &'a Plan,
}

impl<'a> Memory<'a> {
    fn new(
        session: &'a Session,
        graph: &Graph,
        lowered: &'a Lowered,
        plan: &'a Plan,
        table: Table,
    ) -> Result<Self> {
        let gpu = session.gpu();
        let mut inputs = HashMap::new();
        let mut states = HashMap::new();
        for (id, value) in graph.values() {
            match value.source {
                Source::Input { .. } => {
                    let layout = Layout::of(&value.shape, value.dtype)?;
                    inputs.insert(id, Tensor::zeroed(gpu, layout)?);
                }
                Source::State(_) => {
                    states.insert(id, value.name.clone());
                }
                _ => {}
            }
        }
        let mut gradients = HashMap::new();
        for &(arena, param) in lowered.pinned.values() {
            if arena != Arena::Gradients {
                continue;
            }
            let block = table.run(param)?.block;
            if let Entry::Vacant(entry) = gradients.entry(block) {
                let bytes = session.block(block).bytes;
                // Zeroed: the gaps between parameters are part of the norm.
                entry.insert(gpu.zeroed_buffer(bytes, "gradients")?);
            }
        }
        let mut shadows = HashMap::new();
        for &param in lowered.shadows.values() {
            let block = table.run(param)?.block;
            if let Entry::Vacant(entry) = shadows.entry(block) {
                let bytes = session.block(block).bytes;
                entry.insert(session.shadows().buffer(gpu, block, bytes)?);
            }
        }
        let slots = plan
            .slots
            .iter()
            .map(|&bytes| gpu.buffer(bytes, "intermediate"))
            .collect::<Result<_>>()?;
        Ok(Self {
            session,
            table,
            inputs,
            gradients,
            shadows,
            slots,
            states,
            lowered,
            plan,
        })
    }

    fn slice(&self, place: Place, bytes: u64) -> Result<BufferSlice> {
        if let Place::Part {
            value,
            offset,
            bytes,
        } = place
        {
            let whole = self.slice(Place::Value(value), offset + bytes)?;
            return whole.buffer().slice(whole.offset() + offset, bytes);
        }
        if let Some(&slot) = self.plan.slot_of.get(&place) {
            return self.slots[slot].slice(0, bytes);
        }
        let (arena, run) = match place {
            Place::Run(arena, run) => (arena, run),
            Place::Value(id) => {
                if let Some(tensor) = self.inputs.get(&id) {
                    return Ok(tensor.slice().clone());
                }
                if let Some(name) = self.states.get(&id) {
                    return self.session.state(name);
                }
                if let Some(&(arena, param)) = self.lowered.pinned.get(&id) {
                    (arena, self.table.run(param)?)
                } else if let Some(&param) = self.lowered.shadows.get(&id) {
                    (Arena::Shadows, self.table.run(param)?)
                } else {
                    (Arena::Parameters, self.table.run(id)?)
                }
            }
            // Parts were taken from their value above.
            Place::Part { .. } => return Err(Error::Graph("a part of a part".into())),
            Place::Scratch(number) => {
                return Err(Error::Graph(format!("scratch {number} was not planned")));
            }
        };
        let buffer = match arena {
            Arena::Gradients => self.gradients.get(&run.block),
            Arena::Shadows => self.shadows.get(&run.block),
            _ => self.session.block(run.block).arena(arena),
        };
        let missing = || Error::Graph("an arena is used before it is allocated".into());
        let buffer = buffer.ok_or_else(missing)?;
        buffer.slice(run.offset_in(arena), bytes)
    }

    fn shadow_use(&self, graph: &Graph, target: Target) -> Result<ShadowUse> {
        let gpu = self.session.gpu();
        let mut reads = Vec::new();
        for (&block, shadow) in &self.shadows {
            let block_of = self.session.block(block);
            let parameters = block_of.arena(Arena::Parameters).map(Buffer::whole);
            let slices: Vec<BufferSlice> = parameters.into_iter().chain([shadow.whole()]).collect();
            let kernel = kernels::optimizer::shadow(block_of.bytes as usize / 4, target)?;
            reads.push((block, Dispatch::new(gpu, target, &kernel, &slices)?));
        }
        let mut outdates = Vec::new();
        for param in graph.nodes().iter().flat_map(|node| node.op.updated()) {
            let block = self.table.run(*param)?.block;
            if !self.shadows.contains_key(&block) && !outdates.contains(&block) {
                outdates.push(block);
            }
        }
        Ok(ShadowUse {
            shadows: Arc::clone(self.session.shadows()),
            reads,
            outdates,
        })
    }

    fn inputs_by_name(&self, graph: &Graph) -> Result<HashMap<String, Input>> {
        let mut inputs = HashMap::new();
        for (&id, tensor) in &self.inputs {
            let value = graph.value(id)?;
            let below = match value.source {
                Source::Input { below } => below,
                _ => None,
            };
            let tensor = tensor.clone();
            inputs.insert(value.name.clone(), Input { tensor, below });
        }
        Ok(inputs)
    }

    fn intermediates(&self, graph: &Graph) -> Result<Vec<BufferSlice>> {
        let mut slices: Vec<BufferSlice> = self.slots.iter().map(Buffer::whole).collect();
        let pinned = self.lowered.pinned.iter();
        let computed = pinned.filter(|(_, (arena, _))| *arena == Arena::Gradients);
        for (&gradient, _) in computed {
            let value = graph.value(gradient)?;
            let bytes = Layout::of(&value.shape, value.dtype)?.size_bytes();
            slices.push(self.slice(Place::Value(gradient), bytes)?);
        }
        Ok(slices)
    }
}

/// Results of a run that may still be under way.
#[derive(Debug)]
#[must_use = "results arrive when waited for"]
pub struct Pending(Option<Readback<Outputs>>);

impl Pending {
    /// Blocks until the run is done.
    ///
    /// # Errors
    /// [`Error::DeviceLost`]
    pub fn wait(self) -> Result<Outputs> {
        match self.0 {
            Some(readback) => readback.wait(),
            None => Ok(Outputs::default()),
        }
    }

    /// The results if the run is done; does not block. After a `Some` there is nothing left to take.
    pub fn try_take(&mut self) -> Option<Result<Outputs>> {
        match &mut self.0 {
            Some(readback) => readback.try_take(),
            None => Some(Ok(Outputs::default())),
        }
    }
}

impl Future for Pending {
    type Output = Result<Outputs>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            Some(readback) => Pin::new(readback).poll(context),
            None => Poll::Ready(Ok(Outputs::default())),
        }
    }
}

/// Named results of a run, on the host.
#[derive(Clone, Debug, Default)]
pub struct Outputs(HashMap<String, (Layout, Vec<u8>)>);

impl Outputs {
    fn find(&self, name: &str) -> Result<&(Layout, Vec<u8>)> {
        self.0.get(name).ok_or_else(|| Error::Data {
            name: name.to_owned(),
            reason: "the graph has no such output".into(),
        })
    }

    /// The elements of an output, dense and row-major; f16 outputs are widened.
    ///
    /// # Errors
    /// [`Error::Data`] for an unknown name.
    pub fn get(&self, name: &str) -> Result<Vec<f32>> {
        let (layout, bytes) = self.find(name)?;
        layout.unpack(bytes)
    }

    /// The first element of an output: a loss, a norm.
    ///
    /// # Errors
    /// As [`Outputs::get`].
    pub fn scalar(&self, name: &str) -> Result<f32> {
        Ok(self.get(name)?[0])
    }

    /// Whether all padding of an output is zero, as the layout promises.
    ///
    /// # Errors
    /// As [`Outputs::get`].
    pub fn padding_is_zero(&self, name: &str) -> Result<bool> {
        let (layout, bytes) = self.find(name)?;
        let used = layout.cols() * layout.dtype().size();
        let mut rows = bytes.chunks_exact(layout.row_bytes());
        Ok(rows.all(|row| row[used..].iter().all(|&byte| byte == 0)))
    }
}
