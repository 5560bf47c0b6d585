//! Matrix products on matrix units.

use std::fmt;

use super::{Kernel, Program, View};
use crate::gpu::{Layout, MatrixUnits};
use crate::graph::{DType, Trans};

/// A workgroup's tile and a subgroup's share of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Tile {
    bm: usize,
    bn: usize,
    bk: usize,
    wm: usize,
    wn: usize,
    /// Speed of one workgroup alone on a core, relative to the best tile.
    alone: f64,
    /// Speed of a core that runs as many of them as it can.
    busy: f64,
}

impl fmt::Display for Tile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            bm, bn, bk, wm, wn, ..
        } = self;
        write!(f, "matrix {bm}x{bn}x{bk} {wm}x{wn}")
    }
}

const fn tile([bm, bn, bk]: [usize; 3], [wm, wn]: [usize; 2], [alone, busy]: [f64; 2]) -> Tile {
    Tile {
        bm,
        bn,
        bk,
        wm,
        wn,
        alone,
        busy,
    }
}

/// For matrices of 16 × 16 and subgroups of 32. Speeds fitted to measurements on an H200.
const WIDE: [Tile; 6] = [
    tile([128, 256, 16], [64, 64], [1.0, 1.0]),
    tile([256, 128, 16], [64, 64], [0.97, 0.97]),
    tile([128, 128, 32], [64, 32], [0.6, 0.78]),
    tile([64, 128, 32], [32, 32], [0.45, 0.5]),
    tile([64, 64, 32], [32, 32], [0.3, 0.5]),
    tile([32, 32, 32], [16, 16], [0.1, 0.3]),
];

/// For matrices of 8 × 8 and subgroups of 32. Not measured: larger tiles load less.
const NARROW: [Tile; 3] = [
    tile([64, 64, 16], [32, 32], [0.5, 1.0]),
    tile([32, 64, 16], [16, 32], [0.3, 0.8]),
    tile([32, 32, 16], [16, 16], [0.2, 0.6]),
];

/// For matrices of 8 × 8 and subgroups of 8.
const SMALL: [Tile; 2] = [
    tile([32, 32, 16], [16, 16], [1.0, 1.0]),
    tile([16, 16, 16], [8, 8], [0.5, 0.5]),
];

/// Elements that rows in workgroup memory are apart more than they are long.
const PAD: usize = 8;

impl Tile {
    fn subgroups(&self) -> (usize, usize) {
        (self.bm / self.wm, self.bn / self.wn)
    }

    fn invocations(&self, units: MatrixUnits) -> usize {
        let (rows, cols) = self.subgroups();
        rows * cols * units.lanes
    }

    /// Bytes of workgroup memory.
    fn storage(&self, trans: Trans, dtype: DType, units: MatrixUnits) -> usize {
        let Self { bm, bn, bk, .. } = *self;
        let a = match trans {
            Trans::TN => bk * (bm + PAD),
            Trans::NN | Trans::NT => bm * (bk + PAD),
        };
        let b = match trans {
            Trans::NT => bn * (bk + PAD),
            Trans::NN | Trans::TN => bk * (bn + PAD),
        };
        let (rows, cols) = self.subgroups();
        2 * (a + b) * dtype.size() + 4 * rows * cols * units.size * units.size
    }

    /// Whether every invocation loads the same number of `vec4`s, in whole rows.
    fn divides(&self, trans: Trans, units: MatrixUnits) -> bool {
        let threads = self.invocations(units);
        let loads = |elements: usize| (elements / 4).is_multiple_of(threads);
        // Short lines, along K, are taken in groups of eight.
        let whole = |along_k: bool, cols: usize| match along_k {
            true => threads.is_multiple_of(cols / 4),
            false => threads.is_multiple_of(8 * self.bk / 4),
        };
        whole(trans == Trans::TN, self.bm)
            && whole(trans != Trans::NT, self.bn)
            && loads(self.bm * self.bk)
            && loads(self.bn * self.bk)
    }
}

/// Tiles that the device can run for operands of `dtype`, the largest first; none where it has no such units.
pub(super) fn tiles(
    trans: Trans,
    dtype: DType,
    units: MatrixUnits,
) -> impl Iterator<Item = Tile> + Clone {
    let all: &[Tile] = match (dtype, units.size, units.lanes) {
        (DType::F16, 16, 32) if units.f16 => &WIDE,
        (DType::F16, 8, 32) if units.f16 => &NARROW,
        (DType::F32, 8, 32) if units.f32 => &NARROW,
        (DType::F16, 8, 8) if units.f16 => &SMALL,
        _ => &[],
    };
    all.iter().copied().filter(move |tile| {
        tile.storage(trans, dtype, units) <= units.storage
            && tile.invocations(units) <= units.invocations
            && tile.divides(trans, units)
    })
}

