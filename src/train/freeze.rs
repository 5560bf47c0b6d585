//! Which parameters are trained.

use super::group::{has_prefix, near_prefixes};
use crate::error::{Error, Result};
use crate::graph::{Graph, ValueId};

/// The parameters of `graph` that `frozen` does not name, in the order of their creation. A parameter is named by its whole name or by
/// what stands before a dot of it: `blocks.0` names `blocks.0.norm.weight` and all others of that block.
///
/// A parameter that a step leaves out has no gradient and no weight decay. Its value and its moments keep their bits.
///
/// # Errors
/// [`Error::Config`] for a name that fits no parameter, and when no parameter is left.
pub fn trainable(graph: &Graph, frozen: &[String]) -> Result<Vec<ValueId>> {
    let fail = |reason: String| {
        Err(Error::Config {
            field: "freeze",
            reason,
        })
    };
    for prefix in frozen {
        let mut parameters = graph.parameters();
        if !parameters.any(|(_, value)| has_prefix(&value.name, prefix)) {
            return fail(format!(
                "names {prefix:?}, which is no parameter and no prefix of one{}",
                near_prefixes(graph, prefix)
            ));
        }
    }
    let trained: Vec<ValueId> = graph
        .parameters()
        .filter(|(_, value)| !frozen.iter().any(|prefix| has_prefix(&value.name, prefix)))
        .map(|(id, _)| id)
        .collect();
    match trained.is_empty() && !frozen.is_empty() {
        true => fail("leaves no parameter to train".into()),
        false => Ok(trained),
    }
}
