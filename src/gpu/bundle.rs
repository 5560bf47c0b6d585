//! Work that is prepared once and submitted many times. A submission allocates nothing.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::context::inaccessible;
use super::device::Gpu;
use super::dispatch::Dispatch;
use super::element::Element;
use super::gate::Passage;
use super::layout::Layout;
use super::lock::lock;
use super::pool::{Buffer, BufferSlice, OFFSET_ALIGNMENT};
use super::readback::{Download, Transfer};
use super::recorder::check_copy;
use super::ring::{Flight, Next, Ring, Upload};
use super::tensor::Tensor;
use super::waiter::Arrival;
use crate::error::{Error, Result};

/// Upper bound on the submissions of one bundle in flight. Two keep the device busy, and the third covers a host that is late.
pub(crate) const IN_FLIGHT: usize = 3;

/// Alignment in bytes of every piece of a staging buffer.
const PIECE_ALIGNMENT: u64 = 16;

/// Largest gap in bytes between two results of a buffer that are copied together. Another copy costs the host microseconds
/// (docs/performance.md), while this many more bytes cost the device less than one.
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

    /// Extends the stretch to the end of the slice, unless it reaches further already.
    fn reach(&mut self, slice: &BufferSlice) {
        let end = slice.offset() + slice.size();
        self.size = self.size.max(end - self.offset);
    }

    /// Whether a slice begins within the stretch, or at most `apart` bytes after its end.
    fn is_near(&self, slice: &BufferSlice, apart: u64) -> bool {
        let end = self.offset + self.size;
        self.buffer.id() == slice.buffer().id() && slice.offset() <= end + apart
    }
}

/// What surrounds the dispatches of a submission: tensors that the host writes before them, copies and results after them, and the
/// memory that the submissions use in turn.
///
/// What the host writes is either copied from a staging buffer or read in place. To be read in place, it lies in each of [`IN_FLIGHT`]
/// buffers, and successive submissions bind these in turn.
#[derive(Debug)]
pub(crate) struct Bundle {
    gpu: Gpu,
    label: &'static str,
    /// The buffers that are read in place, by turn.
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

impl Bundle {
    /// A bundle without writes, copies and results. The label shows in graphics debuggers and errors.
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

    /// Lets dispatches read in place what the host writes from now on. The tensors lie in the first of these [`IN_FLIGHT`] buffers, which
    /// the host can map, and at the same places in the others. Dispatches read the buffers by turn, see [`Dispatch::new`]. Without buffers
    /// nothing changes.
    pub fn read_in_place(&mut self, buffers: &[Buffer]) {
        self.in_place = buffers.to_vec();
        let flights = buffers.iter().enumerate().map(|(turn, buffer)| {
            let upload = Upload {
                buffer: buffer.inner().clone(),
                mapped: Arc::default(),
            };
            Flight::new(turn, Some(upload))
        });
        lock(&self.ring).flights = flights.collect();
    }

    /// Declares a tensor that the host writes before the dispatches, with [`Turn::write`] and the number of this call. Tensors that lie one
    /// after the other in a buffer are copied together.
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

    /// Keeps turns from beginning, and returns the turn whose memory was written last.
    pub fn hold(&self) -> Held<'_> {
        let mut waited = Ok(());
        loop {
            let gate = self.gpu.gate();
            let ring = lock(&self.ring);
            // What turns that have not begun mapped in advance.
            let ahead = ring.flights.iter().filter(|_| !self.is_staged());
            let uploads: Vec<&Upload> = ahead.filter_map(|flight| flight.upload.as_ref()).collect();
            let awaited = uploads.iter().find_map(|upload| {
                let round = upload.mapped.awaited()?;
                Some((Arc::clone(&upload.mapped), round))
            });
            if let (Some((mapped, round)), Ok(())) = (awaited, &waited) {
                // Another thread's poll may be about to map it, and would do so after it was unmapped.
                drop((ring, gate));
                waited = self.arrived(&mapped, round);
                continue;
            }
            uploads.into_iter().for_each(Upload::unmap);
            let mut flights = ring.flights.iter().rev();
            let turn = flights
                .find(|flight| flight.number > 0)
                .map_or(0, |flight| flight.turn);
            return Held { _gate: gate, turn };
        }
    }

    /// Waits, without the gate, until memory is mapped or cannot be.
    fn arrived(&self, mapped: &Arrival, round: u64) -> Result<()> {
        let context = self.gpu.context();
        context.settle()?;
        // A timing may still read the memory, or the callback be behind one of the caller's.
        if mapped.awaited() == Some(round) {
            context.wait(None)?;
            mapped.expect(round);
        }
        Ok(())
    }

    /// Adds a copy after the dispatches.
    ///
    /// # Errors
    /// As [`Recorder::copy`](super::Recorder::copy).
    pub fn copy(&mut self, from: BufferSlice, to: BufferSlice) -> Result<()> {
        check_copy(&from, &to)?;
        self.copies.push((from, to));
        Ok(())
    }

