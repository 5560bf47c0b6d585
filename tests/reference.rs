//! The CPU interpreter as a user sees it.

use std::collections::HashMap;

use energyflow::Error;
use energyflow::graph::Graph;
use energyflow::reference::{Array, Interpreter};

#[test]
fn arrays_keep_shape_and_numbers() -> Result<(), Error> {
    let array = Array::from_f32(&[2, 3], &[0.1, -2.0, 3.5, f32::MAX, f32::MIN_POSITIVE, 0.0])?;
    assert_eq!(array.shape().dims(), [2, 3]);
    assert_eq!(array.data()[0], f64::from(0.1f32));
    assert_eq!(array.to_f32()[3..], [f32::MAX, f32::MIN_POSITIVE, 0.0]);
    let ids = Array::from_u32(&[1], &[u32::MAX])?;
    assert_eq!(ids.data(), [4_294_967_295.0]);
    assert!(Array::filled(&[1, 1, 1, 1], 0.0).is_err());
    Ok(())
}

#[test]
fn an_input_that_the_graph_does_not_have_is_refused() -> Result<(), Error> {
    let graph = Graph::new();
    let inputs = [("x", Array::scalar(1.0))];
    let refusal = graph.evaluate_cpu(&HashMap::new(), &inputs);
    assert!(matches!(refusal, Err(Error::Data { name, .. }) if name == "x"));
    assert!(Interpreter::new(&graph).run(&graph, &[])?.is_empty());
    Ok(())
}
