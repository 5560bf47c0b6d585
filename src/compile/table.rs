//! The table of contents of the parameters: name, shape, layout, and place in the arenas.

use std::collections::HashMap;

use super::steps::{Arenas, Span};
use crate::error::{Error, Result};
use crate::gpu::Layout;
use crate::graph::{Init, ValueId};
use crate::types::Shape;

/// One parameter.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub name: String,
    pub shape: Shape,
    pub taps: Option<usize>,
    pub layout: Layout,
    pub span: Span,
}

impl Entry {
    pub fn host_shape(&self) -> Vec<usize> {
        let dims = self.shape.dims();
        match (self.taps, dims) {
            (Some(taps), [out, cols]) => vec![*out, cols / taps, taps],
            _ => dims.to_vec(),
        }
    }

    /// [out, in, k] → [out, k·in]
    pub fn to_storage(&self, data: &[f32]) -> Vec<f32> {
        let taps = self.taps.unwrap_or(1);
        transpose(data, self.shape.cols() / taps, taps)
    }

    /// [out, k·in] → [out, in, k]
    pub fn to_host_order(&self, data: &[f32]) -> Vec<f32> {
        let taps = self.taps.unwrap_or(1);
        transpose(data, taps, self.shape.cols() / taps)
    }
}

/// Every stretch of rows × cols elements, transposed.
fn transpose(data: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    if rows == 1 || cols == 1 {
        return data.to_vec();
    }
    data.chunks_exact(rows * cols)
        .flat_map(|matrix| {
            (0..cols).flat_map(move |c| (0..rows).map(move |r| matrix[r * cols + c]))
        })
        .collect()
}

/// Parameters to be created, and the sizes of their blocks.
pub(crate) struct NewParameters {
    pub blocks: Vec<u64>,
    pub entries: Vec<(Entry, Init)>,
}

/// Spans of the parameters of one graph, and the sizes of all blocks.
#[derive(Default)]
pub(crate) struct Table {
    pub spans: HashMap<ValueId, Span>,
    pub blocks: Vec<u64>,
}

impl Table {
    pub fn block_bytes(&self, block: usize) -> u64 {
        self.blocks.get(block).copied().unwrap_or(0)
    }
}

impl Arenas for Table {
    fn span(&self, parameter: ValueId) -> Result<Span> {
        self.spans
            .get(&parameter)
            .copied()
            .ok_or_else(|| Error::Graph("a parameter is not in the session".into()))
    }
}
