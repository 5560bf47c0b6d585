//! NaN, infinities, zeros, subnormal and extreme numbers through every function of one and two elements, and their derivatives.

mod common;

use common::{Case, baseline_gpu, gpu, tiled_gpu};
use energyflow::Gpu;
use energyflow::graph::Op;
use energyflow::runtime::Outputs;
use energyflow::types::{BinaryOp, Broadcast, DType, UnaryOp};

const UNARY: [UnaryOp; 21] = [
    UnaryOp::Identity,
    UnaryOp::Affine {
        scale: -2.5,
        offset: 0.75,
    },
    UnaryOp::Affine {
        scale: 0.0,
        offset: 3.0,
    },
    UnaryOp::Clamp {
        min: -0.5,
        max: 1.25,
    },
    UnaryOp::Clamp {
        min: f32::NEG_INFINITY,
        max: 2.0,
    },
    UnaryOp::Clamp {
        min: -1e30,
        max: f32::INFINITY,
    },
    UnaryOp::Abs,
    UnaryOp::Square,
    UnaryOp::Sqrt,
    UnaryOp::Rsqrt,
    UnaryOp::Recip,
    UnaryOp::Exp,
    UnaryOp::Log,
    UnaryOp::Cos,
    UnaryOp::Tanh,
    UnaryOp::Sigmoid,
    UnaryOp::Relu,
    UnaryOp::GeluTanh,
    UnaryOp::GeluErf,
    UnaryOp::IsFinite,
    UnaryOp::Affine {
        scale: 1.0,
        offset: -0.5,
    },
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

/// Magnitudes; the first is the zero that subnormal numbers may be taken for.
const MAGNITUDES: [f32; 40] = [
    0.0,
    f32::INFINITY,
    1e-45,
    1e-40,
    1.175_494_2e-38,
    1.2e-38,
    1e-37,
    1e-30,
    1e-20,
    1e-19,
    1e-10,
    6e-8,
    6.2e-5,
    1e-3,
    0.01,
    0.3,
    0.6,
    0.65,
    1.0,
    1.5,
    3.0,
    5.5,
    10.0,
    11.5,
    20.0,
    50.0,
    87.0,
    90.0,
    104.0,
    1e3,
    1e4,
    6e4,
    65_504.0,
    1e5,
    1e10,
    1e19,
    1e20,
    1e30,
    1e38,
    3e38,
];

/// Of each sign, and NaN of both.
fn table() -> Vec<f32> {
    let signed = MAGNITUDES.into_iter().flat_map(|x| [x, -x]);
    signed.chain([f32::NAN, -f32::NAN]).collect()
}

/// Number of the argument that `i` may be taken for where subnormal numbers are flushed.
fn flushed(i: usize, x: f64, dtype: DType) -> usize {
    match x != 0.0 && x.abs() < smallest(dtype) {
        true => i % 2,
        false => i,
    }
}

/// The smallest normal number.
fn smallest(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 2f64.powi(-14),
        _ => f64::from(f32::MIN_POSITIVE),
    }
}

/// Whether `got` is `want` to `relative` and `absolute`, after overflow to infinity and, possibly, flushing to zero.
fn is(got: f32, want: f64, dtype: DType, (relative, absolute): (f64, f64)) -> bool {
    let got = f64::from(got);
    if want.is_nan() || want.is_infinite() {
        return got.is_nan() == want.is_nan() && (want.is_nan() || got == want);
    }
    let largest = match dtype {
        DType::F16 => 65_504.0,
        _ => f64::from(f32::MAX),
    };
    let near = (got - want).abs() <= relative * want.abs() + absolute;
    let overflows = want.abs() * (1.0 + relative) >= largest && got == f64::INFINITY.copysign(want);
    let vanishes = want.abs() <= 1.001 * smallest(dtype) && got.abs() <= 1.001 * smallest(dtype);
    near || overflows || vanishes
}

