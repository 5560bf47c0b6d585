//! The best numbers of rows of every length, with and without workgroup memory, in one piece or many.

use super::super::{Bound, Memory, corners, run};
use crate::error::Result;
use crate::gpu::{Alignment, Layout};
use crate::kernels::Target;
use crate::kernels::top_k::TopK;
use crate::reference::top_k;
use crate::translate;
use crate::types::DType;

fn layout(rows: usize, cols: usize, dtype: DType) -> Result<Layout> {
    Layout::new(rows, cols, dtype, Alignment::Bytes64)
}

fn target(barrier_free: bool) -> Target {
    Target {
        f16: true,
        barrier_free,
        matrix_units: None,
        invocations: 256,
        cores: 1,
    }
}

#[test]
fn the_best_numbers_of_every_row_whatever_its_length() -> Result<()> {
    let filled_layout = Layout::new(1, 1, DType::U32, Alignment::Bytes16)?;
    for (rows, cols, filled, k, barrier_free) in [
        (1, 1, 1, 1, false),
        (1, 1, 0, 2, true),
        (3, 5, 4, 7, false),
        (3, 5, 4, 7, true),
        (2, 4097, 4097, 3, false),
        (2, 700, 611, 3, true),
        (1, 1030, 1030, 150, false),
        (1, 1500, 1499, 300, false),
        (1, 900, 17, 256, false),
    ] {
        let what = format!("{k} of {filled} in {rows}x{cols}, barrier-free {barrier_free}");
        let target = target(barrier_free);
        let kernels = TopK::new(k, target);
        // Many ties, and both zeros.
        let number = |i: usize| ((i * 7919 + i * i * 31) % 641) as f32 / 64.0 - 5.0;
        let numbers: Vec<f32> = (0..rows * cols).map(number).map(|x| -x).collect();
        let mut shape = layout(rows, cols, DType::F32)?;
        let mut memories = vec![
            Memory::of(shape.pack(&numbers)?),
            Memory::of(filled_layout.pack(&[filled as u32])?),
        ];
        let (mut from, mut places) = (filled_layout, [0, 1]);
        let mut dispatch = 0;
        loop {
            let pieces = kernels.pieces(shape.cols());
            let y = layout(rows, pieces * k, DType::F32)?;
            let index = layout(rows, pieces * k, DType::U32)?;
            let kernel = match dispatch {
                0 => kernels.first(shape, filled_layout, [y, index]),
                _ => kernels.next([shape, from], [y, index]),
            };
            dispatch += 1;
            let first = memories.len();
            memories.extend([y, index].map(|layout| Memory::poisoned(layout.size_bytes())));
            let bound = [places[0], places[1], first, first + 1].map(|memory| Bound {
                memory,
                offset: 0,
                len: memories[memory].len(),
            });
            let faults = run(&kernel, target, &bound, &mut memories, dispatch, None);
            assert!(faults.is_empty(), "{what}: {}", faults[0]);
            (shape, from, places) = (y, index, [first, first + 1]);
            for (layout, memory) in [(y, first), (index, first + 1)] {
                let used = 4 * layout.cols();
                let mut rows = memories[memory].bytes().chunks_exact(layout.row_bytes());
                assert!(
                    rows.all(|row| row[used..].iter().all(|&byte| byte == 0)),
                    "{what}"
                );
            }
            if pieces == 1 {
                break;
            }
        }
        let best: Vec<f32> = shape.unpack(memories[places[0]].bytes())?;
        let index: Vec<u32> = from.unpack(memories[places[1]].bytes())?;
        for row in 0..rows {
            let all: Vec<f64> = numbers[row * cols..][..filled]
                .iter()
                .map(|&x| x.into())
                .collect();
            let wanted = top_k(&all, k);
            let found = best[row * k..].iter().zip(&index[row * k..]);
            let found: Vec<(usize, f64)> = found
                .take(k)
                .filter(|&(_, &index)| (index as usize) < filled)
                .map(|(&x, &index)| (index as usize, x.into()))
                .collect();
            assert_eq!(found, wanted, "{what}, row {row}");
        }
    }
    Ok(())
}

#[test]
fn rows_of_any_size_stay_inside() -> Result<()> {
    let filled = Layout::new(1, 1, DType::U32, Alignment::Bytes16)?;
    for (rows, cols, k, barrier_free) in [
        (64, 1 << 17, 16, false),
        (64, 1 << 17, 256, false),
        (8, 1 << 17, 4096, false),
        (64, 1 << 17, 16, true),
        (1, (1 << 29) - 3, 10, false),
    ] {
        let target = target(barrier_free);
        let kernels = TopK::new(k, target);
        let x = layout(rows, cols, DType::F32)?;
        let pieces = kernels.pieces(cols);
        let to = [
            layout(rows, pieces * k, DType::F32)?,
            layout(rows, pieces * k, DType::U32)?,
        ];
        let faults = corners(&kernels.first(x, filled, to), target);
        assert!(faults.is_empty(), "{cols} {k}: {}", faults[0]);
    }
    Ok(())
}

#[test]
fn every_variant_is_translated_to_every_platform() -> Result<()> {
    let filled = Layout::new(1, 1, DType::U32, Alignment::Bytes16)?;
    for (k, barrier_free) in [(10, false), (256, false), (300, false), (10, true)] {
        let target = target(barrier_free);
        let kernels = TopK::new(k, target);
        let x = layout(3, 5000, DType::F32)?;
        let [y, index] = [DType::F32, DType::U32].map(|dtype| {
            let pieces = kernels.pieces(5000);
            layout(3, pieces * k, dtype)
        });
        let (y, index) = (y?, index?);
        let last = [
            layout(3, kernels.pieces(y.cols()) * k, DType::F32)?,
            layout(3, kernels.pieces(y.cols()) * k, DType::U32)?,
        ];
        for kernel in [
            kernels.first(x, filled, [y, index]),
            kernels.next([y, index], last),
        ] {
            let key = kernel.key(target);
            let wgsl = kernel.source(target)?.wgsl;
            translate::everywhere(&wgsl, true).unwrap_or_else(|error| panic!("{key}: {error}"));
        }
    }
    Ok(())
}
