//! Work that is prepared once and submitted again and again: nothing on the way of a submission is allocated.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};

use super::bindings::BindGroup;
use super::device::Gpu;
use super::element::Element;
use super::guard::Guard;
use super::layout::Layout;
use super::lock;
use super::pipelines::Pipeline;
use super::pool::BufferSlice;
use super::readback::{Arrival, Download, Transfer};
use super::recorder::check_copy;
use super::tensor::Tensor;
use crate::error::{Error, Result};

/// Submissions of one bundle that are under way at most. Two keep the device busy, the third hides a host that is late.
pub(crate) const IN_FLIGHT: usize = 3;

/// Every piece of a staging buffer begins at a multiple of so many bytes.
const PIECE_ALIGNMENT: u64 = 16;

/// A dispatch, checked once for all its submissions.
#[derive(Clone, Debug)]
pub(crate) struct Dispatch {
    pub pipeline: Arc<Pipeline>,
    pub bind_group: BindGroup,
    pub workgroups: [u32; 3],
}

impl Dispatch {
    /// Fails as [`Recorder::dispatch`](super::Recorder::dispatch).
    pub fn new(
        gpu: &Gpu,
        pipeline: Arc<Pipeline>,
        bind_group: BindGroup,
        workgroups: [u32; 3],
    ) -> Result<Self> {
        gpu.check_workgroups(pipeline.key(), workgroups)?;
        bind_group.check(&pipeline)?;
        Ok(Self {
            pipeline,
            bind_group,
            workgroups,
        })
    }

    fn encode(&self, pass: &mut wgpu::ComputePass<'_>) {
        let [x, y, z] = self.workgroups;
        pass.set_pipeline(self.pipeline.raw());
        pass.set_bind_group(0, self.bind_group.raw(), &[]);
        pass.dispatch_workgroups(x, y, z);
    }
}

/// A slice and its place in a staging buffer.
#[derive(Debug)]
struct Piece {
    slice: BufferSlice,
    layout: Option<Layout>,
    at: u64,
}

/// What surrounds the dispatches of a submission: tensors that the host writes before, copies and results behind, and the
/// staging memory that all submissions use in turn.
#[derive(Debug)]
pub(crate) struct Bundle {
    gpu: Gpu,
    label: &'static str,
    writes: Vec<Piece>,
    write_bytes: u64,
    copies: Vec<(BufferSlice, BufferSlice)>,
    reads: Vec<Piece>,
    read_bytes: u64,
    ring: Mutex<Ring>,
}

/// Staging memory, all of it made for the first submission. More is made only while a caller keeps more than [`IN_FLIGHT`] results.
#[derive(Debug, Default)]
struct Ring {
    /// Oldest first.
    flights: VecDeque<Flight>,
    downloads: Vec<Arc<Download>>,
}

/// A submission, or the memory for one.
#[derive(Debug)]
struct Flight {
    index: Option<wgpu::SubmissionIndex>,
    /// Mapped once the submission is done. Nothing where there is nothing to write.
    upload: Option<(wgpu::Buffer, Arc<Arrival>)>,
}

impl Flight {
    /// Waits until the submission is done and the memory mapped again.
    fn land(&self, guard: &Guard) -> Result<()> {
        let Some(index) = &self.index else {
            return Ok(());
        };
        loop {
            guard.poll(wgpu::PollType::Wait {
                submission_index: Some(index.clone()),
                timeout: None,
            })?;
            match self.upload.as_ref().map(|(_, arrival)| arrival.get()) {
                // Another thread has polled the callback out of wgpu and is about to run it.
                Some(None) => std::thread::yield_now(),
                Some(Some(Err(reason))) => return Err(Error::DeviceLost { reason }),
                None | Some(Some(Ok(()))) => return Ok(()),
            }
        }
    }
}

impl Bundle {
    /// With nothing but dispatches; the label shows in graphics debuggers and errors.
    pub fn new(gpu: &Gpu, label: &'static str) -> Self {
        Self {
            gpu: gpu.clone(),
            label,
            writes: Vec::new(),
            write_bytes: 0,
            copies: Vec::new(),
            reads: Vec::new(),
            read_bytes: 0,
            ring: Mutex::default(),
        }
    }

    /// The host writes this tensor before the dispatches: [`Turn::write`] with the number of this call.
    pub fn write(&mut self, to: &Tensor) {
        self.writes.push(Piece {
            slice: to.slice().clone(),
            layout: Some(*to.layout()),
            at: self.write_bytes,
        });
        self.write_bytes += to.slice().size().next_multiple_of(PIECE_ALIGNMENT);
    }

    /// A copy behind the dispatches.
    ///
    /// # Errors
    /// As [`Recorder::copy`](super::Recorder::copy).
    pub fn copy(&mut self, from: BufferSlice, to: BufferSlice) -> Result<()> {
        check_copy(&from, &to)?;
        self.copies.push((from, to));
        Ok(())
    }

    /// Brings this slice back after the copies; returns where its bytes are in the [`Download`].
    pub fn read(&mut self, from: BufferSlice) -> Range<u64> {
        let (at, size) = (self.read_bytes, from.size());
        self.reads.push(Piece {
            slice: from,
            layout: None,
            at,
        });
        self.read_bytes += size.next_multiple_of(PIECE_ALIGNMENT);
        at..at + size
    }

