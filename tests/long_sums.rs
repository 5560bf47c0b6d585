//! Sums of many terms: no kernel loses terms where a driver bounds its loops, and none loses digits. Equal terms are the hardest: added up one
//! by one, each of them is rounded to the same side.

mod common;

use common::{Case, Tolerance, gpu, tiled_gpu};
use energyflow::graph::{Op, ValueId};
use energyflow::types::{DType, Trans, Window};

/// Of sums, means, norms, losses and counts.
const SUM: Tolerance = Tolerance {
    normalised: 1e-6,
    relative: 1e-6,
};

/// Of products.
const PRODUCT: Tolerance = Tolerance {
    normalised: 1e-5,
    relative: 1e-5,
};

/// Of products in f32 on matrix units, of equal terms and of random ones: up to 8192 terms are added without blocks (docs/kernels.md).
const PRODUCT_ON_UNITS: Tolerance = Tolerance {
    normalised: 1.2e-4,
    relative: 1.2e-4,
};
const RANDOM_ON_UNITS: Tolerance = Tolerance {
    normalised: 5e-6,
    relative: 5e-5,
};

/// The second one where products in f32 are computed by matrix units.
fn without_or_on_units(without: Tolerance, on_units: Tolerance) -> Tolerance {
    match tiled_gpu().capabilities().matrix_units {
        Some(units) if units.f32 => on_units,
        _ => without,
    }
}

fn of_products() -> Tolerance {
    without_or_on_units(PRODUCT, PRODUCT_ON_UNITS)
}

/// More than a driver may do in one invocation, with four of them in a step.
const LONG: usize = 300_000;

fn case() -> Case {
    Case::new(1, DType::F32)
}

fn constant(case: &mut Case, dims: &[usize], dtype: DType, number: f32) -> ValueId {
    let data = vec![number; dims.iter().product()];
    case.input_of(dims, dtype, data)
}

/// Positive, so that nothing cancels.
fn positive(case: &mut Case, dims: &[usize], dtype: DType) -> ValueId {
    let data = case.uniform(dims.iter().product(), 0.0, 1.0);
    case.input_of(dims, dtype, data)
}

fn sums(case: &mut Case, name: &str, x: ValueId) {
    let sums = [
        case.graph.sum_rows(x).unwrap(),
        case.graph.sum_cols(x).unwrap(),
        case.graph.sum_all(x).unwrap(),
    ];
    for (i, sum) in sums.into_iter().enumerate() {
        case.output(&format!("{name} {i}"), sum);
    }
}

#[test]
fn sums_over_rows_columns_and_everything() {
    for dtype in [DType::F32, DType::F16] {
        let mut case = case();
        for (i, dims) in [[1, LONG], [LONG, 3], [1100, 17_000]]
            .into_iter()
            .enumerate()
        {
            let ones = constant(&mut case, &dims, dtype, 1.0);
            sums(&mut case, &format!("ones {i}"), ones);
        }
        for dims in [[1, LONG], [LONG, 2]] {
            let x = positive(&mut case, &dims, dtype);
            sums(&mut case, &format!("{dims:?}"), x);
        }
        case.check(SUM);
    }
}

#[test]
fn ten_million_terms() {
    let mut case = case();
    let x = constant(&mut case, &[1, 10_000_000], DType::F32, 0.1);
    let all = case.graph.sum_all(x).unwrap();
    let root = case.graph.global_norm(&[x]).unwrap();
    case.output("sum", all);
    case.output("norm", root);
    let columns = constant(&mut case, &[1_600_000, 16], DType::F32, 0.1);
    let rows = case.graph.sum_rows(columns).unwrap();
    case.output("columns", rows);
    case.check(SUM);
}

#[test]
fn sums_over_groups_of_rows() {
    for dtype in [DType::F32, DType::F16] {
        let mut case = case();
        for (groups, period, cols) in [(1, LONG, 2), (2, 70_000, 5), (3, 4097, 7)] {
            let x = constant(&mut case, &[groups * period, cols], DType::F32, 0.1);
            let x = case.graph.cast(x, dtype).unwrap();
            let sum = case.graph.apply(Op::SumGroups { period }, &[x]).unwrap()[0];
            // What fits into f16.
            let mean = case.graph.affine(sum, 1.0 / period as f32, 0.5).unwrap();
            case.output(&format!("{period}"), mean);
            let loss = case.graph.sum_all(mean).unwrap();
            let gradient = case.graph.gradients(loss, &[x]).unwrap()[0];
            case.output(&format!("{period} gradient"), gradient);
        }
        case.check(if dtype == DType::F16 {
            common::F16
        } else {
            SUM
        });
    }
}

