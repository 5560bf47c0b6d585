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
    /// Bytes per element.
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

/// A static shape of rank 1 to 3. No extent is zero, and there are at most [`Shape::MAX_LEN`] elements.
///
/// In memory a value is a matrix. The last extent is its number of columns, the product of the others its number of rows.
/// A value of rank 1 is one row.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Shape(Vec<usize>);

impl Shape {
    /// Upper bound of the number of elements: 2³² − 1, because kernels count elements in 32 bits.
    ///
    /// A value that is stored on the device is also bounded in bytes, padding included, see
    /// [`Layout::new`](crate::gpu::Layout::new).
    pub const MAX_LEN: usize = u32::MAX as usize;

    /// Checks the rank, the extents and their product.
    ///
    /// # Errors
    /// [`Error::Shape`] when the rank is not 1 to 3, an extent is zero, or there are more than [`Shape::MAX_LEN`] elements.
    pub fn new(dims: &[usize]) -> Result<Self> {
        let fail = |reason: &str| Err(Error::shape("shape", &[], format!("{dims:?}: {reason}")));
        if dims.is_empty() || dims.len() > 3 {
            return fail("a shape has 1 to 3 extents");
        }
        if dims.contains(&0) {
            return fail("every extent must be at least 1");
        }
        let len = dims.iter().try_fold(1, |len: usize, &n| len.checked_mul(n));
        if len.is_none_or(|len| len > Self::MAX_LEN) {
            return fail("a value has at most 2^32 - 1 elements");
        }
        Ok(Self(dims.to_vec()))
    }

    pub(crate) fn scalar() -> Self {
        Self(vec![1])
    }

    /// `[n]`, for an `n` that is the extent of another shape.
    pub(crate) fn vector(n: usize) -> Self {
        Self(vec![n])
    }

    /// `[rows, cols]` without the checks of [`Shape::new`]: for extents that are known to fit, and for those that the layout checks.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_that_are_no_shape() {
        let most = Shape::MAX_LEN;
        for dims in [
            &[][..],
            &[1, 1, 1, 1],
            &[0],
            &[2, 0, 3],
            &[usize::MAX],
            &[1 << 63, 2, 4],
            &[(1 << 63) + 1, 2, 4],
            &[1 << 32, 1 << 32],
            &[1 << 16, 1 << 16, 1],
            &[most + 1],
        ] {
            let result = Shape::new(dims);
            assert!(matches!(result, Err(Error::Shape { .. })), "{dims:?}");
        }
        assert_eq!(
            Shape::new(&[most]).map(|shape| shape.len()).ok(),
            Some(most)
        );
        let odd = [3, 5, 17 * 257 * 65_537];
        assert!(Shape::new(&odd).is_ok());
    }
}
