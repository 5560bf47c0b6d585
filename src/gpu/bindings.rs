//! Bind groups, cached by what they bind.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};

use super::device::Gpu;
use super::guard::within;
use super::lock;
use super::pipelines::{Access, Pipeline};
use super::pool::{Buffer, BufferSlice};
use crate::error::{Error, Result};

/// An executable holds its own bind groups, so the cache may be emptied at any time; this bounds it.
const CAPACITY: usize = 4096;

/// Buffers bound to a kernel's bindings. Cloning is cheap; a clone keeps the buffers out of the pool.
#[derive(Clone, Debug)]
pub struct BindGroup {
    raw: wgpu::BindGroup,
    layout: u64,
    _buffers: Arc<[Buffer]>,
}

impl BindGroup {
    /// The wgpu bind group, for group 0.
    #[must_use]
    pub fn raw(&self) -> &wgpu::BindGroup {
        &self.raw
    }

    /// Fails unless it was made for a pipeline with the same bindings on the same device.
    pub(super) fn check(&self, pipeline: &Pipeline) -> Result<()> {
        if self.layout == pipeline.layout().id {
            return Ok(());
        }
        Err(Error::Validation {
            what: format!("dispatch of {:?}", pipeline.key()),
            reason: "the bind group was made for other bindings or another device".to_owned(),
        })
    }
}

/// Counts of the cache of bind groups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BindGroupStats {
    /// Requests served from the cache.
    pub hits: u64,
    /// Bind groups made.
    pub misses: u64,
}

/// Identity of a binding layout and of the ranges bound: buffer id, offset, size.
type Key = (u64, Vec<(u64, u64, u64)>);

#[derive(Debug, Default)]
struct State {
    groups: HashMap<Key, wgpu::BindGroup>,
    stats: BindGroupStats,
}

#[derive(Debug, Default)]
pub(super) struct BindGroups(Mutex<State>);

impl BindGroups {
    /// Drops the bind groups of these buffers, which would keep their memory alive.
    pub(super) fn forget(&self, buffers: &HashSet<u64>) {
        lock(&self.0)
            .groups
            .retain(|(_, ranges), _| !ranges.iter().any(|(id, ..)| buffers.contains(id)));
    }
}

impl Gpu {
    /// The bind group of `slices` for the bindings of `pipeline`, in order.
    ///
    /// # Errors
    /// [`Error::Validation`] when the number of slices is not that of the bindings, or when one buffer is bound both for
    /// reading and for writing, which wgpu does not allow even for disjoint ranges; [`Error::Limit`] when a slice is too large to bind.
    pub fn bind_group(&self, pipeline: &Pipeline, slices: &[BufferSlice]) -> Result<BindGroup> {
        self.0.guard.check()?;
        let layout = pipeline.layout();
        let group = |raw| BindGroup {
            raw,
            layout: layout.id,
            _buffers: slices.iter().map(|slice| slice.buffer().clone()).collect(),
        };
        let ranges = slices
            .iter()
            .map(|slice| (slice.buffer().id(), slice.offset(), slice.size()))
            .collect();
        let key = (layout.id, ranges);
        {
            let mut state = lock(&self.0.bind_groups.0);
            if let Some(raw) = state.groups.get(&key).cloned() {
                state.stats.hits += 1;
                return Ok(group(raw));
            }
        }
        let raw = self.create_bind_group(pipeline, slices)?;
        let mut state = lock(&self.0.bind_groups.0);
        if state.groups.len() >= CAPACITY {
            state.groups.clear();
        }
        state.stats.misses += 1;
        state.groups.insert(key, raw.clone());
        Ok(group(raw))
    }

    pub(super) fn bind_group_stats(&self) -> BindGroupStats {
        lock(&self.0.bind_groups.0).stats
    }

    fn create_bind_group(
        &self,
        pipeline: &Pipeline,
        slices: &[BufferSlice],
    ) -> Result<wgpu::BindGroup> {
        let what = || format!("bind group of {:?}", pipeline.key());
        if let Some(reason) = conflict(pipeline.bindings(), slices) {
            return Err(Error::Validation {
                what: what(),
                reason,
            });
        }
        let limit = self.capabilities().limits.max_storage_buffer_binding_size;
        for slice in slices {
            within(what, "max_storage_buffer_binding_size", slice.size(), limit)?;
        }
        let entries: Vec<_> = slices
            .iter()
            .zip(0..)
            .map(|(slice, binding)| wgpu::BindGroupEntry {
                binding,
                resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                    buffer: slice.buffer().raw(),
                    offset: slice.offset(),
                    size: wgpu::BufferSize::new(slice.size()),
                }),
            })
            .collect();
        self.0.guard.run(what, 0, || {
            self.device().create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some(pipeline.key()),
                layout: &pipeline.layout().group,
                entries: &entries,
            })
        })
    }
}

fn conflict(bindings: &[Access], slices: &[BufferSlice]) -> Option<String> {
    if bindings.len() != slices.len() {
        return Some(format!(
            "{} bindings, but {} buffers",
            bindings.len(),
            slices.len()
        ));
    }
    let mut first = HashMap::new();
    for (i, (&access, slice)) in bindings.iter().zip(slices).enumerate() {
        let (j, other) = *first.entry(slice.buffer().id()).or_insert((i, access));
        if other != access {
            return Some(format!(
                "bindings {j} and {i} read and write the same buffer"
            ));
        }
    }
    None
}
