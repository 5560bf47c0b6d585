//! The compiled graphs of a session: a bounded cache, least recently used first out.

use std::collections::HashMap;
use std::sync::Arc;

use super::executable::Executable;

/// A compiled graph and when it was asked for last.
#[derive(Debug)]
struct Compiled {
    executable: Arc<Executable>,
    used: u64,
}

/// Executables by the fingerprint of their graph. One that is held elsewhere is never evicted.
#[derive(Debug)]
pub(crate) struct Executables {
    by_graph: HashMap<u128, Compiled>,
    pub most: usize,
    pub evicted: u64,
    clock: u64,
}

impl Executables {
    pub fn new(most: usize) -> Self {
        Self {
            by_graph: HashMap::new(),
            most,
            evicted: 0,
            clock: 0,
        }
    }

    pub fn len(&self) -> usize {
        self.by_graph.len()
    }

    pub fn find(&mut self, graph: u128) -> Option<Arc<Executable>> {
        self.clock += 1;
        let compiled = self.by_graph.get_mut(&graph)?;
        compiled.used = self.clock;
        Some(Arc::clone(&compiled.executable))
    }

    pub fn insert(&mut self, graph: u128, executable: Arc<Executable>) {
        let used = self.clock;
        self.by_graph.insert(graph, Compiled { executable, used });
    }

    /// Drops an executable; it lives on where it is held. Whether there was one.
    pub fn forget(&mut self, graph: u128) -> bool {
        self.by_graph.remove(&graph).is_some()
    }

    /// Drops those used longest ago that nobody holds, until the bound is kept. Whether any was dropped.
    pub fn evict(&mut self) -> bool {
        let before = self.evicted;
        while self.by_graph.len() > self.most {
            let all = self.by_graph.iter();
            let idle = all.filter(|(_, compiled)| Arc::strong_count(&compiled.executable) == 1);
            let oldest = idle.min_by_key(|(_, compiled)| compiled.used);
            let Some(oldest) = oldest.map(|(graph, _)| *graph) else {
                break;
            };
            self.by_graph.remove(&oldest);
            self.evicted += 1;
        }
        self.evicted > before
    }
}
