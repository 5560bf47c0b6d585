//! Text token by token: the kernels of a step, at awkward shapes, for every tier, compared with their definitions.

use super::super::{Bound, Memory, run};
use super::graphs::targets;
use crate::error::Result;
use crate::gpu::{Alignment, Layout};
use crate::kernels::decode::{OPTION_WORDS, STATE_WORDS, Sample, SampleReads, Taps};
use crate::kernels::{Kernel, Target};
use crate::reference::{Sampling, Stream};
use crate::translate::everywhere;
use crate::types::DType;

const STEPS: usize = 3;

fn matrix(rows: usize, cols: usize, dtype: DType) -> Result<Layout> {
    Layout::new(rows, cols, dtype, Alignment::Bytes64)
}

fn vector(n: usize, dtype: DType) -> Result<Layout> {
    Layout::new(1, n, dtype, Alignment::Bytes16)
}

fn noise(n: usize, seed: usize) -> Vec<f32> {
    let number = |i: usize| ((i * 37 + i * i * 11 + seed * 29) % 97) as f32 / 16.0 - 3.0;
    (0..n).map(number).collect()
}

/// Rounded as a value of this type is.
fn stored(x: f64, dtype: DType) -> f64 {
    match dtype {
        DType::F16 => half::f16::from_f64(x).to_f64(),
        _ => x,
    }
}

fn execute(kernel: &Kernel, target: Target, memories: &mut [Memory], dispatch: u32, what: &str) {
    let bindings = kernel.bindings();
    let bound = bindings.iter().enumerate().map(|(memory, binding)| Bound {
        memory,
        offset: 0,
        len: binding.layout.size_bytes(),
    });
    let bound: Vec<Bound> = bound.collect();
    let faults = run(kernel, target, &bound, memories, dispatch, None);
    assert!(faults.is_empty(), "{what}: {}", faults[0]);
    if dispatch == 1 {
        translate(kernel, target);
    }
}

/// To the languages of all platforms: these kernels are in no graph that other tests translate.
fn translate(kernel: &Kernel, target: Target) {
    let key = kernel.key(target);
    let wgsl = kernel.source(target).unwrap().wgsl;
    everywhere(&wgsl, true).unwrap_or_else(|error| panic!("{key}: {error}"));
}

