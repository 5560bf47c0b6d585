//! Sums, masked means, norms, scalars side by side.

mod common;

use common::{Case, F32, SIZES, Tolerance, gpu, tolerance};
use energyflow::graph::Op;
use energyflow::types::{BinaryOp, Broadcast, DType};

/// A single number has no others to average its error with.
const SCALAR: Tolerance = Tolerance {
    normalised: 2e-5,
    relative: 2e-5,
};

#[test]
fn sums_over_rows_columns_and_everything() {
    for dtype in [DType::F32, DType::F16] {
        for (i, &cols) in SIZES.iter().enumerate() {
            let rows = SIZES[(i + 5) % SIZES.len()];
            let mut case = Case::new(i as u64, dtype);
            let x = case.input_in(&[rows, cols], -0.5, 1.0);
            let values = [
                ("rows", case.graph.sum_rows(x).unwrap()),
                ("cols", case.graph.sum_cols(x).unwrap()),
                ("all", case.graph.sum_all(x).unwrap()),
            ];
            for (name, value) in values {
                case.output(name, value);
            }
            case.check(SCALAR);
        }
    }
}

#[test]
fn many_rows_and_many_columns() {
    for dims in [[8193, 3], [2, 5001], [4097, 1], [1, 1025]] {
        let mut case = Case::new(1, DType::F32);
        let x = case.input_in(&dims, -0.5, 1.0);
        let sums = [
            case.graph.sum_rows(x).unwrap(),
            case.graph.sum_cols(x).unwrap(),
            case.graph.sum_all(x).unwrap(),
        ];
        for (i, sum) in sums.into_iter().enumerate() {
            case.output(&format!("{i}"), sum);
        }
        case.check(SCALAR);
    }
}

#[test]
fn largest_elements_and_softmax() {
    let sizes = SIZES.iter().enumerate();
    let sizes = sizes.map(|(i, &cols)| (SIZES[(i + 5) % SIZES.len()], cols));
    for (i, (rows, cols)) in sizes.chain([(2, 5001), (1030, 9)]).enumerate() {
        for dtype in [DType::F32, DType::F16] {
            let mut case = Case::new(i as u64, dtype);
            let x = case.input_in(&[rows, cols], -4.0, 9.0);
            let [max, at] = case.graph.row_max(x).unwrap();
            case.output("max", max);
            case.output("at", at);
            if dtype == DType::F32 {
                let softmax = case.graph.softmax(x).unwrap();
                let total = case.graph.log_sum_exp(x).unwrap();
                case.output("softmax", softmax);
                case.output("total", total);
            }
            case.check(SCALAR);
        }
    }
}

