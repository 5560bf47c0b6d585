//! A list of dispatches and copies that becomes one submission.

use std::sync::Arc;

use super::bindings::BindGroup;
use super::device::Gpu;
use super::dispatch::{Dispatch, Sequence};
use super::element::Element;
use super::pipelines::Pipeline;
use super::pool::BufferSlice;
use super::readback::Readback;
use super::tensor::Tensor;
use crate::error::{Error, Result};

#[derive(Debug)]
enum Command {
    Dispatch(Dispatch),
    Copy {
        from: BufferSlice,
        to: BufferSlice,
    },
    Clear(BufferSlice),
    /// From `start` in [`Recorder::host`].
    Write {
        start: u64,
        bytes: u64,
        to: BufferSlice,
    },
}

/// Collects work in order for one submission. A recorder that is dropped without [`submit`](Recorder::submit) does nothing.
///
/// Dispatches in a row share one compute pass. What is recorded keeps its buffers.
#[derive(Debug)]
#[must_use = "nothing runs before it is submitted"]
pub struct Recorder {
    gpu: Gpu,
    label: String,
    commands: Vec<Command>,
    host: Vec<u8>,
}

/// Work that was submitted to the device.
#[derive(Clone, Debug)]
pub struct Submission {
    gpu: Gpu,
    index: wgpu::SubmissionIndex,
}

impl Submission {
    /// Blocks until the work is done.
    ///
    /// # Errors
    /// [`Error::DeviceLost`]
    pub fn wait(&self) -> Result<()> {
        self.gpu.context().wait(Some(self.index.clone()))
    }
}

impl Gpu {
    /// An empty recorder. The label shows in graphics debuggers and errors.
    pub fn recorder(&self, label: impl Into<String>) -> Recorder {
        Recorder {
            gpu: self.clone(),
            label: label.into(),
            commands: Vec::new(),
            host: Vec::new(),
        }
    }
}

impl Recorder {
    /// Runs a kernel with this number of workgroups per dimension.
    ///
    /// # Errors
    /// [`Error::Limit`] when a number of workgroups is zero or above the device's limit, [`Error::Validation`] when the
    /// bind group was made for other bindings.
    pub fn dispatch(
        &mut self,
        pipeline: &Arc<Pipeline>,
        bind_group: &BindGroup,
        workgroups: [u32; 3],
    ) -> Result<()> {
        let bind_groups = [bind_group.clone()];
        let pipeline = Arc::clone(pipeline);
        let dispatch = Dispatch::new(&self.gpu, pipeline, bind_groups, workgroups)?;
        self.push(&dispatch);
        Ok(())
    }

    /// Runs a dispatch, on the memory of turn 0.
    pub(crate) fn push(&mut self, dispatch: &Dispatch) {
        self.commands.push(Command::Dispatch(dispatch.clone()));
    }

    /// Runs all dispatches of a sequence, in order.
    pub fn sequence(&mut self, sequence: &Sequence) {
        sequence
            .dispatches
            .iter()
            .for_each(|dispatch| self.push(dispatch));
    }

    /// Copies all bytes of `from` to `to`.
    ///
    /// # Errors
    /// [`Error::Layout`] when the sizes differ or both are the same buffer.
    pub fn copy(&mut self, from: &BufferSlice, to: &BufferSlice) -> Result<()> {
        check_copy(from, to)?;
        self.commands.push(Command::Copy {
            from: from.clone(),
            to: to.clone(),
        });
        Ok(())
    }

    /// Sets all bytes to zero.
    pub fn clear(&mut self, slice: &BufferSlice) {
        self.commands.push(Command::Clear(slice.clone()));
    }

    /// Writes host bytes to the beginning of `to`, in order with the rest of the recording.
    ///
    /// All writes of a recorder share one reused staging buffer.
    ///
    /// # Errors
    /// [`Error::Layout`] when there are more bytes than `to` holds, or not a positive multiple of 4.
    pub fn write(&mut self, to: &BufferSlice, bytes: &[u8]) -> Result<()> {
        let size = bytes.len() as u64;
        if size == 0 || !size.is_multiple_of(4) || size > to.size() {
            return Err(Error::Layout {
                rows: 1,
                cols: bytes.len(),
                reason: format!("cannot write {size} bytes to {}", to.size()),
            });
        }
        self.commands.push(Command::Write {
            start: self.host.len() as u64,
            bytes: size,
            to: to.clone(),
        });
        self.host.extend_from_slice(bytes);
        Ok(())
    }

