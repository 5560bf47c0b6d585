//! Which static shapes texts of all lengths and numbers are computed in.

use crate::error::{Error, Result};

/// The static shapes of an encoder: lengths in tokens and batch sizes in texts, both rising.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Buckets {
    lengths: Vec<usize>,
    batches: Vec<usize>,
    /// Most tokens of a batch, unless it is of the smallest size.
    most_tokens: usize,
    /// A batch is at least one part in so many full, unless it is of the smallest size.
    sparse: usize,
}

impl Buckets {
    /// `lengths` are cut to those below `longest`, which is added.
    ///
    /// # Errors
    /// [`Error::Config`] without batch sizes, or for a size or length of 0.
    pub fn new(
        lengths: &[usize],
        longest: usize,
        batches: &[usize],
        most_tokens: usize,
        sparse: usize,
    ) -> Result<Self> {
        let fail = |field, reason: &str| {
            Err(Error::Config {
                field,
                reason: reason.into(),
            })
        };
        if lengths.contains(&0) {
            return fail("lengths", "must be at least 1 each");
        }
        if batches.is_empty() || batches.contains(&0) {
            return fail("batches", "must be one or more numbers of at least 1");
        }
        let mut lengths: Vec<usize> = lengths.iter().copied().filter(|&l| l < longest).collect();
        lengths.push(longest);
        let mut batches = batches.to_vec();
        for sorted in [&mut lengths, &mut batches] {
            sorted.sort_unstable();
            sorted.dedup();
        }
        Ok(Self {
            lengths,
            batches,
            most_tokens,
            sparse: sparse.max(1),
        })
    }

    /// Number of lengths.
    pub fn len(&self) -> usize {
        self.lengths.len()
    }

    /// Tokens per text of a bucket.
    pub fn length(&self, bucket: usize) -> usize {
        self.lengths[bucket]
    }

    /// The first bucket that holds so many tokens; the last one cuts.
    pub fn bucket(&self, tokens: usize) -> usize {
        let found = self.lengths.partition_point(|&length| length < tokens);
        found.min(self.lengths.len() - 1)
    }

    /// The batch sizes of a bucket, rising; at least one.
    pub fn batches(&self, bucket: usize) -> &[usize] {
        let length = self.lengths[bucket];
        let fitting = self.batches.partition_point(|&batch| {
            batch
                .checked_mul(length)
                .is_some_and(|tokens| tokens <= self.most_tokens)
        });
        &self.batches[..fitting.max(1)]
    }

    /// The largest batch size of a bucket.
    pub fn largest(&self, bucket: usize) -> usize {
        // There is at least one.
        self.batches(bucket).last().copied().unwrap_or(1)
    }

    /// The batch size to take next for `texts` > 0 texts that wait: the smallest that holds them all, if it is not too sparse, else the
    /// largest that they fill.
    pub fn next(&self, bucket: usize, texts: usize) -> usize {
        let sizes = self.batches(bucket);
        let filled = sizes.iter().rev().find(|&&size| size <= texts);
        let holds = sizes.iter().find(|&&size| size >= texts);
        match (holds, filled) {
            (Some(&holds), _) if holds <= texts.saturating_mul(self.sparse) => holds,
            (_, Some(&filled)) => filled,
            _ => sizes[0],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buckets() -> Buckets {
        Buckets::new(&[8, 16, 32, 64], 40, &[512, 1, 8, 64], 4096, 4).unwrap()
    }

    #[test]
    fn a_text_goes_to_the_shortest_bucket_that_holds_it() {
        let buckets = buckets();
        let lengths: Vec<usize> = [0, 1, 8, 9, 32, 33, 40, 1000]
            .map(|tokens| buckets.length(buckets.bucket(tokens)))
            .into();
        assert_eq!(lengths, [8, 8, 8, 16, 32, 40, 40, 40]);
        assert_eq!(buckets.len(), 4);
    }

    #[test]
    fn batches_are_neither_sparse_nor_many() {
        let buckets = buckets();
        let plan = |bucket, mut texts: usize| {
            let mut plan = Vec::new();
            while texts > 0 {
                let size = buckets.next(bucket, texts);
                plan.push(size);
                texts = texts.saturating_sub(size);
            }
            plan
        };
        assert_eq!(plan(0, 1), [1]);
        assert_eq!(plan(0, 2), [8]);
        assert_eq!(plan(0, 9), [8, 1]);
        assert_eq!(plan(0, 16), [64]);
        assert_eq!(plan(0, 100), [64, 64]);
        assert_eq!(plan(0, 128), [512]);
        assert_eq!(plan(0, 1025), [512, 512, 1]);
        // 512 texts of 16 tokens are more than 4096 tokens.
        assert_eq!(buckets.batches(1), [1, 8, 64]);
        assert_eq!(plan(1, 130), [64, 64, 8]);
    }

    #[test]
    fn the_smallest_batch_is_always_possible() {
        let buckets = Buckets::new(&[], 100, &[4], 10, 1).unwrap();
        assert_eq!(buckets.batches(0), [4]);
        assert_eq!(buckets.next(0, 1), 4);
        assert!(Buckets::new(&[0], 100, &[4], 10, 1).is_err());
        assert!(Buckets::new(&[], 100, &[], 10, 1).is_err());
        assert!(Buckets::new(&[], 100, &[0], 10, 1).is_err());
    }
}
