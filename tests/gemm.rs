//! Matrix products of every orientation and type, alone and with everything that fuses behind them.

mod common;

use common::{Case, SIZES, tiled_gpu, tolerance};
use energyflow::types::{DType, Trans, UnaryOp};

fn dims(trans: Trans, m: usize, n: usize, k: usize) -> ([usize; 2], [usize; 2]) {
    match trans {
        Trans::NN => ([m, k], [k, n]),
        Trans::NT => ([m, k], [n, k]),
        Trans::TN => ([k, m], [k, n]),
    }
}

fn product(dtype: DType, trans: Trans, m: usize, n: usize, k: usize) -> Case {
    let mut case = Case::new((m * 1_000_000 + n * 1000 + k) as u64, dtype);
    let (a, b) = dims(trans, m, n, k);
    let (a, b) = (case.input(&a), case.input(&b));
    let c = case.graph.matmul(a, b, trans).unwrap();
    case.output("c", c);
    case
}

/// Every size once in every position, paired with others.
fn straddle(dtype: DType, trans: Trans) {
    for (i, &size) in SIZES.iter().enumerate() {
        let other = SIZES[(i + 5) % SIZES.len()];
        let third = SIZES[(i + 8) % SIZES.len()];
        product(dtype, trans, size, other, third).check(tolerance(dtype));
    }
}

#[test]
fn nn_f32() {
    straddle(DType::F32, Trans::NN);
}

#[test]
fn nt_f32() {
    straddle(DType::F32, Trans::NT);
}

#[test]
fn tn_f32() {
    straddle(DType::F32, Trans::TN);
}

#[test]
fn nn_f16() {
    straddle(DType::F16, Trans::NN);
}

#[test]
fn nt_f16() {
    straddle(DType::F16, Trans::NT);
}

#[test]
fn tn_f16() {
    straddle(DType::F16, Trans::TN);
}

/// Many blocks of the larger tiles, each extent just above a multiple of the tile. Which tile is used depends on the adapter; unit tests
/// of the kernels try each.
#[test]
fn large_products() {
    for dtype in [DType::F32, DType::F16] {
        for trans in [Trans::NN, Trans::NT, Trans::TN] {
            for (m, n, k) in [(513, 450, 37), (1025, 900, 19)] {
                let case = product(dtype, trans, m, n, k);
                case.check_on(&tiled_gpu(), tolerance(dtype));
            }
        }
    }
}

/// Long K and a small result: where K is split, the parts are added up by a second kernel that takes the epilogue.
#[test]
fn split_k() {
    for dtype in [DType::F32, DType::F16] {
        for trans in [Trans::NN, Trans::NT, Trans::TN] {
            for (m, n, k) in [(33, 65, 2049), (64, 64, 1024), (9, 7, 257), (129, 13, 1031)] {
                let mut case = Case::new(k as u64, dtype);
                let (a, b) = dims(trans, m, n, k);
                let (a, b) = (case.input(&a), case.input(&b));
                let bias = case.parameter(&[n]);
                let c = case.graph.matmul(a, b, trans).unwrap();
                let c = case.graph.add_bias(c, bias).unwrap();
                case.output("c", c);
                case.check_on(&tiled_gpu(), tolerance(dtype));
            }
        }
    }
}

#[test]
fn split_k_of_large_tiles() {
    for (dtype, trans) in [(DType::F32, Trans::TN), (DType::F16, Trans::NT)] {
        let case = product(dtype, trans, 300, 260, 6001);
        case.check_on(&tiled_gpu(), tolerance(dtype));
    }
}

#[test]
fn epilogue_of_bias_gelu_residual_and_mask() {
    for dtype in [DType::F32, DType::F16] {
        for (m, n, k) in [(33, 65, 13), (64, 32, 128), (5, 1, 7)] {
            let mut case = Case::new(7, dtype);
            let (x, w) = (case.input(&[m, k]), case.input(&[n, k]));
            let bias = case.parameter(&[n]);
            let residual = case.input(&[m, n]);
            let mask = case.mask(m);
            let g = &mut case.graph;
            let h = g.matmul(x, w, Trans::NT).unwrap();
            let h = g.add_bias(h, bias).unwrap();
            let y = g.unary(UnaryOp::GeluTanh, h).unwrap();
            let y = g.add(y, residual).unwrap();
            let y = g.mul_rows(y, mask).unwrap();
            case.output("pre-activation", h);
            case.output("y", y);
            case.check(tolerance(dtype));
        }
    }
}

