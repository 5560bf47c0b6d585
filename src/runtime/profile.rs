//! Where the time of a run goes: by dispatch, and by layer, kernel and shape.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use serde::Serialize;
use serde_json::{Value, json};

use super::executable::one_line;
use super::{Ceilings, Executable, Plan};
use crate::compile::size;
use crate::error::{Error, Result};
use crate::file::AtomicFile;
use crate::gpu::{Clock, Gpu, Report};

/// A dispatch of a [`Profile`].
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Profiled {
    /// Family and variant of the kernel, the tier of a product included: `gemm_cooperative`, `gemm_tiled`, …
    pub kernel: String,
    /// The layer that it is for, if it is for one.
    pub layer: Option<String>,
    /// Workgroups per dimension.
    pub workgroups: [u32; 3],
    /// The whole description of the kernel, with its shapes.
    pub key: String,
    /// Floating-point operations, a multiply-add counted as two.
    pub flops: f64,
    /// Bytes of every operand, each counted once.
    pub bytes: f64,
    /// When it began, in nanoseconds after the first one began.
    pub start: f64,
    /// How long it took, in nanoseconds.
    pub nanoseconds: f64,
}

/// Dispatches of one kernel and shape for one layer, added up.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ProfileRow {
    /// As [`Profiled::kernel`].
    pub kernel: String,
    /// As [`Profiled::layer`].
    pub layer: Option<String>,
    /// As [`Profiled::workgroups`].
    pub workgroups: [u32; 3],
    /// As [`Profiled::key`].
    pub key: String,
    /// Number of dispatches.
    pub calls: usize,
    /// Time of all of them, in nanoseconds.
    pub nanoseconds: f64,
    /// Floating-point operations of all of them.
    pub flops: f64,
    /// Bytes of all of them.
    pub bytes: f64,
    /// Share of the bound: the least time that the work can take on the device, divided by the time. `None` without [`Ceilings`].
    pub bound: Option<f64>,
}

/// The dispatches of a run with their times. [`Executable::profile`] makes it; it prints as a table.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Profile {
    /// Name of the adapter.
    pub adapter: String,
    /// What measured the times.
    pub clock: Clock,
    /// The dispatches in order of execution.
    pub dispatches: Vec<Profiled>,
    /// What the device can do at best, if it was measured.
    pub ceilings: Option<Ceilings>,
    /// Memory of the executable.
    pub plan: Plan,
    /// Caches and memory of the device.
    pub report: Report,
    gpu: Gpu,
}

impl Profile {
    /// Start and duration of each dispatch of `executable`, in order.
    pub(super) fn new(
        executable: &Executable,
        gpu: &Gpu,
        clock: Clock,
        times: &[(f64, f64)],
    ) -> Self {
        let steps = executable.steps().zip(times);
        let dispatches = steps.map(|(step, &(start, nanoseconds))| Profiled {
            kernel: step.name.to_owned(),
            layer: step.layer.map(str::to_owned),
            workgroups: step.workgroups,
            key: step.key.to_owned(),
            flops: step.flops,
            bytes: step.bytes,
            start,
            nanoseconds,
        });
        Self {
            adapter: gpu.capabilities().adapter.clone(),
            clock,
            dispatches: dispatches.collect(),
            ceilings: None,
            plan: executable.plan().clone(),
            report: gpu.report(),
            gpu: gpu.clone(),
        }
    }

    /// Measures the device's [`Ceilings`], so that rows have a share of the bound. Without timestamps there are none.
    #[must_use]
    pub fn measured(mut self) -> Self {
        self.ceilings = match self.clock {
            Clock::Gpu => Ceilings::measure(&self.gpu).ok(),
            Clock::Host => None,
        };
        self
    }

    /// Time of all dispatches, in nanoseconds. What passes between them is not part of it.
    #[must_use]
    pub fn total(&self) -> f64 {
        // A sum of nothing would be -0.
        let times = self.dispatches.iter().map(|d| d.nanoseconds);
        times.fold(0.0, |sum, time| sum + time)
    }

