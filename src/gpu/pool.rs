//! Storage buffers, reused by size class.

use std::collections::HashMap;
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use super::cache::Cache;
use super::context::{Context, within};
use super::lock::lock;
use super::options::GpuOptions;
use crate::error::{Error, Result};

/// Offsets of bindings are multiples of this many bytes, the WebGPU baseline, on every adapter.
pub const OFFSET_ALIGNMENT: u64 = 256;

/// Kernels load vectors of up to this many bytes, so every size is a multiple of it.
const SIZE_ALIGNMENT: u64 = 16;

const SMALLEST_CLASS: u64 = 256;

/// Source of ids. An id is never reused, so it always names the same wgpu buffer.
static NEXT_ID: AtomicU64 = AtomicU64::new(0);

/// Counts of a device's buffer pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Bytes of all buffers that exist.
    pub allocated_bytes: u64,
    /// Bytes of the buffers that a [`Buffer`] refers to.
    pub in_use_bytes: u64,
    /// Largest `allocated_bytes` so far.
    pub peak_bytes: u64,
    /// Number of requests served by reuse.
    pub hits: u64,
    /// Number of requests that allocated.
    pub misses: u64,
}

/// A wgpu buffer and the id that stays with it through all its reuses.
#[derive(Debug)]
struct Storage {
    raw: wgpu::Buffer,
    id: u64,
    access: HostAccess,
}

/// Whether the host can access a buffer without a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum HostAccess {
    None,
    Write,
}

#[derive(Debug, Default)]
struct State {
    /// Free buffers, each with the number of its return.
    free: HashMap<(u64, HostAccess), Vec<(Storage, u64)>>,
    returned: u64,
    stats: PoolStats,
}

/// Identity of a binding layout and of the ranges bound: buffer id, offset, size.
pub(super) type GroupKey = (u64, Vec<(u64, u64, u64)>);

/// Free buffers, with those returned last at the end of each list, and the bind groups of all buffers, which would keep their memory alive.
#[derive(Debug)]
pub(super) struct Pool {
    state: Mutex<State>,
    pub(super) groups: Cache<GroupKey, wgpu::BindGroup>,
    most_idle: u64,
}

impl Pool {
    pub(super) fn new(options: &GpuOptions) -> Self {
        Self {
            state: Mutex::default(),
            groups: Cache::new(options.idle_bind_groups),
            most_idle: options.idle_bytes,
        }
    }

    pub(super) fn stats(&self) -> PoolStats {
        lock(&self.state).stats
    }

    fn take(&self, class: u64, access: HostAccess) -> Option<Storage> {
        let mut state = lock(&self.state);
        let (storage, _) = state.free.get_mut(&(class, access))?.pop()?;
        state.stats.hits += 1;
        state.stats.in_use_bytes += class;
        Some(storage)
    }

    fn count_allocation(&self, class: u64) {
        let stats = &mut lock(&self.state).stats;
        stats.misses += 1;
        stats.in_use_bytes += class;
        stats.allocated_bytes += class;
        stats.peak_bytes = stats.peak_bytes.max(stats.allocated_bytes);
    }

    /// Takes back memory that nothing in this crate uses. `keep` says whether it may be reused.
    fn give_back(&self, storage: Storage, keep: bool) {
        let class = storage.raw.size();
        let mut state = lock(&self.state);
        state.stats.in_use_bytes -= class;
        state.returned += 1;
        let mut freed = Vec::new();
        if keep {
            let entry = (storage, state.returned);
            let key = (class, entry.0.access);
            state.free.entry(key).or_default().push(entry);
            while state.stats.allocated_bytes - state.stats.in_use_bytes > self.most_idle {
                let Some(oldest) = state.pop_oldest() else {
                    break;
                };
                freed.push(oldest);
            }
        } else {
            state.stats.allocated_bytes -= class;
            freed.push(storage);
        }
        drop(state);
        self.forget(&freed);
    }

    /// Frees all idle memory, and returns its size in bytes.
    pub(super) fn trim(&self) -> u64 {
        let mut state = lock(&self.state);
        let lists = state.free.drain().flat_map(|(_, list)| list);
        let freed: Vec<Storage> = lists.map(|(storage, _)| storage).collect();
        let bytes = freed.iter().map(|storage| storage.raw.size()).sum();
        state.stats.allocated_bytes -= bytes;
        drop(state);
        self.forget(&freed);
        bytes
    }

