//! Shadows: f16 copies of parameters that the session keeps, so that no run casts a weight that has not changed.
//!
//! A block of parameters has one shadow, element for element. The optimizer step of a graph that reads a shadow writes it in the
//! same pass. Every other write to a parameter outdates the shadow of its block; the next run that reads it copies the block
//! first. Versions decide, under one lock from the question to the submission: no run can see an outdated copy.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::dispatch::Dispatch;

/// Versions of the shadow of one block.
#[derive(Debug)]
struct Shadow {
    /// Number of the last parameter write that left the shadow stale.
    written: u64,
    /// Number of the write that the shadow shows.
    shown: u64,
}

impl Shadow {
    fn is_outdated(&self) -> bool {
        self.shown != self.written
    }
}

#[derive(Debug, Default)]
struct State {
    blocks: Vec<Shadow>,
    refreshes: u64,
}

/// The versions of a session's shadows, and the lock under which they are compared.
#[derive(Debug, Default)]
pub(crate) struct Shadows(Mutex<State>);

impl Shadows {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps versions of at least so many blocks. The shadow of a new block is outdated.
    pub fn reserve(&self, blocks: usize) {
        let known = &mut self.lock().blocks;
        while known.len() < blocks {
            known.push(Shadow {
                written: 1,
                shown: 0,
            });
        }
    }

    /// Writes to parameters of a block.
    pub fn write<T>(&self, block: usize, write: impl FnOnce() -> T) -> T {
        let mut state = self.lock();
        state.blocks[block].written += 1;
        write()
    }

    /// Blocks copied by a dispatch of their own so far.
    pub fn refreshes(&self) -> u64 {
        self.lock().refreshes
    }
}

/// What a run of one executable means for the shadows of its session.
pub(crate) struct ShadowUse {
    pub shadows: Arc<Shadows>,
    /// Blocks whose shadow is read, with the dispatch that copies the block.
    pub reads: Vec<(usize, Dispatch)>,
    /// Blocks whose parameters are updated, but not their shadows.
    pub outdates: Vec<usize>,
}

impl ShadowUse {
    /// Keeps other runs and writes away until the guard is dropped.
    pub fn begin(&self) -> ShadowGuard<'_> {
        let matters = !self.reads.is_empty() || !self.outdates.is_empty();
        ShadowGuard {
            state: matters.then(|| self.shadows.lock()),
            user: self,
        }
    }
}

impl fmt::Debug for ShadowUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reads: Vec<usize> = self.reads.iter().map(|(block, _)| *block).collect();
        f.debug_struct("ShadowUse")
            .field("reads", &reads)
            .field("outdates", &self.outdates)
            .finish_non_exhaustive()
    }
}

/// A run between the question which shadows are outdated and its submission.
#[must_use]
pub(crate) struct ShadowGuard<'a> {
    /// Not locked where the run has nothing to do with shadows.
    state: Option<MutexGuard<'a, State>>,
    user: &'a ShadowUse,
}

impl ShadowGuard<'_> {
    /// Copies to make before anything else of the run.
    pub fn refreshes(&self) -> impl Iterator<Item = &Dispatch> {
        let reads = self.state.iter().flat_map(|state| {
            let reads = self.user.reads.iter();
            reads.map(|(block, dispatch)| (&state.blocks[*block], dispatch))
        });
        reads.filter_map(|(shadow, dispatch)| shadow.is_outdated().then_some(dispatch))
    }

    /// The [`refreshes`](Self::refreshes) are submitted.
    pub fn refreshed(&mut self) {
        let Some(state) = self.state.as_deref_mut() else {
            return;
        };
        for (block, _) in &self.user.reads {
            let shadow = &mut state.blocks[*block];
            state.refreshes += u64::from(shadow.is_outdated());
            shadow.shown = shadow.written;
        }
    }

    /// The run is submitted.
    pub fn submitted(mut self) {
        self.refreshed();
        let Some(state) = self.state.as_deref_mut() else {
            return;
        };
        for &block in &self.user.outdates {
            state.blocks[block].written += 1;
        }
    }
}
