//! Every operation once more, on the CPU in f64: what the GPU kernels are checked against.
//!
//! Textbook loops, one file a kernel family, named like its twin in `kernels/`. Values of type f16 are rounded to half
//! precision when they are given or produced; everything else is computed and kept in f64, so a result differs from exact
//! arithmetic by f16 storage only. This is for tests and small checks: nothing else in the crate computes on the CPU.

mod array;
mod attention;
mod conv;
mod decode;
mod dropout;
mod elementwise;
mod embedding;
mod erf;
mod finite_difference;
mod gemm;
mod interpreter;
mod layer_norm;
mod loss;
mod optimizer;
mod precision;
mod reduce;
mod softmax;
mod top_k;

#[cfg(test)]
mod tests;

use std::collections::HashMap;

pub use array::Array;
pub use decode::{Sampling, Stream};
pub use finite_difference::numeric_gradient;
pub use interpreter::Interpreter;
pub use top_k::top_k;

use crate::error::Result;
use crate::graph::Graph;

impl Graph {
    /// Runs the graph once on the CPU, in f64, and returns its named outputs.
    ///
    /// `variables` holds parameters and states by name; those it lacks start as [`Interpreter::new`] says, names that the graph
    /// does not know are ignored. Updates of variables are dropped: use an [`Interpreter`] to keep them.
    ///
    /// # Errors
    /// As [`Interpreter::run`].
    pub fn evaluate_cpu(
        &self,
        variables: &HashMap<String, Array>,
        inputs: &[(&str, Array)],
    ) -> Result<HashMap<String, Array>> {
        let mut interpreter = Interpreter::new(self);
        for (name, array) in variables {
            interpreter.set(name, array.clone());
        }
        interpreter.run(self, inputs)
    }
}