/// Several steps, more than the ring holds, of `rows` texts of width `width`.
fn taps(rows: usize, width: usize, taps: Taps, dtype: DType, target: Target, what: &str) {
    let each = width.next_multiple_of(4);
    let words = Sample {
        sampled: false,
        steps: STEPS,
    }
    .state_words();
    let x = matrix(rows, width, dtype).unwrap();
    let norm = vector(width, DType::F32).unwrap();
    let state = matrix(rows, words, DType::U32).unwrap();
    let ring = matrix(rows * taps.ring(), width, dtype).unwrap();
    let columns = matrix(rows, taps.taps * each, dtype).unwrap();
    let kernel = taps.kernel([x, norm, norm, state], [ring, columns], target);
    let (gamma, beta) = (noise(width, 1), noise(width, 2));
    let mut memories = vec![
        Memory::poisoned(x.size_bytes()),
        Memory::of(norm.pack(&gamma).unwrap()),
        Memory::of(norm.pack(&beta).unwrap()),
        Memory::poisoned(state.size_bytes()),
        Memory::poisoned(ring.size_bytes()),
        Memory::poisoned(columns.size_bytes()),
    ];
    let mut past: Vec<Vec<Vec<f64>>> = vec![Vec::new(); rows];
    for step in 0..taps.ring() + 3 {
        let given: Vec<f32> = noise(rows * width, 7 + step)
            .iter()
            .map(|&value| stored(f64::from(value), dtype) as f32)
            .collect();
        memories[0] = Memory::of(x.pack(&given).unwrap());
        let mut numbers = vec![7; rows * words];
        numbers
            .chunks_exact_mut(words)
            .for_each(|row| row[1] = step as u32);
        memories[3] = Memory::of(state.pack(&numbers).unwrap());
        memories[5] = Memory::poisoned(columns.size_bytes());
        execute(&kernel, target, &mut memories, 1 + step as u32, what);
        for (row, past) in given.chunks_exact(width).zip(&mut past) {
            let row: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
            let mean = row.iter().sum::<f64>() / width as f64;
            let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
            let rstd = 1.0 / (variance + f64::from(taps.eps)).sqrt();
            let normalised = row.iter().zip(gamma.iter().zip(&beta));
            past.push(
                normalised
                    .map(|(x, (&g, &b))| (x - mean) * rstd * f64::from(g) + f64::from(b))
                    .collect(),
            );
        }
        let got: Vec<f32> = columns.unpack(memories[5].bytes()).unwrap();
        for (row, got) in got.chunks_exact(taps.taps * each).enumerate() {
            for (tap, got) in got.chunks_exact(each).enumerate() {
                let back = (taps.taps - 1 - tap) * taps.dilation;
                for (col, &got) in got.iter().enumerate() {
                    let there = col < width && back <= step;
                    let wanted = match there {
                        true => past[row][step - back][col],
                        false => 0.0,
                    };
                    let tolerance = match (there, dtype) {
                        (false, _) => 0.0,
                        (true, DType::F16) => 2e-3 * (1.0 + wanted.abs()),
                        (true, _) => 1e-5 * (1.0 + wanted.abs()),
                    };
                    assert!(
                        (f64::from(got) - wanted).abs() <= tolerance,
                        "{what}: step {step}, row {row}, tap {tap}, column {col}: {got}, not {wanted}"
                    );
                }
            }
        }
        let bytes = memories[5].bytes().chunks_exact(columns.row_bytes());
        let used = columns.cols() * dtype.size();
        assert!(
            bytes
                .into_iter()
                .all(|row| row[used..].iter().all(|&byte| byte == 0)),
            "{what}: padding"
        );
    }
}

#[test]
fn steps_of_a_convolution() {
    let cases = [
        (1, 17, 3, 2),
        (3, 8, 1, 1),
        (5, 5, 5, 1),
        // Wider than an invocation holds.
        (2, 300, 2, 3),
    ];
    for (name, target) in targets() {
        for dtype in [DType::F32, DType::F16] {
            for (rows, width, k, dilation) in cases {
                let convolution = Taps {
                    taps: k,
                    dilation,
                    eps: 1e-5,
                };
                let what = format!("{rows}x{width}, {k} taps {dilation} apart, {dtype}, {name}");
                taps(rows, width, convolution, dtype, target, &what);
            }
        }
    }
}

/// A step of sampling in memory of exactly the sizes that it needs.
struct Step {
    sampling: Sampling,
    rows: usize,
    vocabulary: usize,
    width: usize,
    dtype: DType,
    target: Target,
    seed: u64,
    position: u32,
    /// Token before this step, also the one that was seen beside 2 and 3.
    stop: u32,
}

/// What a row has after a step.
struct After {
    token: u32,
    doing: u32,
    log_prob: f32,
    position: u32,
    x: Vec<f32>,
}