    /// Staging memory for the next submission, after waiting for the oldest one if there are [`IN_FLIGHT`]. Turns follow each
    /// other: this blocks while another thread has one.
    ///
    /// # Errors
    /// [`Error::Limit`], [`Error::OutOfMemory`], [`Error::DeviceLost`]
    pub fn turn(&self) -> Result<Turn<'_>> {
        let gpu = &self.gpu;
        gpu.0.guard.check()?;
        let mut ring = lock(&self.ring);
        while ring.flights.len() < IN_FLIGHT {
            let upload = match self.write_bytes {
                0 => None,
                bytes => Some((gpu.upload_staging(bytes)?, Arc::default())),
            };
            ring.flights.push_front(Flight {
                index: None,
                upload,
            });
        }
        let download = match self.read_bytes {
            0 => None,
            bytes => Some(self.download(&mut ring, bytes)?),
        };
        let flight = ring.flights.pop_front();
        let flight = flight.ok_or_else(|| Error::Graph("no staging memory".into()))?;
        flight.land(&gpu.0.guard)?;
        Ok(Turn {
            bundle: self,
            ring,
            flight,
            download,
        })
    }

    /// One that nobody reads any more.
    fn download(&self, ring: &mut Ring, bytes: u64) -> Result<Arc<Download>> {
        let make = || -> Result<Arc<Download>> {
            let buffer = self.gpu.download_staging(bytes)?;
            Ok(Arc::new(Download::new(buffer, bytes)))
        };
        let downloads = &mut ring.downloads;
        while downloads.len() < IN_FLIGHT {
            downloads.push(make()?);
        }
        let mut all = downloads.iter_mut();
        let idle = all.position(|download| Arc::get_mut(download).is_some_and(Download::recycle));
        match idle {
            Some(idle) => Ok(downloads.swap_remove(idle)),
            None => make(),
        }
    }
}

/// A submission in preparation. Dropped, nothing happens.
#[derive(Debug)]
pub(crate) struct Turn<'a> {
    bundle: &'a Bundle,
    ring: MutexGuard<'a, Ring>,
    flight: Flight,
    download: Option<Arc<Download>>,
}

impl Turn<'_> {
    /// Dense row-major data for the tensor of a [`Bundle::write`] call. All have to be written.
    ///
    /// # Errors
    /// As [`Layout::pack`].
    pub fn write<T: Element>(&self, number: usize, data: &[T]) -> Result<()> {
        let missing = || Error::Graph(format!("there is no input {number}"));
        let piece = self.bundle.writes.get(number).ok_or_else(missing)?;
        let (Some((buffer, _)), Some(layout)) = (&self.flight.upload, piece.layout) else {
            return Err(missing());
        };
        let range = piece.at..piece.at + layout.size_bytes();
        let mut view = buffer
            .get_mapped_range_mut(range)
            .map_err(|error| Error::Validation {
                what: "writing a staging buffer".to_owned(),
                reason: error.to_string(),
            })?;
        layout.pack_into(data, view.slice(..))
    }

    /// Hands everything to the device and returns at once. Without [`Bundle::read`] there is nothing to wait for.
    ///
    /// # Errors
    /// As [`Recorder::submit`](super::Recorder::submit).
    pub fn submit<'d>(
        mut self,
        dispatches: impl Iterator<Item = &'d Dispatch>,
    ) -> Result<Option<Transfer>> {
        let inner = &self.bundle.gpu.0;
        let what = || format!("submitting {:?}", self.bundle.label);
        let (index, dispatches) = inner.guard.run(what, 0, || self.send(dispatches))?;
        inner.submissions.fetch_add(1, Ordering::Relaxed);
        inner.dispatches.fetch_add(dispatches, Ordering::Relaxed);
        // Only here: memory of a submission that failed is not used again.
        self.flight.index = Some(index.clone());
        self.ring.flights.push_back(self.flight);
        Ok(self.download.map(|download| {
            self.ring.downloads.push(Arc::clone(&download));
            Transfer::new(self.bundle.gpu.clone(), download, index)
        }))
    }

    fn send<'d>(
        &self,
        dispatches: impl Iterator<Item = &'d Dispatch>,
    ) -> (wgpu::SubmissionIndex, u64) {
        let bundle = self.bundle;
        let gpu = &bundle.gpu;
        let label = Some(bundle.label);
        let descriptor = wgpu::CommandEncoderDescriptor { label };
        let mut encoder = gpu.device().create_command_encoder(&descriptor);
        if let Some((staging, _)) = &self.flight.upload {
            staging.unmap();
            for Piece { slice, at, .. } in &bundle.writes {
                let to = slice.buffer().raw();
                encoder.copy_buffer_to_buffer(staging, *at, to, slice.offset(), slice.size());
            }
        }
        let mut dispatches = dispatches.peekable();
        let mut count = 0;
        if dispatches.peek().is_some() {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                label,
                timestamp_writes: None,
            });
            for dispatch in dispatches {
                dispatch.encode(&mut pass);
                count += 1;
            }
        }
        for (from, to) in &bundle.copies {
            let (source, target) = (from.buffer().raw(), to.buffer().raw());
            encoder.copy_buffer_to_buffer(source, from.offset(), target, to.offset(), from.size());
        }
        if let Some(download) = &self.download {
            for Piece { slice, at, .. } in &bundle.reads {
                let (from, to) = (slice.buffer().raw(), &download.buffer);
                encoder.copy_buffer_to_buffer(from, slice.offset(), to, *at, slice.size());
            }
        }
        let index = gpu.queue().submit([encoder.finish()]);
        if let Some((staging, arrival)) = &self.flight.upload {
            arrival.map(staging, wgpu::MapMode::Write, bundle.write_bytes);
        }
        if let Some(download) = &self.download {
            download.map();
        }
        (index, count)
    }
}
