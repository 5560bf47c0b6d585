//! Programs that stand alone.

use super::{Kernel, Program, Target};

/// An invocation takes several `vec4`s where there are enough of them: starting invocations costs more than they do.
pub(crate) fn elementwise(program: Program, target: Target) -> Kernel {
    let (rows, width) = (program.rows, program.width());
    let (size, each) = match rows * width {
        _ if target.barrier_free => (64, 1),
        items if items >= 1 << 20 => (256, 4),
        _ => (64, 1),
    };
    Kernel::new("elementwise")
        .items((rows * width).div_ceil(each), size)
        .with("each", each)
        .with("rows", rows)
        .with("width", width)
        .finish(program)
}
