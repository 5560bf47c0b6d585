//! Attention and its gradients: scores, softmax and weighted sum in one kernel, and no matrix of scores in memory.

use super::{Kernel, Program, Target, View};
use crate::gpu::Layout;
use crate::types::DType;

/// Bytes of workgroup memory of a pair of tiles: WebGPU's baseline limit.
const STORAGE: usize = 16 << 10;
/// Most `vec4`s of one of its own rows that an invocation has in registers, and of one row of sums.
const RESIDENT: usize = 16;

/// Number of rows of the other kind, keys or queries, per step on matrix units.
const OTHERS: usize = 16;
/// Widest head on matrix units: an invocation has the sums of a row of it in registers.
const MOST_WIDE: usize = 128;
/// Number of unused elements between two rows in workgroup memory.
const PAD: usize = 8;

/// Everything that an attention is, but its operands' storage. All columns are counted in `vec4`s.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionKernel {
    pub batch: usize,
    pub heads: usize,
    /// Numbers of queries and of keys per sample.
    pub queries: usize,
    pub keys: usize,
    /// Columns per head, in elements.
    pub columns: usize,
    pub causal: bool,
    pub scale: f32,
    /// Queries, keys and values are side by side in one operand.
    pub packed: bool,
}

/// What an invocation computes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Forward,
    Query,
    Key,
}

/// The operands that all kernels have.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operands {
    /// Queries, or queries, keys and values.
    pub q: Layout,
    /// Keys and values, unless `q` has them.
    pub kv: Option<Layout>,
    pub mask: Option<Layout>,
}

impl AttentionKernel {
    /// q, (kv,) (mask) → statistics, program(y).
    pub fn forward(&self, of: Operands, stats: Layout, program: Program, target: Target) -> Kernel {
        self.kernel(Kind::Forward, of, target)
            .with("width", program.width())
            .write("stats", stats, View::Scalar)
            .flops(4.0 * self.pairs())
            .finish(program)
    }

    /// q, (kv,) (mask,) y, dy, statistics → dq, or the first columns of dqkv; dots.
    pub fn query_gradient(
        &self,
        of: Operands,
        [y, dy, stats]: [Layout; 3],
        [dq, dots]: [Layout; 2],
        target: Target,
    ) -> Kernel {
        self.kernel(Kind::Query, of, target)
            .read("out", y, View::Vec4)
            .read("dy", dy, View::Vec4)
            .read("stats", stats, View::Scalar)
            .write("dq", dq, View::Vec4)
            .write("dots", dots, View::Scalar)
            .flops(6.0 * self.pairs())
    }

    /// q, (kv,) (mask,) dy, statistics, dots → dkv, or the other columns of dqkv.
    pub fn key_gradient(
        &self,
        of: Operands,
        [dy, stats, dots]: [Layout; 3],
        dkv: Layout,
        target: Target,
    ) -> Kernel {
        self.kernel(Kind::Key, of, target)
            .read("dy", dy, View::Vec4)
            .read("stats", stats, View::Scalar)
            .read("dots", dots, View::Scalar)
            .write("dkv", dkv, View::Vec4)
            .flops(8.0 * self.pairs())
    }

    /// Multiply-adds of the scores, the unseen ones of a causal attention included by half.
    fn pairs(&self) -> f64 {
        let all = self.batch * self.heads * self.queries * self.keys * self.columns;
        if self.causal {
            all as f64 / 2.0
        } else {
            all as f64
        }
    }

    /// Number of queries of all heads.
    pub fn total(&self) -> usize {
        self.batch * self.heads * self.queries
    }

