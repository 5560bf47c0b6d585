//! Where the elements of a matrix lie in a storage buffer.

use crate::error::{Error, Result};
use crate::types::{DType, Shape};

/// Row alignment in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Alignment {
    /// For vectors: one `vec4<f32>`.
    Bytes16,
    /// For matrices: what matrix hardware and cache lines want.
    Bytes64,
}

impl Alignment {
    /// The alignment in bytes.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::Bytes16 => 16,
            Self::Bytes64 => 64,
        }
    }
}

/// The layout of a rows × columns matrix: rows start at multiples of [`Layout::row_bytes`], padding columns are zero.
///
/// All strides in this crate (allocation, host copies, kernels, plans) come from here, so a misaligned or overlapping
/// layout cannot be expressed:
/// `row_bytes ≥ cols·size`, `row_bytes % alignment == 0`, and every row lies inside [`Layout::size_bytes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    rows: usize,
    cols: usize,
    dtype: DType,
    row_bytes: usize,
}

impl Layout {
    /// Rows × columns of `dtype`, rows aligned to `alignment`.
    ///
    /// # Errors
    /// [`Error::Layout`] when an extent is zero or the matrix exceeds 4 GiB, the range of a kernel's indices.
    pub fn new(rows: usize, cols: usize, dtype: DType, alignment: Alignment) -> Result<Self> {
        let fail = |reason: &str| Error::Layout {
            rows,
            cols,
            reason: reason.to_owned(),
        };
        if rows == 0 || cols == 0 {
            return Err(fail("no extent may be zero"));
        }
        let row_bytes = cols
            .checked_mul(dtype.size())
            .and_then(|bytes| bytes.checked_next_multiple_of(alignment.bytes()))
            .ok_or_else(|| fail("a row exceeds the address space"))?;
        let size = (rows as u128) * (row_bytes as u128);
        if size > u128::from(u32::MAX) {
            return Err(fail("larger than 4 GiB"));
        }
        Ok(Self {
            rows,
            cols,
            dtype,
            row_bytes,
        })
    }

    /// The same rows, in another number.
    ///
    /// # Errors
    /// As [`Layout::new`].
    pub(super) fn with_rows(self, rows: usize) -> Result<Self> {
        let alignment = match self.row_bytes.is_multiple_of(64) {
            true => Alignment::Bytes64,
            false => Alignment::Bytes16,
        };
        let layout = Self::new(rows, self.cols, self.dtype, alignment)?;
        debug_assert_eq!(layout.row_bytes, self.row_bytes);
        Ok(layout)
    }

    /// The layout that graph values of this shape have: rank 1 is one row aligned to 16 bytes, everything else has rows aligned to 64.
    ///
    /// # Errors
    /// As [`Layout::new`].
    pub fn of(shape: &Shape, dtype: DType) -> Result<Self> {
        let alignment = match shape.rank() {
            1 => Alignment::Bytes16,
            _ => Alignment::Bytes64,
        };
        Self::new(shape.rows(), shape.cols(), dtype, alignment)
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns that carry data.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Element type.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes from one row to the next.
    #[must_use]
    pub fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// Elements from one row to the next.
    #[must_use]
    pub fn row_stride(&self) -> usize {
        self.row_bytes / self.dtype.size()
    }

    /// Bytes of all rows, padding included.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        (self.rows * self.row_bytes) as u64
    }

    /// Elements that carry data.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Never true: no extent is zero.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }
}