    /// Writes dense row-major host data to a tensor, in order with the rest of the recording. Padding becomes zero.
    ///
    /// # Errors
    /// As [`Layout::pack`](crate::gpu::Layout::pack).
    pub fn upload<T: Element>(&mut self, to: &Tensor, data: &[T]) -> Result<()> {
        self.write(to.slice(), &to.layout().pack(data)?)
    }

    /// Submits everything and returns without waiting.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::DeviceLost`]; [`Error::Validation`] when wgpu rejects the commands.
    pub fn submit(self) -> Result<Submission> {
        let index = self.send(|_| ())?;
        self.gpu.context().settle()?;
        Ok(Submission {
            gpu: self.gpu,
            index,
        })
    }

    /// As [`Recorder::submit`], and brings the content of `slices` back: `decode` gets the bytes of each, in order.
    ///
    /// # Errors
    /// As [`Recorder::submit`]; [`Error::Limit`] when the slices exceed one buffer.
    pub fn read_back<T>(
        self,
        slices: &[BufferSlice],
        decode: impl FnOnce(&[&[u8]]) -> Result<T> + Send + 'static,
    ) -> Result<Readback<T>> {
        let sizes: Vec<u64> = slices.iter().map(BufferSlice::size).collect();
        let inner = &self.gpu.0;
        let staging = inner.staging.download(&inner.context, sizes.iter().sum())?;
        let index = self.send(|encoder| {
            let mut at = 0;
            for slice in slices {
                encoder.copy_buffer_to_buffer(
                    slice.buffer().inner(),
                    slice.offset(),
                    &staging,
                    at,
                    slice.size(),
                );
                at += slice.size();
            }
        })?;
        Readback::new(self.gpu, staging, index, sizes, Box::new(decode))
    }

    fn send(&self, last: impl FnOnce(&mut wgpu::CommandEncoder)) -> Result<wgpu::SubmissionIndex> {
        let inner = &self.gpu.0;
        let host = match self.host.as_slice() {
            [] => None,
            bytes => Some(inner.staging.filled(&inner.context, bytes)?),
        };
        let encode = |encoder: &mut wgpu::CommandEncoder| {
            let dispatches = self.encode(encoder, host.as_ref());
            last(encoder);
            dispatches
        };
        inner.context.submit(
            &self.label,
            encode,
            || (),
            |index| {
                if let Some(host) = &host {
                    inner.staging.recycle(host.clone());
                }
                index
            },
        )
    }

    /// Returns the number of dispatches.
    fn encode(&self, encoder: &mut wgpu::CommandEncoder, host: Option<&wgpu::Buffer>) -> u64 {
        let mut dispatches = 0;
        let mut commands = self.commands.iter().peekable();
        while let Some(command) = commands.next() {
            match command {
                Command::Dispatch(first) => {
                    dispatches += 1;
                    #[cfg(feature = "trace")]
                    if first.is_apart() {
                        super::trace::run(self.gpu.context(), encoder, first, 0);
                        continue;
                    }
                    let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                        label: Some(&self.label),
                        timestamp_writes: None,
                    });
                    first.encode(&mut pass, 0);
                    while let Some(Command::Dispatch(next)) = commands.next_if(
                        |command| matches!(command, Command::Dispatch(next) if !next.is_apart()),
                    ) {
                        next.encode(&mut pass, 0);
                        dispatches += 1;
                    }
                }
                Command::Copy { from, to } => encoder.copy_buffer_to_buffer(
                    from.buffer().inner(),
                    from.offset(),
                    to.buffer().inner(),
                    to.offset(),
                    from.size(),
                ),
                Command::Clear(slice) => {
                    encoder.clear_buffer(slice.buffer().inner(), slice.offset(), Some(slice.size()))
                }
                Command::Write { start, bytes, to } => {
                    // `send` made the staging buffer if anything was written.
                    if let Some(host) = host {
                        encoder.copy_buffer_to_buffer(
                            host,
                            *start,
                            to.buffer().inner(),
                            to.offset(),
                            *bytes,
                        );
                    }
                }
            }
        }
        dispatches
    }
}

/// Fails unless both have one size and lie in different buffers.
pub(super) fn check_copy(from: &BufferSlice, to: &BufferSlice) -> Result<()> {
    let reason = if from.size() != to.size() {
        format!("copy of {} bytes to {}", from.size(), to.size())
    } else if from.buffer().id() == to.buffer().id() {
        "copy inside one buffer".to_owned()
    } else {
        return Ok(());
    };
    Err(Error::Layout {
        rows: 1,
        cols: from.size() as usize,
        reason,
    })
}