/// Relative and absolute error of a function of one element.
fn error(op: UnaryOp, derivative: bool, dtype: DType) -> (f64, f64) {
    let absolute = match op {
        UnaryOp::Cos => 2e-5,
        UnaryOp::Log => 1e-6,
        UnaryOp::GeluErf => 2e-6,
        UnaryOp::GeluTanh if derivative => 1e-6,
        UnaryOp::Affine { .. } => 1e-6,
        _ => 0.0,
    };
    match dtype {
        DType::F16 => (2e-3, absolute),
        _ => (2e-5, absolute),
    }
}

fn devices(dtype: DType) -> Vec<Gpu> {
    match dtype {
        DType::F16 => vec![gpu(), baseline_gpu()],
        _ => vec![gpu()],
    }
}

/// Whether trigonometric functions are held to be right at x.
fn is_in_range(op: UnaryOp, x: f64) -> bool {
    op != UnaryOp::Cos || !x.is_finite() || x.abs() <= 1e4
}

#[test]
fn functions_of_one_element_and_their_derivatives() {
    for dtype in [DType::F32, DType::F16] {
        let mut case = Case::new(1, dtype);
        let data = table();
        let n = data.len();
        let x = case.input_of(&[n], dtype, data);
        case.output("x", x);
        let one = case.input_of(&[1], dtype, vec![1.0]);
        let nan = case.input_of(&[1], dtype, vec![f32::NAN]);
        for (i, op) in UNARY.into_iter().enumerate() {
            let y = case.graph.unary(op, x).unwrap();
            case.output(&format!("value {i}"), y);
            for (name, d) in [("derivative", one), ("NaN", nan)] {
                let op = BinaryOp::UnaryGrad(op);
                let y = case.graph.binary(op, Broadcast::Scalar, x, d).unwrap();
                case.output(&format!("{name} {i}"), y);
            }
        }
        for gpu in devices(dtype) {
            let (outputs, expected) = case.run_on(&gpu);
            let x = expected["x"].data();
            let mut wrong = Vec::new();
            for (i, op) in UNARY.into_iter().enumerate() {
                for name in ["value", "derivative"] {
                    let bound = error(op, name == "derivative", dtype);
                    let name = format!("{name} {i}");
                    let (got, want) = (outputs.get(&name).unwrap(), expected[&name].data());
                    for j in (0..n).filter(|&j| is_in_range(op, x[j])) {
                        let others = [j, flushed(j, x[j], dtype)].map(|j| want[j]);
                        if !others.iter().any(|&want| is(got[j], want, dtype, bound)) {
                            wrong.push(format!(
                                "{name} {op:?} at {:e}: {:e}, not {:e}",
                                x[j], got[j], want[j]
                            ));
                        }
                    }
                }
                // A gradient that is NaN stays NaN, even where the derivative is zero.
                let got = outputs.get(&format!("NaN {i}")).unwrap();
                let hidden = got.iter().filter(|y| !y.is_nan()).count();
                if hidden > 0 && op != UnaryOp::IsFinite {
                    wrong.push(format!("derivative of {op:?} hides {hidden} NaN"));
                }
            }
            assert!(
                wrong.is_empty(),
                "{dtype} {} wrong:\n{}",
                wrong.len(),
                wrong.join("\n")
            );
        }
    }
}

