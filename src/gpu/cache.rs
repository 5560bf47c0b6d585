//! A cache of shared values by key. It keeps the values in use and a bounded number of idle ones.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex};

use super::lock::lock;

#[derive(Debug)]
struct Entry<V> {
    value: Arc<V>,
    /// When it was last requested.
    used: u64,
}

/// Counts of a cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub hits: u64,
    pub misses: u64,
    pub evicted: u64,
    pub cached: u64,
}

#[derive(Debug)]
struct State<K, V> {
    entries: HashMap<K, Entry<V>>,
    clock: u64,
    counts: Counts,
}

/// A value is in use while anyone besides the cache holds it, and then it is never evicted. Of the idle values, the cache keeps the
/// `most_idle` that were requested last.
#[derive(Debug)]
pub(super) struct Cache<K, V> {
    state: Mutex<State<K, V>>,
    most_idle: usize,
}

impl<K: Clone + Eq + Hash, V> Cache<K, V> {
    pub(super) fn new(most_idle: usize) -> Self {
        let state = State {
            entries: HashMap::new(),
            clock: 0,
            counts: Counts::default(),
        };
        Self {
            state: Mutex::new(state),
            most_idle,
        }
    }

    pub(super) fn get<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> Option<Arc<V>>
    where
        K: Borrow<Q>,
    {
        let mut state = lock(&self.state);
        let State {
            entries,
            clock,
            counts,
        } = &mut *state;
        let entry = entries.get_mut(key)?;
        *clock += 1;
        entry.used = *clock;
        counts.hits += 1;
        Some(Arc::clone(&entry.value))
    }

    /// Whether there is a value. This is no request for it.
    pub(super) fn has<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        lock(&self.state).entries.contains_key(key)
    }

    /// Inserts a value, and returns the one that is cached now. If two threads make a value at once, the first stays.
    pub(super) fn insert(&self, key: K, value: V) -> Arc<V> {
        let mut state = lock(&self.state);
        state.clock += 1;
        state.counts.misses += 1;
        let used = state.clock;
        let entry = state.entries.entry(key).or_insert_with(|| Entry {
            value: Arc::new(value),
            used,
        });
        entry.used = used;
        let value = Arc::clone(&entry.value);
        drop(state);
        self.sweep();
        value
    }

    /// Drops idle values beyond the bound, the least recently requested first.
    pub(super) fn sweep(&self) {
        let mut evicted = Vec::new();
        let mut state = lock(&self.state);
        if state.entries.len() <= self.most_idle {
            return;
        }
        // The cache hands out values under its lock only, so that an idle one stays idle here.
        let idle = |entry: &Entry<V>| Arc::strong_count(&entry.value) == 1;
        let entries = state.entries.iter().filter(|(_, entry)| idle(entry));
        let mut times: Vec<u64> = entries.map(|(_, entry)| entry.used).collect();
        let surplus = times.len().saturating_sub(self.most_idle);
        if surplus == 0 {
            return;
        }
        times.sort_unstable();
        let latest = times[surplus - 1];
        let gone = state
            .entries
            .extract_if(|_, entry| idle(entry) && entry.used <= latest);
        evicted.extend(gone);
        state.counts.evicted += evicted.len() as u64;
        // Values are dropped without the lock.
        drop(state);
    }

    /// Drops the values whose keys `keep` rejects.
    pub(super) fn retain(&self, keep: impl Fn(&K) -> bool) {
        let mut state = lock(&self.state);
        let gone: Vec<_> = state.entries.extract_if(|key, _| !keep(key)).collect();
        drop(state);
        drop(gone);
    }

    pub(super) fn counts(&self) -> Counts {
        let state = lock(&self.state);
        Counts {
            cached: state.entries.len() as u64,
            ..state.counts
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_values_go_in_the_order_of_their_last_use() {
        let cache = Cache::new(2);
        for i in 0..2 {
            cache.insert(i, i);
        }
        assert!(cache.get(&0).is_some(), "0 is used after 1");
        // In use while it is inserted, idle after.
        cache.insert(2, 2);
        cache.sweep();
        let known: Vec<bool> = (0..3).map(|i| cache.get(&i).is_some()).collect();
        assert_eq!(known, [true, false, true]);
        assert_eq!((cache.counts().evicted, cache.counts().cached), (1, 2));
    }

    #[test]
    fn values_in_use_stay_and_do_not_count() {
        let cache = Cache::new(1);
        let held: Vec<_> = (0..5).map(|i| cache.insert(i, i)).collect();
        cache.insert(5, 5);
        assert_eq!(cache.counts().cached, 6, "five in use, one idle");
        cache.insert(6, 6);
        cache.sweep();
        assert!(cache.get(&5).is_none());
        assert!((0..5).all(|i| cache.get(&i).is_some()));
        drop(held);
        cache.sweep();
        assert_eq!(cache.counts().cached, 1);
        cache.retain(|_| false);
        assert_eq!(cache.counts().cached, 0);
    }

    #[test]
    fn without_room_only_what_is_in_use_stays() {
        let cache = Cache::new(0);
        let held = cache.insert("a", 1);
        drop(cache.insert("b", 2));
        cache.sweep();
        assert!(cache.get("b").is_none());
        assert_eq!(cache.get("a").map(|value| *value), Some(*held));
    }
}
