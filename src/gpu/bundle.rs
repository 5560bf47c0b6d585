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
use super::pool::{Buffer, BufferSlice, OFFSET_ALIGNMENT};
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
    /// One, or one for each of [`IN_FLIGHT`] submissions where they read different memory.
    bind_groups: Vec<BindGroup>,
    pub workgroups: [u32; 3],
}

impl Dispatch {
    /// Fails as [`Recorder::dispatch`](super::Recorder::dispatch).
    pub fn new(
        gpu: &Gpu,
        pipeline: Arc<Pipeline>,
        bind_groups: Vec<BindGroup>,
        workgroups: [u32; 3],
    ) -> Result<Self> {
        gpu.check_workgroups(pipeline.key(), workgroups)?;
        for bind_group in &bind_groups {
            bind_group.check(&pipeline)?;
        }
        Ok(Self {
            pipeline,
            bind_groups,
            workgroups,
        })
    }

    /// That of a turn.
    pub fn bind_group(&self, turn: usize) -> &BindGroup {
        self.bind_groups.get(turn).unwrap_or(&self.bind_groups[0])
    }

    fn encode(&self, pass: &mut wgpu::ComputePass<'_>, turn: usize) {
        let [x, y, z] = self.workgroups;
        pass.set_pipeline(self.pipeline.raw());
        pass.set_bind_group(0, self.bind_group(turn).raw(), &[]);
        pass.dispatch_workgroups(x, y, z);
    }
}

/// Bytes that results of one buffer may lie apart to be copied at once. Another copy costs the host microseconds (docs/performance.md), so
/// many bytes more cost the device less than one.
const MOST_APART: u64 = 4096;

/// A tensor's place in the host's memory.
#[derive(Debug)]
struct Piece {
    layout: Layout,
    at: u64,
}

/// A stretch of a device buffer and its place in the host's memory.
#[derive(Debug)]
struct Stretch {
    buffer: Buffer,
    offset: u64,
    size: u64,
    at: u64,
}

impl Stretch {
    fn of(slice: &BufferSlice, at: u64) -> Self {
        Self {
            buffer: slice.buffer().clone(),
            offset: slice.offset(),
            size: slice.size(),
            at,
        }
    }

    /// Its end becomes that of the slice, if that is further.
    fn reach(&mut self, slice: &BufferSlice) {
        let end = slice.offset() + slice.size();
        self.size = self.size.max(end - self.offset);
    }

    /// Whether a slice that does not begin before it begins at most so many bytes behind its end.
    fn is_near(&self, slice: &BufferSlice, apart: u64) -> bool {
        let end = self.offset + self.size;
        self.buffer.id() == slice.buffer().id() && slice.offset() <= end + apart
    }
}

/// What surrounds the dispatches of a submission: tensors that the host writes before, copies and results behind, and the
/// memory that all submissions use in turn.
///
/// What the host writes is copied from a staging buffer, or is read in place: then each of [`IN_FLIGHT`] buffers holds all of it, and
/// submissions, which know their turn, bind one after the other.
#[derive(Debug)]
pub(crate) struct Bundle {
    gpu: Gpu,
    label: &'static str,
    /// What is read in place, by turn.
    in_place: Vec<Buffer>,
    writes: Vec<Piece>,
    /// What is copied from the host's memory.
    uploads: Vec<Stretch>,
    write_bytes: u64,
    copies: Vec<(BufferSlice, BufferSlice)>,
    reads: Vec<Stretch>,
    read_bytes: u64,
    ring: Mutex<Ring>,
}

/// Memory for submissions, all of it made for the first. More is made only while a caller keeps more than [`IN_FLIGHT`] results.
#[derive(Debug, Default)]
struct Ring {
    /// Oldest first.
    flights: VecDeque<Flight>,
    downloads: Vec<Arc<Download>>,
}

/// A submission, or the memory for one.
#[derive(Debug)]
struct Flight {
    turn: usize,
    index: Option<wgpu::SubmissionIndex>,
    /// Nothing where there is nothing to write.
    upload: Option<Upload>,
}

