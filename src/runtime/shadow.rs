//! Shadows: f16 copies of parameters that the session keeps, so that no run casts a weight that has not changed.
//!
//! A block of parameters has one shadow, element for element. The optimizer step of a graph that reads a shadow writes it in the
//! same pass. Every other write to a parameter outdates the shadow of its block; the next run that reads it copies the block
//! first. Versions decide, while the device's gate is held from the question to the submission: no run can see an outdated copy.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::dispatch::Dispatch;
use crate::error::Result;
use crate::gpu::{Buffer, Gpu};

/// The shadow of one block.
#[derive(Debug, Default)]
struct Shadow {
    buffer: Option<Buffer>,
    /// Number of the last write to the parameters that did not write the shadow, too.
    written: u64,
    /// The write that the shadow shows.
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

/// The shadows of a session.
#[derive(Debug, Default)]
pub(crate) struct Shadows(Mutex<State>);

impl Shadows {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a block whose shadow does not exist yet.
    pub fn add_block(&self) {
        self.lock().blocks.push(Shadow {
            written: 1,
            ..Shadow::default()
        });
    }

    /// The shadow of a block of `bytes`, allocated when first asked for.
    pub fn buffer(&self, gpu: &Gpu, block: usize, bytes: u64) -> Result<Buffer> {
        if let Some(buffer) = &self.lock().blocks[block].buffer {
            return Ok(buffer.clone());
        }
        // Without the lock: callbacks of the caller may run in here.
        let buffer = gpu.zeroed_buffer(bytes / 2, "f16 shadows")?;
        let shadow = &mut self.lock().blocks[block];
        Ok(shadow.buffer.get_or_insert(buffer).clone())
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
    pub reads: Vec<(usize, Dispatch)>,
    /// Blocks whose parameters are updated, but not their shadows.
    pub outdates: Vec<usize>,
}

/// All of it is called by who holds the gate, see [`Gpu::gate`], from the first question to the submission.
impl ShadowUse {
    /// Copies to make before anything else of the run.
    pub fn refreshes(&self) -> impl Iterator<Item = &Dispatch> {
        let reads = self.reads.iter();
        reads.filter_map(|(block, dispatch)| {
            let outdated = self.shadows.lock().blocks[*block].is_outdated();
            outdated.then_some(dispatch)
        })
    }

    /// `sent`: the run is about to be submitted, and runs after it find the shadows as it leaves them. Otherwise it failed after all.
    pub fn note(&self, sent: bool) {
        let mut state = self.shadows.lock();
        if !sent {
            for (block, _) in &self.reads {
                state.blocks[*block].written += 1;
            }
            return;
        }
        for (block, _) in &self.reads {
            let shadow = &mut state.blocks[*block];
            let outdated = shadow.is_outdated();
            shadow.shown = shadow.written;
            state.refreshes += u64::from(outdated);
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
