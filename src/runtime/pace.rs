//! How long a run takes, and where it is cut into several submissions.
//!
//! Desktop systems end a submission that keeps the GPU busy for about two seconds, and with it the device. A run that takes longer than a
//! bound is therefore submitted in several pieces, in order, which compute the same.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::bound::BoundKernel;
use crate::kernels::Target;

/// Floating-point operations per second and core, and bytes per second and core: what slower GPUs reach with kernels that are not tuned
/// for them. Too low a rate costs a submission too many in the first run.
const FLOPS: f64 = 5e10;
const BYTES: f64 = 5e9;
/// Seconds of a dispatch that does nothing.
const LEAST: f64 = 2e-6;

/// Estimated and measured time of one executable's runs.
#[derive(Debug)]
pub(crate) struct Pace {
    /// Most seconds of a submission; nothing where runs are not cut.
    most: Option<f64>,
    cores: f64,
    /// Seconds of a run as estimated.
    estimate: f64,
    /// Bits of the shortest time of a run that was measured, in seconds; infinite before.
    measured: AtomicU64,
}

impl Pace {
    pub fn new(most: Option<Duration>, target: Target, dispatches: &[BoundKernel]) -> Self {
        let mut pace = Self {
            most: most.map(|most| most.as_secs_f64()),
            cores: target.cores as f64,
            estimate: 0.0,
            measured: AtomicU64::new(f64::INFINITY.to_bits()),
        };
        pace.estimate = dispatches
            .iter()
            .map(|dispatch| pace.seconds(dispatch))
            .sum();
        pace
    }

    /// Estimated time of a dispatch.
    fn seconds(&self, dispatch: &BoundKernel) -> f64 {
        let cost = &dispatch.cost;
        LEAST + (cost.flops / FLOPS).max(cost.bytes / BYTES) / self.cores
    }

    /// A run took at most so long. Waiting for other work or for the caller may be part of it, so the shortest time is the best.
    pub fn note(&self, took: Duration) {
        // Positive floats are ordered as their bits are.
        let bits = took.as_secs_f64().to_bits();
        self.measured.fetch_min(bits, Ordering::Relaxed);
    }

    /// By how much estimates are wrong.
    fn factor(&self) -> f64 {
        let measured = f64::from_bits(self.measured.load(Ordering::Relaxed));
        match measured.is_finite() && self.estimate > 0.0 {
            true => measured / self.estimate,
            false => 1.0,
        }
    }

    /// Dispatches, and whether a new submission begins before each.
    pub fn cut<'a>(
        &self,
        dispatches: impl Iterator<Item = &'a BoundKernel>,
    ) -> impl Iterator<Item = (&'a BoundKernel, bool)> {
        let factor = self.factor();
        let mut spent = 0.0;
        dispatches.map(move |dispatch| {
            let seconds = factor * self.seconds(dispatch);
            let full = self.most.is_some_and(|most| spent + seconds > most);
            let cut = full && spent > 0.0;
            spent = if cut { seconds } else { spent + seconds };
            (dispatch, cut)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shortest_time_corrects_the_estimate() {
        let target = Target {
            matrix_units: None,
            invocations: 256,
            cores: 2,
            f16: false,
            barrier_free: false,
        };
        let mut pace = Pace::new(None, target, &[]);
        assert_eq!(pace.factor(), 1.0);
        pace.estimate = 0.5;
        assert_eq!(pace.factor(), 1.0);
        pace.note(Duration::from_secs(4));
        assert_eq!(pace.factor(), 8.0);
        pace.note(Duration::from_secs(1));
        pace.note(Duration::from_secs(3));
        assert_eq!(pace.factor(), 2.0);
    }
}
