//! One case on the device: compiled, checked, warmed up, timed.

use std::sync::Arc;
use std::time::Instant;

use energyflow::gpu::{Clock, Sequence};
use energyflow::{DType, Executable, Gpu, Session};

use crate::cases::Case;
use crate::workload::Workload;

/// Why a case has no result.
pub type Failure = Box<dyn std::error::Error>;

/// Copies of a case with different data, run in turn, so that no run finds its inputs in a cache because the last one read them.
const SETS: usize = 3;
/// More copies than this many bytes hold are not needed for that.
const ENOUGH: u64 = 2 << 30;
const WARM_UPS: usize = 5;
const WARM_SECONDS: f64 = 1.0;
const MOST_WARM_SECONDS: f64 = 4.0;
/// How long passes are compared with those of the window before, and what of their time counts as no longer falling.
const WINDOW_SECONDS: f64 = 0.25;
const STEADY: f64 = 0.99;
/// How long a pass is made; 20 times as long by the host's clock, which also sees what a submission takes.
const PASS_NANOSECONDS: f64 = 1e6;
const MOST_REPEATS: f64 = 50.0;
const RUNS: std::ops::RangeInclusive<usize> = 20..=2000;

/// Times of a case, in milliseconds of the GPU for a whole run: means over the runs of a pass, medians over the passes.
pub struct Measured {
    pub median: f64,
    pub min: f64,
    pub max: f64,
    pub flops: f64,
    pub bytes: f64,
    /// MiB of the buffers that one copy of the case holds: inputs, parameters, moments, gradients, intermediates and outputs, in
    /// the size classes of the pool. Without the staging of host copies. Constant while it runs, so this is the peak.
    pub memory: f64,
    /// Dispatches of a run.
    pub dispatches: usize,
    /// Some product of the case uses matrix units.
    pub matrix_units: bool,
}

/// A dispatch of a case and its median time.
pub struct Part {
    pub kernel: String,
    pub milliseconds: f64,
}

/// One copy: a graph with data, compiled in a session of its own.
struct Prepared {
    workload: Workload,
    executable: Arc<Executable>,
    case: &'static str,
    set: usize,
    _session: Session,
}

impl Prepared {
    fn new(gpu: &Gpu, case: &Case, dtype: DType, set: usize) -> Result<Self, Failure> {
        let workload = case.workload(dtype)?;
        let mut session = Session::new(gpu, set as u64);
        let prepared = Self {
            executable: session.compile(&workload.graph)?,
            workload,
            case: case.name,
            set,
            _session: session,
        };
        prepared.run()?;
        Ok(prepared)
    }

    /// Uploads the inputs, runs once, checks that results are numbers. Times of anything else would mean little: a training
    /// step skips its update when a gradient is not finite.
    fn run(&self) -> Result<(), Failure> {
        let (case, set) = (self.case, self.set);
        let pending = self
            .workload
            .feed_to(case, set, |inputs| self.executable.run(inputs))?;
        let outputs = pending.wait()?;
        for (name, _) in self.workload.graph.outputs() {
            if !outputs.get(name)?.iter().all(|x| x.is_finite()) {
                return Err(format!("output {name:?} is not finite").into());
            }
        }
        Ok(())
    }
}