#[derive(Debug)]
struct Upload {
    buffer: wgpu::Buffer,
    mapped: Arc<Arrival>,
}

impl Flight {
    /// Waits until the submission is done.
    fn land(&self, guard: &Guard) -> Result<()> {
        let Some(index) = &self.index else {
            return Ok(());
        };
        guard.poll(wgpu::PollType::Wait {
            submission_index: Some(index.clone()),
            timeout: None,
        })
    }
}

impl Upload {
    /// Maps the memory once the work submitted so far is done with it.
    fn map(&self, bytes: u64) {
        let (buffer, mode) = (&self.buffer, wgpu::MapMode::Write);
        self.mapped.map(buffer, mode, bytes);
    }

    /// Waits until the memory, which nothing under way uses, is mapped.
    fn wait(&self, guard: &Guard) -> Result<()> {
        loop {
            match self.mapped.get() {
                Some(mapped) => return mapped.map_err(|reason| Error::DeviceLost { reason }),
                // Another thread may have polled the callback out of wgpu and be about to run it.
                None => std::thread::yield_now(),
            }
            guard.poll(wgpu::PollType::Poll)?;
        }
    }
}

impl Bundle {
    /// With nothing but dispatches; the label shows in graphics debuggers and errors.
    pub fn new(gpu: &Gpu, label: &'static str) -> Self {
        Self {
            gpu: gpu.clone(),
            label,
            in_place: Vec::new(),
            writes: Vec::new(),
            uploads: Vec::new(),
            write_bytes: 0,
            copies: Vec::new(),
            reads: Vec::new(),
            read_bytes: 0,
            ring: Mutex::default(),
        }
    }

    /// Tensors written from now on lie in the first of these [`IN_FLIGHT`] buffers, which the host can map, and at the same places of the
    /// others. Dispatches read them by turn, see [`Dispatch::new`]. Without buffers nothing changes.
    pub fn read_in_place(&mut self, buffers: &[Buffer]) {
        self.in_place = buffers.to_vec();
        let flights = buffers.iter().enumerate().map(|(turn, buffer)| Flight {
            turn,
            index: None,
            upload: Some(Upload {
                buffer: buffer.raw().clone(),
                mapped: Arc::default(),
            }),
        });
        lock(&self.ring).flights = flights.collect();
    }

    /// The host writes this tensor before the dispatches: [`Turn::write`] with the number of this call. Tensors that lie behind each other
    /// in a buffer are copied at once.
    pub fn write(&mut self, to: &Tensor) {
        let slice = to.slice();
        let staged = self.is_staged();
        let at = match self.uploads.last_mut() {
            _ if !staged => slice.offset(),
            // What alignment leaves between them belongs to nobody.
            Some(last)
                if last.offset < slice.offset() && last.is_near(slice, OFFSET_ALIGNMENT - 1) =>
            {
                last.reach(slice);
                last.at + slice.offset() - last.offset
            }
            _ => {
                self.uploads.push(Stretch::of(slice, self.write_bytes));
                self.write_bytes
            }
        };
        self.writes.push(Piece {
            layout: *to.layout(),
            at,
        });
        self.write_bytes = (at + slice.size()).next_multiple_of(PIECE_ALIGNMENT);
    }

    /// Keeps turns from beginning, and says whose memory was written last.
    pub fn hold(&self) -> Held<'_> {
        let ring = lock(&self.ring);
        let mut flights = ring.flights.iter().rev();
        let turn = flights
            .find(|flight| flight.index.is_some())
            .map_or(0, |flight| flight.turn);
        Held { _ring: ring, turn }
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

