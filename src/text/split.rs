//! Which texts are for training and which for validation.

use unicode_normalization::UnicodeNormalization;

use crate::error::{Error, Result};
use crate::fnv::fnv1a;

/// How many samples [`Split`] takes for validation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ValidationSize {
    /// About this share, in (0, 1). A text stays on its side whatever other texts come or go.
    Share(f64),
    /// At least so many, as few more as groups of equal texts allow.
    Count(usize),
}

/// Numbers of the samples for training and for validation, both in rising order.
///
/// The hash of a text decides, after [`normalized`]: texts that differ in nothing but case, white space or Unicode form are on the same side. So
/// the validation sees no text of the training, and the split of a file is the same on every machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Split {
    /// Samples to train on.
    pub training: Vec<usize>,
    /// Samples to validate on.
    pub validation: Vec<usize>,
    /// Number of different texts on both sides together.
    pub distinct: usize,
}

/// A text as it is compared with others: in Unicode form NFKC, in lower case, with single spaces for white space and none at the ends.
#[must_use]
pub fn normalized(text: &str) -> String {
    let lower: String = text.nfkc().flat_map(char::to_lowercase).collect();
    let mut normalized = String::with_capacity(lower.len());
    for word in lower.split_whitespace() {
        if !normalized.is_empty() {
            normalized.push(' ');
        }
        normalized.push_str(word);
    }
    normalized
}

/// The hash of a text by which it is split, uniform in 0..2⁶⁴: FNV-1a of the [`normalized`] text, mixed as by SplitMix64. It is the same on every
/// machine and in every version.
#[must_use]
pub fn split_key(text: &str) -> u64 {
    let mut x = fnv1a(normalized(text).as_bytes());
    // FNV leaves the upper bits of short texts alike.
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl Split {
    /// Splits samples by the [`split_key`]s of their texts. Those without a key are on neither side. Both sides have at least one sample,
    /// whatever the size.
    ///
    /// # Errors
    /// [`Error::Config`] for a share outside (0, 1) or a count of zero; [`Error::Data`] if there are less than two different keys.
    pub fn new(keys: impl IntoIterator<Item = Option<u64>>, size: ValidationSize) -> Result<Self> {
        let fail = |reason: String| {
            Err(Error::Config {
                field: "validation",
                reason,
            })
        };
        match size {
            ValidationSize::Share(share) if !(share > 0.0 && share < 1.0) => {
                return fail(format!("is a share of {share}, but must be in (0, 1)"));
            }
            ValidationSize::Count(0) => return fail("is 0 samples, but needs one".into()),
            _ => {}
        }
        let keys = keys.into_iter().enumerate();
        let mut order: Vec<(u64, usize)> = keys
            .filter_map(|(number, key)| Some((key?, number)))
            .collect();
        order.sort_unstable();
        let samples = order.len();
        // Where the groups of equal keys end.
        let mut ends: Vec<usize> = order.chunk_by(|a, b| a.0 == b.0).map(<[_]>::len).collect();
        let mut end = 0;
        for of_group in &mut ends {
            end += *of_group;
            *of_group = end;
        }
        if ends.len() < 2 {
            return Err(Error::Data {
                name: "texts".into(),
                reason: format!(
                    "{} different texts are too few: one is needed for training and another one for validation",
                    ends.len()
                ),
            });
        }
        let wanted = match size {
            ValidationSize::Count(count) => count.min(samples),
            // As f64 keys are rounded to multiples of 2^11, which is exact enough.
            ValidationSize::Share(share) => {
                order.partition_point(|(key, _)| (*key as f64) < share * 2.0_f64.powi(64))
            }
        };
        let groups = ends.partition_point(|&end| end < wanted);
        let end = ends[groups.min(ends.len() - 2)];
        let side = |part: &[(u64, usize)]| {
            let mut numbers: Vec<usize> = part.iter().map(|(_, number)| *number).collect();
            numbers.sort_unstable();
            numbers
        };
        Ok(Self {
            validation: side(&order[..end]),
            training: side(&order[end..]),
            distinct: ends.len(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_compared_without_case_white_space_and_form() {
        assert_eq!(normalized("  A\tlarge\u{3000}Animal \r"), "a large animal");
        assert_eq!(
            normalized("\u{fb01}n E\u{301}te\u{301}"),
            "fin \u{e9}t\u{e9}"
        );
        assert_eq!(normalized(" \u{a0}"), "");
        assert_eq!(split_key("Straße  1"), split_key("straße 1"));
        assert_ne!(split_key("a b"), split_key("ab"));
        // Files on disk depend on it.
        assert_eq!(split_key("a large animal"), 3_165_407_897_029_593_362);
    }

    #[test]
    fn equal_texts_are_on_one_side_and_both_sides_have_one() {
        let texts: Vec<String> = (0..400).map(|i| format!("text {}", i % 97)).collect();
        let keys: Vec<Option<u64>> = texts
            .iter()
            .enumerate()
            .map(|(i, text)| (i % 10 != 3).then(|| split_key(text)))
            .collect();
        let sizes = [
            ValidationSize::Share(0.25),
            ValidationSize::Share(1e-9),
            ValidationSize::Share(1.0 - 1e-9),
            ValidationSize::Count(1),
            ValidationSize::Count(40),
            ValidationSize::Count(10_000),
        ];
        for size in sizes {
            let split = Split::new(keys.iter().copied(), size).unwrap();
            let both = [split.training.clone(), split.validation.clone()].concat();
            let mut all = both.clone();
            all.sort_unstable();
            let expected: Vec<usize> = (0..400).filter(|i| i % 10 != 3).collect();
            assert_eq!(all, expected, "{size:?}");
            let of = |side: &[usize]| -> std::collections::BTreeSet<&str> {
                side.iter().map(|&i| texts[i].as_str()).collect()
            };
            let (training, validation) = (of(&split.training), of(&split.validation));
            assert!(training.is_disjoint(&validation), "{size:?}");
            assert_eq!(training.len() + validation.len(), split.distinct);
            let n = split.validation.len();
            let sound = match size {
                ValidationSize::Share(0.25) => (50..130).contains(&n),
                ValidationSize::Share(share) if share < 0.5 => validation.len() == 1,
                ValidationSize::Count(1) => validation.len() == 1,
                ValidationSize::Count(40) => (40..46).contains(&n),
                _ => training.len() == 1,
            };
            assert!(sound, "{size:?}: {n}");
        }
    }

    #[test]
    fn a_text_stays_on_its_side_when_others_come() {
        let keys = |n: usize| (0..n).map(|i| Some(split_key(&format!("text {i}"))));
        let size = ValidationSize::Share(0.1);
        let small = Split::new(keys(200), size).unwrap();
        let large = Split::new(keys(1000), size).unwrap();
        assert!(
            small
                .validation
                .iter()
                .all(|i| large.validation.contains(i))
        );
        assert!(small.training.iter().all(|i| large.training.contains(i)));
    }

    #[test]
    fn too_few_texts_and_sizes_out_of_range_are_refused() {
        let one = [Some(1), None, Some(1)];
        let error = Split::new(one, ValidationSize::Count(1)).unwrap_err();
        assert!(error.to_string().contains("1 different texts"), "{error}");
        assert!(Split::new([], ValidationSize::Share(0.5)).is_err());
        let two = [Some(1), Some(2)];
        for share in [0.0, 1.0, -0.5, f64::NAN] {
            let error = Split::new(two, ValidationSize::Share(share)).unwrap_err();
            assert!(matches!(error, Error::Config { .. }), "{error}");
        }
        assert!(Split::new(two, ValidationSize::Count(0)).is_err());
    }
}