    /// Brings these slices back after the copies, and returns where the bytes of each lie in the [`Download`]. Slices that lie near each
    /// other are copied together, with what lies between them.
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

    /// Staging memory for the next submission. Waits for the oldest submission if [`IN_FLIGHT`] are in flight, and for the turn of another
    /// thread, because there is one turn at a time.
    ///
    /// # Errors
    /// [`Error::Limit`], [`Error::OutOfMemory`], [`Error::DeviceLost`]
    pub fn turn(&self) -> Result<Turn<'_>> {
        let context = self.gpu.context();
        loop {
            context.check()?;
            let gate = context.gate();
            let next = self.next()?;
            if let Next::Ready(flight) = next {
                let mut turn = Turn {
                    bundle: self,
                    flight: Some(flight),
                    download: None,
                    _gate: gate,
                };
                if self.read_bytes > 0 {
                    turn.download = Some(self.download()?);
                }
                return Ok(turn);
            }
            // Callbacks of the caller may run in what follows. Other turns may begin there, so that everything is looked at again.
            drop(gate);
            match next {
                Next::Landing { number, index } => {
                    context.wait(index)?;
                    lock(&self.ring).landed(number);
                }
                Next::Mapping { mapped, round } => self.arrived(&mapped, round)?,
                Next::Ready(_) => {}
            }
        }
    }

    fn next(&self) -> Result<Next> {
        let (context, staging) = (self.gpu.context(), &self.gpu.0.staging);
        let mut ring = lock(&self.ring);
        while ring.flights.len() < IN_FLIGHT {
            let upload = match self.write_bytes {
                0 => None,
                bytes => Some(Upload {
                    buffer: staging.upload(context, bytes)?,
                    mapped: Arc::new(Arrival::arrived()),
                }),
            };
            ring.flights.push_front(Flight::new(0, upload));
        }
        // There is one: they were made above.
        let Some(flight) = ring.flights.pop_front() else {
            return Err(Error::Graph("no staging memory".into()));
        };
        let next = match self.obstacle(&flight) {
            Ok(None) => return Ok(Next::Ready(flight)),
            Ok(Some(obstacle)) => Ok(obstacle),
            Err(error) => Err(error),
        };
        ring.flights.push_front(flight);
        next
    }

    /// What has to happen before this memory can be written.
    fn obstacle(&self, flight: &Flight) -> Result<Option<Next>> {
        if !flight.landed {
            return Ok(Some(Next::Landing {
                number: flight.number,
                index: flight.index.clone(),
            }));
        }
        let Some(upload) = &flight.upload else {
            return Ok(None);
        };
        let mapped = &upload.mapped;
        if mapped.is_idle() {
            let (what, bytes) = (|| "mapping inputs".to_owned(), self.write_bytes);
            let context = self.gpu.context();
            context.run(what, bytes, || upload.map(bytes))?;
        }
        if let Some(round) = mapped.awaited() {
            let mapped = Arc::clone(mapped);
            return Ok(Some(Next::Mapping { mapped, round }));
        }
        if let Some(Err(reason)) = mapped.get() {
            // To be asked for again.
            upload.unmap();
            return Err(Error::DeviceLost { reason });
        }
        Ok(None)
    }

    /// Whether what the host writes is copied.
    fn is_staged(&self) -> bool {
        self.in_place.is_empty()
    }

    /// The buffer that is bound in place of this one in a turn.
    fn memory<'a>(&'a self, buffer: &'a Buffer, turn: usize) -> &'a wgpu::Buffer {
        match self.in_place.first() {
            Some(first) if first.id() == buffer.id() => self.in_place[turn].inner(),
            _ => buffer.inner(),
        }
    }

    /// A download buffer that nobody reads any more.
    fn download(&self) -> Result<Arc<Download>> {
        let (context, bytes) = (self.gpu.context(), self.read_bytes);
        let make = || -> Result<Arc<Download>> {
            let buffer = self.gpu.0.staging.download(context, bytes)?;
            Ok(Arc::new(Download::new(buffer, bytes)))
        };
        let downloads = &mut lock(&self.ring).downloads;
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

/// Keeps turns from beginning until it is dropped.
pub(crate) struct Held<'a> {
    _gate: Passage<'a>,
    /// Turn of the last submission.
    pub turn: usize,
}

/// A submission in preparation. If it is dropped, nothing is submitted.
#[derive(Debug)]
pub(crate) struct Turn<'a> {
    bundle: &'a Bundle,
    /// `None` once it is submitted.
    flight: Option<Flight>,
    download: Option<Arc<Download>>,
    _gate: Passage<'a>,
}

/// Memory of a turn that was not submitted is used by the next turn.
impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut ring = lock(&self.bundle.ring);
        if let Some(flight) = self.flight.take() {
            // Staging memory stays mapped; what is read in place must not be.
            if let (Some(upload), false) = (&flight.upload, self.bundle.is_staged()) {
                upload.unmap();
            }
            ring.flights.push_front(flight);
        }
        ring.downloads.extend(self.download.take());
    }
}

