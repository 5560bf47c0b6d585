//! Places of intermediate values in few buffers, whose bytes are used by one value after the other.

use std::cmp::Reverse;

use crate::gpu::OFFSET_ALIGNMENT;

/// A value that needs memory from its first to its last step.
#[derive(Clone, Debug)]
pub(crate) struct Item {
    pub bytes: u64,
    /// First and last step that touch it.
    pub first: usize,
    pub last: usize,
    /// Items of a lower number that lie in another buffer: a dispatch that reads one of the two writes the other, and no
    /// buffer may be bound for both.
    pub apart: Vec<usize>,
}

impl Item {
    fn overlaps(&self, other: &Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

/// Sizes of the buffers, and the buffer and offset of every item.
#[derive(Clone, Debug, Default)]
pub(crate) struct Packing {
    pub buffers: Vec<u64>,
    pub places: Vec<(usize, u64)>,
}

impl Packing {
    fn bytes(&self) -> u64 {
        self.buffers.iter().sum()
    }
}

/// Upper bound on the orders that are tried: by size, by birth, and others. Most plans of the encoders and decoders in `tests/plan.rs` come within
/// [`ENOUGH`] of their lower bound with one of the first six; recomputed segments take more.
const ORDERS: u64 = 64;
/// An order compares each item with most of those before it. For many items fewer orders are tried, so that there are at most about this
/// many comparisons.
const COMPARISONS: u64 = 1 << 24;
/// A packing that needs no more than the lower bound and this share of it is good enough.
const ENOUGH: f64 = 0.02;

/// The smallest of several packings, each greedy in another order of the items. The result is the same every time.
///
/// No buffer is larger than `largest`, unless a single item is. `bound` is what no packing can be below.
pub(crate) fn pack(items: &[Item], largest: u64, bound: u64) -> Packing {
    let mut apart: Vec<Vec<usize>> = vec![Vec::new(); items.len()];
    for (i, item) in items.iter().enumerate() {
        for &other in &item.apart {
            apart[i].push(other);
            apart[other].push(i);
        }
    }
    let enough = (bound as f64 * (1.0 + ENOUGH)) as u64;
    let mut best: Option<Packing> = None;
    let comparisons = (items.len() as u64).pow(2).max(1);
    for attempt in 0..ORDERS.min(COMPARISONS / comparisons).max(1) {
        let mut order: Vec<usize> = (0..items.len()).collect();
        match attempt {
            0 => order.sort_by_key(|&i| (Reverse(items[i].bytes), items[i].first)),
            1 => order.sort_by_key(|&i| (items[i].first, Reverse(items[i].bytes))),
            // By sizes that are wrong by up to a factor of 4.
            _ => order.sort_by_key(|&i| {
                let noise = mix(attempt, i as u64) % 768 + 256;
                (Reverse(u128::from(items[i].bytes) * u128::from(noise)), i)
            }),
        }
        let packing = greedy(items, &apart, &order, largest);
        if best
            .as_ref()
            .is_none_or(|best| packing.bytes() < best.bytes())
        {
            best = Some(packing);
        }
        if best.as_ref().is_some_and(|best| best.bytes() <= enough) {
            break;
        }
    }
    best.unwrap_or_default()
}

/// Number `i` of a stream: SplitMix64.
fn mix(stream: u64, i: u64) -> u64 {
    let x = (stream << 32 | i).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Puts each item where the buffers grow least, and among such places into the gap that fits best.
fn greedy(items: &[Item], apart: &[Vec<usize>], order: &[usize], largest: u64) -> Packing {
    let mut buffers: Vec<u64> = Vec::new();
    let mut contents: Vec<Vec<usize>> = Vec::new();
    let mut places: Vec<Option<(usize, u64)>> = vec![None; items.len()];
    let mut taken: Vec<(u64, u64)> = Vec::new();
    for &i in order {
        let item = &items[i];
        let bytes = item.bytes.next_multiple_of(OFFSET_ALIGNMENT);
        let mut forbidden = vec![false; buffers.len()];
        for (buffer, _) in apart[i].iter().filter_map(|&other| places[other]) {
            forbidden[buffer] = true;
        }
        // Growth, size of the gap, buffer, offset.
        let mut best = (bytes, u64::MAX, buffers.len(), 0);
        for (buffer, &size) in buffers.iter().enumerate() {
            if forbidden[buffer] {
                continue;
            }
            taken.clear();
            for &other in &contents[buffer] {
                if let (true, Some((_, at))) = (items[other].overlaps(item), places[other]) {
                    taken.push((
                        at,
                        at + items[other].bytes.next_multiple_of(OFFSET_ALIGNMENT),
                    ));
                }
            }
            taken.sort_unstable();
            let mut end = 0;
            for &(from, to) in &taken {
                if from >= end + bytes {
                    best = best.min((0, from - end, buffer, end));
                }
                end = end.max(to);
            }
            let growth = (end + bytes).saturating_sub(size);
            if growth == 0 || end + bytes <= largest {
                best = best.min((growth, size - end, buffer, end));
            }
        }
        let (_, _, buffer, at) = best;
        if buffer == buffers.len() {
            buffers.push(0);
            contents.push(Vec::new());
        }
        buffers[buffer] = buffers[buffer].max(at + bytes);
        contents[buffer].push(i);
        places[i] = Some((buffer, at));
    }
    Packing {
        buffers,
        places: places.into_iter().flatten().collect(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn items() -> impl Strategy<Value = Vec<Item>> {
        let item = (1_u64..3000, 0_usize..30, 0_usize..12, any::<u64>());
        proptest::collection::vec(item, 0..40).prop_map(|items| {
            let items = items.into_iter().enumerate();
            items
                .map(|(i, (bytes, first, steps, others))| Item {
                    bytes,
                    first,
                    last: first + steps,
                    apart: (0..i)
                        .filter(|other| others >> (other % 64) & 7 == 0)
                        .collect(),
                })
                .collect()
        })
    }

    fn bound(items: &[Item]) -> u64 {
        let at = |step| {
            let alive = items.iter().filter(|i| i.first <= step && step <= i.last);
            alive.map(|item| item.bytes).sum()
        };
        (0..50).map(at).max().unwrap_or(0)
    }

    proptest! {
        #[test]
        fn nothing_overlaps_and_nothing_is_mixed(items in items(), largest in 1_u64..5000) {
            let packing = pack(&items, largest, bound(&items));
            prop_assert_eq!(packing.places.len(), items.len());
            prop_assert!(packing.bytes() >= bound(&items));
            let mut needed = vec![0; packing.buffers.len()];
            for (i, (item, &(buffer, at))) in items.iter().zip(&packing.places).enumerate() {
                prop_assert!(at % OFFSET_ALIGNMENT == 0);
                prop_assert!(at + item.bytes <= packing.buffers[buffer]);
                let most = items.iter().map(|item| item.bytes).max().unwrap_or(0).max(largest);
                prop_assert!(packing.buffers[buffer] <= most.next_multiple_of(OFFSET_ALIGNMENT));
                needed[buffer] = needed[buffer].max(at + item.bytes.next_multiple_of(OFFSET_ALIGNMENT));
                for (j, other) in items[..i].iter().enumerate() {
                    let (other_buffer, other_at) = packing.places[j];
                    if other_buffer == buffer && item.overlaps(other) {
                        prop_assert!(at + item.bytes <= other_at || other_at + other.bytes <= at);
                    }
                    prop_assert!(other_buffer != buffer || !item.apart.contains(&j));
                }
            }
            prop_assert_eq!(needed, packing.buffers);
        }

        #[test]
        fn the_same_every_time(items in items()) {
            let [a, b] = [0; 2].map(|_| pack(&items, 1 << 20, bound(&items)));
            prop_assert_eq!((a.buffers, a.places), (b.buffers, b.places));
        }
    }
}
