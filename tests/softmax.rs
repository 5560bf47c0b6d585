//! Softmax, its logarithm, and their gradients.

mod common;

use common::{Case, F16, F32, SIZES, Tolerance, gpu, tiled_gpu, tolerance};
use energyflow::types::DType;
use energyflow::{Graph, Host, Session};

fn both(dtype: DType, dims: &[usize], low: f32, high: f32) -> Case {
    let mut case = Case::new(dims.iter().sum::<usize>() as u64, dtype);
    let x = case.input_in(dims, low, high);
    let softmax = case.graph.softmax(x).unwrap();
    let log = case.graph.log_softmax(x).unwrap();
    case.output("softmax", softmax);
    case.output("log", log);
    let sum = case.graph.add(softmax, log).unwrap();
    case.gradients(sum, &[x]);
    case
}

#[test]
fn values_and_gradients() {
    // Shaders take long to compile: element types take turns.
    let types = [DType::F32, DType::F16];
    for (i, &cols) in SIZES.iter().enumerate().skip(1) {
        let rows = SIZES[(i + 5) % SIZES.len()];
        let dtype = types[i % 2];
        both(dtype, &[rows, cols], -3.0, 3.0).check(tolerance(dtype));
    }
    for dtype in types {
        both(dtype, &[2, 3, 769], -1.0, 3.0).check(tolerance(dtype));
        both(dtype, &[40], -1.0, 3.0).check(tolerance(dtype));
        both(dtype, &[1025, 9], -1.0, 3.0).check(tolerance(dtype));
    }
}

/// What the invocations of a row have in registers, and more.
#[test]
fn wide_rows() {
    for dtype in [DType::F32, DType::F16] {
        for cols in [4093, 8197] {
            // Probabilities are small: in f16 they have few digits.
            let bound = match dtype {
                DType::F16 => Tolerance {
                    normalised: 2e-3,
                    relative: 2e-2,
                },
                _ => F32,
            };
            both(dtype, &[3, cols], -2.0, 9.0).check(bound);
        }
    }
}

/// The only probability is 1, and nothing changes it.
#[test]
fn one_column() {
    for dtype in [DType::F32, DType::F16] {
        let case = both(dtype, &[33, 1], -8.0, 8.0);
        for gpu in [gpu(), tiled_gpu()] {
            let (outputs, _) = case.run_on(&gpu);
            let all = |name: &str, number: f32| {
                let got = outputs.get(name).unwrap();
                assert!(got.iter().all(|x| (x - number).abs() < 1e-6), "{got:?}");
            };
            all("softmax", 1.0);
            all("log", 0.0);
            all("gradient 0", 0.0);
        }
    }
}

#[test]
fn gradients_agree_with_finite_differences() {
    for log in [false, true] {
        let mut case = Case::new(6, DType::F32);
        let x = case.input(&[3, 7]);
        let y = match log {
            true => case.graph.log_softmax(x).unwrap(),
            false => case.graph.softmax(x).unwrap(),
        };
        case.check_finite_differences(y, &[x], 1e-6);
    }
}

/// Integers of up to ten thousand are exact, and so are their differences.
#[test]
fn logits_of_ten_thousand() {
    for dtype in [DType::F32, DType::F16] {
        let mut case = Case::new(8, dtype);
        let data = (0..5 * 65)
            .map(|i| match i % 3 {
                0 => 10_000.0 - 16.0 * (i % 2) as f32,
                1 => -10_000.0,
                _ => 9_984.0,
            })
            .collect();
        let x = case.input_of(&[5, 65], dtype, data);
        let softmax = case.graph.softmax(x).unwrap();
        let log = case.graph.log_softmax(x).unwrap();
        case.output("softmax", softmax);
        case.output("log", log);
        case.gradients(softmax, &[x]);
        case.check(tolerance(dtype));
    }
}

/// −∞ has probability 0; NaN, +∞ and nothing but −∞ have no softmax, in one row and not in the next.
#[test]
fn infinities_and_nan() {
    const INF: f32 = f32::INFINITY;
    let cols = 70;
    let rows: [(&[(usize, f32)], bool); 5] = [
        (&[(0, -INF), (69, -INF)], true),
        (&[(5, INF)], false),
        (&[(66, f32::NAN)], false),
        (&[], true),
        (&[(1, -INF)], true),
    ];
    let mut data = Vec::new();
    for (places, _) in rows {
        let mut row = vec![1.0; cols];
        for &(place, x) in places {
            row[place] = x;
        }
        data.extend(row);
    }
    data.extend(vec![-INF; cols]);
    for gpu in [gpu(), tiled_gpu()] {
        for dtype in [DType::F32, DType::F16] {
            let mut graph = Graph::new();
            let x = graph.input("x", &[rows.len() + 1, cols], dtype).unwrap();
            let y = graph.softmax(x).unwrap();
            let log = graph.log_softmax(x).unwrap();
            graph.output("y", y).unwrap();
            graph.output("log", log).unwrap();
            let mut session = Session::new(&gpu, 0);
            let executable = session.compile(&graph).unwrap();
            executable.poison().unwrap();
            let outputs = executable.run(&[("x", Host::from(&data))]).unwrap();
            let outputs = outputs.wait().unwrap();
            let y = outputs.get("y").unwrap();
            let log = outputs.get("log").unwrap();
            for (r, (places, exists)) in rows.iter().chain([&(&[][..], false)]).enumerate() {
                let range = r * cols..(r + 1) * cols;
                let (y, log) = (&y[range.clone()], &log[range]);
                if !exists {
                    assert!(y.iter().all(|x| x.is_nan()), "row {r}: {y:?}");
                    continue;
                }
                let hidden = places.len();
                let rest = 1.0 / (cols - hidden) as f32;
                for c in 0..cols {
                    let is_hidden = places.iter().any(|(place, _)| *place == c);
                    let (p, l) = match is_hidden {
                        true => (0.0, -INF),
                        false => (rest, rest.ln()),
                    };
                    assert!((y[c] - p).abs() < 1e-5, "row {r}: {y:?}");
                    assert!(log[c] == l || (log[c] - l).abs() < 4e-3, "row {r}: {log:?}");
                }
            }
        }
    }
}

/// Softmax with what follows it is one kernel, and so is its gradient.
#[test]
fn one_dispatch_each() {
    let mut case = Case::new(4, DType::F16);
    let x = case.input_in(&[5, 33], -2.0, 2.0);
    let y = case.graph.softmax(x).unwrap();
    let y = case.graph.affine(y, 3.0, 1.0).unwrap();
    case.output("y", y);
    assert_eq!(case.dispatches(), 1);
    case.check(F16);
}
