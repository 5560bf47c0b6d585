//! The state of a buffer's mapping, and a thread that waits for the device on behalf of tasks.

use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::task::Waker;

use super::context::Context;
use super::lock::lock;

#[derive(Debug, Default)]
enum Mapping {
    /// Never requested, or unmapped since.
    #[default]
    Idle,
    Waiting,
    Done(Result<(), String>),
}

#[derive(Debug, Default)]
struct Progress {
    mapping: Mapping,
    /// Counts mappings, so that a late callback of an earlier one is recognised.
    round: u64,
    waker: Option<Waker>,
}

/// Whether a buffer is mapped. The callback that wgpu runs after mapping shares this state. It does not own the buffer; the buffer owns it.
///
/// Nothing waits for the callback, because a callback of the caller that runs before it may take long, call this crate, or panic. The buffer
/// is mapped once a poll has returned that waited for the work before the mapping, see [`Arrival::expect`].
#[derive(Debug, Default)]
pub(super) struct Arrival(Mutex<Progress>);

impl Arrival {
    /// The state of a buffer that is mapped already.
    pub(super) fn arrived() -> Self {
        let mapping = Mapping::Done(Ok(()));
        Self(Mutex::new(Progress {
            mapping,
            ..Progress::default()
        }))
    }

    fn set(&self, round: u64, mapped: Result<(), String>) {
        let mut progress = lock(&self.0);
        if progress.round != round || !matches!(progress.mapping, Mapping::Waiting) {
            return;
        }
        progress.mapping = Mapping::Done(mapped);
        let waker = progress.waker.take();
        drop(progress);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Number of the mapping that is in progress, if there is one.
    pub(super) fn awaited(&self) -> Option<u64> {
        let progress = lock(&self.0);
        matches!(progress.mapping, Mapping::Waiting).then_some(progress.round)
    }

    /// Called when the device has finished the work before this mapping and was polled since.
    pub(super) fn expect(&self, round: u64) {
        self.set(round, Ok(()));
    }

    /// `None` while the device works, and before [`Arrival::map`].
    pub(super) fn get(&self) -> Option<Result<(), String>> {
        match &lock(&self.0).mapping {
            Mapping::Done(mapped) => Some(mapped.clone()),
            Mapping::Idle | Mapping::Waiting => None,
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        matches!(lock(&self.0).mapping, Mapping::Idle)
    }

    pub(super) fn wake(&self, waker: Waker) {
        lock(&self.0).waker = Some(waker);
    }

    /// Unmaps the buffer, or takes the request back if it is not mapped yet.
    pub(super) fn unmap(&self, buffer: &wgpu::Buffer) {
        let mut progress = lock(&self.0);
        let mapping = std::mem::take(&mut progress.mapping);
        progress.round += 1;
        progress.waker = None;
        // wgpu may run the callback, which locks.
        drop(progress);
        if matches!(mapping, Mapping::Waiting | Mapping::Done(Ok(()))) {
            buffer.unmap();
        }
    }

    /// Maps the first bytes of a buffer, which is not mapped, once the work submitted so far is done.
    pub(super) fn map(self: &Arc<Self>, buffer: &wgpu::Buffer, mode: wgpu::MapMode, bytes: u64) {
        let mut progress = lock(&self.0);
        progress.mapping = Mapping::Waiting;
        progress.round += 1;
        progress.waker = None;
        let signal = Signal {
            arrival: Arc::clone(self),
            round: progress.round,
        };
        drop(progress);
        buffer.map_async(mode, 0..bytes, move |mapped| {
            let signal = signal;
            let mapped = mapped.map_err(|error| error.to_string());
            signal.arrival.set(signal.round, mapped);
        });
    }

    /// There is nothing to map.
    pub(super) fn skip(&self) {
        lock(&self.0).mapping = Mapping::Done(Ok(()));
    }
}

struct Signal {
    arrival: Arc<Arrival>,
    round: u64,
}

/// wgpu drops a callback without a call if a callback of the caller panics before it. The buffer is mapped then, if mapping succeeded.
impl Drop for Signal {
    fn drop(&mut self) {
        self.arrival.set(self.round, Ok(()));
    }
}

/// A submission that a task waits for.
pub(super) struct Watch {
    pub(super) until: wgpu::SubmissionIndex,
    pub(super) arrival: Arc<Arrival>,
    pub(super) round: u64,
}

/// A thread that waits for the device on behalf of all tasks. The first `.await` that finds results missing starts it.
///
/// wgpu runs callbacks only while some thread polls, and an executor's threads must not block.
#[derive(Debug, Default)]
pub(super) struct Waiter(OnceLock<Option<mpsc::Sender<Watch>>>);

impl Waiter {
    pub(super) fn watch(&self, context: &Arc<Context>, watch: Watch) {
        let sender = self.0.get_or_init(|| {
            let (sender, receiver) = mpsc::channel::<Watch>();
            let context = Arc::clone(context);
            std::thread::Builder::new()
                .name("energyflow-waiter".to_owned())
                .spawn(move || receiver.iter().for_each(|watch| watch.run(&context)))
                .ok()
                .map(|_| sender)
        });
        match sender {
            Some(sender) => {
                // The thread outlives the sender, so the channel is open.
                let _ = sender.send(watch);
            }
            // Without threads, blocking here is what is left.
            None => watch.run(context),
        }
    }
}

impl Watch {
    fn run(self, context: &Context) {
        let waited = context.wait_behind(self.until);
        let result = waited.map_err(|error| error.to_string());
        self.arrival.set(self.round, result);
    }
}
