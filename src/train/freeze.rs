//! Which parameters are trained.

use crate::error::{Error, Result};
use crate::graph::{Graph, ValueId};

/// The parameters of `graph`, in the order of their creation, but those that `frozen` names: by their whole name, or by what stands before a
/// dot of it, such as `blocks.0` for `blocks.0.norm.weight` and all others of that block.
///
/// What a step leaves out has no gradient, no moments, no weight decay, and keeps its bits.
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
    let fits = |name: &str, prefix: &String| match name.strip_prefix(prefix.as_str()) {
        Some(rest) => rest.is_empty() || (rest.starts_with('.') && !prefix.is_empty()),
        None => false,
    };
    for prefix in frozen {
        let mut parameters = graph.parameters();
        if !parameters.any(|(_, value)| fits(&value.name, prefix)) {
            return fail(format!(
                "names {prefix:?}, which is no parameter and no prefix of one"
            ));
        }
    }
    let trained: Vec<ValueId> = graph
        .parameters()
        .filter(|(_, value)| !frozen.iter().any(|prefix| fits(&value.name, prefix)))
        .map(|(id, _)| id)
        .collect();
    match trained.is_empty() && !frozen.is_empty() {
        true => fail("leaves no parameter to train".into()),
        false => Ok(trained),
    }
}
