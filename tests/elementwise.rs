//! Functions of one and two elements: values, derivatives, broadcasts, casts, extreme arguments.

mod common;

use common::{Case, F32, Tolerance, baseline_gpu, gpu, tiled_gpu, tolerance};
use energyflow::types::{BinaryOp, Broadcast, DType, UnaryOp};

/// Every function with the arguments it is tested at.
const UNARY: [(UnaryOp, [f32; 2]); 21] = [
    (UnaryOp::Identity, [-4.0, 4.0]),
    (
        UnaryOp::Affine {
            scale: -2.5,
            offset: 0.75,
        },
        [-4.0, 4.0],
    ),
    (
        UnaryOp::Affine {
            scale: 1.0,
            offset: -0.5,
        },
        [-4.0, 4.0],
    ),
    (
        UnaryOp::Clamp {
            min: -0.5,
            max: 1.25,
        },
        [-4.0, 4.0],
    ),
    (
        UnaryOp::Clamp {
            min: 0.25,
            max: f32::INFINITY,
        },
        [-4.0, 4.0],
    ),
    (UnaryOp::Abs, [-4.0, 4.0]),
    (UnaryOp::Square, [-4.0, 4.0]),
    (UnaryOp::Exp, [-4.0, 4.0]),
    (UnaryOp::Cos, [-4.0, 4.0]),
    (UnaryOp::Tanh, [-4.0, 4.0]),
    (UnaryOp::Sigmoid, [-4.0, 4.0]),
    (UnaryOp::Relu, [-4.0, 4.0]),
    (UnaryOp::GeluTanh, [-4.0, 4.0]),
    (UnaryOp::GeluErf, [-4.0, 4.0]),
    (UnaryOp::IsFinite, [-4.0, 4.0]),
    (UnaryOp::Detach, [-4.0, 4.0]),
    (UnaryOp::Sqrt, [0.1, 4.0]),
    (UnaryOp::Rsqrt, [0.1, 4.0]),
    (UnaryOp::Recip, [0.1, 4.0]),
    (UnaryOp::Log, [0.1, 4.0]),
    (
        UnaryOp::Affine {
            scale: 3.0,
            offset: 0.0,
        },
        [0.1, 4.0],
    ),
];

const BINARY: [BinaryOp; 7] = [
    BinaryOp::Add,
    BinaryOp::Sub,
    BinaryOp::Mul,
    BinaryOp::Div,
    BinaryOp::Max,
    BinaryOp::Min,
    BinaryOp::Greater,
];

/// A single element has no others to average its error with.
fn one_by_one(dtype: DType) -> Tolerance {
    let Tolerance { relative, .. } = tolerance(dtype);
    Tolerance {
        normalised: relative,
        relative,
    }
}

/// Elementwise kernels know no barriers: one device for each way to store halves is enough.
fn check(case: &Case, bound: Tolerance) {
    case.check_on(&gpu(), bound);
    if case.dtype == DType::F16 {
        case.check_on(&baseline_gpu(), bound);
    }
}

/// Samples, time steps, channels.
const EXTENTS: [[usize; 3]; 7] = [
    [1, 1, 1],
    [1, 7, 31],
    [3, 11, 32],
    [2, 32, 33],
    [5, 13, 63],
    [1, 64, 127],
    [2, 3, 129],
];

/// Broadcasts over [B, L, C] and the shape of the second operand.
fn broadcasts([b, l, c]: [usize; 3]) -> [(Broadcast, Vec<usize>); 6] {
    [
        (Broadcast::Same, vec![b, l, c]),
        (Broadcast::Cols, vec![c]),
        (Broadcast::Rows, vec![b * l]),
        (Broadcast::Scalar, vec![1]),
        (Broadcast::Groups { period: l }, vec![b, c]),
        (Broadcast::Tiles { period: l }, vec![l, c]),
    ]
}