#[test]
fn gradients_of_every_orientation() {
    for dtype in [DType::F32, DType::F16] {
        for trans in [Trans::NN, Trans::NT, Trans::TN] {
            let mut case = Case::new(11, dtype);
            let (a, b) = dims(trans, 33, 17, 29);
            let (a, b) = (case.input(&a), case.input(&b));
            let c = case.graph.matmul(a, b, trans).unwrap();
            case.gradients(c, &[a, b]);
            case.check(tolerance(dtype));
        }
    }
}

#[test]
fn finite_differences() {
    for trans in [Trans::NN, Trans::NT, Trans::TN] {
        let mut case = Case::new(3, DType::F32);
        let (a, b) = dims(trans, 3, 4, 5);
        let (a, b) = (case.input(&a), case.input(&b));
        let c = case.graph.matmul(a, b, trans).unwrap();
        case.check_finite_differences(c, &[a, b], 1e-7);
    }
}

/// A few rows against a stored [N, K] matrix: inference of one sample or a few.
#[test]
fn few_rows() {
    for dtype in [DType::F32, DType::F16] {
        for (m, n, k) in [
            (1, 1, 1),
            (1, 127, 5),
            (2, 9, 255),
            (3, 64, 256),
            (7, 33, 257),
            (8, 130, 1031),
        ] {
            let mut case = Case::new(k as u64, dtype);
            let (x, w) = (case.input(&[m, k]), case.input(&[n, k]));
            let bias = case.parameter(&[n]);
            let h = case.graph.matmul(x, w, Trans::NT).unwrap();
            let h = case.graph.add_bias(h, bias).unwrap();
            let y = case.graph.unary(UnaryOp::GeluTanh, h).unwrap();
            case.output("h", h);
            case.output("y", y);
            let running = case.start(&tiled_gpu());
            let keys: Vec<&str> = running.executable.sources().map(|(key, _)| key).collect();
            assert!(keys[0].starts_with("gemm_skinny"), "{keys:?}");
            case.check(tolerance(dtype));
        }
    }
}

/// Products of matrices that lie one behind the other, with everything that fuses behind them.
#[test]
fn batches() {
    for dtype in [DType::F32, DType::F16] {
        for trans in [Trans::NN, Trans::NT, Trans::TN] {
            for (batch, m, n, k) in [
                (2, 1, 1, 1),
                (3, 7, 5, 9),
                (5, 33, 31, 65),
                (2, 70, 129, 40),
            ] {
                let mut case = Case::new(17, dtype);
                let ([a0, a1], [b0, b1]) = dims(trans, m, n, k);
                let (a, b) = (case.input(&[batch, a0, a1]), case.input(&[batch, b0, b1]));
                let bias = case.parameter(&[n]);
                let c = case.graph.batch_matmul(a, b, trans).unwrap();
                assert_eq!(case.graph.value(c).unwrap().shape.dims(), [batch, m, n]);
                let c = case.graph.add_bias(c, bias).unwrap();
                case.output("c", c);
                case.gradients(c, &[a, b, bias]);
                case.check(tolerance(dtype));
            }
        }
    }
}

#[test]
fn batches_by_finite_differences() {
    for trans in [Trans::NN, Trans::NT, Trans::TN] {
        let mut case = Case::new(19, DType::F32);
        let ([a0, a1], [b0, b1]) = dims(trans, 3, 4, 5);
        let (a, b) = (case.input(&[2, a0, a1]), case.input(&[2, b0, b1]));
        let c = case.graph.batch_matmul(a, b, trans).unwrap();
        case.check_finite_differences(c, &[a, b], 1e-7);
    }
}

#[test]
fn batches_that_do_not_fit_are_refused() {
    let mut case = Case::new(1, DType::F32);
    let (a, b) = (case.input(&[2, 3, 4]), case.input(&[3, 4, 5]));
    let matrix = case.input(&[8, 5]);
    assert!(case.graph.batch_matmul(a, b, Trans::NN).is_err());
    assert!(case.graph.batch_matmul(a, matrix, Trans::NN).is_err());
    assert!(case.graph.batch_matmul(matrix, a, Trans::NN).is_err());
}
