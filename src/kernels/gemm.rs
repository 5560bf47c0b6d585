//! Matrix products, with any elementwise program after the sums.

use std::fmt;

use super::gemm_choice::{Extents, Machine, Parts, Speed, rank};
use super::gemm_cooperative::{self as cooperative, Work};
use super::gemm_windows::{Role, Windows};
use super::{BLOCK, Instruction, Kernel, Program, Target, View};
use crate::gpu::{Layout, MatrixUnits};
use crate::types::{DType, Trans};

/// A workgroup's tile and an invocation's share of it.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Tile {
    bm: usize,
    bn: usize,
    tm: usize,
    tn: usize,
    alone: f64,
    busy: f64,
    resident: usize,
}

impl Tile {
    fn speed(self) -> Speed {
        Speed {
            rows: self.bm,
            cols: self.bn,
            depth: DEPTH,
            alone: self.alone,
            busy: self.busy,
            resident: self.resident,
        }
    }
}

impl fmt::Display for Tile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { bm, bn, tm, tn, .. } = self;
        write!(f, "{bm}x{bn}x{DEPTH} {tm}x{tn}")
    }
}

/// Which kernel computes a product.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Tier {
    /// Without workgroup memory.
    Direct,
    /// For a few rows: the invocations of a workgroup share K.
    Skinny,
    /// Tiles in workgroup memory.
    Tiled(Tile),
    /// Matrix units.
    Cooperative(cooperative::Tile, MatrixUnits),
}

/// How a product is computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Choice {
    tier: Tier,
    /// Number of parts of K that are summed separately. [`Gemm::add_up`] adds them up; with 1 part there is a single pass.
    splits: usize,
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.tier {
            Tier::Direct => f.write_str("direct")?,
            Tier::Skinny => f.write_str("skinny")?,
            Tier::Tiled(tile) => write!(f, "{tile}")?,
            Tier::Cooperative(tile, _) => write!(f, "{tile}")?,
        }
        write!(f, " /{}", self.splits)
    }
}

/// Operands of a product, and how it is computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Gemm {
    operands: Operands,
    target: Target,
    choice: Choice,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Operands {
    a: Layout,
    b: Layout,
    trans: Trans,
    /// Number of products. Each has its own rows of both operands.
    batch: usize,
    /// Extents of one product.
    m: usize,
    k: usize,
    /// The windows, if one operand is those of a convolution.
    windows: Option<Windows>,
}

/// Largest number of rows of A for which staging tiles of B does not pay.
const SKINNY: usize = 8;
/// Rows up to which it is worth trying, windows included: the tuner measures it there.
const MOST_SKINNY: usize = 32;
/// Invocations a core that keep enough reads of B under way, most invocations that share K, and the longest K that they may share.
const SKINNY_BUSY: usize = 1024;
const SKINNY_LANES: usize = 256;
const SKINNY_DEPTH: usize = 1 << 22;

/// Longest part of K that one invocation adds up, if K has several parts. A software driver ends the loops of an invocation after 65 535
/// iterations.
const PART: usize = 16_384;
/// If K is longer than this, an invocation sums its part of it in blocks of [`FLUSH`] steps, which are 512 terms ([`BLOCK`]). 16 384 equal terms that
/// are added up one by one lose up to 2e-4, in such blocks less than 1e-5. Most products are shorter and do without blocks, which cost 6 %
/// of the time.
const FLUSHED: usize = 8192;
const FLUSH: usize = 64;
/// Longest part of K on matrix units. They sum without blocks, and only the device knows how many terms it adds at a time. In f32 a part is no
/// longer than what other kernels sum without blocks. By estimate, 65 536 equal terms added one by one lose up to 8e-4, which is about the
/// rounding of f16.
const fn longest_on_units(dtype: DType) -> usize {
    match dtype {
        DType::F32 => FLUSHED,
        _ => 1 << 16,
    }
}

impl Gemm {
    /// a·b, whose result has `width` `vec4`s per row, padding included.
    pub fn new(a: Layout, b: Layout, trans: Trans, width: usize, target: Target) -> Self {
        Self::batched(1, [a, b], trans, width, target)
    }

    /// `batch` products of matrices that lie one after the other in a and in b.
    pub fn batched(
        batch: usize,
        [a, b]: [Layout; 2],
        trans: Trans,
        width: usize,
        target: Target,
    ) -> Self {
        let (m, k) = match trans {
            Trans::TN => (a.cols(), a.rows() / batch),
            Trans::NN | Trans::NT => (a.rows() / batch, a.cols()),
        };
        let operands = Operands {
            a,
            b,
            trans,
            batch,
            m,
            k,
            windows: None,
        };
        Self::chosen(operands, width, target)
    }

    /// A product [m, n] of which one operand is windows. `extents` are m and k.
    pub(super) fn gathered(
        windows: Windows,
        [a, b]: [Layout; 2],
        (trans, [m, k]): (Trans, [usize; 2]),
        width: usize,
        target: Target,
    ) -> Self {
        let operands = Operands {
            a,
            b,
            trans,
            batch: 1,
            m,
            k,
            windows: Some(windows),
        };
        Self::chosen(operands, width, target)
    }