    /// Drops the bind groups of freed memory.
    fn forget(&self, freed: &[Storage]) {
        if freed.is_empty() {
            return;
        }
        let ids: HashSet<u64> = freed.iter().map(|storage| storage.id).collect();
        self.groups
            .retain(|(_, ranges)| !ranges.iter().any(|(id, ..)| ids.contains(id)));
    }
}

impl State {
    fn pop_oldest(&mut self) -> Option<Storage> {
        let since = |list: &Vec<(Storage, u64)>| list.first().map(|(_, since)| *since);
        let lists = self.free.values_mut().filter(|list| !list.is_empty());
        let list = lists.min_by_key(|list| since(list))?;
        let (storage, _) = list.remove(0);
        self.stats.allocated_bytes -= storage.raw.size();
        Some(storage)
    }
}

#[derive(Debug)]
struct Lease {
    raw: wgpu::Buffer,
    id: u64,
    access: HostAccess,
    size: u64,
    /// The caller has received the wgpu buffer, and may keep it.
    exposed: AtomicBool,
    pool: Weak<Pool>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.upgrade() {
            let storage = Storage {
                raw: self.raw.clone(),
                id: self.id,
                access: self.access,
            };
            // Kernels without bounds checks rely on indices that this crate wrote: memory that a caller can write past this crate must not
            // become theirs.
            pool.give_back(storage, !*self.exposed.get_mut());
        }
    }
}

/// A storage buffer of the pool. Cloning shares it; when the last clone is dropped, the memory returns to the pool.
///
/// Reuse is safe while earlier work still runs, because the queue executes submissions in order.
#[derive(Clone, Debug)]
pub struct Buffer(Arc<Lease>);

impl Buffer {
    /// Identifies the memory. Every reuse of the memory has the same id, and no other memory has it.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.0.id
    }

    /// Usable size in bytes: the requested size, rounded up to a multiple of 16.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.0.size
    }

    /// The wgpu buffer, which may be longer than [`Buffer::size`]. After this call the memory is not reused.
    #[must_use]
    pub fn raw(&self) -> &wgpu::Buffer {
        self.0.exposed.store(true, Ordering::Relaxed);
        &self.0.raw
    }

    /// As [`Buffer::raw`], for this crate.
    pub(super) fn inner(&self) -> &wgpu::Buffer {
        &self.0.raw
    }

    /// The slice of all usable bytes.
    #[must_use]
    pub fn whole(&self) -> BufferSlice {
        BufferSlice {
            buffer: self.clone(),
            offset: 0,
            size: self.size(),
        }
    }

    /// The slice of `size` bytes from `offset` on.
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

    /// Offset of the first byte, a multiple of [`OFFSET_ALIGNMENT`].
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Size in bytes, a positive multiple of 4.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }
}

impl Pool {
    /// A buffer, and whether it is reused and may hold stale data. New wgpu buffers read as zero.
    pub(super) fn lease(
        self: &Arc<Self>,
        context: &Context,
        bytes: u64,
        label: &str,
        access: HostAccess,
    ) -> Result<(Buffer, bool)> {
        context.check()?;
        let limits = &context.capabilities.limits;
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

        let reused = self.take(class, access);
        let is_reused = reused.is_some();
        let storage = match reused {
            Some(storage) => storage,
            None => self.allocate(context, class, label, access)?,
        };
        let buffer = Buffer(Arc::new(Lease {
            raw: storage.raw,
            id: storage.id,
            access,
            size,
            exposed: AtomicBool::new(false),
            pool: Arc::downgrade(self),
        }));
        Ok((buffer, is_reused))
    }

    fn allocate(
        &self,
        context: &Context,
        class: u64,
        label: &str,
        access: HostAccess,
    ) -> Result<Storage> {
        let mapping = match access {
            HostAccess::None => wgpu::BufferUsages::empty(),
            HostAccess::Write => wgpu::BufferUsages::MAP_WRITE,
        };
        let create = || {
            let what = || format!("allocating buffer {label:?}");
            context.allocate(what, class, || {
                context.device.create_buffer(&wgpu::BufferDescriptor {
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
            Err(Error::OutOfMemory { .. }) if self.trim() > 0 => {
                // Freed memory that work used is given back once the device is known to be done with it.
                context.wait(None)?;
                create()?
            }
            other => other?,
        };
        context.settle()?;
        self.count_allocation(class);
        Ok(Storage {
            raw,
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            access,
        })
    }
}

/// The smallest size class that holds `size`: 2ⁿ·{16, 17, .., 31}/16, a multiple of 64 and at least 256. At most a sixteenth is wasted, or
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
