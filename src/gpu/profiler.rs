//! GPU time of single dispatches and of whole passes.

use std::fmt;
use std::time::Instant;

use serde::Serialize;

use super::device::Gpu;
use super::dispatch::{Dispatch, Sequence};
use super::pool::Buffer;
use super::readback::Readback;
use crate::error::{Error, Result};

/// What measured a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Clock {
    /// Timestamps of the GPU.
    Gpu,
    /// The host's clock around a submission, less an empty submission. The adapter has no timestamps, or its driver's do not count. Times
    /// below some microseconds are noise.
    Host,
}

/// How long a dispatch took.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Timing {
    /// The layer, if the dispatch is for one, and the key of its kernel.
    pub label: String,
    /// When it began, in nanoseconds after the first one began.
    pub start: f64,
    /// GPU time.
    pub nanoseconds: f64,
}

/// Microseconds and label.
impl fmt::Display for Timing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:10.2} µs  {}", self.nanoseconds / 1e3, self.label)
    }
}

/// Which dispatches share a pass, and with it a time.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Passes {
    /// Each has a pass of its own.
    Each,
    /// All share one.
    All,
}

/// What surrounds the timed passes in their submission.
pub(crate) struct Around<'a> {
    /// Runs before, untimed.
    pub before: Vec<&'a Dispatch>,
    /// Buffers that keep their content, each with a copy of the same size: copied after `before`, restored at the end.
    pub kept: &'a [(Buffer, Buffer)],
    /// Called with `true` just before the submission, and with `false` if it fails.
    pub note: &'a dyn Fn(bool),
}

impl Around<'_> {
    const NOTHING: Self = Self {
        before: Vec::new(),
        kept: &[],
        note: &|_| (),
    };
}

/// Number of passes per query set. A pass takes two queries.
const PASSES_PER_SET: usize = wgpu::QUERY_SET_MAX_QUERIES as usize / 2;

/// Times that are not read back yet, one per pass.
#[derive(Debug)]
pub(crate) struct Times {
    labels: Vec<String>,
    ticks: Readback<Vec<u64>>,
    period: f64,
}

