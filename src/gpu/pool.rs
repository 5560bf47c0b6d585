//! Storage buffers, reused by size class.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use super::device::Gpu;
use super::guard::within;
use super::lock;
use crate::error::{Error, Result};

/// Offsets of bindings are multiples of this many bytes, the WebGPU baseline, on every adapter.
pub const OFFSET_ALIGNMENT: u64 = 256;

/// Kernels load vectors of up to this many bytes, so every size is a multiple of it.
const SIZE_ALIGNMENT: u64 = 16;

const SMALLEST_CLASS: u64 = 256;

/// Never reused, so that an id names one wgpu buffer for good.
static NEXT_ID: AtomicU64 = AtomicU64::new(0);

/// Counts of a device's buffer pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Bytes of all buffers that exist.
    pub allocated_bytes: u64,
    /// Bytes of those that a [`Buffer`] refers to.
    pub in_use_bytes: u64,
    /// Largest `allocated_bytes` so far.
    pub peak_bytes: u64,
    /// Requests served by reuse.
    pub hits: u64,
    /// Requests that allocated.
    pub misses: u64,
}

/// A wgpu buffer and the id that stays with it through all its reuses.
#[derive(Debug)]
struct Storage {
    raw: wgpu::Buffer,
    id: u64,
    access: HostAccess,
}

/// Whether the host reaches a buffer without a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum HostAccess {
    None,
    Write,
}

#[derive(Debug, Default)]
struct State {
    free: HashMap<(u64, HostAccess), Vec<Storage>>,
    stats: PoolStats,
}

#[derive(Debug, Default)]
pub(super) struct Pool(Mutex<State>);

impl Pool {
    fn take(&self, class: u64, access: HostAccess) -> Option<Storage> {
        let mut state = lock(&self.0);
        let storage = state.free.get_mut(&(class, access))?.pop()?;
        state.stats.hits += 1;
        state.stats.in_use_bytes += class;
        Some(storage)
    }

    fn count_allocation(&self, class: u64) {
        let stats = &mut lock(&self.0).stats;
        stats.misses += 1;
        stats.in_use_bytes += class;
        stats.allocated_bytes += class;
        stats.peak_bytes = stats.peak_bytes.max(stats.allocated_bytes);
    }

    fn give_back(&self, storage: Storage) {
        let class = storage.raw.size();
        let mut state = lock(&self.0);
        state.stats.in_use_bytes -= class;
        let list = state.free.entry((class, storage.access)).or_default();
        list.push(storage);
    }

    fn trim(&self) -> (u64, Vec<Storage>) {
        let mut state = lock(&self.0);
        let freed: Vec<Storage> = state.free.drain().flat_map(|(_, list)| list).collect();
        let bytes = freed.iter().map(|storage| storage.raw.size()).sum();
        state.stats.allocated_bytes -= bytes;
        (bytes, freed)
    }
}

#[derive(Debug)]
struct Lease {
    raw: wgpu::Buffer,
    id: u64,
    access: HostAccess,
    size: u64,
    pool: Weak<Pool>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.upgrade() {
            pool.give_back(Storage {
                raw: self.raw.clone(),
                id: self.id,
                access: self.access,
            });
        }
    }
}

/// A storage buffer of the pool. Cloning shares it; when the last clone is dropped, the memory returns to the pool.
///
/// Reuse is safe while earlier work still runs, because the queue executes submissions in order.
#[derive(Clone, Debug)]
pub struct Buffer(Arc<Lease>);

impl Buffer {
    /// Identifies the memory: the same for every reuse of it, and of no other memory.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.0.id
    }

    /// Usable bytes: those asked for, rounded up to a multiple of 16.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.0.size
    }

    /// The wgpu buffer, which may be longer than [`Buffer::size`].
    #[must_use]
    pub fn raw(&self) -> &wgpu::Buffer {
        &self.0.raw
    }

    /// All usable bytes.
    #[must_use]
    pub fn whole(&self) -> BufferSlice {
        BufferSlice {
            buffer: self.clone(),
            offset: 0,
            size: self.size(),
        }
    }

    /// `size` bytes from `offset`.
    ///
    /// # Errors
    /// [`Error::Layout`] unless `offset` is a multiple of [`OFFSET_ALIGNMENT`], `size` a positive multiple of 4, and the
    /// end inside the buffer.
    pub fn slice(&self, offset: u64, size: u64) -> Result<BufferSlice> {
        let reason = if !offset.is_multiple_of(OFFSET_ALIGNMENT) {
            format!("offset {offset} is not a multiple of {OFFSET_ALIGNMENT}")
        } else if size == 0 || !size.is_multiple_of(4) {
            format!("{size} bytes are not a positive multiple of 4")
        } else if offset.checked_add(size).is_none_or(|end| end > self.size()) {
            format!(
                "bytes {offset} + {size} end beyond the buffer's {}",
                self.size()
            )
        } else {
            return Ok(BufferSlice {
                buffer: self.clone(),
                offset,
                size,
            });
        };
        Err(Error::Layout {
            rows: 1,
            cols: size as usize,
            reason,
        })
    }
}

/// A range of a buffer that can be bound to a kernel.
#[derive(Clone, Debug)]
pub struct BufferSlice {
    buffer: Buffer,
    offset: u64,
    size: u64,
}

impl BufferSlice {
    /// The buffer.
    #[must_use]
    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// First byte, a multiple of [`OFFSET_ALIGNMENT`].
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes, a positive multiple of 4.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }
}

