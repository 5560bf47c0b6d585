//! Everything that decodes a batch of one size: buffers, and the dispatches of a token.

use std::sync::Arc;

use encase::{ShaderType, StorageBuffer};

use super::options::DecodeOptions;
use super::weights::{DeviceWeights, Product, matrix, tap_width, vector};
use crate::error::{Error, Result};
use crate::gpu::{BufferSlice, Gpu, Readback, Recorder, Sequence, Sweeper, Tensor};
use crate::kernels::decode::{OPTION_WORDS, STATE_WORDS, Sample, SampleReads};
use crate::kernels::gemm::Gemm;
use crate::kernels::{Instruction, Kernel, Operand, Program, Target, embedding};
use crate::runtime::BoundKernel;
use crate::types::{BinaryOp, Broadcast, DType, Trans, UnaryOp};

/// Tokens per submission. Enough that the host is ahead of the device; a text that has ended costs at most twice as many.
pub(super) const STEPS: usize = 16;

/// Upper bound on the bytes of what a product with a split K keeps.
const LARGEST_PARTS: u64 = 64 << 20;

/// What [`Sample`] reads of [`DecodeOptions`].
#[derive(ShaderType)]
struct SampleOptions {
    inverse_temperature: f32,
    repetition_penalty: f32,
    top_k: u32,
    /// In units of 2⁻³¹.
    top_p: u32,
    padding: u32,
    unused: [u32; 3],
    #[shader(size(runtime))]
    stop: Vec<u32>,
}

/// What a row is doing, as the device says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Doing {
    Running,
    Stopped,
    /// Its logits were not finite.
    Failed,
}

/// The state of a row as it came back.
pub(super) struct RowState<'a>(&'a [u32]);

impl RowState<'_> {
    pub fn doing(&self) -> Doing {
        match self.0[2] {
            0 => Doing::Running,
            1 => Doing::Stopped,
            _ => Doing::Failed,
        }
    }

    /// Token and logarithm of its probability of step `i` of the last submission.
    pub fn token(&self, i: usize) -> (u32, f32) {
        let tokens = &self.0[STATE_WORDS..];
        (tokens[i], f32::from_bits(tokens[STEPS + i]))
    }
}

/// The states of all rows.
pub(super) struct States {
    words: Vec<u32>,
}

impl States {
    pub fn row(&self, row: usize) -> RowState<'_> {
        let words = sample(false).state_words();
        RowState(&self.words[row * words..][..words])
    }
}

fn sample(sampled: bool) -> Sample {
    Sample {
        sampled,
        steps: STEPS,
    }
}

/// A batch of texts that is decoded: its memory and its dispatches. Used by one thread at a time.
#[derive(Debug)]
pub(super) struct Network {
    gpu: Gpu,
    pub batch: usize,
    pub sampled: bool,
    state: Tensor,
    options: Tensor,
    seen: Tensor,
    z: Tensor,
    ids: Tensor,
    begin: Vec<BoundKernel>,
    step: Vec<BoundKernel>,
    vocabulary: usize,
    /// The operands stay while dispatches refer to them.
    _weights: Arc<DeviceWeights>,
    /// Behind everything that holds kernels.
    _sweeper: Sweeper,
}

