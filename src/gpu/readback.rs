//! Results on their way from the device: asked for now, taken later.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::task::{Context, Poll, Waker};

use super::device::Gpu;
use super::guard::Guard;
use super::lock;
use crate::error::{Error, Result};

type Decode<T> = Box<dyn FnOnce(&[&[u8]]) -> Result<T> + Send>;

#[derive(Debug, Default)]
struct Progress {
    mapped: Option<Result<(), String>>,
    waker: Option<Waker>,
}

/// Shared with the callback that wgpu runs when the staging buffer is mapped.
#[derive(Debug, Default)]
struct Arrival(Mutex<Progress>);

impl Arrival {
    fn set(&self, mapped: Result<(), String>) {
        let mut progress = lock(&self.0);
        progress.mapped.get_or_insert(mapped);
        let waker = progress.waker.take();
        drop(progress);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// Results of a submission, taken by [`Readback::wait`], [`Readback::try_take`] or `.await`; the device works on meanwhile.
///
/// Dropped before that, the results are discarded.
#[must_use = "results are discarded unless taken"]
pub struct Readback<T> {
    gpu: Gpu,
    staging: wgpu::Buffer,
    index: wgpu::SubmissionIndex,
    sizes: Vec<u64>,
    arrival: Arc<Arrival>,
    awaited: bool,
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
        let arrival = Arc::new(Arrival::default());
        let callback = Arc::clone(&arrival);
        let total: u64 = sizes.iter().sum();
        if total == 0 {
            arrival.set(Ok(()));
        } else {
            let what = || "mapping results".to_owned();
            gpu.0.guard.run(what, total, || {
                staging.map_async(wgpu::MapMode::Read, 0..total, move |mapped| {
                    callback.set(mapped.map_err(|error| error.to_string()));
                });
            })?;
        }
        Ok(Self {
            gpu,
            staging,
            index,
            sizes,
            arrival,
            awaited: false,
            decode: Some(decode),
        })
    }

    /// The results if they are here, without blocking. Returns them once.
    ///
    /// # Errors
    /// [`Error::DeviceLost`]; whatever decoding the bytes returns.
    pub fn try_take(&mut self) -> Option<Result<T>> {
        self.decode.as_ref()?;
        if let Err(error) = self.gpu.0.guard.poll(wgpu::PollType::Poll) {
            return Some(Err(error));
        }
        self.take()
    }

    /// Blocks until the results are here.
    ///
    /// # Errors
    /// As [`Readback::try_take`]; [`Error::Validation`] when it has returned the results already.
    pub fn wait(mut self) -> Result<T> {
        loop {
            if self.decode.is_none() {
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

    fn until_done(&self) -> wgpu::PollType {
        wgpu::PollType::Wait {
            submission_index: Some(self.index.clone()),
            timeout: None,
        }
    }

    fn take(&mut self) -> Option<Result<T>> {
        let mapped = lock(&self.arrival.0).mapped.clone()?;
        let decode = self.decode.take()?;
        Some(match mapped {
            Ok(()) => self.decode_with(decode),
            Err(reason) => Err(Error::DeviceLost { reason }),
        })
    }

    fn decode_with(&self, decode: Decode<T>) -> Result<T> {
        let total = self.sizes.iter().sum();
        if total == 0 {
            return decode(&[]);
        }
        let view = self
            .staging
            .get_mapped_range(0..total)
            .map_err(|error| Error::Validation {
                what: "reading results".to_owned(),
                reason: error.to_string(),
            })?;
        let mut rest: &[u8] = &view;
        let mut pieces = Vec::with_capacity(self.sizes.len());
        for &size in &self.sizes {
            let (piece, tail) = rest.split_at(size as usize);
            pieces.push(piece);
            rest = tail;
        }
        let value = decode(&pieces);
        drop(view);
        self.staging.unmap();
        self.gpu.0.staging.give_back(self.staging.clone());
        value
    }
}

impl<T> Future for Readback<T> {
    type Output = Result<T>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if self.decode.is_none() {
            return Poll::Ready(Err(taken()));
        }
        lock(&self.arrival.0).waker = Some(context.waker().clone());
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
                    arrival: Arc::clone(&self.arrival),
                },
            );
        }
        Poll::Pending
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

fn taken() -> Error {
    Error::Validation {
        what: "reading results".to_owned(),
        reason: "they have been taken already".to_owned(),
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
