//! Where the samples of a file start, in bounded memory.

/// Rising offsets, of which every `stride`-th is kept. The stride doubles when there are too many; whoever asks walks the rest.
#[derive(Debug)]
pub(super) struct Offsets {
    kept: Vec<u64>,
    stride: usize,
    most: usize,
    len: usize,
    /// Where the last sample ends.
    end: u64,
}

impl Offsets {
    /// Offsets that are kept: 32 MiB of them.
    pub const MOST: usize = 1 << 22;

    /// For about `samples` samples, of which at most `most` offsets are kept, at least two.
    pub fn new(samples: usize, most: usize) -> Self {
        Self {
            kept: Vec::with_capacity(samples.min(most)),
            stride: 1,
            most: most.max(2),
            len: 0,
            end: 0,
        }
    }

    /// Adds a sample by its start and its end, which is the start of the next.
    pub fn push(&mut self, start: u64, end: u64) {
        if self.len.is_multiple_of(self.stride) {
            if self.kept.len() == self.most {
                let mut index = 0;
                self.kept.retain(|_| {
                    index += 1;
                    index % 2 == 1
                });
                self.stride *= 2;
            }
            // With an odd limit, the sample may be none of those that are kept from now on.
            if self.len.is_multiple_of(self.stride) {
                self.kept.push(start);
            }
        }
        self.len += 1;
        self.end = end;
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.len
    }

    /// The last sample up to `index` whose start is known, and that start. `index` exists.
    pub fn before(&self, index: usize) -> (usize, u64) {
        let group = index / self.stride;
        (group * self.stride, self.kept[group])
    }

    /// The first known end of a sample from `index` on: its own if every start is kept.
    pub fn after(&self, index: usize) -> u64 {
        let next = self.kept.get(index / self.stride + 1);
        next.copied().unwrap_or(self.end)
    }

    /// Whether the start of every sample is known.
    pub fn is_whole(&self) -> bool {
        self.stride == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_offsets_stand_for_many() {
        for most in 2..9 {
            let mut offsets = Offsets::new(10, most);
            for sample in 0..100_u64 {
                offsets.push(10 * sample, 10 * sample + 10);
                assert!(offsets.kept.len() <= most);
                assert_eq!(offsets.len() as u64, sample + 1);
                for index in 0..=sample {
                    let (before, start) = offsets.before(index as usize);
                    assert_eq!(start, 10 * before as u64);
                    assert!(start <= 10 * index && before + offsets.stride > index as usize);
                    let after = offsets.after(index as usize);
                    assert!(after > 10 * index && after <= 10 * (sample + 1));
                    assert!(!offsets.is_whole() || after == 10 * index + 10);
                }
            }
            assert!(!offsets.is_whole());
        }
    }
}