#[test]
fn functions_of_two_elements() {
    for dtype in [DType::F32, DType::F16] {
        let mut case = Case::new(2, dtype);
        let data = table();
        let n = data.len();
        let pairs = |choose: fn(f32, f32) -> f32| {
            let rows = data
                .iter()
                .flat_map(|&a| data.iter().map(move |&b| choose(a, b)));
            rows.collect::<Vec<f32>>()
        };
        let a = case.input_of(&[n, n], dtype, pairs(|a, _| a));
        let b = case.input_of(&[n, n], dtype, pairs(|_, b| b));
        case.output("a", a);
        for op in BINARY {
            let y = case.graph.binary(op, Broadcast::Same, a, b).unwrap();
            case.output(&format!("{op:?}"), y);
        }
        for gpu in devices(dtype) {
            let (outputs, expected) = case.run_on(&gpu);
            let x: Vec<f64> = (0..n).map(|i| expected["a"].data()[i * n]).collect();
            let mut wrong = Vec::new();
            for op in BINARY {
                let name = format!("{op:?}");
                let (got, want) = (outputs.get(&name).unwrap(), expected[&name].data());
                let bound = error(UnaryOp::Identity, false, dtype);
                for (i, j) in (0..n * n).map(|at| (at / n, at % n)) {
                    let got = got[i * n + j];
                    let (k, l) = (flushed(i, x[i], dtype), flushed(j, x[j], dtype));
                    let others = [(i, j), (k, j), (i, l), (k, l)].map(|(i, j)| want[i * n + j]);
                    if !others.iter().any(|&want| is(got, want, dtype, bound)) {
                        wrong.push(format!(
                            "{name} of {:e} and {:e}: {got:e}, not {:e}",
                            x[i],
                            x[j],
                            want[i * n + j]
                        ));
                    }
                }
            }
            wrong.truncate(40);
            assert!(wrong.is_empty(), "{dtype}\n{}", wrong.join("\n"));
        }
    }
}

/// NaN, or an infinity, in one place, through everything that is not elementwise: it comes out where the reference has it, and nowhere else.
#[test]
fn sums_norms_and_losses_do_not_hide_nan() {
    let [nan, inf] = [f32::NAN, f32::INFINITY];
    for (bad, in_mask) in [(nan, false), (inf, false), (nan, true)] {
        let mut case = Case::new(5, DType::F32);
        let mut data = case.uniform(4 * 3 * 9, 0.1, 1.0);
        // The second sample's last step is masked, and holds it as well.
        let mut mask = vec![1.0; 12];
        mask[5] = 0.0;
        match in_mask {
            true => mask[3] = bad,
            false => (data[3 * 9 + 2], data[5 * 9 + 4]) = (bad, bad),
        }
        let x = case.input_of(&[4, 3, 9], DType::F32, data);
        let mask = case.input_of(&[12], DType::F32, mask);
        let (gamma, beta) = (case.parameter(&[9]), case.parameter(&[9]));
        let t = case.input(&[12, 9]);
        let counter = case.input_of(&[1], DType::F32, vec![7.0]);
        let table = case.input(&[5, 9]);
        let ids = case.ids_of(vec![2, 0, 2], 5);
        let g = &mut case.graph;
        let rows = g.reshape(x, &[12, 9]).unwrap();
        let mean = g.masked_mean(x, mask).unwrap();
        let total = g.sum_all(mean).unwrap();
        let spread = g.gradients(total, &[x]).unwrap()[0];
        let normalised = g.layer_norm(rows, gamma, beta, 1e-5).unwrap();
        let weighted = g.mul(normalised, t).unwrap();
        let weighted = g.sum_all(weighted).unwrap();
        let through = g.gradients(weighted, &[rows, gamma, beta]).unwrap();
        let kd = g.kd_loss(rows, t, 1.0, 0.5).unwrap();
        let distilled = g.gradients(kd.loss, &[rows]).unwrap()[0];
        let masked = g.mul_rows(rows, mask).unwrap();
        let dropout = Op::Dropout {
            rate: 0.5,
            stream: 3,
        };
        let dropped = g.apply(dropout, &[rows, counter]).unwrap()[0];
        let gathered = g.gather(table, ids, None).unwrap();
        let values = [
            ("sum_rows", g.sum_rows(rows).unwrap()),
            ("sum_cols", g.sum_cols(rows).unwrap()),
            ("sum_all", g.sum_all(rows).unwrap()),
            (
                "groups",
                g.apply(Op::SumGroups { period: 3 }, &[rows]).unwrap()[0],
            ),
            ("norm", g.global_norm(&[rows, t]).unwrap()),
            ("mean", mean),
            ("gradient of mean", spread),
            ("normalised", normalised),
            ("dx", through[0]),
            ("dgamma", through[1]),
            ("dbeta", through[2]),
            ("loss", kd.loss),
            ("cosine", kd.cosine),
            ("distilled", distilled),
            ("masked", masked),
            ("dropped", dropped),
            ("gathered", gathered),
        ];
        for (name, value) in values {
            g.output(name, value).unwrap();
        }
        for gpu in [gpu(), tiled_gpu()] {
            let (outputs, expected) = case.run_on(&gpu);
            for (name, want) in &expected {
                let got = get(&outputs, name);
                for (i, (&got, &want)) in got.iter().zip(want.data()).enumerate() {
                    let right = is(got, want, DType::F32, (1e-4, 1e-5));
                    assert!(right, "{bad} {in_mask} {name} {i}: {got}, not {want}");
                }
            }
        }
    }
}

