//! What reads of parameters and states see, directly, through reshapes and as outputs: the order of declaration decides.

mod common;

use common::{Case, F32, Tolerance, gpu, tiled_gpu, tolerance};
use energyflow::graph::{Graph, Init, Op, ValueId};
use energyflow::runtime::Host;
use energyflow::train::{AdamW, Schedule};
use energyflow::types::{DType, Rates, Trans, UnaryOp};
use energyflow::{Error, Session};

/// A rate of 0.1 moves every element by about 0.1 in the first step.
fn optimizer() -> AdamW {
    AdamW::default().schedule(Schedule::Constant { rate: 0.1 })
}

/// Σ p·x: the gradient of p is x.
fn step(case: &mut Case, p: ValueId) {
    let dims = case.graph.value(p).unwrap().shape.dims().to_vec();
    let x = case.input(&dims);
    let product = case.graph.mul(p, x).unwrap();
    let loss = case.graph.sum_all(product).unwrap();
    optimizer().step(&mut case.graph, loss, &[p]).unwrap();
}

/// Small gradients keep their relative error.
const BOUND: Tolerance = Tolerance {
    normalised: 2e-5,
    relative: 1e-4,
};

fn check(case: &Case, bound: Tolerance) {
    for gpu in [gpu(), tiled_gpu()] {
        let mut running = case.start(&gpu);
        for _ in 0..3 {
            running.step(case, bound);
        }
        running.compare_variables(case, bound);
    }
}

#[test]
fn outputs_of_a_parameter_before_and_after_its_step() {
    let mut case = Case::new(1, DType::F32);
    let p = case.parameter(&[3, 5]);
    let q = case.graph.reshape(p, &[1, 3, 5]).unwrap();
    let r = case.graph.reshape(q, &[3, 1, 5]).unwrap();
    let vector = case.parameter(&[7]);
    let same = case.graph.reshape(vector, &[7]).unwrap();
    case.output("p before", p);
    case.output("q before", q);
    case.output("vector before", vector);
    step(&mut case, p);
    case.output("q", q);
    case.output("r", r);
    case.output("p after", p);
    case.output("vector", same);
    check(&case, BOUND);
    let mut running = case.start(&gpu());
    let before = running.session.get("p1").unwrap();
    let (outputs, _) = running.step(&case, BOUND);
    let after = running.session.get("p1").unwrap();
    for name in ["p before", "q before", "q", "r"] {
        assert_eq!(outputs.get(name).unwrap(), before, "{name}");
    }
    assert_eq!(outputs.get("p after").unwrap(), after);
    assert_ne!(before, after);
}

#[test]
fn reads_through_reshapes_after_the_step() {
    let mut case = Case::new(2, DType::F32);
    let p = case.parameter(&[6, 5]);
    let x = case.input(&[4, 5]);
    let g = &mut case.graph;
    let q = g.reshape(p, &[2, 3, 5]).unwrap();
    let r = g.reshape(q, &[6, 5]).unwrap();
    let early = g.matmul(x, r, Trans::NT).unwrap();
    step(&mut case, p);
    let g = &mut case.graph;
    let late = g.reshape(r, &[3, 2, 5]).unwrap();
    let late = g.unary(UnaryOp::Square, late).unwrap();
    let product = g.matmul(x, r, Trans::NT).unwrap();
    let half = g.cast(q, DType::F16).unwrap();
    let half = g.affine(half, 2.0, 0.0).unwrap();
    case.output("early", early);
    case.output("late", late);
    case.output("product", product);
    case.output("half", half);
    check(&case, tolerance(DType::F16));
}

/// A state changes when the run ends, before results are read back.
#[test]
fn outputs_of_a_state() {
    let mut graph = Graph::new();
    let s = graph.state("s", &[1], 1.0).unwrap();
    let q = graph.reshape(s, &[1]).unwrap();
    let r = graph.reshape(s, &[1, 1]).unwrap();
    graph.output("before", s).unwrap();
    let next = graph.affine(s, 1.0, 1.0).unwrap();
    graph.assign(s, next).unwrap();
    let late = graph.affine(q, 10.0, 0.0).unwrap();
    for (name, value) in [("q", q), ("r", r), ("after", s), ("late", late)] {
        graph.output(name, value).unwrap();
    }
    let mut session = Session::new(&gpu(), 0);
    let executable = session.compile(&graph).unwrap();
    let mut interpreter = energyflow::reference::Interpreter::new(&graph);
    for run in 1..=3 {
        let outputs = executable.run(&[]).unwrap().wait().unwrap();
        let expected = interpreter.run(&graph, &[]).unwrap();
        let old = run as f32;
        for (name, value) in [
            ("before", old),
            ("q", old),
            ("r", old),
            ("after", old + 1.0),
            ("late", 10.0 * old),
        ] {
            assert_eq!(outputs.scalar(name).unwrap(), value, "{name}");
            assert_eq!(expected[name].to_f32(), [value], "{name}");
        }
    }
}

