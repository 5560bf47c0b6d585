//! Shadows: f16 copies of parameters that the session keeps, so that no run casts a weight that has not changed.
//!
//! A block of parameters has one shadow, element for element. The optimizer step of a graph that reads a shadow writes it in the
//! same pass. Every other write to a parameter makes the shadow of its block stale; the next run that reads it copies the block
//! first. Versions decide, while the device's gate is held from the question to the submission: no run can see an outdated copy.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::bound::BoundKernel;
use crate::gpu::Gpu;

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
    pub fn write<T>(&self, gpu: &Gpu, block: usize, write: impl FnOnce() -> T) -> T {
        let _gate = gpu.gate();
        self.lock().blocks[block].written += 1;
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
    pub reads: Vec<(usize, BoundKernel)>,
    /// Blocks whose parameters are updated, but not their shadows.
    pub outdates: Vec<usize>,
}

/// All of it is called by who holds the gate, see [`Gpu::gate`], from the first question to the submission.
impl ShadowUse {
    /// Copies to make before anything else of the run.
    pub fn refreshes(&self) -> impl Iterator<Item = &BoundKernel> {
        let reads = self.reads.iter();
        reads.filter_map(|(block, dispatch)| {
            let outdated = self.shadows.lock().blocks[*block].is_outdated();
            outdated.then_some(dispatch)
        })
    }

    /// The [`refreshes`](Self::refreshes) are submitted, and nothing else of a run.
    pub fn refreshed(&self) {
        let mut state = self.shadows.lock();
        for (block, _) in &self.reads {
            let shadow = &mut state.blocks[*block];
            let outdated = shadow.is_outdated();
            shadow.shown = shadow.written;
            state.refreshes += u64::from(outdated);
        }
    }

    /// `sent`: the run is about to be submitted, and runs after it find the shadows as it leaves them. Otherwise it failed after all.
    pub fn note(&self, sent: bool) {
        if sent {
            self.refreshed();
        }
        let mut state = self.shadows.lock();
        if !sent {
            for (block, _) in &self.reads {
                state.blocks[*block].written += 1;
            }
            return;
        }
        for &block in &self.outdates {
            state.blocks[block].written += 1;
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