    /// Brings these slices back after the copies; returns where the bytes of each are in the [`Download`]. Those that lie near each other
    /// are copied at once, with what is between them.
    pub fn read(&mut self, slices: &[BufferSlice]) -> Vec<Range<u64>> {
        let mut order: Vec<usize> = (0..slices.len()).collect();
        order.sort_by_key(|&i| (slices[i].buffer().id(), slices[i].offset()));
        let mut ranges = vec![0..0; slices.len()];
        for i in order {
            let slice = &slices[i];
            let mut last = match self.reads.pop() {
                Some(last) if last.is_near(slice, MOST_APART) => last,
                other => {
                    self.reads.extend(other);
                    Stretch::of(slice, self.read_bytes)
                }
            };
            last.reach(slice);
            let at = last.at + slice.offset() - last.offset;
            ranges[i] = at..at + slice.size();
            self.read_bytes = (last.at + last.size).next_multiple_of(PIECE_ALIGNMENT);
            self.reads.push(last);
        }
        ranges
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
                bytes => Some(Upload {
                    buffer: gpu.upload_staging(bytes)?,
                    mapped: Arc::new(Arrival::arrived()),
                }),
            };
            ring.flights.push_front(Flight {
                turn: 0,
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
        let turn = Turn {
            bundle: self,
            ring,
            flight: Some(flight),
            download,
        };
        turn.begin()?;
        Ok(turn)
    }

    /// Whether what the host writes is copied.
    fn is_staged(&self) -> bool {
        self.in_place.is_empty()
    }

    /// What a buffer stands for in a turn.
    fn memory<'a>(&'a self, buffer: &'a Buffer, turn: usize) -> &'a wgpu::Buffer {
        match self.in_place.first() {
            Some(first) if first.id() == buffer.id() => self.in_place[turn].raw(),
            _ => buffer.raw(),
        }
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

/// While it exists no turn begins.
pub(crate) struct Held<'a> {
    _ring: MutexGuard<'a, Ring>,
    /// That of the last submission.
    pub turn: usize,
}

/// A submission in preparation. Dropped, nothing happens.
#[derive(Debug)]
pub(crate) struct Turn<'a> {
    bundle: &'a Bundle,
    ring: MutexGuard<'a, Ring>,
    /// Nothing once it is submitted.
    flight: Option<Flight>,
    download: Option<Arc<Download>>,
}

/// What is not submitted is the next to be.
impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if let Some(flight) = self.flight.take() {
            // Staging memory stays mapped; what is read in place must not be.
            if let (Some(upload), false) = (&flight.upload, self.bundle.is_staged()) {
                upload.mapped.unmap(&upload.buffer);
            }
            self.ring.flights.push_front(flight);
        }
        self.ring.downloads.extend(self.download.take());
    }
}