impl Network {
    pub fn new(
        gpu: &Gpu,
        weights: &Arc<DeviceWeights>,
        batch: usize,
        sampled: bool,
    ) -> Result<Self> {
        let w = &**weights;
        let (dtype, width) = (w.dtype, w.width);
        let target = Target::new(gpu.capabilities());
        let sample = sample(sampled);
        let masks = w.vocabulary.div_ceil(32);
        let tensor = |layout| Tensor::zeroed(gpu, layout);
        let state = tensor(matrix(batch, sample.state_words(), DType::U32)?)?;
        let options = tensor(vector(OPTION_WORDS + masks, DType::U32)?)?;
        let seen = tensor(matrix(batch, masks, DType::U32)?)?;
        let z = tensor(matrix(batch, w.embedding, dtype)?)?;
        let ids = tensor(vector(batch, DType::U32)?)?;
        let condition = tensor(matrix(batch, width, dtype)?)?;
        // A block reads one and writes the other.
        let x = [
            tensor(matrix(batch, width, dtype)?)?,
            tensor(matrix(batch, width, dtype)?)?,
        ];
        let h = tensor(matrix(batch, w.hidden, dtype)?)?;
        let logits = tensor(matrix(batch, w.vocabulary, DType::F32)?)?;

        let mut begin = Steps::new(gpu, target);
        begin.product(&z, &w.condition, &[], &condition)?;
        begin.first(&w.table, &ids, &condition, &x[0])?;
        let mut step = Steps::new(gpu, target);
        let mut turn = 0;
        for block in &w.blocks {
            let [x, y] = [&x[turn], &x[1 - turn]];
            let taps = block.taps;
            let slots = batch.saturating_mul(taps.ring());
            let ring = tensor(matrix(slots, width, dtype)?)?;
            let columns = tensor(matrix(batch, taps.taps * tap_width(width), dtype)?)?;
            let reads = [x, &block.gamma, &block.beta, &state];
            let kernel = taps.kernel(
                reads.map(|tensor| *tensor.layout()),
                [*ring.layout(), *columns.layout()],
                target,
            );
            step.push(&kernel, &[&reads[..], &[&ring, &columns]].concat())?;
            step.product(&columns, &block.conv1, &[After::Unary(w.gelu)], &h)?;
            step.product(&h, &block.conv2, &[After::Add(x)], y)?;
            turn = 1 - turn;
        }
        step.product(&x[turn], &w.head, &[], &logits)?;
        let parts = sample.parts(batch, w.vocabulary, target);
        let parts = parts.map(|parts| tensor(matrix(batch, 4 * parts, DType::U32)?));
        let parts = parts.transpose()?;
        if let Some(parts) = &parts {
            let places = [&logits, &options, &seen, parts];
            let kernel = sample.parts_kernel(places.map(|tensor| *tensor.layout()), target);
            step.push(&kernel, &places)?;
        }
        let reads = SampleReads {
            logits: *logits.layout(),
            options: *options.layout(),
            table: *w.table.layout(),
            condition: *condition.layout(),
            parts: parts.as_ref().map(|parts| *parts.layout()),
        };
        let kernel = sample.kernel(
            reads,
            [*state.layout(), *seen.layout(), *x[0].layout()],
            target,
        );
        let mut places = vec![&logits, &options, &w.table, &condition];
        places.extend(&parts);
        places.extend([&state, &seen, &x[0]]);
        step.push(&kernel, &places)?;
        Ok(Self {
            batch,
            sampled: sample.sampled,
            state,
            options,
            seen,
            z,
            ids,
            begin: begin.kernels,
            step: step.kernels,
            vocabulary: w.vocabulary,
            _weights: Arc::clone(weights),
            _sweeper: Sweeper(gpu.clone()),
            gpu: gpu.clone(),
        })
    }

    /// Writes what a batch begins with: z [n, E], n ≤ B; the other rows do not run. `place`: the number of the first text, and the
    /// position that it begins at.
    pub fn begin(
        &self,
        recorder: &mut Recorder,
        z: &[f32],
        [first, position]: [u64; 2],
        tokens: &Tokens<'_>,
        options: &DecodeOptions,
    ) -> Result<()> {
        let width = self.z.layout().cols();
        let n = z.len() / width;
        let mut all = z.to_vec();
        all.resize(self.batch * width, 0.0);
        recorder.upload(&self.z, &all)?;
        recorder.upload(&self.ids, &vec![tokens.start; self.batch])?;
        let words = sample(false).state_words();
        let mut state = vec![0; self.batch * words];
        for (row, state) in state.chunks_exact_mut(words).enumerate() {
            let stream = options.first_stream.wrapping_add(first + row as u64);
            let key = stream_key(options.seed, stream);
            state[0] = tokens.start;
            state[1] = position as u32;
            state[2] = u32::from(row >= n);
            state[3] = key as u32;
            state[4] = (key >> 32) as u32;
        }
        recorder.upload(&self.state, &state)?;
        let masks = self.seen.layout().cols();
        let mut seen = vec![0; self.batch * masks];
        for row in seen.chunks_exact_mut(masks) {
            row[tokens.start as usize / 32] |= 1 << (tokens.start % 32);
        }
        recorder.upload(&self.seen, &seen)?;
        let mut stop = vec![0; masks];
        for &token in tokens.stop {
            stop[token as usize / 32] |= 1 << (token % 32);
        }
        let top_k = options.top_k.unwrap_or(usize::MAX).min(self.vocabulary);
        let given = SampleOptions {
            inverse_temperature: options.temperature.recip().min(f32::MAX),
            repetition_penalty: options.repetition_penalty,
            // A vocabulary fits 32 bits.
            top_k: top_k as u32,
            top_p: ((f64::from(options.top_p) * 2f64.powi(31)).ceil() as u32).max(1),
            padding: tokens.padding,
            unused: [0; 3],
            stop,
        };
        let mut bytes = StorageBuffer::new(Vec::new());
        bytes.write(&given).map_err(|error| Error::Validation {
            what: "writing the options of sampling".into(),
            reason: error.to_string(),
        })?;
        recorder.write(self.options.slice(), &bytes.into_inner())?;
        self.begin
            .iter()
            .for_each(|kernel| recorder.push(&kernel.work));
        Ok(())
    }

    /// Adds a token to every text.
    pub fn step(&self, recorder: &mut Recorder) {
        self.step
            .iter()
            .for_each(|kernel| recorder.push(&kernel.work));
    }

