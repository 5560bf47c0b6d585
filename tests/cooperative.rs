//! Matrix products on matrix units. `scripts/test` runs these tests on a driver that has them; elsewhere they are ignored.

mod common;

use common::{Case, F16, Tolerance, cooperative_gpu, tolerance};
use energyflow::graph::AttentionOptions;
use energyflow::types::{DType, Trans, UnaryOp};
use energyflow::{Gpu, GpuOptions};

fn dims(trans: Trans, m: usize, n: usize, k: usize) -> ([usize; 2], [usize; 2]) {
    match trans {
        Trans::NN => ([m, k], [k, n]),
        Trans::NT => ([m, k], [n, k]),
        Trans::TN => ([k, m], [k, n]),
    }
}

fn product(trans: Trans, m: usize, n: usize, k: usize, out: DType) -> Case {
    let mut case = Case::new((m * 1_000_000 + n * 1000 + k) as u64, DType::F16);
    let (a, b) = dims(trans, m, n, k);
    let (a, b) = (case.input(&a), case.input(&b));
    let c = case.graph.matmul_as(a, b, trans, out).unwrap();
    case.output("c", c);
    case
}

/// Fails unless the first kernel uses matrix units.
fn check(case: &Case, out: DType) -> Vec<String> {
    let running = case.start(&cooperative_gpu());
    let keys: Vec<String> = running
        .executable
        .sources()
        .map(|(key, _)| key.to_owned())
        .collect();
    // A few rows against a stored [N, K] matrix have a kernel of their own.
    let skinny = keys[0].starts_with("gemm_skinny") && keys[0].contains("trans=NT");
    assert!(
        skinny || keys[0].starts_with("gemm_cooperative"),
        "{keys:?}"
    );
    case.check_on(&cooperative_gpu(), tolerance(out));
    keys
}

/// Every size once in every position, paired with others: K with zero, one and several steps behind the first.
fn straddle(trans: Trans) {
    // A driver without a GPU takes seconds to compile each: unit tests of the kernels have every tile.
    const SIZES: [usize; 4] = [1, 33, 64, 129];
    for (i, &size) in SIZES.iter().enumerate() {
        let out = [DType::F16, DType::F32][i % 2];
        let other = SIZES[(i + 1) % SIZES.len()];
        let third = SIZES[(i + 2) % SIZES.len()];
        check(&product(trans, size, other, third, out), out);
    }
}

#[test]
#[ignore = "needs matrix units"]
fn nn() {
    straddle(Trans::NN);
}

#[test]
#[ignore = "needs matrix units"]
fn nt() {
    straddle(Trans::NT);
}

#[test]
#[ignore = "needs matrix units"]
fn tn() {
    straddle(Trans::TN);
}

/// K just around the numbers of steps that the pipeline treats differently.
#[test]
#[ignore = "needs matrix units"]
fn every_number_of_steps() {
    for trans in [Trans::NN, Trans::NT, Trans::TN] {
        for k in [16, 33, 65] {
            check(&product(trans, 37, 21, k, DType::F16), DType::F16);
        }
    }
}

#[test]
#[ignore = "needs matrix units"]
fn long_k() {
    for trans in [Trans::NN, Trans::NT, Trans::TN] {
        check(&product(trans, 33, 65, 4099, DType::F32), DType::F32);
    }
}

#[test]
#[ignore = "needs matrix units"]
fn batches() {
    for trans in [Trans::NN, Trans::NT, Trans::TN] {
        let (batch, m, n, k) = (3, 33, 18, 29);
        let mut case = Case::new(23, DType::F16);
        let ([a0, a1], [b0, b1]) = dims(trans, m, n, k);
        let (a, b) = (case.input(&[batch, a0, a1]), case.input(&[batch, b0, b1]));
        let c = case.graph.batch_matmul(a, b, trans).unwrap();
        case.output("c", c);
        check(&case, DType::F16);
    }
}

