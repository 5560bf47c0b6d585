//! Choosing a kernel by measuring: every candidate is run on the GPU on random data, once for each key, and the choice stored.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use half::f16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::bound::BoundKernel;
use crate::compile::{Place, Step, Tuner};
use crate::error::{Error, Result};
use crate::gpu::{Access, Buffer, BufferSlice, Choice, Gpu, Sequence};
use crate::kernels::{Binding, Target};
use crate::types::DType;

/// Index of the built-in choice.
const DEFAULT: usize = 0;
/// A candidate that takes longer to compile is not run.
const CANDIDATE_LIMIT: Duration = Duration::from_secs(2);
/// After this long the candidates that are left are not compiled.
const TOTAL_LIMIT: Duration = Duration::from_secs(6);
/// Duration of the work before anything is timed. A GPU that has idled, as it does while kernels are compiled, runs at a fraction of its clock.
const WARM_UP: Duration = Duration::from_millis(300);
/// After this long no further round of passes begins.
const TIME_LIMIT: Duration = Duration::from_secs(2);
/// A pass repeats short work until it lasts about so long: a single dispatch is lost in what a pass costs.
const PASS_NANOSECONDS: f64 = 2e6;
const MOST_REPEATS: f64 = 100.0;
const PASSES: usize = 7;
/// So many times of zero in a row mean that timestamps do not count.
const TRIES: usize = 5;
/// What another candidate may take of the default's time to be preferred; less of a gain may be noise.
const GAIN: f64 = 0.97;
/// Random bytes are repeated after so many: reading them all takes longer than a cache holds, making them all would take too long.
const PATTERN: usize = 1 << 16;

/// Measures variants on a device, once for each key, and remembers the choice.
#[derive(Debug)]
pub(crate) struct Measuring<'a> {
    pub gpu: &'a Gpu,
    pub target: Target,
}

/// The default is chosen while tuning is off or nothing can be measured, and unless another takes at least 3 % less time. Each place
/// of the steps is replaced by a buffer of its own, filled with random numbers, or zeros where it holds indices. A variant that fails
/// or takes too long to compile loses, with a warning.
impl Tuner for Measuring<'_> {
    fn choose(
        &self,
        key: &str,
        names: &[String],
        build: &dyn Fn(usize) -> Result<Vec<Step>>,
    ) -> Result<usize> {
        let &Self { gpu, target } = self;
        if names.is_empty() {
            return Err(Error::Graph(format!("{key} has no candidates")));
        }
        let Some(tuning) = gpu.tuning().filter(|_| names.len() > 1) else {
            return Ok(DEFAULT);
        };
        let stored = || tuning.find(key, |name| names.iter().position(|known| known == name));
        if let Some(candidate) = stored() {
            return Ok(candidate);
        }
        if !gpu.capabilities().timestamps {
            tuning.warn_without_times("the device has no timestamps");
            return Ok(DEFAULT);
        }
        // Two measurements at once would disturb each other, and might choose twice for one key.
        let _gate = gpu.gate();
        // Another thread may have measured it meanwhile.
        if let Some(candidate) = stored() {
            return Ok(candidate);
        }
        let start = Instant::now();
        let mut ready: Vec<(usize, Sequence)> = Vec::new();
        for (candidate, name) in names.iter().enumerate() {
            if start.elapsed() > TOTAL_LIMIT {
                log::debug!("no time to try {name} and what follows for {key}");
                break;
            }
            // The default would be compiled anyway, so that however long it takes it may be chosen.
            let limit = match candidate {
                DEFAULT => Duration::MAX,
                _ => CANDIDATE_LIMIT,
            };
            match build(candidate).and_then(|steps| prepare(gpu, target, &steps, limit)) {
                Ok(Some(work)) => ready.push((candidate, work)),
                Ok(None) => log::warn!("{name} takes too long to compile for {key}"),
                Err(error @ Error::DeviceLost { .. }) => return Err(error),
                Err(error) => log::warn!("{name} fails for {key}: {error}"),
            }
        }
        let work: Vec<&Sequence> = ready.iter().map(|(_, work)| work).collect();
        let Some(times) = time_all(gpu, &work)? else {
            tuning.warn_without_times("the driver's timestamps do not count");
            return Ok(DEFAULT);
        };
        let candidates = ready.iter().map(|(candidate, _)| *candidate);
        let times: Vec<(usize, f64)> = candidates.zip(times).collect();
        for &(candidate, nanoseconds) in &times {
            log::debug!("{nanoseconds:.0} ns with {} for {key}", names[candidate]);
        }
        let Some((candidate, nanoseconds)) = fastest(&times, DEFAULT) else {
            // Compiling the default for the graph says why.
            return Ok(DEFAULT);
        };
        let choice = Choice {
            candidate: names[candidate].clone(),
            nanoseconds,
        };
        tuning.record(key, choice);
        Ok(candidate)
    }
}

