//! A compiled graph: a list of dispatches with every buffer, pipeline and binding in place.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::bound::{BoundKernel, Input};
use super::pace::Pace;
use super::parameters::Parameters;
use super::profile::Profile;
use super::tune::Measuring;
use crate::compile::{Place, Plan, compile};
use crate::error::Result;
use crate::gpu::{
    Access, Around, Buffer, BufferSlice, Bundle, Clock, Gpu, Layout, Passes, Recorder, Sequence,
    Sweeper, Times,
};
use crate::graph::Graph;
use crate::kernels::{Kernel, MAX_BINDINGS, Target};
use crate::runtime::memory::Memory;
use crate::runtime::run::Named;
use crate::runtime::shadow::ShadowUse;

/// A graph that is ready to run: pipelines, buffers and bindings exist, so that a run only encodes and submits.
///
/// Runs of one executable follow each other in the order of their [`Executable::run`] calls, from any thread.
#[derive(Debug)]
pub struct Executable {
    gpu: Gpu,
    pub(crate) dispatches: Vec<BoundKernel>,
    pub(crate) inputs: Vec<Input>,
    /// Name, layout and place of each output on the host. The results of every run share it.
    pub(crate) results: Arc<[Named]>,
    /// What surrounds the dispatches: inputs, updates of states, outputs.
    pub(crate) bundle: Bundle,
    pub(crate) shadows: ShadowUse,
    /// Buffers that outlive a run and that its dispatches write: parameters, moments, accumulated gradients, f16 copies.
    lasting: Vec<Buffer>,
    /// Everything a run overwrites, for [`Executable::poison`].
    intermediates: Vec<BufferSlice>,
    plan: Plan,
    pub(crate) pace: Arc<Pace>,
    /// Fingerprint of the graph, in hexadecimal digits.
    pub(crate) name: String,
    /// Runs so far, until the one that is profiled.
    pub(crate) runs: AtomicU32,
    /// Behind everything that holds kernels and bind groups.
    _sweeper: Sweeper,
}

/// A dispatch of an [`Executable`], described.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Step<'a> {
    /// Family and variant of the kernel.
    pub name: &'static str,
    /// The layer that it is for, if it is for one.
    pub layer: Option<&'a str>,
    /// Workgroups per dimension.
    pub workgroups: [u32; 3],
    /// Floating-point operations, a multiply-add counted as two.
    pub flops: f64,
    /// Bytes of every operand, each counted once.
    pub bytes: f64,
    /// The whole description of the kernel.
    pub key: &'a str,
}

