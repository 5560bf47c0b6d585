//! Cross entropy of rows with logits of −∞, which mask a class, of +∞ and NaN: every kernel against the reference, element by element.

mod common;

use common::{Case, baseline_gpu, gpu, packed_gpu, tiled_gpu};
use energyflow::Gpu;
use energyflow::graph::{LinearCrossEntropy, Op};
use energyflow::reference::Array;
use energyflow::types::DType;

const INF: f32 = f32::INFINITY;

/// The same in kind (NaN, an infinity, a number) and, for numbers, close.
fn check(name: &str, got: &[f32], want: &Array, dtype: DType) {
    let far = if dtype == DType::F16 { 4e-3 } else { 2e-5 };
    let close = |got: f64, want: f64| match want.is_finite() {
        true => (got - want).abs() <= far * (1e-2 + want.abs()),
        false => got == want || got.is_nan() && want.is_nan(),
    };
    let pairs = got.iter().zip(want.data()).enumerate();
    let wrong: Vec<_> = pairs
        .filter(|(_, (got, want))| !close(f64::from(**got), **want))
        .collect();
    assert_eq!(got.len(), want.data().len());
    assert!(
        wrong.is_empty(),
        "{name}: {} wrong, {:?}",
        wrong.len(),
        &wrong[..wrong.len().min(5)]
    );
}

fn check_all(case: &Case, gpu: &Gpu, dtype: DType) {
    let (outputs, expected) = case.run_on(gpu);
    for (name, want) in &expected {
        check(name, &outputs.get(name).unwrap(), want, dtype);
        assert!(outputs.padding_is_zero(name).unwrap(), "{name}: padding");
    }
}

/// Rows of `v` logits, at least 4, with their targets.
fn rows(v: usize, dtype: DType, smoothing: f32) -> (Vec<f32>, Vec<u32>) {
    let lowest = if dtype == DType::F16 {
        -65_504.0
    } else {
        f32::MIN
    };
    let plain = |row: usize| -> Vec<f32> {
        let number = |i: usize| ((7 * i + 3 * row) % 11) as f32 * 0.4 - 2.0;
        (0..v).map(number).collect()
    };
    let except = |row: usize, kept: &dyn Fn(usize) -> bool, mask: f32| -> Vec<f32> {
        let logits = plain(row).into_iter().enumerate();
        logits
            .map(|(i, x)| if kept(i) { x } else { mask })
            .collect()
    };
    let with = |row: usize, at: usize, x: f32| -> Vec<f32> {
        let mut logits = plain(row);
        logits[at] = x;
        logits
    };
    let last = v - 1;
    let rows: Vec<(Vec<f32>, usize)> = vec![
        // Masked: one class, all but the target, the first half, all but the last, every second.
        (with(0, 1, -INF), 0),
        (except(1, &|i| i == 2, -INF), 2),
        (except(2, &|i| i >= v / 2, -INF), v / 2),
        (except(3, &|i| i == last, -INF), last),
        (except(4, &|i| i % 2 == 1, -INF), 1),
        // The target is masked; everything is.
        (with(5, 3, -INF), 3),
        (vec![-INF; v], 1),
        // No softmax.
        (with(6, 2, INF), 2),
        (with(7, last, INF), 0),
        (with(8, 0, f32::NAN), 2),
        (with(9, last, -f32::NAN), last),
        (vec![f32::NAN; v], 0),
        (vec![INF; v], 0),
        // Masked by the lowest number; the mean of many of them is out of reach.
        (
            except(10, &|i| i == 3 || smoothing > 0.0 && i > 0, lowest),
            3,
        ),
        // Beside infinities nothing is lost.
        (plain(11), last),
    ];
    let targets = rows.iter().map(|(_, target)| *target as u32).collect();
    (
        rows.into_iter().flat_map(|(logits, _)| logits).collect(),
        targets,
    )
}