#[test]
fn masked_means_and_their_gradients() {
    for dtype in [DType::F32, DType::F16] {
        let mut case = case();
        for (samples, time, cols) in [(1, LONG, 3), (2, 70_001, 5), (3, 1025, 2)] {
            let x = constant(&mut case, &[samples, time, cols], dtype, 0.1);
            let counts = [case.mask(samples * time), {
                let data = vec![0.3; samples * time];
                case.input_of(&[samples * time], DType::F32, data)
            }];
            for (i, mask) in counts.into_iter().enumerate() {
                let y = case.graph.masked_mean(x, mask).unwrap();
                case.output(&format!("{time} {i}"), y);
                let loss = case.graph.sum_all(y).unwrap();
                let gradient = case.graph.gradients(loss, &[x]).unwrap()[0];
                case.output(&format!("{time} {i} gradient"), gradient);
            }
        }
        case.check(if dtype == DType::F16 {
            common::F16
        } else {
            SUM
        });
    }
}

#[test]
fn norm_of_a_large_parameter() {
    let mut case = case();
    let values = [
        constant(&mut case, &[20_000_000], DType::F32, 0.01),
        constant(&mut case, &[1000, 129], DType::F32, 0.01),
    ];
    let norm = case.graph.global_norm(&values).unwrap();
    case.output("norm", norm);
    case.check(SUM);
}

#[test]
fn distillation_of_wide_and_of_many_samples() {
    for (samples, width) in [(2, LONG), (LONG, 3)] {
        let mut case = case();
        let y = constant(&mut case, &[samples, width], DType::F32, 0.1);
        let t = positive(&mut case, &[samples, width], DType::F32);
        let loss = case.graph.kd_loss(y, t, 0.5, 2.0).unwrap();
        let gradient = case.graph.gradients(loss.loss, &[y]).unwrap()[0];
        let outputs = [loss.loss, loss.cosine, loss.mse, gradient];
        for (i, output) in outputs.into_iter().enumerate() {
            case.output(&format!("{i}"), output);
        }
        case.check(Tolerance {
            relative: 2e-5,
            ..SUM
        });
    }
}

/// Losses, counts and gradients of many classes and of many targets, some of which do not count.
#[test]
fn cross_entropy_of_many_classes_and_targets() {
    for dtype in [DType::F32, DType::F16] {
        for (rows, classes) in [(3, LONG), (LONG, 3)] {
            for (ignore, smoothing) in [(None, 0.0), (Some(1), 0.1)] {
                let mut case = case();
                let logits = case.input_of(
                    &[rows, classes],
                    dtype,
                    (0..rows * classes).map(|i| (i % 7) as f32 * 0.25).collect(),
                );
                let targets = (0..rows).map(|i| (i * 100_003 % classes.min(rows)) as u32);
                let targets = case.ids_of(targets.collect(), classes as u32);
                let loss = case.graph.cross_entropy(logits, targets, ignore, smoothing);
                let loss = loss.unwrap();
                let gradient = case.graph.gradients(loss.loss, &[logits]).unwrap()[0];
                let outputs = [("loss", loss.loss), ("count", loss.count)];
                for (name, output) in outputs.into_iter().chain([("gradient", gradient)]) {
                    case.output(name, output);
                }
                case.check(match dtype {
                    DType::F16 => common::F16,
                    _ => Tolerance {
                        normalised: 1e-6,
                        relative: 2e-5,
                    },
                });
            }
        }
    }
}

#[test]
fn the_loss_alone_of_many_classes() {
    let mut case = case();
    let logits = constant(&mut case, &[2, LONG], DType::F32, 0.3);
    let targets = case.ids_of(vec![0, LONG as u32 - 1], LONG as u32);
    let loss = case
        .graph
        .cross_entropy(logits, targets, None, 0.1)
        .unwrap();
    case.output("loss", loss.loss);
    case.check(SUM);
}

/// As many equal logits as one invocation takes alone where there are no barriers: the loss alone, and with its gradient. The first is
/// the target and larger, so that the others add exp(-10) each, three times what it adds. Ones would add up exactly.
#[test]
fn cross_entropy_of_equal_logits() {
    for smoothing in [0.0, 0.1] {
        let mut case = case();
        let row = || [10.0].into_iter().chain([0.0; 65_535]);
        let data = row().chain(row()).collect();
        let logits = case.input_of(&[2, 65_536], DType::F32, data);
        let targets = case.ids_of(vec![0, 0], 65_536);
        let loss = case
            .graph
            .cross_entropy(logits, targets, None, smoothing)
            .unwrap();
        case.output("loss", loss.loss);
        case.check(SUM);
        let gradient = case.graph.gradients(loss.loss, &[logits]).unwrap()[0];
        case.output("gradient", gradient);
        case.check(Tolerance {
            normalised: 1e-6,
            relative: 1e-5,
        });
    }
}

