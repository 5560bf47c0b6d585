//! AdamW, clipping, states: what a graph changes.

mod common;

use common::{Case, F32, Tolerance, gpu, tiled_gpu, tolerance};
use energyflow::graph::{Graph, Init, Op, ValueId};
use energyflow::types::{BinaryOp, Broadcast, DType, Rates, Trans, UnaryOp};
use energyflow::{Error, Session};

const BETAS: [f32; 2] = [0.9, 0.999];

fn adamw(params: &[ValueId]) -> Op {
    Op::AdamW {
        rates: vec![Rates::decay(0.1); params.len()],
        params: params.to_vec(),
        beta1: BETAS[0],
        beta2: BETAS[1],
        eps: 1e-8,
    }
}

/// lr, scale, apply
fn hyper(scale: f32, apply: f32) -> Vec<f32> {
    vec![0.01, scale, apply]
}

fn hyper_input(case: &mut Case) -> ValueId {
    case.input_of(&[3], DType::F32, hyper(1.0, 1.0))
}

/// Steps on both kinds of kernels; outputs compared in each, variables at the end.
fn check_steps(case: &mut Case, hyper_input: ValueId, steps: i32, bound: Tolerance) {
    for gpu in [gpu(), tiled_gpu()] {
        let mut running = case.start(&gpu);
        for _ in 0..steps {
            case.replace(hyper_input, hyper(0.5, 1.0));
            running.step(case, bound);
        }
        running.compare_variables(case, bound);
    }
}

/// A two-layer network with the gradients of its parameters.
fn network(case: &mut Case) -> (Vec<ValueId>, Vec<ValueId>) {
    let dtype = case.dtype;
    let x = case.input(&[17, 13]);
    let parameters = [
        case.parameter(&[33, 13]),
        case.parameter(&[33]),
        case.parameter(&[7, 33]),
        case.parameter(&[7]),
    ];
    let g = &mut case.graph;
    let w1 = g.cast(parameters[0], dtype).unwrap();
    let w2 = g.cast(parameters[2], dtype).unwrap();
    let h = g.matmul(x, w1, Trans::NT).unwrap();
    let h = g.add_bias(h, parameters[1]).unwrap();
    let h = g.unary(UnaryOp::GeluTanh, h).unwrap();
    let y = g.matmul(h, w2, Trans::NT).unwrap();
    let y = g.add_bias(y, parameters[3]).unwrap();
    let loss = case.random_loss(y);
    case.output("loss", loss);
    let gradients = case.graph.gradients(loss, &parameters).unwrap();
    (parameters.to_vec(), gradients)
}

/// AdamW divides by the root of the squares of the gradients: small gradients keep their relative error.
fn bound(dtype: DType) -> Tolerance {
    let Tolerance { relative, .. } = tolerance(dtype);
    Tolerance {
        normalised: relative,
        relative: 5.0 * relative,
    }
}

#[test]
fn several_steps() {
    for dtype in [DType::F32, DType::F16] {
        let mut case = Case::new(1, dtype);
        let (parameters, gradients) = network(&mut case);
        let hyper = hyper_input(&mut case);
        let norm = case.graph.global_norm(&gradients).unwrap();
        case.output("norm", norm);
        let operands = [gradients, vec![hyper]].concat();
        case.graph.apply(adamw(&parameters), &operands).unwrap();
        check_steps(&mut case, hyper, 4, bound(dtype));
    }
}

/// Gradients in one stretch of memory: norm and update take one dispatch each (and one more to add up the norm).
#[test]
fn norm_and_update_of_a_whole_network_are_three_dispatches() {
    let mut case = Case::new(2, DType::F32);
    let (_, gradients) = network(&mut case);
    hyper_input(&mut case);
    for (i, &gradient) in gradients.iter().enumerate() {
        case.output(&format!("gradient {i}"), gradient);
    }
    let without = case.dispatches();
    let mut case = Case::new(2, DType::F32);
    let (parameters, gradients) = network(&mut case);
    let hyper = hyper_input(&mut case);
    let norm = case.graph.global_norm(&gradients).unwrap();
    case.output("norm", norm);
    let operands = [gradients, vec![hyper]].concat();
    case.graph.apply(adamw(&parameters), &operands).unwrap();
    assert_eq!(case.dispatches(), without + 3);
}

#[test]
fn gradients_that_something_else_reads_too() {
    let mut case = Case::new(3, DType::F32);
    let (parameters, gradients) = network(&mut case);
    let hyper = hyper_input(&mut case);
    case.output("first gradient", gradients[0]);
    let doubled = case.graph.affine(gradients[2], 2.0, 0.0).unwrap();
    case.output("doubled", doubled);
    let norm = case.graph.global_norm(&gradients).unwrap();
    case.output("norm", norm);
    let operands = [gradients, vec![hyper]].concat();
    case.graph.apply(adamw(&parameters), &operands).unwrap();
    check_steps(&mut case, hyper, 3, bound(DType::F32));
}

