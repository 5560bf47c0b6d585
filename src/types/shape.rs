//! Shapes and element types of graph values.

use std::fmt;

use crate::error::{Error, Result};

/// Element type of a value in a storage buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision: storage and matrix inputs only, sums are always [`DType::F32`].
    F16,
    /// Unsigned indices: token ids, targets.
    U32,
}

impl DType {
    /// Bytes an element.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::F32 | Self::U32 => 4,
            Self::F16 => 2,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::U32 => "u32",
        })
    }
}

/// A static shape of rank 1 to 3, no extent zero.
///
/// In memory a value is a matrix: the last extent is its columns, the product of the others its rows.
/// A rank-1 value is one row.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Shape(Vec<usize>);

impl Shape {
    /// Checks rank and extents.
    ///
    /// # Errors
    /// [`Error::Graph`] when the rank is not 1 to 3 or an extent is zero.
    pub fn new(dims: &[usize]) -> Result<Self> {
        if dims.is_empty() || dims.len() > 3 || dims.contains(&0) {
            return Err(Error::Graph(format!(
                "{dims:?} is no shape: rank 1 to 3, every extent at least 1"
            )));
        }
        Ok(Self(dims.to_vec()))
    }

    pub(crate) fn scalar() -> Self {
        Self(vec![1])
    }

    pub(crate) fn vector(n: usize) -> Self {
        Self(vec![n])
    }

    pub(crate) fn matrix(rows: usize, cols: usize) -> Self {
        Self(vec![rows, cols])
    }

    /// The extents.
    #[must_use]
    pub fn dims(&self) -> &[usize] {
        &self.0
    }

    /// Number of extents.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.0.len()
    }

    /// Product of all extents but the last.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.0[..self.0.len() - 1].iter().product()
    }

    /// The last extent.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.0[self.0.len() - 1]
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.iter().product()
    }

    /// Never true: no extent is zero.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}