/// The default unless another is clearly faster; the first of equals.
fn fastest<C: Copy + PartialEq>(times: &[(C, f64)], default: C) -> Option<(C, f64)> {
    let best = times.iter().min_by(|(_, a), (_, b)| a.total_cmp(b))?;
    let known = times.iter().find(|(candidate, _)| *candidate == default);
    let chosen = known.filter(|(_, nanoseconds)| best.1 > GAIN * nanoseconds);
    Some(*chosen.unwrap_or(best))
}

/// The work of all steps, `None` when they took longer than `limit` to compile.
fn prepare(gpu: &Gpu, target: Target, steps: &[Step], limit: Duration) -> Result<Option<Sequence>> {
    let start = Instant::now();
    for step in steps {
        gpu.trusted_pipeline(&step.kernel.key(target), || step.kernel.source(target))?;
        if start.elapsed() > limit {
            return Ok(None);
        }
    }
    let places = places(steps);
    let buffers = buffers(gpu, &places)?;
    let mut work = Vec::with_capacity(steps.len());
    for step in steps {
        let slices: Vec<BufferSlice> = step
            .places
            .iter()
            .zip(step.kernel.bindings())
            .map(|(place, binding)| buffers[place].slice(0, binding.layout.size_bytes()))
            .collect::<Result<_>>()?;
        work.push(BoundKernel::new(gpu, target, &step.kernel, &[slices])?);
    }
    let work = work.iter().map(|dispatch| &dispatch.work);
    Ok(Some(Sequence::of(work, 0)))
}

/// Median nanoseconds of one run of each, `None` where timestamps do not count. All are timed in turn, so that a
/// clock that changes meanwhile changes for all.
fn time_all(gpu: &Gpu, work: &[&Sequence]) -> Result<Option<Vec<f64>>> {
    let start = Instant::now();
    let mut passes: Vec<Vec<&Sequence>> = Vec::with_capacity(work.len());
    loop {
        passes.clear();
        for steps in work {
            // The counter of some drivers steps back now and then. Only where no time counts, timestamps are of no use.
            let mut once = 0.0;
            for _ in 0..TRIES {
                once = gpu.time(&[steps])?;
                if once > 0.0 {
                    break;
                }
            }
            if once <= 0.0 {
                return Ok(None);
            }
            let repeats = (PASS_NANOSECONDS / once).clamp(1.0, MOST_REPEATS) as usize;
            passes.push(vec![steps; repeats]);
        }
        if start.elapsed() > WARM_UP || work.is_empty() {
            break;
        }
    }
    let mut times: Vec<Vec<f64>> = vec![Vec::new(); work.len()];
    for round in 0..PASSES {
        if round > 0 && start.elapsed() > TIME_LIMIT {
            break;
        }
        for (pass, times) in passes.iter().zip(&mut times) {
            times.push(gpu.time(pass)? / pass.len() as f64);
        }
    }
    let median = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    Ok(Some(times.into_iter().map(median).collect()))
}

/// Every place once, with its largest binding; a place that is read before it is written counts as read.
fn places(steps: &[Step]) -> HashMap<Place, Binding> {
    let mut places: HashMap<Place, Binding> = HashMap::new();
    for step in steps {
        for (&place, binding) in step.places.iter().zip(step.kernel.bindings()) {
            let known = places.entry(place).or_insert_with(|| binding.clone());
            if known.layout.size_bytes() < binding.layout.size_bytes() {
                known.layout = binding.layout;
            }
        }
    }
    places
}

fn buffers(gpu: &Gpu, places: &HashMap<Place, Binding>) -> Result<HashMap<Place, Buffer>> {
    let mut buffers = HashMap::new();
    for (&place, binding) in places {
        let bytes = binding.layout.size_bytes();
        let buffer = gpu.zeroed_buffer(bytes, "tuning")?;
        let dtype = binding.layout.dtype();
        if binding.access == Access::Read && dtype != DType::U32 {
            let mut data = pattern(dtype);
            data = data.repeat(bytes.div_ceil(PATTERN as u64) as usize);
            data.truncate(bytes as usize);
            let mut recorder = gpu.recorder("tuning");
            recorder.write(&buffer.slice(0, bytes)?, &data)?;
            recorder.submit()?;
        }
        buffers.insert(place, buffer);
    }
    Ok(buffers)
}