#[test]
fn a_parameter_that_is_not_used_only_decays() {
    let mut case = Case::new(4, DType::F32);
    let unused = case.parameter(&[5, 3]);
    let (parameters, _) = network(&mut case);
    let loss = case.graph.outputs()[0].1;
    let all = [vec![parameters[0], unused], parameters[1..].to_vec()].concat();
    let gradients = case.graph.gradients(loss, &all).unwrap();
    let hyper = hyper_input(&mut case);
    let norm = case.graph.global_norm(&gradients).unwrap();
    case.output("norm", norm);
    let operands = [gradients, vec![hyper]].concat();
    case.graph.apply(adamw(&all), &operands).unwrap();
    check_steps(&mut case, hyper, 3, bound(DType::F32));
}

#[test]
fn one_gradient_for_two_parameters() {
    let mut case = Case::new(5, DType::F32);
    let (a, b) = (case.parameter(&[7, 9]), case.parameter(&[7, 9]));
    let x = case.input(&[7, 9]);
    let sum = case.graph.add(a, b).unwrap();
    let square = case.graph.unary(UnaryOp::Square, sum).unwrap();
    let product = case.graph.mul(square, x).unwrap();
    let loss = case.graph.sum_all(product).unwrap();
    case.output("loss", loss);
    let gradient = case.graph.gradients(loss, &[a]).unwrap()[0];
    let hyper = hyper_input(&mut case);
    let norm = case.graph.global_norm(&[gradient, gradient]).unwrap();
    case.output("norm", norm);
    let operands = [gradient, gradient, hyper];
    case.graph.apply(adamw(&[a, b]), &operands).unwrap();
    check_steps(&mut case, hyper, 3, bound(DType::F32));
}

/// Weights decay, biases do not; neither group's gradients lie in one stretch.
#[test]
fn two_groups_of_parameters() {
    let mut case = Case::new(6, DType::F32);
    let (p, g) = network(&mut case);
    let hyper = hyper_input(&mut case);
    let norm = case.graph.global_norm(&g).unwrap();
    case.output("norm", norm);
    for (weight_decay, pick) in [(0.1, [2, 0]), (0.0, [1, 3])] {
        let op = Op::AdamW {
            rates: vec![Rates::decay(weight_decay); 2],
            params: pick.map(|i| p[i]).to_vec(),
            beta1: BETAS[0],
            beta2: BETAS[1],
            eps: 1e-6,
        };
        case.graph
            .apply(op, &[g[pick[0]], g[pick[1]], hyper])
            .unwrap();
    }
    check_steps(&mut case, hyper, 3, bound(DType::F32));
}

#[test]
fn a_step_that_is_not_applied_changes_nothing() {
    let mut case = Case::new(7, DType::F32);
    let x = case.input(&[33]);
    let p = case.parameter(&[33]);
    let product = case.graph.mul(p, x).unwrap();
    let loss = case.graph.sum_all(product).unwrap();
    let gradient = case.graph.gradients(loss, &[p]).unwrap()[0];
    let hyper_input = hyper_input(&mut case);
    let operands = [gradient, hyper_input];
    case.graph.apply(adamw(&[p]), &operands).unwrap();
    let name = case.graph.value(p).unwrap().name.clone();
    let good = case.uniform(33, -1.0, 1.0);
    for gpu in [gpu(), tiled_gpu()] {
        let mut running = case.start(&gpu);
        running.step(&case, F32);
        let before = running.session.get(&name).unwrap();
        case.replace(x, vec![f32::NAN; 33]);
        case.replace(hyper_input, hyper(f32::INFINITY, 0.0));
        running.step(&case, F32);
        assert_eq!(running.session.get(&name).unwrap(), before);
        // The moments have not seen the bad gradient either.
        case.replace(x, good.clone());
        case.replace(hyper_input, hyper(1.0, 1.0));
        running.step(&case, F32);
        running.compare_variables(&case, bound(DType::F32));
    }
}

/// Parameters that a later graph of the session brings lie in a block of their own.
#[test]
fn parameters_of_two_graphs() {
    let mut case = Case::new(8, DType::F32);
    let (parameters, gradients) = network(&mut case);
    let hyper = hyper_input(&mut case);
    let norm = case.graph.global_norm(&gradients).unwrap();
    case.output("norm", norm);
    let operands = [gradients, vec![hyper]].concat();
    case.graph.apply(adamw(&parameters), &operands).unwrap();
    let mut first = Graph::new();
    for i in [2, 0] {
        let value = case.graph.value(parameters[i]).unwrap();
        let p = first
            .parameter(&value.name, value.shape.dims(), Init::Constant(0.0))
            .unwrap();
        first.output(&value.name, p).unwrap();
    }
    let mut running = case.start(&gpu());
    let mut session = Session::new(&gpu(), 0);
    session.compile(&first).unwrap();
    running.executable = session.compile(&case.graph).unwrap();
    for (_, value) in case.graph.parameters() {
        let data = running.session.get(&value.name).unwrap();
        session.set(&value.name, &data).unwrap();
    }
    running.session = session;
    for _ in 0..2 {
        running.step(&case, bound(DType::F32));
    }
    running.compare_variables(&case, bound(DType::F32));
}