#[test]
fn every_function_of_one_element() {
    for dtype in [DType::F32, DType::F16] {
        for extents in EXTENTS {
            let mut case = Case::new(1, dtype);
            let signed = case.input_in(&extents, -4.0, 4.0);
            let positive = case.input_in(&extents, 0.1, 4.0);
            for (i, (op, [low, _])) in UNARY.into_iter().enumerate() {
                let x = if low < 0.0 { signed } else { positive };
                let y = case.graph.unary(op, x).unwrap();
                case.output(&format!("{i} {op:?}"), y);
            }
            check(&case, one_by_one(dtype));
        }
    }
}

#[test]
fn every_derivative() {
    for dtype in [DType::F32, DType::F16] {
        for extents in [[2, 3, 33], [1, 1, 1], [1, 31, 64]] {
            let mut case = Case::new(2, dtype);
            let signed = case.input_in(&extents, -4.0, 4.0);
            let positive = case.input_in(&extents, 0.1, 4.0);
            let dy = case.input(&extents);
            for (i, (op, [low, _])) in UNARY.into_iter().enumerate() {
                let x = if low < 0.0 { signed } else { positive };
                let derivative = BinaryOp::UnaryGrad(op);
                let dx = case
                    .graph
                    .binary(derivative, Broadcast::Same, x, dy)
                    .unwrap();
                case.output(&format!("{i} {op:?}"), dx);
            }
            check(&case, one_by_one(dtype));
        }
    }
}

#[test]
fn derivatives_agree_with_finite_differences() {
    for (op, [low, high]) in UNARY {
        if matches!(op, UnaryOp::IsFinite | UnaryOp::Detach) {
            continue;
        }
        let mut case = Case::new(3, DType::F32);
        let x = case.input_in(&[3, 5], low, high);
        let y = case.graph.unary(op, x).unwrap();
        case.check_finite_differences(y, &[x], 1e-6);
    }
}

#[test]
fn every_function_of_two_elements_and_every_broadcast() {
    for dtype in [DType::F32, DType::F16] {
        for extents in EXTENTS {
            let mut case = Case::new(4, dtype);
            let a = case.input(&extents);
            for (broadcast, dims) in broadcasts(extents) {
                let b = case.input_in(&dims, 0.5, 2.0);
                for op in BINARY {
                    let y = case.graph.binary(op, broadcast, a, b).unwrap();
                    case.output(&format!("{op:?} {broadcast:?}"), y);
                }
            }
            check(&case, tolerance(dtype));
        }
    }
}

#[test]
fn gradients_of_both_operands_under_every_broadcast() {
    for dtype in [DType::F32, DType::F16] {
        for op in &BINARY[..6] {
            let extents = [3, 5, 33];
            let mut case = Case::new(5, dtype);
            let a = case.input(&extents);
            let mut wrt = vec![a];
            let mut total = None;
            for (broadcast, dims) in broadcasts(extents) {
                let b = case.input_in(&dims, 0.5, 2.0);
                wrt.push(b);
                let y = case.graph.binary(*op, broadcast, a, b).unwrap();
                let loss = case.random_loss(y);
                total = Some(match total {
                    None => loss,
                    Some(sum) => case.graph.add(sum, loss).unwrap(),
                });
            }
            let gradients = case.graph.gradients(total.unwrap(), &wrt).unwrap();
            for (i, gradient) in gradients.into_iter().enumerate() {
                case.output(&format!("gradient {i}"), gradient);
            }
            case.check(tolerance(dtype));
        }
    }
}

#[test]
fn binary_gradients_agree_with_finite_differences() {
    for op in &BINARY[..6] {
        let extents = [2, 2, 3];
        for (broadcast, dims) in broadcasts(extents) {
            let mut case = Case::new(6, DType::F32);
            let a = case.input(&extents);
            let b = case.input_in(&dims, 0.5, 2.0);
            let y = case.graph.binary(*op, broadcast, a, b).unwrap();
            case.check_finite_differences(y, &[a, b], 1e-6);
        }
    }
}

