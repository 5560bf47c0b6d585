//! LayerNorm: result, statistics, gradients.

mod common;

use common::{Case, F16, F32, SIZES, Tolerance, gpu, tiled_gpu, tolerance};
use energyflow::graph::Op;
use energyflow::types::DType;

fn normalised(dtype: DType, dims: &[usize], low: f32, high: f32) -> Case {
    let mut case = Case::new(dims.iter().sum::<usize>() as u64, dtype);
    let cols = dims[dims.len() - 1];
    let x = case.input_in(dims, low, high);
    let (gamma, beta) = (case.parameter(&[cols]), case.parameter(&[cols]));
    let op = Op::LayerNorm { eps: 1e-5 };
    let results = case.graph.apply(op, &[x, gamma, beta]).unwrap();
    case.output("y", results[0]);
    case.output("statistics", results[1]);
    case
}

fn gradient(dtype: DType, dims: &[usize]) -> Case {
    let mut case = Case::new(5, dtype);
    let cols = dims[dims.len() - 1];
    let x = case.input(dims);
    let (gamma, beta) = (case.parameter(&[cols]), case.parameter(&[cols]));
    let y = case.graph.layer_norm(x, gamma, beta, 1e-5).unwrap();
    case.gradients(y, &[x, gamma, beta]);
    case
}

#[test]
fn values_and_statistics() {
    for dtype in [DType::F32, DType::F16] {
        for (i, &cols) in SIZES.iter().enumerate() {
            let rows = SIZES[(i + 5) % SIZES.len()];
            normalised(dtype, &[rows, cols], -1.0, 3.0).check(tolerance(dtype));
        }
        normalised(dtype, &[3, 5, 769], -1.0, 3.0).check(tolerance(dtype));
        normalised(dtype, &[40], -1.0, 3.0).check(tolerance(dtype));
    }
}

#[test]
fn many_rows_of_few_columns() {
    normalised(DType::F32, &[1025, 6], -1.0, 1.0).check(F32);
    gradient(DType::F32, &[1025, 6]).check(F32);
}

/// More columns than the invocations of a row hold in registers, and just as many.
#[test]
fn few_rows_of_many_columns() {
    for dtype in [DType::F32, DType::F16] {
        for cols in [8191, 8192, 8197] {
            normalised(dtype, &[3, cols], -1.0, 1.0).check(tolerance(dtype));
            gradient(dtype, &[3, cols]).check(tolerance(dtype));
        }
    }
}

#[test]
fn gradients() {
    // The f16 reference rounds y and every gradient to f16, too.
    for (dtype, bound) in [(DType::F32, F32), (DType::F16, F16)] {
        for dims in [
            &[1, 7][..],
            &[7, 31],
            &[31, 32],
            &[2, 16, 33],
            &[63, 65],
            &[64, 127],
            &[65, 128],
            &[129, 2],
        ] {
            // x̂ is ±1 in two columns: there dx is the difference of nearly equal numbers.
            let slack = if dims.last() == Some(&2) { 50.0 } else { 1.0 };
            let bound = Tolerance {
                normalised: slack * bound.normalised,
                relative: slack * bound.relative,
            };
            gradient(dtype, dims).check(bound);
        }
    }
}

/// One column: dx is 0, but a fused multiply-add leaves the rounding of dy·gamma, which 1/√eps = 316 enlarges.
#[test]
fn one_column_has_no_gradient() {
    for dtype in [DType::F32, DType::F16] {
        let case = gradient(dtype, &[13, 1]);
        for gpu in [gpu(), tiled_gpu()] {
            let (outputs, expected) = case.run_on(&gpu);
            let dx = outputs.get("gradient 0").unwrap();
            assert!(dx.iter().all(|x| x.abs() < 317.0 * f32::EPSILON), "{dx:?}");
            // dgamma is 0, too; dbeta is a sum of 13 numbers below 1, in f16 on both sides or on neither.
            let dgamma = outputs.get("gradient 1").unwrap()[0];
            assert!(dgamma.abs() < 13.0 * 317.0 * f32::EPSILON, "{dgamma}");
            let dbeta = outputs.get("gradient 2").unwrap()[0];
            let exact = expected["gradient 2"].data()[0];
            assert!((f64::from(dbeta) - exact).abs() < 1e-5, "{dbeta} {exact}");
        }
    }
}