    /// Dispatches of one layer, kernel and shape added up, those that take longest first.
    #[must_use]
    pub fn rows(&self) -> Vec<ProfileRow> {
        let mut rows: Vec<ProfileRow> = Vec::new();
        let mut known = HashMap::new();
        for dispatch in &self.dispatches {
            let place = (&dispatch.layer, &dispatch.key, dispatch.workgroups);
            let row = *known.entry(place).or_insert_with(|| {
                rows.push(ProfileRow {
                    kernel: dispatch.kernel.clone(),
                    layer: dispatch.layer.clone(),
                    workgroups: dispatch.workgroups,
                    key: dispatch.key.clone(),
                    calls: 0,
                    nanoseconds: 0.0,
                    flops: 0.0,
                    bytes: 0.0,
                    bound: None,
                });
                rows.len() - 1
            });
            let row = &mut rows[row];
            row.calls += 1;
            row.nanoseconds += dispatch.nanoseconds;
            row.flops += dispatch.flops;
            row.bytes += dispatch.bytes;
        }
        for row in &mut rows {
            let least = self.ceilings.map(|ceilings| {
                ceilings.bound(row.flops, row.bytes, row.kernel.ends_with("cooperative"))
            });
            row.bound = least
                .filter(|_| row.nanoseconds > 0.0)
                .map(|least| least / row.nanoseconds);
        }
        rows.sort_by(|a, b| b.nanoseconds.total_cmp(&a.nanoseconds));
        rows
    }

    /// Everything as JSON: adapter, clock, ceilings, rows, dispatches, memory and caches.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let ceilings = self.ceilings.map(|ceilings| {
            json!({
                "flops_per_second": ceilings.flops,
                "matrix_flops_per_second": ceilings.matrix_flops,
                "bytes_per_second": ceilings.bytes,
            })
        });
        let (plan, report) = (&self.plan, &self.report);
        json!({
            "adapter": self.adapter,
            "clock": self.clock,
            "nanoseconds": self.total(),
            "ceilings": ceilings,
            "rows": self.rows(),
            "dispatches": self.dispatches,
            "memory_bytes": {
                "peak": plan.peak(),
                "intermediates": plan.intermediates(),
                "inputs": plan.inputs,
                "parameters": plan.parameters,
                "moments": plan.moments,
                "gradients": plan.gradients,
                "accumulated": plan.accumulated,
                "f16_copies": plan.shadows,
                "states": plan.states,
            },
            "pool_bytes": {
                "allocated": report.pool.allocated_bytes,
                "in_use": report.pool.in_use_bytes,
                "peak": report.pool.peak_bytes,
            },
            "pipelines": {
                "hits": report.pipelines.hits,
                "misses": report.pipelines.misses,
                "cached": report.pipelines.cached,
                "compile_seconds": report.pipelines.compile_time.as_secs_f64(),
            },
        })
    }

    /// The dispatches as a trace in Chrome's format, which `chrome://tracing` and Perfetto open. Times are microseconds; layers are one track,
    /// kernels another.
    #[must_use]
    pub fn to_chrome_trace(&self) -> Value {
        let mut events = Vec::new();
        let name = |tid: u32, name: &str| json!({"ph": "M", "name": "thread_name", "pid": 1, "tid": tid, "args": {"name": name}});
        let process =
            json!({"ph": "M", "name": "process_name", "pid": 1, "args": {"name": self.adapter}});
        events.extend([process, name(1, "layers"), name(2, "kernels")]);
        let mut layer: Option<(&str, f64, f64)> = None;
        let mut layers = Vec::new();
        for dispatch in &self.dispatches {
            let (start, end) = (dispatch.start, dispatch.start + dispatch.nanoseconds);
            let own = dispatch.layer.as_deref().unwrap_or("no layer");
            layer = match layer {
                Some((name, begun, _)) if name == own => Some((name, begun, end)),
                before => {
                    layers.extend(before);
                    Some((own, start, end))
                }
            };
            events.push(json!({
                "ph": "X",
                "name": dispatch.kernel,
                "cat": own,
                "pid": 1,
                "tid": 2,
                "ts": start / 1e3,
                "dur": dispatch.nanoseconds / 1e3,
                "args": {
                    "layer": dispatch.layer,
                    "workgroups": dispatch.workgroups,
                    "key": dispatch.key,
                    "Mflop": dispatch.flops / 1e6,
                    "MB": dispatch.bytes / 1e6,
                },
            }));
        }
        layers.extend(layer);
        events.extend(layers.into_iter().map(|(name, start, end)| {
            json!({"ph": "X", "name": name, "pid": 1, "tid": 1, "ts": start / 1e3, "dur": (end - start) / 1e3})
        }));
        json!({"traceEvents": events, "displayTimeUnit": "ns"})
    }

    /// Writes `profile.txt`, `profile.json` and `trace.json` into a folder, which is made if it is missing.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        std::fs::create_dir_all(folder).map_err(|error| Error::io(folder, error))?;
        let files = [
            ("profile.txt", self.to_string()),
            ("profile.json", self.to_json().to_string()),
            ("trace.json", self.to_chrome_trace().to_string()),
        ];
        for (name, text) in files {
            let mut file = AtomicFile::create(&folder.join(name))?;
            file.write(text.as_bytes())?;
            file.commit()?;
        }
        Ok(())
    }
}

