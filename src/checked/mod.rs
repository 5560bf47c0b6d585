//! Runs kernels on the CPU and checks every access: whether it is inside its binding or array, whether another invocation touches the same
//! bytes without a barrier between, and whether workgroup memory was written before it is read.
//!
//! Kernels of this crate are compiled without checks, and drivers hide what they do outside their buffers. So the text that drivers compile
//! is parsed by naga, whose intermediate representation is executed here, all invocations of a workgroup in step, on memory of exactly the size
//! that layouts say. What is loaded and not used is reported, too. For tests only.

mod evaluate;
mod machine;
mod memory;
mod table;
mod values;

#[cfg(test)]
mod tests;

use std::fmt;

use naga::valid::{Capabilities, ValidationFlags, Validator};

pub(crate) use memory::{Kind, Memory};

use crate::kernels::{Kernel, Target};
use machine::Machine;

/// What a binding is bound to: bytes of a memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bound {
    pub memory: usize,
    pub offset: u64,
    pub len: u64,
}

/// An access that should not be, and how often there are such.
#[derive(Clone, Debug)]
pub(crate) struct Fault {
    pub variable: String,
    pub kind: Kind,
    /// Byte that is furthest from the beginning.
    pub at: u64,
    /// Bytes that there are.
    pub len: u64,
    pub group: [u32; 3],
    pub lane: u32,
    pub times: u64,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} of {} at byte {} of {}, by invocation {} of workgroup {:?}, {} such",
            self.kind, self.variable, self.at, self.len, self.lane, self.group, self.times
        )
    }
}

/// Runs `groups` of a kernel, or all of its workgroups. `dispatch` is larger than that of any run before on the same memories.
pub(crate) fn run(
    kernel: &Kernel,
    target: Target,
    bound: &[Bound],
    memories: &mut [Memory],
    dispatch: u32,
    groups: Option<&[[u32; 3]]>,
) -> Vec<Fault> {
    let source = kernel
        .source(target)
        .unwrap_or_else(|error| panic!("{}: {error}", kernel.key(target)));
    let all: Vec<[u32; 3]>;
    let groups = match groups {
        Some(groups) => groups,
        None => {
            let [x, y, z] = kernel.workgroups();
            all = (0..x * y * z)
                .map(|i| [i % x, i / x % y, i / (x * y)])
                .collect();
            &all
        }
    };
    let subgroup = target.matrix_units.map_or(1, |units| units.lanes);
    run_text(&source.wgsl, subgroup, bound, memories, dispatch, groups)
}

/// As [`run`], of WGSL.
fn run_text(
    wgsl: &str,
    subgroup: usize,
    bound: &[Bound],
    memories: &mut [Memory],
    dispatch: u32,
    groups: &[[u32; 3]],
) -> Vec<Fault> {
    let module = naga::front::wgsl::parse_str(wgsl)
        .unwrap_or_else(|error| panic!("{}", error.emit_to_string(wgsl)));
    let info = Validator::new(ValidationFlags::all(), Capabilities::all())
        .validate(&module)
        .unwrap_or_else(|error| panic!("{}", error.emit_to_string(wgsl)));
    let mut machine = Machine::new(&module, &info, bound, memories, subgroup, dispatch);
    for &group in groups {
        machine.run(group);
    }
    machine.faults()
}
