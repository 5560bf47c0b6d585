//! Where graphs become executables, on parameters that they share.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::dump::dump;
use super::executable::Executable;
use super::parameters::Parameters;
use super::recent::Recent;
use crate::compile::{self, Plan, fingerprint, size};
use crate::error::Result;
use crate::gpu::Gpu;
use crate::graph::Graph;

/// Counts of a session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SessionStats {
    /// Number of [`Session::compile`] calls that found the graph compiled.
    pub hits: u64,
    /// Number of [`Session::compile`] calls that compiled the graph.
    pub misses: u64,
    /// Number of compiled graphs that were dropped because there were more than [`Session::max_executables`].
    pub evicted: u64,
    /// Number of compiled graphs that the session holds.
    pub executables: usize,
    /// Number of times that a block of parameters was copied to f16 by a dispatch of its own, because something other than the
    /// step of a graph that reads the copy had changed a parameter.
    pub shadow_refreshes: u64,
}

/// Parameters, optimizer moments and states by name, on one device, shared by all graphs compiled here.
///
/// All parameters of a graph lie one behind the other in one buffer, their gradients and moments in parallel ones. A norm or an
/// optimizer step is therefore one dispatch for the whole network.
///
/// A session keeps compiled graphs, so that an equal graph is not compiled again. Their number is bounded, see
/// [`Session::max_executables`]. A dropped session returns its memory to the device.
#[derive(Debug)]
pub struct Session {
    /// By the fingerprint of their graph.
    executables: Recent<u128, Executable>,
    parameters: Parameters,
    max_submission: Option<Duration>,
    stats: SessionStats,
    /// Last, so that everything before it is dropped already.
    _memory: Memory,
}

/// Gives back to the device what nothing uses any more.
#[derive(Debug)]
struct Memory(Gpu);

impl Drop for Memory {
    fn drop(&mut self) {
        self.0.trim();
    }
}

impl Session {
    /// Number of compiled graphs that a session keeps unless [`Session::max_executables`] says otherwise.
    pub const MAX_EXECUTABLES: usize = 32;
    /// Longest time of a submission on hardware unless [`Session::max_submission`] says otherwise.
    pub const MAX_SUBMISSION: Duration = Duration::from_millis(500);

    /// An empty session; parameters start from `seed`, each from its own stream, so that their order does not matter.
    #[must_use]
    pub fn new(gpu: &Gpu, seed: u64) -> Self {
        Self {
            executables: Recent::new(Self::MAX_EXECUTABLES),
            parameters: Parameters::new(gpu, seed),
            max_submission: match gpu.capabilities().device_type {
                wgpu::DeviceType::Cpu => None,
                _ => Some(Self::MAX_SUBMISSION),
            },
            stats: SessionStats::default(),
            _memory: Memory(gpu.clone()),
        }
    }

    /// Keeps at most `most` compiled graphs, at least the one compiled last; [`Session::MAX_EXECUTABLES`] without this call.
    ///
    /// When there are more, the one that [`Session::compile`] was asked for longest ago is dropped, with its buffers. A graph whose
    /// executable is held by the caller is never dropped, so that there may be more than `most`. A graph that was dropped is compiled
    /// again when it is asked for. Parameters, moments and states are never dropped.
    #[must_use]
    pub fn max_executables(mut self, most: usize) -> Self {
        self.executables.most = most.max(1);
        self
    }

    /// Cuts runs of graphs compiled from now on into submissions of at most about `most`; `None` never cuts.
    ///
    /// Desktop systems end a submission that takes about two seconds, and the device with it. Without this call the bound is
    /// [`Session::MAX_SUBMISSION`] on hardware, and there is none on software adapters, which no system watches. The time of a run is
    /// estimated from its operations and bytes, and corrected by the shortest time that a run of the executable took from its
    /// submission to its results. Submissions follow each other in order, so that results have the same bits.
    /// A single dispatch is never cut: one that takes longer than the bound is a submission of its own.
    #[must_use]
    pub fn max_submission(mut self, most: Option<Duration>) -> Self {
        self.max_submission = most;
        self
    }