const MAX_SPLITS: usize = 16;
/// Steps of a part of K that are worth starting for.
const MIN_STEPS: usize = 8;
/// What a workgroup does before and after its steps, as depth of K.
const OVERHEAD: f64 = 64.0;
/// Multiply-adds that a core of a large GPU makes while a second dispatch starts, and while it reads and adds one element of a part.
const SECOND_PASS: f64 = 4e6;
const ADD: f64 = 1.6;

/// Tiles and numbers of parts of K, the pair expected to be the fastest first. Large tiles reuse more; small ones and parts keep
/// more of the GPU busy. Costs are in multiply-adds of a core at the speed of the best tile.
pub(super) fn rank(
    tiles: impl Iterator<Item = Tile>,
    batch: usize,
    [m, n, k]: [usize; 3],
    units: MatrixUnits,
) -> Vec<(Tile, usize)> {
    let cost = |tile: Tile, splits: usize| {
        let groups = batch * m.div_ceil(tile.bm) * n.div_ceil(tile.bn) * splits;
        let depth = k.div_ceil(splits).next_multiple_of(tile.bk) as f64 + OVERHEAD;
        let work = (tile.bm * tile.bn) as f64 * depth;
        let rounds = match tile.busy > tile.alone {
            // Several workgroups share a core and fill each other's gaps.
            true => groups as f64 / units.cores as f64,
            false => groups.div_ceil(units.cores) as f64,
        };
        let second_pass = match splits {
            1 => 0.0,
            _ => SECOND_PASS + ADD * (splits * m * n) as f64,
        };
        (work / tile.alone).max(rounds * work / tile.busy) + second_pass
    };
    let mut ranked: Vec<(f64, Tile, usize)> = Vec::new();
    for tile in tiles {
        let worth =
            (2..=MAX_SPLITS).filter(|splits| batch == 1 && k >= splits * MIN_STEPS * tile.bk);
        let split = worth
            .map(|splits| (cost(tile, splits), tile, splits))
            .min_by(|(a, ..), (b, ..)| a.total_cmp(b));
        ranked.push((cost(tile, 1), tile, 1));
        ranked.extend(split);
    }
    ranked.sort_by(|(a, ..), (b, ..)| a.total_cmp(b));
    let pairs = ranked.into_iter().map(|(_, tile, splits)| (tile, splits));
    pairs.collect()
}

/// What a product needs to know besides its tile.
#[derive(Clone, Copy, Debug)]
pub(super) struct Work {
    pub a: Layout,
    pub b: Layout,
    pub trans: Trans,
    pub m: usize,
    pub k: usize,
    /// Parts of K that are summed on their own.
    pub splits: usize,
    /// Products, each of which has its own rows of both operands; 1 where K is split.
    pub batch: usize,
}

/// a·b → program; its domain is m × n, or splits·m × n where K is split.
pub(super) fn kernel(tile: Tile, work: Work, units: MatrixUnits, program: Program) -> Kernel {
    let (rows, cols) = tile.subgroups();
    let (n, width) = (program.cols, program.width());
    let steps = work.k.div_ceil(work.splits).div_ceil(tile.bk);
    let reach = work.splits * steps * tile.bk;
    // Rows end with zeros up to their stride; there are no rows of zeros.
    let readable = match work.trans {
        Trans::NT => work.a.row_stride().min(work.b.row_stride()),
        Trans::NN | Trans::TN => work.k,
    };
    let element = work.a.dtype().to_string();
    Kernel::new("gemm_cooperative")
        .cooperative()
        .with("size", units.size)
        .with("lanes", units.lanes)
        .with("scalar", units.scalar)
        .with(
            "sync",
            if units.subgroup_barrier {
                "subgroupBarrier"
            } else {
                "workgroupBarrier"
            },
        )
        .with("zero", format!("vec4<{element}>()"))
        .with("element", element)
        .with("bm", tile.bm)
        .with("bn", tile.bn)
        .with("bk", tile.bk)
        .with("wm", tile.wm)
        .with("wn", tile.wn)
        .with("rows", rows)
        .with("cols", cols)
        .with("pad", PAD)
        .with("m", work.m)
        .with("n", n)
        .with("full_k", work.k)
        .with("steps", steps)
        .with("masked", reach > readable)
        .with("split", work.splits > 1)
        .with("batch", work.batch)
        .with("a_rows", work.a.rows() / work.batch)
        .with("b_rows", work.b.rows() / work.batch)
        .with("width", width)
        .with("trans", format!("{:?}", work.trans))
        .read("a", work.a, View::Vec4)
        .read("b", work.b, View::Vec4)
        .grid((4 * width).div_ceil(tile.bn), work.m.div_ceil(tile.bm))
        .layers(work.splits.max(work.batch))
        .flops(2.0 * work.batch as f64 * work.m as f64 * n as f64 * work.k as f64)
        .finish(program)
}