#[test]
fn gradients_agree_with_finite_differences() {
    for dims in [&[3, 5][..], &[2, 2, 4]] {
        let mut case = Case::new(6, DType::F32);
        let cols = dims[dims.len() - 1];
        let x = case.input(dims);
        let (gamma, beta) = (case.parameter(&[cols]), case.parameter(&[cols]));
        let y = case.graph.layer_norm(x, gamma, beta, 1e-2).unwrap();
        case.check_finite_differences(y, &[x, gamma, beta], 1e-6);
    }
}

#[test]
fn one_column_leaves_beta() {
    for dtype in [DType::F32, DType::F16] {
        let case = normalised(dtype, &[33, 1], -8.0, 8.0);
        case.check(tolerance(dtype));
        let (outputs, _) = case.run_on(&gpu());
        let y = outputs.get("y").unwrap();
        assert!(y.iter().all(|&other| other == y[0]), "{y:?}");
    }
}

/// The mean itself is held with an error of half a unit in its last place; x − mean must not suffer from that.
#[test]
fn large_mean_and_small_variance() {
    for cols in [63, 128, 1000] {
        let case = normalised(DType::F32, &[9, cols], 1000.0, 1000.2);
        for gpu in [gpu(), tiled_gpu()] {
            case.check_on(&gpu, F32);
        }
    }
}

/// A mean of 1e6 has no digits below 0.06 in f32: y and all gradients, where rows are held in registers and where they are not.
#[test]
fn a_spread_of_one_around_a_million() {
    let bound = Tolerance {
        normalised: 1e-5,
        relative: 1e-4,
    };
    for (dtype, mean, bound) in [
        (DType::F32, 1e6, bound),
        (DType::F32, -3e7, bound),
        (DType::F16, 1e3, F16),
    ] {
        for dims in [[7, 63], [3, 8197]] {
            let mut case = Case::new(8, dtype);
            let spread = if mean < -1e7 { 50.0 } else { 1.0 };
            let x = case.input_in(&dims, mean - spread, mean + spread);
            let (gamma, beta) = (case.parameter(&[dims[1]]), case.parameter(&[dims[1]]));
            let y = case.graph.layer_norm(x, gamma, beta, 1e-5).unwrap();
            case.output("y", y);
            case.gradients(y, &[x, gamma, beta]);
            for gpu in [gpu(), tiled_gpu()] {
                case.check_on(&gpu, bound);
            }
        }
    }
}

/// What is taken off first is one of the elements, and may be the only one that is large.
#[test]
fn a_first_element_far_from_the_others() {
    for first in [1e6, -1e3, 0.0] {
        let mut case = Case::new(9, DType::F32);
        let mut data = case.uniform(5 * 65, -1.0, 1.0);
        for row in data.chunks_mut(65) {
            row[0] = first;
        }
        let x = case.input_of(&[5, 65], DType::F32, data);
        let (gamma, beta) = (case.parameter(&[65]), case.parameter(&[65]));
        let y = case.graph.layer_norm(x, gamma, beta, 1e-5).unwrap();
        case.output("y", y);
        case.gradients(y, &[gamma, beta]);
        for gpu in [gpu(), tiled_gpu()] {
            case.check_on(&gpu, F32);
        }
    }
}

#[test]
fn rows_that_are_constant() {
    let mut case = Case::new(7, DType::F32);
    let data = (0..5).flat_map(|row| vec![row as f32 * 3.5; 33]).collect();
    let x = case.input_of(&[5, 33], DType::F32, data);
    let (gamma, beta) = (case.parameter(&[33]), case.parameter(&[33]));
    let op = Op::LayerNorm { eps: 1e-5 };
    let results = case.graph.apply(op, &[x, gamma, beta]).unwrap();
    case.output("y", results[0]);
    case.output("statistics", results[1]);
    case.check(F32);
}
