//! Host-visible buffers that carry data to and from the device, reused across submissions.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};

use super::context::{Context, inaccessible, within};
use super::lock::lock;
use super::pool::size_class;
use crate::error::Result;

#[derive(Debug, Default)]
struct State {
    /// Unmapped, for results.
    down: HashMap<u64, Vec<wgpu::Buffer>>,
    /// Mapped for writing.
    up: HashMap<u64, Vec<wgpu::Buffer>>,
    /// Bytes of both.
    idle_bytes: u64,
    /// Used by a submission, and mapped again when that is done. They are kept here and not in the callback, because a buffer owns its
    /// callback, and the callback would own the buffer.
    flying: HashMap<u64, wgpu::Buffer>,
    next: u64,
    /// Number of buffers made.
    made: u64,
}

/// Free lists of staging buffers by size class.
#[derive(Debug)]
pub(super) struct Staging {
    state: Mutex<State>,
    most_idle: u64,
}

impl State {
    fn pop(
        &mut self,
        list: fn(&mut Self) -> &mut HashMap<u64, Vec<wgpu::Buffer>>,
        class: u64,
    ) -> Option<wgpu::Buffer> {
        let buffer = list(self).get_mut(&class)?.pop()?;
        self.idle_bytes -= class;
        Some(buffer)
    }

    /// Keeps an idle buffer while there is room for it.
    fn keep(
        &mut self,
        list: fn(&mut Self) -> &mut HashMap<u64, Vec<wgpu::Buffer>>,
        buffer: wgpu::Buffer,
        most: u64,
    ) {
        let class = buffer.size();
        if self.idle_bytes + class <= most {
            self.idle_bytes += class;
            list(self).entry(class).or_default().push(buffer);
        }
    }
}

impl Staging {
    /// Sets the upper bound on the bytes of idle buffers.
    pub(super) fn new(most_idle: u64) -> Self {
        Self {
            state: Mutex::default(),
            most_idle,
        }
    }

    /// Drops the idle buffers.
    pub(super) fn trim(&self) {
        let mut state = lock(&self.state);
        let idle = (
            std::mem::take(&mut state.down),
            std::mem::take(&mut state.up),
        );
        state.idle_bytes = 0;
        drop(state);
        drop(idle);
    }

    /// Staging buffers made so far.
    pub(super) fn made(&self) -> u64 {
        lock(&self.state).made
    }

    /// Takes an unmapped read-back buffer.
    pub(super) fn give_back(&self, buffer: wgpu::Buffer) {
        lock(&self.state).keep(|state| &mut state.down, buffer, self.most_idle);
    }

    /// An unmapped buffer of at least `bytes` to copy results into.
    pub(super) fn download(&self, context: &Context, bytes: u64) -> Result<wgpu::Buffer> {
        let class = staging_class(context, bytes)?;
        let free = lock(&self.state).pop(|state| &mut state.down, class);
        match free {
            Some(buffer) => Ok(buffer),
            None => self.create(
                context,
                class,
                wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
                false,
            ),
        }
    }

    /// A buffer of at least `bytes` to copy from, mapped for writing.
    pub(super) fn upload(&self, context: &Context, bytes: u64) -> Result<wgpu::Buffer> {
        let class = staging_class(context, bytes)?;
        let free = lock(&self.state).pop(|state| &mut state.up, class);
        match free {
            Some(buffer) => Ok(buffer),
            None => self.create(
                context,
                class,
                wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC,
                true,
            ),
        }
    }

    /// An unmapped buffer that begins with `bytes`, to be copied from; to be returned by [`Staging::recycle`].
    pub(super) fn filled(&self, context: &Context, bytes: &[u8]) -> Result<wgpu::Buffer> {
        let size = bytes.len() as u64;
        let buffer = self.upload(context, size)?;
        buffer
            .get_mapped_range_mut(0..size)
            .map_err(|error| inaccessible("writing a staging buffer", &error))?
            .copy_from_slice(bytes);
        buffer.unmap();
        Ok(buffer)
    }

    /// Makes the buffer available again once the work submitted so far is done.
    pub(super) fn recycle(self: &Arc<Self>, buffer: wgpu::Buffer) {
        let mut state = lock(&self.state);
        let number = state.next;
        state.next += 1;
        state.flying.insert(number, buffer.clone());
        drop(state);
        let ticket = Ticket {
            staging: Arc::downgrade(self),
            number,
            mapped: false,
        };
        buffer.map_async(wgpu::MapMode::Write, .., move |mapped| {
            // All of it moves in here, to be dropped here.
            let mut ticket = ticket;
            ticket.mapped = mapped.is_ok();
        });
    }

    fn landed(&self, ticket: u64, mapped: bool) {
        let mut state = lock(&self.state);
        let buffer = state.flying.remove(&ticket);
        match buffer {
            Some(buffer) if mapped => state.keep(|state| &mut state.up, buffer, self.most_idle),
            buffer => {
                drop(state);
                drop(buffer);
            }
        }
    }

    fn create(
        &self,
        context: &Context,
        size: u64,
        usage: wgpu::BufferUsages,
        mapped_at_creation: bool,
    ) -> Result<wgpu::Buffer> {
        let what = || "allocating a staging buffer".to_owned();
        lock(&self.state).made += 1;
        context.allocate(what, size, || {
            context.device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("staging"),
                size,
                usage,
                mapped_at_creation,
            })
        })
    }
}

/// Owned by the callback of a mapping. It is dropped when the callback has run, or without a run if another callback panicked.
struct Ticket {
    staging: Weak<Staging>,
    number: u64,
    mapped: bool,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(staging) = self.staging.upgrade() {
            staging.landed(self.number, self.mapped);
        }
    }
}

fn staging_class(context: &Context, bytes: u64) -> Result<u64> {
    let largest = context.capabilities.limits.max_buffer_size / 4 * 4;
    within(
        || "staging buffer".to_owned(),
        "max_buffer_size",
        bytes,
        largest,
    )?;
    Ok(size_class(bytes).min(largest))
}
