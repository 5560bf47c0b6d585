//! Locks for short critical sections.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks a cache. Every critical section leaves its data valid, so a panic elsewhere does not spoil it.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
