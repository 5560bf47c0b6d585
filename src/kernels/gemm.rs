//! Matrix products with any elementwise program behind the sums.

use std::fmt;

use super::gemm_cooperative::{self as cooperative, Work};
use super::{Instruction, Kernel, Program, Target, View};
use crate::error::{Error, Result};
use crate::gpu::{Layout, MatrixUnits};
use crate::graph::Trans;

/// A workgroup's tile and an invocation's share of it.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Tile {
    bm: usize,
    bn: usize,
    bk: usize,
    tm: usize,
    tn: usize,
}

impl fmt::Display for Tile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { bm, bn, bk, tm, tn } = self;
        write!(f, "{bm}x{bn}x{bk} {tm}x{tn}")
    }
}

/// Which kernel computes a product.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Tier {
    /// Without workgroup memory.
    Direct,
    /// A few rows, K shared by the invocations of a workgroup.
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
    /// Parts of K that are summed on their own and added up by [`Gemm::add_up`]; 1 for a single pass.
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
    /// Products, each of which has its own rows of both operands.
    batch: usize,
    /// Extents of one product.
    m: usize,
    k: usize,
}

/// Workgroups that keep a large GPU busy.
const BUSY: usize = 256;
/// Rows of A up to which B is not worth a tile.
const SKINNY: usize = 8;

impl Gemm {
    /// a·b, whose result has `width` `vec4`s a row, padding included.
    pub fn new(a: Layout, b: Layout, trans: Trans, width: usize, target: Target) -> Result<Self> {
        Self::batched(1, [a, b], trans, width, target)
    }

    /// So many products of matrices that lie one behind the other in a and in b.
    pub fn batched(
        batch: usize,
        [a, b]: [Layout; 2],
        trans: Trans,
        width: usize,
        target: Target,
    ) -> Result<Self> {
        let (m, k) = match trans {
            Trans::TN => (a.cols(), a.rows() / batch),
            Trans::NN | Trans::NT => (a.rows() / batch, a.cols()),
        };
        let most = batch.max(m.div_ceil(8));
        if most > super::MAX_GRID as usize {
            return Err(Error::Limit {
                what: format!("{batch} matrix products of {m} rows"),
                limit: "max_compute_workgroups_per_dimension",
                needed: most as u64,
                available: u64::from(super::MAX_GRID),
            });
        }
        let operands = Operands {
            a,
            b,
            trans,
            batch,
            m,
            k,
        };
        Ok(Self {
            operands,
            target,
            choice: choices(operands, width, target)[0],
        })
    }

    /// Ways to compute the same product, the built-in choice first.
    pub fn candidates(&self, program: &Program) -> Vec<Self> {
        choices(self.operands, program.width(), self.target)
            .into_iter()
            .map(|choice| Self { choice, ..*self })
            .collect()
    }

    /// Parts of K; more than one need [`Gemm::partial`] and [`Gemm::add_up`].
    pub fn splits(&self) -> usize {
        self.choice.splits
    }

    /// The product in a single pass; the program's domain is m × n.
    pub fn single(&self, program: Program) -> Kernel {
        self.kernel(program)
    }

    /// The first of two passes: part s of K goes to rows s·m .. of `partial` [splits·m, n], f32.
    pub fn partial(&self, partial: Layout) -> Kernel {
        self.kernel(Program {
            rows: partial.rows(),
            cols: partial.cols(),
            operands: Vec::new(),
            instructions: vec![Instruction::Sum],
            results: vec![(0, partial)],
        })
    }

    /// The second pass: adds the parts up in their order.
    pub fn add_up(&self, partial: Layout, program: Program) -> Kernel {
        let width = program.width();
        Kernel::new("split_sums")
            .items(self.operands.m * width, 64)
            .with("rows", self.operands.m)
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
        } = self.operands;
        let (n, width) = (program.cols, program.width());
        let kernel = match self.choice.tier {
            Tier::Direct => direct(m, width).layers(batch),
            Tier::Skinny => Kernel::new("gemm_skinny").groups(width).with("size", 64),
            Tier::Tiled(tile) => {
                let chunk = match splits {
                    1 => k,
                    _ => k.div_ceil(splits).next_multiple_of(tile.bk),
                };
                tiled(tile, m, width, splits)
                    .layers(splits.max(batch))
                    .with("chunk", chunk)
            }
            Tier::Cooperative(tile, units) => {
                let work = Work {
                    a,
                    b,
                    trans,
                    m,
                    k,
                    splits,
                    batch,
                };
                return cooperative::kernel(tile, work, units, program);
            }
        };
        kernel
            .read("a", a, View::Vec4)
            .read("b", b, View::Vec4)
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

/// What tells the candidates of one product apart.
impl fmt::Display for Gemm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.choice.fmt(f)
    }
}

