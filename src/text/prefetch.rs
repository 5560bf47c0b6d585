//! Threads that prepare batches ahead of the one who uses them.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use super::batches::Batch;
use crate::error::{Error, Result};

/// Batches that are ready or being made at most.
const AHEAD: usize = 6;

/// Threads at most. One is enough for samples in memory; reading from a disk gains from more.
const THREADS: usize = 4;

/// Batches of consecutive numbers, in order. Dropping it ends the threads and waits for them.
#[derive(Debug)]
pub(super) struct Prefetch {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// The next number to be given out.
    wanted: usize,
    /// The next number to be made.
    next: usize,
    end: usize,
    ready: BTreeMap<usize, Result<Batch>>,
    /// To be filled again.
    spare: Vec<Batch>,
    /// Threads that have not ended.
    running: usize,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts a thread that ends. If it panics, the batch that it was making will not come, and the others end as well.
struct Running(Arc<Shared>);

impl Drop for Running {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.running -= 1;
        if thread::panicking() {
            state.end = 0;
        }
        drop(state);
        self.0.changed.notify_all();
    }
}

impl Prefetch {
    /// Starts threads that make the batches of these numbers. `like` has the shape of a batch; each thread gets a `maker` of its own.
    ///
    /// # Errors
    /// If the system starts no thread.
    pub fn spawn<M>(numbers: Range<usize>, like: &Batch, maker: impl Fn() -> M) -> io::Result<Self>
    where
        M: FnMut(usize, &mut Batch) -> Result<()> + Send + 'static,
    {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Self::with_threads((cores / 4).clamp(1, THREADS), numbers, like, maker)
    }

    fn with_threads<M>(
        threads: usize,
        numbers: Range<usize>,
        like: &Batch,
        maker: impl Fn() -> M,
    ) -> io::Result<Self>
    where
        M: FnMut(usize, &mut Batch) -> Result<()> + Send + 'static,
    {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                wanted: numbers.start,
                next: numbers.start,
                end: numbers.end,
                ready: BTreeMap::new(),
                spare: Vec::with_capacity(AHEAD + 1),
                running: 0,
            }),
            changed: Condvar::new(),
        });
        let mut prefetch = Self {
            shared,
            threads: Vec::new(),
        };
        for _ in 0..threads.min(numbers.len()) {
            let (like, make) = (like.clone(), maker());
            prefetch.shared.lock().running += 1;
            let running = Running(Arc::clone(&prefetch.shared));
            let builder = thread::Builder::new().name("energyflow batches".into());
            match builder.spawn(move || work(&running.0, &like, make)) {
                Ok(thread) => prefetch.threads.push(thread),
                // Fewer do as well.
                Err(_) if !prefetch.threads.is_empty() => break,
                Err(error) => return Err(error),
            }
        }
        Ok(prefetch)
    }

    /// Puts the next batch in the place of one that is no longer used.
    ///
    /// # Errors
    /// Those of making it, after which there are no more.
    pub fn next(&self, batch: &mut Batch) -> Result<()> {
        let mut state = self.shared.lock();
        let number = state.wanted;
        while !state.ready.contains_key(&number) && state.running > 0 {
            state = wait(&self.shared, state);
        }
        let next = state.ready.remove(&number).unwrap_or_else(|| {
            // Reached if a thread panicked, or if more are asked for than there are.
            Err(Error::Data {
                name: "batch".into(),
                reason: "the thread that prepares batches has ended".into(),
            })
        })?;
        state.wanted += 1;
        state.spare.push(std::mem::replace(batch, next));
        drop(state);
        self.shared.changed.notify_all();
        Ok(())
    }
}

/// Makes batches until there are no more to make. After an error no later number is begun.
fn work(shared: &Shared, like: &Batch, mut make: impl FnMut(usize, &mut Batch) -> Result<()>) {
    loop {
        let (number, spare) = {
            let mut state = shared.lock();
            while state.next < state.end && state.next >= state.wanted + AHEAD {
                state = wait(shared, state);
            }
            if state.next >= state.end {
                return;
            }
            state.next += 1;
            (state.next - 1, state.spare.pop())
        };
        let mut batch = spare.unwrap_or_else(|| like.clone());
        let made = make(number, &mut batch).map(|()| batch);
        let mut state = shared.lock();
        if made.is_err() {
            state.end = state.end.min(number);
        }
        state.ready.insert(number, made);
        drop(state);
        shared.changed.notify_all();
    }
}

fn wait<'a>(shared: &Shared, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
    let waited = shared.changed.wait(state);
    waited.unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        self.shared.lock().end = 0;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
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
        // Later ones are ready first.
        std::thread::sleep(Duration::from_micros(500 * (7 - number as u64 % 7)));
        match number {
            30..40 => Err(Error::Graph(format!("number {number}"))),
            _ => {
                batch.samples[0] = number;
                Ok(())
            }
        }
    }

    #[test]
    fn batches_and_errors_come_in_order() {
        for threads in 1..=THREADS {
            let mut batch = empty();
            let prefetch = Prefetch::with_threads(threads, 5..40, &batch, || number).unwrap();
            for expected in 5..30 {
                prefetch.next(&mut batch).unwrap();
                assert_eq!(batch.samples, [expected]);
            }
            for word in ["number 30", "has ended", "has ended"] {
                let error = prefetch.next(&mut batch).unwrap_err();
                assert!(error.to_string().contains(word), "{error}");
                assert_eq!(batch.samples, [29], "stays as it was");
            }
        }
    }

    #[test]
    fn few_batches_are_made_ahead_and_dropping_ends_the_threads() {
        let made = Arc::new(AtomicUsize::new(0));
        let maker = || {
            let made = Arc::clone(&made);
            move |_, _: &mut Batch| {
                made.fetch_add(1, Ordering::SeqCst);
                Ok(())
            }
        };
        let mut batch = empty();
        let prefetch = Prefetch::with_threads(3, 0..usize::MAX, &batch, maker).unwrap();
        for _ in 0..10 {
            prefetch.next(&mut batch).unwrap();
        }
        std::thread::sleep(Duration::from_millis(50));
        assert!(made.load(Ordering::SeqCst) <= 10 + AHEAD);
        drop(prefetch);
        // The threads and what they owned are gone.
        assert_eq!(Arc::strong_count(&made), 1);
    }

    #[test]
    fn a_panic_of_a_thread_is_an_error_and_not_a_hang() {
        let mut batch = empty();
        let maker = || {
            |number, _: &mut Batch| match number {
                2 => panic!("as the test wants"),
                _ => Ok(()),
            }
        };
        let prefetch = Prefetch::with_threads(2, 0..100, &batch, maker).unwrap();
        prefetch.next(&mut batch).unwrap();
        prefetch.next(&mut batch).unwrap();
        let error = prefetch.next(&mut batch).unwrap_err();
        assert!(error.to_string().contains("has ended"), "{error}");
    }
}