impl Gpu {
    /// A storage buffer of at least `bytes`, which can be copied from and to. Its content is undefined.
    ///
    /// # Errors
    /// [`Error::Limit`] when a binding or a buffer of this size is not possible, [`Error::OutOfMemory`] when memory is
    /// short even after [`Gpu::trim`].
    pub fn buffer(&self, bytes: u64, label: &str) -> Result<Buffer> {
        Ok(self.lease(bytes, label, HostAccess::None)?.0)
    }

    /// As [`Gpu::buffer`], all bytes zero for everything submitted from now on.
    ///
    /// # Errors
    /// As [`Gpu::buffer`].
    pub fn zeroed_buffer(&self, bytes: u64, label: &str) -> Result<Buffer> {
        self.zeroed(bytes, label, HostAccess::None)
    }

    /// As [`Gpu::zeroed_buffer`], but the host can map it for writing while nothing that uses it is under way.
    pub(crate) fn writable_buffer(&self, bytes: u64, label: &str) -> Result<Buffer> {
        self.zeroed(bytes, label, HostAccess::Write)
    }

    fn zeroed(&self, bytes: u64, label: &str, access: HostAccess) -> Result<Buffer> {
        let (buffer, reused) = self.lease(bytes, label, access)?;
        if reused {
            let mut recorder = self.recorder("zero");
            recorder.clear(&buffer.whole());
            recorder.submit()?;
        }
        Ok(buffer)
    }

    /// Frees all pooled memory that nothing uses; returns its size in bytes.
    pub fn trim(&self) -> u64 {
        let (bytes, freed) = self.0.pool.trim();
        self.0.staging.trim();
        let ids = freed.iter().map(|storage| storage.id).collect();
        self.0.bind_groups.forget(&ids);
        bytes
    }

    pub(super) fn pool_stats(&self) -> PoolStats {
        lock(&self.0.pool.0).stats
    }

    /// The buffer, and whether it is reused and may hold stale data; fresh wgpu buffers read as zero.
    fn lease(&self, bytes: u64, label: &str, access: HostAccess) -> Result<(Buffer, bool)> {
        self.0.guard.check()?;
        let limits = &self.capabilities().limits;
        let what = || format!("buffer {label:?}");
        let size = bytes
            .max(1)
            .checked_next_multiple_of(SIZE_ALIGNMENT)
            .unwrap_or(u64::MAX);
        within(what, "max_buffer_size", size, limits.max_buffer_size)?;
        within(
            what,
            "max_storage_buffer_binding_size",
            size,
            limits.max_storage_buffer_binding_size,
        )?;
        let largest = limits.max_buffer_size / SIZE_ALIGNMENT * SIZE_ALIGNMENT;
        let class = size_class(size).min(largest);

        let reused = self.0.pool.take(class, access);
        let is_reused = reused.is_some();
        let storage = match reused {
            Some(storage) => storage,
            None => self.allocate(class, label, access)?,
        };
        let buffer = Buffer(Arc::new(Lease {
            raw: storage.raw,
            id: storage.id,
            access,
            size,
            pool: Arc::downgrade(&self.0.pool),
        }));
        Ok((buffer, is_reused))
    }

    fn allocate(&self, class: u64, label: &str, access: HostAccess) -> Result<Storage> {
        let mapping = match access {
            HostAccess::None => wgpu::BufferUsages::empty(),
            HostAccess::Write => wgpu::BufferUsages::MAP_WRITE,
        };
        let create = || {
            let what = || format!("allocating buffer {label:?}");
            self.0.guard.run(what, class, || {
                self.device().create_buffer(&wgpu::BufferDescriptor {
                    label: Some(label),
                    size: class,
                    usage: wgpu::BufferUsages::STORAGE
                        | wgpu::BufferUsages::COPY_SRC
                        | wgpu::BufferUsages::COPY_DST
                        | mapping,
                    mapped_at_creation: false,
                })
            })
        };
        let raw = match create() {
            Err(Error::OutOfMemory { .. }) if self.trim() > 0 => create()?,
            other => other?,
        };
        self.0.pool.count_allocation(class);
        Ok(Storage {
            raw,
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            access,
        })
    }
}

/// The smallest of 2ⁿ·{16, 17, .., 31}/16 and a multiple of 64, at least 256, that holds `size`: at most a sixteenth is wasted, or
/// less than 64 bytes.
pub(super) fn size_class(size: u64) -> u64 {
    if size <= SMALLEST_CLASS {
        return SMALLEST_CLASS;
    }
    let step = ((1_u64 << (size - 1).ilog2()) / 16).max(64);
    size.checked_next_multiple_of(step).unwrap_or(size)
}

#[cfg(test)]
mod tests {
    use super::size_class;

    #[test]
    fn classes_hold_their_sizes_and_waste_little() {
        let boundaries = [
            (1, 256),
            (256, 256),
            (257, 320),
            (320, 320),
            (321, 384),
            (512, 512),
            (513, 576),
            (1025, 1088),
            (2049, 2176),
            (1 << 30, 1 << 30),
            ((1 << 30) + 1, 17 << 26),
        ];
        for (size, class) in boundaries {
            assert_eq!(size_class(size), class, "class of {size}");
        }
        for size in 257..5000 {
            let class = size_class(size);
            assert!(
                class >= size && class < size + (size / 16).max(64),
                "class of {size}"
            );
            assert_eq!(size_class(class), class, "a class is its own class");
            assert_eq!(class % 64, 0);
        }
    }
}