impl Step {
    fn run(&self, logits: &[f32], doing: &[u32], what: &str) -> Vec<After> {
        let Self {
            rows,
            vocabulary,
            width,
            dtype,
            target,
            ..
        } = *self;
        let sample = Sample {
            sampled: self.sampling.temperature > 0.0,
            steps: STEPS,
        };
        let (words, masks) = (sample.state_words(), vocabulary.div_ceil(32));
        let layouts = SampleReads {
            logits: matrix(rows, vocabulary, DType::F32).unwrap(),
            options: vector(OPTION_WORDS + masks, DType::U32).unwrap(),
            table: matrix(vocabulary, width, dtype).unwrap(),
            condition: matrix(rows, width, dtype).unwrap(),
            parts: None,
        };
        let parts = sample.parts(rows, vocabulary, target);
        let parts = parts.map(|parts| matrix(rows, 4 * parts, DType::U32).unwrap());
        let layouts = SampleReads { parts, ..layouts };
        let state = matrix(rows, words, DType::U32).unwrap();
        let seen = matrix(rows, masks, DType::U32).unwrap();
        let x = matrix(rows, width, dtype).unwrap();
        let kernel = sample.kernel(layouts, [state, seen, x], target);
        let mut options = vec![0; OPTION_WORDS + masks];
        options[0] = (1.0 / self.sampling.temperature as f32)
            .min(f32::MAX)
            .to_bits();
        options[1] = (self.sampling.repetition_penalty as f32).to_bits();
        options[2] = self.sampling.top_k.min(vocabulary) as u32;
        options[3] = (self.sampling.top_p * 2f64.powi(31)) as u32;
        options[4] = 1;
        options[OPTION_WORDS + self.stop as usize / 32] |= 1 << (self.stop % 32);
        let mut states = vec![0xdead; rows * words];
        let mut marks = vec![0; rows * masks];
        for row in 0..rows {
            let key = Stream::new(self.seed, row as u64).key();
            let state = &mut states[row * words..];
            state[1] = self.position;
            state[2] = doing[row];
            state[3] = key as u32;
            state[4] = (key >> 32) as u32;
            for token in seen_by(row, vocabulary) {
                marks[row * masks + token as usize / 32] |= 1 << (token % 32);
            }
        }
        let table = noise(vocabulary * width, 3);
        let condition = noise(rows * width, 4);
        let mut memories = vec![
            Memory::of(layouts.logits.pack(logits).unwrap()),
            Memory::of(layouts.options.pack(&options).unwrap()),
            Memory::of(layouts.table.pack(&table).unwrap()),
            Memory::of(layouts.condition.pack(&condition).unwrap()),
            Memory::of(state.pack(&states).unwrap()),
            Memory::of(seen.pack(&marks).unwrap()),
            Memory::poisoned(x.size_bytes()),
        ];
        if let Some(parts) = parts {
            let kernel =
                sample.parts_kernel([layouts.logits, layouts.options, seen, parts], target);
            let mut own = vec![
                memories.remove(0),
                memories.remove(0),
                memories.remove(3),
                Memory::poisoned(parts.size_bytes()),
            ];
            execute(&kernel, target, &mut own, 1, what);
            memories.insert(3, own.remove(2));
            memories.splice(0..0, own.drain(..2));
            memories.insert(4, own.remove(0));
        }
        execute(&kernel, target, &mut memories, 2, what);
        translate(&kernel, target);
        if parts.is_some() {
            memories.remove(4);
        }
        let states: Vec<u32> = state.unpack(memories[4].bytes()).unwrap();
        let marks: Vec<u32> = seen.unpack(memories[5].bytes()).unwrap();
        let x: Vec<f32> = x.unpack(memories[6].bytes()).unwrap();
        let place = self.position as usize % STEPS;
        let after = |row: usize| {
            let state = &states[row * words..][..words];
            let token = state[STATE_WORDS + place];
            assert_eq!(state[0], token, "{what}");
            if doing[row] == 0 && state[2] < 2 {
                let mark = marks[row * masks + token as usize / 32] >> (token % 32);
                assert_eq!(mark & 1, 1, "{what}: row {row} has not seen {token}");
                for (col, &x) in x[row * width..][..width].iter().enumerate() {
                    let sum = table[token as usize * width + col] + condition[row * width + col];
                    let sum = stored(f64::from(sum), dtype);
                    assert!((f64::from(x) - sum).abs() < 1e-2, "{what}: {x} {sum}");
                }
            }
            After {
                token,
                doing: state[2],
                log_prob: f32::from_bits(state[STATE_WORDS + STEPS + place]),
                position: state[1],
                x: x[row * width..][..width].to_vec(),
            }
        };
        (0..rows).map(after).collect()
    }

    /// Compares with the definition; scores that differ by less than rounding may be taken for each other.
    fn check(&self, what: &str) {
        let logits = noise(self.rows * self.vocabulary, self.seed as usize);
        self.check_of(&logits, what);
    }

