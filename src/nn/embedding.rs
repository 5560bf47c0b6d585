//! Token embeddings.

use crate::error::Result;
use crate::graph::{Graph, Init, ValueId};
use crate::types::DType;

/// A table with one row per token.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Embedding {
    /// [vocabulary, width]
    pub weight: ValueId,
    /// An id whose row is never trained.
    pub padding: Option<u32>,
}

impl Embedding {
    /// Declares the table.
    ///
    /// # Errors
    /// [`Error::Graph`](crate::Error::Graph) for a taken name, [`Error::Shape`](crate::Error::Shape) for an extent of zero.
    pub fn new(
        graph: &mut Graph,
        name: &str,
        vocabulary: usize,
        width: usize,
        padding: Option<u32>,
        init: Init,
    ) -> Result<Self> {
        let shape = [vocabulary, width];
        let weight = graph.declaring("Embedding", name, |graph| {
            graph.parameter(&format!("{name}.weight"), &shape, init)
        })?;
        Ok(Self { weight, padding })
    }

    /// ids `[N]` → [N, width] in `dtype`.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) when `ids` is no vector of indices.
    pub fn forward(&self, graph: &mut Graph, ids: ValueId, dtype: DType) -> Result<ValueId> {
        graph.scoped_like(self.weight, |graph| {
            // Gathered before the cast: N rows are cast instead of the whole table.
            let rows = graph.gather(self.weight, ids, self.padding)?;
            graph.cast(rows, dtype)
        })
    }
}
