//! Disks that are full or read-only: writers fail with an error, leave what was there, and leave nothing else.

#![cfg(unix)]

mod common;
#[path = "common/itself.rs"]
mod itself;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::gpu;
use energyflow::graph::{Graph, Init};
use energyflow::text::{DatasetFormat, EmbeddingType, Record, RecordWriter};
use energyflow::train::record::{JsonLinesLog, Recorder, TensorBoard};
use energyflow::train::{Checkpoint, WeightType, Weights};
use energyflow::{DType, Error, Gpu, GpuOptions, Host, Session};
use tempfile::TempDir;

/// Bytes that no file of these tests may reach.
const LIMIT: u64 = 64 << 10;
/// Where a child works; other runs of its test do nothing.
const FOLDER: &str = "ENERGYFLOW_TEST_FULL";
/// A folder on a disk of less than 1 MiB that is not read-only, and one on a read-only disk. `scripts/check faults` mounts them.
const SMALL_DISK: &str = "ENERGYFLOW_TEST_SMALL_DISK";
const READ_ONLY_DISK: &str = "ENERGYFLOW_TEST_READ_ONLY_DISK";

/// A session with a parameter of so many elements, each `value`.
fn session(gpu: &Gpu, elements: usize, value: f32) -> Session {
    let mut graph = Graph::new();
    let p = graph
        .parameter("p", &[elements], Init::Constant(value))
        .unwrap();
    let y = graph.affine(p, 2.0, 0.0).unwrap();
    let sum = graph.sum_all(y).unwrap();
    graph.output("sum", sum).unwrap();
    let mut session = Session::new(gpu, 0);
    session.compile(&graph).unwrap();
    session
}

/// Texts, with token ids where the format has nothing else.
fn record(format: DatasetFormat, i: usize) -> Record {
    let mut record = Record::new(vec![i as f32; 16]);
    match format {
        DatasetFormat::Safetensors => record.input_ids = Some(vec![1, 2, 3 + i as u32 % 5]),
        _ => record.text = Some(format!("text number {i}")),
    }
    record
}

fn write(path: &Path, format: DatasetFormat, count: usize) -> Result<(), Error> {
    let mut writer = RecordWriter::create(path, format, 16, EmbeddingType::F32)?;
    for i in 0..count {
        writer.push(&record(format, i))?;
    }
    writer.finish()
}

const FORMATS: [(DatasetFormat, &str); 4] = [
    (DatasetFormat::Efb2, "data.efb2"),
    (DatasetFormat::JsonLines, "data.jsonl"),
    (DatasetFormat::Safetensors, "data.safetensors"),
    (DatasetFormat::Text, "data.txt"),
];

/// What is there before: small files of every kind.
fn prepare(gpu: &Gpu, folder: &Path) {
    let small = session(gpu, 100, 0.5);
    let weights = Weights::from_session(&small).unwrap();
    weights
        .save(folder.join("weights.safetensors"), WeightType::F32)
        .unwrap();
    let checkpoint = Checkpoint::from_session(&small).unwrap();
    checkpoint
        .save(folder.join("checkpoint.safetensors"))
        .unwrap();
    for (format, name) in FORMATS {
        write(&folder.join(name), format, 3).unwrap();
    }
}

fn files(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut files: Vec<_> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file())
        .map(|path| (path.clone(), std::fs::read(path).unwrap()))
        .collect();
    files.sort();
    files
}

fn is_io<T: std::fmt::Debug>(result: Result<T, Error>) {
    match result {
        Err(Error::Io { path, source, .. }) => {
            println!("{}: {source}", path.display());
        }
        other => panic!("{other:?}"),
    }
}

/// Every writer writes more than there is room for.
fn write_too_much(gpu: &Gpu, folder: &Path, elements: usize) {
    let before = files(folder);
    let large = session(gpu, elements, 0.25);
    let weights = Weights::from_session(&large).unwrap();
    is_io(weights.save(folder.join("weights.safetensors"), WeightType::F32));
    let checkpoint = Checkpoint::from_session(&large).unwrap();
    is_io(checkpoint.save(folder.join("checkpoint.safetensors")));
    for (format, name) in FORMATS {
        is_io(write(&folder.join(name), format, elements / 16));
    }
    assert!(files(folder) == before, "the files that were there changed");
    Checkpoint::load(folder.join("checkpoint.safetensors")).unwrap();
    Weights::load(folder.join("weights.safetensors")).unwrap();
    // Computing goes on.
    assert_eq!(large.get("p").unwrap()[0], 0.25);
}

