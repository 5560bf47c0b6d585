//! Graphs without parameters and states as functions on tensors of the caller, inside a recording of the caller.

use std::collections::HashMap;
use std::sync::Arc;

use super::tune::Measuring;
use crate::compile::{Place, Plan, Table, compile};
use crate::error::{Error, Result};
use crate::gpu::{
    Access, Buffer, BufferSlice, Dispatch, Gpu, Layout, Pipeline, Recorder, Sweeper, Tensor,
};
use crate::graph::{Graph, Source, ValueId};
use crate::kernels::Target;
use crate::types::DType;

/// What a binding of a function refers to.
#[derive(Debug)]
enum Bound {
    /// Memory of the function.
    Own(BufferSlice),
    /// Bytes of an input of the caller, by number.
    Input(usize, Range),
    /// Bytes of an output of the caller, by number.
    Output(usize, Range),
}

/// Offset and size in bytes.
type Range = (u64, u64);

/// A kernel and what it binds.
#[derive(Debug)]
struct Call {
    pipeline: Arc<Pipeline>,
    workgroups: [u32; 3],
    bound: Vec<Bound>,
}

/// An input or output.
#[derive(Debug)]
struct Argument {
    name: String,
    layout: Layout,
}

/// A compiled graph that binds the caller's tensors. It has memory for intermediate values only.
#[derive(Debug)]
pub(crate) struct Function {
    gpu: Gpu,
    calls: Vec<Call>,
    inputs: Vec<Argument>,
    outputs: Vec<Argument>,
    /// Memory of the function that takes the place of an output whose tensor lies in the buffer of another.
    stand_ins: Vec<BufferSlice>,
    /// Behind everything that holds kernels.
    _sweeper: Sweeper,
}

impl Function {
    /// # Errors
    /// [`Error::Graph`] for a graph with parameters, states, or an output that is an input; what compiling and the device return.
    pub fn new(gpu: &Gpu, graph: &Graph) -> Result<Self> {
        let capabilities = gpu.capabilities();
        let target = Target::new(capabilities);
        let tuner = Measuring { gpu, target };
        let (lowered, plan) = compile(graph, Some(&tuner), &Table::default(), capabilities)?;
        let slots = plan.slots.iter();
        let slots: Vec<Buffer> = slots
            .map(|&bytes| gpu.buffer(bytes, "intermediate"))
            .collect::<Result<_>>()?;
        let mut places = Places {
            plan: &plan,
            slots: &slots,
            inputs: HashMap::new(),
            outputs: HashMap::new(),
        };
        let mut inputs = Vec::new();
        for (id, value) in graph.values() {
            match value.source {
                // Kernels without checks trust ids, and nobody has checked what a tensor of the caller holds.
                Source::Input { .. } if value.dtype == DType::U32 => {
                    return Err(Error::Graph("a function of indices".into()));
                }
                Source::Input { .. } => {
                    places.inputs.insert(id, inputs.len());
                    inputs.push(Argument {
                        name: value.name.clone(),
                        layout: Layout::of(&value.shape, value.dtype)?,
                    });
                }
                Source::State(_) => return Err(Error::Graph("a function with states".into())),
                _ => {}
            }
        }
        let mut outputs = Vec::new();
        let mut stand_ins = Vec::new();
        for (name, id) in graph.outputs() {
            let root = lowered.roots[id.0 as usize];
            let value = graph.value(root)?;
            let layout = Layout::of(&value.shape, value.dtype)?;
            stand_ins.push(places.own(Place::Value(root), (0, layout.size_bytes()))?);
            places.outputs.insert(root, outputs.len());
            outputs.push(Argument {
                name: name.clone(),
                layout,
            });
        }
        let mut calls = Vec::with_capacity(lowered.steps.len());
        for step in &lowered.steps {
            let kernel = &step.kernel;
            let mut bound = Vec::with_capacity(step.places.len());
            for (&place, binding) in step.places.iter().zip(&kernel.bindings()) {
                let to = places.find(place, binding.layout.size_bytes())?;
                if matches!(to, Bound::Input(..)) && binding.access == Access::ReadWrite {
                    return Err(Error::Graph("a function writes an input".into()));
                }
                bound.push(to);
            }
            calls.push(Call {
                pipeline: gpu.trusted_pipeline(&kernel.key(target), || kernel.source(target))?,
                workgroups: kernel.workgroups(),
                bound,
            });
        }
        Ok(Self {
            gpu: gpu.clone(),
            calls,
            inputs,
            outputs,
            stand_ins,
            _sweeper: Sweeper(gpu.clone()),
        })
    }