/// Outputs the loss of each row, and the gradient for the logits unless its place is taken.
fn entropy(v: usize, dtype: DType, smoothing: f32, together: bool) -> Case {
    let mut case = Case::new(1, dtype);
    let (data, targets) = rows(v, dtype, smoothing);
    let n = targets.len();
    let logits = case.input_of(&[n, v], dtype, data);
    let targets = case.ids_of(targets, v as u32);
    let op = Op::CrossEntropy {
        ignore: None,
        smoothing,
    };
    let g = &mut case.graph;
    let [loss, count, rows] = g.apply(op, &[logits, targets]).unwrap()[..] else {
        panic!("three results");
    };
    g.output("rows", rows).unwrap();
    // With a seed that takes the count the gradient cannot be computed together with the loss.
    let seed = match together {
        true => g.constant(&[1], 3.0).unwrap(),
        false => g.affine(count, 0.5, 0.25).unwrap(),
    };
    let gradient = g.gradients_from(loss, seed, &[logits]).unwrap()[0];
    g.output("gradient", gradient).unwrap();
    let executable = case.start(&gpu()).executable;
    let mut keys = executable.sources().map(|(key, _)| key);
    let apart = keys.any(|key| key.starts_with("cross_entropy_grad "));
    assert_eq!(apart, !together);
    case
}

#[test]
fn every_kernel_agrees_with_the_reference() {
    for dtype in [DType::F32, DType::F16] {
        for v in [4, 37, 1031] {
            for smoothing in [0.0, 0.1] {
                for together in [true, false] {
                    let case = entropy(v, dtype, smoothing, together);
                    check_all(&case, &gpu(), dtype);
                    check_all(&case, &tiled_gpu(), dtype);
                    if dtype == DType::F16 && v == 37 {
                        check_all(&case, &packed_gpu(), dtype);
                        check_all(&case, &baseline_gpu(), dtype);
                    }
                }
            }
        }
    }
}

/// Rows that do not fit into registers.
#[test]
fn rows_that_are_read_twice() {
    for dtype in [DType::F32, DType::F16] {
        let v = 30_522 * 4 / dtype.size();
        let case = entropy(v, dtype, 0.0, true);
        let executable = case.start(&baseline_gpu()).executable;
        assert!(
            executable
                .sources()
                .any(|(key, _)| key.contains("steps=0 "))
        );
        check_all(&case, &baseline_gpu(), dtype);
    }
}

/// The gradient takes the place of the logits.
#[test]
fn in_place() {
    for smoothing in [0.0, 0.1] {
        let mut case = Case::new(2, DType::F32);
        let (data, targets) = rows(37, DType::F32, smoothing);
        let n = targets.len();
        let x = case.input_of(&[n, 37], DType::F32, data);
        let targets = case.ids_of(targets, 37);
        let op = Op::CrossEntropy {
            ignore: None,
            smoothing,
        };
        let g = &mut case.graph;
        let x = g.reshape(x, &[n, 1, 37]).unwrap();
        let logits = g.im2col(x, 1, 1).unwrap();
        let results = g.apply(op, &[logits, targets]).unwrap();
        g.output("rows", results[2]).unwrap();
        let gradient = g.gradients(results[0], &[logits]).unwrap()[0];
        g.output("gradient", gradient).unwrap();
        for gpu in [gpu(), tiled_gpu()] {
            let executable = case.start(&gpu).executable;
            assert!(
                executable
                    .sources()
                    .any(|(key, _)| key.contains(" over=True "))
            );
            check_all(&case, &gpu, DType::F32);
        }
    }
}

/// [1, −∞, 0.5, −0.5]: ln(1 + e^−½ + e^−3⁄2) for the first class, infinite for the masked one or with smoothing.
#[test]
fn by_hand() {
    for (target, smoothing, want) in [(0, 0.0, 0.604_131), (1, 0.0, INF), (0, 0.1, INF)] {
        let mut case = Case::new(3, DType::F32);
        let data = vec![1.0, -INF, 0.5, -0.5];
        let logits = case.input_of(&[1, 4], DType::F32, data);
        let targets = case.ids_of(vec![target], 4);
        let g = &mut case.graph;
        let ce = g.cross_entropy(logits, targets, None, smoothing).unwrap();
        let gradient = g.gradients(ce.loss, &[logits]).unwrap()[0];
        g.output("loss", ce.loss).unwrap();
        g.output("gradient", gradient).unwrap();
        for gpu in [gpu(), tiled_gpu()] {
            let (outputs, expected) = case.run_on(&gpu);
            for loss in [
                outputs.scalar("loss").unwrap(),
                expected["loss"].to_f32()[0],
            ] {
                assert!(loss == want || (loss - want).abs() < 1e-5, "{loss}");
            }
            // Softmax less what is wanted.
            let got = outputs.get("gradient").unwrap();
            let mut softmax = [0.546_549, 0.0, 0.331_499, 0.121_952];
            softmax[target as usize] -= 1.0 - smoothing;
            for (got, want) in got.iter().zip(softmax) {
                assert!(
                    (got - (want - 0.25 * smoothing)).abs() < 1e-5,
                    "{got} {want}"
                );
            }
        }
    }
}

