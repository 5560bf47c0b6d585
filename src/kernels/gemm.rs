//! Matrix products with any elementwise program behind the sums.

use super::{Kernel, Program, Target, View};
use crate::error::{Error, Result};
use crate::gpu::Layout;
use crate::graph::Trans;

/// A workgroup's tile and an invocation's share of it.
struct Tile {
    bm: usize,
    bn: usize,
    bk: usize,
    tm: usize,
    tn: usize,
}

/// a·b of extents m × n × k; the program's domain is m × n.
pub(crate) fn gemm(
    a: Layout,
    b: Layout,
    trans: Trans,
    program: Program,
    target: Target,
) -> Result<Kernel> {
    let (m, k) = match trans {
        Trans::TN => (a.cols(), a.rows()),
        Trans::NN | Trans::NT => (a.rows(), a.cols()),
    };
    let n = program.cols;
    let width = program.width();
    let kernel = match target.barrier_free {
        true => direct(m, width),
        false => tiled(m, width),
    };
    let [_, y, _] = kernel.workgroups();
    if y > super::MAX_GRID {
        return Err(Error::Limit {
            what: format!("matrix product of {m} rows"),
            limit: "max_compute_workgroups_per_dimension",
            needed: u64::from(y),
            available: u64::from(super::MAX_GRID),
        });
    }
    Ok(kernel
        .read("a", a, View::Vec4)
        .read("b", b, View::Vec4)
        .with("m", m)
        .with("n", n)
        .with("k", k)
        .with("width", width)
        .with("trans", format!("{trans:?}"))
        .flops(2.0 * m as f64 * n as f64 * k as f64)
        .finish(program))
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

/// Large tiles reuse more, small ones keep more of the GPU busy.
fn tiled(m: usize, width: usize) -> Kernel {
    let n = 4 * width;
    let blocks = |size: usize| m.div_ceil(size) * n.div_ceil(size);
    let tile = if blocks(128) >= 128 {
        Tile {
            bm: 128,
            bn: 128,
            bk: 16,
            tm: 8,
            tn: 8,
        }
    } else if blocks(64) >= 64 {
        Tile {
            bm: 64,
            bn: 64,
            bk: 16,
            tm: 8,
            tn: 4,
        }
    } else {
        Tile {
            bm: 32,
            bn: 32,
            bk: 16,
            tm: 4,
            tn: 4,
        }
    };
    Kernel::new("gemm_tiled")
        .with("bm", tile.bm)
        .with("bn", tile.bn)
        .with("bk", tile.bk)
        .with("tm", tile.tm)
        .with("tn", tile.tn)
        .grid(n.div_ceil(tile.bn), m.div_ceil(tile.bm))
}
