//! Element types on the host, and packing elements into the rows of a [`Layout`].

use bytemuck::Pod;
use half::f16;
use half::slice::HalfFloatSliceExt;
use wgpu::WriteOnly;

use super::layout::Layout;
use crate::error::{Error, Result};
use crate::types::DType;

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for u32 {}
}

/// A host type that tensors are uploaded from and downloaded to: `f32`, [`f16`](half::f16) or `u32`.
///
/// `f32` also serves tensors of [`DType::F16`]. Uploads round to nearest, ties to even; downloads are exact.
pub trait Element: Pod + Send + sealed::Sealed {
    /// The element type with the same bits.
    const DTYPE: DType;

    /// Writes elements as `dtype`, or returns false if that is not possible.
    #[doc(hidden)]
    fn encode(row: &[Self], dtype: DType, mut bytes: WriteOnly<'_, [u8]>) -> bool {
        if dtype == Self::DTYPE {
            bytes.copy_from_slice(bytemuck::cast_slice(row));
        }
        dtype == Self::DTYPE
    }

    /// Reads elements of `dtype`, or returns false if that is not possible.
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

/// Number of f16 values that are converted at a time, on the stack.
const HALVES: usize = 256;

impl Element for f32 {
    const DTYPE: DType = DType::F32;

    fn encode(row: &[Self], dtype: DType, mut bytes: WriteOnly<'_, [u8]>) -> bool {
        match dtype {
            DType::F32 => bytes.copy_from_slice(bytemuck::cast_slice(row)),
            DType::F16 => {
                let mut buffer = [f16::ZERO; HALVES];
                for (i, floats) in row.chunks(HALVES).enumerate() {
                    let halves = &mut buffer[..floats.len()];
                    halves.convert_from_f32_slice(floats);
                    let raw: &[u8] = bytemuck::cast_slice(halves);
                    bytes
                        .slice(2 * HALVES * i..)
                        .slice(..raw.len())
                        .copy_from_slice(raw);
                }
            }
            DType::U32 => return false,
        }
        true
    }

    fn decode(bytes: &[u8], dtype: DType, row: &mut [Self]) -> bool {
        match dtype {
            DType::F32 => bytemuck::cast_slice_mut(row).copy_from_slice(bytes),
            DType::F16 => {
                let mut buffer = [f16::ZERO; HALVES];
                for (floats, raw) in row.chunks_mut(HALVES).zip(bytes.chunks(2 * HALVES)) {
                    let halves = &mut buffer[..floats.len()];
                    bytemuck::cast_slice_mut(halves).copy_from_slice(raw);
                    halves.convert_to_f32_slice(floats);
                }
            }
            DType::U32 => return false,
        }
        true
    }
}

impl Layout {
    /// Packs dense row-major elements into bytes of this layout, with zero padding.
    ///
    /// # Errors
    /// [`Error::Layout`] unless there are rows × columns elements of a type that converts to this layout's.
    pub fn pack<T: Element>(&self, data: &[T]) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.size_bytes() as usize];
        self.pack_into(data, WriteOnly::from(bytes.as_mut_slice()))?;
        Ok(bytes)
    }

    /// As [`Layout::pack`], into memory of exactly the layout's size, which may be that of a mapped buffer.
    ///
    /// # Errors
    /// As [`Layout::pack`], and when `bytes` has another size.
    pub fn pack_into<T: Element>(&self, data: &[T], mut bytes: WriteOnly<'_, [u8]>) -> Result<()> {
        if data.len() != self.len() {
            return Err(self.mismatch(format!("{} elements given", data.len())));
        }
        self.check_size(bytes.len())?;
        let used = self.cols() * self.dtype().size();
        // Without padding, all rows are one.
        let (cols, stride, used) = match used == self.row_bytes() {
            true => (data.len(), bytes.len(), bytes.len()),
            false => (self.cols(), self.row_bytes(), used),
        };
        for (i, row) in data.chunks_exact(cols).enumerate() {
            let mut padded = bytes.slice(i * stride..).into_slice(..stride);
            if !T::encode(row, self.dtype(), padded.slice(..used)) {
                return Err(self.mismatch_type::<T>());
            }
            padded.slice(used..).fill(0);
        }
        Ok(())
    }

    /// The dense row-major elements in the bytes of this layout.
    ///
    /// # Errors
    /// [`Error::Layout`] unless `bytes` has the size of this layout, and `T` a type that this layout's elements convert to.
    pub fn unpack<T: Element>(&self, bytes: &[u8]) -> Result<Vec<T>> {
        self.check_size(bytes.len())?;
        let mut data = vec![T::zeroed(); self.len()];
        self.unpack_into(bytes, &mut data)?;
        Ok(data)
    }

    /// As [`Layout::unpack`], into a slice of rows × columns elements.
    ///
    /// # Errors
    /// As [`Layout::unpack`], and when `data` has another length.
    pub fn unpack_into<T: Element>(&self, bytes: &[u8], data: &mut [T]) -> Result<()> {
        self.check_size(bytes.len())?;
        if data.len() != self.len() {
            return Err(self.mismatch(format!("room for {} elements given", data.len())));
        }
        let used = self.cols() * self.dtype().size();
        let rows = bytes.chunks_exact(self.row_bytes());
        for (padded, row) in rows.zip(data.chunks_exact_mut(self.cols())) {
            if !T::decode(&padded[..used], self.dtype(), row) {
                return Err(self.mismatch_type::<T>());
            }
        }
        Ok(())
    }

    /// The first element in the bytes of this layout.
    pub(crate) fn unpack_first<T: Element>(&self, bytes: &[u8]) -> Result<T> {
        self.check_size(bytes.len())?;
        let mut first = [T::zeroed()];
        match T::decode(&bytes[..self.dtype().size()], self.dtype(), &mut first) {
            true => Ok(first[0]),
            false => Err(self.mismatch_type::<T>()),
        }
    }

    fn check_size(&self, bytes: usize) -> Result<()> {
        let needed = self.size_bytes();
        match bytes as u64 == needed {
            true => Ok(()),
            false => Err(self.mismatch(format!("{bytes} bytes given, {needed} needed"))),
        }
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