#[test]
fn linear_cross_entropy_of_many_classes_and_targets() {
    for (rows, classes) in [(3, LONG), (LONG, 3)] {
        let mut case = case();
        let (x, weight) = (case.input(&[rows, 4]), case.input(&[classes, 4]));
        let bias = case.input(&[classes]);
        let targets = (0..rows).map(|i| (i * 100_003 % classes.min(rows)) as u32);
        let targets = case.ids_of(targets.collect(), classes as u32);
        let loss = case
            .graph
            .linear_cross_entropy(x, weight, Some(bias), targets, Some(1), 0.1)
            .unwrap();
        let gradients = case.graph.gradients(loss.loss, &[x, weight, bias]).unwrap();
        let outputs = [loss.loss, loss.count].into_iter().chain(gradients);
        for (i, output) in outputs.enumerate() {
            case.output(&format!("{i}"), output);
        }
        let without = Tolerance {
            normalised: 2e-6,
            relative: 2e-5,
        };
        case.check(without_or_on_units(without, RANDOM_ON_UNITS));
    }
}

fn product(case: &mut Case, [m, n, k]: [usize; 3], trans: Trans, dtype: DType, number: f32) {
    let (a, b) = match trans {
        Trans::NN => ([m, k], [k, n]),
        Trans::NT => ([m, k], [n, k]),
        Trans::TN => ([k, m], [k, n]),
    };
    let a = constant(case, &a, dtype, number);
    let b = positive(case, &b, dtype);
    let b = case.graph.affine(b, 0.0, 1.0).unwrap();
    let y = case.graph.matmul(a, b, trans).unwrap();
    let y = case.graph.affine(y, 1.0 / k as f32, 0.0).unwrap();
    case.output(&format!("{trans:?} {m} {n} {k} {number}"), y);
}

#[test]
fn products_over_a_long_k() {
    for dtype in [DType::F32, DType::F16] {
        let mut case = case();
        for trans in [Trans::NN, Trans::NT, Trans::TN] {
            product(&mut case, [3, 2, LONG], trans, dtype, 0.1);
            product(&mut case, [9, 5, 70_003], trans, dtype, 0.3);
        }
        case.check(match dtype {
            DType::F16 => common::F16,
            _ => of_products(),
        });
    }
    // Too short to be cut into parts of K.
    let mut case = self::case();
    for trans in [Trans::NN, Trans::NT, Trans::TN] {
        product(&mut case, [9, 5, 8200], trans, DType::F32, 0.1);
        product(&mut case, [9, 5, 16_384], trans, DType::F32, 0.1);
    }
    case.check(of_products());
    let mut case = self::case();
    product(&mut case, [1, 1, 1_000_000], Trans::NT, DType::F32, 0.01);
    product(&mut case, [9, 1, 1_000_000], Trans::NT, DType::F32, 0.01);
    case.check(of_products());
}

#[test]
fn batches_of_products_over_a_long_k() {
    let mut case = case();
    for (i, (a, b, trans)) in [
        ([2, 3, LONG + 1], [2, LONG + 1, 5], Trans::NN),
        ([2, 3, LONG + 1], [2, 5, LONG + 1], Trans::NT),
        ([3, 70_003, 2], [3, 70_003, 5], Trans::TN),
    ]
    .into_iter()
    .enumerate()
    {
        let (a, b) = (
            positive(&mut case, &a, DType::F32),
            constant(&mut case, &b, DType::F32, 0.1),
        );
        let y = case.graph.batch_matmul(a, b, trans).unwrap();
        case.output(&format!("{i}"), y);
    }
    case.check(of_products());
}

/// Repeated ids, all different ids, and ids that come in runs; one that gets nothing.
#[test]
fn gradients_of_tables_by_many_ids() {
    let n = 70_000;
    for dtype in [DType::F32, DType::F16] {
        for (vocabulary, padding, id) in [
            (3, None, (|_| 1) as fn(usize) -> usize),
            (5, Some(2), |i| i * i % 5),
            (80_000, Some(4), |i| i * 7919 % 80_000),
            (900, Some(0), |i| i / 100),
        ] {
            let mut case = case();
            let dy = constant(&mut case, &[n, 6], dtype, 0.1);
            let ids = (0..n).map(|i| id(i) as u32).collect();
            let ids = case.ids_of(ids, vocabulary as u32);
            let op = Op::GatherGrad {
                rows: vocabulary,
                padding,
            };
            let table = case.graph.apply(op, &[ids, dy]).unwrap()[0];
            case.output("table", table);
            case.check(SUM);
        }
    }
}