/// Equal elements, zeros of both signs, infinities and NaN, whichever invocation sees them.
#[test]
fn largest_elements_of_awkward_rows() {
    const NAN: f32 = f32::NAN;
    const INF: f32 = f32::INFINITY;
    /// Elements that are not the others', the largest, its place.
    type Row = (&'static [(usize, f32)], f32, usize);
    let rows: [Row; 8] = [
        (&[(3, 2.0), (70, 2.0)], 2.0, 3),
        (&[(70, 1e-30)], 1e-30, 70),
        (&[(5, INF), (6, INF)], INF, 5),
        (&[(2, INF), (90, NAN)], NAN, 90),
        (&[(41, NAN), (99, NAN)], NAN, 41),
        (&[(0, -0.0), (1, 0.0)], 0.0, 0),
        (&[(0, -1.0), (1, -0.0)], 0.0, 1),
        (&[], 0.0, 0),
    ];
    let (cols, low) = (101, -INF);
    let mut data = Vec::new();
    for (places, ..) in rows {
        let rest = if places.is_empty() { low } else { 0.0 };
        let mut row = vec![rest; cols];
        for &(place, x) in places {
            row[place] = x;
        }
        data.extend(row);
    }
    for gpu in [gpu(), common::tiled_gpu()] {
        let mut graph = energyflow::Graph::new();
        let x = graph.input("x", &[rows.len(), cols], DType::F32).unwrap();
        let [max, at] = graph.row_max(x).unwrap();
        graph.output("max", max).unwrap();
        graph.output("at", at).unwrap();
        let mut session = energyflow::Session::new(&gpu, 0);
        let executable = session.compile(&graph).unwrap();
        let inputs = [("x", energyflow::Host::from(&data))];
        let outputs = executable.run(&inputs).unwrap().wait().unwrap();
        let (max, at) = (outputs.get("max").unwrap(), outputs.get("at").unwrap());
        for (i, (places, largest, column)) in rows.into_iter().enumerate() {
            let largest = if places.is_empty() { low } else { largest };
            assert!(
                max[i] == largest || max[i].is_nan() && largest.is_nan(),
                "{i}: {}",
                max[i]
            );
            assert_eq!(at[i], column as f32, "{i}");
        }
    }
}

#[test]
fn sums_over_groups_of_rows() {
    for dtype in [DType::F32, DType::F16] {
        for (groups, period, cols) in [(1, 1, 1), (3, 7, 31), (2, 64, 33), (31, 2, 128), (13, 1, 7)]
        {
            let mut case = Case::new(2, dtype);
            let x = case.input(&[groups * period, cols]);
            let sums = case.graph.apply(Op::SumGroups { period }, &[x]).unwrap()[0];
            let scaled = case.graph.affine(sums, 0.5, 1.0).unwrap();
            case.output("sums", sums);
            case.output("scaled", scaled);
            assert_eq!(case.dispatches(), 1);
            case.gradients(scaled, &[x]);
            case.check(tolerance(dtype));
        }
    }
}

#[test]
fn sums_over_tiles_of_rows() {
    for dtype in [DType::F32, DType::F16] {
        for (tiles, period, rows, cols) in [
            (1, 1, 1, 1),
            (3, 7, 9, 31),
            (64, 2, 2, 33),
            (65, 3, 5, 12),
            (300, 1, 2, 7),
        ] {
            let mut case = Case::new(2, dtype);
            let x = case.input(&[tiles * period, cols]);
            let sums = Op::SumTiles { period, rows };
            let sums = case.graph.apply(sums, &[x]).unwrap()[0];
            case.output("sums", sums);
            case.check(tolerance(dtype));
        }
    }
}

/// The gradient of a table that is longer than the samples, also by finite differences.
#[test]
fn a_table_of_positions() {
    for (samples, time, rows, cols) in [(2, 3, 5, 7), (70, 2, 2, 16), (5, 1, 2, 33)] {
        let mut case = Case::new(4, DType::F32);
        let x = case.input(&[samples, time, cols]);
        let table = case.parameter(&[rows, cols]);
        let y = case.graph.add_positions(x, table).unwrap();
        let y = case.graph.mul(y, y).unwrap();
        case.output("y", y);
        case.gradients(y, &[x, table]);
        case.check(F32);
    }
    let mut case = Case::new(5, DType::F32);
    let x = case.input(&[2, 3, 4]);
    let table = case.parameter(&[5, 4]);
    let y = case.graph.add_positions(x, table).unwrap();
    let y = case.graph.mul(y, y).unwrap();
    let sums = Op::SumTiles { period: 3, rows: 3 };
    let y = case.graph.apply(sums, &[y]).unwrap()[0];
    case.check_finite_differences(y, &[x, table], 1e-6);

    // What is computed in the same kernel must have as many rows as are read.
    let mut case = Case::new(6, DType::F32);
    let x = case.input(&[4, 3]);
    let y = case.graph.affine(x, 2.0, 0.0).unwrap();
    let tiles = Broadcast::Tiles { period: 2 };
    let error = case.graph.binary(BinaryOp::Add, tiles, x, y).unwrap_err();
    assert!(error.to_string().contains("period rows"), "{error}");
    let tiles = Broadcast::Tiles { period: 3 };
    assert!(case.graph.binary(BinaryOp::Add, tiles, x, y).is_err());
}

#[test]
fn gradients_of_sums() {
    for dtype in [DType::F32, DType::F16] {
        for dims in [&[1, 7][..], &[5, 3, 33], &[65, 32], &[129]] {
            let mut case = Case::new(3, dtype);
            let x = case.input(dims);
            let g = &mut case.graph;
            let rows = g.sum_rows(x).unwrap();
            let cols = g.sum_cols(x).unwrap();
            let all = g.sum_all(x).unwrap();
            let losses = [rows, cols, all].map(|sum| case.random_loss(sum));
            let g = &mut case.graph;
            let total = g.add(losses[0], losses[1]).unwrap();
            let total = g.add(total, losses[2]).unwrap();
            let gradient = g.gradients(total, &[x]).unwrap()[0];
            case.output("gradient", gradient);
            case.check(tolerance(dtype));
        }
    }
}

#[test]
fn masked_mean_and_its_gradient() {
    for dtype in [DType::F32, DType::F16] {
        for (samples, time, cols) in [
            (1, 1, 1),
            (2, 7, 31),
            (3, 13, 32),
            (2, 31, 33),
            (5, 64, 7),
            (1, 129, 65),
            (7, 8, 127),
        ] {
            let mut case = Case::new(4, dtype);
            let x = case.input(&[samples, time, cols]);
            let mask = case.mask(samples * time);
            let y = case.graph.masked_mean(x, mask).unwrap();
            case.output("y", y);
            case.gradients(y, &[x]);
            case.check(tolerance(dtype));
        }
    }
}

#[test]
fn a_sample_without_any_step_has_mean_zero() {
    for dtype in [DType::F32, DType::F16] {
        let mut case = Case::new(5, dtype);
        let x = case.input(&[3, 5, 6]);
        let mask = [[1.0; 5], [0.0; 5], [1.0, 0.0, 1.0, 1.0, 0.0]].concat();
        let mask = case.input_of(&[15], dtype, mask);
        let y = case.graph.masked_mean(x, mask).unwrap();
        case.output("y", y);
        case.gradients(y, &[x]);
        case.check(tolerance(dtype));
        let y = case.run_on(&gpu()).0.get("y").unwrap();
        assert_eq!(y[6..12], [0.0; 6]);
    }
}

/// The masked mean of a spread gradient: the rule for [`Op::MaskedMeanGrad`].
#[test]
fn gradients_agree_with_finite_differences() {
    let mut case = Case::new(6, DType::F32);
    let (x, mask) = (case.input(&[2, 3, 4]), case.mask(6));
    let y = case.graph.masked_mean(x, mask).unwrap();
    case.check_finite_differences(y, &[x], 1e-7);

    let mut case = Case::new(6, DType::F32);
    let (x, mask) = (case.input(&[2, 4]), case.mask(6));
    let op = Op::MaskedMeanGrad { time: 3 };
    let y = case.graph.apply(op, &[x, mask]).unwrap()[0];
    case.check_finite_differences(y, &[x], 1e-7);

    for op in [
        Op::SumRows,
        Op::SumCols,
        Op::SumAll,
        Op::SumGroups { period: 3 },
    ] {
        let mut case = Case::new(6, DType::F32);
        let x = case.input(&[6, 4]);
        let y = case.graph.apply(op, &[x]).unwrap()[0];
        case.check_finite_differences(y, &[x], 1e-7);
    }
}

#[test]
fn scalars_side_by_side() {
    for n in 1..=8 {
        let mut case = Case::new(7, DType::F32);
        let scalars: Vec<_> = (0..n).map(|_| case.input(&[1])).collect();
        let y = case.graph.stack(&scalars).unwrap();
        case.output("y", y);
        case.check(F32);
    }
    let mut case = Case::new(7, DType::F16);
    let (a, b) = (case.input(&[1]), case.input(&[1]));
    let y = case.graph.stack(&[a, b, a]).unwrap();
    case.output("y", y);
    case.check(F32);
}

#[test]
fn norm_of_several_values() {
    for shapes in [
        vec![vec![1]],
        vec![vec![7], vec![31, 33], vec![2, 3, 5]],
        // More than one part each.
        vec![vec![129, 257], vec![20_000], vec![64, 1]],
    ] {
        let mut case = Case::new(8, DType::F32);
        let values: Vec<_> = shapes.iter().map(|dims| case.input(dims)).collect();
        let norm = case.graph.global_norm(&values).unwrap();
        case.output("norm", norm);
        case.check(SCALAR);
    }
}

#[test]
fn norm_sees_what_is_not_finite() {
    for bad in [f32::NAN, f32::INFINITY] {
        let mut case = Case::new(9, DType::F32);
        let mut data = vec![1.0; 1000];
        data[997] = bad;
        let values = [
            case.input(&[5, 9]),
            case.input_of(&[1000], DType::F32, data),
        ];
        let norm = case.graph.global_norm(&values).unwrap();
        case.output("norm", norm);
        let norm = case.run_on(&gpu()).0.scalar("norm").unwrap();
        assert!(!norm.is_finite(), "{norm}");
    }
}
