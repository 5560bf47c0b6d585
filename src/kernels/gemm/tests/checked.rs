//! The same products on the CPU, every access checked: also by kernels that no device here runs, those for Metal's matrix units among them.

use super::windows::{Convolution, ROLES, convolutions};
use super::*;
use crate::checked::{self, Bound, Memory};
use crate::gpu::MatrixUnits;
use crate::kernels::gemm_windows::Role;
use crate::types::{Padding, Window};

/// The product of `n` columns, computed in memory of exactly the sizes of the layouts. Panics on any fault.
fn compute(gemm: Gemm, n: usize, operands: [&[f32]; 2], what: &dyn fmt::Display) -> Vec<f32> {
    let Operands { a, b, m, batch, .. } = gemm.operands;
    let c = matrix(batch * m, n, DType::F32).unwrap();
    let splits = gemm.splits();
    let partial = matrix(splits * batch * m, n, DType::F32).unwrap();
    let mut memories: Vec<Memory> = [a, b]
        .iter()
        .zip(operands)
        .map(|(layout, data)| Memory::of(layout.pack(data).unwrap()))
        .collect();
    memories.extend([c, partial].map(|layout| Memory::poisoned(layout.size_bytes())));
    let store = Program {
        rows: c.rows(),
        cols: c.cols(),
        operands: Vec::new(),
        instructions: vec![Instruction::Sum],
        results: vec![(0, c)],
    };
    let steps = match splits {
        1 => vec![(gemm.single(store), vec![0, 1, 2])],
        _ => vec![
            (gemm.partial(partial), vec![0, 1, 3]),
            (gemm.add_up(partial, store), vec![3, 2]),
        ],
    };
    for (dispatch, (kernel, places)) in (1..).zip(&steps) {
        let bindings = kernel.bindings();
        let bound = bindings.iter().zip(places).map(|(binding, &memory)| Bound {
            memory,
            offset: 0,
            len: binding.layout.size_bytes(),
        });
        let bound: Vec<Bound> = bound.collect();
        let faults = checked::run(kernel, gemm.target, &bound, &mut memories, dispatch, None);
        for fault in &faults {
            eprintln!("{what}: {fault}");
        }
        assert!(faults.is_empty(), "{what}: {}", kernel.name());
    }
    c.unpack(memories[2].bytes()).unwrap()
}

fn product(
    trans: Trans,
    [batch, m, n, k]: [usize; 4],
    dtype: DType,
    target: Target,
    choice: Choice,
) {
    let product = Product {
        trans,
        batch,
        m,
        n,
        k,
    };
    let [a, b] = product.layouts(dtype).unwrap();
    let gemm = Gemm {
        operands: Operands {
            a,
            b,
            trans,
            batch,
            m,
            k,
            windows: None,
        },
        target,
        choice,
    };
    let (x, y) = (integers(a.len(), 3), integers(b.len(), 5));
    let what = format!("{trans:?} {batch}x{m}x{n}x{k} {dtype} by {choice}");
    let got = compute(gemm, n, [&x, &y], &what);
    assert_same(&got, &product.expected(&x, &y), || what);
}

fn target(f16: bool, barrier_free: bool, matrix_units: Option<MatrixUnits>) -> Target {
    Target {
        f16,
        barrier_free,
        matrix_units,
        invocations: 256,
        cores: 132,
    }
}

/// Around the tile, with a K that fills the last step and one that does not, and smaller than a tile in every extent.
fn products(speed: Speed, dtype: DType, target: Target, tier: Tier) {
    let Speed {
        rows, cols, depth, ..
    } = speed;
    for trans in ORIENTATIONS {
        if let Tier::Cooperative(tile, units) = tier
            && !cooperative::tiles(trans, dtype, units).any(|other| other == tile)
        {
            continue;
        }
        for (extents, splits) in [
            ([1, rows + 1, cols - 1, 2 * depth + 3], 1),
            ([1, rows - 1, cols + 1, 3 * depth], 1),
            ([1, 5, 3, 1], 1),
            ([1, 1, 17, 7 * depth + 5], 3),
            ([2, 3, 6, depth + 7], 1),
        ] {
            let splits = if tier == Tier::Direct { 1 } else { splits };
            product(trans, extents, dtype, target, Choice { tier, splits });
        }
    }
}

/// Windows around a tile, and such that K, of a weight gradient the steps of all samples, fills no step.
fn convolve(dtype: DType, target: Target, tier: Tier) {
    let few = [(1000, 3, 1, 1000), (7, 2, 3, 1), (5, 1, 1, 3)];
    for role in ROLES {
        let mut all: Vec<_> = few
            .into_iter()
            .map(|(time, kernel, dilation, stride)| {
                let convolution = Convolution {
                    role,
                    window: Window::new(time, kernel, dilation, stride, Padding::Causal).unwrap(),
                    samples: 3,
                    channels: 8,
                    // Four neighbouring columns of what is gathered belong to one tap.
                    outputs: if role == Role::Input { 12 } else { 5 },
                };
                (convolution, 1)
            })
            .collect();
        if !matches!(tier, Tier::Tiled(Tile { bm: 128, .. })) {
            all.extend(convolutions(role).unwrap());
        }
        for (convolution, splits) in all {
            if !super::windows::fits(tier, role, dtype) {
                continue;
            }
            let splits = if tier == Tier::Direct { 1 } else { splits };
            let (gemm, n) = convolution.gemm(dtype, target).unwrap();
            let choice = Choice { tier, splits };
            let gemm = Gemm { choice, ..gemm };
            let (x, y) = (
                integers(gemm.operands.a.len(), 3),
                integers(gemm.operands.b.len(), 5),
            );
            let what = format!("{convolution:?} {dtype} by {choice}");
            let got = compute(gemm, n, [&x, &y], &what);
            assert_same(&got, &convolution.expected(&x, &y), || what);
        }
    }
}

