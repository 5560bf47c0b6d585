//! A matrix in a storage buffer.

use super::device::Gpu;
use super::element::Element;
use super::layout::Layout;
use super::pool::BufferSlice;
use super::readback::Readback;
use crate::error::{Error, Result};

/// Rows × columns of elements in a range of a buffer; cloning shares the memory.
#[derive(Clone, Debug)]
pub struct Tensor {
    slice: BufferSlice,
    layout: Layout,
}

impl Tensor {
    /// A tensor in a buffer of its own, filled with zeros.
    ///
    /// # Errors
    /// As [`Gpu::buffer`].
    pub fn zeroed(gpu: &Gpu, layout: Layout) -> Result<Self> {
        let buffer = gpu.zeroed_buffer(layout.size_bytes(), "tensor")?;
        Self::from_slice(buffer.whole(), layout)
    }

    /// A tensor in a buffer of its own with undefined content, padding included. What writes it must set the padding to zero.
    ///
    /// # Errors
    /// As [`Gpu::buffer`].
    pub fn uninit(gpu: &Gpu, layout: Layout) -> Result<Self> {
        let buffer = gpu.buffer(layout.size_bytes(), "tensor")?;
        Self::from_slice(buffer.whole(), layout)
    }

    /// A tensor at the beginning of `slice`.
    ///
    /// # Errors
    /// [`Error::Layout`] when the slice is too small.
    pub fn from_slice(slice: BufferSlice, layout: Layout) -> Result<Self> {
        if slice.size() < layout.size_bytes() {
            return Err(Error::Layout {
                rows: layout.rows(),
                cols: layout.cols(),
                reason: format!(
                    "{} bytes are needed, the buffer has {}",
                    layout.size_bytes(),
                    slice.size()
                ),
            });
        }
        let slice = slice.buffer().slice(slice.offset(), layout.size_bytes())?;
        Ok(Self { slice, layout })
    }

    /// The slice of its bytes. Its size is that of the layout.
    #[must_use]
    pub fn slice(&self) -> &BufferSlice {
        &self.slice
    }

    /// The layout of its elements.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Writes dense row-major host data. Everything submitted from now on sees it. Padding becomes zero.
    ///
    /// # Errors
    /// [`Error::Layout`] as [`Layout::pack`]; [`Error::OutOfMemory`], [`Error::DeviceLost`].
    pub fn upload<T: Element>(&self, gpu: &Gpu, data: &[T]) -> Result<()> {
        self.write(gpu, &self.layout.pack(data)?)
    }

    /// As [`Tensor::upload`], of rows from `first` on: the other rows stay as they are.
    ///
    /// # Errors
    /// As [`Tensor::upload`]; [`Error::Layout`] unless `data` is whole rows that the tensor has.
    pub fn upload_rows<T: Element>(&self, gpu: &Gpu, first: usize, data: &[T]) -> Result<()> {
        let layout = &self.layout;
        let rows = data.len() / layout.cols();
        if first
            .checked_add(rows)
            .is_none_or(|end| end > layout.rows())
            || rows * layout.cols() != data.len()
        {
            return Err(Error::Layout {
                rows: layout.rows(),
                cols: layout.cols(),
                reason: format!(
                    "{} elements from row {first} on are no rows of it",
                    data.len()
                ),
            });
        }
        if rows == 0 {
            return Ok(());
        }
        let part = layout.with_rows(rows)?;
        self.write_at(gpu, (first * layout.row_bytes()) as u64, &part.pack(data)?)
    }

    /// Reads all elements as dense row-major host data, after everything submitted before.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::DeviceLost`]; the readback gives [`Error::Layout`] when the elements cannot be read as `T`.
    pub fn download<T: Element>(&self, gpu: &Gpu) -> Result<Readback<Vec<T>>> {
        let layout = self.layout;
        self.read(gpu, move |bytes| layout.unpack(bytes))
    }

    /// Reads all bytes, padding included, after everything submitted before.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::DeviceLost`]
    pub fn download_raw(&self, gpu: &Gpu) -> Result<Readback<Vec<u8>>> {
        self.read(gpu, |bytes| Ok(bytes.to_vec()))
    }

    /// Sets every bit, padding included, so that every float is NaN. Tests use it to check that a kernel writes everything it should.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::DeviceLost`]
    pub fn poison(&self, gpu: &Gpu) -> Result<()> {
        self.write(gpu, &vec![0xff; self.slice.size() as usize])
    }

    fn write(&self, gpu: &Gpu, bytes: &[u8]) -> Result<()> {
        self.write_at(gpu, 0, bytes)
    }

    fn write_at(&self, gpu: &Gpu, at: u64, bytes: &[u8]) -> Result<()> {
        let what = || "uploading a tensor".to_owned();
        // Not between the parts of a run of another thread, nor, from a callback, of this one.
        let _gate = gpu.context().gate();
        gpu.context().check_whole(what)?;
        gpu.context().allocate(what, bytes.len() as u64, || {
            let (inner, offset) = (self.slice.buffer().inner(), self.slice.offset());
            gpu.queue().write_buffer(inner, offset + at, bytes);
        })
    }

    fn read<T>(
        &self,
        gpu: &Gpu,
        decode: impl FnOnce(&[u8]) -> Result<T> + Send + 'static,
    ) -> Result<Readback<T>> {
        gpu.recorder("download")
            .read_back(std::slice::from_ref(&self.slice), move |pieces| {
                decode(pieces.concat().as_slice())
            })
    }
}