#[test]
fn operands_of_different_types() {
    for (of_a, of_b) in [(DType::F32, DType::F16), (DType::F16, DType::F32)] {
        for (broadcast, dims) in broadcasts([2, 7, 33]) {
            let mut case = Case::new(7, of_a);
            let a = case.input(&[2, 7, 33]);
            let data = case.uniform(dims.iter().product(), -1.0, 1.0);
            let b = case.input_of(&dims, of_b, data);
            let result = case.graph.binary(BinaryOp::Mul, broadcast, a, b);
            // A bias, a mask and a scale may be of another type, a whole operand may not.
            let whole = |broadcast| {
                use Broadcast::{Groups, Same, Tiles};
                matches!(broadcast, Same | Groups { .. } | Tiles { .. })
            };
            if whole(broadcast) {
                let text = result.unwrap_err().to_string();
                assert!(text.starts_with("mul") && text.contains("cast"), "{text}");
                continue;
            }
            let y = result.unwrap();
            case.output("y", y);
            case.gradients(y, &[a, b]);
            case.check(tolerance(DType::F16));
        }
    }
}

#[test]
fn a_vector_and_a_matrix_of_one_row() {
    let mut case = Case::new(8, DType::F32);
    let (matrix, vector) = (case.input(&[1, 37]), case.input(&[37]));
    let y = case.graph.mul(matrix, vector).unwrap();
    let z = case.graph.mul(vector, y).unwrap();
    case.output("y", y);
    case.output("z", z);
    case.gradients(z, &[matrix, vector]);
    case.check(F32);

    let mut case = Case::new(8, DType::F32);
    let (x, z) = (case.input(&[1, 5, 7]), case.input(&[7]));
    let y = case.graph.add_over_time(x, z).unwrap();
    case.gradients(y, &[x, z]);
    case.check(F32);
}

/// Rows of other lengths, vectors and matrices: copies, whose gradients are copied back.
#[test]
fn reshapes_to_any_shape() {
    for dtype in [DType::F32, DType::F16] {
        let mut case = Case::new(10, dtype);
        for (from, to) in [
            (&[4, 3][..], &[12][..]),
            (&[12], &[4, 3]),
            (&[1, 7], &[7]),
            (&[7], &[1, 7]),
            (&[2, 3, 5], &[5, 6]),
            (&[33, 2], &[2, 3, 11]),
            (&[128, 1], &[1, 128]),
            (&[3, 65], &[13, 15]),
        ] {
            let x = case.input(from);
            let y = case.graph.reshape(x, to).unwrap();
            let z = case.graph.affine(y, 2.0, 1.0).unwrap();
            let loss = case.random_loss(z);
            let gradient = case.graph.gradients(loss, &[x]).unwrap()[0];
            assert_eq!(case.graph.value(gradient).unwrap().shape.dims(), from);
            for (name, value) in [("y", y), ("z", z), ("gradient", gradient)] {
                case.output(&format!("{name} {from:?} {to:?}"), value);
            }
        }
        check(&case, tolerance(dtype));
    }
    // Indices are copied bit by bit.
    let mut case = Case::new(10, DType::F32);
    let table = case.input(&[50, 3]);
    let ids = case.ids(6, 50);
    let square = case.graph.reshape(ids, &[2, 3]).unwrap();
    let again = case.graph.reshape(square, &[6]).unwrap();
    let rows = case.graph.gather(table, again, None).unwrap();
    case.output("rows", rows);
    check(&case, F32);
}

/// More workgroups than one dimension of a grid holds.
#[test]
fn a_folded_grid() {
    let mut case = Case::new(13, DType::F32);
    let x = case.input(&[1_100_000, 1]);
    let y = case.graph.affine(x, 3.0, -1.0).unwrap();
    case.output("y", y);
    case.check_on(&gpu(), F32);
}

#[test]
fn casts_there_and_back() {
    for dims in [&[1][..], &[7, 31], &[2, 3, 65], &[129]] {
        let mut case = Case::new(9, DType::F32);
        let x = case.input_in(dims, -100.0, 100.0);
        let half = case.graph.cast(x, DType::F16).unwrap();
        let back = case.graph.cast(half, DType::F32).unwrap();
        let sum = case.graph.add(back, x).unwrap();
        case.output("half", half);
        case.output("sum", sum);
        let gradient_input = case.input(dims);
        let narrow = case.graph.cast(gradient_input, DType::F16).unwrap();
        case.gradients(narrow, &[gradient_input]);
        case.check(tolerance(DType::F16));
    }
}

