//! Layout rules, host packing, and exact round trips through the GPU, for any shape.

use std::sync::LazyLock;

use energyflow::gpu::{Alignment, Element, Layout, Tensor};
use energyflow::types::{DType, Shape};
use energyflow::{Error, Gpu, GpuOptions};
use half::f16;
use proptest::prelude::*;

static GPU: LazyLock<Gpu> = LazyLock::new(|| {
    Gpu::new(&GpuOptions::from_env().unwrap()).expect("these tests need a GPU adapter")
});

fn layouts() -> impl Strategy<Value = Layout> {
    let dtypes = prop_oneof![Just(DType::F32), Just(DType::F16), Just(DType::U32)];
    let alignments = prop_oneof![Just(Alignment::Bytes16), Just(Alignment::Bytes64)];
    (1_usize..40, 1_usize..70, dtypes, alignments).prop_map(|(rows, cols, dtype, alignment)| {
        Layout::new(rows, cols, dtype, alignment).expect("a small layout")
    })
}

/// Distinct bit patterns that no conversion may touch; none is a NaN.
fn bits(layout: &Layout) -> impl Iterator<Item = u32> {
    (1..=layout.len() as u32).map(|i| i.wrapping_mul(0x9e37_79b1) & 0xbfff_bbff)
}

fn halves(layout: &Layout) -> Vec<f16> {
    bits(layout).map(|b| f16::from_bits(b as u16)).collect()
}

fn floats(layout: &Layout) -> Vec<f32> {
    bits(layout).map(f32::from_bits).collect()
}

fn refused<T>(result: &Result<T, Error>) -> bool {
    matches!(result, Err(Error::Layout { .. }))
}

fn padding(layout: &Layout, bytes: &[u8]) -> Vec<u8> {
    let used = layout.cols() * layout.dtype().size();
    bytes
        .chunks_exact(layout.row_bytes())
        .flat_map(|row| row[used..].iter().copied())
        .collect()
}

fn check_pack<T: Element + PartialEq + std::fmt::Debug>(layout: &Layout, data: &[T]) {
    let bytes = layout.pack(data).expect("pack");
    assert_eq!(bytes.len() as u64, layout.size_bytes());
    assert!(padding(layout, &bytes).iter().all(|&byte| byte == 0));
    for row in [0, layout.rows() - 1] {
        let start = row * layout.row_bytes();
        let first: &[u8] = bytemuck::bytes_of(&data[row * layout.cols()]);
        assert_eq!(&bytes[start..start + first.len()], first, "row {row}");
    }
    assert_eq!(layout.unpack::<T>(&bytes).expect("unpack"), data);
}

fn check_gpu<T: Element + PartialEq + std::fmt::Debug>(layout: Layout, data: &[T]) {
    let tensor = Tensor::uninit(&GPU, layout).expect("tensor");
    tensor.poison(&GPU).expect("poison");
    tensor.upload(&GPU, data).expect("upload");
    let raw = tensor.download_raw(&GPU).expect("download_raw");
    let dense = tensor.download::<T>(&GPU).expect("download");
    assert_eq!(dense.wait().expect("wait"), data);
    let raw = raw.wait().expect("wait");
    assert!(padding(&layout, &raw).iter().all(|&byte| byte == 0));
    assert_eq!(raw, layout.pack(data).expect("pack"));
}

