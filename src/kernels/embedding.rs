//! Rows of a table by id, and the deterministic gradient of the table.

use super::{Kernel, Program, View};
use crate::gpu::Layout;

const SIZE: usize = 64;

/// table [V, C], ids `[N]` → program(rows [N, C]).
pub(crate) fn gather(table: Layout, ids: Layout, program: Program) -> Kernel {
    let width = program.width();
    Kernel::new("gather")
        .items(program.rows * width, SIZE)
        .with("rows", program.rows)
        .with("used", program.cols.div_ceil(4))
        .with("width", width)
        .with("vocabulary", table.rows())
        .read("table", table, View::Vec4)
        .read("ids", ids, View::Scalar)
        .finish(program)
}

/// ids `[N]` → links u32 `[2N]`, see the template.
pub(crate) fn links(ids: Layout, links: Layout, padding: Option<u32>) -> Kernel {
    Kernel::new("gather_links")
        .items(ids.cols(), SIZE)
        .with("count", ids.cols())
        .with("padding", padding.map_or(-1, i64::from))
        .read("ids", ids, View::Scalar)
        .write("links", links, View::Scalar)
}

/// ids, links, dy [N, C] → adds the rows of each id into a zeroed table.
pub(crate) fn gather_grad([ids, links, dy]: [Layout; 3], table: Layout) -> Kernel {
    let used = table.cols().div_ceil(4);
    Kernel::new("gather_grad")
        .items(ids.cols() * used, SIZE)
        .with("count", ids.cols())
        .with("used", used)
        .with("vocabulary", table.rows())
        .read("ids", ids, View::Scalar)
        .read("links", links, View::Scalar)
        .read("dy", dy, View::Vec4)
        .write("table", table, View::Vec4)
        .flops(dy.len() as f64)
}
