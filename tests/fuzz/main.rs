//! Mutated files of every format: each is read or refused, within bounded memory and time, and never a panic.
//!
//! The corpus and some thousand mutations run with the other tests. To search longer, one format at a time:
//!
//! ```text
//! FUZZ_SECONDS=600 cargo test --test fuzz -- --ignored --nocapture efb2
//! ```
//!
//! Where branches are counted (`coverage.rs`), a mutation that takes a new one is mutated further.

#[path = "../common/allocated.rs"]
mod allocated;
mod coverage;

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use allocated::{NOW, PEAK};
use coverage::Coverage;
use energyflow::Error;
use energyflow::text::{
    Dataset, DatasetFormat, DatasetWriter, EmbeddingType, NpyReader, OpenOptions, Record,
    RecordWriter, Records, Tokenizer, Whitespace,
};
use energyflow::train::Weights;
use energyflow::train::record::read_json_lines;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use tempfile::TempDir;

/// Bytes that reading a file of some kilobytes may allocate: buffers of a megabyte, some of them twice.
const MEMORY: usize = 24 << 20;

/// A mutation with more bytes is not mutated further.
const MOST_BYTES: usize = 16 << 10;

/// What is read as what.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Efb1,
    Efb2,
    JsonLines,
    Npy,
    Safetensors,
    Text,
    Weights,
    Log,
}

struct Fuzz {
    kind: Kind,
    folder: TempDir,
    tokenizer: Whitespace,
    seeds: Vec<Vec<u8>>,
    /// The first so many seeds are files that can be read.
    valid: usize,
    random: ChaCha8Rng,
    /// Files that were read, and those that were refused.
    counts: [u64; 2],
}

fn records() -> Vec<Record> {
    let records = (0..6_u32).map(|i| {
        let mut record = Record::new(vec![i as f32, -0.5, 1e-3]);
        let ids: Vec<u32> = (0..=i % 4).map(|j| 10 * i + j).collect();
        record.attention_mask = (i % 2 == 0).then(|| ids.iter().map(|id| (id % 2) as u8).collect());
        record.input_ids = Some(ids);
        record.text =
            Some(["", "one two", "ört ✓", "two\u{a0}one", "x", "\\\""][i as usize].into());
        record
    });
    records.collect()
}

impl Fuzz {
    fn new(kind: Kind, seed: u64) -> Self {
        let folder = TempDir::new().unwrap();
        let mut seeds = Vec::new();
        let at = folder.path().join("seed");
        let write = |format, records: &[Record], embeddings| {
            let mut writer = RecordWriter::create(&at, format, 3, embeddings).unwrap();
            for record in records {
                writer.push(record).unwrap();
            }
            writer.finish().unwrap();
            std::fs::read(&at).unwrap()
        };
        let all = records();
        let mut texts = records();
        let mut tokens = records();
        for record in &mut texts {
            (record.input_ids, record.attention_mask) = (None, None);
        }
        for record in &mut tokens {
            record.text = None;
        }
        match kind {
            Kind::Efb1 => seeds.push(write(DatasetFormat::Efb1, &all, EmbeddingType::F32)),
            Kind::Efb2 | Kind::JsonLines => {
                let format = match kind {
                    Kind::Efb2 => DatasetFormat::Efb2,
                    _ => DatasetFormat::JsonLines,
                };
                for records in [&all, &texts, &tokens] {
                    seeds.push(write(format, records, EmbeddingType::F32));
                }
            }
            Kind::Safetensors => {
                for embeddings in [EmbeddingType::F32, EmbeddingType::F16, EmbeddingType::Int8] {
                    for records in [&all, &tokens] {
                        seeds.push(write(DatasetFormat::Safetensors, records, embeddings));
                    }
                }
            }
            Kind::Npy | Kind::Text => {
                let path = folder.path().join("seed.txt");
                for embeddings in [EmbeddingType::F32, EmbeddingType::F16] {
                    let mut writer =
                        RecordWriter::create(&path, DatasetFormat::Text, 3, embeddings).unwrap();
                    for record in &texts {
                        writer.push(record).unwrap();
                    }
                    writer.finish().unwrap();
                    let name = if kind == Kind::Npy { "seed.npy" } else { "seed.txt" };
                    seeds.push(std::fs::read(folder.path().join(name)).unwrap());
                }
            }
            Kind::Weights => {
                let mut writer = DatasetWriter::create(&at, 3, EmbeddingType::F16).unwrap();
                writer.push(&[1], &[1], &[0.5; 3], Some("x")).unwrap();
                writer.finish().unwrap();
                let bytes = std::fs::read(&at).unwrap();
                let text = String::from_utf8_lossy(&bytes).into_owned();
                assert!(text.contains("energyflow.dataset"));
                // The same tensors as nobody's file.
                let mut foreign = bytes;
                let place = text.find("energyflow.dataset").unwrap();
                foreign[place..place + 3].copy_from_slice(b"xyz");
                seeds.push(foreign);
            }
            Kind::Log => seeds.push(
                b"{\"step\":1,\"loss\":0.5}\n{\"step\":2,\"loss\":null,\"x/y\":1e-5}\n\n{\"step\":3}\n"
                    .to_vec(),
            ),
        }
        Self {
            kind,
            folder,
            tokenizer: Whitespace::new(["one", "two"], 8).unwrap(),
            valid: seeds.len(),
            seeds,
            random: ChaCha8Rng::seed_from_u64(seed),
            counts: [0; 2],
        }
    }

