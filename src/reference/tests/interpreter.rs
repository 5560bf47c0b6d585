use super::*;
use crate::error::Error;
use crate::graph::Init;
use crate::types::UnaryOp;

/// The name in an [`Error::Data`].
fn culprit<T>(result: Result<T>) -> Option<String> {
    match result {
        Err(Error::Data { name, .. }) => Some(name),
        _ => None,
    }
}

/// loss = Σ (table[ids] ⊙ w): ids u32 `[2]` below 3, table a uniform parameter, w a constant parameter.
fn small_graph() -> Result<(Graph, [ValueId; 4])> {
    let mut graph = Graph::new();
    let below = Some(3);
    let ids = push(&mut graph, "ids", &[2], DType::U32, Source::Input { below })?;
    let uniform = Source::Parameter(Init::Uniform(0.1));
    let table = push(&mut graph, "table", &[3, 2], DType::F32, uniform)?;
    let constant = Source::Parameter(Init::Constant(2.0));
    let w = push(&mut graph, "w", &[2], DType::F32, constant)?;
    let rows = node(
        &mut graph,
        Op::Gather { padding: None },
        &[table, ids],
        &[(&[2, 2], DType::F32)],
    )?;
    let scale = Op::Binary(BinaryOp::Mul, Broadcast::Cols);
    let scaled = node(&mut graph, scale, &[rows[0], w], &[(&[2, 2], DType::F32)])?;
    let loss = node(&mut graph, Op::SumAll, &scaled, &[(&[1], DType::F32)])?;
    Ok((graph, [ids, table, w, loss[0]]))
}

fn ready(graph: &Graph) -> Result<Interpreter> {
    let mut interpreter = Interpreter::new(graph);
    let table = vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
    interpreter.set("table", Array::new(&[3, 2], table)?);
    Ok(interpreter)
}

#[test]
fn runs_from_start_values_and_set_ones() -> Result<()> {
    let (graph, [_, _, w, loss]) = small_graph()?;
    let ids = [("ids", Array::from_u32(&[2], &[2, 0])?)];
    assert_eq!(
        culprit(Interpreter::new(&graph).run_values(&graph, &ids)).as_deref(),
        Some("table")
    );
    let values = ready(&graph)?.run_values(&graph, &ids)?;
    assert_eq!(values[&w].data(), [2.0, 2.0]);
    assert_eq!(values[&loss].data(), [28.0]);
    Ok(())
}

#[test]
fn bad_inputs_are_named() -> Result<()> {
    let (graph, _) = small_graph()?;
    let mut interpreter = ready(&graph)?;
    let ids = Array::from_u32(&[2], &[2, 0])?;
    let mut run = |inputs: &[(&str, Array)]| culprit(interpreter.run_values(&graph, inputs));
    let wrong = |data: [f64; 2]| Array::new(&[2], data.to_vec());
    assert_eq!(run(&[]).as_deref(), Some("ids"));
    assert_eq!(run(&[("ids", Array::scalar(0.0))]).as_deref(), Some("ids"));
    for data in [[0.0, 3.0], [-1.0, 0.0], [0.5, 0.0], [f64::NAN, 0.0]] {
        assert_eq!(run(&[("ids", wrong(data)?)]).as_deref(), Some("ids"));
    }
    let twice = [("ids", ids.clone()), ("ids", ids.clone())];
    assert_eq!(run(&twice).as_deref(), Some("ids"));
    for name in ["idz", "table", ""] {
        let extra = [("ids", ids.clone()), (name, ids.clone())];
        assert_eq!(run(&extra).as_deref(), Some(name));
    }
    assert_eq!(run(&[("ids", ids)]), None);
    Ok(())
}

#[test]
fn a_variable_of_the_wrong_shape_is_named() -> Result<()> {
    let (graph, _) = small_graph()?;
    let mut interpreter = ready(&graph)?;
    interpreter.set("w", Array::filled(&[3], 1.0)?);
    let ids = [("ids", Array::from_u32(&[2], &[2, 0])?)];
    assert_eq!(
        culprit(interpreter.run_values(&graph, &ids)).as_deref(),
        Some("w")
    );
    Ok(())
}

#[test]
fn a_result_of_the_wrong_size_is_an_error() -> Result<()> {
    let x = noise(&[4], 0.0)?;
    let result = apply_f32(Op::Unary(UnaryOp::Abs), [&x], &[5]);
    assert!(matches!(result, Err(Error::Shape { .. })));
    let result = apply_f32(Op::Unary(UnaryOp::Abs), [&x, &x], &[4]);
    assert!(matches!(result, Err(Error::Graph(_))));
    Ok(())
}

#[test]
fn numeric_gradient_of_a_parameter() -> Result<()> {
    let (graph, [ids_id, table, w, loss]) = small_graph()?;
    let interpreter = ready(&graph)?;
    let ids = [("ids", Array::from_u32(&[2], &[2, 2])?)];
    let dw = numeric_gradient(&interpreter, &graph, &ids, loss, w)?;
    assert_close(dw.data(), &[10.0, 12.0], 1e-9);
    let dtable = numeric_gradient(&interpreter, &graph, &ids, loss, table)?;
    assert_close(dtable.data(), &[0.0, 0.0, 0.0, 0.0, 4.0, 4.0], 1e-9);
    assert!(numeric_gradient(&interpreter, &graph, &ids, table, w).is_err());
    assert!(numeric_gradient(&interpreter, &graph, &ids, loss, loss).is_err());
    let missing = numeric_gradient(&interpreter, &graph, &[], loss, ids_id);
    assert_eq!(culprit(missing).as_deref(), Some("ids"));
    Ok(())
}
