//! Which of several kernels was found fastest, by description of the work.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use serde::{Deserialize, Serialize};

use super::device::Gpu;
use super::lock;
use super::store::Store;

/// Turns the tuner on where [`GpuOptions::autotune`](super::GpuOptions::autotune) is not called.
const VARIABLE: &str = "ENERGYFLOW_AUTOTUNE";

const KIND: &str = "tuning";

/// What was chosen, and what it took.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Choice {
    /// The candidate's name.
    pub candidate: String,
    /// GPU time of one run.
    pub nanoseconds: f64,
}

/// Counts of the tuner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TuningStats {
    /// Choices known, from earlier processes too.
    pub choices: u64,
    /// Choices that were known when they were needed.
    pub hits: u64,
    /// Choices made by measuring.
    pub measured: u64,
}

/// The choices of one device; it exists only while tuning is on.
#[derive(Debug, Default)]
pub(crate) struct Tuning {
    choices: Mutex<BTreeMap<String, Choice>>,
    hits: AtomicU64,
    measured: AtomicU64,
    measuring: Mutex<()>,
    warned: AtomicBool,
}

impl Tuning {
    /// `on`: the caller's choice, before the environment's.
    pub(super) fn new(on: Option<bool>, store: &Store) -> Option<Self> {
        let on = on.unwrap_or_else(|| std::env::var(VARIABLE).is_ok_and(|value| value == "1"));
        on.then(|| {
            let stored = store.load(KIND, |content| {
                serde_json::from_slice(content).map_err(|error| error.to_string())
            });
            Self {
                choices: Mutex::new(stored.unwrap_or_default()),
                ..Self::default()
            }
        })
    }

    pub(super) fn save(&self, store: &Store) {
        let choices = lock(&self.choices);
        if choices.is_empty() {
            return;
        }
        match serde_json::to_vec(&*choices) {
            Ok(content) => store.save(KIND, &content),
            Err(error) => log::warn!("the tuner's choices cannot be saved: {error}"),
        }
    }

    pub(super) fn stats(&self) -> TuningStats {
        TuningStats {
            choices: lock(&self.choices).len() as u64,
            hits: self.hits.load(Ordering::Relaxed),
            measured: self.measured.load(Ordering::Relaxed),
        }
    }

    /// The candidate stored under `key` if `accept` knows it; a name of another version is none.
    pub fn find<C>(&self, key: &str, accept: impl FnOnce(&str) -> Option<C>) -> Option<C> {
        let found = accept(&lock(&self.choices).get(key)?.candidate)?;
        self.hits.fetch_add(1, Ordering::Relaxed);
        Some(found)
    }

    pub fn record(&self, key: &str, choice: Choice) {
        self.measured.fetch_add(1, Ordering::Relaxed);
        lock(&self.choices).insert(key.to_owned(), choice);
    }

    /// Held while measuring: two measurements at once would disturb each other, and might choose twice for one key.
    pub fn measuring(&self) -> MutexGuard<'_, ()> {
        lock(&self.measuring)
    }

    /// Says once that there is nothing to measure with.
    pub fn warn_without_times(&self, reason: &str) {
        if !self.warned.swap(true, Ordering::Relaxed) {
            log::warn!("kernels are not tuned: {reason}");
        }
    }
}

impl Gpu {
    /// The tuner's choices; `None` while tuning is off.
    pub(crate) fn tuning(&self) -> Option<&Tuning> {
        self.0.tuning.as_ref()
    }
}
