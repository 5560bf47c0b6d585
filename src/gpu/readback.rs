//! Results on their way from the device: asked for now, taken later.

use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::task::{Context, Poll, Waker};

use super::device::Gpu;
use super::guard::Guard;
use super::lock;
use crate::error::{Error, Result};

type Decode<T> = Box<dyn FnOnce(&[&[u8]]) -> Result<T> + Send>;

#[derive(Debug, Default)]
enum Mapping {
    /// Never asked for, or unmapped since.
    #[default]
    Idle,
    Waiting,
    Done(Result<(), String>),
}

#[derive(Debug, Default)]
struct Progress {
    mapping: Mapping,
    waker: Option<Waker>,
}

/// Whether a buffer is mapped: shared with the callback that wgpu runs then. It does not own the buffer, which owns it.
#[derive(Debug, Default)]
pub(super) struct Arrival(Mutex<Progress>);

impl Arrival {
    /// Of a buffer that is mapped already.
    pub(super) fn arrived() -> Self {
        let arrival = Self::default();
        arrival.set(Ok(()));
        arrival
    }

    fn set(&self, mapped: Result<(), String>) {
        let mut progress = lock(&self.0);
        if !matches!(progress.mapping, Mapping::Done(_)) {
            progress.mapping = Mapping::Done(mapped);
        }
        let waker = progress.waker.take();
        drop(progress);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// `None` while the device works.
    pub(super) fn get(&self) -> Option<Result<(), String>> {
        match &lock(&self.0).mapping {
            Mapping::Done(mapped) => Some(mapped.clone()),
            Mapping::Idle | Mapping::Waiting => None,
        }
    }

    /// Unmaps the buffer if it is mapped; false, and nothing happens, while that is on its way.
    pub(super) fn unmap(&self, buffer: &wgpu::Buffer) -> bool {
        let mut progress = lock(&self.0);
        match &progress.mapping {
            Mapping::Waiting => return false,
            Mapping::Done(Ok(())) => buffer.unmap(),
            Mapping::Done(Err(_)) | Mapping::Idle => {}
        }
        *progress = Progress::default();
        true
    }

    /// Maps the first bytes of a buffer once the work submitted so far is done. A second time only after the first has arrived.
    pub(super) fn map(self: &Arc<Self>, buffer: &wgpu::Buffer, mode: wgpu::MapMode, bytes: u64) {
        *lock(&self.0) = Progress {
            mapping: Mapping::Waiting,
            waker: None,
        };
        let arrival = Arc::clone(self);
        buffer.map_async(mode, 0..bytes, move |mapped| {
            arrival.set(mapped.map_err(|error| error.to_string()));
        });
    }
}

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
            0 => self.arrival.set(Ok(())),
            bytes => self.arrival.map(&self.buffer, wgpu::MapMode::Read, bytes),
        }
    }

    /// Unmaps what has arrived, so that it can be filled again; false while results are on their way.
    pub(super) fn recycle(&mut self) -> bool {
        // Nothing is mapped for no bytes.
        self.bytes == 0 || self.arrival.unmap(&self.buffer)
    }

    /// What has arrived at these bytes, an offset that is a multiple of 8 and a size that is one of 4.
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
            .map_err(|error| Error::Validation {
                what: "reading results".to_owned(),
                reason: error.to_string(),
            })?;
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

    /// Whether the results are here, without blocking. Says so once.
    pub(crate) fn try_take(&mut self) -> Option<Result<()>> {
        if self.taken {
            return None;
        }
        if let Err(error) = self.gpu.0.guard.poll(wgpu::PollType::Poll) {
            return Some(Err(error));
        }
        self.take()
    }

    /// Blocks until the results are here.
    pub(crate) fn wait(&mut self) -> Result<()> {
        loop {
            if self.taken {
                return Err(taken());
            }
            self.gpu.0.guard.poll(self.until_done())?;
            if let Some(result) = self.take() {
                return result;
            }
            // Another thread has polled the callback out of wgpu and is about to run it.
            std::thread::yield_now();
        }
    }

    pub(crate) fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<()>> {
        if self.taken {
            return Poll::Ready(Err(taken()));
        }
        lock(&self.download.arrival.0).waker = Some(context.waker().clone());
        if let Some(result) = self.try_take() {
            return Poll::Ready(result);
        }
        if !self.awaited {
            self.awaited = true;
            let inner = &self.gpu.0;
            inner.waiter.watch(
                &inner.guard,
                Watch {
                    until: self.until_done(),
                    arrival: Arc::clone(&self.download.arrival),
                },
            );
        }
        Poll::Pending
    }

    fn until_done(&self) -> wgpu::PollType {
        wgpu::PollType::Wait {
            submission_index: Some(self.index.clone()),
            timeout: None,
        }
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

/// Results of a submission, taken by [`Readback::wait`], [`Readback::try_take`] or `.await`; the device works on meanwhile.
///
/// Dropped before that, the results are discarded.
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
        gpu.0.guard.run(what, bytes, || download.map())?;
        Ok(Self {
            transfer: Transfer::new(gpu, Arc::new(download), index),
            sizes,
            decode: Some(decode),
        })
    }

    /// The results if they are here, without blocking. Returns them once.
    ///
    /// # Errors
    /// [`Error::DeviceLost`]; whatever decoding the bytes returns.
    pub fn try_take(&mut self) -> Option<Result<T>> {
        let arrived = self.transfer.try_take()?;
        Some(self.finish(arrived))
    }

    /// Blocks until the results are here.
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

struct Watch {
    until: wgpu::PollType,
    arrival: Arc<Arrival>,
}

/// A thread, started by the first `.await` that finds results missing, which waits for the device on behalf of all.
///
/// wgpu runs callbacks only while some thread polls, and an executor's threads must not block.
#[derive(Default)]
pub(super) struct Waiter(OnceLock<Option<mpsc::Sender<Watch>>>);

impl Waiter {
    fn watch(&self, guard: &Arc<Guard>, watch: Watch) {
        let sender = self.0.get_or_init(|| {
            let (sender, receiver) = mpsc::channel::<Watch>();
            let guard = Arc::clone(guard);
            std::thread::Builder::new()
                .name("energyflow-waiter".to_owned())
                .spawn(move || receiver.iter().for_each(|watch| watch.run(&guard)))
                .ok()
                .map(|_| sender)
        });
        match sender {
            Some(sender) => {
                // The thread outlives the sender, so the channel is open.
                let _ = sender.send(watch);
            }
            // Without threads, blocking here is what is left.
            None => watch.run(guard),
        }
    }
}

impl Watch {
    fn run(self, guard: &Guard) {
        // On success the callback has woken the task, or is about to.
        if let Err(error) = guard.poll(self.until) {
            self.arrival.set(Err(error.to_string()));
        }
    }
}