/// States take inputs, constants, parameters and each other's values, also under another shape.
#[test]
fn a_state_takes_any_value() {
    let mut case = Case::new(3, DType::F32);
    let x = case.input(&[2, 3]);
    let p = case.parameter(&[3]);
    let g = &mut case.graph;
    let declared = [
        (&[2, 3][..], 1.0),
        (&[2, 3], 2.0),
        (&[2, 3], 3.0),
        (&[3], 4.0),
        (&[3], 5.0),
    ];
    let states: Vec<ValueId> = declared
        .iter()
        .enumerate()
        .map(|(i, (dims, start))| g.state(&format!("s{i}"), dims, *start).unwrap())
        .collect();
    let other = g.reshape(states[0], &[2, 1, 3]).unwrap();
    let other = g.reshape(other, &[2, 3]).unwrap();
    g.assign(states[1], other).unwrap();
    g.assign(states[2], states[0]).unwrap();
    g.assign(states[0], x).unwrap();
    g.assign(states[3], p).unwrap();
    let constant = g.constant(&[3], 0.5).unwrap();
    g.assign(states[4], constant).unwrap();
    case.output("x", x);
    check(&case, F32);
}

/// The gradient of a cross entropy takes the memory of its logits; a state may take it nevertheless.
#[test]
fn a_state_takes_a_gradient_that_overwrote_its_logits() {
    let mut case = Case::new(4, DType::F32);
    let (x, w) = (case.input(&[5, 8]), case.input(&[12, 8]));
    let targets = case.ids(5, 12);
    let g = &mut case.graph;
    let s = g.state("s", &[5, 12], 0.0).unwrap();
    let logits = g.matmul(x, w, Trans::NT).unwrap();
    let loss = g.cross_entropy(logits, targets, None, 0.0).unwrap().loss;
    let gradient = g.gradients(loss, &[logits]).unwrap()[0];
    g.assign(s, gradient).unwrap();
    g.output("loss", loss).unwrap();
    check(&case, F32);
}

/// What was accumulated is zero when the run ends, before outputs are read back and states are written.
#[test]
fn accumulated_gradients_that_outlive_the_run() {
    let mut graph = Graph::new();
    let p = graph.parameter("p", &[3], Init::Constant(0.5)).unwrap();
    let one = graph.constant(&[1], 1.0).unwrap();
    let gradient = graph.input("gradient", &[3], DType::F32).unwrap();
    let params = vec![p];
    let op = Op::Accumulate { params };
    graph.apply(op, &[gradient, one]).unwrap();
    let mut taking = Graph::new();
    let p = taking.parameter("p", &[3], Init::Constant(0.5)).unwrap();
    let s = taking.state("s", &[3], 0.0).unwrap();
    let params = vec![p];
    let taken = taking.apply(Op::TakeAccumulated { params }, &[]).unwrap()[0];
    let other = taking.reshape(taken, &[3]).unwrap();
    taking.output("sum", other).unwrap();
    taking.assign(s, taken).unwrap();
    let mut session = Session::new(&gpu(), 0);
    let accumulate = session.compile(&graph).unwrap();
    let take = session.compile(&taking).unwrap();
    for _ in 0..2 {
        for _ in 0..2 {
            let inputs = [("gradient", Host::F32(&[1.0, 2.0, 3.0]))];
            accumulate.run(&inputs).unwrap().wait().unwrap();
        }
        let outputs = take.run(&[]).unwrap().wait().unwrap();
        assert_eq!(outputs.get("sum").unwrap(), [2.0, 4.0, 6.0]);
        assert_eq!(session.get("s").unwrap(), [2.0, 4.0, 6.0]);
    }
}

/// A recomputed segment that reads a reshape of the parameter, differentiated before the step and after it.
#[test]
fn recomputed_segments() {
    let mut case = Case::new(5, DType::F32);
    let p = case.parameter(&[4, 3]);
    let x = case.input(&[5, 3]);
    let g = &mut case.graph;
    let q = g.reshape(p, &[2, 2, 3]).unwrap();
    let flat = g.reshape(q, &[4, 3]).unwrap();
    let segment = |g: &mut Graph| {
        let y = g.matmul(x, flat, Trans::NT)?;
        g.unary(UnaryOp::Square, y)
    };
    let y = g.recompute(segment).unwrap();
    let loss = g.sum_all(y).unwrap();
    optimizer().step(g, loss, &[p]).unwrap();
    // Its copy runs after the update, and reads the reshape.
    let second = g.gradients(loss, &[x]).unwrap()[0];
    g.output("y", y).unwrap();
    g.output("second", second).unwrap();
    g.output("q", q).unwrap();
    check(&case, BOUND);

    // A segment that reads the parameter itself would see another value.
    let mut case = Case::new(6, DType::F32);
    let p = case.parameter(&[4, 3]);
    let x = case.input(&[5, 3]);
    let g = &mut case.graph;
    let y = g.recompute(|g| g.matmul(x, p, Trans::NT)).unwrap();
    let y = g.unary(UnaryOp::Square, y).unwrap();
    let loss = g.sum_all(y).unwrap();
    optimizer().step(g, loss, &[p]).unwrap();
    let error = g.gradients(loss, &[x]).unwrap_err();
    assert!(error.to_string().contains("after its update"), "{error}");
}