/// Kernels and numbers of parts of K that are worth trying for a product, the one expected to be the fastest first; at least one.
fn choices(x: Operands, width: usize, target: Target) -> Vec<Choice> {
    let Operands { batch, m, k, .. } = x;
    if x.trans == Trans::NT && batch == 1 && m <= SKINNY && !target.barrier_free {
        return vec![Choice {
            tier: Tier::Skinny,
            splits: 1,
        }];
    }
    if let Some(units) = target.matrix_units
        && x.a.dtype() == x.b.dtype()
    {
        let tiles = cooperative::tiles(x.trans, x.a.dtype(), units);
        let ranked = cooperative::rank(tiles, batch, [m, 4 * width, k], units);
        if !ranked.is_empty() {
            let choice = |(tile, splits)| Choice {
                tier: Tier::Cooperative(tile, units),
                splits,
            };
            return ranked.into_iter().map(choice).collect();
        }
    }
    if target.barrier_free {
        return vec![Choice {
            tier: Tier::Direct,
            splits: 1,
        }];
    }
    let (tile, splits) = cut(batch * m, width, k);
    let mut all = vec![(tile, splits)];
    for tile in [LARGE, MEDIUM, SMALL] {
        let tiles = m.div_ceil(tile.bm) * (4 * width).div_ceil(tile.bn);
        let filling = (k / (2 * tile.bm)).min(BUSY.div_ceil(tiles));
        all.extend([(tile, 1), (tile, filling.max(1))]);
    }
    if batch > 1 {
        // Layers of the grid are products of the batch.
        all.retain(|(_, splits)| *splits == 1);
    }
    let mut choices: Vec<Choice> = Vec::new();
    for (tile, splits) in all {
        let tier = Tier::Tiled(tile);
        let choice = Choice { tier, splits };
        if !choices.contains(&choice) {
            choices.push(choice);
        }
    }
    choices
}

/// Tile and workgroup by measurement on llvmpipe: neighbours in a row of 8 read the same rows of `a`, which are then loaded once.
fn direct(m: usize, width: usize) -> Kernel {
    let (tm, tn) = (16, 2);
    let (wx, wy) = (8, 1);
    Kernel::new("gemm_direct")
        .with("tm", tm)
        .with("tn", tn)
        .with("wx", wx)
        .with("wy", wy)
        .grid(width.div_ceil(tn * wx), m.div_ceil(tm * wy))
}

const LARGE: Tile = Tile {
    bm: 128,
    bn: 128,
    bk: 16,
    tm: 8,
    tn: 8,
};
const MEDIUM: Tile = Tile {
    bm: 64,
    bn: 64,
    bk: 16,
    tm: 8,
    tn: 4,
};
const SMALL: Tile = Tile {
    bm: 32,
    bn: 32,
    bk: 16,
    tm: 4,
    tn: 4,
};

/// Tile and number of parts of K. Large tiles reuse more; small ones and parts keep more of the GPU busy.
fn cut(m: usize, width: usize, k: usize) -> (Tile, usize) {
    for tile in [LARGE, MEDIUM] {
        let tiles = m.div_ceil(tile.bm) * (4 * width).div_ceil(tile.bn);
        if tiles >= BUSY / 2 {
            return (tile, 1);
        }
        // Parts as deep as twice the tile is wide: shorter ones spend their time on starting and adding up.
        let splits = (k / (2 * tile.bm)).min(BUSY.div_ceil(tiles));
        let enough = tile.bm < LARGE.bm || tiles * splits >= BUSY / 2;
        if splits > 1 && enough {
            return (tile, splits);
        }
    }
    let tiles = m.div_ceil(MEDIUM.bm) * (4 * width).div_ceil(MEDIUM.bn);
    match tiles >= BUSY / 4 {
        true => (MEDIUM, 1),
        false => (SMALL, 1),
    }
}

fn tiled(tile: Tile, m: usize, width: usize, splits: usize) -> Kernel {
    Kernel::new("gemm_tiled")
        .with("bm", tile.bm)
        .with("bn", tile.bn)
        .with("bk", tile.bk)
        .with("tm", tile.tm)
        .with("tn", tile.tn)
        .with("split", splits > 1)
        .grid((4 * width).div_ceil(tile.bn), m.div_ceil(tile.bm))
}
