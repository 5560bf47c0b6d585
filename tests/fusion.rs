//! What becomes one kernel, and that it still computes the same.

mod common;

use common::{Case, F32, tolerance};
use energyflow::graph::ValueId;
use energyflow::types::{BinaryOp, Broadcast, DType, Trans, UnaryOp};

/// A chain of n functions of x that stays near one.
fn chain(case: &mut Case, x: ValueId, n: usize) -> Vec<ValueId> {
    let mut values = vec![x];
    for i in 0..n {
        let last = values[i];
        let y = match i % 3 {
            0 => case.graph.affine(last, 0.75, 0.125),
            1 => case.graph.unary(UnaryOp::Tanh, last),
            _ => case.graph.mul(last, x),
        };
        values.push(y.unwrap());
    }
    values.split_off(1)
}

#[test]
fn a_product_and_everything_behind_it_is_one_dispatch() {
    let mut case = Case::new(1, DType::F32);
    let (x, w) = (case.input(&[2, 8, 24]), case.input(&[40, 24]));
    let bias = case.parameter(&[40]);
    let residual = case.input(&[2, 8, 40]);
    let mask = case.mask(16);
    let g = &mut case.graph;
    let y = g.matmul(x, w, Trans::NT).unwrap();
    let y = g.add_bias(y, bias).unwrap();
    let y = g.unary(UnaryOp::GeluErf, y).unwrap();
    let y = g.reshape(y, &[2, 8, 40]).unwrap();
    let y = g.add(y, residual).unwrap();
    let y = g.mul_rows(y, mask).unwrap();
    let y = g.cast(y, DType::F16).unwrap();
    case.output("y", y);
    assert_eq!(case.dispatches(), 1);
    case.check(tolerance(DType::F16));
}

#[test]
fn row_kernels_take_what_follows_too() {
    for dtype in [DType::F32, DType::F16] {
        let mut case = Case::new(2, dtype);
        let x = case.input(&[2, 5, 33]);
        let (gamma, beta) = (case.parameter(&[33]), case.parameter(&[33]));
        let y = case.graph.layer_norm(x, gamma, beta, 1e-5).unwrap();
        let y = case.graph.unary(UnaryOp::GeluTanh, y).unwrap();
        let y = case.graph.add(y, x).unwrap();
        case.output("y", y);
        assert_eq!(case.dispatches(), 1);
        case.check(tolerance(dtype));
    }
    let mut case = Case::new(2, DType::F32);
    let (table, ids) = (case.parameter(&[10, 31]), case.ids(14, 10));
    let z = case.input(&[2, 31]);
    let y = case.graph.gather(table, ids, None).unwrap();
    let y = case.graph.reshape(y, &[2, 7, 31]).unwrap();
    let y = case.graph.add_over_time(y, z).unwrap();
    case.output("y", y);
    assert_eq!(case.dispatches(), 1);
    case.check(F32);
}

#[test]
fn a_chain_is_one_dispatch() {
    for dtype in [DType::F32, DType::F16] {
        let mut case = Case::new(3, dtype);
        let x = case.input(&[13, 65]);
        let values = chain(&mut case, x, 20);
        case.output("y", values[19]);
        assert_eq!(case.dispatches(), 1);
        case.check(tolerance(dtype));
    }
}

#[test]
fn one_kernel_with_several_results_of_both_types() {
    let mut case = Case::new(4, DType::F32);
    let x = case.input(&[7, 33]);
    let values = chain(&mut case, x, 6);
    let half = case.graph.cast(values[1], DType::F16).unwrap();
    case.output("a", values[1]);
    case.output("half", half);
    case.output("b", values[3]);
    case.output("c", values[5]);
    assert_eq!(case.dispatches(), 1);
    case.check(tolerance(DType::F16));
}

#[test]
fn more_results_than_a_kernel_may_bind() {
    for dtype in [DType::F32, DType::F16] {
        let mut case = Case::new(5, dtype);
        let (x, w) = (case.input(&[33, 17]), case.input(&[17, 31]));
        let start = case.graph.matmul(x, w, Trans::NN).unwrap();
        let values = chain(&mut case, start, 20);
        for (i, value) in values.into_iter().enumerate() {
            case.output(&format!("y{i}"), value);
        }
        let dispatches = case.dispatches();
        assert!((3..=6).contains(&dispatches), "{dispatches}");
        case.check(tolerance(dtype));
    }
}