    /// Records a call: kernels read the inputs, each of which is named once, and write the outputs, all of which are named, where the
    /// caller has them.
    ///
    /// An output that lies in the buffer of an input or of another output, where no kernel may be bound for reading and writing, is
    /// computed in memory of the function and copied.
    ///
    /// # Errors
    /// [`Error::Data`] for a missing, unknown or repeated input or output; [`Error::Layout`] for a tensor of another layout than the
    /// graph's value has. Nothing is recorded then.
    pub fn record(
        &self,
        recorder: &mut Recorder,
        inputs: &[(&str, &Tensor)],
        outputs: &[(&str, &Tensor)],
    ) -> Result<()> {
        let inputs = arguments("input", &self.inputs, inputs)?;
        let outputs = arguments("output", &self.outputs, outputs)?;
        let is_shared = |number: usize| {
            let id = outputs[number].buffer().id();
            let others = outputs.iter().enumerate();
            let others = others.filter(|&(other, _)| other != number);
            let mut others = others.map(|(_, output)| output).chain(&inputs);
            others.any(|other| other.buffer().id() == id)
        };
        let mut copies = Vec::new();
        let mut results: Vec<&BufferSlice> = outputs.clone();
        for number in 0..outputs.len() {
            if is_shared(number) {
                results[number] = &self.stand_ins[number];
                copies.push((results[number], outputs[number]));
            }
        }
        let part = |whole: &BufferSlice, (offset, size): Range| {
            whole.buffer().slice(whole.offset() + offset, size)
        };
        let mut dispatches = Vec::with_capacity(self.calls.len());
        for call in &self.calls {
            let slices = call.bound.iter().map(|bound| match bound {
                Bound::Own(slice) => Ok(slice.clone()),
                &Bound::Input(number, range) => part(inputs[number], range),
                &Bound::Output(number, range) => part(results[number], range),
            });
            let slices: Vec<BufferSlice> = slices.collect::<Result<_>>()?;
            let bind_group = self.gpu.bind_group(&call.pipeline, &slices)?;
            let pipeline = Arc::clone(&call.pipeline);
            let dispatch = Dispatch::new(&self.gpu, pipeline, [bind_group], call.workgroups)?;
            dispatches.push(dispatch);
        }
        for dispatch in &dispatches {
            recorder.push(dispatch);
        }
        for (from, to) in copies {
            recorder.copy(from, to)?;
        }
        Ok(())
    }
}

/// Where the places of a function lie.
struct Places<'a> {
    plan: &'a Plan,
    slots: &'a [Buffer],
    inputs: HashMap<ValueId, usize>,
    outputs: HashMap<ValueId, usize>,
}

impl Places<'_> {
    fn own(&self, place: Place, (offset, size): Range) -> Result<BufferSlice> {
        let Some(&(slot, at)) = self.plan.place_of.get(&place) else {
            let reason = "a function has memory for results of operations only";
            return Err(Error::Graph(reason.into()));
        };
        self.slots[slot].slice(at + offset, size)
    }

    fn find(&self, place: Place, bytes: u64) -> Result<Bound> {
        let (place, range) = match place {
            Place::Part {
                value,
                offset,
                bytes,
            } => (Place::Value(value), (offset, bytes)),
            place => (place, (0, bytes)),
        };
        if let Place::Value(id) = place {
            if let Some(&number) = self.inputs.get(&id) {
                return Ok(Bound::Input(number, range));
            }
            if let Some(&number) = self.outputs.get(&id) {
                return Ok(Bound::Output(number, range));
            }
        }
        Ok(Bound::Own(self.own(place, range)?))
    }
}

/// The tensors given for arguments, in the order of the arguments.
fn arguments<'a>(
    kind: &str,
    arguments: &[Argument],
    given: &[(&str, &'a Tensor)],
) -> Result<Vec<&'a BufferSlice>> {
    let fail = |name: &str, reason: String| {
        Err(Error::Data {
            name: name.to_owned(),
            reason,
        })
    };
    for (name, _) in given {
        if !arguments.iter().any(|argument| argument.name == *name) {
            return fail(name, format!("the graph has no such {kind}"));
        }
    }
    let mut slices = Vec::with_capacity(arguments.len());
    for Argument { name, layout } in arguments {
        let mut all = given.iter().filter(|(given, _)| given == name);
        let (Some((_, tensor)), None) = (all.next(), all.next()) else {
            let times = given.iter().filter(|(given, _)| given == name).count();
            return fail(name, format!("the {kind} is given {times} times"));
        };
        if tensor.layout() != layout {
            return Err(Error::Layout {
                rows: layout.rows(),
                cols: layout.cols(),
                reason: format!("{name:?} needs {layout:?}, got {:?}", tensor.layout()),
            });
        }
        slices.push(tensor.slice());
    }
    Ok(slices)
}