proptest! {
    #[test]
    fn rows_are_aligned_and_inside(layout in layouts()) {
        let used = layout.cols() * layout.dtype().size();
        prop_assert!(layout.row_bytes() >= used);
        prop_assert!(layout.row_bytes() < used + 64);
        prop_assert_eq!(layout.row_bytes() % 16, 0);
        prop_assert_eq!(layout.row_stride() * layout.dtype().size(), layout.row_bytes());
        let end = (layout.rows() - 1) * layout.row_bytes() + used;
        prop_assert!(end as u64 <= layout.size_bytes());
    }

    #[test]
    fn alignment_is_the_one_asked_for(rows in 1_usize..40, cols in 1_usize..70) {
        let wide = Layout::new(rows, cols, DType::F16, Alignment::Bytes64)?;
        prop_assert_eq!(wide.row_bytes() % 64, 0);
        let matrix = Layout::of(&Shape::new(&[rows, cols])?, DType::F16)?;
        prop_assert_eq!(matrix, wide);
        let vector = Layout::of(&Shape::new(&[cols])?, DType::F16)?;
        prop_assert_eq!(vector, Layout::new(1, cols, DType::F16, Alignment::Bytes16)?);
    }

    #[test]
    fn packing_round_trips(layout in layouts()) {
        match layout.dtype() {
            DType::F16 => check_pack(&layout, &halves(&layout)),
            DType::F32 => check_pack(&layout, &floats(&layout)),
            _ => check_pack(&layout, &bits(&layout).collect::<Vec<u32>>()),
        }
    }

    #[test]
    fn halves_reach_the_host_as_floats(layout in layouts()) {
        prop_assume!(layout.dtype() == DType::F16);
        let halves = halves(&layout);
        let floats: Vec<f32> = halves.iter().map(|half| half.to_f32()).collect();
        let bytes = layout.pack(&floats)?;
        prop_assert_eq!(&bytes, &layout.pack(&halves)?);
        prop_assert_eq!(layout.unpack::<f32>(&bytes)?, floats);
    }

    #[test]
    fn wrong_amounts_are_refused(layout in layouts(), extra in 1_usize..9) {
        prop_assume!(layout.dtype() == DType::F32);
        let data = vec![0.0_f32; layout.len() + extra];
        prop_assert!(refused(&layout.pack(&data)));
        prop_assert!(refused(&layout.pack(&data[..layout.len() - 1])));
        let bytes = vec![0; layout.size_bytes() as usize + extra];
        prop_assert!(refused(&layout.unpack::<f32>(&bytes)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn transfers_round_trip(layout in layouts()) {
        match layout.dtype() {
            DType::F16 => check_gpu(layout, &halves(&layout)),
            DType::F32 => check_gpu(layout, &floats(&layout)),
            _ => check_gpu(layout, &bits(&layout).collect::<Vec<u32>>()),
        }
    }
}

#[test]
fn odd_widths_round_trip() {
    for cols in [1, 3, 5, 7, 31, 33, 63, 65, 127] {
        for rows in [1, 2, 3] {
            let layout =
                |dtype| Layout::new(rows, cols, dtype, Alignment::Bytes64).expect("layout");
            let f16s = layout(DType::F16);
            check_gpu(f16s, &halves(&f16s));
            let f32s = layout(DType::F32);
            check_gpu(f32s, &floats(&f32s));
            let u32s = layout(DType::U32);
            check_gpu(u32s, &bits(&u32s).collect::<Vec<u32>>());
        }
    }
}

#[test]
fn floats_round_to_nearest_even_halves() {
    let cases = [
        // Halfway between neighbours: to the even one.
        (1.0 + 1.0 / 2048.0, 0x3c00),
        (1.0 + 3.0 / 2048.0, 0x3c02),
        // Just beyond halfway.
        (1.0 + 1.0 / 2048.0 + 1e-6, 0x3c01),
        (65519.0, 0x7bff),
        (65520.0, 0x7c00),
        (-1e6, 0xfc00),
        // Subnormal, and halfway below the smallest one.
        (5.960_464_5e-8, 0x0001),
        (2.980_232_2e-8, 0x0000),
        (-0.0, 0x8000),
    ];
    let layout = Layout::new(1, cases.len(), DType::F16, Alignment::Bytes16).expect("layout");
    let bytes = layout.pack(&cases.map(|(float, _)| float)).expect("pack");
    let halves: Vec<f16> = layout.unpack(&bytes).expect("unpack");
    for ((float, expected), half) in cases.into_iter().zip(halves) {
        assert_eq!(half.to_bits(), expected, "{float}");
    }
}

#[test]
fn impossible_layouts_are_refused() {
    for (rows, cols) in [(0, 1), (1, 0), (1 << 20, 1 << 20), (2, usize::MAX / 4)] {
        let layout = Layout::new(rows, cols, DType::F32, Alignment::Bytes64);
        assert!(
            matches!(layout, Err(Error::Layout { .. })),
            "{rows} x {cols}"
        );
    }
}

#[test]
fn types_do_not_mix() {
    let layout = |dtype| Layout::new(2, 2, dtype, Alignment::Bytes16).expect("layout");
    assert!(refused(&layout(DType::U32).pack(&[1.0_f32; 4])));
    assert!(refused(&layout(DType::U32).pack(&[f16::ONE; 4])));
    assert!(refused(&layout(DType::F32).pack(&[1_u32; 4])));
    assert!(refused(&layout(DType::F32).pack(&[f16::ONE; 4])));
    assert!(refused(&layout(DType::F16).pack(&[1_u32; 4])));
}
