//! Distillation loss and cross entropy, with their gradients.

mod common;

use common::{Case, F32, SIZES, Tolerance, gpu, tolerance};
use energyflow::Error;
use energyflow::graph::Op;
use energyflow::types::DType;

/// Scalars, and sums with cancellation.
fn bound(dtype: DType) -> Tolerance {
    let Tolerance { relative, .. } = tolerance(dtype);
    Tolerance {
        normalised: relative,
        relative: 2.0 * relative,
    }
}

fn distillation(dtype: DType, dims: [usize; 2], [alpha, beta]: [f32; 2]) -> Case {
    let mut case = Case::new(dims[0] as u64, dtype);
    let (y, t) = (case.input(&dims), case.input_in(&dims, -0.5, 1.0));
    let op = Op::KdLoss { alpha, beta };
    let results = case.graph.apply(op, &[y, t]).unwrap();
    for (name, &value) in ["loss", "cosine", "mse", "rows"].iter().zip(&results) {
        case.output(name, value);
    }
    let gradient = case.graph.gradients(results[0], &[y]).unwrap()[0];
    case.output("gradient", gradient);
    case
}

#[test]
fn distillation_values_and_gradients() {
    for dtype in [DType::F32, DType::F16] {
        for (i, &width) in SIZES.iter().enumerate() {
            let batch = SIZES[(i + 5) % SIZES.len()];
            let weights = [[1.0, 1.0], [0.7, 0.0], [0.0, 2.5]][i % 3];
            distillation(dtype, [batch, width], weights).check(bound(dtype));
        }
        distillation(dtype, [4, 768], [1.0, 1.0]).check(bound(dtype));
    }
}

#[test]
fn distillation_differentiates_every_result() {
    for dtype in [DType::F32, DType::F16] {
        let mut case = Case::new(2, dtype);
        let (y, t) = (case.input(&[7, 33]), case.input(&[7, 33]));
        let kd = case.graph.kd_loss(y, t, 0.5, 0.25).unwrap();
        let g = &mut case.graph;
        let scaled = g.affine(kd.cosine, -3.0, 1.0).unwrap();
        let total = g.add(scaled, kd.mse).unwrap();
        let total = g.add(total, kd.loss).unwrap();
        for (name, loss) in [("cosine", kd.cosine), ("mse", kd.mse), ("total", total)] {
            let gradient = case.graph.gradients(loss, &[y]).unwrap()[0];
            case.output(name, gradient);
        }
        case.check(bound(dtype));
    }
}

#[test]
fn distillation_agrees_with_finite_differences() {
    for result in 0..3 {
        let mut case = Case::new(3, DType::F32);
        let (y, t) = (case.input(&[3, 5]), case.input(&[3, 5]));
        let kd = case.graph.kd_loss(y, t, 0.5, 2.0).unwrap();
        let loss = [kd.loss, kd.cosine, kd.mse][result];
        case.check_finite_differences(loss, &[y], 1e-7);
    }
}

#[test]
fn distillation_of_equal_and_of_zero_vectors() {
    let mut case = Case::new(4, DType::F32);
    let row = case.uniform(33, -1.0, 1.0);
    let zero = vec![0.0; 33];
    let y = case.input_of(&[2, 33], DType::F32, [row.clone(), zero.clone()].concat());
    let t = case.input_of(&[2, 33], DType::F32, [row, zero].concat());
    let kd = case.graph.kd_loss(y, t, 1.0, 1.0).unwrap();
    let gradient = case.graph.gradients(kd.loss, &[y]).unwrap()[0];
    case.output("cosine", kd.cosine);
    case.output("mse", kd.mse);
    case.output("gradient", gradient);
    let (outputs, _) = case.run_on(&gpu());
    // Cosine 1 of the equal pair, 0 of the zero pair.
    assert!((outputs.scalar("cosine").unwrap() - 0.5).abs() < 1e-6);
    assert_eq!(outputs.scalar("mse").unwrap(), 0.0);
    let gradient = outputs.get("gradient").unwrap();
    assert!(gradient.iter().all(|g| g.abs() < 1e-7), "{gradient:?}");
}

