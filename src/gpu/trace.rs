//! For the tests of this crate: kernels that another machine computes, or that are compiled by another way, while the adapter holds the memory.
//!
//! A [`StandIn`] is installed once per process, before the first device is opened. It says what the device is taken for, and what becomes of
//! each kernel of this crate. Tests of graphs then run unchanged, and compare what the stand-in computed. Kernels of the caller are not
//! affected. Not part of the public interface; only with the feature `trace`.

use std::sync::OnceLock;

use super::context::Context;
use super::dispatch::Dispatch;
use super::pipelines::Access;

/// What a device is taken for.
#[derive(Debug)]
#[non_exhaustive]
pub struct Disguise<'a> {
    /// Name, type, backend and subgroup sizes.
    pub info: &'a mut wgpu::AdapterInfo,
    /// Those that the device was opened with.
    pub features: &'a mut wgpu::Features,
    /// Those that the device was opened with.
    pub limits: &'a mut wgpu::Limits,
    /// Configurations of the matrix units.
    pub matrices: &'a mut Vec<wgpu::CooperativeMatrixProperties>,
}

/// A kernel of this crate.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Kernel<'a> {
    /// Its whole description; the first word is the template.
    pub key: &'a str,
    /// The text, with entry point `main`.
    pub wgsl: &'a str,
    /// The access of each binding, in order.
    pub accesses: &'a [Access],
}

/// What becomes of a kernel.
#[derive(Debug)]
pub enum Made {
    /// The adapter compiles its WGSL, as without a stand-in.
    Adapter,
    /// The adapter runs this SPIR-V, which binds the same bindings.
    Spirv(Vec<u32>),
    /// [`StandIn::run`] computes its dispatches.
    StandIn,
}

/// Computes or compiles kernels instead of the adapter. A failure panics with its text.
pub trait StandIn: Send + Sync {
    /// Changes what the device is taken for.
    fn disguise(&self, _disguise: Disguise<'_>) {}

    /// Called when a kernel is compiled.
    ///
    /// # Errors
    /// What is wrong with it.
    fn make(&self, kernel: Kernel<'_>) -> Result<Made, String>;

    /// Runs a kernel on the bytes of its bindings.
    ///
    /// # Errors
    /// What went wrong.
    fn run(
        &self,
        kernel: Kernel<'_>,
        workgroups: [u32; 3],
        memory: &mut [Vec<u8>],
    ) -> Result<(), String>;

    /// Called with what the adapter computed for a kernel that it runs itself, if this is `true` for it.
    fn watches(&self, _kernel: Kernel<'_>) -> bool {
        false
    }

    /// The bytes of the bindings before and after a dispatch that is [watched](StandIn::watches).
    fn watch(
        &self,
        _kernel: Kernel<'_>,
        _workgroups: [u32; 3],
        _before: &[Vec<u8>],
        _after: &[Vec<u8>],
    ) {
    }
}

static INSTALLED: OnceLock<Box<dyn StandIn>> = OnceLock::new();

/// Installs a stand-in for all devices that are opened from now on. The first one stays.
pub fn install(stand_in: impl FnOnce() -> Box<dyn StandIn>) {
    INSTALLED.get_or_init(stand_in);
}

pub(super) fn installed() -> Option<&'static dyn StandIn> {
    #[cfg(test)]
    crate::stand_in::prepare();
    INSTALLED.get().map(|stand_in| &**stand_in)
}

/// Whether the stand-in has to see a dispatch.
pub(super) fn is_of_interest(kernel: Kernel<'_>, made: bool) -> bool {
    made || installed().is_some_and(|stand_in| stand_in.watches(kernel))
}

/// Runs one dispatch apart from the others: what is encoded so far is submitted before. A failure panics, because only tests come here.
pub(super) fn run(
    context: &Context,
    encoder: &mut wgpu::CommandEncoder,
    dispatch: &Dispatch,
    turn: usize,
) {
    let Some(stand_in) = installed() else { return };
    let kernel = dispatch.kernel();
    let workgroups = dispatch.workgroups();
    let slices = dispatch.slices(turn);
    let read = |encoder: &mut wgpu::CommandEncoder| -> Vec<Vec<u8>> {
        let staging: Vec<wgpu::Buffer> = slices
            .iter()
            .map(|slice| {
                let staging = context.device.create_buffer(&wgpu::BufferDescriptor {
                    label: Some("trace"),
                    size: slice.size(),
                    usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
                    mapped_at_creation: false,
                });
                let inner = slice.buffer().inner();
                encoder.copy_buffer_to_buffer(inner, slice.offset(), &staging, 0, slice.size());
                staging
            })
            .collect();
        context.submit_part("trace", encoder);
        for buffer in &staging {
            buffer.map_async(wgpu::MapMode::Read, .., |_| ());
        }
        let waited = context.device.poll(wgpu::PollType::wait_indefinitely());
        let bytes = |buffer: &wgpu::Buffer| match buffer.get_mapped_range(..) {
            Ok(view) => view.to_vec(),
            Err(error) => panic!("{}: {error}, {waited:?}", kernel.key),
        };
        staging.iter().map(bytes).collect()
    };
    let mut memory = read(encoder);
    if dispatch.stands_in() {
        if let Err(reason) = stand_in.run(kernel, workgroups, &mut memory) {
            panic!("{}\n{workgroups:?} workgroups: {reason}", kernel.key);
        }
        let writes = slices.iter().zip(&memory).zip(kernel.accesses);
        for ((slice, bytes), _) in writes.filter(|(_, access)| **access == Access::ReadWrite) {
            let inner = slice.buffer().inner();
            context.queue.write_buffer(inner, slice.offset(), bytes);
        }
    } else {
        dispatch.encode_alone(encoder, turn);
        let after = read(encoder);
        stand_in.watch(kernel, workgroups, &memory, &after);
    }
}
