//! A report on a device: its capabilities, and counts of what was done with it.

use std::fmt;
use std::sync::atomic::Ordering;

use super::bindings::{self, BindGroupStats};
use super::capabilities::Capabilities;
use super::device::Gpu;
use super::pipelines::PipelineStats;
use super::pool::PoolStats;
use super::store::CacheStats;
use super::tuning::{Tuning, TuningStats};

/// A snapshot of a device's capabilities and of the counts of everything that was done with it. It is made to be printed.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Report {
    /// What the device can do.
    pub capabilities: Capabilities,
    /// Buffers.
    pub pool: PoolStats,
    /// Compiled kernels.
    pub pipelines: PipelineStats,
    /// Bindings of buffers to kernels.
    pub bind_groups: BindGroupStats,
    /// Files kept between processes.
    pub caches: CacheStats,
    /// The tuner; `None` while it is off.
    pub tuning: Option<TuningStats>,
    /// Host-visible buffers made, for uploads and results.
    pub staging_buffers: u64,
    /// Submissions so far.
    pub submissions: u64,
    /// Dispatches in these submissions.
    pub dispatches: u64,
    /// Errors of the device that belong to no call of this crate; they are in the log.
    pub uncaptured_errors: u64,
}

impl Gpu {
    /// Capabilities and statistics at this moment.
    #[must_use]
    pub fn report(&self) -> Report {
        Report {
            capabilities: self.capabilities().clone(),
            pool: self.0.pool.stats(),
            pipelines: self.0.pipelines.stats(),
            bind_groups: bindings::stats(&self.0.pool),
            caches: self.0.store.stats(),
            tuning: self.tuning().map(Tuning::stats),
            staging_buffers: self.0.staging.made(),
            submissions: self.context().submissions.load(Ordering::Relaxed),
            dispatches: self.context().dispatches.load(Ordering::Relaxed),
            uncaptured_errors: self.context().uncaptured(),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.capabilities)?;
        let PoolStats {
            allocated_bytes,
            in_use_bytes,
            peak_bytes,
            hits,
            misses,
        } = self.pool;
        writeln!(
            f,
            "pool         {allocated_bytes} B allocated, {in_use_bytes} B in use, {peak_bytes} B at peak, {hits} hits, {misses} misses"
        )?;
        let PipelineStats {
            hits,
            misses,
            cached,
            evicted,
            compile_time,
        } = self.pipelines;
        writeln!(
            f,
            "pipelines    {hits} hits, {misses} misses, {cached} cached, {evicted} evicted, {compile_time:.1?} compiling"
        )?;
        let BindGroupStats {
            hits,
            misses,
            cached,
            evicted,
        } = self.bind_groups;
        writeln!(
            f,
            "bind groups  {hits} hits, {misses} misses, {cached} cached, {evicted} evicted"
        )?;
        let CacheStats {
            loaded_bytes,
            saved,
            ignored,
        } = self.caches;
        writeln!(
            f,
            "cache files  {loaded_bytes} B loaded, {saved} saved, {ignored} ignored"
        )?;
        match self.tuning {
            Some(TuningStats {
                choices,
                hits,
                measured,
            }) => writeln!(
                f,
                "tuning       {choices} choices, {hits} hits, {measured} measured"
            )?,
            None => writeln!(f, "tuning       off")?,
        }
        write!(
            f,
            "work         {} submissions, {} dispatches, {} staging buffers, {} uncaptured errors",
            self.submissions, self.dispatches, self.staging_buffers, self.uncaptured_errors
        )
    }
}
