//! GPU time of single dispatches and of whole passes.

use std::sync::Arc;

use super::bindings::BindGroup;
use super::device::Gpu;
use super::pipelines::Pipeline;
use super::readback::Readback;
use crate::error::{Error, Result};

/// A dispatch to be timed.
#[derive(Clone, Debug)]
pub struct ProfileStep {
    /// What to call it.
    pub label: String,
    /// The kernel.
    pub pipeline: Arc<Pipeline>,
    /// Its buffers.
    pub bind_group: BindGroup,
    /// Its grid.
    pub workgroups: [u32; 3],
}

/// How long a dispatch took.
#[derive(Clone, Debug, PartialEq)]
pub struct Timing {
    /// As in [`ProfileStep::label`].
    pub label: String,
    /// GPU time.
    pub nanoseconds: f64,
}

/// A pair of queries a pass.
const PASSES_A_SET: usize = wgpu::QUERY_SET_MAX_QUERIES as usize / 2;

impl Gpu {
    /// Runs the steps in order, each in a pass of its own with a timestamp before and after, and waits for them.
    ///
    /// Some drivers report zero for every step: the timestamps exist, but do not count.
    ///
    /// # Errors
    /// [`Error::Unsupported`] without timestamps; otherwise as [`Recorder::dispatch`](crate::gpu::Recorder::dispatch).
    pub fn profile(&self, steps: &[ProfileStep]) -> Result<Vec<Timing>> {
        self.check_steps(steps)?;
        let mut timings = Vec::with_capacity(steps.len());
        for chunk in steps.chunks(PASSES_A_SET) {
            let passes: Vec<&[ProfileStep]> = chunk.chunks(1).collect();
            let times = self.run_timed(&passes)?;
            timings.extend(chunk.iter().zip(times).map(|(step, nanoseconds)| Timing {
                label: step.label.clone(),
                nanoseconds,
            }));
        }
        Ok(timings)
    }

    /// Runs the steps in order in one pass, as a [`Recorder`](crate::gpu::Recorder) does, and waits for them.
    ///
    /// Returns nanoseconds from the beginning of the pass to its end: everything between dispatches counts. Without steps it is
    /// what an empty pass takes. Zero from drivers whose timestamps do not count.
    ///
    /// # Errors
    /// As [`Gpu::profile`].
    pub fn time(&self, steps: &[ProfileStep]) -> Result<f64> {
        self.check_steps(steps)?;
        Ok(self.run_timed(&[steps])?.iter().sum())
    }

    fn check_steps(&self, steps: &[ProfileStep]) -> Result<()> {
        if !self.capabilities().timestamps {
            return Err(Error::Unsupported {
                what: "profiling".to_owned(),
                feature: "TIMESTAMP_QUERY",
            });
        }
        for step in steps {
            self.check_workgroups(step.pipeline.key(), step.workgroups)?;
            step.bind_group.check(&step.pipeline)?;
        }
        Ok(())
    }

    /// Nanoseconds of each pass; at most [`PASSES_A_SET`] of them.
    fn run_timed(&self, passes: &[&[ProfileStep]]) -> Result<Vec<f64>> {
        let ticks = self.submit_timed(passes)?.wait()?;
        let period = f64::from(self.queue().get_timestamp_period());
        let pairs = ticks.as_chunks().0.iter();
        // The counter of some drivers steps back now and then.
        Ok(pairs
            .map(|[start, end]| end.saturating_sub(*start) as f64 * period)
            .collect())
    }

    fn submit_timed(&self, passes: &[&[ProfileStep]]) -> Result<Readback<Vec<u64>>> {
        let queries = 2 * passes.len() as u32;
        let bytes = u64::from(queries) * u64::from(wgpu::QUERY_SIZE);
        let staging = self.download_staging(bytes)?;
        let device = self.device();
        let what = || "profiling".to_owned();
        let index = self.0.guard.run(what, bytes, || {
            let query_set = device.create_query_set(&wgpu::QuerySetDescriptor {
                label: Some("profile"),
                ty: wgpu::QueryType::Timestamp,
                count: queries,
            });
            let resolved = device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("profile"),
                size: bytes,
                usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
                mapped_at_creation: false,
            });
            let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor {
                label: Some("profile"),
            });
            for (steps, first) in passes.iter().zip((0..).step_by(2)) {
                let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                    label: steps.first().map(|step| step.label.as_str()),
                    timestamp_writes: Some(wgpu::ComputePassTimestampWrites {
                        query_set: &query_set,
                        beginning_of_pass_write_index: Some(first),
                        end_of_pass_write_index: Some(first + 1),
                    }),
                });
                for step in *steps {
                    let [x, y, z] = step.workgroups;
                    pass.set_pipeline(step.pipeline.raw());
                    pass.set_bind_group(0, step.bind_group.raw(), &[]);
                    pass.dispatch_workgroups(x, y, z);
                }
            }
            encoder.resolve_query_set(&query_set, 0..queries, &resolved, 0);
            encoder.copy_buffer_to_buffer(&resolved, 0, &staging, 0, bytes);
            self.queue().submit([encoder.finish()])
        })?;
        let decode = |pieces: &[&[u8]]| Ok(bytemuck::pod_collect_to_vec(&pieces.concat()));
        Readback::new(self.clone(), staging, index, vec![bytes], Box::new(decode))
    }
}