    /// The device.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        self.parameters.gpu()
    }

    /// Hits and misses of [`Session::compile`], and what keeping f16 copies took.
    #[must_use]
    pub fn stats(&self) -> SessionStats {
        SessionStats {
            evicted: self.executables.evicted,
            executables: self.executables.len(),
            shadow_refreshes: self.parameters.shadows().refreshes(),
            ..self.stats
        }
    }

    /// The executable of a graph: compiled now, or found because an equal graph was compiled before.
    ///
    /// Parameters and states that the session does not know yet are created and initialised. A failure leaves the session as it was.
    ///
    /// # Errors
    /// [`Error::Graph`](crate::Error::Graph) when a name is known with another shape or as another kind of value; [`Error::Limit`](crate::Error::Limit), [`Error::OutOfMemory`](crate::Error::OutOfMemory),
    /// [`Error::Validation`](crate::Error::Validation), [`Error::DeviceLost`](crate::Error::DeviceLost) from the device.
    pub fn compile(&mut self, graph: &Graph) -> Result<Arc<Executable>> {
        let key = fingerprint(graph);
        if let Some(executable) = self.executables.find(&key) {
            self.stats.hits += 1;
            return Ok(executable);
        }
        let start = Instant::now();
        // What fails up to here leaves everything as it was.
        let (mut executable, parameters) =
            Executable::new(&self.parameters, graph, self.max_submission)?;
        executable.name = format!("{:016x}", key as u64);
        let executable = Arc::new(executable);
        self.parameters = parameters;
        self.stats.misses += 1;
        self.executables.insert(key, Arc::clone(&executable));
        if self.executables.evict() {
            self.gpu().trim();
        }
        if let Some(folder) = self.gpu().dump_dir() {
            dump(&folder.join(&executable.name), graph, &executable);
        }
        let plan = executable.plan();
        log::info!(
            "graph {:016x} compiled: {} nodes, {} dispatches, {}, {} ms",
            key as u64,
            graph.nodes().len(),
            plan.dispatches,
            size(plan.peak()),
            start.elapsed().as_millis()
        );
        Ok(executable)
    }

    /// Drops the executable of a graph, if the session has one, and returns its buffers to the device; whether there was one.
    ///
    /// Parameters, moments and states stay. An executable that the caller holds keeps its buffers until it is dropped there.
    pub fn forget(&mut self, graph: &Graph) -> bool {
        let found = self.executables.forget(&fingerprint(graph));
        if found {
            self.gpu().trim();
        }
        found
    }

    /// What [`Session::compile`] would need for a graph: nothing is compiled, nothing allocated. Kernels are chosen by the built-in
    /// rules, so that a tuner's choices may change the scratch memory of products.
    ///
    /// # Errors
    /// As [`Session::compile`], but nothing is asked of the device: memory may still run out there.
    pub fn plan(&self, graph: &Graph) -> Result<Plan> {
        self.plan_for(graph, &self.gpu().capabilities().limits)
    }

    /// As [`Session::plan`], for a device with other limits: what a graph would need on a larger or smaller one with the same features.
    ///
    /// # Errors
    /// As [`Session::plan`].
    pub fn plan_for(&self, graph: &Graph, limits: &wgpu::Limits) -> Result<Plan> {
        let mut capabilities = self.gpu().capabilities().clone();
        capabilities.limits = limits.clone();
        let table = self.parameters.table(graph, limits)?;
        let (_, plan) = compile::compile(graph, None, &table, &capabilities)?;
        Ok(plan)
    }

    /// Names and host shapes of all parameters, in the order of their creation.
    pub fn parameters(&self) -> impl Iterator<Item = (&str, Vec<usize>)> {
        let entries = self.parameters.entries().iter();
        entries.map(|entry| (entry.name.as_str(), entry.host_shape()))
    }

    /// The elements of a parameter or state in the order of its host shape.
    ///
    /// # Errors
    /// [`Error::Data`](crate::Error::Data) for an unknown name; [`Error::OutOfMemory`](crate::Error::OutOfMemory), [`Error::DeviceLost`](crate::Error::DeviceLost).
    pub fn get(&self, name: &str) -> Result<Vec<f32>> {
        self.parameters.get(name)
    }

    /// Replaces the elements of a parameter or state, given in the order of its host shape.
    ///
    /// # Errors
    /// [`Error::Data`](crate::Error::Data) for an unknown name, a wrong number of elements, NaN or infinity; [`Error::DeviceLost`](crate::Error::DeviceLost).
    pub fn set(&mut self, name: &str, data: &[f32]) -> Result<()> {
        self.parameters.set(name, data)
    }

    /// First and second moments of a parameter in the order of its host shape; `None` before a graph with AdamW was compiled.
    ///
    /// # Errors
    /// As [`Session::get`].
    pub fn moments(&self, name: &str) -> Result<Option<[Vec<f32>; 2]>> {
        self.parameters.moments(name)
    }

    /// Replaces the moments of a parameter, given in the order of its host shape.
    ///
    /// # Errors
    /// As [`Session::set`]; [`Error::Data`](crate::Error::Data) before a graph with AdamW was compiled.
    pub fn set_moments(&mut self, name: &str, moments: [&[f32]; 2]) -> Result<()> {
        self.parameters.set_moments(name, moments)
    }

    /// The bias corrections of a parameter: 1 − β1ᵗ and 1 − β2ᵗ after t updates of this parameter, whichever graphs they were of. `None`
    /// before a graph with AdamW was compiled.
    ///
    /// # Errors
    /// As [`Session::get`].
    pub fn bias_corrections(&self, name: &str) -> Result<Option<[f32; 2]>> {
        self.parameters.corrections(name)
    }

    /// Replaces the bias corrections of a parameter; zeros for one without updates.
    ///
    /// # Errors
    /// As [`Session::set_moments`].
    pub fn set_bias_corrections(&mut self, name: &str, corrections: [f32; 2]) -> Result<()> {
        self.parameters.set_corrections(name, corrections)
    }

    pub(crate) fn has_moments(&self, name: &str) -> Result<bool> {
        self.parameters.has_moments(name)
    }

    /// Names of all states in alphabetical order, with their numbers of elements.
    pub(crate) fn states(&self) -> BTreeMap<&str, usize> {
        self.parameters.states()
    }

    /// Zeroes all accumulated gradients.
    pub(crate) fn clear_accumulated(&self) -> Result<()> {
        self.parameters.clear_accumulated()
    }

    /// Zeroes a state, if there is one of this name.
    pub(crate) fn clear_state(&self, name: &str) -> Result<()> {
        self.parameters.clear_state(name)
    }
}
