//! The k best scores of every row of a matrix, in as many dispatches as it takes.

use std::sync::Arc;

use crate::error::Result;
use crate::gpu::{
    Alignment, Buffer, BufferSlice, Dispatch, Gpu, Layout, Pipeline, Recorder, Sweeper, Tensor,
};
use crate::kernels::top_k::TopK;
use crate::kernels::{Kernel, Target};
use crate::types::DType;

#[derive(Debug)]
struct Stage {
    pipeline: Arc<Pipeline>,
    workgroups: [u32; 3],
    /// Numbers and indices that it writes; the last stage writes where the caller says.
    to: Option<[Buffer; 2]>,
}

/// Finds the `k` best of every row of scores [rows, cols].
#[derive(Debug)]
pub(crate) struct Selection {
    gpu: Gpu,
    stages: Vec<Stage>,
    layouts: [Layout; 2],
    /// Behind everything that holds kernels.
    _sweeper: Sweeper,
}

impl Selection {
    /// The largest `k`.
    pub const MOST: usize = TopK::MOST;

    /// For scores with this layout, f32, and `k` in `1..=MOST`.
    ///
    /// # Errors
    /// What compiling and the device return.
    pub fn new(gpu: &Gpu, scores: Layout, k: usize) -> Result<Self> {
        let target = Target::new(gpu.capabilities());
        let kernels = TopK::new(k, target);
        let filled = Self::filled()?;
        let matrix = |cols, dtype| Layout::new(scores.rows(), cols, dtype, Alignment::Bytes64);
        let mut stages = Vec::new();
        let mut from: Option<[Layout; 2]> = None;
        loop {
            let cols = from.map_or(scores.cols(), |[x, _]| x.cols());
            let pieces = kernels.pieces(cols);
            let to = [
                matrix(pieces * k, DType::F32)?,
                matrix(pieces * k, DType::U32)?,
            ];
            let kernel: Kernel = match from {
                None => kernels.first(scores, filled, to),
                Some(from) => kernels.next(from, to),
            };
            let buffers = match pieces {
                1 => None,
                _ => {
                    let [y, index] = to.map(|layout| gpu.buffer(layout.size_bytes(), "candidates"));
                    Some([y?, index?])
                }
            };
            stages.push(Stage {
                pipeline: gpu.trusted_pipeline(&kernel.key(target), || kernel.source(target))?,
                workgroups: kernel.workgroups(),
                to: buffers,
            });
            from = Some(to);
            if pieces == 1 {
                return Ok(Self {
                    gpu: gpu.clone(),
                    stages,
                    layouts: to,
                    _sweeper: Sweeper(gpu.clone()),
                });
            }
        }
    }

    /// Layout of the number of columns that are filled.
    pub fn filled() -> Result<Layout> {
        Layout::new(1, 1, DType::U32, Alignment::Bytes16)
    }

    /// Layouts of the results: scores [rows, k] in f32 and their columns in u32, best first. Where fewer columns are filled, the rest are
    /// columns that are not.
    pub fn layouts(&self) -> [Layout; 2] {
        self.layouts
    }

    /// Records the dispatches: scores; a u32 on the device, how many of their columns are filled → results with
    /// [`layouts`](Self::layouts), in buffers of their own.
    ///
    /// # Errors
    /// What binding returns.
    pub fn record(
        &self,
        recorder: &mut Recorder,
        scores: &Tensor,
        filled: &BufferSlice,
        results: [&BufferSlice; 2],
    ) -> Result<()> {
        let mut from = [scores.slice().clone(), filled.clone()];
        for stage in &self.stages {
            let to = match &stage.to {
                Some(buffers) => [buffers[0].whole(), buffers[1].whole()],
                None => results.map(BufferSlice::clone),
            };
            let slices = [&from[0], &from[1], &to[0], &to[1]].map(BufferSlice::clone);
            let bind_group = self.gpu.bind_group(&stage.pipeline, &slices)?;
            let pipeline = Arc::clone(&stage.pipeline);
            let dispatch = Dispatch::new(&self.gpu, pipeline, [bind_group], stage.workgroups)?;
            recorder.push(&dispatch);
            from = to;
        }
        Ok(())
    }
}