    fn below(&mut self, end: usize) -> usize {
        (self.random.next_u64() % end.max(1) as u64) as usize
    }

    /// A seed with some changes.
    fn mutated(&mut self) -> Vec<u8> {
        const WORDS: [&[u8]; 22] = [
            b"\xff\xff\xff\xff",
            b"\0\0\0\0",
            b"\xff\xff\xff\x7f",
            b"\0\0\0\x80",
            b"\0\0\xc0\x7f",
            b"\0\0\x80\x7f",
            b"\n",
            b"\r\n",
            b"\xef\xbb\xbf",
            b"{",
            b"}",
            b"\"",
            b"[1e999]",
            b"null",
            b"-1",
            b"\\ud800",
            b"18446744073709551615",
            b"'<f8'",
            b"True",
            b"(,)",
            b"F64",
            b"\xc3",
        ];
        // Most of those that were found are refused: half of the mutations are of the others.
        let end = [self.valid, self.seeds.len()][self.below(2)];
        let seed = self.below(end);
        let mut bytes = self.seeds[seed].clone();
        for _ in 0..1 + self.below(5) {
            let at = self.below(bytes.len() + 1);
            let length = 1 + self.below(12);
            let range = at..(at + length).min(bytes.len());
            match self.below(8) {
                0 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
                1 if at < bytes.len() => bytes[at] = self.random.next_u64() as u8,
                2 => drop(bytes.drain(range)),
                3 => {
                    let copy = bytes[range].to_vec();
                    let to = self.below(bytes.len() + 1);
                    drop(bytes.splice(to..to, copy));
                }
                4 => {
                    let word = WORDS[self.below(WORDS.len())];
                    let end = (at + word.len()).min(bytes.len());
                    drop(bytes.splice(at..end, word.iter().copied()));
                }
                5 => {
                    let word = WORDS[self.below(WORDS.len())];
                    drop(bytes.splice(at..at, word.iter().copied()));
                }
                6 => bytes.truncate(at),
                _ => {
                    // A number nearby.
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte = byte.wrapping_add([1, 2, 255, 128][length % 4]);
                    }
                }
            }
        }
        bytes
    }

    /// Reads bytes in every way. Any error but one about the file is a defect.
    fn check(&mut self, bytes: &[u8]) {
        let path = self.folder.path().join(match self.kind {
            Kind::Npy => "case.npy",
            Kind::Text => "case.txt",
            _ => "case",
        });
        std::fs::write(&path, bytes).unwrap();
        match self.kind {
            Kind::Npy => std::fs::write(path.with_extension("txt"), "a\nb\nc\nd\ne\nf\n").unwrap(),
            Kind::Text => {
                let npy = self.folder.path().join("seed.npy");
                std::fs::copy(npy, path.with_extension("npy")).unwrap();
            }
            _ => {}
        }
        let (before, start) = (NOW.load(Ordering::Relaxed), Instant::now());
        PEAK.store(before, Ordering::Relaxed);
        let result = match self.kind {
            Kind::Weights => Weights::load(&path).map(drop),
            Kind::Log => read_json_lines(&path, |_, _, _| ()),
            _ => self.read(&path),
        };
        let used = PEAK.load(Ordering::Relaxed) - before;
        assert!(used < MEMORY, "{used} bytes allocated");
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "{:?}",
            start.elapsed()
        );
        match result {
            Ok(()) => self.counts[0] += 1,
            Err(Error::Format { offset, .. }) => {
                self.counts[1] += 1;
                let file = bytes.len().max(4096) as u64;
                assert!(offset <= file, "offset {offset}");
            }
            Err(error) => panic!("not an error about the file: {error}"),
        }
    }

    fn read(&self, path: &Path) -> Result<(), Error> {
        if self.kind == Kind::Npy {
            let npy = NpyReader::open(path)?;
            let mut row = Vec::new();
            for index in 0..npy.rows().min(100) {
                let _ = npy.read(index, &mut row);
            }
        }
        let mut options = OpenOptions::default().tokenizer(&self.tokenizer);
        options.vocab = Some(1000.max(self.tokenizer.vocab_size()));
        let held = Dataset::open_with(path, options);
        let read = Dataset::open_with(path, options.in_memory(0));
        let records: Result<Vec<Record>, Error> =
            Records::open_with(path, options).and_then(Iterator::collect);
        let (held, read) = match (held, read) {
            (Ok(held), Ok(read)) => (held, read),
            (Err(held), Err(read)) => {
                assert_eq!(held.to_string(), read.to_string());
                return Err(held);
            }
            (held, read) => panic!("in memory {held:?}, from the file {read:?}"),
        };
        let records = records.unwrap();
        assert_eq!(held.len(), records.len());
        for (index, record) in records.iter().enumerate() {
            let (one, other) = (held.sample(index)?, read.sample(index)?);
            assert_eq!(one, other);
            assert_eq!(one.target(), record.target);
            assert!(one.target().iter().all(|value| value.is_finite()));
            assert!(one.len() > 0 && one.len() == one.mask().len());
            assert!(one.ids().iter().all(|&id| id < 1000));
            assert_eq!(one.text(), record.text.as_deref());
        }
        Ok(())
    }

    /// Checks mutations until the time is over or so many are done.
    fn run(mut self, time: Duration, most: u64) {
        let start = Instant::now();
        let mut coverage = Coverage::new();
        while start.elapsed() < time && self.counts[0] + self.counts[1] < most {
            let bytes = self.mutated();
            let kind = self.kind;
            let check = std::panic::AssertUnwindSafe(|| coverage.is_new(|| self.check(&bytes)));
            match std::panic::catch_unwind(check) {
                Ok(true) if bytes.len() <= MOST_BYTES => self.seeds.push(bytes),
                Ok(_) => {}
                Err(panic) => {
                    let found =
                        PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{kind:?}"));
                    std::fs::write(&found, &bytes).unwrap();
                    eprintln!("the file is kept as {}", found.display());
                    std::panic::resume_unwind(panic);
                }
            }
        }
        let [read, refused] = self.counts;
        let (branches, seeds) = (coverage.branches(), self.seeds.len());
        println!(
            "{:?}: {read} files read, {refused} refused; {branches} branches, {seeds} seeds",
            self.kind
        );
        assert!(read > 0 && refused > 0);
    }
}

