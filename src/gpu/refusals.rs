//! Allocations that fail on request, for tests.

use std::sync::Mutex;

use super::lock::lock;

/// The allocations that fail: by number, counted from when they were asked for.
#[derive(Debug, Default)]
pub(crate) struct Refusals {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    made: u64,
    refused: u64,
    failing: std::ops::Range<u64>,
}

impl Refusals {
    /// From now on, `granted` allocations succeed, the next `failing` fail, and those after succeed.
    pub(crate) fn set(&self, granted: u64, failing: u64) {
        *lock(&self.state) = State {
            made: 0,
            refused: 0,
            failing: granted..granted.saturating_add(failing),
        };
    }

    /// From now on all succeed. Returns how many have failed.
    pub(crate) fn end(&self) -> u64 {
        std::mem::take(&mut *lock(&self.state)).refused
    }

    /// Counts an allocation. Returns whether it fails.
    pub(super) fn next(&self) -> bool {
        let mut state = lock(&self.state);
        let fails = state.failing.contains(&state.made);
        state.made += 1;
        state.refused += u64::from(fails);
        fails
    }
}
