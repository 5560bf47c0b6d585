//! Matrix products with any elementwise program behind the sums.

use std::fmt;

use super::{Instruction, Kernel, Program, Target, View};
use crate::error::{Error, Result};
use crate::gpu::Layout;
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

/// Extents of a product and how it is cut.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Gemm {
    a: Layout,
    b: Layout,
    trans: Trans,
    m: usize,
    k: usize,
    target: Target,
    tile: Tile,
    /// Parts of K that are summed on their own and added up by [`Gemm::add_up`]; 1 for a single pass.
    pub splits: usize,
}

/// Workgroups that keep a large GPU busy.
const BUSY: usize = 256;

impl Gemm {
    /// a·b, whose result has `width` `vec4`s a row, padding included.
    pub fn new(a: Layout, b: Layout, trans: Trans, width: usize, target: Target) -> Result<Self> {
        let (m, k) = match trans {
            Trans::TN => (a.cols(), a.rows()),
            Trans::NN | Trans::NT => (a.rows(), a.cols()),
        };
        let (tile, splits) = match target.barrier_free {
            true => (SMALL, 1),
            false => cut(m, width, k),
        };
        let rows = m.div_ceil(8);
        if rows > super::MAX_GRID as usize {
            return Err(Error::Limit {
                what: format!("matrix product of {m} rows"),
                limit: "max_compute_workgroups_per_dimension",
                needed: rows as u64,
                available: u64::from(super::MAX_GRID),
            });
        }
        Ok(Self {
            a,
            b,
            trans,
            m,
            k,
            target,
            tile,
            splits,
        })
    }

    /// Ways to compute the same product, this one first.
    pub fn candidates(&self, program: &Program) -> Vec<Self> {
        let mut all = vec![*self];
        if self.target.barrier_free {
            return all;
        }
        for tile in [LARGE, MEDIUM, SMALL] {
            let tiles = self.m.div_ceil(tile.bm) * (4 * program.width()).div_ceil(tile.bn);
            let filling = (self.k / (2 * tile.bm)).min(BUSY.div_ceil(tiles));
            for splits in [1, filling] {
                let candidate = Self {
                    tile,
                    splits,
                    ..*self
                };
                if splits > 0 && !all.contains(&candidate) {
                    all.push(candidate);
                }
            }
        }
        all
    }

    /// The product in a single pass; the program's domain is m × n.
    pub fn single(&self, program: Program) -> Kernel {
        let width = program.width();
        let kernel = match self.target.barrier_free {
            true => direct(self.m, width),
            false => tiled(self.tile, self.m, width, 1).with("chunk", self.k),
        };
        self.describe(kernel, program)
    }

    /// The first of two passes: part s of K goes to rows s·m .. of `partial` [splits·m, n], f32.
    pub fn partial(&self, partial: Layout) -> Kernel {
        let program = Program {
            rows: partial.rows(),
            cols: partial.cols(),
            operands: Vec::new(),
            instructions: vec![Instruction::Sum],
            results: vec![(0, partial)],
        };
        let width = program.width();
        let chunk = self.k.div_ceil(self.splits).next_multiple_of(self.tile.bk);
        let kernel = tiled(self.tile, self.m, width, self.splits).with("chunk", chunk);
        self.describe(kernel, program)
    }

    /// The second pass: adds the parts up in their order.
    pub fn add_up(&self, partial: Layout, program: Program) -> Kernel {
        let width = program.width();
        Kernel::new("split_sums")
            .items(self.m * width, 64)
            .with("rows", self.m)
            .with("used", program.cols.div_ceil(4))
            .with("width", width)
            .with("splits", self.splits)
            .read("x", partial, View::Vec4)
            .flops(partial.len() as f64)
            .finish(program)
    }

    fn describe(&self, kernel: Kernel, program: Program) -> Kernel {
        let n = program.cols;
        kernel
            .read("a", self.a, View::Vec4)
            .read("b", self.b, View::Vec4)
            .with("m", self.m)
            .with("n", n)
            .with("k", self.k)
            .with("width", program.width())
            .with("trans", format!("{:?}", self.trans))
            .flops(2.0 * self.m as f64 * n as f64 * self.k as f64)
            .finish(program)
    }
}

/// What tells the candidates of one product apart.
impl fmt::Display for Gemm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.target.barrier_free {
            return f.write_str("direct");
        }
        let Tile { bm, bn, bk, tm, tn } = self.tile;
        write!(f, "tiled {bm}x{bn}x{bk}/{tm}x{tn}")?;
        match self.splits {
            1 => Ok(()),
            splits => write!(f, " in {splits}"),
        }
    }
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
        .layers(splits)
}
