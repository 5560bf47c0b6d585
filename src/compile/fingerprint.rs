//! What identifies a graph in a cache of compiled graphs.

use std::collections::hash_map::DefaultHasher;
use std::fmt::{self, Write};
use std::hash::Hasher;

use crate::graph::Graph;

/// 128 bits that tell graphs apart: of the text of the graph, and of which nodes are recomputed where.
///
/// Equal graphs have equal fingerprints within a process. Different graphs have different ones, but for a chance of 2⁻⁶⁴ per pair at most.
pub(crate) fn fingerprint(graph: &Graph) -> u128 {
    let mut hashing = Hashing::new();
    // Writing to hashers cannot fail.
    let _ = write!(hashing, "{graph}");
    for index in 0..graph.nodes().len() {
        if let Some(start) = graph.recomputed.start_of_copies(index) {
            let _ = write!(hashing, "{index} {start},");
        }
    }
    let [high, low] = hashing.0.map(|hasher| u128::from(hasher.finish()));
    high << 64 | low
}

/// Two hashes of one text, which begin differently.
struct Hashing([DefaultHasher; 2]);

impl Hashing {
    fn new() -> Self {
        let mut hashers = [DefaultHasher::new(), DefaultHasher::new()];
        hashers[1].write_u8(1);
        Self(hashers)
    }
}

impl Write for Hashing {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for hasher in &mut self.0 {
            hasher.write(text.as_bytes());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Result;
    use crate::graph::Init;
    use crate::types::{DType, UnaryOp};

    fn graph(start: f32, ops: &[UnaryOp], output: &str) -> Result<Graph> {
        let mut graph = Graph::new();
        let x = graph.input("x", &[2, 3], DType::F32)?;
        let w = graph.parameter("w", &[2, 3], Init::Constant(start))?;
        let mut y = graph.mul(x, w)?;
        for &op in ops {
            y = graph.unary(op, y)?;
        }
        graph.output(output, y)?;
        Ok(graph)
    }

    #[test]
    fn equal_graphs_and_no_others_have_one_fingerprint() -> Result<()> {
        let all = [
            graph(0.0, &[UnaryOp::Tanh], "y")?,
            graph(-0.0, &[UnaryOp::Tanh], "y")?,
            graph(0.0, &[UnaryOp::Tanh, UnaryOp::Tanh], "y")?,
            graph(0.0, &[UnaryOp::Relu], "y")?,
            graph(0.0, &[UnaryOp::Tanh], "z")?,
        ];
        for (i, a) in all.iter().enumerate() {
            for (j, b) in all.iter().enumerate() {
                assert_eq!(fingerprint(a) == fingerprint(b), i == j, "{i} {j}");
            }
        }
        let again = graph(0.0, &[UnaryOp::Tanh], "y")?;
        assert_eq!(fingerprint(&again), fingerprint(&all[0]));
        Ok(())
    }

    /// The same nodes, recomputed at once or one after the other.
    #[test]
    fn where_segments_begin_is_part_of_it() -> Result<()> {
        let build = |together: bool| -> Result<Graph> {
            let mut graph = Graph::new();
            let x = graph.parameter("x", &[4], Init::Constant(1.0))?;
            let tanh = |graph: &mut Graph, x| graph.unary(UnaryOp::Tanh, x);
            let y = match together {
                true => graph.recompute(|graph| {
                    let y = tanh(graph, x)?;
                    tanh(graph, y)
                })?,
                false => {
                    let y = graph.recompute(|graph| tanh(graph, x))?;
                    graph.recompute(|graph| tanh(graph, y))?
                }
            };
            let loss = graph.sum_all(y)?;
            let gradient = graph.gradients(loss, &[x])?[0];
            graph.output("gradient", gradient)?;
            Ok(graph)
        };
        assert_ne!(fingerprint(&build(true)?), fingerprint(&build(false)?));
        Ok(())
    }
}
