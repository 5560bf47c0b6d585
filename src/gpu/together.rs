//! Kernels compiled by several threads: drivers take 0.1 s and more for one.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::pipelines::Pipeline;
use super::{Gpu, TrustedSource};
use crate::error::Result;

/// Most threads that compile: a driver takes memory for each.
const MOST: usize = 8;

impl Gpu {
    /// Compiles the kernels of this crate that are not in the cache. What it returns keeps them there; their keys must differ.
    ///
    /// A kernel that fails is left out: [`Gpu::trusted_pipeline`] compiles it again and reports it. The caller must ask for every kernel there.
    ///
    /// # Errors
    /// [`Error::DeviceLost`](crate::Error::DeviceLost).
    pub(crate) fn compile_together(
        &self,
        keys: &[String],
        source: impl Fn(usize) -> Result<TrustedSource> + Sync,
    ) -> Result<Vec<Arc<Pipeline>>> {
        let (context, pipelines) = (&self.0.context, &self.0.pipelines);
        let missing: Vec<usize> = (0..keys.len())
            .filter(|&i| !pipelines.has_trusted(&keys[i]))
            .collect();
        if missing.len() < 2 {
            return Ok(Vec::new());
        }
        let next = AtomicUsize::new(0);
        let work = || {
            let mut made = Vec::new();
            while let Some(&i) = missing.get(next.fetch_add(1, Ordering::Relaxed)) {
                made.extend(pipelines.make_trusted(context, &keys[i], || source(i)));
            }
            made
        };
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let others = cores.min(missing.len()).min(MOST) - 1;
        let made = thread::scope(|scope| {
            // Where there are no threads, this one does everything.
            let others: Vec<_> = (0..others)
                .filter_map(|_| thread::Builder::new().spawn_scoped(scope, work).ok())
                .collect();
            let mut made = work();
            for other in others {
                match other.join() {
                    Ok(more) => made.extend(more),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            made
        });
        context.settle()?;
        Ok(made)
    }
}