/// Nothing but the lowest number, which masks like −∞ elsewhere, is a softmax of equal numbers.
#[test]
fn the_lowest_number_is_no_infinity() {
    for v in [4, 37] {
        let mut case = Case::new(5, DType::F32);
        let logits = case.input_of(&[1, v], DType::F32, vec![f32::MIN; v]);
        let targets = case.ids_of(vec![2], v as u32);
        let g = &mut case.graph;
        let ce = g.cross_entropy(logits, targets, None, 0.0).unwrap();
        let gradient = g.gradients(ce.loss, &[logits]).unwrap()[0];
        g.output("loss", ce.loss).unwrap();
        g.output("gradient", gradient).unwrap();
        for gpu in [gpu(), tiled_gpu()] {
            let (outputs, expected) = case.run_on(&gpu);
            check(
                "loss",
                &outputs.get("loss").unwrap(),
                &expected["loss"],
                DType::F32,
            );
            let loss = outputs.scalar("loss").unwrap();
            assert!((loss - (v as f32).ln()).abs() < 1e-5, "{loss}");
            for (i, got) in outputs.get("gradient").unwrap().into_iter().enumerate() {
                let want = 1.0 / v as f32 - f32::from(i == 2);
                assert!((got - want).abs() < 1e-6, "{got} {want}");
            }
        }
    }
}

/// A bias of −∞ masks a class of a linear layer, whose logits are computed in chunks.
#[test]
fn a_bias_masks_classes() {
    for (dtype, smoothings) in [(DType::F32, &[0.0, 0.1][..]), (DType::F16, &[0.0])] {
        for &smoothing in smoothings {
            let (n, d, v) = (70, 5, 37);
            let mut case = Case::new(4, dtype);
            let x = case.input(&[n, d]);
            let weight = case.input(&[v, d]);
            let mut data = case.uniform(v, -1.0, 1.0);
            for masked in [0, 7, 8, 9, 10, 11, 36] {
                data[masked] = -INF;
            }
            let bias = case.input_of(&[v], DType::F32, data);
            let ids = (0..n as u32).map(|i| 12 + i % 24).collect();
            let targets = case.ids_of(ids, v as u32);
            let layer = LinearCrossEntropy::new(dtype)
                .smoothing(smoothing)
                .chunk_bytes(1);
            let op = Op::LinearCrossEntropy(layer);
            let g = &mut case.graph;
            let results = g.apply(op, &[x, weight, targets, bias]).unwrap();
            g.output("loss", results[0]).unwrap();
            g.output("rows", results[2]).unwrap();
            let gradients = g.gradients(results[0], &[x, weight, bias]).unwrap();
            for (name, gradient) in ["dx", "dweight", "dbias"].into_iter().zip(gradients) {
                g.output(name, gradient).unwrap();
            }
            let devices = match dtype {
                DType::F32 => vec![gpu(), tiled_gpu()],
                _ => vec![gpu()],
            };
            for gpu in devices {
                let (outputs, expected) = case.run_on(&gpu);
                check(
                    "rows",
                    &outputs.get("rows").unwrap(),
                    &expected["rows"],
                    dtype,
                );
                assert_eq!(
                    outputs.scalar("loss").unwrap().is_finite(),
                    smoothing == 0.0
                );
                for name in ["dx", "dweight", "dbias"] {
                    let got = outputs.get(name).unwrap();
                    common::compare(
                        name,
                        &got,
                        &expected[name],
                        common::tolerance(DType::F16),
                        String::new,
                    );
                }
                if smoothing == 0.0 {
                    assert_eq!(outputs.get("dbias").unwrap()[7..12], [0.0; 5]);
                }
            }
        }
    }
}
