//! A bounded cache of shared things, least recently used first out.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

/// A thing and when it was asked for last.
#[derive(Debug)]
struct Kept<T> {
    thing: Arc<T>,
    used: u64,
}

/// Things by their key. One that is held elsewhere is never evicted.
#[derive(Debug)]
pub(crate) struct Recent<K, T> {
    by_key: HashMap<K, Kept<T>>,
    pub most: usize,
    pub evicted: u64,
    clock: u64,
}

impl<K: Clone + Eq + Hash, T> Recent<K, T> {
    pub fn new(most: usize) -> Self {
        Self {
            by_key: HashMap::new(),
            most,
            evicted: 0,
            clock: 0,
        }
    }

    pub fn len(&self) -> usize {
        self.by_key.len()
    }

    pub fn find(&mut self, key: &K) -> Option<Arc<T>> {
        self.clock += 1;
        let kept = self.by_key.get_mut(key)?;
        kept.used = self.clock;
        Some(Arc::clone(&kept.thing))
    }

    pub fn insert(&mut self, key: K, thing: Arc<T>) {
        let used = self.clock;
        self.by_key.insert(key, Kept { thing, used });
    }

    /// Drops a thing; it lives on where it is held. Whether there was one.
    pub fn forget(&mut self, key: &K) -> bool {
        self.by_key.remove(key).is_some()
    }

    /// Drops those used longest ago that nobody holds, until the bound is kept. Whether any was dropped.
    pub fn evict(&mut self) -> bool {
        let before = self.evicted;
        while self.by_key.len() > self.most {
            let all = self.by_key.iter();
            let idle = all.filter(|(_, kept)| Arc::strong_count(&kept.thing) == 1);
            let oldest = idle.min_by_key(|(_, kept)| kept.used);
            let Some(oldest) = oldest.map(|(key, _)| key.clone()) else {
                break;
            };
            self.by_key.remove(&oldest);
            self.evicted += 1;
        }
        self.evicted > before
    }
}