    /// The kernel on matrix units, where there are any for the operands.
    fn cooperative(&self, kind: Kind, of: Operands, target: Target) -> Option<Kernel> {
        let units = target.matrix_units?;
        if !units.f16 || of.q.dtype() != DType::F16 || !units.lanes.is_multiple_of(units.size) {
            return None;
        }
        let wide = self.columns.next_multiple_of(units.size);
        let (own, most, name) = match kind {
            Kind::Forward => (self.queries, MOST_WIDE, "attention_cooperative"),
            Kind::Query => (self.queries, MOST_WIDE / 2, "attention_grad_cooperative"),
            Kind::Key => (self.keys, MOST_WIDE / 2, "attention_grad_cooperative"),
        };
        // Both kinds of sums, or probabilities and derivatives.
        let pairs = if kind == Kind::Forward { 1 } else { 2 };
        let storage = |subgroups: usize| {
            let rows = subgroups * units.lanes;
            let others = 2 * OTHERS * (wide + PAD) * 2 + 3 * OTHERS * 4 + 4;
            others + rows * 4 + pairs * rows * ((OTHERS + PAD) * 2 + (OTHERS + 4) * 4)
        };
        let fits = |subgroups: &usize| {
            storage(*subgroups) <= units.storage && subgroups * units.lanes <= units.invocations
        };
        // Powers of two divide the work of loading.
        let wanted = own.div_ceil(units.lanes).next_power_of_two().min(4);
        let mut choices = [4, 2, 1].into_iter().filter(|n| *n <= wanted);
        let subgroups = choices.find(fits).filter(|_| wide <= most)?;
        let rows = subgroups * units.lanes;
        let kernel = self
            .described(name, of)
            .cooperative()
            .tiles([own.div_ceil(rows), self.heads, self.batch])
            .with("size", units.size)
            .with("lanes", units.lanes)
            .with("scalar", units.scalar)
            .with("subgroups", subgroups)
            .with("tile", OTHERS)
            .with("pad", PAD);
        Some(match kind {
            Kind::Forward => kernel,
            Kind::Query => kernel.with("kind", "query"),
            Kind::Key => kernel.with("kind", "key"),
        })
    }

    fn kernel(&self, kind: Kind, of: Operands, target: Target) -> Kernel {
        if let Some(kernel) = self.cooperative(kind, of, target) {
            return kernel;
        }
        let template = match kind {
            Kind::Forward => "attention",
            Kind::Query => "attention_grad_query",
            Kind::Key => "attention_grad_key",
        };
        let d = self.columns / 4;
        let own = match kind {
            Kind::Key => self.keys,
            Kind::Forward | Kind::Query => self.queries,
        };
        // Rows of sums and own rows that an invocation has in registers.
        let most = match kind {
            Kind::Forward => 2 * RESIDENT,
            Kind::Query | Kind::Key => RESIDENT,
        };
        let parts = d.div_ceil(most);
        let resident = match kind {
            Kind::Forward | Kind::Query => d <= RESIDENT,
            Kind::Key if target.barrier_free => d <= RESIDENT,
            Kind::Key => 2 * d <= RESIDENT,
        };
        let (tile, block) = match target.barrier_free {
            true => (0, 4),
            false => {
                let tile = STORAGE / (2 * 16 * d);
                let tile = (1 << tile.ilog2()).min(64);
                (tile, 4.min(tile))
            }
        };
        // Two queries per invocation halve the loads from workgroup memory, where registers suffice.
        let twice = kind == Kind::Forward && 2 * d <= RESIDENT && own > 64;
        let each = if twice && !target.barrier_free { 2 } else { 1 };
        let size = match target.barrier_free {
            true => 16,
            false => own.div_ceil(each).next_power_of_two().clamp(32, 128 / each),
        };
        self.described(template, of)
            .tiles([own.div_ceil(size * each), self.heads * parts, self.batch])
            .with("size", size)
            .with("each", each)
            .with("tile", tile)
            .with("block", block)
            .with("parts", parts)
            .with("held", d.div_ceil(parts))
            .with("resident", resident)
    }

    /// A kernel with the numbers that all have, and its first operands.
    fn described(&self, template: &'static str, of: Operands) -> Kernel {
        let d = self.columns / 4;
        let [k_first, v_first] = match self.packed {
            true => [self.heads * d, 2 * self.heads * d],
            false => [0, self.heads * d],
        };
        let kernel = Kernel::new(template)
            .with("d", d)
            .with("heads", self.heads)
            .with("q_len", self.queries)
            .with("k_len", self.keys)
            .with("k_first", k_first)
            .with("v_first", v_first)
            .with("total", self.total())
            .with("causal", self.causal)
            .with("masked", of.mask.is_some())
            .with("packed", self.packed)
            .with("scale", format!("{:?}", self.scale))
            .read("q", of.q, View::Vec4);
        let kernel = match of.kv {
            Some(kv) => kernel.read("kv", kv, View::Vec4),
            None => kernel,
        };
        match of.mask {
            Some(mask) => kernel.read("mask", mask, View::Scalar),
            None => kernel,
        }
    }
}
