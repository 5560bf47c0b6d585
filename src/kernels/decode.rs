//! Text token by token: a convolution's input with the past of its ring, and the next token out of the logits.

use super::{Kernel, Target, View, row_lanes};
use crate::gpu::Layout;

/// Words of a row of the state before its tokens, see [`Sample`].
pub(crate) const STATE_WORDS: usize = 8;
/// Words of the options before the mask of stop tokens.
pub(crate) const OPTION_WORDS: usize = 8;

/// `vec4`s of a row of x, times taps, that an invocation keeps in registers; wider rows are read again.
const MOST_TAPS_HELD: usize = 16;
/// `vec4`s of logits that an invocation keeps in registers while it draws; longer rows are read again.
const MOST_HELD: usize = 16;

/// A causal, dilated convolution.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Taps {
    pub taps: usize,
    pub dilation: usize,
    pub eps: f32,
}

impl Taps {
    /// Time steps that the ring of a text holds: those from the oldest tap to the current one.
    pub fn ring(self) -> usize {
        (self.taps - 1) * self.dilation + 1
    }

    /// x [B, D], gamma, beta, state → ring [B·R, D], columns [B, k·D'], D' being D rounded up to a multiple of 4.
    pub fn kernel(
        self,
        [x, gamma, beta, state]: [Layout; 4],
        [ring, columns]: [Layout; 2],
        target: Target,
    ) -> Kernel {
        let used = x.cols().div_ceil(4);
        let (lanes, rows) = row_lanes(used, x.rows(), target);
        let each = used.div_ceil(lanes);
        let held = match each * self.taps <= MOST_TAPS_HELD {
            true => each,
            false => 0,
        };
        Kernel::new("decode_taps")
            .items(x.rows() * lanes, rows * lanes)
            .with("lanes", lanes)
            .with("held", held)
            .with("rows", x.rows())
            .with("cols", x.cols())
            .with("used", used)
            .with("taps", self.taps)
            .with("dilation", self.dilation)
            .with("ring", self.ring())
            .with("eps", f64::from(self.eps))
            .read("x", x, View::Vec4)
            .read("gamma", gamma, View::Vec4)
            .read("beta", beta, View::Vec4)
            .read("state", state, View::Scalar)
            .write("ring", ring, View::Vec4)
            .write("columns", columns, View::Vec4)
            .flops(8.0 * x.len() as f64)
    }
}

/// The next token of every row of logits.
///
/// Words of a row of the state: the last token, the position, what the row is doing (0 running, 1 stopped, 2 its logits were not
/// finite), the two halves of its key for random numbers, three unused ones; then `steps` tokens and the logarithms of their
/// probabilities, at the position modulo `steps`.
///
/// Words of the options: 1/temperature, repetition penalty, k, p in units of 2⁻³¹, the token of rows that do not run, three unused
/// ones; then the mask of stop tokens, a bit per token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    /// Whether tokens are drawn.
    pub sampled: bool,
    /// Tokens that the state keeps.
    pub steps: usize,
}

/// Invocations per part of a row of logits: those of a subgroup, mostly, which barriers cost little.
const LANES: usize = 32;

/// What [`Sample`] reads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SampleReads {
    /// f32 [B, V]
    pub logits: Layout,
    /// u32 `[8 + ⌈V/32⌉]`
    pub options: Layout,
    /// [V, D]
    pub table: Layout,
    /// [B, D]
    pub condition: Layout,
    /// u32 [B, 4·P], what [`Sample::parts_kernel`] has found.
    pub parts: Option<Layout>,
}

impl Sample {
    /// Words of a row of the state.
    pub fn state_words(self) -> usize {
        STATE_WORDS + 2 * self.steps
    }

