//! The device behind error scopes: the one way in which wgpu's failures become [`Error`]s, and the one place that submits and polls.
//!
//! wgpu runs callbacks, also the caller's, on whichever thread polls or submits. So [`Context::poll`] and [`Context::wait`] are called
//! without any lock, and [`Context::submit`] holds only the re-entrant [`Gate`]. A callback may call this crate, and its panic unwinds out
//! of the call in which it ran.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use wgpu::{CommandEncoder, ErrorFilter, PollType, SubmissionIndex};

use super::capabilities::Capabilities;
use super::gate::{Gate, Passage};
use super::lock::lock;
use crate::error::{Error, Result};

/// What the device's callbacks reported.
#[derive(Debug, Default)]
struct Faults {
    lost: OnceLock<String>,
    uncaptured: AtomicU64,
}

/// Device and queue with their capabilities. Every call on them that can fail goes through this type.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) device: wgpu::Device,
    pub(super) queue: wgpu::Queue,
    pub(super) capabilities: Capabilities,
    pub(super) submissions: AtomicU64,
    /// A part of a run is being submitted, and its other parts must come next.
    parted: AtomicBool,
    pub(super) dispatches: AtomicU64,
    gate: Gate,
    faults: Arc<Faults>,
    /// Panics of callbacks that ran on a thread of this crate. The next poll raises them.
    panics: Mutex<Vec<Box<dyn Any + Send>>>,
    #[cfg(test)]
    pub(super) refusals: super::refusals::Refusals,
}

impl Context {
    /// `owned`: the device was opened by this crate, so its uncaptured errors are this crate's to handle.
    pub(super) fn new(
        device: wgpu::Device,
        queue: wgpu::Queue,
        owned: bool,
        capabilities: Capabilities,
    ) -> Self {
        let faults = Arc::new(Faults::default());
        let lost = Arc::clone(&faults);
        device.set_device_lost_callback(move |cause, message| {
            // The device of a dropped `Gpu` is destroyed in the end, which is no failure.
            match cause {
                wgpu::DeviceLostReason::Destroyed => log::debug!("GPU device gone: {message}"),
                wgpu::DeviceLostReason::Unknown => log::error!("GPU device lost: {message}"),
            }
            // A device is lost once; a second report adds nothing.
            let _ = lost.lost.set(format!("{cause:?}: {message}"));
        });
        if owned {
            let uncaptured = Arc::clone(&faults);
            device.on_uncaptured_error(Arc::new(move |error| {
                log::error!("wgpu error outside any call of this crate: {error}");
                uncaptured.uncaptured.fetch_add(1, Ordering::Relaxed);
            }));
        }
        Self {
            device,
            queue,
            capabilities,
            submissions: AtomicU64::new(0),
            parted: AtomicBool::new(false),
            dispatches: AtomicU64::new(0),
            gate: Gate::default(),
            faults,
            panics: Mutex::default(),
            #[cfg(test)]
            refusals: super::refusals::Refusals::default(),
        }
    }

    /// Number of errors that no scope caught.
    pub(super) fn uncaptured(&self) -> u64 {
        self.faults.uncaptured.load(Ordering::Relaxed)
    }

