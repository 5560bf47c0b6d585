//! The re-entrant lock on the order of submissions: a thread that holds it may take it again.
//!
//! wgpu runs callbacks of the caller at the end of `Queue::submit`, on the thread that submits. At that point this crate still keeps other
//! threads from submitting. A callback may call this crate again: its own thread holds the lock then, and everything that the lock protects
//! is already in the state after the submission.

use std::marker::PhantomData;
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread::{self, ThreadId};

use super::lock::lock;

#[derive(Debug, Default)]
struct State {
    holder: Option<ThreadId>,
    depth: usize,
}

/// A re-entrant lock.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    state: Mutex<State>,
    free: Condvar,
}

impl Gate {
    /// Blocks while another thread holds the lock.
    pub(crate) fn enter(&self) -> Passage<'_> {
        let this = thread::current().id();
        let mut state = lock(&self.state);
        while state.holder.is_some_and(|holder| holder != this) {
            state = self
                .free
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.holder = Some(this);
        state.depth += 1;
        Passage {
            gate: self,
            _not_send: PhantomData,
        }
    }

    /// As [`Gate::enter`], or `None` if this thread holds the lock already.
    pub(crate) fn enter_once(&self) -> Option<Passage<'_>> {
        let this = thread::current().id();
        let held = lock(&self.state).holder == Some(this);
        (!held).then(|| self.enter())
    }
}

/// Holds the lock until it is dropped, on the thread that took it.
#[derive(Debug)]
#[must_use]
pub(crate) struct Passage<'a> {
    gate: &'a Gate,
    _not_send: PhantomData<*const ()>,
}

impl Drop for Passage<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.gate.state);
        state.depth -= 1;
        if state.depth == 0 {
            state.holder = None;
            drop(state);
            self.gate.free.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::Gate;

    #[test]
    fn one_thread_enters_twice_and_others_wait() {
        let (gate, inside) = (Gate::default(), AtomicUsize::new(0));
        thread_scope(8, || {
            for _ in 0..200 {
                let outer = gate.enter();
                let inner = gate.enter();
                assert!(gate.enter_once().is_none());
                assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                drop(outer);
                std::thread::yield_now();
                assert_eq!(inside.fetch_sub(1, Ordering::SeqCst), 1);
                drop(inner);
            }
        });
    }

    fn thread_scope(threads: usize, work: impl Fn() + Sync) {
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(&work);
            }
        });
    }
}
