//! Table look-up and its gradient.

use super::array::Array;
use crate::error::{Error, Result};

/// [`Op::Gather`](crate::graph::Op::Gather)
pub(super) fn gather(table: &Array, ids: &Array) -> Result<Vec<f64>> {
    let mut out = Vec::with_capacity(ids.data().len() * table.cols());
    for &id in ids.data() {
        let id = checked_index("gather", id, table.rows(), ids)?;
        out.extend_from_slice(table.row(id));
    }
    Ok(out)
}

/// [`Op::GatherGrad`](crate::graph::Op::GatherGrad)
pub(super) fn gather_grad(
    rows: usize,
    padding: Option<u32>,
    ids: &Array,
    dy: &Array,
) -> Result<Vec<f64>> {
    let cols = dy.cols();
    let mut out = vec![0.0; rows * cols];
    for (&id, dy_row) in ids.data().iter().zip(dy.row_iter()) {
        if Some(id) == padding.map(f64::from) {
            continue;
        }
        let id = checked_index("gather gradient", id, rows, ids)?;
        for (sum, dy) in out[id * cols..(id + 1) * cols].iter_mut().zip(dy_row) {
            *sum += dy;
        }
    }
    Ok(out)
}

/// A u32 element as an index below `limit`; `ids`, where it comes from, is named in the error.
pub(super) fn checked_index(op: &'static str, id: f64, limit: usize, ids: &Array) -> Result<usize> {
    let index = id as usize;
    if index < limit {
        return Ok(index);
    }
    let reason = format!("index {index} is not below {limit}");
    Err(Error::shape(op, &[ids.shape()], reason))
}
