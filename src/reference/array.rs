//! Host arrays of the interpreter.

use crate::error::{Error, Result};
use crate::types::Shape;

/// A dense row-major array of f64; every element type of a graph is held as f64 (f16, f32 and u32 fit exactly).
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    shape: Shape,
    data: Vec<f64>,
}

impl Array {
    /// An array of the extents `dims` over `data` in row-major order.
    ///
    /// # Errors
    /// [`Error::Shape`] when `dims` is no shape or `data` has another length.
    pub fn new(dims: &[usize], data: Vec<f64>) -> Result<Self> {
        Self::with_shape(Shape::new(dims)?, data)
    }

    /// As [`Array::new`], from f32.
    ///
    /// # Errors
    /// As [`Array::new`].
    pub fn from_f32(dims: &[usize], data: &[f32]) -> Result<Self> {
        Self::new(dims, data.iter().copied().map(f64::from).collect())
    }

    /// As [`Array::new`], from u32.
    ///
    /// # Errors
    /// As [`Array::new`].
    pub fn from_u32(dims: &[usize], data: &[u32]) -> Result<Self> {
        Self::new(dims, data.iter().copied().map(f64::from).collect())
    }

    /// The same number everywhere.
    ///
    /// # Errors
    /// [`Error::Shape`] when `dims` is no shape.
    pub fn filled(dims: &[usize], number: f64) -> Result<Self> {
        Ok(Self::splat(Shape::new(dims)?, number))
    }

    /// One number, of shape `[1]`.
    #[must_use]
    pub fn scalar(number: f64) -> Self {
        Self::splat(Shape::scalar(), number)
    }

    pub(super) fn splat(shape: Shape, number: f64) -> Self {
        let data = vec![number; shape.len()];
        Self { shape, data }
    }

    pub(super) fn with_shape(shape: Shape, data: Vec<f64>) -> Result<Self> {
        if data.len() != shape.len() {
            let reason = format!("{} elements given for {}", data.len(), shape.len());
            return Err(Error::shape("array", &[&shape], reason));
        }
        Ok(Self { shape, data })
    }

    /// The extents.
    #[must_use]
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Number of rows of the matrix view, [`Shape::rows`].
    #[must_use]
    pub fn rows(&self) -> usize {
        self.shape.rows()
    }

    /// Number of columns of the matrix view, [`Shape::cols`].
    #[must_use]
    pub fn cols(&self) -> usize {
        self.shape.cols()
    }

    /// The elements, row after row.
    #[must_use]
    pub fn data(&self) -> &[f64] {
        &self.data
    }

    /// The elements, to be changed in place.
    pub fn data_mut(&mut self) -> &mut [f64] {
        &mut self.data
    }

    /// The elements rounded to f32.
    #[must_use]
    pub fn to_f32(&self) -> Vec<f32> {
        self.data.iter().map(|&x| x as f32).collect()
    }

    /// The rows of the matrix view.
    pub(super) fn row_iter(&self) -> std::slice::ChunksExact<'_, f64> {
        self.data.chunks_exact(self.cols())
    }

    /// Row `r` of the matrix view.
    pub(super) fn row(&self, r: usize) -> &[f64] {
        let cols = self.cols();
        &self.data[r * cols..(r + 1) * cols]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_that_does_not_match_is_refused() {
        assert!(matches!(
            Array::new(&[2, 3], vec![0.0; 5]),
            Err(Error::Shape { .. })
        ));
        assert!(matches!(
            Array::from_u32(&[2, 0], &[]),
            Err(Error::Shape { .. })
        ));
    }

    #[test]
    fn rows_follow_the_last_extent() -> Result<()> {
        let array = Array::from_f32(
            &[2, 2, 3],
            &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0],
        )?;
        assert_eq!((array.rows(), array.cols()), (4, 3));
        assert_eq!(array.row(2), [6.0, 7.0, 8.0]);
        assert_eq!(array.row_iter().last(), Some(array.row(3)));
        Ok(())
    }
}
