//! A thread that prepares batches ahead of the one who uses them.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::batches::Batch;
use crate::error::{Error, Result};

/// Batches that are ready at most, besides the one that is being made.
const AHEAD: usize = 4;

/// Batches of consecutive numbers, in order. Dropping it ends the thread and waits for it.
#[derive(Debug)]
pub(super) struct Prefetch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    ready: VecDeque<Result<Batch>>,
    /// To be filled again.
    spare: Vec<Batch>,
    /// Nobody wants more.
    stop: bool,
    /// Nobody makes more.
    ended: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says that the thread has ended, also if it panics.
struct End(Arc<Shared>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.changed.notify_all();
    }
}

impl Prefetch {
    /// Starts a thread that makes the batches of these numbers up to the first error. `like` has the shape of a batch.
    ///
    /// # Errors
    /// If the system starts no thread.
    pub fn spawn(
        numbers: Range<usize>,
        like: &Batch,
        mut make: impl FnMut(usize, &mut Batch) -> Result<()> + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                ready: VecDeque::with_capacity(AHEAD),
                spare: Vec::with_capacity(AHEAD + 1),
                stop: false,
                ended: false,
            }),
            changed: Condvar::new(),
        });
        let (end, like) = (End(Arc::clone(&shared)), like.clone());
        let thread = std::thread::Builder::new().name("energyflow batches".into());
        let thread = thread.spawn(move || {
            let shared = &end.0;
            for number in numbers {
                let spare = {
                    let mut state = shared.lock();
                    while state.ready.len() == AHEAD && !state.stop {
                        state = wait(shared, state);
                    }
                    if state.stop {
                        return;
                    }
                    state.spare.pop()
                };
                let mut batch = spare.unwrap_or_else(|| like.clone());
                let made = make(number, &mut batch).map(|()| batch);
                let failed = made.is_err();
                shared.lock().ready.push_back(made);
                shared.changed.notify_all();
                if failed {
                    return;
                }
            }
        })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Puts the next batch in the place of one that is no longer used.
    ///
    /// # Errors
    /// Those of making it, after which there are no more.
    pub fn next(&self, batch: &mut Batch) -> Result<()> {
        let mut state = self.shared.lock();
        while state.ready.is_empty() && !state.ended {
            state = wait(&self.shared, state);
        }
        let next = state.ready.pop_front().unwrap_or_else(|| {
            // Reached if the thread panicked, or if more are asked for than there are.
            Err(Error::Data {
                name: "batch".into(),
                reason: "the thread that prepares batches has ended".into(),
            })
        })?;
        state.spare.push(std::mem::replace(batch, next));
        drop(state);
        self.shared.changed.notify_all();
        Ok(())
    }
}

fn wait<'a>(shared: &Shared, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
    let waited = shared.changed.wait(state);
    waited.unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic was reported by the panic hook.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;

    fn empty() -> Batch {
        Batch {
            ids: vec![0],
            mask: vec![0.0],
            targets: vec![0.0],
            samples: vec![0],
            valid: 0,
        }
    }

    fn number(number: usize, batch: &mut Batch) -> Result<()> {
        match number {
            30 => Err(Error::Graph("thirty".into())),
            _ => {
                batch.samples[0] = number;
                Ok(())
            }
        }
    }

    #[test]
    fn batches_and_errors_come_in_order() {
        let mut batch = empty();
        let prefetch = Prefetch::spawn(5..40, &batch, number).unwrap();
        for expected in 5..30 {
            prefetch.next(&mut batch).unwrap();
            assert_eq!(batch.samples, [expected]);
        }
        for word in ["thirty", "has ended", "has ended"] {
            let error = prefetch.next(&mut batch).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
            assert_eq!(batch.samples, [29], "stays as it was");
        }
    }

    #[test]
    fn few_batches_are_made_ahead_and_dropping_ends_the_thread() {
        let made = Arc::new(AtomicUsize::new(0));
        let counts = Arc::clone(&made);
        let make = move |_, _: &mut Batch| {
            counts.fetch_add(1, Ordering::SeqCst);
            Ok(())
        };
        let mut batch = empty();
        let prefetch = Prefetch::spawn(0..usize::MAX, &batch, make).unwrap();
        for _ in 0..10 {
            prefetch.next(&mut batch).unwrap();
        }
        std::thread::sleep(Duration::from_millis(50));
        assert!(made.load(Ordering::SeqCst) <= 10 + AHEAD + 1);
        drop(prefetch);
        // The thread and what it owned are gone.
        assert_eq!(Arc::strong_count(&made), 1);
    }

    #[test]
    fn a_panic_of_the_thread_is_an_error_and_not_a_hang() {
        let mut batch = empty();
        let make = |_, _: &mut Batch| panic!("as the test wants");
        let prefetch = Prefetch::spawn(0..3, &batch, make).unwrap();
        let error = prefetch.next(&mut batch).unwrap_err();
        assert!(error.to_string().contains("has ended"), "{error}");
    }
}
