//! Matrix products on matrix units.

use std::fmt;

use super::gemm_choice::Speed;
use super::gemm_windows::Windows;
use super::{Kernel, Program, View};
use crate::gpu::{Layout, MatrixUnits};
use crate::types::{DType, Trans};

/// A workgroup's tile and a subgroup's share of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Tile {
    bm: usize,
    bn: usize,
    bk: usize,
    wm: usize,
    wn: usize,
    alone: f64,
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

/// For matrices of 8 × 8 and subgroups of 32. These speeds are not measured; they assume that larger tiles load less.
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

/// Multiply-adds per core and microsecond, measured on an H200.
pub(super) const RATE: f64 = 1e6;

/// Number of unused elements between two rows in workgroup memory.
const PAD: usize = 8;

impl Tile {
    pub(super) fn speed(self) -> Speed {
        Speed {
            rows: self.bm,
            cols: self.bn,
            depth: self.bk,
            alone: self.alone,
            busy: self.busy,
            resident: usize::MAX,
        }
    }

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

/// Tiles that the device can run for operands of `dtype`, the largest first. There are none if it has no matrix units for them.
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

/// What describes a product besides its tile.
#[derive(Clone, Copy, Debug)]
pub(super) struct Work {
    pub a: Layout,
    pub b: Layout,
    pub trans: Trans,
    pub m: usize,
    pub k: usize,
    /// The windows, if one operand is those of a convolution.
    pub windows: Option<Windows>,
    /// Number of parts of K that are summed separately.
    pub splits: usize,
    /// Number of products. Each has its own rows of both operands. 1 if K is split.
    pub batch: usize,
}

/// a·b → program. The program's domain is m × n, or splits·m × n if K is split.
pub(super) fn kernel(tile: Tile, work: Work, units: MatrixUnits, program: Program) -> Kernel {
    let (rows, cols) = tile.subgroups();
    let (n, width) = (program.cols, program.width());
    let steps = work.k.div_ceil(work.splits).div_ceil(tile.bk);
    let reach = work.splits * steps * tile.bk;
    // Rows end with zeros up to their stride; there are no rows of zeros, and behind the windows are none either.
    let readable = match work.trans {
        Trans::NT if work.windows.is_none() => work.a.row_stride().min(work.b.row_stride()),
        _ => work.k,
    };
    let element = work.a.dtype().to_string();
    Kernel::new("gemm_cooperative")
        .cooperative()
        .windows(work.windows.as_ref())
        .with(
            "whole",
            work.windows.is_some_and(|windows| windows.whole(tile.bk)),
        )
        .with("size", units.size)
        .with("lanes", units.lanes)
        .with("scalar", units.scalar)
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
        .tiles([
            (4 * width).div_ceil(tile.bn),
            work.m.div_ceil(tile.bm),
            work.splits.max(work.batch),
        ])
        .flops(2.0 * work.batch as f64 * work.m as f64 * n as f64 * work.k as f64)
        .finish(program)
}
