//! Rows of a table by id, and the deterministic gradient of the table.

use super::{Kernel, Program, Target, View};
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

/// How many places [`sort`] sorts at a time; `None` where comparing every id with every other is better: without barriers.
pub(crate) fn run_length(vocabulary: usize, target: Target) -> Option<usize> {
    /// 4 KiB of workgroup memory.
    const LONGEST: usize = 1024;
    // A key holds an id and a place, and the largest of all is left for places that do not exist.
    let largest = (1_u64 << 32) / (vocabulary as u64 + 1);
    let run = LONGEST.min((largest as usize + 1).next_power_of_two() / 2);
    (!target.barrier_free && run > 1).then_some(run)
}

/// ids `[N]` → keys of sorted runs, see the template.
pub(crate) fn sort(ids: Layout, sorted: Layout, run: usize) -> Kernel {
    let size = (run / 2).min(256);
    Kernel::new("gather_sort")
        .items(sorted.cols() / run * size, size)
        .with("count", ids.cols())
        .with("runs", sorted.cols() / run)
        .with("run", run)
        .read("ids", ids, View::Scalar)
        .write("sorted", sorted, View::Scalar)
}

/// Sorted runs of N places → links u32 `[2N]`.
pub(crate) fn links_sorted(
    sorted: Layout,
    links: Layout,
    run: usize,
    padding: Option<u32>,
) -> Kernel {
    Kernel::new("gather_links_sorted")
        .items(sorted.cols(), SIZE)
        .with("count", links.cols() / 2)
        .with("runs", sorted.cols() / run)
        .with("run", run)
        .with("padding", padding.map_or(-1, i64::from))
        .read("sorted", sorted, View::Scalar)
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

#[cfg(test)]
mod tests {
    use super::{Target, run_length};

    #[test]
    fn keys_of_every_vocabulary_fit_and_leave_one() {
        let target = Target {
            f16: true,
            barrier_free: false,
            matrix_units: None,
            invocations: 256,
            cores: 1,
        };
        for vocabulary in [1, 30_522, (1 << 22) - 1, 1 << 22, 1 << 26, 1 << 30] {
            let run = run_length(vocabulary, target).unwrap();
            assert!(run.is_power_of_two() && run <= 1024, "{run}");
            let last = vocabulary * run - 1;
            assert!(last < u32::MAX as usize, "{vocabulary} {run}");
        }
        assert_eq!(run_length((1 << 22) - 1, target), Some(1024));
        assert_eq!(run_length(1 << 22, target), Some(512));
        assert_eq!(run_length(usize::MAX >> 8, target), None);
    }
}
