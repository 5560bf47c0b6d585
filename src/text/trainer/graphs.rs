//! The graphs of the steps, and which parameters they train.

use super::objective::{self, Network, Objective, Pass};
use super::options::{Condition, TrainerOptions};
use crate::error::{Error, Result};
use crate::graph::Graph;
use crate::nn::Draws;
use crate::text::Model;
use crate::types::DType;

/// The graph of a step of mode A (0) or B (1).
pub(super) fn graph_of(
    model: &Model,
    network: Option<Network<'_>>,
    options: &TrainerOptions,
    dtype: DType,
    mode: usize,
) -> Result<(Graph, Objective)> {
    let mut graph = Graph::new();
    let with_encoder = mode == 0 || options.condition == Condition::TrainedStudent;
    let network = network.filter(|_| with_encoder);
    let decoder = model.decoder.as_ref().filter(|_| mode == 1);
    // A rate of 0 needs no draws.
    let drops = network.is_some_and(Network::drops)
        || decoder.is_some_and(|decoder| decoder.dropout != 0.0);
    let draws = match drops {
        true => Some(Draws::new(&mut graph, options.seed)?),
        false => None,
    };
    let samples = options.step() / options.micro_batches;
    let pass = Pass::train(samples, dtype, draws, options.recompute);
    let objective = match (mode, network) {
        (0, Some(network)) => objective::distill(&mut graph, network, options, pass)?,
        _ => objective::decode(&mut graph, model, options, pass)?,
    };
    Ok((graph, objective))
}

/// Whether a name or prefix fits a parameter of a graph.
pub(super) fn trainable_names(graph: &Graph, name: &str) -> bool {
    let mut parameters = graph.parameters();
    parameters.any(|(_, value)| crate::train::has_prefix(&value.name, name))
}

/// Every name in `freeze` fits a parameter of one of the graphs.
pub(super) fn check_freeze(graphs: &[Option<(Graph, Objective)>], freeze: &[String]) -> Result<()> {
    for name in freeze {
        let mut graphs = graphs.iter().flatten();
        if !graphs.any(|(graph, _)| trainable_names(graph, name)) {
            return Err(Error::Config {
                field: "freeze",
                reason: format!("names {name:?}, which is no parameter and no prefix of one"),
            });
        }
    }
    Ok(())
}