    /// Keeps other threads from submitting until it is dropped.
    pub(super) fn gate(&self) -> Passage<'_> {
        self.gate.enter()
    }

    /// Fails once the device is known to be lost.
    pub(super) fn check(&self) -> Result<()> {
        match self.faults.lost.get() {
            Some(reason) => Err(Error::DeviceLost {
                reason: reason.clone(),
            }),
            None => Ok(()),
        }
    }

    /// Fails once the device is lost. wgpu reports a loss only through a callback, which a poll runs, and not through error scopes.
    pub(super) fn settle(&self) -> Result<()> {
        self.poll(PollType::Poll)
    }

    /// Runs `call` under error scopes. `what` and `bytes` describe it in an error. Only [`Context::settle`] reports that the device was lost
    /// meanwhile, so that no callback of the caller runs in here.
    pub(super) fn run<T>(
        &self,
        what: impl FnOnce() -> String,
        bytes: u64,
        call: impl FnOnce() -> T,
    ) -> Result<T> {
        self.check()?;
        let scopes = [
            ErrorFilter::OutOfMemory,
            ErrorFilter::Internal,
            ErrorFilter::Validation,
        ]
        .map(|filter| self.device.push_error_scope(filter));
        let value = call();
        let mut caught = None;
        // Scopes form a stack. Their futures are ready at once: scopes of native devices are filled synchronously.
        for scope in scopes.into_iter().rev() {
            caught = pollster::block_on(scope.pop()).or(caught);
        }
        match caught {
            None => Ok(value),
            Some(wgpu::Error::OutOfMemory { .. }) => Err(Error::OutOfMemory {
                what: what(),
                bytes,
            }),
            Some(error) if self.is_gone() => Err(Error::DeviceLost {
                reason: error.to_string(),
            }),
            Some(error) => Err(Error::Validation {
                what: what(),
                reason: error.to_string(),
            }),
        }
    }

    /// Whether the device is lost, also before its callback has run, which comes only after all work is done. Until then wgpu makes
    /// resources without an error, and says that they are invalid when they are used.
    fn is_gone(&self) -> bool {
        let memory = self.device.push_error_scope(ErrorFilter::OutOfMemory);
        let validation = self.device.push_error_scope(ErrorFilter::Validation);
        let buffer = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("probe"),
            size: wgpu::COPY_BUFFER_ALIGNMENT,
            usage: wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        self.queue.write_buffer(&buffer, 0, &[0; 4]);
        let invalid = pollster::block_on(validation.pop()).is_some();
        let exhausted = pollster::block_on(memory.pop()).is_some();
        invalid && !exhausted
    }

    /// As [`Context::run`], for a call that takes memory of the device. Tests make it fail.
    pub(super) fn allocate<T>(
        &self,
        what: impl FnOnce() -> String,
        bytes: u64,
        call: impl FnOnce() -> T,
    ) -> Result<T> {
        #[cfg(test)]
        if self.refusals.next() {
            let what = what();
            return Err(Error::OutOfMemory { what, bytes });
        }
        self.run(what, bytes, call)
    }

    /// Fails between the parts of a long run, which nothing may come between.
    pub(super) fn check_whole(&self, what: impl FnOnce() -> String) -> Result<()> {
        if !self.parted.load(Ordering::Relaxed) {
            return Ok(());
        }
        Err(Error::Validation {
            what: what(),
            reason: "a callback cannot submit work between the parts of a long run".to_owned(),
        })
    }

    /// Encodes work and hands it to the device. `encode` returns the number of dispatches.
    ///
    /// `ready` runs just before the submission, and `done` after it. Between the two, callbacks of the caller may run and call this crate
    /// again. If one panics, `done` never runs.
    pub(super) fn submit<T>(
        &self,
        label: &str,
        encode: impl FnOnce(&mut CommandEncoder) -> u64,
        ready: impl FnOnce(),
        done: impl FnOnce(SubmissionIndex) -> T,
    ) -> Result<T> {
        let _gate = self.gate();
        let what = || format!("submitting {label:?}");
        self.check_whole(what)?;
        self.run(what, 0, || {
            let label = Some(label);
            let descriptor = wgpu::CommandEncoderDescriptor { label };
            let mut encoder = self.device.create_command_encoder(&descriptor);
            let dispatches = encode(&mut encoder);
            let commands = encoder.finish();
            ready();
            self.submissions.fetch_add(1, Ordering::Relaxed);
            self.dispatches.fetch_add(dispatches, Ordering::Relaxed);
            done(self.queue.submit([commands]))
        })
    }

    /// Submits what is encoded so far and begins another submission. Callbacks of the caller may run here, but cannot submit anything
    /// before the other parts of the run. A panic of a callback is kept until the whole run is submitted.
    pub(super) fn submit_part(&self, label: &str, encoder: &mut CommandEncoder) {
        struct Parted<'a>(&'a AtomicBool);
        impl Drop for Parted<'_> {
            fn drop(&mut self) {
                self.0.store(false, Ordering::Relaxed);
            }
        }
        let label = Some(label);
        let descriptor = wgpu::CommandEncoderDescriptor { label };
        let next = self.device.create_command_encoder(&descriptor);
        let part = std::mem::replace(encoder, next).finish();
        self.parted.store(true, Ordering::Relaxed);
        let _parted = Parted(&self.parted);
        self.submissions.fetch_add(1, Ordering::Relaxed);
        let submitted = catch_unwind(AssertUnwindSafe(|| self.queue.submit([part])));
        if let Err(panic) = submitted {
            lock(&self.panics).push(panic);
        }
    }

    /// Waits for a submission, or without an index for all submissions so far.
    pub(super) fn wait(&self, submission_index: Option<SubmissionIndex>) -> Result<()> {
        self.poll(PollType::Wait {
            submission_index,
            timeout: None,
        })
    }

    /// Polls wgpu, which runs callbacks. Waits if `kind` says so.
    pub(super) fn poll(&self, kind: PollType) -> Result<()> {
        let earlier = lock(&self.panics).pop();
        if let Some(panic) = earlier {
            resume_unwind(panic);
        }
        self.drive(kind)
    }

    /// As [`Context::wait`], on a thread of this crate. If a callback panics, the panic is kept for a thread of the caller.
    pub(super) fn wait_behind(&self, index: SubmissionIndex) -> Result<()> {
        let kind = PollType::Wait {
            submission_index: Some(index),
            timeout: None,
        };
        catch_unwind(AssertUnwindSafe(|| self.drive(kind))).unwrap_or_else(|panic| {
            lock(&self.panics).push(panic);
            self.check()
        })
    }

    fn drive(&self, kind: PollType) -> Result<()> {
        let polled = catch_unwind(AssertUnwindSafe(|| self.device.poll(kind)));
        match polled {
            Err(panic) if !is_of_wgpu(&*panic) => resume_unwind(panic),
            Ok(Ok(_)) => self.check(),
            Ok(Err(error)) => self.check().and_then(|()| {
                Err(Error::DeviceLost {
                    reason: error.to_string(),
                })
            }),
            Err(_) => {
                let reason = "the driver failed while waiting";
                let _ = self.faults.lost.set(reason.to_owned());
                self.check()
            }
        }
    }
}

/// Whether wgpu itself panicked: it does so, with this text, when the driver reports a loss during a poll. Every other panic is that of a
/// callback. wgpu holds no lock and no half-made state then, so unwinding is safe.
fn is_of_wgpu(panic: &(dyn Any + Send)) -> bool {
    let text = panic.downcast_ref::<String>();
    text.is_some_and(|text| text.starts_with("Error in Device::poll"))
}

/// Why mapped memory cannot be read or written. Only the loss of the device destroys a buffer of this crate, and a thread may lose it while
/// another one has the memory mapped.
pub(super) fn inaccessible(what: &str, error: &dyn std::fmt::Display) -> Error {
    let reason = error.to_string();
    match reason.contains("destroyed") {
        true => Error::DeviceLost { reason },
        false => Error::Validation {
            what: what.to_owned(),
            reason,
        },
    }
}

/// Fails when `needed` is above `available`, the device's limit named `limit`.
pub(super) fn within(
    what: impl FnOnce() -> String,
    limit: &'static str,
    needed: u64,
    available: u64,
) -> Result<()> {
    if needed > available {
        return Err(Error::Limit {
            what: what(),
            limit,
            needed,
            available,
        });
    }
    Ok(())
}