    /// Parts of a row that are worth a kernel of their own: where there are few rows, and where tokens are drawn, since the largest
    /// scores of the parts say where to search.
    pub fn parts(self, rows: usize, vocabulary: usize, target: Target) -> Option<usize> {
        /// Rows per core that keep the machine busy without.
        const FEW: usize = 4;
        let used = vocabulary.div_ceil(4);
        let parts = used.div_ceil(self.span(used, target));
        let worth = (self.sampled || FEW * rows <= target.cores) && !target.barrier_free;
        (parts > 2 && worth).then_some(parts)
    }

    /// `vec4`s of a part. Where tokens are drawn, there are at most as many parts as invocations that choose among them.
    fn span(self, used: usize, target: Target) -> usize {
        match self.sampled {
            true => used.div_ceil(invocations(used, target).min(256)),
            false => used.div_ceil(64).min(4 * LANES),
        }
        .next_multiple_of(LANES)
    }

    /// logits, options, seen → parts u32 [B, 4·P].
    pub fn parts_kernel(
        self,
        [logits, options, seen, parts]: [Layout; 4],
        target: Target,
    ) -> Kernel {
        let each = parts.cols() / 4;
        let used = logits.cols().div_ceil(4);
        Kernel::new("decode_parts")
            .groups(logits.rows() * each)
            .with("size", LANES)
            .with("span", self.span(used, target))
            .with("rows", logits.rows())
            .with("parts", each)
            .with("cols", logits.cols())
            .with("used", used)
            .read("logits", logits, View::Vec4)
            .read("options", options, View::Scalar)
            .read("seen", seen, View::Scalar)
            .write("parts", parts, View::Vec4)
            .flops(8.0 * logits.len() as f64)
    }

    /// `reads` → state u32, seen u32 [B, ⌈V/32⌉] (a bit per token), x [B, D].
    pub fn kernel(
        self,
        reads: SampleReads,
        [state, seen, x]: [Layout; 3],
        target: Target,
    ) -> Kernel {
        let logits = reads.logits;
        let used = logits.cols().div_ceil(4);
        let parts = reads.parts.map_or(0, |parts| parts.cols() / 4);
        let size = match (parts, self.sampled) {
            (0, _) | (_, true) => invocations(used, target),
            // There is nothing else to read.
            (parts, false) => parts.next_power_of_two().clamp(64, 256),
        };
        let each = used.div_ceil(size);
        let held = match self.sampled && each <= MOST_HELD {
            true => each,
            false => 0,
        };
        let kernel = Kernel::new("decode_sample")
            .groups(logits.rows())
            .with("size", size)
            .with("held", held)
            .with("sampled", self.sampled)
            .with("steps", self.steps)
            .with("rows", logits.rows())
            .with("cols", logits.cols())
            .with("used", used)
            .with("parts", parts)
            .with("quick", self.sampled && parts > 0)
            .with("span", self.span(used, target))
            .with("width", x.cols().div_ceil(4))
            .read("logits", logits, View::Vec4)
            .read("options", reads.options, View::Scalar)
            .read("table", reads.table, View::Vec4)
            .read("condition", reads.condition, View::Vec4);
        let kernel = match reads.parts {
            Some(parts) => kernel.read("parts", parts, View::Vec4),
            None => kernel,
        };
        kernel
            .write("state", state, View::Scalar)
            .write("seen", seen, View::Scalar)
            .write("x", x, View::Vec4)
            .flops(8.0 * logits.len() as f64)
    }
}

/// Invocations that share a row of so many `vec4`s.
fn invocations(used: usize, target: Target) -> usize {
    /// 8 KiB of workgroup memory, and as many registers an invocation as 16 `vec4`s take.
    const MOST: usize = 512;
    /// Passes over a row at most. A software driver ends the loops of an invocation after 65 535 iterations.
    const PASSES: usize = 40;
    let most = MOST.min(1 << target.invocations.max(64).ilog2());
    if target.barrier_free {
        let needed = (used * PASSES).div_ceil(65_535).next_power_of_two();
        return needed.clamp(64, most);
    }
    used.next_power_of_two().clamp(64, most)
}
