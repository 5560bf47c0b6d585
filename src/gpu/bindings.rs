//! Bind groups, cached by what they bind.

use std::collections::HashMap;
use std::sync::Arc;

use super::context::{Context, within};
use super::pipelines::{Access, Pipeline};
use super::pool::{BufferSlice, Pool};
use crate::error::{Error, Result};

/// Buffers bound to a kernel's bindings. Cloning is cheap; a clone keeps the buffers out of the pool.
///
/// Two are equal if they bind the same ranges of the same buffers to equal bindings.
#[derive(Clone, Debug)]
pub struct BindGroup {
    raw: Arc<wgpu::BindGroup>,
    layout: u64,
    slices: Arc<[BufferSlice]>,
}

impl PartialEq for BindGroup {
    fn eq(&self, other: &Self) -> bool {
        *self.raw == *other.raw
    }
}

impl BindGroup {
    pub(super) fn raw(&self) -> &wgpu::BindGroup {
        &self.raw
    }

    #[cfg(feature = "trace")]
    pub(super) fn slices(&self) -> &[BufferSlice] {
        &self.slices
    }

    /// Fails unless the bind group was made on the same device for a pipeline with the same bindings, and its ranges are as large as the
    /// kernel needs.
    pub(super) fn check(&self, pipeline: &Pipeline) -> Result<()> {
        let reason = if self.layout == pipeline.layout().id {
            too_small(pipeline, &self.slices)
        } else {
            Some("the bind group was made for other bindings or another device".to_owned())
        };
        match reason {
            None => Ok(()),
            Some(reason) => Err(Error::Validation {
                what: format!("dispatch of {:?}", pipeline.key()),
                reason,
            }),
        }
    }
}

/// Counts of the cache of bind groups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BindGroupStats {
    /// Requests served from the cache.
    pub hits: u64,
    /// Bind groups made.
    pub misses: u64,
    /// Bind groups in the cache, in use or not.
    pub cached: u64,
    /// Bind groups dropped because there were more than [`GpuOptions::idle_bind_groups`](super::GpuOptions::idle_bind_groups) idle ones.
    pub evicted: u64,
}

pub(super) fn stats(pool: &Pool) -> BindGroupStats {
    let counts = pool.groups.counts();
    BindGroupStats {
        hits: counts.hits,
        misses: counts.misses,
        cached: counts.cached,
        evicted: counts.evicted,
    }
}

/// As [`Gpu::bind_group`](super::Gpu::bind_group).
pub(super) fn bind(
    context: &Context,
    pool: &Pool,
    pipeline: &Pipeline,
    slices: &[BufferSlice],
) -> Result<BindGroup> {
    context.check()?;
    let ranges = slices
        .iter()
        .map(|slice| (slice.buffer().id(), slice.offset(), slice.size()))
        .collect();
    let key = (pipeline.layout().id, ranges);
    let cached = pool.groups.get(&key);
    if let Some(reason) = conflict(context, pipeline, slices) {
        return Err(Error::Validation {
            what: format!("bind group of {:?}", pipeline.key()),
            reason,
        });
    }
    let raw = match cached {
        Some(raw) => raw,
        None => {
            let raw = create(context, pipeline, slices)?;
            context.settle()?;
            pool.groups.insert(key, raw)
        }
    };
    Ok(BindGroup {
        raw,
        layout: pipeline.layout().id,
        slices: slices.into(),
    })
}

fn create(
    context: &Context,
    pipeline: &Pipeline,
    slices: &[BufferSlice],
) -> Result<wgpu::BindGroup> {
    let what = || format!("bind group of {:?}", pipeline.key());
    let limit = context.capabilities.limits.max_storage_buffer_binding_size;
    for slice in slices {
        within(what, "max_storage_buffer_binding_size", slice.size(), limit)?;
    }
    let entries: Vec<_> = slices
        .iter()
        .zip(0..)
        .map(|(slice, binding)| wgpu::BindGroupEntry {
            binding,
            resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                buffer: slice.buffer().inner(),
                offset: slice.offset(),
                size: wgpu::BufferSize::new(slice.size()),
            }),
        })
        .collect();
    context.run(what, 0, || {
        context
            .device
            .create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some(pipeline.key()),
                layout: &pipeline.layout().group,
                entries: &entries,
            })
    })
}

fn conflict(context: &Context, pipeline: &Pipeline, slices: &[BufferSlice]) -> Option<String> {
    let bindings = pipeline.bindings();
    if bindings.len() != slices.len() {
        return Some(format!(
            "{} bindings, but {} buffers",
            bindings.len(),
            slices.len()
        ));
    }
    let alignment = u64::from(
        context
            .capabilities
            .limits
            .min_storage_buffer_offset_alignment,
    );
    let mut first: HashMap<u64, (usize, Access)> = HashMap::new();
    for (i, (&access, slice)) in bindings.iter().zip(slices).enumerate() {
        if !slice.offset().is_multiple_of(alignment) {
            return Some(format!(
                "binding {i} begins at byte {}, which is not a multiple of {alignment}",
                slice.offset()
            ));
        }
        let (j, other) = *first.entry(slice.buffer().id()).or_insert((i, access));
        if other != access {
            return Some(format!(
                "bindings {j} and {i} read and write the same buffer"
            ));
        }
    }
    too_small(pipeline, slices)
}

fn too_small(pipeline: &Pipeline, slices: &[BufferSlice]) -> Option<String> {
    let sizes = pipeline.sizes().iter().zip(slices);
    let (i, (size, slice)) = sizes
        .enumerate()
        .find(|(_, (size, slice))| slice.size() < **size)?;
    Some(format!(
        "binding {i} needs {size} bytes, but has {}",
        slice.size()
    ))
}
