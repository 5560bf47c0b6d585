//! Results that are requested now and taken later.

use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use super::context::inaccessible;
use super::device::Gpu;
use super::waiter::{Arrival, Watch};
use crate::error::{Error, Result};

type Decode<T> = Box<dyn FnOnce(&[&[u8]]) -> Result<T> + Send>;

/// Host-visible memory that results are copied into.
#[derive(Debug)]
pub(crate) struct Download {
    pub(super) buffer: wgpu::Buffer,
    pub(super) bytes: u64,
    pub(super) arrival: Arc<Arrival>,
}

impl Download {
    /// `buffer`: unmapped.
    pub(super) fn new(buffer: wgpu::Buffer, bytes: u64) -> Self {
        Self {
            buffer,
            bytes,
            arrival: Arc::default(),
        }
    }

    /// Maps it once the work submitted so far is done.
    pub(super) fn map(&self) {
        match self.bytes {
            0 => self.arrival.skip(),
            bytes => self.arrival.map(&self.buffer, wgpu::MapMode::Read, bytes),
        }
    }

    /// Unmaps what has arrived, so that it can be filled again. Returns false while results have not arrived.
    pub(super) fn recycle(&mut self) -> bool {
        // Nothing is mapped for no bytes.
        if self.bytes > 0 {
            if self.arrival.awaited().is_some() {
                return false;
            }
            self.arrival.unmap(&self.buffer);
        }
        true
    }

    /// The bytes that have arrived in this range. Its offset is a multiple of 8, its size one of 4.
    pub(crate) fn read<T>(
        &self,
        range: Range<u64>,
        read: impl FnOnce(&[u8]) -> Result<T>,
    ) -> Result<T> {
        if range.is_empty() {
            return read(&[]);
        }
        let view = self
            .buffer
            .get_mapped_range(range)
            .map_err(|error| inaccessible("reading results", &error))?;
        read(&view)
    }
}

/// Results on their way into host-visible memory.
#[derive(Debug)]
pub(crate) struct Transfer {
    gpu: Gpu,
    download: Arc<Download>,
    index: wgpu::SubmissionIndex,
    awaited: bool,
    taken: bool,
}

impl Transfer {
    /// `download`: filled by submission `index`, mapped afterwards.
    pub(super) fn new(gpu: Gpu, download: Arc<Download>, index: wgpu::SubmissionIndex) -> Self {
        Self {
            gpu,
            download,
            index,
            awaited: false,
            taken: false,
        }
    }

    pub(crate) fn download(&self) -> &Arc<Download> {
        &self.download
    }

    /// Whether the results have arrived, without blocking. Returns true once.
    pub(crate) fn try_take(&mut self) -> Option<Result<()>> {
        if self.taken {
            return None;
        }
        if let Err(error) = self.gpu.context().settle() {
            return Some(Err(error));
        }
        self.take()
    }

    /// Blocks until the results have arrived.
    pub(crate) fn wait(&mut self) -> Result<()> {
        if self.taken {
            return Err(taken());
        }
        let awaited = self.download.arrival.awaited();
        self.gpu.context().wait(Some(self.index.clone()))?;
        // The callback may still be to come, on another thread or behind one of the caller's.
        if let Some(round) = awaited {
            self.download.arrival.expect(round);
        }
        self.take().unwrap_or_else(|| Err(taken()))
    }

    pub(crate) fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<()>> {
        if self.taken {
            return Poll::Ready(Err(taken()));
        }
        let arrival = &self.download.arrival;
        let round = arrival.awaited();
        arrival.wake(context.waker().clone());
        if let Some(result) = self.try_take() {
            return Poll::Ready(result);
        }
        if let (Some(round), false) = (round, self.awaited) {
            self.awaited = true;
            let inner = &self.gpu.0;
            let watch = Watch {
                until: self.index.clone(),
                arrival: Arc::clone(&self.download.arrival),
                round,
            };
            inner.waiter.watch(&inner.context, watch);
        }
        Poll::Pending
    }

    fn take(&mut self) -> Option<Result<()>> {
        let mapped = self.download.arrival.get()?;
        self.taken = true;
        Some(mapped.map_err(|reason| Error::DeviceLost { reason }))
    }
}

fn taken() -> Error {
    Error::Validation {
        what: "reading results".to_owned(),
        reason: "they have been taken already".to_owned(),
    }
}

/// Results of a submission, taken by [`Readback::wait`], [`Readback::try_take`] or `.await`. The device goes on working meanwhile.
///
/// If it is dropped before that, the results are discarded.
#[must_use = "results are discarded unless taken"]
pub struct Readback<T> {
    transfer: Transfer,
    sizes: Vec<u64>,
    /// Taken with the result.
    decode: Option<Decode<T>>,
}

impl<T> Readback<T> {
    /// `staging`: unmapped, filled by submission `index` with pieces of `sizes` bytes.
    pub(super) fn new(
        gpu: Gpu,
        staging: wgpu::Buffer,
        index: wgpu::SubmissionIndex,
        sizes: Vec<u64>,
        decode: Decode<T>,
    ) -> Result<Self> {
        let bytes = sizes.iter().sum();
        let download = Download::new(staging, bytes);
        let what = || "mapping results".to_owned();
        gpu.context().run(what, bytes, || download.map())?;
        gpu.context().settle()?;
        Ok(Self {
            transfer: Transfer::new(gpu, Arc::new(download), index),
            sizes,
            decode: Some(decode),
        })
    }

    /// The results if they have arrived, without blocking. Returns them once.
    ///
    /// # Errors
    /// [`Error::DeviceLost`]; whatever decoding the bytes returns.
    pub fn try_take(&mut self) -> Option<Result<T>> {
        let arrived = self.transfer.try_take()?;
        Some(self.finish(arrived))
    }

    /// Blocks until the results have arrived.
    ///
    /// # Errors
    /// As [`Readback::try_take`]; [`Error::Validation`] when it has returned the results already.
    pub fn wait(mut self) -> Result<T> {
        let arrived = self.transfer.wait();
        self.finish(arrived)
    }

    fn finish(&mut self, arrived: Result<()>) -> Result<T> {
        arrived?;
        let decode = self.decode.take().ok_or_else(taken)?;
        let download = self.transfer.download();
        let value = download.read(0..download.bytes, |view| {
            let mut rest = view;
            let mut pieces = Vec::with_capacity(self.sizes.len());
            // Without bytes there are no pieces, either.
            for &size in self.sizes.iter().filter(|_| !view.is_empty()) {
                let (piece, tail) = rest.split_at(size as usize);
                pieces.push(piece);
                rest = tail;
            }
            decode(&pieces)
        });
        if download.bytes > 0 {
            download.buffer.unmap();
        }
        let gpu = &self.transfer.gpu;
        gpu.0.staging.give_back(download.buffer.clone());
        value
    }
}

impl<T> Future for Readback<T> {
    type Output = Result<T>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.transfer
            .poll(context)
            .map(|arrived| self.finish(arrived))
    }
}

impl<T> fmt::Debug for Readback<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Readback")
            .field("sizes", &self.sizes)
            .field("taken", &self.decode.is_none())
            .finish_non_exhaustive()
    }
}