#[test]
fn one_id_a_million_times_and_as_often_as_one_invocation_takes() {
    for n in [1_000_000, 32_768] {
        let mut case = case();
        let dy = constant(&mut case, &[n, 3], DType::F32, 0.1);
        let ids = case.ids_of(vec![1; n], 2);
        let op = Op::GatherGrad {
            rows: 2,
            padding: None,
        };
        let table = case.graph.apply(op, &[ids, dy]).unwrap()[0];
        case.output("table", table);
        case.check(SUM);
    }
}

#[test]
fn layer_norm_of_wide_rows_and_of_many() {
    for dims in [[2, LONG], [2, 65_536], [LONG, 6]] {
        let mut case = case();
        let x = case.input(&dims);
        let (gamma, beta) = (case.parameter(&[dims[1]]), case.parameter(&[dims[1]]));
        let y = case.graph.layer_norm(x, gamma, beta, 1e-5).unwrap();
        case.output("y", y);
        let dy = positive(&mut case, &dims, DType::F32);
        let loss = case.graph.mul(y, dy).unwrap();
        let loss = case.graph.sum_all(loss).unwrap();
        let gradients = case.graph.gradients(loss, &[x, gamma, beta]).unwrap();
        for (i, gradient) in gradients.into_iter().enumerate() {
            case.output(&format!("gradient {i}"), gradient);
        }
        case.check(Tolerance {
            normalised: 2e-6,
            relative: 3e-5,
        });
    }
}

/// Four elements and four gradients over and over, so that all sums are of equal terms.
#[test]
fn layer_norm_of_equal_terms() {
    let mut case = case();
    let dims = [2, 65_536];
    let repeated = |four: [f32; 4]| four.repeat(dims[0] * dims[1] / 4);
    let x = case.input_of(&dims, DType::F32, repeated([0.1, 0.3, -0.2, 0.7]));
    let dy = case.input_of(&dims, DType::F32, repeated([0.1, 0.3, 0.2, 0.1]));
    let (gamma, beta) = (case.parameter(&[dims[1]]), case.parameter(&[dims[1]]));
    let y = case.graph.layer_norm(x, gamma, beta, 1e-5).unwrap();
    case.output("y", y);
    let loss = case.graph.mul(y, dy).unwrap();
    let loss = case.graph.sum_all(loss).unwrap();
    let gradient = case.graph.gradients(loss, &[x]).unwrap()[0];
    case.output("gradient", gradient);
    case.check(Tolerance {
        normalised: 4e-6,
        relative: 3e-5,
    });
}

#[test]
fn windows_of_many_taps() {
    for (time, kernel, dilation, stride) in [
        (LONG, LONG, 1, 1),
        (LONG, 100_000, 2, 50_000),
        (9, 7, 2, 2),
        (90, 70, 1, 3),
        (7, 4, 1, 1),
    ] {
        let mut case = case();
        for channels in [1, 4] {
            if channels * kernel * 4 > 1 << 21 {
                continue;
            }
            let padding = energyflow::types::Padding::Valid;
            let fits = time > (kernel - 1) * dilation;
            let padding = if fits { padding } else { Default::default() };
            let window = Window::new(time, kernel, dilation, stride, padding).unwrap();
            let columns = case.input(&[2 * window.steps(), kernel * channels]);
            let back = case.graph.apply(Op::Col2im(window), &[columns]).unwrap()[0];
            case.output(&format!("{channels}"), back);
        }
        case.check(common::F32);
    }
}

#[test]
fn many_scalars_and_many_operands() {
    let mut case = case();
    for n in [8, 14, 40] {
        let scalars: Vec<_> = (0..n).map(|_| case.input(&[1])).collect();
        let y = case.graph.stack(&scalars).unwrap();
        case.output(&format!("{n} scalars"), y);
    }
    let values: Vec<_> = (0..40).map(|_| case.input(&[3, 5])).collect();
    let mut sum = values[0];
    for &value in &values[1..] {
        sum = case.graph.add(sum, value).unwrap();
    }
    case.output("sum", sum);
    for (i, &value) in values.iter().enumerate() {
        let product = case.graph.mul(value, sum).unwrap();
        case.output(&format!("product {i}"), product);
    }
    let mut y = sum;
    for i in 0..20 {
        y = case.graph.affine(y, 0.5, 1.0).unwrap();
        case.output(&format!("link {i}"), y);
    }
    let norm = case.graph.global_norm(&values).unwrap();
    case.output("norm", norm);
    case.check(common::F32);
}

/// More than f32 can count one by one.
#[test]
fn counts_beyond_what_f32_counts_in_ones() {
    let rows = (1 << 24) + 4096;
    let mut case = case();
    let ones = constant(&mut case, &[1, rows], DType::F32, 1.0);
    let all = case.graph.sum_all(ones).unwrap();
    case.output("count", all);
    for gpu in [gpu(), tiled_gpu()] {
        let count = case.run_on(&gpu).0.scalar("count").unwrap();
        assert_eq!(count, rows as f32);
    }
}