impl Executable {
    /// The executable of a graph, and the parameters with those that it adds. `known` keeps what it has. No submission of a run takes
    /// longer than `most`, as far as dispatches are shorter.
    pub(crate) fn new(
        known: &Parameters,
        graph: &Graph,
        most: Option<Duration>,
    ) -> Result<(Self, Parameters)> {
        let gpu = known.gpu();
        let capabilities = gpu.capabilities();
        let target = Target::new(capabilities);
        let table = known.table(graph, &capabilities.limits)?;
        let tuner = Measuring { gpu, target };
        let (lowered, plan) = compile(graph, Some(&tuner), &table, capabilities)?;
        let grown = known.grown(graph, &lowered, &table)?;
        let parameters = &grown;
        let memory = Memory::new(parameters, graph, &lowered, &plan, table)?;
        let mut kernels: Vec<(String, &Kernel)> = lowered
            .steps
            .iter()
            .map(|step| (step.kernel.key(target), &step.kernel))
            .collect();
        kernels.sort_by(|(a, _), (b, _)| a.cmp(b));
        kernels.dedup_by(|(a, _), (b, _)| a == b);
        let (keys, kernels): (Vec<_>, Vec<_>) = kernels.into_iter().unzip();
        let _compiled = gpu.compile_together(&keys, |i| kernels[i].source(target))?;
        let mut dispatches = Vec::with_capacity(lowered.steps.len());
        let mut lasting: Vec<Buffer> = Vec::new();
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
            for (slice, binding) in slices.iter().zip(&bindings) {
                let buffer = slice.buffer();
                let known = lasting.iter().any(|known| known.id() == buffer.id());
                if binding.access == Access::ReadWrite && !known && parameters.holds(buffer) {
                    lasting.push(buffer.clone());
                }
            }
            let turns = memory.turns(slices)?;
            let dispatch = BoundKernel::new(gpu, target, kernel, &turns)?;
            dispatches.push(dispatch.layer(step.layer.clone()));
        }
        let inputs = memory.inputs(graph);
        let mut bundle = Bundle::new(gpu, "run");
        bundle.read_in_place(memory.in_place());
        for input in &inputs {
            bundle.write(&input.tensor);
        }
        for &(value, state) in &lowered.assigns {
            let state = &graph.value(state)?.name;
            let to = parameters.state(state)?;
            bundle.copy(memory.slice(Place::Value(value), to.size())?, to)?;
        }
        let mut outputs = Vec::new();
        for (name, id) in graph.outputs() {
            let root = lowered.roots[id.0 as usize];
            let value = graph.value(root)?;
            let layout = Layout::of(&value.shape, value.dtype)?;
            let slice = memory.slice(Place::Value(root), layout.size_bytes())?;
            outputs.push((name.clone(), slice, layout));
        }
        let slices: Vec<BufferSlice> = outputs.iter().map(|(_, slice, _)| slice.clone()).collect();
        let results: Vec<Named> = outputs
            .iter()
            .zip(bundle.read(&slices))
            .map(|((name, _, layout), range)| Named {
                name: name.clone(),
                layout: *layout,
                range,
            })
            .collect();
        let executable = Self {
            gpu: gpu.clone(),
            pace: Arc::new(Pace::new(most, target, &dispatches)),
            dispatches,
            inputs,
            results: results.into(),
            bundle,
            shadows: memory.shadow_use(graph, target)?,
            lasting,
            intermediates: memory.intermediates(graph)?,
            plan,
            name: String::new(),
            runs: AtomicU32::new(0),
            _sweeper: Sweeper(gpu.clone()),
        };
        Ok((executable, grown))
    }

    pub(crate) fn input(&self, name: &str) -> Option<&Input> {
        self.inputs.iter().find(|input| input.name == name)
    }

    /// The memory plan, and the number of dispatches.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Number of submissions of the next run: 1, or more where its estimated or measured time exceeds
    /// [`Session::max_submission`](crate::Session::max_submission).
    #[must_use]
    pub fn submissions(&self) -> usize {
        let cuts = self.pace.cut(self.dispatches.iter());
        1 + cuts.filter(|&(_, cut)| cut).count()
    }

    /// Key and WGSL text of every dispatch, in order of execution. A kernel that runs twice occurs twice.
    pub fn sources(&self) -> impl ExactSizeIterator<Item = (&str, &str)> {
        self.dispatches
            .iter()
            .map(|dispatch| (dispatch.work.key(), dispatch.work.wgsl()))
    }

    /// Fills everything that a run computes with NaN, padding included. Tests use it to show that a run writes all it should.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory), [`Error::DeviceLost`](crate::Error::DeviceLost)
    pub fn poison(&self) -> Result<()> {
        let mut recorder = self.gpu.recorder("poison");
        for slice in &self.intermediates {
            recorder.write(slice, &vec![0xff; slice.size() as usize])?;
        }
        recorder.submit()?;
        Ok(())
    }

    /// Runs the dispatches once on whatever the inputs hold, and times each.
    ///
    /// Nothing that outlives a run changes: parameters, moments and accumulated gradients are copied before and restored after, which
    /// takes as much memory again meanwhile; states keep their values.
    ///
    /// Without timestamps, and where the driver's timestamps do not count, each dispatch is a submission of its own and timed by the host:
    /// [`Profile::clock`] says so. Other threads must not train meanwhile, since their updates would be undone.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory), [`Error::DeviceLost`](crate::Error::DeviceLost).
    pub fn profile(&self) -> Result<Profile> {
        let timestamps = self.gpu.capabilities().timestamps;
        let by_gpu = match timestamps {
            true => self.measure(Passes::Each)?.timings()?,
            false => Vec::new(),
        };
        let nothing = timestamps && self.dispatches.is_empty();
        let counts = by_gpu.iter().any(|timing| timing.nanoseconds > 0.0);
        let (clock, times) = match counts || nothing {
            true => {
                let times = by_gpu
                    .iter()
                    .map(|timing| (timing.start, timing.nanoseconds));
                (Clock::Gpu, times.collect())
            }
            false => (Clock::Host, self.time_by_host()?),
        };
        Ok(Profile::new(self, &self.gpu, clock, &times))
    }

    /// Start and duration of each dispatch in nanoseconds by the host's clock, less what an empty submission takes.
    fn time_by_host(&self) -> Result<Vec<(f64, f64)>> {
        let held = self.bundle.hold();
        let sequence = self.sequence_at(held.turn);
        let submit = |record: &dyn Fn(&mut Recorder) -> Result<()>| -> Result<f64> {
            let mut recorder = self.gpu.recorder("profile");
            record(&mut recorder)?;
            let start = Instant::now();
            recorder.submit()?.wait()?;
            Ok(start.elapsed().as_secs_f64() * 1e9)
        };
        let kept = self.kept()?;
        submit(&|recorder| {
            self.shadows
                .refreshes()
                .for_each(|dispatch| recorder.push(&dispatch.work));
            kept.iter()
                .try_for_each(|(buffer, copy)| recorder.copy(&buffer.whole(), &copy.whole()))
        })?;
        self.shadows.refreshed();
        let measure = || {
            let mut empty = f64::INFINITY;
            for _ in 0..5 {
                empty = empty.min(submit(&|_| Ok(()))?);
            }
            let mut at = 0.0;
            let mut times = Vec::new();
            for dispatch in sequence.each() {
                let time = submit(&|recorder| {
                    recorder.push(dispatch);
                    Ok(())
                });
                let time = (time? - empty).max(0.0);
                times.push((at, time));
                at += time;
            }
            Ok(times)
        };
        let times = measure();
        // Also after an error.
        submit(&|recorder| {
            kept.iter()
                .try_for_each(|(buffer, copy)| recorder.copy(&copy.whole(), &buffer.whole()))
        })?;
        times
    }

    /// Runs the dispatches once on whatever the inputs hold, in one pass as a run does, and returns its GPU time in nanoseconds.
    /// Nothing that outlives a run changes, as for [`Executable::profile`]. The pass is one submission, however long it takes.
    ///
    /// # Errors
    /// As [`Executable::profile`].
    pub fn time(&self) -> Result<f64> {
        let nanoseconds = self.measure(Passes::All)?.total()?;
        if nanoseconds > 0.0 {
            self.pace.note(Duration::from_nanos(nanoseconds as u64));
        }
        Ok(nanoseconds)
    }

    /// One submission: refreshes outdated shadows, copies what outlives a run, runs, and restores it. So whatever else changes parameters,
    /// also a callback of the caller, does so before or after all of it.
    fn measure(&self, passes: Passes) -> Result<Times> {
        // Inputs that are being written cannot be read, and no other run may come between.
        let held = self.bundle.hold();
        let sequence = self.sequence_at(held.turn);
        let kept = self.kept()?;
        let refreshes: Vec<&BoundKernel> = self.shadows.refreshes().collect();
        let around = Around {
            before: refreshes.iter().map(|dispatch| &dispatch.work).collect(),
            kept: &kept,
            note: &|sent| match sent {
                true => self.shadows.refreshed(),
                false => self.shadows.note(false),
            },
        };
        self.gpu.measure(&[&sequence], passes, &around)
    }

    /// Each buffer that outlives a run and is written by it, with another one of the same size.
    fn kept(&self) -> Result<Vec<(Buffer, Buffer)>> {
        let kept = self.lasting.iter().map(|buffer| {
            let copy = self.gpu.buffer(buffer.size(), "copy of parameters")?;
            Ok((buffer.clone(), copy))
        });
        kept.collect()
    }

    /// At the third run, writes a profile if the device was opened for it.
    pub(crate) fn profile_once(&self) {
        /// What is compiled, allocated and copied at first has happened.
        const WARM: u32 = 2;
        let Some(folder) = self.gpu.profile_dir() else {
            return;
        };
        if self.runs.load(Ordering::Relaxed) > WARM
            || self.runs.fetch_add(1, Ordering::Relaxed) != WARM
        {
            return;
        }
        let folder = folder.join(&self.name);
        let saved = self
            .profile()
            .and_then(|profile| profile.measured().save(&folder));
        match saved {
            Ok(()) => log::info!(
                "{}: wrote the profile of graph {}",
                folder.display(),
                self.name
            ),
            Err(error) => log::warn!("graph {}: no profile: {error}", self.name),
        }
    }

    /// The dispatches of a run, described, in order of execution.
    pub fn steps(&self) -> impl ExactSizeIterator<Item = Step<'_>> {
        self.dispatches.iter().map(|dispatch| Step {
            name: dispatch.name,
            layer: dispatch.layer.as_deref(),
            workgroups: dispatch.work.workgroups(),
            flops: dispatch.cost.flops,
            bytes: dispatch.cost.bytes,
            key: dispatch.work.key(),
        })
    }

    /// The dispatches of a run, for timing them together with others through [`Gpu::time`] and [`Gpu::profile`]. They read the inputs of the
    /// last run, in memory that later runs may use: not while other threads run the executable. Outdated f16 copies of parameters stay as
    /// they are.
    #[must_use]
    pub fn sequence(&self) -> Sequence {
        self.sequence_at(self.bundle.hold().turn)
    }

    fn sequence_at(&self, turn: usize) -> Sequence {
        Sequence::of(self.dispatches.iter().map(|dispatch| &dispatch.work), turn)
    }
}

/// A layer's name in one line of text, whatever characters it holds.
pub(super) fn one_line(layer: &str) -> Cow<'_, str> {
    match layer.contains(char::is_control) {
        true => layer.escape_debug().to_string().into(),
        false => layer.into(),
    }
}

/// The dispatches: kernel, grid, work, layer.
impl fmt::Display for Executable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.plan)?;
        for step in self.steps() {
            let [x, y, z] = step.workgroups;
            writeln!(
                f,
                "{:18} {x}x{y}x{z} groups, {:.3} Mflop, {:.3} MB  {}{}",
                step.name,
                step.flops / 1e6,
                step.bytes / 1e6,
                step.layer
                    .map_or_else(String::new, |layer| format!("{}: ", one_line(layer))),
                step.key
            )?;
        }
        Ok(())
    }
}