#[test]
fn reads_after_an_update_are_refused() {
    let mut case = Case::new(7, DType::F32);
    let p = case.parameter(&[2, 3]);
    let s = case.graph.state("s", &[3], 0.0).unwrap();
    let q = case.graph.reshape(p, &[1, 2, 3]).unwrap();
    step(&mut case, p);
    let g = &mut case.graph;
    let next = g.affine(s, 1.0, 1.0).unwrap();
    g.assign(s, next).unwrap();
    let before = g.clone();
    for (result, name) in [
        (g.affine(p, 1.0, 0.0), "\"p1\""),
        (g.reshape(p, &[1, 2, 3]), "\"p1\""),
        (g.reshape(p, &[6]), "\"p1\""),
        (g.cast(p, DType::F16), "\"p1\""),
        (g.affine(s, 1.0, 0.0), "\"s\""),
        (g.reshape(s, &[3]), "\"s\""),
        (g.assign(s, next).map(|()| s), "\"s\""),
    ] {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Graph(_)), "{error}");
        assert!(error.to_string().contains(name), "{error}");
    }
    assert_eq!(*g, before);
    // The reshape of before is the value of before.
    g.affine(q, 1.0, 0.0).unwrap();
}

/// One dispatch cannot read and write the buffer that holds the parameters.
#[test]
fn a_parameter_as_a_gradient() {
    let mut case = Case::new(8, DType::F32);
    let (p, q) = (case.parameter(&[3, 5]), case.parameter(&[3, 5]));
    let hyper = case.input_of(&[3], DType::F32, vec![0.1, 1.0, 1.0]);
    let other = case.graph.reshape(q, &[3, 5]).unwrap();
    for (params, gradient) in [(vec![p], q), (vec![q], other)] {
        let op = Op::AdamW {
            params,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            rates: vec![Rates::decay(0.0)],
        };
        case.graph.apply(op, &[gradient, hyper]).unwrap();
    }
    case.output("p", p);
    check(&case, BOUND);
}

/// f16 copies that the session keeps change with the parameter; a reshape of one does not.
#[test]
fn reshapes_of_f16_copies() {
    let mut case = Case::new(9, DType::F16);
    let p = case.parameter(&[32, 64]);
    let x = case.input(&[4, 64]);
    let g = &mut case.graph;
    let half = g.cast(p, DType::F16).unwrap();
    let same = g.reshape(half, &[1, 32, 64]).unwrap();
    let weight = g.reshape(same, &[32, 64]).unwrap();
    let y = g.matmul(x, weight, Trans::NT).unwrap();
    let loss = g.sum_all(y).unwrap();
    optimizer().step(g, loss, &[p]).unwrap();
    let late = g.affine(same, 2.0, 0.0).unwrap();
    g.output("late", late).unwrap();
    g.output("same", same).unwrap();
    check(&case, tolerance(DType::F16));
}

#[test]
fn a_name_is_a_parameter_or_a_state_in_a_session() {
    let parameter = || {
        let mut graph = Graph::new();
        let p = graph.parameter("name", &[2], Init::Constant(1.0)).unwrap();
        graph.output("p", p).unwrap();
        graph
    };
    let state = || {
        let mut graph = Graph::new();
        let s = graph.state("name", &[2], 2.0).unwrap();
        let next = graph.affine(s, 2.0, 0.0).unwrap();
        graph.assign(s, next).unwrap();
        graph
    };
    for (first, second, part) in [
        (parameter(), state(), "is a parameter in another graph"),
        (state(), parameter(), "is a state in another graph"),
    ] {
        let mut session = Session::new(&gpu(), 0);
        session.compile(&first).unwrap();
        let before = session.get("name").unwrap();
        for error in [
            session.plan(&second).unwrap_err(),
            session.compile(&second).unwrap_err(),
        ] {
            assert!(matches!(error, Error::Graph(_)), "{error}");
            let text = error.to_string();
            assert!(text.contains("\"name\"") && text.contains(part), "{text}");
        }
        assert_eq!(session.get("name").unwrap(), before);
        session.compile(&first).unwrap();
    }
}
