//! A graph as text, one line per node. Executables are cached by it, so layers, which change nothing, are not part of it.

use std::fmt;

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

fn show(id: ValueId) -> String {
    format!("%{}", id.0)
}
