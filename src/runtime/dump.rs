//! What a graph becomes, as files to look at.

use std::fmt::Write as _;
use std::path::Path;

use super::Executable;
use super::executable::one_line;
use crate::compile::{Place, Plan};
use crate::error::{Error, Result};
use crate::file::AtomicFile;
use crate::graph::Graph;

/// Writes `graph.txt`, `graph.dot`, `plan.txt`, `dispatches.txt` and `wgsl/` into a folder. A failure is a warning in the log.
pub(super) fn dump(folder: &Path, graph: &Graph, executable: &Executable) {
    match write(folder, graph, executable) {
        Ok(()) => log::info!("{}: wrote a graph and what it became", folder.display()),
        Err(error) => log::warn!("the graph was not written: {error}"),
    }
}

fn write(folder: &Path, graph: &Graph, executable: &Executable) -> Result<()> {
    let kernels = folder.join("wgsl");
    std::fs::create_dir_all(&kernels).map_err(|error| Error::io(&kernels, error))?;
    save(&folder.join("graph.txt"), &graph.to_string())?;
    save(&folder.join("graph.dot"), &graph.to_graphviz())?;
    save(&folder.join("plan.txt"), &memory(executable.plan()))?;
    let mut list = String::new();
    let mut written: Vec<&str> = Vec::new();
    for (step, (key, wgsl)) in executable.steps().zip(executable.sources()) {
        let number = match written.iter().position(|known| *known == key) {
            Some(number) => number,
            None => {
                let number = written.len();
                save(
                    &kernels.join(format!("{number:03}-{}.wgsl", step.name)),
                    wgsl,
                )?;
                written.push(key);
                number
            }
        };
        let [x, y, z] = step.workgroups;
        let layer = step.layer.map_or("-".into(), one_line);
        // Writing to a string cannot fail.
        let _ = writeln!(
            list,
            "{number:03} {:22} {layer:28} {x}x{y}x{z} groups, {:.3} Mflop, {:.3} MB  {key}",
            step.name,
            step.flops / 1e6,
            step.bytes / 1e6
        );
    }
    save(&folder.join("dispatches.txt"), &list)
}

/// The sums, then what lies where in the buffers that intermediate values share. Equal graphs give equal text.
fn memory(plan: &Plan) -> String {
    let mut text = format!("{plan}\n");
    for (slot, bytes) in plan.slots.iter().enumerate() {
        let _ = writeln!(text, "\nbuffer {slot}: {bytes} bytes");
        let here = plan.place_of.iter().filter(|(_, (of, _))| *of == slot);
        let mut values: Vec<_> = here.map(|(place, (_, at))| (*at, name(place))).collect();
        values.sort();
        for (at, value) in values {
            let _ = writeln!(text, "{at:12} {value}");
        }
    }
    text
}

/// As in `graph.txt`; what an operation keeps for itself has a number of its own.
fn name(place: &Place) -> String {
    match place {
        Place::Value(value) => format!("%{}", value.index()),
        Place::Scratch(number) => format!("scratch {number}"),
        other => format!("{other:?}"),
    }
}

fn save(path: &Path, text: &str) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    file.write(text.as_bytes())?;
    file.commit()
}