#[test]
fn distillation_towards_a_zero_vector() {
    let mut case = Case::new(5, DType::F32);
    let y = case.input(&[3, 9]);
    let mut data = case.uniform(27, -1.0, 1.0);
    data[9..18].fill(0.0);
    let t = case.input_of(&[3, 9], DType::F32, data);
    let kd = case.graph.kd_loss(y, t, 1.0, 1.0).unwrap();
    let gradient = case.graph.gradients(kd.loss, &[y]).unwrap()[0];
    case.output("loss", kd.loss);
    case.output("gradient", gradient);
    case.check(bound(DType::F32));
    // From a zero vector the cosine's slope is t/(1e-6·‖t‖).
    let mut case = Case::new(5, DType::F32);
    let y = case.input_of(&[1, 9], DType::F32, vec![0.0; 9]);
    let t = case.input(&[1, 9]);
    let kd = case.graph.kd_loss(y, t, 1.0, 1.0).unwrap();
    let gradient = case.graph.gradients(kd.loss, &[y]).unwrap()[0];
    case.output("loss", kd.loss);
    case.output("gradient", gradient);
    case.check(bound(DType::F32));
}

/// Norms below 1e-6 are taken as 1e-6, and so do not change with y: the gradient of the cosine is t/(1e-6·‖t‖).
#[test]
fn distillation_of_vectors_shorter_than_the_smallest_norm() {
    for length in [4e-7, 9e-7, 3e-6] {
        let mut case = Case::new(11, DType::F32);
        let y = [0.6, -0.64, 0.48].map(|x| x * length);
        let y = case.input_of(&[1, 3], DType::F32, y.to_vec());
        let t = case.input_of(&[1, 3], DType::F32, vec![0.5, -0.75, 0.25]);
        let kd = case.graph.kd_loss(y, t, 1.0, 0.0).unwrap();
        let gradient = case.graph.gradients(kd.loss, &[y]).unwrap()[0];
        case.output("cosine", kd.cosine);
        case.output("gradient", gradient);
        case.check(bound(DType::F32));
        let (outputs, _) = case.run_on(&gpu());
        let first = outputs.get("gradient").unwrap()[0];
        let floored = -0.5 / 0.875_f32.sqrt() * 1e6;
        assert_eq!((first - floored).abs() < 10.0, length < 1e-6, "{first}");
    }
}

#[test]
fn distillation_has_no_gradient_for_its_target_or_statistics() {
    let mut case = Case::new(6, DType::F32);
    let (y, t) = (case.input(&[3, 4]), case.input(&[3, 4]));
    let op = Op::KdLoss {
        alpha: 1.0,
        beta: 1.0,
    };
    let results = case.graph.apply(op, &[y, t]).unwrap();
    let error = case.graph.gradients(results[0], &[t]).unwrap_err();
    assert!(matches!(error, Error::Graph(_)), "{error}");
    let sum = case.graph.sum_all(results[3]).unwrap();
    let total = case.graph.add(sum, results[0]).unwrap();
    let error = case.graph.gradients(total, &[y]).unwrap_err();
    assert!(error.to_string().contains("kd_loss"), "{error}");
}

struct Targets {
    ids: Vec<u32>,
    below: u32,
    ignore: Option<u32>,
    smoothing: f32,
}

fn entropy(dtype: DType, n: usize, v: usize, [low, high]: [f32; 2], targets: Targets) -> Case {
    let mut case = Case::new((n + v) as u64, dtype);
    let logits = case.input_in(&[n, v], low, high);
    let ids = case.ids_of(targets.ids, targets.below);
    let op = Op::CrossEntropy {
        ignore: targets.ignore,
        smoothing: targets.smoothing,
    };
    let results = case.graph.apply(op, &[logits, ids]).unwrap();
    for (name, &value) in ["loss", "count", "rows"].iter().zip(&results) {
        case.output(name, value);
    }
    let gradient = case.graph.gradients(results[0], &[logits]).unwrap()[0];
    case.output("gradient", gradient);
    case
}

/// Ids that meet the first, the last and many other classes.
fn ids(n: usize, v: usize) -> Vec<u32> {
    (0..n).map(|i| ((v - 1 + 7 * i) % v) as u32).collect()
}

#[test]
fn entropy_values_and_gradients() {
    for dtype in [DType::F32, DType::F16] {
        for (i, &v) in SIZES.iter().chain(&[999, 1000]).enumerate() {
            let n = SIZES[(i + 5) % SIZES.len()];
            let targets = Targets {
                ids: ids(n, v),
                below: v as u32,
                ignore: (i % 3 == 1).then_some(v as u32 / 2),
                smoothing: [0.0, 0.1][i % 2],
            };
            entropy(dtype, n, v, [-4.0, 4.0], targets).check(bound(dtype));
        }
    }
}