    fn check_of(&self, logits: &[f32], what: &str) {
        let doing: Vec<u32> = (0..self.rows).map(|row| u32::from(row == 2)).collect();
        for (row, after) in self.run(logits, &doing, what).into_iter().enumerate() {
            assert_eq!(after.position, self.position + 1, "{what}");
            assert!(after.x.iter().all(|x| x.is_finite()), "{what}");
            if doing[row] != 0 {
                assert_eq!((after.token, after.doing), (1, 1), "{what}");
                continue;
            }
            let logits = &logits[row * self.vocabulary..][..self.vocabulary];
            let logits: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
            let stream = Stream::new(self.seed, row as u64);
            let seen = seen_by(row, self.vocabulary);
            let scores = self.sampling.scores(&logits, &seen, stream, self.position);
            let best = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let first = scores.iter().position(|&x| x == best).unwrap() as u32;
            let ours = scores[after.token as usize];
            // Equal logits are equal on both sides, and then the first counts.
            let right = after.token == first || (best - ours < 1e-4 && best != ours);
            assert!(
                right,
                "{what}: row {row}: {} ({ours}), not {first} ({best})",
                after.token
            );
            assert_eq!(after.doing, u32::from(after.token == self.stop), "{what}");
            let sum: f64 = logits.iter().map(|x| x.exp()).sum();
            let log_prob = logits[after.token as usize] - sum.ln();
            assert!(
                (f64::from(after.log_prob) - log_prob).abs() < 1e-4,
                "{what}"
            );
        }
    }
}

fn seen_by(row: usize, vocabulary: usize) -> Vec<u32> {
    let tokens = [0, 5 + row, 40 + row, 97 * row].into_iter();
    tokens
        .filter(|&token| token < vocabulary)
        .map(|token| token as u32)
        .collect()
}

fn greedy() -> Sampling {
    Sampling {
        temperature: 0.0,
        top_k: usize::MAX,
        top_p: 1.0,
        repetition_penalty: 1.0,
    }
}

#[test]
fn next_tokens() {
    let drawn = Sampling {
        temperature: 0.7,
        ..greedy()
    };
    let samplings = [
        greedy(),
        Sampling {
            repetition_penalty: 1.7,
            ..greedy()
        },
        drawn,
        Sampling { top_k: 3, ..drawn },
        Sampling { top_k: 1, ..drawn },
        Sampling {
            top_p: 0.35,
            repetition_penalty: 0.6,
            ..drawn
        },
        Sampling {
            top_k: 20,
            top_p: 0.9,
            temperature: 3.0,
            ..drawn
        },
        Sampling {
            top_p: 1e-9,
            ..drawn
        },
    ];
    for (name, target) in targets() {
        for (vocabulary, width, rows) in [(5, 3, 3), (97, 8, 2), (331, 17, 1)] {
            for (i, &sampling) in samplings.iter().enumerate() {
                let step = Step {
                    sampling,
                    rows,
                    vocabulary,
                    width,
                    dtype: [DType::F32, DType::F16][i % 2],
                    target,
                    seed: i as u64,
                    position: [0, 4, 1000][i % 3],
                    stop: 4,
                };
                step.check(&format!("{vocabulary} {sampling:?}, {name}"));
            }
        }
    }
}

/// Of a row that is read again for every pass.
#[test]
fn next_tokens_of_many() {
    for (name, target) in targets() {
        next_token_of_many(
            Target {
                invocations: 64,
                ..target
            },
            name,
        );
        next_token_of_many(target, name);
    }
}

fn next_token_of_many(target: Target, name: &str) {
    let sampling = Sampling {
        temperature: 1.3,
        top_k: 700,
        top_p: 0.6,
        repetition_penalty: 1.2,
    };
    let few = Sampling {
        top_k: 40,
        top_p: 0.9,
        ..sampling
    };
    for sampling in [sampling, few, greedy()] {
        let step = Step {
            sampling,
            rows: 1,
            vocabulary: 4999,
            width: 4,
            dtype: DType::F32,
            target,
            seed: 3,
            position: 7,
            stop: 1,
        };
        step.check(&format!("{sampling:?}, {name}"));
    }
}