/// Measures a case for about `seconds`.
pub fn measure(gpu: &Gpu, case: &Case, dtype: DType, seconds: f64) -> Result<Measured, Failure> {
    gpu.trim();
    let in_use = || gpu.report().pool.in_use_bytes;
    let before = in_use();
    let first = Prepared::new(gpu, case, dtype, 0)?;
    let memory = in_use() - before;
    let mut sets = vec![first];
    while sets.len() < SETS && in_use() - before < ENOUGH {
        match Prepared::new(gpu, case, dtype, sets.len()) {
            Ok(set) => sets.push(set),
            Err(failure) if is_out_of_memory(&failure) => break,
            Err(failure) => return Err(failure),
        }
    }
    // A pass runs the copies in turn, as often as makes it long against what the host does between passes: a GPU that
    // is idle most of the time lowers its clock, and would be timed at that.
    let turn: Vec<Sequence> = sets.iter().map(|set| set.executable.sequence()).collect();
    let turn: Vec<&Sequence> = turn.iter().collect();
    let time = |pass: &[&Sequence]| gpu.time_on_any_clock(pass);
    time(&turn)?;
    let (once, clock) = time(&turn)?;
    let longer = if clock == Clock::Host { 20.0 } else { 1.0 };
    let (least, most) = (longer * PASS_NANOSECONDS, longer * MOST_REPEATS);
    let repeats = (least / once).clamp(1.0, most) as usize;
    let runs = repeats * sets.len();
    let pass = turn.repeat(repeats);

    let begin = Instant::now();
    let mut warm_ups = 0;
    let (mut before, mut now) = (f64::INFINITY, f64::INFINITY);
    // Preparing the data left the device idle, and its clock takes its time to rise: until times no longer fall.
    while warm_ups < WARM_UPS
        || begin.elapsed().as_secs_f64() < WARM_SECONDS
        || (now < STEADY * before && begin.elapsed().as_secs_f64() < MOST_WARM_SECONDS)
    {
        let window = Instant::now();
        before = now;
        now = f64::INFINITY;
        while window.elapsed().as_secs_f64() < WINDOW_SECONDS {
            now = now.min(time(&pass)?.0);
            warm_ups += 1;
        }
    }
    let begin = Instant::now();
    let mut times = Vec::new();
    while times.len() < *RUNS.start()
        || (times.len() < *RUNS.end() && begin.elapsed().as_secs_f64() < seconds)
    {
        times.push(time(&pass)?.0 * 1e-6 / runs as f64);
    }
    sets[0].run()?;

    let median = median(&mut times);
    Ok(Measured {
        median,
        // Sorted by now.
        min: times[0],
        max: times[times.len() - 1],
        flops: sets[0].workload.flops,
        bytes: sets[0].workload.bytes,
        memory: memory as f64 / f64::from(1 << 20),
        dispatches: sets[0].executable.plan().dispatches,
        matrix_units: sets[0].executable.sources().any(|(key, _)| {
            key.split(' ')
                .next()
                .is_some_and(|name| name.ends_with("_cooperative"))
        }),
    })
}

/// Times every dispatch of a case in a pass of its own; the slowest first.
pub fn profile(gpu: &Gpu, case: &Case, dtype: DType) -> Result<Vec<Part>, Failure> {
    let prepared = Prepared::new(gpu, case, dtype, 0)?;
    for _ in 0..WARM_UPS {
        gpu.time_on_any_clock(&[&prepared.executable.sequence()])?;
    }
    let profiles: Vec<_> = (0..WARM_UPS)
        .map(|_| prepared.executable.profile())
        .collect::<Result<_, _>>()?;
    let mut parts: Vec<Part> = (0..profiles[0].dispatches.len())
        .map(|i| {
            let times = profiles.iter().map(|p| p.dispatches[i].nanoseconds * 1e-6);
            let mut times: Vec<f64> = times.collect();
            let dispatch = &profiles[0].dispatches[i];
            Part {
                kernel: match &dispatch.layer {
                    Some(layer) => format!("{layer}: {}", dispatch.key),
                    None => dispatch.key.clone(),
                },
                milliseconds: median(&mut times),
            }
        })
        .collect();
    parts.sort_by(|a, b| b.milliseconds.total_cmp(&a.milliseconds));
    Ok(parts)
}

fn is_out_of_memory(failure: &Failure) -> bool {
    matches!(
        failure.downcast_ref(),
        Some(energyflow::Error::OutOfMemory { .. })
    )
}

/// Sorts `times`, of which there is at least one.
pub fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    let half = times.len() / 2;
    match times.len() % 2 {
        0 => f64::midpoint(times[half - 1], times[half]),
        _ => times[half],
    }
}