impl Turn<'_> {
    /// Writes dense row-major data for the tensor of a [`Bundle::write`] call. Every declared tensor has to be written.
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
        let mut view = upload
            .buffer
            .get_mapped_range_mut(range)
            .map_err(|error| inaccessible("writing inputs", &error))?;
        piece.layout.pack_into(data, view.slice(..))
    }

    /// Submits everything and returns without waiting. Without [`Bundle::read`] there is nothing to wait for.
    ///
    /// A flag beside each dispatch says whether a new submission begins before it. Submissions run in order. The first contains what the
    /// host writes, the last the copies and results.
    ///
    /// `note` is called with `true` just before the submission, and with `false` if it fails.
    ///
    /// # Errors
    /// As [`Recorder::submit`](super::Recorder::submit).
    pub fn submit<'d>(
        mut self,
        dispatches: impl Iterator<Item = (&'d Dispatch, bool)>,
        note: impl Fn(bool),
    ) -> Result<Option<Transfer>> {
        let bundle = self.bundle;
        let missing = || Error::Graph("a turn without memory".into());
        let mut flight = self.flight.take().ok_or_else(missing)?;
        let (turn, upload) = (flight.turn, flight.upload.clone());
        // Under way from here on: callbacks that the submission runs may begin other turns.
        let number = {
            let mut ring = lock(&bundle.ring);
            ring.submitted += 1;
            flight.number = ring.submitted;
            flight.landed = false;
            flight.index = None;
            ring.flights.push_back(flight);
            ring.submitted
        };
        // Nothing once it is given back: memory of a submission that failed, or panicked, is not used again.
        let download = self.download.take();
        let encode = |encoder: &mut wgpu::CommandEncoder| {
            bundle.encode(
                encoder,
                turn,
                upload.as_ref(),
                download.as_deref(),
                dispatches,
            )
        };
        let context = bundle.gpu.context();
        let sent = context.submit(
            bundle.label,
            encode,
            || note(true),
            |index| {
                let mut ring = lock(&bundle.ring);
                if let Some(at) = ring.find(number) {
                    let flight = &mut ring.flights[at];
                    flight.index = Some(index.clone());
                    if let (Some(upload), true) = (&flight.upload, bundle.is_staged())
                        && upload.mapped.is_idle()
                    {
                        upload.map(bundle.write_bytes);
                    }
                }
                drop(ring);
                if let Some(download) = &download {
                    download.map();
                }
                index
            },
        );
        let index = match sent {
            Ok(index) => index,
            Err(error) => {
                bundle.take_back(number);
                note(false);
                return Err(error);
            }
        };
        let transfer = download.map(|download| {
            lock(&bundle.ring).downloads.push(Arc::clone(&download));
            Transfer::new(bundle.gpu.clone(), download, index)
        });
        // Callbacks run without the gate.
        drop(self);
        context.settle()?;
        Ok(transfer)
    }
}

impl Bundle {
    /// Called when a submission failed. Memory that it read in place is written next. Other staging memory is not used again.
    fn take_back(&self, number: u64) {
        let mut ring = lock(&self.ring);
        let found = ring.find(number);
        if let Some(mut flight) = found.and_then(|at| ring.flights.remove(at))
            && !self.is_staged()
        {
            flight.number = 0;
            flight.landed = true;
            ring.flights.push_front(flight);
        }
    }

    /// Returns the number of dispatches.
    fn encode<'d>(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        turn: usize,
        upload: Option<&Upload>,
        download: Option<&Download>,
        dispatches: impl Iterator<Item = (&'d Dispatch, bool)>,
    ) -> u64 {
        if let Some(upload) = upload {
            upload.unmap();
            for to in &self.uploads {
                let (from, inner) = (&upload.buffer, to.buffer.inner());
                encoder.copy_buffer_to_buffer(from, to.at, inner, to.offset, to.size);
            }
        }
        let mut dispatches = dispatches.peekable();
        let mut count = 0;
        while let Some((first, _)) = dispatches.next() {
            if count > 0 {
                self.gpu.context().submit_part(self.label, encoder);
            }
            count += 1;
            #[cfg(feature = "trace")]
            if first.is_apart() {
                super::trace::run(self.gpu.context(), encoder, first, turn);
                continue;
            }
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                label: Some(self.label),
                timestamp_writes: None,
            });
            first.encode(&mut pass, turn);
            let together = |(next, cut): &(&Dispatch, bool)| !cut && !next.is_apart();
            while let Some((dispatch, _)) = dispatches.next_if(together) {
                dispatch.encode(&mut pass, turn);
                count += 1;
            }
        }
        for (from, to) in &self.copies {
            let (source, target) = (from.buffer().inner(), to.buffer().inner());
            encoder.copy_buffer_to_buffer(source, from.offset(), target, to.offset(), from.size());
        }
        if let Some(download) = download {
            for from in &self.reads {
                let (inner, to) = (self.memory(&from.buffer, turn), &download.buffer);
                encoder.copy_buffer_to_buffer(inner, from.offset, to, from.at, from.size);
            }
        }
        count
    }
}

#[cfg(test)]
mod tests;
