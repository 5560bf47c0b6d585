//! Chains of equal ids from sorted runs of every length, short ones among them: those of tables with a huge number of rows.

use super::super::{Bound, Memory, run};
use crate::error::Result;
use crate::gpu::{Alignment, Layout};
use crate::kernels::{Kernel, Target, embedding};
use crate::types::DType;

fn vector(n: usize) -> Result<Layout> {
    Layout::new(1, n, DType::U32, Alignment::Bytes16)
}

#[test]
fn sorted_runs_of_any_length_chain_as_comparing_all_does() -> Result<()> {
    let target = Target {
        f16: true,
        barrier_free: false,
        matrix_units: None,
        invocations: 256,
        cores: 1,
    };
    for n in [1, 5, 67] {
        let ids: Vec<u32> = (0..n as u32).map(|i| i * i % 7).collect();
        let layouts = [vector(n)?, vector(2 * n)?];
        for length in [2, 4, 64, 1024] {
            let sorted = vector(n.next_multiple_of(length))?;
            let mut memories = vec![Memory::of(layouts[0].pack(&ids)?)];
            let others = [sorted, layouts[1], layouts[1]];
            memories.extend(others.map(|layout| Memory::poisoned(layout.size_bytes())));
            let steps: [(Kernel, [usize; 2]); 3] = [
                (embedding::sort(layouts[0], sorted, length), [0, 1]),
                (
                    embedding::links_sorted(sorted, layouts[1], length, None),
                    [1, 2],
                ),
                (embedding::links(layouts[0], layouts[1], None), [0, 3]),
            ];
            for (dispatch, (kernel, places)) in (1..).zip(&steps) {
                let bound = places.map(|memory| Bound {
                    memory,
                    offset: 0,
                    len: memories[memory].len(),
                });
                let faults = run(kernel, target, &bound, &mut memories, dispatch, None);
                assert!(faults.is_empty(), "{n} by {length}: {}", faults[0]);
            }
            let links = |i: usize| layouts[1].unpack::<u32>(memories[i].bytes());
            assert_eq!(links(2)?, links(3)?, "{n} by {length}");
        }
    }
    Ok(())
}
