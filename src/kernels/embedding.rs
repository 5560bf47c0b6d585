//! Rows of a table by id, and the deterministic gradient of the table.

use super::{BLOCK, Kernel, Program, Target, View};
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

/// ids `[N]` → links u32 `[2N]`; the template describes them.
pub(crate) fn links(ids: Layout, links: Layout, padding: Option<u32>) -> Kernel {
    Kernel::new("gather_links")
        .items(ids.cols(), SIZE)
        .with("count", ids.cols())
        .with("padding", padding.map_or(-1, i64::from))
        .read("ids", ids, View::Scalar)
        .write("links", links, View::Scalar)
}

/// How the gradient of a table of so many rows finds the places of every id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Search {
    /// Every id is compared with every other, without barriers. One invocation adds up the rows of an id.
    Compare,
    /// [`sort`] sorts runs of this many places, and [`links_sorted`] searches the runs. One invocation adds up the rows of an id.
    Runs(usize),
    /// [`sort`] sorts runs of this many places, and [`merge`] joins the runs. Several invocations share the rows of an id, however many there
    /// are.
    Sort(usize),
}

/// The search for `count` ids.
pub(crate) fn search(vocabulary: usize, count: usize, target: Target) -> Search {
    /// Length of a run that takes 4 KiB of workgroup memory.
    const LONGEST: usize = 1024;
    /// Largest number of places that are compared with each other. One invocation may have to add up all of them.
    const COMPARED: usize = 4096;
    const ALONE: usize = 32_768;
    // A key holds an id and a place, and the largest of all is left for places that do not exist.
    let largest = (1_u64 << 32) / (vocabulary as u64 + 1);
    let run = LONGEST.min((largest as usize + 1).next_power_of_two() / 2);
    match target.barrier_free {
        // A table of so many rows is larger than any buffer.
        _ if run < 2 => Search::Compare,
        true if count <= COMPARED => Search::Compare,
        false if count <= ALONE => Search::Runs(run),
        _ => Search::Sort(run),
    }
}

/// ids `[N]` → keys of sorted runs; the template describes them.
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

/// ids `[N]`, places in sorted runs of length `run` → places in sorted runs of twice the length. With `keys` the places are still keys, as
/// [`sort`] leaves them.
pub(crate) fn merge(ids: Layout, [sorted, merged]: [Layout; 2], run: usize, keys: bool) -> Kernel {
    Kernel::new("gather_merge")
        .items(sorted.cols(), SIZE)
        .with("count", ids.cols())
        .with("total", sorted.cols())
        .with("run", run)
        .with("keys", keys)
        .read("ids", ids, View::Scalar)
        .read("sorted", sorted, View::Scalar)
        .write("merged", merged, View::Scalar)
}

/// The rows that [`segments`] adds up.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Rows {
    /// ids `[N]`, places in the order of their ids, dy [N, C].
    Places([Layout; 3]),
    /// The incomplete sums of an earlier pass: ids `[n]` and sums [n, C].
    Parts([Layout; 2]),
}

/// Number of rows in a block of [`segments`].
const SEGMENT: usize = 2 * BLOCK;

/// Number of blocks into which [`segments`] cuts this many rows. Each block leaves two rows for the next pass, unless there is only one block.
pub(crate) fn blocks(rows: usize) -> usize {
    rows.div_ceil(SEGMENT)
}

/// Adds the rows of each id into a zeroed table. Equal ids of the `count` rows lie side by side. Sums that are not complete within a block
/// go to `left`.
pub(crate) fn segments(
    rows: Rows,
    count: usize,
    table: Layout,
    left: Option<[Layout; 2]>,
    padding: Option<u32>,
) -> Kernel {
    let used = table.cols().div_ceil(4);
    let blocks = blocks(count);
    let kernel = Kernel::new("gather_segments")
        .items(blocks * used, SIZE)
        .with("count", count)
        .with("blocks", blocks)
        .with("each", SEGMENT)
        .with("used", used)
        .with("vocabulary", table.rows())
        .with("padding", padding.map_or(-1, i64::from))
        .flops((count * table.cols()) as f64);
    let kernel = match rows {
        Rows::Places([ids, places, dy]) => kernel
            .with("from_parts", false)
            .read("ids", ids, View::Scalar)
            .read("places", places, View::Scalar)
            .read("dy", dy, View::Vec4),
        Rows::Parts([keys, parts]) => kernel
            .with("from_parts", true)
            .read("keys", keys, View::Scalar)
            .read("parts", parts, View::Vec4),
    };
    let kernel = kernel.write("table", table, View::Vec4);
    match left {
        Some([keys, parts]) => {
            kernel
                .write("next_keys", keys, View::Scalar)
                .write("next_parts", parts, View::Vec4)
        }
        None => kernel,
    }
}

/// ids, links, dy [N, C] → the sum of the rows of each id, in a zeroed table.
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
    use super::{Search, Target, search};

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
            let Search::Runs(run) = search(vocabulary, 4096, target) else {
                panic!("{vocabulary} rows are not sorted");
            };
            assert_eq!(search(vocabulary, 70_000, target), Search::Sort(run));
            assert!(run.is_power_of_two() && run <= 1024, "{run}");
            let last = vocabulary * run - 1;
            assert!(last < u32::MAX as usize, "{vocabulary} {run}");
        }
        let run = |vocabulary| search(vocabulary, 1, target);
        assert_eq!(run((1 << 22) - 1), Search::Runs(1024));
        assert_eq!(run(1 << 22), Search::Runs(512));
        assert_eq!(run(usize::MAX >> 8), Search::Compare);
    }
}