/// So hot that a token too many, or too few, is soon drawn, or missed.
#[test]
fn sets_that_tokens_are_drawn_from() {
    for (name, target) in targets() {
        let sets = [(3, 1.0), (40, 1.0), (usize::MAX, 0.033), (5, 0.5)];
        // The second in parts, of which (5, 0.5) takes all and (3, 1.0) some.
        for ((top_k, top_p), vocabulary) in sets.into_iter().flat_map(|set| [(set, 97), (set, 641)])
        {
            let sampling = Sampling {
                temperature: 20.0,
                top_k,
                top_p,
                repetition_penalty: 1.0,
            };
            let step = Step {
                sampling,
                rows: 64,
                vocabulary,
                width: 4,
                dtype: DType::F32,
                target,
                seed: 11,
                position: 2,
                stop: 1,
            };
            // Hardly two are equal: of equal ones all are in the set.
            let logits = |i: usize| {
                let bits = (i as u32).wrapping_mul(0x9e37_79b9);
                let bits = (bits ^ (bits >> 15)).wrapping_mul(0x85eb_ca6b);
                (bits >> 8) as f32 / 4194304.0
            };
            let logits: Vec<f32> = (0..64 * vocabulary).map(logits).collect();
            step.check_of(&logits, &format!("{vocabulary} {sampling:?}, {name}"));
        }
    }
}

#[test]
fn logits_that_are_no_numbers_are_no_token() {
    let drawn = Sampling {
        temperature: 1.0,
        top_k: 2,
        top_p: 0.5,
        ..greedy()
    };
    for sampling in [greedy(), drawn] {
        for (name, target) in targets() {
            let step = Step {
                sampling,
                rows: 6,
                vocabulary: 9,
                width: 4,
                dtype: DType::F32,
                target,
                seed: 1,
                position: 1,
                stop: 8,
            };
            let mut logits = noise(6 * 9, 1);
            logits[4] = f32::NAN;
            logits[9 + 3] = -f32::NAN;
            logits[18 + 8] = f32::INFINITY;
            logits[27..36].fill(f32::NEG_INFINITY);
            // Masked tokens are none.
            logits[36..45].fill(f32::NEG_INFINITY);
            logits[36 + 7] = -1e30;
            // The first of equal ones.
            logits[45..54].fill(-2.0);
            let after = step.run(&logits, &[0; 6], name);
            for row in &after[..4] {
                assert_eq!((row.doing, row.token), (2, 1), "{name}");
            }
            assert_eq!((after[4].doing, after[4].token), (0, 7), "{name}");
            assert_eq!(after[4].log_prob, 0.0);
            if sampling.temperature == 0.0 {
                assert_eq!((after[5].doing, after[5].token), (0, 0), "{name}");
            }
        }
    }
}

/// Rows in parts whose candidates are more than a workgroup takes, or no numbers.
#[test]
fn parts_without_few_largest() {
    const VOCABULARY: usize = 2050;
    for (name, target) in targets() {
        for top_p in [1.0, 0.5] {
            let step = Step {
                sampling: Sampling {
                    temperature: 1.0,
                    top_k: 2,
                    top_p,
                    ..greedy()
                },
                rows: 2,
                vocabulary: VOCABULARY,
                width: 4,
                dtype: DType::F32,
                target,
                seed: 5,
                position: 1,
                stop: 8,
            };
            step.check_of(&[1.5; 2 * VOCABULARY], name);
            let mut logits = noise(2 * VOCABULARY, 1);
            logits[700] = f32::NAN;
            logits[VOCABULARY..].fill(f32::NEG_INFINITY);
            logits[VOCABULARY + 1999] = -1e30;
            let after = step.run(&logits, &[0; 2], name);
            assert_eq!((after[0].doing, after[0].token), (2, 1), "{name}");
            assert_eq!((after[1].doing, after[1].token), (0, 1999), "{name}");
        }
    }
}