#[test]
fn clipping_by_the_global_norm() {
    let mut case = Case::new(9, DType::F32);
    let gradient = case.input_of(&[2], DType::F32, vec![3.0, 4.0]);
    let other = case.input_of(&[1], DType::F32, vec![0.0]);
    let g = &mut case.graph;
    let norm = g.global_norm(&[gradient, other]).unwrap();
    let one = g.constant(&[1], 1.0).unwrap();
    let inverse = g.unary(UnaryOp::Recip, norm).unwrap();
    let scale = g
        .binary(BinaryOp::Min, Broadcast::Same, inverse, one)
        .unwrap();
    let clipped = g.mul_scalar(gradient, scale).unwrap();
    let after = g.global_norm(&[clipped]).unwrap();
    case.output("norm", norm);
    case.output("scale", scale);
    case.output("after", after);
    for (data, norm, after) in [([3.0, 4.0], 5.0, 1.0), ([0.3, 0.4], 0.5, 0.5)] {
        case.replace(gradient, data.to_vec());
        case.check(F32);
        let (outputs, _) = case.run_on(&gpu());
        assert!((outputs.scalar("norm").unwrap() - norm).abs() < 1e-5);
        assert!((outputs.scalar("after").unwrap() - after).abs() < 1e-5);
    }
}

/// The optimizer's numbers computed in the graph: clipping, and whether the step counts.
#[test]
fn hyper_parameters_from_the_graph() {
    let mut case = Case::new(10, DType::F32);
    let (parameters, gradients) = network(&mut case);
    let lr = case.input_of(&[1], DType::F32, vec![0.01]);
    let g = &mut case.graph;
    let norm = g.global_norm(&gradients).unwrap();
    let inverse = g.unary(UnaryOp::Recip, norm).unwrap();
    let one = g.constant(&[1], 1.0).unwrap();
    let scale = g
        .binary(BinaryOp::Min, Broadcast::Same, inverse, one)
        .unwrap();
    let apply = g.unary(UnaryOp::IsFinite, norm).unwrap();
    let hyper = g.stack(&[lr, scale, apply]).unwrap();
    let operands = [gradients, vec![hyper]].concat();
    g.apply(adamw(&parameters), &operands).unwrap();
    case.output("hyper", hyper);
    let bound = bound(DType::F32);
    for gpu in [gpu(), tiled_gpu()] {
        let mut running = case.start(&gpu);
        for _ in 0..3 {
            running.step(&case, bound);
        }
        running.compare_variables(&case, bound);
    }
}

#[test]
fn states_change_after_everything_has_read_them() {
    let mut case = Case::new(11, DType::F32);
    let x = case.input(&[3, 7]);
    let g = &mut case.graph;
    let (a, b) = (
        g.state("a", &[3, 7], 1.0).unwrap(),
        g.state("b", &[3, 7], 2.0).unwrap(),
    );
    // They exchange their values, and one grows.
    let next_a = g.affine(b, 1.0, 0.5).unwrap();
    let next_b = g.add(a, x).unwrap();
    g.assign(a, next_a).unwrap();
    g.assign(b, next_b).unwrap();
    let product = g.mul(next_a, next_b).unwrap();
    case.output("product", product);
    case.output("a afterwards", a);
    for gpu in [gpu(), tiled_gpu()] {
        let mut running = case.start(&gpu);
        for _ in 0..3 {
            running.step(&case, F32);
        }
        running.compare_variables(&case, F32);
    }
}

#[test]
fn reading_after_an_update_is_an_error() {
    let mut case = Case::new(12, DType::F32);
    let (p, gradient) = (case.parameter(&[2]), case.input(&[2]));
    let hyper = hyper_input(&mut case);
    let g = &mut case.graph;
    g.apply(adamw(&[p]), &[gradient, hyper]).unwrap();
    let error = g.affine(p, 2.0, 0.0).unwrap_err();
    assert!(error.to_string().contains("after its update"), "{error}");
    let state = g.state("s", &[2], 0.0).unwrap();
    let next = g.add(state, gradient).unwrap();
    g.assign(state, next).unwrap();
    for result in [
        g.affine(state, 2.0, 0.0).map(|_| ()),
        g.assign(state, next),
        g.apply(adamw(&[p]), &[gradient, hyper]).map(|_| ()),
    ] {
        assert!(matches!(result, Err(Error::Graph(_))), "{result:?}");
    }
}

#[test]
fn options_without_sense_are_refused() {
    let mut case = Case::new(13, DType::F32);
    let (p, gradient) = (case.parameter(&[2]), case.input(&[2]));
    let hyper = hyper_input(&mut case);
    let op = Op::AdamW {
        rates: vec![Rates::decay(0.0); 1],
        params: vec![p],
        beta1: 0.9,
        beta2: 0.999,
        eps: 0.0,
    };
    let error = case.graph.apply(op, &[gradient, hyper]).unwrap_err();
    assert!(matches!(error, Error::Shape { op: "adamw", .. }), "{error}");
}