/// Files that a search has found, or that are known to be awkward: the kind and the bytes.
fn corpus() -> Vec<(Kind, &'static [u8])> {
    vec![
        (Kind::Efb1, b"EFB1\xff\xff\xff\xff\xff\xff\xff\xff"),
        (Kind::Efb1, b"EFB1\x01\0\0\0\x01\0\0\0\x01\0\0\0\0\0\0\0"),
        (
            Kind::Efb2,
            b"EFB2\x01\0\0\0\x01\0\0\0\x02\0\0\0\xff\xff\xff\xff\0\0\0\0",
        ),
        (
            Kind::Efb2,
            b"EFB2\x01\0\0\0\x01\0\0\0\x02\0\0\0\0\0\0\0\0\0\0\0",
        ),
        (Kind::JsonLines, b"{\"text\":\"\\ud800\",\"target\":[1]}"),
        (
            Kind::JsonLines,
            b"{\"target\":[1],\"target\":[2],\"text\":\"\"}",
        ),
        (Kind::JsonLines, b"{\"text\":\"a\",\"target\":[1e999]}"),
        (Kind::Npy, b"\x93NUMPY\x03\0\xff\xff\xff\xff{"),
        (Kind::Npy, b"\x93NUMPY\x01\0\x01\0{"),
        (Kind::Text, b"\xc3"),
        (Kind::Text, b"\xef\xbb\xbf"),
        (Kind::Text, b"\r\n\r\n\r\n\r\n\r\n\r\n"),
        (Kind::Safetensors, b"\x02\0\0\0\0\0\0\0{}"),
        (Kind::Weights, b"\xff\xff\xff\xff\xff\xff\xff\xff{}"),
        (Kind::Log, b"{\"step\":1e999}\n"),
    ]
}

#[test]
fn known_cases_and_some_mutations() {
    for (kind, bytes) in corpus() {
        Fuzz::new(kind, 0).check(bytes);
    }
    for kind in [
        Kind::Efb1,
        Kind::Efb2,
        Kind::JsonLines,
        Kind::Npy,
        Kind::Safetensors,
        Kind::Text,
        Kind::Weights,
        Kind::Log,
    ] {
        Fuzz::new(kind, 1).run(Duration::from_secs(20), 400);
    }
}

macro_rules! searches {
    ($($name:ident: $kind:ident),+ $(,)?) => {
        $(
            #[test]
            #[ignore = "a search for as many seconds as FUZZ_SECONDS says"]
            fn $name() {
                let seconds = std::env::var("FUZZ_SECONDS").ok().and_then(|s| s.parse().ok());
                let seed = std::env::var("FUZZ_SEED").ok().and_then(|s| s.parse().ok());
                let time = Duration::from_secs(seconds.unwrap_or(60));
                Fuzz::new(Kind::$kind, seed.unwrap_or(2)).run(time, u64::MAX);
            }
        )+
    };
}

searches! {
    efb1: Efb1,
    efb2: Efb2,
    json_lines: JsonLines,
    npy: Npy,
    safetensors: Safetensors,
    text: Text,
    weights: Weights,
    log: Log,
}