#[test]
fn more_operands_than_a_kernel_may_bind() {
    let mut case = Case::new(6, DType::F32);
    let mut sum = case.input(&[9, 10]);
    for i in 0..20 {
        let (broadcast, dims) = match i % 3 {
            0 => (Broadcast::Same, vec![9, 10]),
            1 => (Broadcast::Cols, vec![10]),
            _ => (Broadcast::Rows, vec![9]),
        };
        let next = case.input(&dims);
        sum = case
            .graph
            .binary(BinaryOp::Add, broadcast, sum, next)
            .unwrap();
    }
    case.output("sum", sum);
    assert!((3..=4).contains(&case.dispatches()));
    case.check(F32);
}

/// A vector as column and as row operand of a square matrix takes two bindings.
#[test]
fn one_operand_under_two_broadcasts() {
    let mut case = Case::new(7, DType::F32);
    let vector = case.input(&[12]);
    let mut sum = case.input(&[12, 12]);
    for _ in 0..4 {
        let next = case.input(&[12, 12]);
        sum = case.graph.add(sum, next).unwrap();
    }
    for broadcast in [Broadcast::Cols, Broadcast::Rows] {
        sum = case
            .graph
            .binary(BinaryOp::Mul, broadcast, sum, vector)
            .unwrap();
    }
    let last = case.input(&[12, 12]);
    let y = case.graph.add(sum, last).unwrap();
    case.output("y", y);
    case.check(F32);
}

#[test]
fn what_nobody_wants_is_not_run() {
    let mut case = Case::new(8, DType::F32);
    let (x, w) = (case.input(&[8, 8]), case.input(&[8, 8]));
    let y = case.graph.unary(UnaryOp::Exp, x).unwrap();
    case.output("y", y);
    let dead = case.graph.matmul(x, w, Trans::NN).unwrap();
    let dead = case.graph.sum_rows(dead).unwrap();
    let loss = case.graph.sum_all(dead).unwrap();
    case.graph.gradients(loss, &[x, w]).unwrap();
    assert_eq!(case.dispatches(), 1);
    case.check(F32);
}

/// The gradient of an activation goes into the product that brings it.
#[test]
fn a_backward_pass_fuses() {
    let mut case = Case::new(9, DType::F32);
    let x = case.input(&[16, 24]);
    let (w1, w2) = (case.parameter(&[32, 24]), case.parameter(&[8, 32]));
    let g = &mut case.graph;
    let before = g.matmul(x, w1, Trans::NT).unwrap();
    let hidden = g.unary(UnaryOp::GeluTanh, before).unwrap();
    let y = g.matmul(hidden, w2, Trans::NT).unwrap();
    case.gradients(y, &[w1, w2]);
    // The first product (with both sides of the activation), dy, dw2, dhidden with the derivative, dw1.
    // The second product and the loss are not wanted.
    assert_eq!(case.dispatches(), 5);
    case.check(F32);
}

#[test]
fn reshapes_move_nothing() {
    let mut case = Case::new(10, DType::F32);
    let x = case.input(&[2, 6, 10]);
    let y = case.graph.unary(UnaryOp::Exp, x).unwrap();
    let flat = case.graph.reshape(y, &[12, 10]).unwrap();
    let other = case.graph.reshape(flat, &[3, 4, 10]).unwrap();
    let sums = case.graph.sum_cols(other).unwrap();
    case.output("y", y);
    case.output("flat", flat);
    case.output("other", other);
    case.output("sums", sums);
    let again = case.graph.reshape(x, &[12, 10]).unwrap();
    case.output("an input under another shape", again);
    case.gradients(other, &[x]);
    // exp, its row sums, the gradient of exp (with the weights of the loss).
    assert_eq!(case.dispatches(), 3);
    case.check(F32);
}
