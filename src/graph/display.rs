//! A graph as text, one line per node. Executables are cached by it, so layers, which change nothing, are not part of it.

use std::fmt::{self, Write as _};

use super::{Graph, Source, ValueId};

impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (id, value) in self.values() {
            let (shape, dtype) = (&value.shape, value.dtype);
            match &value.source {
                Source::Node { .. } => {}
                Source::Constant(number) => {
                    writeln!(f, "{} = constant {number:?} : {dtype} {shape}", show(id))?;
                }
                source => {
                    write!(
                        f,
                        "{} = {source:?} {:?} : {dtype} {shape}",
                        show(id),
                        value.name
                    )?;
                    match value.taps {
                        None => writeln!(f)?,
                        Some(taps) => writeln!(f, ", {taps} taps")?,
                    }
                }
            }
        }
        for (index, node) in self.nodes().iter().enumerate() {
            let again = match self.recomputed.start_of_copies(index) {
                Some(_) => ", again",
                None => "",
            };
            let results: Vec<String> = node.outputs.iter().map(|&id| show(id)).collect();
            let operands: Vec<String> = node.inputs.iter().map(|&id| show(id)).collect();
            let types: Vec<String> = node
                .outputs
                .iter()
                .map(|&id| format!("{} {}", self.dtype(id), self.shape(id)))
                .collect();
            let (equals, colon) = match results.is_empty() {
                true => ("", ""),
                false => (" = ", " : "),
            };
            writeln!(
                f,
                "{}{equals}{:?}({}){colon}{}{again}",
                results.join(", "),
                node.op,
                operands.join(", "),
                types.join(", ")
            )?;
        }
        for (name, id) in self.outputs() {
            writeln!(f, "output {name:?} = {}", show(*id))?;
        }
        Ok(())
    }
}

impl Graph {
    /// The graph in the language of Graphviz: `dot -Tsvg graph.dot` draws it. Boxes are operations, with the layer that they belong to;
    /// ellipses are inputs, parameters and states. Arrows are values, with their shapes. Constants are left out.
    #[must_use]
    pub fn to_graphviz(&self) -> String {
        let mut text = "digraph {\n  node [fontname=\"Helvetica\", fontsize=10]\n  edge [fontname=\"Helvetica\", fontsize=8]\n".to_owned();
        // Writing to a string cannot fail.
        for (id, value) in self.values() {
            let colour = match value.source {
                Source::Node { .. } | Source::Constant(_) => continue,
                Source::Parameter(_) => "lightblue",
                Source::State(_) => "lightyellow",
                _ => "white",
            };
            let label = format!("{}\n{} {}", value.name, value.dtype, value.shape);
            let _ = writeln!(
                text,
                "  v{} [label={label:?}, style=filled, fillcolor={colour}]",
                id.0
            );
        }
        for (index, node) in self.nodes().iter().enumerate() {
            let layer = node
                .scope
                .as_deref()
                .map_or_else(String::new, |layer| format!("\n{layer}"));
            let label = format!("{}{layer}", node.op.name());
            let _ = writeln!(text, "  n{index} [shape=box, label={label:?}]");
            for &operand in &node.inputs {
                let from = match self.values[operand.0 as usize].source {
                    Source::Constant(_) => continue,
                    Source::Node { node, .. } => format!("n{node}"),
                    _ => format!("v{}", operand.0),
                };
                let label = format!("{} {}", self.dtype(operand), self.shape(operand));
                let _ = writeln!(text, "  {from} -> n{index} [label={label:?}]");
            }
        }
        for (number, (name, id)) in self.outputs().iter().enumerate() {
            let from = match self.values[id.0 as usize].source {
                Source::Node { node, .. } => format!("n{node}"),
                _ => format!("v{}", id.0),
            };
            let _ = writeln!(
                text,
                "  o{number} [shape=ellipse, peripheries=2, label={name:?}]\n  {from} -> o{number}"
            );
        }
        text.push_str("}\n");
        text
    }
}

fn show(id: ValueId) -> String {
    format!("%{}", id.0)
}