impl Turn<'_> {
    /// Waits for the submission that had the memory before, and until the memory is mapped.
    fn begin(&self) -> Result<()> {
        let guard = &self.bundle.gpu.0.guard;
        let Some(flight) = &self.flight else {
            return Ok(());
        };
        flight.land(guard)?;
        let Some(upload) = &flight.upload else {
            return Ok(());
        };
        if !self.bundle.is_staged() {
            let bytes = self.bundle.write_bytes;
            let what = || "mapping inputs".to_owned();
            guard.run(what, bytes, || upload.map(bytes))?;
        }
        upload.wait(guard)
    }

    /// Dense row-major data for the tensor of a [`Bundle::write`] call. All have to be written.
    ///
    /// # Errors
    /// As [`Layout::pack`].
    pub fn write<T: Element>(&self, number: usize, data: &[T]) -> Result<()> {
        let missing = || Error::Graph(format!("there is no input {number}"));
        let piece = self.bundle.writes.get(number).ok_or_else(missing)?;
        let upload = self
            .flight
            .as_ref()
            .and_then(|flight| flight.upload.as_ref());
        let upload = upload.ok_or_else(missing)?;
        let range = piece.at..piece.at + piece.layout.size_bytes();
        let mut view =
            upload
                .buffer
                .get_mapped_range_mut(range)
                .map_err(|error| Error::Validation {
                    what: "writing inputs".to_owned(),
                    reason: error.to_string(),
                })?;
        piece.layout.pack_into(data, view.slice(..))
    }

    /// Hands everything to the device and returns at once. Without [`Bundle::read`] there is nothing to wait for.
    ///
    /// Each dispatch comes with whether a new submission begins before it. Submissions are done in order: one with what the host writes
    /// comes first, one with copies and results last.
    ///
    /// # Errors
    /// As [`Recorder::submit`](super::Recorder::submit).
    pub fn submit<'d>(
        mut self,
        dispatches: impl Iterator<Item = (&'d Dispatch, bool)>,
    ) -> Result<Option<Transfer>> {
        let inner = &self.bundle.gpu.0;
        let what = || format!("submitting {:?}", self.bundle.label);
        let missing = || Error::Graph("a turn without memory".into());
        let mut flight = self.flight.take().ok_or_else(missing)?;
        let sent = inner.guard.run(what, 0, || self.send(&flight, dispatches));
        let (index, submissions, dispatches) = match sent {
            Ok(sent) => sent,
            Err(error) => {
                // Staging memory of a submission that failed is not used again.
                self.download = None;
                if !self.bundle.is_staged() {
                    self.ring.flights.push_front(flight);
                }
                return Err(error);
            }
        };
        inner.submissions.fetch_add(submissions, Ordering::Relaxed);
        inner.dispatches.fetch_add(dispatches, Ordering::Relaxed);
        flight.index = Some(index.clone());
        self.ring.flights.push_back(flight);
        Ok(self.download.take().map(|download| {
            self.ring.downloads.push(Arc::clone(&download));
            Transfer::new(self.bundle.gpu.clone(), download, index)
        }))
    }

    fn send<'d>(
        &self,
        flight: &Flight,
        dispatches: impl Iterator<Item = (&'d Dispatch, bool)>,
    ) -> (wgpu::SubmissionIndex, u64, u64) {
        let bundle = self.bundle;
        let gpu = &bundle.gpu;
        let label = Some(bundle.label);
        let descriptor = wgpu::CommandEncoderDescriptor { label };
        let mut encoder = gpu.device().create_command_encoder(&descriptor);
        if let Some(upload) = &flight.upload {
            upload.mapped.unmap(&upload.buffer);
            for to in &bundle.uploads {
                let (from, raw) = (&upload.buffer, to.buffer.raw());
                encoder.copy_buffer_to_buffer(from, to.at, raw, to.offset, to.size);
            }
        }
        let mut dispatches = dispatches.peekable();
        let (mut submissions, mut count) = (1, 0);
        while let Some((first, _)) = dispatches.next() {
            if count > 0 {
                let next = gpu.device().create_command_encoder(&descriptor);
                let full = std::mem::replace(&mut encoder, next);
                gpu.queue().submit([full.finish()]);
                submissions += 1;
            }
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                label,
                timestamp_writes: None,
            });
            first.encode(&mut pass, flight.turn);
            count += 1;
            while let Some((dispatch, _)) = dispatches.next_if(|(_, cut)| !cut) {
                dispatch.encode(&mut pass, flight.turn);
                count += 1;
            }
        }
        for (from, to) in &bundle.copies {
            let (source, target) = (from.buffer().raw(), to.buffer().raw());
            encoder.copy_buffer_to_buffer(source, from.offset(), target, to.offset(), from.size());
        }
        if let Some(download) = &self.download {
            for from in &bundle.reads {
                let (raw, to) = (bundle.memory(&from.buffer, flight.turn), &download.buffer);
                encoder.copy_buffer_to_buffer(raw, from.offset, to, from.at, from.size);
            }
        }
        let index = gpu.queue().submit([encoder.finish()]);
        if let (Some(upload), true) = (&flight.upload, bundle.is_staged()) {
            upload.map(bundle.write_bytes);
        }
        if let Some(download) = &self.download {
            download.map();
        }
        (index, submissions, count)
    }
}

#[cfg(test)]
mod tests;
