//! Derivatives by central differences, to check gradients against.

use super::array::Array;
use super::interpreter::Interpreter;
use crate::error::{Error, Result};
use crate::graph::{Graph, Source, ValueId};

/// The derivative of the only element of `output` with respect to every element of `with_respect_to`, a parameter, state or
/// input: (f(x + h) − f(x − h)) / 2h with h = 1e-5·max(1, |x|), everything in f64. The error is about 1e-10 for smooth functions
/// of numbers near one; f16 values on the way are steps, whose derivative this is not.
///
/// Runs the graph twice an element, from the variables of `interpreter`, which stays as it is.
///
/// # Errors
/// [`Error::Graph`] when `output` has more than one element or `with_respect_to` is a constant or the result of a node;
/// otherwise as [`Interpreter::run`].
pub fn numeric_gradient(
    interpreter: &Interpreter,
    graph: &Graph,
    inputs: &[(&str, Array)],
    output: ValueId,
    with_respect_to: ValueId,
) -> Result<Array> {
    if graph.value(output)?.shape.len() != 1 {
        return Err(Error::Graph(format!("{output:?} is not a scalar")));
    }
    let variable = graph.value(with_respect_to)?;
    let name = variable.name.as_str();
    let is_input = match variable.source {
        Source::Input { .. } => true,
        Source::Parameter(_) | Source::State(_) => false,
        Source::Constant(_) | Source::Node { .. } => {
            let reason = format!("{with_respect_to:?} is neither a variable nor an input");
            return Err(Error::Graph(reason));
        }
    };
    let evaluate = |point: &Array| -> Result<f64> {
        let mut interpreter = interpreter.clone();
        let mut inputs = inputs.to_vec();
        if is_input {
            inputs.retain(|(other, _)| *other != name);
            inputs.push((name, point.clone()));
        } else {
            interpreter.set(name, point.clone());
        }
        let mut values = interpreter.run_values(graph, &inputs)?;
        let result = values.remove(&output).map(|array| array.data()[0]);
        result.ok_or_else(|| Error::Graph(format!("{output:?} is not computed")))
    };

    let given = inputs.iter().find(|(other, _)| *other == name);
    let start = match given {
        Some((_, array)) if is_input => Some(array),
        _ => interpreter.get(name),
    };
    let Some(start) = start else {
        return Err(Error::Data {
            name: name.to_owned(),
            reason: "has no value to vary".to_owned(),
        });
    };
    let mut gradient = Array::splat(start.shape().clone(), 0.0);
    let mut point = start.clone();
    for i in 0..start.data().len() {
        let x = start.data()[i];
        let step = 1e-5 * x.abs().max(1.0);
        point.data_mut()[i] = x + step;
        let above = evaluate(&point)?;
        point.data_mut()[i] = x - step;
        let below = evaluate(&point)?;
        point.data_mut()[i] = x;
        // The steps really taken, after rounding.
        gradient.data_mut()[i] = (above - below) / ((x + step) - (x - step));
    }
    Ok(gradient)
}