/// Logs grow: what was written before stays and is read.
fn log_too_much(folder: &Path, most: u64) {
    let path = folder.join("log.jsonl");
    let mut log = JsonLinesLog::create(&path).unwrap();
    let mut board = TensorBoard::create(folder.join("board")).unwrap();
    let recorders: [&mut dyn Recorder; 2] = [&mut log, &mut board];
    for recorder in recorders {
        let failed = (0..most / 16).find_map(|step| {
            let recorded = recorder.scalars(step, &[("loss", 0.5)]);
            recorded.and_then(|()| recorder.flush()).err()
        });
        is_io(failed.map_or(Ok(()), Err));
    }
    drop((log, board));
    let mut seen = 0;
    // The last line may be cut off.
    let _ = energyflow::train::record::read_json_lines(&path, |_, _, value| {
        assert_eq!(value, 0.5);
        seen += 1;
    });
    assert!(seen > 100, "{seen}");
}

#[test]
fn child_that_may_not_write_large_files() {
    let Some(folder) = std::env::var_os(FOLDER) else {
        return;
    };
    let folder = PathBuf::from(folder);
    let gpu = gpu();
    prepare(&gpu, &folder);
    write_too_much(&gpu, &folder, LIMIT as usize);
    log_too_much(&folder, 64 * LIMIT);
}

/// The system refuses to let any file grow past a limit, as a full disk does in the middle of a write.
#[test]
fn files_that_cannot_grow() {
    let folder = TempDir::new().unwrap();
    // Blocks of 512 bytes, or of 1024 in some shells. The signal that comes with the error is ignored.
    let script = format!(
        "trap '' XFSZ && ulimit -f {} && exec \"$0\" \"$@\" --exact child_that_may_not_write_large_files --nocapture",
        LIMIT / 512
    );
    // Its output goes through pipes: the output of this process may be a file that is longer than the limit.
    let output = Command::new("sh")
        .args(["-c", &script])
        .args(itself::words())
        .env(FOLDER, folder.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
}

/// A folder in which nothing can be made: read-only where that stops this user, otherwise below a file.
#[test]
fn folders_that_cannot_be_written() {
    use std::os::unix::fs::PermissionsExt;
    let own = TempDir::new().unwrap();
    let folder = own.path().join("folder");
    std::fs::create_dir(&folder).unwrap();
    let gpu = gpu();
    prepare(&gpu, &folder);
    let access = |mode| std::fs::set_permissions(&folder, PermissionsExt::from_mode(mode)).unwrap();
    access(0o555);
    let stops = std::fs::write(folder.join("probe"), "").is_err();
    if stops {
        write_too_much(&gpu, &folder, 100);
    } else {
        println!("permissions do not stop this user");
    }
    access(0o755);
    let below = folder.join("data.efb2");
    let weights = Weights::from_session(&session(&gpu, 10, 1.0)).unwrap();
    let before = files(&folder);
    is_io(weights.save(below.join("weights"), WeightType::F32));
    is_io(write(&below.join("data"), DatasetFormat::Efb2, 3));
    is_io(JsonLinesLog::create(below.join("log")));
    is_io(TensorBoard::create(below.join("board")));
    if !stops {
        std::fs::remove_file(folder.join("probe")).unwrap();
        let before: Vec<_> = before
            .into_iter()
            .filter(|(path, _)| !path.ends_with("probe"))
            .collect();
        assert!(files(&folder) == before);
    }
}

/// Needs folders that `scripts/check faults` mounts.
#[test]
#[ignore = "needs disks that scripts/check faults mounts"]
fn full_and_read_only_disks() {
    let folder = |name| PathBuf::from(std::env::var_os(name).expect(name));
    let gpu = gpu();
    let small = folder(SMALL_DISK);
    prepare(&gpu, &small);
    write_too_much(&gpu, &small, 1 << 20);
    log_too_much(&small, 64 << 20);
    // Nothing is left to write to, so caches, profiles and dumps are given up with a warning, and computing goes on.
    for folder in [small, folder(READ_ONLY_DISK)] {
        let before = files(&folder);
        let options = GpuOptions::from_env().unwrap();
        let options = options
            .cache_dir(folder.join("caches"))
            .profile_dir(folder.join("profiles"))
            .dump_dir(folder.join("dumps"))
            .autotune(true);
        let gpu = Gpu::new(&options).unwrap();
        let mut graph = Graph::new();
        let x = graph.input("x", &[4], DType::F32).unwrap();
        let y = graph.affine(x, 2.0, 0.0).unwrap();
        graph.output("y", y).unwrap();
        let executable = Session::new(&gpu, 0).compile(&graph).unwrap();
        for _ in 0..4 {
            let outputs = executable.run(&[("x", Host::F32(&[1.0; 4]))]).unwrap();
            assert_eq!(outputs.wait().unwrap().get("y").unwrap(), [2.0; 4]);
        }
        gpu.save_caches();
        assert!(files(&folder) == before);
    }
    let read_only = folder(READ_ONLY_DISK);
    let weights = Weights::from_session(&session(&gpu, 10, 1.0)).unwrap();
    is_io(weights.save(read_only.join("weights"), WeightType::F32));
    is_io(JsonLinesLog::create(read_only.join("log")));
    is_io(TensorBoard::create(read_only.join("board")));
}