    fn chosen(operands: Operands, width: usize, target: Target) -> Self {
        Self {
            operands,
            target,
            choice: choices(operands, width, target, u64::MAX)[0],
        }
    }

    /// All ways to compute the product whose parts take at most `most_bytes`, the built-in choice first.
    pub fn candidates(&self, program: &Program, most_bytes: u64) -> Vec<Self> {
        choices(self.operands, program.width(), self.target, most_bytes)
            .into_iter()
            .map(|choice| Self { choice, ..*self })
            .collect()
    }

    /// Number of parts of K. More than one need [`Gemm::partial`] and [`Gemm::add_up`].
    pub fn splits(&self) -> usize {
        self.choice.splits
    }

    /// Computes the product in a single pass. The program's domain is m × n.
    pub fn single(&self, program: Program) -> Kernel {
        self.kernel(program)
    }

    /// The first of two passes. The sums of part s of K go to the rows from s·batch·m on of `partial` [splits·batch·m, n], f32.
    pub fn partial(&self, partial: Layout) -> Kernel {
        self.kernel(Program {
            rows: partial.rows(),
            cols: partial.cols(),
            operands: Vec::new(),
            instructions: vec![Instruction::Sum],
            results: vec![(0, partial)],
        })
    }

    /// The second pass: adds up the parts in a fixed order.
    pub fn add_up(&self, partial: Layout, program: Program) -> Kernel {
        let width = program.width();
        Kernel::new("split_sums")
            .items(program.rows * width, 64)
            .with("rows", program.rows)
            .with("used", program.cols.div_ceil(4))
            .with("width", width)
            .with("splits", self.choice.splits)
            .read("x", partial, View::Vec4)
            .flops(partial.len() as f64)
            .finish(program)
    }

    fn kernel(&self, program: Program) -> Kernel {
        let splits = self.choice.splits;
        let Operands {
            a,
            b,
            trans,
            batch,
            m,
            k,
            windows,
        } = self.operands;
        let (n, width) = (program.cols, program.width());
        let kernel = match self.choice.tier {
            Tier::Direct => direct(m, width, splits * batch)
                .with("splits", splits)
                .with("chunk", direct_steps(trans, k).div_ceil(splits))
                .with("block", 4 * BLOCK),
            Tier::Skinny => {
                let each = if windows.is_some() {
                    4
                } else {
                    16 / b.dtype().size()
                };
                skinny([m, k, width], each, self.target.cores)
            }
            Tier::Tiled(tile) => {
                let chunk = k.div_ceil(DEPTH).div_ceil(splits);
                tiled(tile, m, width, [splits, batch])
                    .with("chunk", chunk)
                    .with("flush", if k > FLUSHED { FLUSH } else { 0 })
            }
            Tier::Cooperative(tile, units) => {
                let work = Work {
                    a,
                    b,
                    trans,
                    m,
                    k,
                    windows,
                    splits,
                    batch,
                };
                return cooperative::kernel(tile, work, units, program);
            }
        };
        let view = match self.choice.tier {
            // Taps of a window are whole `vec4`s, but not always whole blocks.
            Tier::Skinny if windows.is_none() => View::Block,
            _ => View::Vec4,
        };
        kernel
            .windows(windows.as_ref())
            .read("a", a, view)
            .read("b", b, view)
            .with("batch", batch)
            .with("a_rows", a.rows() / batch)
            .with("b_rows", b.rows() / batch)
            .with("m", m)
            .with("n", n)
            .with("k", k)
            .with("width", width)
            .with("trans", format!("{trans:?}"))
            .flops(2.0 * batch as f64 * m as f64 * n as f64 * k as f64)
            .finish(program)
    }
}

/// Distinguishes the candidates for one product.
impl fmt::Display for Gemm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.choice.fmt(f)
    }
}

/// The kernels and numbers of parts of K that are worth trying for a product, at least one. The one expected to be the fastest comes first.
/// `most_bytes` bounds the size of the parts, if there are several.
fn choices(x: Operands, width: usize, target: Target, most_bytes: u64) -> Vec<Choice> {
    let skinny = Choice {
        tier: Tier::Skinny,
        splits: 1,
    };
    let forward = |windows: Windows| windows.role == Role::Forward;
    let few = x.trans == Trans::NT
        && x.batch == 1
        && x.a.dtype() == x.b.dtype()
        && x.windows.is_none_or(forward)
        && x.m <= MOST_SKINNY
        && x.k <= SKINNY_DEPTH
        && !target.barrier_free;
    if few && x.m <= SKINNY && x.windows.is_none() {
        return vec![skinny];
    }
    let mut choices = tiles(x, width, target, most_bytes);
    if few {
        choices.push(skinny);
    }
    choices
}

