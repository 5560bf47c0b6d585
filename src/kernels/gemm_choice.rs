//! The choice of a tile and of the number of parts of K, by a model of the time of a product that is fitted to measurements.

/// What the model knows of a workgroup's tile.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Speed {
    pub rows: usize,
    pub cols: usize,
    /// Depth of a step.
    pub depth: usize,
    /// Speed of one workgroup alone on a core, relative to the best tile.
    pub alone: f64,
    /// Speed of a core that runs as many of them as it can.
    pub busy: f64,
    /// Number of workgroups that a core runs at a time.
    pub resident: usize,
}

/// Extents of the products.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extents {
    pub batch: usize,
    pub m: usize,
    pub n: usize,
    pub k: usize,
}

/// Bounds on the number of parts of K.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parts {
    /// With fewer, a part would be too long.
    pub least: usize,
    /// With more, the parts would not fit a binding. This bound takes precedence.
    pub most: usize,
}

/// The device that runs the products.
#[derive(Clone, Copy, Debug)]
pub(super) struct Machine {
    pub cores: usize,
    /// Multiply-adds per core and microsecond with the best tile.
    pub rate: f64,
}

const MAX_SPLITS: usize = 16;
/// Smallest number of steps of a part of K.
const MIN_STEPS: usize = 8;
/// Time that a workgroup spends before and after its steps, expressed as depth of K.
const OVERHEAD: f64 = 64.0;
/// Microseconds that a second dispatch takes to start, and microseconds that all cores take to read and add a million elements of parts.
const SECOND_PASS: f64 = 4.0;
const ADD: f64 = 1.6;

/// Estimated time of a product in microseconds.
fn time(tile: Speed, splits: usize, x: Extents, machine: Machine) -> f64 {
    let groups = x.batch * x.m.div_ceil(tile.rows) * x.n.div_ceil(tile.cols) * splits;
    let depth = x.k.div_ceil(splits).next_multiple_of(tile.depth) as f64 + OVERHEAD;
    let work = (tile.rows * tile.cols) as f64 * depth / machine.rate;
    let each = groups.div_ceil(machine.cores);
    // Behind full rounds, cores do not get equally many: the last of them has one more.
    let (full, rest) = match (each / tile.resident, each % tile.resident) {
        (0, rest) => (0, rest),
        (full, 0) => (full, 0),
        (full, rest) => (full, rest + 1),
    };
    let last = match rest {
        0 => 0.0,
        _ => rest as f64 / tile.busy.min(rest as f64 * tile.alone),
    };
    let rounds = (full * tile.resident) as f64 / tile.busy + last;
    let second_pass = match splits {
        1 => 0.0,
        _ => SECOND_PASS + ADD * (splits * x.m * x.n) as f64 * 1e-6,
    };
    work * rounds + second_pass
}

impl Parts {
    /// The nearest number of parts, each of which has a step.
    pub fn nearest(self, wanted: usize, steps: usize) -> usize {
        let parts = wanted.max(self.least).min(self.most).clamp(1, steps.max(1));
        steps.div_ceil(steps.div_ceil(parts).max(1)).max(1)
    }
}

/// Pairs of a tile and a number of parts of K, the one expected to be the fastest first. Large tiles reuse more of what they load. Small
/// tiles and parts of K keep more cores busy.
pub(super) fn rank<T: Copy>(
    tiles: impl Iterator<Item = T>,
    speed: impl Fn(T) -> Speed,
    x: Extents,
    parts: Parts,
    machine: Machine,
) -> Vec<(T, usize)> {
    let mut ranked: Vec<(f64, T, usize)> = Vec::new();
    for tile in tiles {
        let speed = speed(tile);
        let steps = x.k.div_ceil(speed.depth);
        let fewest = parts.nearest(1, steps);
        // A batch keeps the machine busy without parts.
        let worth = |splits: &usize| {
            // Every part has a step.
            let last = (splits - 1) * steps.div_ceil(*splits);
            x.batch == 1 && steps >= splits * MIN_STEPS && last < steps
        };
        let split = (fewest + 1..=MAX_SPLITS.min(parts.most))
            .filter(worth)
            .map(|splits| (time(speed, splits, x, machine), tile, splits))
            .min_by(|(a, ..), (b, ..)| a.total_cmp(b));
        ranked.push((time(speed, fewest, x, machine), tile, fewest));
        ranked.extend(split);
    }
    ranked.sort_by(|(a, ..), (b, ..)| a.total_cmp(b));
    let pairs = ranked.into_iter().map(|(_, tile, splits)| (tile, splits));
    pairs.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LARGE: Speed = Speed {
        rows: 128,
        cols: 128,
        depth: 16,
        alone: 1.0,
        busy: 1.0,
        resident: 2,
    };
    const SMALL: Speed = Speed {
        rows: 32,
        cols: 32,
        depth: 16,
        alone: 0.1,
        busy: 0.5,
        resident: 16,
    };
    const FREE: Parts = Parts {
        least: 1,
        most: usize::MAX,
    };
    const MACHINE: Machine = Machine {
        cores: 132,
        rate: 1.6e5,
    };

    fn best(m: usize, n: usize, k: usize) -> (Speed, usize) {
        let x = Extents { batch: 1, m, n, k };
        rank([LARGE, SMALL].into_iter(), |tile| tile, x, FREE, MACHINE)[0]
    }

    #[test]
    fn large_products_take_large_tiles_in_one_pass() {
        assert_eq!(best(4096, 4096, 4096), (LARGE, 1));
    }

    #[test]
    fn small_products_take_small_tiles_or_parts() {
        let (tile, splits) = best(256, 256, 256);
        assert!(tile == SMALL || splits > 1);
        assert_eq!(best(33, 65, 13), (SMALL, 1));
    }

    #[test]
    fn a_long_k_is_split() {
        assert!(best(256, 256, 65_536).1 > 1);
    }

    #[test]
    fn a_last_round_with_few_workgroups_is_filled_with_parts() {
        // 11 workgroups for every core, two at a time.
        assert_eq!(best(30_522, 768, 4096), (LARGE, 2));
    }

    #[test]
    fn batches_are_not_split() {
        let x = Extents {
            batch: 2,
            m: 64,
            n: 64,
            k: 65_536,
        };
        let ranked = rank([LARGE, SMALL].into_iter(), |tile| tile, x, FREE, MACHINE);
        assert!(ranked.iter().all(|(_, splits)| *splits == 1));
    }

    #[test]
    fn bounds_on_parts_are_kept() {
        let parts = |batch, k, least, most| -> Vec<usize> {
            let (m, n) = (64, 64);
            let x = Extents { batch, m, n, k };
            let parts = Parts { least, most };
            let ranked = rank([LARGE, SMALL].into_iter(), |tile| tile, x, parts, MACHINE);
            ranked.into_iter().map(|(_, splits)| splits).collect()
        };
        assert!(parts(1, 65_536, 1, 3).iter().all(|&splits| splits <= 3));
        assert!(parts(1, 65_536, 1, 1).iter().all(|&splits| splits == 1));
        assert!(
            parts(1, 1 << 20, 64, 1000)
                .iter()
                .all(|&splits| splits >= 64)
        );
        assert!(
            parts(3, 1 << 20, 64, 1000)
                .iter()
                .all(|&splits| splits == 64)
        );
        assert!(parts(1, 1 << 20, 64, 9).iter().all(|&splits| splits <= 9));
    }
}
