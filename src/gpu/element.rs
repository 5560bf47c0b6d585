//! Host elements, and their packing into the rows of a [`Layout`].

use bytemuck::Pod;
use half::f16;
use half::slice::HalfFloatSliceExt;

use super::layout::Layout;
use crate::error::{Error, Result};
use crate::graph::DType;

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for u32 {}
}

/// A host type that tensors are uploaded from and downloaded to: `f32`, [`f16`](half::f16) or `u32`.
///
/// `f32` also serves tensors of [`DType::F16`]: rounded to nearest, ties to even, on the way up; exact on the way down.
pub trait Element: Pod + Send + sealed::Sealed {
    /// The element type with the same bits.
    const DTYPE: DType;

    /// Writes a row as elements of `dtype`, or returns false if that is not possible.
    #[doc(hidden)]
    fn encode(row: &[Self], dtype: DType, bytes: &mut [u8]) -> bool {
        if dtype == Self::DTYPE {
            bytes.copy_from_slice(bytemuck::cast_slice(row));
        }
        dtype == Self::DTYPE
    }

    /// Reads a row of elements of `dtype`, or returns false if that is not possible.
    #[doc(hidden)]
    fn decode(bytes: &[u8], dtype: DType, row: &mut [Self]) -> bool {
        if dtype == Self::DTYPE {
            bytemuck::cast_slice_mut(row).copy_from_slice(bytes);
        }
        dtype == Self::DTYPE
    }
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;
}

impl Element for u32 {
    const DTYPE: DType = DType::U32;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;

    fn encode(row: &[Self], dtype: DType, bytes: &mut [u8]) -> bool {
        match dtype {
            DType::F32 => bytes.copy_from_slice(bytemuck::cast_slice(row)),
            DType::F16 => {
                let mut halves = vec![f16::ZERO; row.len()];
                halves.convert_from_f32_slice(row);
                bytes.copy_from_slice(bytemuck::cast_slice(&halves));
            }
            DType::U32 => return false,
        }
        true
    }

    fn decode(bytes: &[u8], dtype: DType, row: &mut [Self]) -> bool {
        match dtype {
            DType::F32 => bytemuck::cast_slice_mut(row).copy_from_slice(bytes),
            DType::F16 => {
                let mut halves = vec![f16::ZERO; row.len()];
                bytemuck::cast_slice_mut(&mut halves).copy_from_slice(bytes);
                halves.convert_to_f32_slice(row);
            }
            DType::U32 => return false,
        }
        true
    }
}

impl Layout {
    /// Dense row-major elements as the bytes of this layout, padding zero.
    ///
    /// # Errors
    /// [`Error::Layout`] unless there are rows × columns elements of a type that this layout's holds.
    pub fn pack<T: Element>(&self, data: &[T]) -> Result<Vec<u8>> {
        if data.len() != self.len() {
            return Err(self.mismatch(format!("{} elements given", data.len())));
        }
        let mut bytes = vec![0; self.size_bytes() as usize];
        let used = self.cols() * self.dtype().size();
        let rows = bytes.chunks_exact_mut(self.row_bytes());
        for (padded, row) in rows.zip(data.chunks_exact(self.cols())) {
            if !T::encode(row, self.dtype(), &mut padded[..used]) {
                return Err(self.mismatch_type::<T>());
            }
        }
        Ok(bytes)
    }

    /// The dense row-major elements in the bytes of this layout.
    ///
    /// # Errors
    /// [`Error::Layout`] unless `bytes` has the size of this layout, and `T` a type that this layout's elements convert to.
    pub fn unpack<T: Element>(&self, bytes: &[u8]) -> Result<Vec<T>> {
        if bytes.len() as u64 != self.size_bytes() {
            return Err(self.mismatch(format!(
                "{} bytes given, {} needed",
                bytes.len(),
                self.size_bytes()
            )));
        }
        let mut data = vec![T::zeroed(); self.len()];
        let used = self.cols() * self.dtype().size();
        let rows = bytes.chunks_exact(self.row_bytes());
        for (padded, row) in rows.zip(data.chunks_exact_mut(self.cols())) {
            if !T::decode(&padded[..used], self.dtype(), row) {
                return Err(self.mismatch_type::<T>());
            }
        }
        Ok(data)
    }

    fn mismatch_type<T: Element>(&self) -> Error {
        self.mismatch(format!(
            "{} elements cannot be exchanged with {} on the host",
            self.dtype(),
            T::DTYPE
        ))
    }

    fn mismatch(&self, reason: String) -> Error {
        Error::Layout {
            rows: self.rows(),
            cols: self.cols(),
            reason,
        }
    }
}
