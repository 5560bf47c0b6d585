//! The device behind error scopes: the one way in which wgpu's failures become [`Error`]s.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use wgpu::{ErrorFilter, PollType};

use crate::error::{Error, Result};

/// What the device's callbacks reported.
#[derive(Debug, Default)]
struct Faults {
    lost: OnceLock<String>,
    uncaptured: AtomicU64,
}

/// Device and queue; every call on them that can fail goes through [`Guard::run`] or [`Guard::poll`].
#[derive(Debug)]
pub(super) struct Guard {
    pub(super) device: wgpu::Device,
    pub(super) queue: wgpu::Queue,
    faults: Arc<Faults>,
}

impl Guard {
    /// `owned`: the device was opened by this crate, so its uncaptured errors are this crate's to handle.
    pub(super) fn new(device: wgpu::Device, queue: wgpu::Queue, owned: bool) -> Self {
        let faults = Arc::new(Faults::default());
        let lost = Arc::clone(&faults);
        device.set_device_lost_callback(move |cause, message| {
            log::error!("GPU device lost ({cause:?}): {message}");
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
            faults,
        }
    }

    /// Errors that no scope caught.
    pub(super) fn uncaptured(&self) -> u64 {
        self.faults.uncaptured.load(Ordering::Relaxed)
    }

    /// Fails once the device is lost.
    pub(super) fn check(&self) -> Result<()> {
        match self.faults.lost.get() {
            Some(reason) => Err(Error::DeviceLost {
                reason: reason.clone(),
            }),
            None => Ok(()),
        }
    }

    /// Runs `call` under error scopes. `what` and `bytes` describe it in an error.
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
        // wgpu reports a loss through no scope, only through the callback, which a poll runs.
        self.poll(PollType::Poll)?;
        match caught {
            None => Ok(value),
            Some(wgpu::Error::OutOfMemory { .. }) => Err(Error::OutOfMemory {
                what: what(),
                bytes,
            }),
            Some(error) => Err(Error::Validation {
                what: what(),
                reason: error.to_string(),
            }),
        }
    }

    /// Lets wgpu make progress, run its callbacks, and, for a waiting `kind`, waits.
    pub(super) fn poll(&self, kind: PollType) -> Result<()> {
        // wgpu panics when the driver reports a loss during a poll. It holds no lock and no half-made state then, so
        // unwinding to here is safe.
        let polled = catch_unwind(AssertUnwindSafe(|| self.device.poll(kind)));
        self.check()?;
        match polled {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(Error::DeviceLost {
                reason: error.to_string(),
            }),
            Err(_) => {
                let reason = "the driver failed while waiting";
                let _ = self.faults.lost.set(reason.to_owned());
                Err(Error::DeviceLost {
                    reason: reason.to_owned(),
                })
            }
        }
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