/// Rows that [`Profile`] prints by themselves; the rest is one line.
const PRINTED: usize = 40;
/// Characters of a kernel's description that are printed.
const KEY: usize = 90;

/// A table of the rows, the memory, and the counts of the caches.
impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (rows, total) = (self.rows(), self.total());
        let clock = match self.clock {
            Clock::Gpu => "GPU timestamps",
            Clock::Host => "the host's clock: the GPU's timestamps do not count",
        };
        let count = self.dispatches.len();
        writeln!(
            f,
            "{}, {count} dispatches, {:.3} ms by {clock}",
            self.adapter,
            total / 1e6
        )?;
        writeln!(
            f,
            "{:>10} {:>6} {:>6} {:>9} {:>8} {:>7}  {:22} {:24} shape",
            "µs", "%", "calls", "GFLOP/s", "GB/s", "bound", "kernel", "layer"
        )?;
        for row in rows.iter().take(PRINTED) {
            let rate = |work: f64| match row.nanoseconds > 0.0 {
                true => work / row.nanoseconds,
                false => 0.0,
            };
            let bound = row
                .bound
                .map_or_else(|| "-".to_owned(), |b| format!("{:.0} %", 100.0 * b));
            let key: String = row.key.chars().take(KEY).collect();
            writeln!(
                f,
                "{:10.2} {:6.1} {:6} {:9.1} {:8.1} {:>7}  {:22} {:24} {key}",
                row.nanoseconds / 1e3,
                100.0 * row.nanoseconds / total.max(1.0),
                row.calls,
                rate(row.flops),
                rate(row.bytes),
                bound,
                row.kernel,
                row.layer.as_deref().map_or("-".into(), one_line),
            )?;
        }
        if let Some(rest) = rows.get(PRINTED..).filter(|rest| !rest.is_empty()) {
            let time: f64 = rest.iter().map(|row| row.nanoseconds).sum();
            writeln!(
                f,
                "{:10.2} {:6.1} {:6} further rows",
                time / 1e3,
                100.0 * time / total.max(1.0),
                rest.len()
            )?;
        }
        writeln!(f, "memory  {}", self.plan)?;
        let pool = &self.report.pool;
        write!(
            f,
            "device  {} allocated, {} at most; {} kernels compiled in {:.1?}",
            size(pool.allocated_bytes),
            size(pool.peak_bytes),
            self.report.pipelines.misses,
            self.report.pipelines.compile_time
        )
    }
}
