//! Names of values that know their graph.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};

/// A value of one [`Graph`](super::Graph). Cheap to copy; another graph refuses it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ValueId(pub(crate) u32, Tag);

/// A graph, or a clone of one, of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Tag(u32);

impl Tag {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

impl ValueId {
    /// Position among the values of the graph.
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// Without the graph, whose tag differs from run to run of a program.
impl fmt::Debug for ValueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ValueId({})", self.0)
    }
}

/// Which graph created which values: a clone keeps the ids of its original for the values that both have, and gives ids of its own
/// to all later ones.
#[derive(Debug)]
pub(super) struct Lineage {
    own: Tag,
    /// Originals, with the number of values at the time of cloning.
    ancestors: Vec<(Tag, usize)>,
    /// Number of values.
    len: usize,
}

impl Default for Lineage {
    fn default() -> Self {
        Self {
            own: Tag::new(),
            ancestors: Vec::new(),
            len: 0,
        }
    }
}

impl Clone for Lineage {
    fn clone(&self) -> Self {
        let mut ancestors = self.ancestors.clone();
        ancestors.push((self.own, self.len));
        Self {
            own: Tag::new(),
            ancestors,
            len: self.len,
        }
    }
}

impl Lineage {
    /// The id of value number `index`.
    pub fn id(&self, index: usize) -> ValueId {
        let older = self.ancestors.partition_point(|&(_, len)| len <= index);
        let tag = self.ancestors.get(older).map_or(self.own, |&(tag, _)| tag);
        ValueId(index as u32, tag)
    }

    /// The id of one more value.
    pub fn grow(&mut self) -> ValueId {
        self.len += 1;
        self.id(self.len - 1)
    }
}
