//! Large datasets take little memory, whatever their format.

#[path = "common/allocated.rs"]
mod allocated;

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Instant;

use allocated::{NOW, PEAK};
use energyflow::text::{
    Batches, Dataset, DatasetFormat, EmbeddingType, OpenOptions, Record, RecordWriter, Whitespace,
};
use tempfile::TempDir;

const WIDTH: usize = 384;

const FORMATS: [(DatasetFormat, EmbeddingType, &str); 7] = [
    (DatasetFormat::Efb1, EmbeddingType::F32, "efb"),
    (DatasetFormat::Efb2, EmbeddingType::F32, "efb2"),
    (
        DatasetFormat::Safetensors,
        EmbeddingType::F32,
        "f32.safetensors",
    ),
    (
        DatasetFormat::Safetensors,
        EmbeddingType::F16,
        "f16.safetensors",
    ),
    (
        DatasetFormat::Safetensors,
        EmbeddingType::Int8,
        "int8.safetensors",
    ),
    (DatasetFormat::JsonLines, EmbeddingType::F32, "jsonl"),
    (DatasetFormat::Text, EmbeddingType::F16, "txt"),
];

/// Writes samples of about 14 tokens and a text.
fn write(path: &Path, format: DatasetFormat, embeddings: EmbeddingType, samples: usize) {
    let mut writer = RecordWriter::create(path, format, WIDTH, embeddings).unwrap();
    let values: Vec<f32> = (0..2 * WIDTH)
        .map(|i| (i as f32 * 0.37).sin() * 0.05)
        .collect();
    for i in 0..samples {
        let mut record = Record::new(values[i % WIDTH..][..WIDTH].to_vec());
        record.input_ids = Some((0..8 + i as u32 % 13).map(|j| 1000 + 7 * j).collect());
        record.text = Some(format!("one two three four five six seven eight nine {i}"));
        writer.push(&record).unwrap();
    }
    writer.finish().unwrap();
}

/// Bytes of the files of a dataset.
fn size(path: &Path) -> u64 {
    let beside: PathBuf = path.with_extension("npy");
    let length = |path: &Path| path.metadata().map_or(0, |metadata| metadata.len());
    length(path)
        + if path.extension().is_some_and(|e| e == "txt") {
            length(&beside)
        } else {
            0
        }
}

#[test]
fn a_dataset_is_not_held_in_memory() {
    let folder = TempDir::new().unwrap();
    let tokenizer = Whitespace::new(["one", "two", "three"], 16).unwrap();
    for (format, embeddings, ending) in FORMATS {
        let path = folder.path().join(format!("a.{ending}"));
        let samples = 20_000;
        let before = NOW.load(Ordering::Relaxed);
        PEAK.store(before, Ordering::Relaxed);
        write(&path, format, embeddings, samples);
        let written = PEAK.load(Ordering::Relaxed) - before;
        PEAK.store(before, Ordering::Relaxed);
        let options = OpenOptions::default().vocab(2000).tokenizer(&tokenizer);
        let dataset = Dataset::open_with(&path, options.in_memory(100_000)).unwrap();
        assert_eq!(dataset.len(), samples);
        let mut batches = Batches::training(dataset, 64, 32, 0).unwrap();
        for _ in 0..50 {
            batches.next_batch().unwrap().unwrap();
        }
        let read = PEAK.load(Ordering::Relaxed) - before;
        let bytes = size(&path);
        assert!(bytes > 6_000_000, "{bytes}");
        // Windows of a megabyte, a few batches, 12 bytes of addresses and order per sample.
        for used in [written, read] {
            assert!(
                used < 6_000_000,
                "{format} {embeddings:?}: {used} of {bytes} bytes"
            );
        }
        drop(batches);
        std::fs::remove_file(&path).unwrap();
    }
}

/// Resident memory of this process at its highest since the last call, in bytes.
fn resident_peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
    let _ = std::fs::write("/proc/self/clear_refs", "5");
    1024 * kilobytes.unwrap_or(0)
}

/// Megabytes per format: `MEGABYTES=10000 FORMATS=efb cargo test --test data_memory -- --ignored --nocapture`.
#[test]
#[ignore = "measures, on files of as many megabytes as MEGABYTES says"]
fn readers_measured() {
    let variable = |name| std::env::var(name).ok();
    let megabytes = variable("MEGABYTES")
        .and_then(|s| s.parse().ok())
        .unwrap_or(200);
    let formats = variable("FORMATS").unwrap_or_default();
    let folder = TempDir::new().unwrap();
    let tokenizer = Whitespace::new(["one", "two", "three"], 32).unwrap();
    for (format, embeddings, ending) in FORMATS {
        if !formats.is_empty() && !formats.split(',').any(|name| name == ending) {
            continue;
        }
        let path = folder.path().join(format!("a.{ending}"));
        let start = Instant::now();
        write(&path, format, embeddings, megabytes * 1_000_000 / 1610);
        let wrote = start.elapsed().as_secs_f64();
        for in_memory in [0, 32 << 20, u64::MAX] {
            if in_memory == u64::MAX && size(&path) > 2 << 30 {
                continue;
            }
            resident_peak();
            let start = Instant::now();
            let options = OpenOptions::default().vocab(30522).tokenizer(&tokenizer);
            let dataset = Dataset::open_with(&path, options.in_memory(in_memory)).unwrap();
            let opened = start.elapsed().as_secs_f64();
            let samples = dataset.len();
            let mut batches = Batches::training(dataset, 64, 32, 0).unwrap();
            let start = Instant::now();
            let mut read = 0;
            while read < 400_000
                && let Some(batch) = batches.next_batch().unwrap()
            {
                read += batch.valid;
            }
            let seconds = start.elapsed().as_secs_f64();
            println!(
                "{ending:>16} {:6.0} MB, {samples} samples, written in {wrote:.1} s; in memory up to {in_memory:>20}: opened in {opened:5.2} s, {:.0} samples/s shuffled, resident {:.0} MB",
                size(&path) as f64 / 1e6,
                read as f64 / seconds,
                resident_peak() as f64 / 1e6,
            );
        }
        std::fs::remove_file(&path).unwrap();
        let _ = std::fs::remove_file(path.with_extension("npy"));
    }
}