#[test]
fn entropy_agrees_with_finite_differences() {
    for smoothing in [0.0, 0.1] {
        let mut case = Case::new(7, DType::F32);
        let (logits, targets) = (case.input(&[5, 4]), case.ids(5, 4));
        let ce = case
            .graph
            .cross_entropy(logits, targets, Some(1), smoothing)
            .unwrap();
        case.check_finite_differences(ce.loss, &[logits], 1e-7);

        // The count may be part of the loss; it does not depend on the logits.
        let mut case = Case::new(7, DType::F32);
        let (logits, targets) = (case.input(&[5, 4]), case.ids(5, 4));
        let ce = case
            .graph
            .cross_entropy(logits, targets, Some(1), smoothing)
            .unwrap();
        let sum = case.graph.mul(ce.loss, ce.count).unwrap();
        case.check_finite_differences(sum, &[logits], 1e-7);
    }
}

#[test]
fn entropy_of_large_logits() {
    for smoothing in [0.0, 0.1] {
        let targets = Targets {
            ids: ids(13, 37),
            below: 37,
            ignore: None,
            smoothing,
        };
        // logsumexp is rounded to a unit in the last place of 1e4, and the probabilities come from it.
        let bound = Tolerance {
            normalised: 1e-3,
            relative: 1e-3,
        };
        entropy(DType::F32, 13, 37, [-1e4, 1e4], targets).check(bound);
    }
    let mut case = Case::new(8, DType::F32);
    let data = [[1e4, -1e4, 9999.0], [-1e4, 1e4, -1e4]].concat();
    let logits = case.input_of(&[2, 3], DType::F32, data);
    let targets = case.ids_of(vec![0, 1], 3);
    let ce = case
        .graph
        .cross_entropy(logits, targets, None, 0.0)
        .unwrap();
    case.output("loss", ce.loss);
    // ln(1 + 1/e)/2 + 0: lost if it came from logsumexp − 1e4.
    case.check(bound(DType::F32));
}

#[test]
fn everything_ignored_is_no_loss() {
    for dtype in [DType::F32, DType::F16] {
        // The second: an id that is no class at all.
        for (ignored, below) in [(3, 9), (9, 10)] {
            let targets = Targets {
                ids: vec![ignored; 17],
                below,
                ignore: Some(ignored),
                smoothing: 0.1,
            };
            let case = entropy(dtype, 17, 9, [-1.0, 1.0], targets);
            case.check(bound(dtype));
            let (outputs, _) = case.run_on(&gpu());
            assert_eq!(outputs.scalar("loss").unwrap(), 0.0);
            assert_eq!(outputs.scalar("count").unwrap(), 0.0);
            let gradient = outputs.get("gradient").unwrap();
            assert!(gradient.iter().all(|&g| g == 0.0));
        }
    }
}

#[test]
fn losses_of_a_sequence_and_a_scaled_gradient() {
    let mut case = Case::new(9, DType::F16);
    let logits = case.input(&[2, 7, 31]);
    let targets = case.ids(14, 31);
    let scale = case.input_of(&[1], DType::F32, vec![1024.0]);
    let ce = case
        .graph
        .cross_entropy(logits, targets, Some(0), 0.0)
        .unwrap();
    let gradient = case
        .graph
        .gradients_from(ce.loss, scale, &[logits])
        .unwrap();
    case.output("loss", ce.loss);
    case.output("gradient", gradient[0]);
    case.check(bound(DType::F16));
}

#[test]
fn single_losses_are_exact() {
    let mut case = Case::new(10, DType::F32);
    let logits = case.input_of(&[1, 2], DType::F32, vec![0.0, 0.0]);
    let targets = case.ids_of(vec![1], 2);
    let ce = case
        .graph
        .cross_entropy(logits, targets, None, 0.0)
        .unwrap();
    let gradient = case.graph.gradients(ce.loss, &[logits]).unwrap()[0];
    case.output("loss", ce.loss);
    case.output("gradient", gradient);
    case.check(F32);
    let (outputs, _) = case.run_on(&gpu());
    let loss = outputs.scalar("loss").unwrap();
    assert!((loss - std::f32::consts::LN_2).abs() < 1e-6, "{loss}");
    let gradient = outputs.get("gradient").unwrap();
    assert!((gradient[0] - 0.5).abs() < 1e-6 && (gradient[1] + 0.5).abs() < 1e-6);
}
