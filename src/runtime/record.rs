//! Runs of an executable on tensors of the caller, inside a recording of the caller.

use super::Executable;
use super::dispatch::Input;
use crate::error::{Error, Result};
use crate::gpu::{Layout, Recorder, Tensor};

impl Executable {
    /// Records a run, of a graph without parameters and states, on tensors of the caller: they are copied into the inputs, each of which is
    /// named once, and the results that are asked for are copied out, on the device and in the order of the recording.
    ///
    /// # Errors
    /// [`Error::Data`] for a missing, unknown or repeated input or an unknown output; [`Error::Layout`] for a tensor of another layout
    /// than the graph's value has. Nothing is recorded then.
    pub(crate) fn record(
        &self,
        recorder: &mut Recorder,
        inputs: &[(&str, &Tensor)],
        outputs: &[(&str, &Tensor)],
    ) -> Result<()> {
        for Input { name, is_read, .. } in &self.inputs {
            let given = inputs.iter().filter(|(given, _)| *given == name).count();
            if given > 1 || (given == 0 && *is_read) {
                return Err(unknown(name, &format!("the input is given {given} times")));
            }
        }
        let mut copies = Vec::with_capacity(inputs.len());
        for (name, tensor) in inputs {
            let Some(input) = self.input(name) else {
                return Err(unknown(name, "the graph has no such input"));
            };
            same(name, tensor, input.tensor.layout())?;
            copies.push((tensor.slice(), input.tensor.slice()));
        }
        let mut results = Vec::with_capacity(outputs.len());
        for (name, tensor) in outputs {
            let mut own = self.outputs.iter();
            let Some((_, slice, layout)) = own.find(|(own, ..)| own == name) else {
                return Err(unknown(name, "the graph has no such output"));
            };
            same(name, tensor, layout)?;
            results.push((slice, tensor.slice()));
        }
        for (from, to) in copies {
            recorder.copy(from, to)?;
        }
        for dispatch in &self.dispatches {
            recorder.push(&dispatch.work);
        }
        for (from, to) in results {
            recorder.copy(from, to)?;
        }
        Ok(())
    }
}

fn unknown(name: &str, reason: &str) -> Error {
    Error::Data {
        name: name.to_owned(),
        reason: reason.to_owned(),
    }
}

fn same(name: &str, tensor: &Tensor, layout: &Layout) -> Result<()> {
    match tensor.layout() == layout {
        true => Ok(()),
        false => Err(Error::Layout {
            rows: layout.rows(),
            cols: layout.cols(),
            reason: format!("{name:?} needs {layout:?}, got {:?}", tensor.layout()),
        }),
    }
}
