//! Losses that are computed together with their gradient, so that both read their operands once.

use crate::compile::fuse::Fused;
use crate::graph::{Op, Source, ValueId};

use std::collections::HashMap;

/// The order in which live nodes are placed, reshapes and paired losses left out, and the loss of each gradient that has one.
///
/// A gradient is paired with its loss if its `dloss` does not depend on that loss. It then takes the place of the loss; what
/// `dloss` depends on moves before it. Nodes only ever move to an earlier place and behind what they read, so they read the same:
/// parameters are updated after all their readers, states when the run ends.
pub(crate) fn pair(fused: &Fused<'_>, live: &[bool]) -> (Vec<usize>, HashMap<usize, usize>) {
    let nodes = fused.graph.nodes();
    let mut order: Vec<usize> = (0..nodes.len())
        .filter(|&index| live[index] && !fused.is_renaming(index))
        .collect();
    let mut losses = HashMap::new();
    let mut gradients = HashMap::new();
    for gradient in order.clone() {
        let Some((loss, dloss)) = loss_of(fused, gradient) else {
            continue;
        };
        let before = ancestors(fused, dloss, &gradients);
        // Not there: dead, or paired already.
        let at = order.iter().position(|&index| index == loss);
        let (Some(at), false) = (at, before[loss]) else {
            continue;
        };
        let (moved, rest): (Vec<usize>, Vec<usize>) =
            order[at..].iter().partition(|&&index| before[index]);
        let rest = rest.into_iter().filter(|&index| index != gradient);
        order.truncate(at);
        order.extend(moved);
        order.push(gradient);
        order.extend(rest.filter(|&index| index != loss));
        losses.insert(gradient, loss);
        gradients.insert(loss, gradient);
    }
    (order, losses)
}

/// The loss that node `gradient` is the gradient of, and the value it starts from.
fn loss_of(fused: &Fused<'_>, gradient: usize) -> Option<(usize, ValueId)> {
    let nodes = fused.graph.nodes();
    let node = &nodes[gradient];
    // The gradient's operands are those of the loss, with rows, count and dloss in between.
    let (op, first) = match &node.op {
        Op::CrossEntropyGrad { ignore, smoothing } => {
            let (ignore, smoothing) = (*ignore, *smoothing);
            (Op::CrossEntropy { ignore, smoothing }, 2)
        }
        Op::LinearCrossEntropyGrad { layer, .. } => (Op::LinearCrossEntropy(*layer), 3),
        _ => return None,
    };
    let (own, rest) = node.inputs.split_at(first);
    let &[rows, count, dloss, ref bias @ ..] = rest else {
        return None;
    };
    let loss = producer(fused, rows)?;
    let value = &nodes[loss];
    let same = value.op == op
        && value.inputs == [own, bias].concat()
        && value.outputs[1..] == [count, rows];
    same.then_some((loss, dloss))
}

fn producer(fused: &Fused<'_>, id: ValueId) -> Option<usize> {
    match fused.graph.values[fused.root(id).0 as usize].source {
        Source::Node { node, .. } => Some(node),
        _ => None,
    }
}

/// By node: whether `value` depends on it. What depends on a paired loss depends on its gradient, too; `gradients` has them by loss.
fn ancestors(fused: &Fused<'_>, value: ValueId, gradients: &HashMap<usize, usize>) -> Vec<bool> {
    let nodes = fused.graph.nodes();
    let mut found = vec![false; nodes.len()];
    let mut open: Vec<usize> = producer(fused, value).into_iter().collect();
    while let Some(index) = open.pop() {
        if !found[index] {
            found[index] = true;
            let inputs = nodes[index].inputs.iter();
            open.extend(inputs.filter_map(|&id| producer(fused, id)));
            open.extend(gradients.get(&index));
        }
    }
    found
}
