//! Host-visible buffers that carry data to and from the device, reused across submissions.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use super::device::Gpu;
use super::guard::within;
use super::lock;
use super::pool::size_class;
use crate::error::{Error, Result};

#[derive(Debug, Default)]
struct State {
    /// Unmapped, for results.
    down: HashMap<u64, Vec<wgpu::Buffer>>,
    /// Mapped for writing.
    up: HashMap<u64, Vec<wgpu::Buffer>>,
    /// Used by a submission; mapped again when that is done. Kept here and not in the callback, which a buffer would
    /// own and which would own the buffer.
    flying: HashMap<u64, wgpu::Buffer>,
    next: u64,
    /// Buffers made.
    made: u64,
}

/// Free lists of staging buffers by size class.
#[derive(Debug, Default)]
pub(super) struct Staging(Mutex<State>);

impl Staging {
    /// Drops the idle buffers.
    pub(super) fn trim(&self) {
        let mut state = lock(&self.0);
        let idle = (
            std::mem::take(&mut state.down),
            std::mem::take(&mut state.up),
        );
        drop(state);
        drop(idle);
    }

    /// Takes an unmapped read-back buffer.
    pub(super) fn give_back(&self, buffer: wgpu::Buffer) {
        let mut state = lock(&self.0);
        state.down.entry(buffer.size()).or_default().push(buffer);
    }

    fn landed(&self, ticket: u64, mapped: bool) {
        let mut state = lock(&self.0);
        if let Some(buffer) = state.flying.remove(&ticket)
            && mapped
        {
            state.up.entry(buffer.size()).or_default().push(buffer);
        }
    }
}

impl Gpu {
    /// An unmapped buffer of at least `bytes` to copy results into.
    pub(super) fn download_staging(&self, bytes: u64) -> Result<wgpu::Buffer> {
        let class = self.staging_class(bytes)?;
        let free = lock(&self.0.staging.0)
            .down
            .get_mut(&class)
            .and_then(Vec::pop);
        match free {
            Some(buffer) => Ok(buffer),
            None => self.create_staging(
                class,
                wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
                false,
            ),
        }
    }

    /// A buffer of at least `bytes` to copy from, mapped for writing.
    pub(super) fn upload_staging(&self, bytes: u64) -> Result<wgpu::Buffer> {
        let class = self.staging_class(bytes)?;
        let free = lock(&self.0.staging.0)
            .up
            .get_mut(&class)
            .and_then(Vec::pop);
        match free {
            Some(buffer) => Ok(buffer),
            None => self.create_staging(
                class,
                wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC,
                true,
            ),
        }
    }

    /// An unmapped buffer that begins with `bytes`, to be copied from; to be returned by [`Gpu::recycle_upload`].
    pub(super) fn filled_staging(&self, bytes: &[u8]) -> Result<wgpu::Buffer> {
        let size = bytes.len() as u64;
        let buffer = self.upload_staging(size)?;
        buffer
            .get_mapped_range_mut(0..size)
            .map_err(|error| Error::Validation {
                what: "writing a staging buffer".to_owned(),
                reason: error.to_string(),
            })?
            .copy_from_slice(bytes);
        buffer.unmap();
        Ok(buffer)
    }

    /// Makes the buffer available again once the work submitted so far is done.
    pub(super) fn recycle_upload(&self, buffer: wgpu::Buffer) {
        let staging = &self.0.staging;
        let mut state = lock(&staging.0);
        let ticket = state.next;
        state.next += 1;
        state.flying.insert(ticket, buffer.clone());
        drop(state);
        let staging = Arc::downgrade(staging);
        buffer.map_async(wgpu::MapMode::Write, .., move |mapped| {
            if let Some(staging) = staging.upgrade() {
                staging.landed(ticket, mapped.is_ok());
            }
        });
    }

    /// Staging buffers made so far.
    pub(super) fn staging_made(&self) -> u64 {
        lock(&self.0.staging.0).made
    }

    fn staging_class(&self, bytes: u64) -> Result<u64> {
        let largest = self.capabilities().limits.max_buffer_size / 4 * 4;
        within(
            || "staging buffer".to_owned(),
            "max_buffer_size",
            bytes,
            largest,
        )?;
        Ok(size_class(bytes).min(largest))
    }

    fn create_staging(
        &self,
        size: u64,
        usage: wgpu::BufferUsages,
        mapped_at_creation: bool,
    ) -> Result<wgpu::Buffer> {
        let what = || "allocating a staging buffer".to_owned();
        lock(&self.0.staging.0).made += 1;
        self.0.guard.run(what, size, || {
            self.device().create_buffer(&wgpu::BufferDescriptor {
                label: Some("staging"),
                size,
                usage,
                mapped_at_creation,
            })
        })
    }
}