#[test]
fn halves_beyond_their_range_become_infinite_or_the_largest() {
    let mut case = Case::new(10, DType::F32);
    let data = vec![1e6, -1e6, 65504.0, -65504.0, 6e-8, 1e-12];
    let x = case.input_of(&[6], DType::F32, data);
    let y = case.graph.cast(x, DType::F16).unwrap();
    case.output("y", y);
    for gpu in [gpu(), baseline_gpu()] {
        let y = case.run_on(&gpu).0.get("y").unwrap();
        assert!(y[0] >= 65504.0 && y[1] <= -65504.0, "{y:?}");
        assert_eq!(y[2..4], [65504.0, -65504.0]);
        assert!(y[4].abs() < 1e-7 && y[5] == 0.0, "{y:?}");
    }
}

#[test]
fn is_finite_sees_infinities_and_nan() {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let data = vec![0.0, -inf, 1.0, inf, nan, -nan, -0.0, 65504.0, 1e-7];
    let expected = [1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0];
    for dtype in [DType::F32, DType::F16] {
        let mut case = Case::new(11, dtype);
        let x = case.input_of(&[9], dtype, data.clone());
        let y = case.graph.unary(UnaryOp::IsFinite, x).unwrap();
        case.output("y", y);
        for gpu in [gpu(), baseline_gpu()] {
            assert_eq!(case.run_on(&gpu).0.get("y").unwrap(), expected);
        }
    }
    // Infinities that arise inside the same kernel. (inf − inf is not tested: drivers may take x − x for zero.)
    let mut case = Case::new(11, DType::F32);
    let x = case.input_of(&[4], DType::F32, vec![1e30, 1.0, -1e30, 1e-30]);
    let square = case.graph.unary(UnaryOp::Square, x).unwrap();
    let y = case.graph.unary(UnaryOp::IsFinite, square).unwrap();
    case.output("y", y);
    let (outputs, _) = case.run_on(&gpu());
    assert_eq!(outputs.get("y").unwrap(), [0.0, 1.0, 0.0, 1.0]);
}

/// Each element compared by itself: the largest would hide all others.
#[test]
fn saturating_functions_far_out() {
    let far: Vec<f32> = [0.0, 3.0, 5.0, 8.0, 10.0, 20.0, 50.0, 88.0, 1e4, 6e4]
        .into_iter()
        .flat_map(|x| [x, -x])
        .collect();
    let farther: Vec<f32> = far.iter().copied().chain([1e20, -1e20]).collect();
    let ops = [
        UnaryOp::GeluTanh,
        UnaryOp::GeluErf,
        UnaryOp::Tanh,
        UnaryOp::Sigmoid,
        UnaryOp::Relu,
    ];
    for (dtype, data) in [(DType::F32, farther), (DType::F16, far)] {
        let mut case = Case::new(12, dtype);
        let n = data.len();
        let x = case.input_of(&[n], dtype, data.clone());
        let ones = case.input_of(&[n], dtype, vec![1.0; n]);
        for op in ops {
            let y = case.graph.unary(op, x).unwrap();
            case.output(&format!("{op:?}"), y);
            let derivative = BinaryOp::UnaryGrad(op);
            let same = Broadcast::Same;
            let dx = case.graph.binary(derivative, same, x, ones).unwrap();
            case.output(&format!("derivative of {op:?}"), dx);
        }
        let Tolerance { relative, .. } = tolerance(dtype);
        for gpu in [gpu(), tiled_gpu(), baseline_gpu()] {
            let (outputs, expected) = case.run_on(&gpu);
            for (name, expected) in expected {
                let got = outputs.get(&name).unwrap();
                for ((x, got), want) in data.iter().zip(got).zip(expected.data()) {
                    let error = (f64::from(got) - want).abs();
                    assert!(
                        error <= relative * (1.0 + want.abs()),
                        "{name} at {x}: {got}, not {want}"
                    );
                }
            }
        }
    }
}