/// As [`choices`], of the kernels that stage tiles, or, without barriers, read them directly.
fn tiles(x: Operands, width: usize, target: Target, most_bytes: u64) -> Vec<Choice> {
    let Operands { batch, m, k, .. } = x;
    let extents = Extents {
        batch,
        m,
        n: 4 * width,
        k,
    };
    // Rows of matrices have a multiple of 64 bytes.
    let part = (batch * m * width.next_multiple_of(4) * 16) as u64;
    let fit = usize::try_from(most_bytes / part.max(1)).unwrap_or(usize::MAX);
    let parts = |longest| Parts {
        least: k.div_ceil(longest),
        most: fit.min(super::MAX_GRID as usize / batch),
    };
    let on_units = parts(longest_on_units(x.a.dtype()));
    if let Some(units) = target.matrix_units
        && x.a.dtype() == x.b.dtype()
        && (on_units.least == 1 || batch == 1 && on_units.least <= on_units.most)
    {
        let tiles = cooperative::tiles(x.trans, x.a.dtype(), units);
        let machine = Machine {
            cores: target.cores,
            rate: cooperative::RATE,
        };
        let ranked = rank(tiles, cooperative::Tile::speed, extents, on_units, machine);
        if !ranked.is_empty() {
            let choice = |(tile, splits)| Choice {
                tier: Tier::Cooperative(tile, units),
                splits,
            };
            return ranked.into_iter().map(choice).collect();
        }
    }
    let parts = parts(PART);
    if target.barrier_free {
        return vec![Choice {
            tier: Tier::Direct,
            splits: parts.nearest(1, direct_steps(x.trans, k)),
        }];
    }
    let machine = Machine {
        cores: target.cores,
        rate: RATE,
    };
    rank(TILES.into_iter(), Tile::speed, extents, parts, machine)
        .into_iter()
        .map(|(tile, splits)| Choice {
            tier: Tier::Tiled(tile),
            splits,
        })
        .collect()
}

/// Number of whole steps of 4 in K for the kernel without workgroup memory. The last step of A·Bᵀ may reach into the padding.
fn direct_steps(trans: Trans, k: usize) -> usize {
    match trans {
        Trans::NT => k.div_ceil(4),
        Trans::NN | Trans::TN => k / 4,
    }
}

/// So many columns of results, in `vec4`s, that a few invocations each keep the machine busy, or more invocations each, up to one for every
/// 16 bytes of K.
fn skinny([m, k, width]: [usize; 3], each: usize, cores: usize) -> Kernel {
    /// Least invocations of a workgroup.
    const SIZE: usize = 128;
    // At least as many as there are rows, which one each of them stores.
    let least = m.next_power_of_two().max(SKINNY);
    let steps = k.div_ceil(each);
    let most = steps.next_power_of_two().clamp(least, SKINNY_LANES);
    let enough = 1 << (SKINNY_BUSY * cores / width).max(1).ilog2();
    let lanes = most.min(enough).max(least);
    let size = lanes.max(SIZE);
    Kernel::new("gemm_skinny")
        .groups(width.div_ceil(size / lanes))
        .with("size", size)
        .with("lanes", lanes)
        .with("cols", 4)
        .with("steps", steps)
        .with("each", each)
        .with("block", 2 * BLOCK)
}

/// Tile and workgroup, chosen by measurement on llvmpipe. The 8 invocations of a workgroup lie in a row and read the same rows of `a`, which
/// are then loaded once.
fn direct(m: usize, width: usize, batch: usize) -> Kernel {
    let (tm, tn) = (16, 2);
    let (wx, wy) = (8, 1);
    Kernel::new("gemm_direct")
        .with("tm", tm)
        .with("tn", tn)
        .with("wx", wx)
        .with("wy", wy)
        .tiles([width.div_ceil(tn * wx), m.div_ceil(tm * wy), batch])
}

/// Depth to which a tile is staged. Two copies of the largest tile fill the 16 KiB of workgroup memory that every adapter has.
const DEPTH: usize = 8;

/// Speeds measured on an H100, in f32.
const TILES: [Tile; 3] = [
    tile([128, 128], [16, 8], [0.76, 1.0], 2),
    tile([64, 64], [8, 8], [0.34, 0.91], 6),
    tile([32, 32], [4, 4], [0.18, 0.48], 16),
];

/// Multiply-adds per core and microsecond, measured on an H100.
const RATE: f64 = 1.8e5;

const fn tile(
    [bm, bn]: [usize; 2],
    [tm, tn]: [usize; 2],
    [alone, busy]: [f64; 2],
    resident: usize,
) -> Tile {
    Tile {
        bm,
        bn,
        tm,
        tn,
        alone,
        busy,
        resident,
    }
}

fn tiled(tile: Tile, m: usize, width: usize, [splits, batch]: [usize; 2]) -> Kernel {
    /// Number of tiles that consecutive workgroups take down a column before they go to the next column.
    const ORDER: usize = 32;
    Kernel::new("gemm_tiled")
        .with("bm", tile.bm)
        .with("bn", tile.bn)
        .with("tm", tile.tm)
        .with("tn", tile.tn)
        .with("order", ORDER)
        .with("split", splits > 1)
        .tiles([
            (4 * width).div_ceil(tile.bn),
            m.div_ceil(tile.bm),
            splits * batch,
        ])
}

#[cfg(test)]
pub(super) mod tests;