fn get(outputs: &Outputs, name: &str) -> Vec<f32> {
    outputs.get(name).unwrap()
}

/// What compilers may simplify: x − x, 0·x, max(x, x), x > x.
#[test]
fn what_could_be_simplified_does_not_hide_nan() {
    for dtype in [DType::F32, DType::F16] {
        let mut case = Case::new(3, dtype);
        let data = vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1.0, 0.0];
        let x = case.input_of(&[5], dtype, data);
        let g = &mut case.graph;
        let zero = g.constant(&[5], 0.0).unwrap();
        let zero = g.cast(zero, dtype).unwrap();
        let same = Broadcast::Same;
        for (name, op, other) in [
            ("x - x", BinaryOp::Sub, x),
            ("x * 0", BinaryOp::Mul, zero),
            ("max(x, x)", BinaryOp::Max, x),
            ("x > x", BinaryOp::Greater, x),
        ] {
            let y = g.binary(op, same, x, other).unwrap();
            g.output(name, y).unwrap();
        }
        for gpu in devices(dtype) {
            let (outputs, _) = case.run_on(&gpu);
            for name in ["x - x", "x * 0"] {
                let y = get(&outputs, name);
                assert!(y[..3].iter().all(|y| y.is_nan()), "{name}: {y:?}");
                assert_eq!(y[3..], [0.0, 0.0], "{name}");
            }
            let y = get(&outputs, "max(x, x)");
            assert!(y[0].is_nan() && y[1] == f32::INFINITY, "{y:?}");
            assert_eq!(get(&outputs, "x > x"), [0.0; 5]);
        }
    }
}

/// What a cast to f16 makes of NaN, infinities and numbers that f16 does not hold.
#[test]
fn halves_keep_nan_and_overflow_to_infinity() {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let data = vec![
        nan, -nan, inf, -inf, 65_520.0, -65_520.0, 1e5, -3e38, 65_504.0, 1e-30,
    ];
    let mut case = Case::new(4, DType::F32);
    let x = case.input_of(&[10], DType::F32, data);
    let g = &mut case.graph;
    let half = g.cast(x, DType::F16).unwrap();
    let finite = g.unary(UnaryOp::IsFinite, half).unwrap();
    g.output("half", half).unwrap();
    g.output("finite", finite).unwrap();
    for gpu in devices(DType::F16) {
        let (outputs, expected) = case.run_on(&gpu);
        let y = get(&outputs, "half");
        assert!(y[0].is_nan() && y[1].is_nan(), "{y:?}");
        assert_eq!(y[2..], [inf, -inf, inf, -inf, inf, -inf, 65_504.0, 0.0]);
        assert_eq!(get(&outputs, "finite")[2..4], [0.0, 0.0]);
        assert_eq!(expected["half"].to_f32()[2..], y[2..]);
    }
}