/// Numbers in ±1: zeros would need less power, and so let a GPU run faster than real data does.
fn pattern(dtype: DType) -> Vec<u8> {
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let numbers = (0..PATTERN / dtype.size()).map(|_| rng.random_range(-1.0_f32..1.0));
    match dtype {
        DType::F16 => numbers
            .flat_map(|number| f16::from_f32(number).to_le_bytes())
            .collect(),
        _ => numbers.flat_map(f32::to_le_bytes).collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::gpu::{GpuOptions, Layout};
    use crate::kernels::elementwise::elementwise;
    use crate::kernels::{Instruction, Program};
    use crate::types::Shape;

    #[test]
    fn the_default_wins_ties_and_noise() {
        assert_eq!(
            fastest(&[('a', 100.0), ('b', 100.0)], 'a'),
            Some(('a', 100.0))
        );
        assert_eq!(
            fastest(&[('a', 100.0), ('b', 98.0)], 'a'),
            Some(('a', 100.0))
        );
        assert_eq!(
            fastest(&[('a', 100.0), ('b', 96.0)], 'a'),
            Some(('b', 96.0))
        );
        assert_eq!(fastest(&[('a', 90.0), ('b', 96.0)], 'a'), Some(('a', 90.0)));
    }

    #[test]
    fn without_the_default_the_first_fastest_wins() {
        let times = [('b', 3.0), ('c', 2.0), ('d', 2.0)];
        assert_eq!(fastest(&times, 'a'), Some(('c', 2.0)));
        assert_eq!(fastest(&[], 'a'), None);
    }

    /// Fills a matrix of ones with this many rows.
    fn fill(rows: usize) -> Result<Vec<Step>> {
        let layout = Layout::of(&Shape::matrix(rows, 1024), DType::F32)?;
        let program = Program {
            rows,
            cols: 1024,
            operands: Vec::new(),
            instructions: vec![Instruction::Constant(1.0)],
            results: vec![(0, layout)],
        };
        let kernel = elementwise(program, TARGET);
        let places = vec![Place::Scratch(0)];
        let layer = None;
        Ok(vec![Step {
            kernel,
            places,
            layer,
        }])
    }

    const TARGET: Target = Target {
        matrix_units: None,
        invocations: 256,
        cores: 2,
        f16: false,
        barrier_free: false,
    };

    fn gpu() -> Result<Gpu> {
        Gpu::new(&GpuOptions::from_env()?.cache_dir("").autotune(true))
    }

    /// The choice among fills of so many rows.
    fn choose(
        gpu: &Gpu,
        key: &str,
        rows: &[usize],
        build: &dyn Fn(usize) -> Result<Vec<Step>>,
    ) -> Result<usize> {
        let target = TARGET;
        let names: Vec<String> = rows.iter().map(usize::to_string).collect();
        let chosen = Measuring { gpu, target }.choose(key, &names, &|i| build(rows[i]))?;
        Ok(rows[chosen])
    }

    #[test]
    fn the_fastest_is_chosen_once() -> Result<()> {
        let gpu = gpu()?;
        if !gpu.capabilities().timestamps {
            return Ok(());
        }
        let built = Cell::new(0);
        let build = |rows| {
            built.set(built.get() + 1);
            fill(rows)
        };
        let choose = || choose(&gpu, "rows", &[8000, 9000, 1], &build);
        assert_eq!((choose()?, built.get()), (1, 3));
        assert_eq!((choose()?, built.get()), (1, 3));
        Ok(())
    }

    /// One that cannot be built, one larger than any binding.
    #[test]
    fn failing_candidates_lose() -> Result<()> {
        let gpu = gpu()?;
        if !gpu.capabilities().timestamps {
            return Ok(());
        }
        let build = |rows| match rows {
            0 => Err(Error::Graph("no such kernel".to_owned())),
            rows => fill(rows),
        };
        let huge = 1 << 40;
        assert_eq!(choose(&gpu, "a", &[9000, 0, huge, 1], &build)?, 1);
        assert_eq!(choose(&gpu, "b", &[0, huge, 9000, 1], &build)?, 1);
        assert_eq!(choose(&gpu, "c", &[0, huge], &build)?, 0);
        assert!(choose(&gpu, "d", &[], &build).is_err());
        assert_eq!(gpu.report().uncaptured_errors, 0);
        // What failed altogether is not stored.
        assert_eq!(gpu.report().tuning.map(|stats| stats.choices), Some(2));
        Ok(())
    }

    #[test]
    fn patterns_are_finite_and_fill_their_bytes() {
        let halves = pattern(DType::F16);
        let floats = pattern(DType::F32);
        assert_eq!((halves.len(), floats.len()), (PATTERN, PATTERN));
        let (floats, rest) = floats.as_chunks();
        assert!(rest.is_empty());
        assert!(
            floats
                .iter()
                .all(|&bytes| f32::from_le_bytes(bytes).abs() <= 1.0)
        );
        let (halves, rest) = halves.as_chunks();
        assert!(rest.is_empty());
        assert!(
            halves
                .iter()
                .all(|&bytes| f16::from_le_bytes(bytes).to_f32().abs() <= 1.0)
        );
    }
}