impl Times {
    /// Waits for the nanoseconds of each pass.
    pub(crate) fn timings(self) -> Result<Vec<Timing>> {
        let ticks = self.ticks.wait()?;
        let spans = spans(&ticks, self.period).zip(self.labels);
        let timings = spans.map(|((start, nanoseconds), label)| Timing {
            label,
            start,
            nanoseconds,
        });
        Ok(timings.collect())
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

/// Start and duration in nanoseconds of each pair of ticks. The counter of some drivers steps back now and then: what would be negative is
/// 0, and nothing begins before what is ahead of it.
fn spans(ticks: &[u64], period: f64) -> impl Iterator<Item = (f64, f64)> {
    let first = ticks.first().copied().unwrap_or(0);
    let mut latest = first;
    ticks.as_chunks().0.iter().map(move |&[start, end]| {
        latest = latest.max(start);
        let nanoseconds = end.saturating_sub(start) as f64 * period;
        ((latest - first) as f64 * period, nanoseconds)
    })
}

impl Gpu {
    /// Runs the sequences in order, each dispatch in a pass of its own with a timestamp before and after, and waits for them.
    ///
    /// Some drivers report zero for every dispatch: the timestamps exist, but do not count.
    ///
    /// # Errors
    /// [`Error::Unsupported`] without timestamps; otherwise as [`Recorder::submit`](crate::gpu::Recorder::submit).
    pub fn profile(&self, sequences: &[&Sequence]) -> Result<Vec<Timing>> {
        self.measure(sequences, Passes::Each, &Around::NOTHING)?
            .timings()
    }

    /// Runs the sequences in order in one pass, as a [`Recorder`](crate::gpu::Recorder) does, and waits for them.
    ///
    /// Returns the nanoseconds from the beginning of the pass to its end, including the time between dispatches. Without sequences, this is
    /// the time of an empty pass. Drivers whose timestamps do not count give zero.
    ///
    /// # Errors
    /// As [`Gpu::profile`].
    pub fn time(&self, sequences: &[&Sequence]) -> Result<f64> {
        self.measure(sequences, Passes::All, &Around::NOTHING)?
            .total()
    }

    /// As [`Gpu::time`], but by the host's clock where there are no timestamps or they do not count: around a submission, less an empty one.
    /// Times below a millisecond are noise then. Never zero.
    ///
    /// # Errors
    /// As [`Recorder::submit`](crate::gpu::Recorder::submit).
    pub fn time_on_any_clock(&self, sequences: &[&Sequence]) -> Result<(f64, Clock)> {
        if self.capabilities().timestamps {
            let nanoseconds = self.time(sequences)?;
            if nanoseconds > 0.0 {
                return Ok((nanoseconds, Clock::Gpu));
            }
        }
        let submit = |sequences: &[&Sequence]| {
            let mut recorder = self.recorder("time");
            let each = sequences.iter();
            each.for_each(|sequence| recorder.sequence(sequence));
            let begin = Instant::now();
            recorder.submit()?.wait()?;
            Ok::<_, Error>(begin.elapsed())
        };
        let empty = submit(&[])?;
        let nanoseconds = submit(sequences)?.saturating_sub(empty).as_nanos();
        Ok((nanoseconds.max(1) as f64, Clock::Host))
    }

    /// Submits the dispatches of the sequences, timed, and returns without waiting.
    ///
    /// # Errors
    /// As [`Gpu::profile`].
    pub(crate) fn measure(
        &self,
        sequences: &[&Sequence],
        passes: Passes,
        around: &Around<'_>,
    ) -> Result<Times> {
        if !self.capabilities().timestamps {
            return Err(Error::Unsupported {
                what: "profiling".to_owned(),
                feature: "TIMESTAMP_QUERY",
            });
        }
        let dispatches = sequences.iter().flat_map(|sequence| &sequence.dispatches);
        let dispatches: Vec<&Dispatch> = dispatches.collect();
        let passes: Vec<&[&Dispatch]> = match passes {
            Passes::Each => dispatches.chunks(1).collect(),
            Passes::All => vec![&dispatches],
        };
        let ticks = self.submit_timed(&passes, around);
        let ticks = ticks.inspect_err(|_| (around.note)(false))?;
        let label = |pass: &&[&Dispatch]| pass.first().map_or("", |step| step.key()).to_owned();
        Ok(Times {
            labels: passes.iter().map(label).collect(),
            ticks,
            period: f64::from(self.queue().get_timestamp_period()),
        })
    }

    /// One submission, so that no other run can come in between: dispatches read what the ones before them left.
    fn submit_timed(
        &self,
        passes: &[&[&Dispatch]],
        around: &Around<'_>,
    ) -> Result<Readback<Vec<u64>>> {
        let context = self.context();
        let bytes = 2 * passes.len() as u64 * u64::from(wgpu::QUERY_SIZE);
        let staging = self.0.staging.download(context, bytes)?;
        let (device, label) = (&context.device, Some("profile"));
        let encode = |encoder: &mut wgpu::CommandEncoder| {
            let resolved = device.create_buffer(&wgpu::BufferDescriptor {
                label,
                size: bytes,
                usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
                mapped_at_creation: false,
            });
            if !around.before.is_empty() {
                let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                    label,
                    timestamp_writes: None,
                });
                let before = around.before.iter();
                before.for_each(|step| step.encode(&mut pass, 0));
            }
            for (buffer, copy) in around.kept {
                copy_whole(encoder, buffer, copy);
            }
            let mut dispatches = around.before.len();
            let mut at = 0;
            for passes in passes.chunks(PASSES_PER_SET) {
                let count = 2 * passes.len() as u32;
                let query_set = device.create_query_set(&wgpu::QuerySetDescriptor {
                    label,
                    ty: wgpu::QueryType::Timestamp,
                    count,
                });
                for (steps, first) in passes.iter().zip((0..).step_by(2)) {
                    let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                        label: steps.first().map(|step| step.key()),
                        timestamp_writes: Some(wgpu::ComputePassTimestampWrites {
                            query_set: &query_set,
                            beginning_of_pass_write_index: Some(first),
                            end_of_pass_write_index: Some(first + 1),
                        }),
                    });
                    steps.iter().for_each(|step| step.encode(&mut pass, 0));
                    dispatches += steps.len();
                }
                encoder.resolve_query_set(&query_set, 0..count, &resolved, at);
                at += u64::from(count) * u64::from(wgpu::QUERY_SIZE);
            }
            for (buffer, copy) in around.kept {
                copy_whole(encoder, copy, buffer);
            }
            encoder.copy_buffer_to_buffer(&resolved, 0, &staging, 0, bytes);
            dispatches as u64
        };
        let ready = || (around.note)(true);
        let index = context.submit("profile", encode, ready, |index| index)?;
        let decode = |pieces: &[&[u8]]| Ok(bytemuck::pod_collect_to_vec(&pieces.concat()));
        Readback::new(self.clone(), staging, index, vec![bytes], Box::new(decode))
    }
}

fn copy_whole(encoder: &mut wgpu::CommandEncoder, from: &Buffer, to: &Buffer) {
    encoder.copy_buffer_to_buffer(from.inner(), 0, to.inner(), 0, from.size());
}

#[cfg(test)]
mod tests {
    use super::spans;

    #[test]
    fn a_clock_that_steps_back_gives_zero() {
        let of = |ticks: &[u64]| spans(ticks, 2.0).collect::<Vec<_>>();
        assert_eq!(of(&[]), []);
        assert_eq!(of(&[5, 7, 8, 9]), [(0.0, 4.0), (6.0, 2.0)]);
        // Within a pair, between pairs, below the first, to nothing, and to the end of the counter.
        let ticks = [100, 90, 95, 105, 1, 3, 110, 120, 0, 0, u64::MAX, 4];
        let spans = of(&ticks);
        let longest = (u64::MAX - 100) as f64 * 2.0;
        assert_eq!(
            spans,
            [
                (0.0, 0.0),
                (0.0, 20.0),
                (0.0, 4.0),
                (20.0, 20.0),
                (20.0, 0.0),
                (longest, 0.0)
            ]
        );
        // Timestamps that do not count.
        assert_eq!(of(&[0; 6]), [(0.0, 0.0); 3]);
    }
}
