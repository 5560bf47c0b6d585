//! GPU time of single dispatches and of whole passes.

use super::device::Gpu;
use super::dispatch::{Dispatch, Sequence};
use super::readback::Readback;
use crate::error::{Error, Result};

/// How long a dispatch took.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Timing {
    /// The layer, if the dispatch is for one, and the key of its kernel.
    pub label: String,
    /// GPU time.
    pub nanoseconds: f64,
}

/// Two queries per pass.
const PASSES_PER_SET: usize = wgpu::QUERY_SET_MAX_QUERIES as usize / 2;

/// Times on their way: one for each pass.
#[derive(Debug)]
pub(crate) struct Times {
    labels: Vec<String>,
    readbacks: Vec<Readback<Vec<u64>>>,
    period: f64,
}

impl Times {
    /// Waits for the nanoseconds of each pass.
    pub(crate) fn timings(self) -> Result<Vec<Timing>> {
        let mut labels = self.labels.into_iter();
        let mut timings = Vec::new();
        for readback in self.readbacks {
            let ticks = readback.wait()?;
            let pairs = ticks.as_chunks().0.iter().zip(&mut labels);
            timings.extend(pairs.map(|([start, end], label)| Timing {
                label,
                // The counter of some drivers steps back now and then.
                nanoseconds: end.saturating_sub(*start) as f64 * self.period,
            }));
        }
        Ok(timings)
    }

    /// Waits for the nanoseconds of all passes together.
    pub(crate) fn total(self) -> Result<f64> {
        Ok(self
            .timings()?
            .iter()
            .map(|timing| timing.nanoseconds)
            .sum())
    }
}

impl Gpu {
    /// Runs the sequences in order, each dispatch in a pass of its own with a timestamp before and after, and waits for them.
    ///
    /// Some drivers report zero for every dispatch: the timestamps exist, but do not count.
    ///
    /// # Errors
    /// [`Error::Unsupported`] without timestamps; otherwise as [`Recorder::submit`](crate::gpu::Recorder::submit).
    pub fn profile(&self, sequences: &[&Sequence]) -> Result<Vec<Timing>> {
        self.start_profile(sequences, &[], &|_| ())?.timings()
    }

    /// Runs the sequences in order in one pass, as a [`Recorder`](crate::gpu::Recorder) does, and waits for them.
    ///
    /// Returns nanoseconds from the beginning of the pass to its end: everything between dispatches counts. Without sequences it is
    /// what an empty pass takes. Zero from drivers whose timestamps do not count.
    ///
    /// # Errors
    /// As [`Gpu::profile`].
    pub fn time(&self, sequences: &[&Sequence]) -> Result<f64> {
        self.start_time(sequences, &[], &|_| ())?.total()
    }

    /// As [`Gpu::profile`], without waiting. `before` runs before, untimed. `note` writes down that all is submitted, just before it is, and
    /// then perhaps that it failed, told by false.
    pub(crate) fn start_profile(
        &self,
        sequences: &[&Sequence],
        before: &[&Dispatch],
        note: &dyn Fn(bool),
    ) -> Result<Times> {
        let steps: Vec<&Dispatch> = steps(sequences).collect();
        let passes: Vec<&[&Dispatch]> = steps.chunks(1).collect();
        self.start(&passes, before, note)
    }

    /// As [`Gpu::time`], otherwise as [`Gpu::start_profile`].
    pub(crate) fn start_time(
        &self,
        sequences: &[&Sequence],
        before: &[&Dispatch],
        note: &dyn Fn(bool),
    ) -> Result<Times> {
        let steps: Vec<&Dispatch> = steps(sequences).collect();
        self.start(&[&steps], before, note)
    }

    fn start(
        &self,
        passes: &[&[&Dispatch]],
        before: &[&Dispatch],
        note: &dyn Fn(bool),
    ) -> Result<Times> {
        if !self.capabilities().timestamps {
            return Err(Error::Unsupported {
                what: "profiling".to_owned(),
                feature: "TIMESTAMP_QUERY",
            });
        }
        // No other run may come between the submissions: dispatches read what the ones before them left.
        let _gate = self.gate();
        let mut readbacks = Vec::new();
        for (i, passes) in passes.chunks(PASSES_PER_SET).enumerate() {
            let before = if i == 0 { before } else { &[] };
            let submitted = self.submit_timed(passes, before, || {
                if i == 0 {
                    note(true);
                }
            });
            readbacks.push(submitted.inspect_err(|_| note(false))?);
        }
        let label = |pass: &&[&Dispatch]| pass.first().map_or("", |step| step.key()).to_owned();
        Ok(Times {
            labels: passes.iter().map(label).collect(),
            readbacks,
            period: f64::from(self.queue().get_timestamp_period()),
        })
    }

    fn submit_timed(
        &self,
        passes: &[&[&Dispatch]],
        before: &[&Dispatch],
        ready: impl FnOnce(),
    ) -> Result<Readback<Vec<u64>>> {
        let context = self.context();
        let queries = 2 * passes.len() as u32;
        let bytes = u64::from(queries) * u64::from(wgpu::QUERY_SIZE);
        let staging = self.0.staging.download(context, bytes)?;
        let (device, label) = (&context.device, Some("profile"));
        let encode = |encoder: &mut wgpu::CommandEncoder| {
            let query_set = device.create_query_set(&wgpu::QuerySetDescriptor {
                label,
                ty: wgpu::QueryType::Timestamp,
                count: queries,
            });
            let resolved = device.create_buffer(&wgpu::BufferDescriptor {
                label,
                size: bytes,
                usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
                mapped_at_creation: false,
            });
            if !before.is_empty() {
                let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                    label,
                    timestamp_writes: None,
                });
                before.iter().for_each(|step| step.encode(&mut pass, 0));
            }
            let mut dispatches = before.len();
            for (steps, first) in passes.iter().zip((0..).step_by(2)) {
                let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                    label: steps.first().map(|step| step.key()),
                    timestamp_writes: Some(wgpu::ComputePassTimestampWrites {
                        query_set: &query_set,
                        beginning_of_pass_write_index: Some(first),
                        end_of_pass_write_index: Some(first + 1),
                    }),
                });
                for step in *steps {
                    step.encode(&mut pass, 0);
                }
                dispatches += steps.len();
            }
            encoder.resolve_query_set(&query_set, 0..queries, &resolved, 0);
            encoder.copy_buffer_to_buffer(&resolved, 0, &staging, 0, bytes);
            dispatches as u64
        };
        let index = context.submit("profile", encode, ready, |index| index)?;
        let decode = |pieces: &[&[u8]]| Ok(bytemuck::pod_collect_to_vec(&pieces.concat()));
        Readback::new(self.clone(), staging, index, vec![bytes], Box::new(decode))
    }
}

fn steps<'a>(sequences: &'a [&Sequence]) -> impl Iterator<Item = &'a Dispatch> {
    sequences.iter().flat_map(|sequence| &sequence.dispatches)
}
