use super::*;
use crate::graph::Init;
use crate::types::Rates;

/// Parameters a `[2]` and b `[1]`, gradients as inputs, one AdamW node.
fn training_graph() -> Result<(Graph, ValueId)> {
    let mut graph = Graph::new();
    let start = |number| Source::Parameter(Init::Constant(number));
    let a = push(&mut graph, "a", &[2], DType::F32, start(0.5))?;
    let b = push(&mut graph, "b", &[1], DType::F32, start(-2.0))?;
    let da = input(&mut graph, "da", &[2], DType::F32)?;
    let db = input(&mut graph, "db", &[1], DType::F32)?;
    let hyper = input(&mut graph, "hyper", &[3], DType::F32)?;
    let adamw = Op::AdamW {
        rates: vec![Rates::decay(0.125); 2],
        params: vec![a, b],
        beta1: 0.5,
        beta2: 0.75,
        eps: 0.25,
    };
    node(&mut graph, adamw, &[da, db, hyper], &[])?;
    let double = Op::Binary(BinaryOp::Add, Broadcast::Same);
    let doubled = node(&mut graph, double, &[a, a], &[(&[2], DType::F32)])?;
    Ok((graph, doubled[0]))
}

fn inputs(da: [f64; 2], db: f64, hyper: [f64; 3]) -> Result<[(&'static str, Array); 3]> {
    Ok([
        ("da", Array::new(&[2], da.to_vec())?),
        ("db", Array::scalar(db)),
        ("hyper", Array::new(&[3], hyper.to_vec())?),
    ])
}

fn variable(interpreter: &Interpreter, name: &str) -> Vec<f64> {
    interpreter
        .get(name)
        .map(|array| array.data().to_vec())
        .unwrap_or_default()
}

#[test]
fn two_steps_by_hand() -> Result<()> {
    let (graph, doubled) = training_graph()?;
    let mut interpreter = Interpreter::new(&graph);

    // Step 1, scale 0.5: g = [1, -2], 4. m = g/2, v = g²/4, m/c1 = g, v/c2 = g², so p ← p(1 − lr/8) − lr·g/(|g| + 1/4).
    let feeds = inputs([2.0, -4.0], 8.0, [0.1, 0.5, 1.0])?;
    let values = interpreter.run_values(&graph, &feeds)?;
    let a1 = [0.5 * 0.9875 - 0.1 / 1.25, 0.5 * 0.9875 + 0.2 / 2.25];
    let b1 = -2.0 * 0.9875 - 0.4 / 4.25;
    assert_close(&variable(&interpreter, "a"), &a1, 1e-8);
    assert_close(&variable(&interpreter, "b"), &[b1], 1e-8);
    assert_close(&variable(&interpreter, "a.adamw.m"), &[0.5, -1.0], 1e-15);
    assert_close(&variable(&interpreter, "a.adamw.v"), &[0.25, 1.0], 1e-15);
    // A node after AdamW reads the updated parameter.
    assert_close(values[&doubled].data(), &a1.map(|x| 2.0 * x), 1e-8);

    // Step 2, g = [3, 0], 0 with scale 1: c1 = 1 − 0.5² = 0.75, c2 = 1 − 0.75² = 0.4375.
    let feeds = inputs([3.0, 0.0], 0.0, [0.1, 1.0, 1.0])?;
    interpreter.run_values(&graph, &feeds)?;
    // m = 0.5·0.5 + 0.5·3 = 1.75, v = 0.75·0.25 + 0.25·9 = 2.4375
    let update = |m: f64, v: f64| 0.1 * (m / 0.75) / ((v / 0.4375).sqrt() + 0.25);
    let a2 = [
        a1[0] * 0.9875 - update(1.75, 2.4375),
        a1[1] * 0.9875 - update(-0.5, 0.75),
    ];
    assert_close(&variable(&interpreter, "a"), &a2, 1e-8);
    assert_close(&variable(&interpreter, "a.adamw.m"), &[1.75, -0.5], 1e-15);
    assert_close(&variable(&interpreter, "a.adamw.v"), &[2.4375, 0.75], 1e-15);
    assert_close(&variable(&interpreter, "a.adamw.c"), &[0.75, 0.4375], 1e-15);
    // b: m = 2/2 = 1, v = 0.75·4 = 3
    assert_close(
        &variable(&interpreter, "b"),
        &[b1 * 0.9875 - update(1.0, 3.0)],
        1e-8,
    );
    Ok(())
}

#[test]
fn apply_zero_changes_nothing_even_for_nan() -> Result<()> {
    let (graph, _) = training_graph()?;
    let mut interpreter = Interpreter::new(&graph);
    interpreter.run_values(&graph, &inputs([1.0, 2.0], 3.0, [0.1, 1.0, 1.0])?)?;
    let before = interpreter.variables().clone();
    let hyper = [0.1, f64::NAN, 0.0];
    interpreter.run_values(&graph, &inputs([f64::NAN, f64::INFINITY], 1.0, hyper)?)?;
    assert_eq!(&before, interpreter.variables());
    Ok(())
}

#[test]
fn moments_can_be_set_and_their_shape_is_checked() -> Result<()> {
    let (graph, _) = training_graph()?;
    let feeds = inputs([0.0, 0.0], 0.0, [0.1, 1.0, 1.0])?;
    let mut interpreter = Interpreter::new(&graph);
    interpreter.set("a.adamw.m", Array::filled(&[2], 8.0)?);
    interpreter.run_values(&graph, &feeds)?;
    assert_eq!(variable(&interpreter, "a.adamw.m"), [4.0, 4.0]);
    interpreter.set("b.adamw.v", Array::filled(&[2], 8.0)?);
    let before = interpreter.variables().clone();
    assert!(interpreter.run_values(&graph, &feeds).is_err());
    // The first parameter's update is not kept either.
    assert_eq!(&before, interpreter.variables());
    Ok(())
}

#[test]
fn assign_moves_a_state_on() -> Result<()> {
    let mut graph = Graph::new();
    let state = push(&mut graph, "count", &[1], DType::F32, Source::State(3.0))?;
    let one = push(&mut graph, "", &[1], DType::F32, Source::Constant(1.0))?;
    let add = Op::Binary(BinaryOp::Add, Broadcast::Same);
    let next = node(
        &mut graph,
        add.clone(),
        &[state, one],
        &[(&[1], DType::F32)],
    )?;
    let read_before = node(&mut graph, Op::Reshape, &[state], &[(&[1], DType::F32)])?;
    node(&mut graph, Op::Assign { state }, &next, &[])?;
    let read_after = node(&mut graph, Op::Reshape, &[state], &[(&[1], DType::F32)])?;
    let mut interpreter = Interpreter::new(&graph);
    for count in [3.0, 4.0] {
        let values = interpreter.run_values(&graph, &[])?;
        assert_eq!(values[&read_before[0]].data(), [count]);
        assert_eq!(values[&read_after[0]].data(), [count + 1.0]);
        assert_eq!(variable(&interpreter, "count"), [count + 1.0]);
    }
    Ok(())
}
