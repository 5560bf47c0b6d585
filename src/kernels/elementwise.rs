//! Programs that stand alone.

use super::{Kernel, Program};

const SIZE: usize = 64;

/// One invocation a `vec4`.
pub(crate) fn elementwise(program: Program) -> Kernel {
    let (rows, width) = (program.rows, program.width());
    Kernel::new("elementwise")
        .items(rows * width, SIZE)
        .with("rows", rows)
        .with("width", width)
        .finish(program)
}
