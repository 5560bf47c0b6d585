//! The tuner's choices: the kernel that was measured fastest, by a description of the work.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use super::lock::lock;
use super::store::Store;

const KIND: &str = "tuning";

/// A choice and its measured time.
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
    /// Number of known choices, including those of earlier processes.
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
    warned: AtomicBool,
}

impl Tuning {
    pub(super) fn new(on: bool, store: &Store) -> Option<Self> {
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

    /// The candidate stored under `key`, if `accept` knows its name. The name may come from another version of this crate.
    pub fn find<C>(&self, key: &str, accept: impl FnOnce(&str) -> Option<C>) -> Option<C> {
        let found = accept(&lock(&self.choices).get(key)?.candidate)?;
        self.hits.fetch_add(1, Ordering::Relaxed);
        Some(found)
    }

    pub fn record(&self, key: &str, choice: Choice) {
        self.measured.fetch_add(1, Ordering::Relaxed);
        lock(&self.choices).insert(key.to_owned(), choice);
    }

    /// Warns once that kernels are not tuned because the device cannot measure times.
    pub fn warn_without_times(&self, reason: &str) {
        if !self.warned.swap(true, Ordering::Relaxed) {
            log::warn!("kernels are not tuned: {reason}");
        }
    }
}