#[test]
fn vector_tiles() {
    for tile in TILES {
        for (dtype, f16) in [(DType::F32, true), (DType::F16, true), (DType::F16, false)] {
            let target = target(f16, false, None);
            products(tile.speed(), dtype, target, Tier::Tiled(tile));
        }
    }
}

#[test]
fn vector_tiles_gather() {
    for (tile, dtype) in TILES.into_iter().zip([DType::F32, DType::F16, DType::F32]) {
        convolve(dtype, target(true, false, None), Tier::Tiled(tile));
    }
}

#[test]
fn direct() {
    let speed = Speed {
        rows: 16,
        cols: 64,
        depth: 4,
        alone: 1.0,
        busy: 1.0,
        resident: 1,
    };
    for (dtype, f16) in [(DType::F32, true), (DType::F16, true), (DType::F16, false)] {
        let target = target(f16, true, None);
        products(speed, dtype, target, Tier::Direct);
        convolve(dtype, target, Tier::Direct);
    }
}

#[test]
fn skinny() {
    // One core has enough to do with few invocations for each column.
    for cores in [132, 1] {
        for (m, n, k) in [
            (1, 1, 1),
            (8, 5, 3),
            (3, 17, 257),
            (7, 16, 300),
            (2, 300, 90),
        ] {
            for dtype in DTYPES {
                let choice = Choice {
                    tier: Tier::Skinny,
                    splits: 1,
                };
                let target = Target {
                    cores,
                    ..target(true, false, None)
                };
                product(Trans::NT, [1, m, n, k], dtype, target, choice);
            }
        }
    }
    for dtype in DTYPES {
        let target = target(true, false, None);
        for convolution in windows::few_rows().unwrap() {
            let (gemm, n) = convolution.gemm(dtype, target).unwrap();
            let choice = Choice {
                tier: Tier::Skinny,
                splits: 1,
            };
            let gemm = Gemm { choice, ..gemm };
            let Operands { a, b, .. } = gemm.operands;
            let (x, y) = (integers(a.len(), 3), integers(b.len(), 5));
            let what = format!("{convolution:?} {dtype}");
            let got = compute(gemm, n, [&x, &y], &what);
            assert_same(&got, &convolution.expected(&x, &y), || what);
        }
    }
}

fn matrix_units(size: usize, lanes: usize, scalar: bool) {
    let units = translation::units(size, lanes, scalar);
    let target = target(true, false, Some(units));
    let dtypes = if scalar { &DTYPES[..] } else { &DTYPES[1..] };
    for &dtype in dtypes {
        let tiles = ORIENTATIONS.map(|trans| cooperative::tiles(trans, dtype, units));
        let mut seen: Vec<cooperative::Tile> = Vec::new();
        for tile in tiles.into_iter().flatten() {
            if !seen.contains(&tile) {
                seen.push(tile);
                let tier = Tier::Cooperative(tile, units);
                products(tile.speed(), dtype, target, tier);
                convolve(dtype, target, tier);
            }
        }
        assert!(!seen.is_empty());
    }
}

#[test]
fn wide_matrix_units() {
    matrix_units(16, 32, false);
}

#[test]
fn small_matrix_units() {
    matrix_units(8, 8, false);
}

#[test]
fn matrix_units_of_metal() {
    matrix_units(8, 32, true);
}

/// One long row, one long column, and many small products: more workgroups than a dimension has. The grid is folded, and the surplus leaves.
#[test]
fn the_largest_products_fit_grids_and_indices() {
    let units = translation::units(16, 32, false);
    let cooperative = cooperative::tiles(Trans::NN, DType::F16, units);
    let matrix_units = cooperative.map(|tile| (Tier::Cooperative(tile, units), DType::F16));
    let tiled = TILES.map(|tile| (Tier::Tiled(tile), DType::F32));
    let tiers = [(Tier::Direct, DType::F32)];
    let mut folded = 0;
    for (tier, dtype) in tiers.into_iter().chain(tiled).chain(matrix_units) {
        let target = target(true, tier == Tier::Direct, Some(units));
        for (batch, m, n) in [
            (1, 1, (1 << 30) - 16),
            (1, (1 << 26) - 1, 1),
            ((1 << 26) - 1, 1, 1),
            (65_537, 2, 3),
        ] {
            let product = Product {
                trans: Trans::NN,
                batch,
                m,
                n,
                k: 1,
            };
            let [a, b] = product.layouts(dtype).unwrap();
            let gemm = Gemm {
                operands: Operands {
                    a,
                    b,
                    trans: Trans::NN,
                    batch,
                    m,
                    k: 1,
                    windows: None,
                },
                target,
                choice: Choice { tier, splits: 1 },
            };
            let kernel = gemm.partial(matrix(batch * m, n, DType::F32).unwrap());
            let grid = kernel.workgroups();
            let what = format!("{batch}x{m}x{n} {dtype} by {}: {grid:?}", gemm.choice);
            assert!(
                grid.into_iter().all(|n| (1..=65_535).contains(&n)),
                "{what}"
            );
            folded += usize::from(grid[1] > 1 && batch.max(m) == 1);
            let faults = checked::corners(&kernel, target);
            assert!(faults.is_empty(), "{what}: {}", faults[0]);
        }
    }
    assert!(folded > 0);
}