    /// Submits, and brings the states back.
    pub fn submit(&self, recorder: Recorder) -> Result<Readback<States>> {
        let layout = *self.state.layout();
        recorder.read_back(std::slice::from_ref(self.state.slice()), move |pieces| {
            let words = layout.unpack(&pieces.concat())?;
            Ok(States { words })
        })
    }

    pub fn recorder(&self) -> Recorder {
        self.gpu.recorder("decode")
    }

    /// The dispatches of a token.
    pub fn sequence(&self) -> Sequence {
        Sequence::of(self.step.iter().map(|kernel| &kernel.work), 0)
    }
}

/// Tokens that mean something.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tokens<'a> {
    pub start: u32,
    pub padding: u32,
    /// What ends a text.
    pub stop: &'a [u32],
}

/// 64 bits that a text's draws depend on: SplitMix64, Steele, Lea & Flood, OOPSLA 2014.
fn stream_key(seed: u64, stream: u64) -> u64 {
    let mix = |x: u64| {
        let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    };
    mix(mix(seed) ^ stream)
}

/// What happens to a product's sums after the bias.
enum After<'a> {
    Unary(UnaryOp),
    Add(&'a Tensor),
}

/// Dispatches in the making.
struct Steps<'a> {
    gpu: &'a Gpu,
    target: Target,
    kernels: Vec<BoundKernel>,
}

impl<'a> Steps<'a> {
    fn new(gpu: &'a Gpu, target: Target) -> Self {
        Self {
            gpu,
            target,
            kernels: Vec::new(),
        }
    }

    fn push(&mut self, kernel: &Kernel, places: &[&Tensor]) -> Result<()> {
        let slices: Vec<BufferSlice> = places.iter().map(|place| place.slice().clone()).collect();
        let bound = BoundKernel::new(self.gpu, self.target, kernel, &[slices])?;
        self.kernels.push(bound);
        Ok(())
    }

    /// y = after(x·Wᵀ + b)
    fn product(
        &mut self,
        x: &Tensor,
        product: &Product,
        after: &[After<'_>],
        y: &Tensor,
    ) -> Result<()> {
        let mut places = vec![&product.bias];
        let mut instructions = vec![
            Instruction::Sum,
            Instruction::Load(0),
            Instruction::Binary(BinaryOp::Add, 0, 1),
        ];
        let mut operands = vec![Operand {
            layout: *product.bias.layout(),
            broadcast: Broadcast::Cols,
        }];
        for after in after {
            let last = instructions.len() - 1;
            match *after {
                After::Unary(op) => instructions.push(Instruction::Unary(op, last)),
                After::Add(tensor) => {
                    instructions.push(Instruction::Load(operands.len()));
                    instructions.push(Instruction::Binary(BinaryOp::Add, last, last + 1));
                    operands.push(Operand {
                        layout: *tensor.layout(),
                        broadcast: Broadcast::Same,
                    });
                    places.push(tensor);
                }
            }
        }
        let program = Program {
            rows: y.layout().rows(),
            cols: y.layout().cols(),
            operands,
            results: vec![(instructions.len() - 1, *y.layout())],
            instructions,
        };
        let [a, b] = [*x.layout(), *product.weight.layout()];
        let gemm = Gemm::new(a, b, Trans::NT, program.width(), self.target);
        let limit = self
            .gpu
            .capabilities()
            .limits
            .max_storage_buffer_binding_size
            .min(LARGEST_PARTS);
        let gemm = gemm.candidates(&program, limit)[0];
        if gemm.splits() == 1 {
            let places = [&[x, &product.weight], places.as_slice(), &[y]].concat();
            return self.push(&gemm.single(program), &places);
        }
        let rows = gemm.splits() * program.rows;
        let partial = Tensor::zeroed(self.gpu, matrix(rows, program.cols, DType::F32)?)?;
        let first = gemm.partial(*partial.layout());
        self.push(&first, &[x, &product.weight, &partial])?;
        let places = [&[&partial], places.as_slice(), &[y]].concat();
        self.push(&gemm.add_up(*partial.layout(), program), &places)
    }

    /// x = table[ids] + condition
    fn first(
        &mut self,
        table: &Tensor,
        ids: &Tensor,
        condition: &Tensor,
        x: &Tensor,
    ) -> Result<()> {
        let program = Program {
            rows: x.layout().rows(),
            cols: x.layout().cols(),
            operands: vec![Operand {
                layout: *condition.layout(),
                broadcast: Broadcast::Same,
            }],
            instructions: vec![
                Instruction::Sum,
                Instruction::Load(0),
                Instruction::Binary(BinaryOp::Add, 0, 1),
            ],
            results: vec![(2, *x.layout())],
        };
        let kernel = embedding::gather(*table.layout(), *ids.layout(), program);
        self.push(&kernel, &[table, ids, condition, x])
    }
}