#[test]
#[ignore = "needs matrix units"]
fn epilogue_of_bias_gelu_residual_and_mask() {
    for (m, n, k) in [(33, 65, 13), (130, 300, 70)] {
        let mut case = Case::new(7, DType::F16);
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
        check(&case, DType::F16);
    }
}

#[test]
#[ignore = "needs matrix units"]
fn gradients_of_every_orientation() {
    for trans in [Trans::NN, Trans::NT, Trans::TN] {
        let mut case = Case::new(11, DType::F16);
        let (a, b) = dims(trans, 33, 17, 29);
        let (a, b) = (case.input(&a), case.input(&b));
        let c = case.graph.matmul(a, b, trans).unwrap();
        case.gradients(c, &[a, b]);
        case.check_on(&cooperative_gpu(), F16);
    }
}

/// Infinite operands stay where they are: padding behind K does not turn them into NaN elsewhere.
#[test]
#[ignore = "needs matrix units"]
fn infinities_do_not_spread() {
    for trans in [Trans::NN, Trans::NT, Trans::TN] {
        let (m, n, k) = (20, 24, 37);
        let mut case = Case::new(13, DType::F16);
        let (a, b) = dims(trans, m, n, k);
        let mut data = vec![1.0; m * k];
        // Element (3, k - 1) of A.
        let at = match trans {
            Trans::TN => (k - 1) * m + 3,
            _ => 3 * k + k - 1,
        };
        data[at] = f32::INFINITY;
        let (a, b) = (
            case.input_of(&a, DType::F16, data),
            case.input_of(&b, DType::F16, vec![0.5; n * k]),
        );
        let c = case.graph.matmul(a, b, trans).unwrap();
        case.output("c", c);
        let (outputs, _) = case.run_on(&cooperative_gpu());
        let c = outputs.get("c").unwrap();
        for (i, &x) in c.iter().enumerate() {
            let expected = if i / n == 3 { f32::INFINITY } else { 18.5 };
            assert_eq!(x, expected, "{trans:?}, element {i}");
        }
    }
}

#[test]
#[ignore = "needs matrix units"]
fn they_can_be_left_out() {
    let gpu = Gpu::new(&GpuOptions::from_env().unwrap().cooperative(false)).unwrap();
    assert_eq!(gpu.capabilities().matrix_units, None);
    assert!(!gpu.capabilities().cooperative_matrix.is_empty());
    assert!(
        cooperative_gpu()
            .capabilities()
            .kernel_tier()
            .contains("cooperative")
    );
    let report = cooperative_gpu().report().to_string();
    assert!(report.contains("products use"), "{report}");
}

/// Widths of heads that matrices divide and that they do not, all keys and some, every number of subgroups.
#[test]
#[ignore = "needs matrix units"]
fn attention_and_its_gradients() {
    // With a scale of 1, the largest score of a query grows by more than 8 from one step to the next.
    for ([batch, time, heads, d], causal, scale) in [
        ([2, 5, 3, 12], false, None),
        ([1, 41, 1, 32], true, None),
        ([2, 33, 2, 24], false, None),
        ([1, 70, 2, 32], false, Some(1.0)),
        ([1, 67, 1, 40], true, Some(1.0)),
    ] {
        let mut case = Case::new(31, DType::F16);
        let qkv = case.input_in(&[batch, time, 3 * heads * d], -2.0, 2.0);
        let mask = case.mask(batch * time);
        let options = AttentionOptions::new(heads).causal(causal).scale(scale);
        let y = case.graph.attention(qkv, Some(mask), options).unwrap();
        case.output("y", y);
        case.gradients(y, &[qkv]);
        let running = case.start(&cooperative_gpu());
        for name in ["attention_cooperative", "attention_grad_cooperative"] {
            let mut keys = running.executable.sources().map(|(key, _)| key);
            assert!(keys.any(|key| key.starts_with(name)), "{name}");
        }
        // Probabilities and derivatives by scores are f16 between the products.
        let bound = Tolerance {
            normalised: 3e-3,
            relative: 2e-2,
        };
        case.check_on(&cooperative_gpu(), bound);
    }
}
