//! Files kept between processes, whole, damaged, foreign or unwritable; and the tuner, whose choices are in one of them.

#[path = "common/itself.rs"]
mod itself;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Child;

use energyflow::gpu::{CacheStats, TuningStats};
use energyflow::graph::Graph;
use energyflow::runtime::Host;
use energyflow::types::{DType, Trans};
use energyflow::{Executable, Gpu, GpuOptions, Session};

const M: usize = 70;
const K: usize = 130;
const N: usize = 90;

/// Kernels with several candidates to choose from, whatever the adapter.
fn options(folder: &Path) -> GpuOptions {
    GpuOptions::default()
        .barrier_free(false)
        .cache_dir(folder)
        .autotune(true)
}

fn open(options: &GpuOptions) -> Gpu {
    Gpu::new(options).expect("these tests need a GPU adapter")
}

fn compile(gpu: &Gpu) -> std::sync::Arc<Executable> {
    let mut graph = Graph::new();
    let a = graph.input("a", &[M, K], DType::F32).unwrap();
    let b = graph.input("b", &[K, N], DType::F32).unwrap();
    let c = graph.matmul(a, b, Trans::NN).unwrap();
    graph.output("c", c).unwrap();
    Session::new(gpu, 0).compile(&graph).unwrap()
}

/// Bits of a product, checked against sums on the host.
fn product(gpu: &Gpu) -> Vec<u32> {
    let a: Vec<f32> = (0..M * K).map(|i| (i as f32).sin()).collect();
    let b: Vec<f32> = (0..K * N).map(|i| (i as f32).cos()).collect();
    let inputs = [("a", Host::from(&a)), ("b", Host::from(&b))];
    let outputs = compile(gpu).run(&inputs).unwrap().wait().unwrap();
    let c = outputs.get("c").unwrap();
    for (i, &got) in c.iter().enumerate().step_by(37) {
        let (row, column) = (i / N, i % N);
        let sum: f32 = (0..K).map(|k| a[row * K + k] * b[k * N + column]).sum();
        assert!((got - sum).abs() < 1e-4, "element {i}: {got}, not {sum}");
    }
    c.into_iter().map(f32::to_bits).collect()
}

fn caches(gpu: &Gpu) -> CacheStats {
    gpu.report().caches
}

fn tuning(gpu: &Gpu) -> TuningStats {
    gpu.report().tuning.expect("tuning is on")
}

/// Whether kernels can be timed; 1 or 0, as a number of measurements. Timestamps of some Metal drivers do not count.
fn measurable(gpu: &Gpu) -> u64 {
    let capabilities = gpu.capabilities();
    u64::from(capabilities.timestamps && capabilities.backend != energyflow::wgpu::Backend::Metal)
}

/// Files that a device writes after a product.
fn expected_files(gpu: &Gpu) -> Vec<&'static str> {
    let capabilities = gpu.capabilities();
    let kinds = [
        ("pipelines", capabilities.pipeline_cache),
        ("tuning", measurable(gpu) == 1),
    ];
    let made = kinds.into_iter().filter(|(_, made)| *made);
    made.map(|(kind, _)| kind).collect()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    all.sort();
    all
}

fn kinds(folder: &Path) -> Vec<String> {
    let name = |path: PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
    let kind = |name: String| name.split_once('-').unwrap().0.to_owned();
    files(folder).into_iter().map(name).map(kind).collect()
}

/// A folder as a first process leaves it, its files, and the bits it computed.
fn filled() -> (tempfile::TempDir, Vec<PathBuf>, Vec<u32>) {
    let folder = tempfile::tempdir().unwrap();
    let gpu = open(&options(folder.path()));
    let bits = product(&gpu);
    drop(gpu);
    let files = files(folder.path());
    (folder, files, bits)
}

/// Splits a file into key and payload, lets `change` change them, and writes it with lengths and checksum that fit.
fn reseal(path: &Path, change: impl FnOnce(&mut String, &mut Vec<u8>)) {
    let file = fs::read(path).unwrap();
    let length = u64::from_le_bytes(file[8..16].try_into().unwrap()) as usize;
    let mut key = String::from_utf8(file[24..24 + length].to_vec()).unwrap();
    let mut payload = file[24 + length..file.len() - 8].to_vec();
    change(&mut key, &mut payload);
    let mut file = file[..8].to_vec();
    file.extend((key.len() as u64).to_le_bytes());
    file.extend((payload.len() as u64).to_le_bytes());
    file.extend(key.as_bytes());
    file.extend(payload);
    let checksum = file.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    file.extend(checksum.to_le_bytes());
    fs::write(path, file).unwrap();
}

/// Makes the stored choice one that no rule and no measurement would make of so small a product.
fn store_large_tiles(files: &[PathBuf]) {
    let tuning = files.last().unwrap();
    reseal(tuning, |_, payload| {
        let mut choices: serde_json::Value = serde_json::from_slice(payload).unwrap();
        for choice in choices.as_object_mut().unwrap().values_mut() {
            choice["candidate"] = "128x128x8 16x8 /1".into();
        }
        *payload = serde_json::to_vec(&choices).unwrap();
    });
}

fn uses_large_tiles(executable: &Executable) -> bool {
    executable.sources().any(|(key, _)| key.contains("bm=128"))
}

#[test]
fn a_second_start_finds_pipelines_and_choices() {
    let folder = tempfile::tempdir().unwrap();
    // Made when something is saved, with its parents.
    let folder = folder.path().join("to/be/made");
    let gpu = open(&options(&folder));
    assert!(!folder.exists());
    let bits = product(&gpu);
    let made = expected_files(&gpu);
    let measured = measurable(&gpu);
    assert_eq!(tuning(&gpu).measured, measured);
    assert_eq!(tuning(&gpu).hits, 0);
    assert_eq!(product(&gpu), bits, "a new session, the same device");
    assert_eq!(tuning(&gpu).measured, measured);
    assert_eq!(tuning(&gpu).hits, measured);
    assert_eq!(caches(&gpu), CacheStats::default(), "nothing there yet");
    drop(gpu);
    assert_eq!(kinds(&folder), made, "and no temporary file");

    let gpu = open(&options(&folder));
    let stats = caches(&gpu);
    assert_eq!(
        (stats.loaded_bytes > 0, stats.ignored),
        (!made.is_empty(), 0)
    );
    assert_eq!(product(&gpu), bits);
    let stats = tuning(&gpu);
    assert_eq!(
        (stats.choices, stats.hits, stats.measured),
        (measured, measured, 0)
    );
}

#[test]
fn saving_on_request_writes_what_has_changed() {
    let folder = tempfile::tempdir().unwrap();
    let gpu = open(&options(folder.path()));
    product(&gpu);
    gpu.save_caches();
    let made = expected_files(&gpu);
    assert_eq!(kinds(folder.path()), made);
    let saved = caches(&gpu).saved;
    assert_eq!(saved, made.len() as u64);
    gpu.save_caches();
    let tunings = u64::from(made.contains(&"tuning"));
    assert!(
        caches(&gpu).saved <= 2 * saved - tunings,
        "choices are as they were"
    );
    for file in files(folder.path()) {
        fs::remove_file(file).unwrap();
    }
    gpu.save_caches();
    assert_eq!(
        kinds(folder.path()),
        made,
        "files that are gone are written again"
    );
    assert_eq!(caches(&gpu).ignored, 0);
}

#[test]
fn the_store_decides_and_only_while_tuning_is_on() {
    let (folder, files, bits) = filled();
    if kinds(folder.path()).last().map(String::as_str) != Some("tuning") {
        return; // Without timestamps nothing is chosen.
    }
    store_large_tiles(&files);
    let on = open(&options(folder.path()));
    assert!(uses_large_tiles(&compile(&on)));
    assert_eq!(tuning(&on).measured, 0);

    let before = fs::read(files.last().unwrap()).unwrap();
    let off = open(&options(folder.path()).autotune(false));
    assert!(!uses_large_tiles(&compile(&off)));
    assert_eq!(off.report().tuning, None);
    product(&off);
    drop(off);
    assert!(fs::read(files.last().unwrap()).unwrap() == before);

    // A candidate of another version: measured again.
    reseal(files.last().unwrap(), |_, payload| {
        let text = String::from_utf8(payload.clone()).unwrap();
        *payload = text.replace("128x128x8 16x8", "7x7x7 1x1").into_bytes();
    });
    let gpu = open(&options(folder.path()));
    assert_eq!(product(&gpu).len(), bits.len());
    assert_eq!((tuning(&gpu).hits, tuning(&gpu).measured), (0, 1));
}

#[test]
fn without_a_folder_nothing_is_kept() {
    // An empty path is no folder, even where the environment names one.
    let gpu = open(&options(Path::new("")));
    let bits = product(&gpu);
    assert_eq!(product(&gpu), bits);
    gpu.save_caches();
    assert_eq!(caches(&gpu), CacheStats::default());
    let stats = tuning(&gpu);
    assert_eq!(stats.hits, stats.measured, "choices are kept in memory");
}

#[test]
fn without_timestamps_the_built_in_rules_choose() {
    let folder = tempfile::tempdir().unwrap();
    let gpu = open(&options(folder.path()).baseline(true));
    let untuned = open(&options(Path::new("")).baseline(true).autotune(false));
    assert_eq!(product(&gpu), product(&untuned));
    assert_eq!(tuning(&gpu), TuningStats::default());
    drop(gpu);
    assert!(files(folder.path()).is_empty());
}

#[test]
fn damaged_files_are_ignored_and_replaced() {
    let (folder, files, bits) = filled();
    let good: Vec<Vec<u8>> = files.iter().map(|file| fs::read(file).unwrap()).collect();
    let refused = || {
        let gpu = open(&options(folder.path()));
        let stats = caches(&gpu);
        assert_eq!((stats.ignored, stats.loaded_bytes), (files.len() as u64, 0));
    };
    let Some(shortest) = good.iter().map(Vec::len).min() else {
        return; // The adapter has nothing to keep.
    };
    for length in [0, 1, 3, 4, 7, 8, 20, 24, 60, shortest - 8, shortest - 1] {
        for (file, good) in files.iter().zip(&good) {
            fs::write(file, &good[..length]).unwrap();
        }
        refused();
    }
    for at in [0, 5, 8, 15, 16, 23, 24, 50, shortest / 2, shortest - 1] {
        for (file, good) in files.iter().zip(&good) {
            let mut damaged = good.clone();
            damaged[at] ^= 0x10;
            fs::write(file, damaged).unwrap();
        }
        refused();
    }

    // The last of those devices has replaced the pipelines already.
    for (file, good) in files.iter().zip(&good) {
        fs::write(file, &good[1..]).unwrap();
    }
    let gpu = open(&options(folder.path()));
    assert_eq!(caches(&gpu).ignored, files.len() as u64);
    product(&gpu);
    drop(gpu);
    let gpu = open(&options(folder.path()));
    assert_eq!(caches(&gpu).ignored, 0, "replaced by good ones");
    assert_eq!(product(&gpu).len(), bits.len());
}

#[test]
fn foreign_files_are_ignored() {
    let changes: [fn(&mut String, &mut Vec<u8>); 3] = [
        // Another adapter, another version of this crate.
        |key, _| *key = key.replacen('\n', "\nother ", 1),
        |key, _| key.push_str(".1"),
        // A checksum that fits content that does not: neither JSON nor what wgpu writes.
        |_, payload| *payload = b"content".to_vec(),
    ];
    for change in changes {
        let (folder, files, _) = filled();
        for file in &files {
            reseal(file, change);
        }
        let gpu = open(&options(folder.path()));
        let stats = caches(&gpu);
        assert_eq!((stats.ignored, stats.loaded_bytes), (files.len() as u64, 0));
        product(&gpu);
        assert_eq!(tuning(&gpu).hits, 0);
        assert_eq!(gpu.report().uncaptured_errors, 0);
    }

    // Each under the other's name.
    let (folder, files, _) = filled();
    if let [pipelines, tuning] = files.as_slice() {
        let other = fs::read(pipelines).unwrap();
        fs::rename(tuning, pipelines).unwrap();
        fs::write(tuning, other).unwrap();
        let gpu = open(&options(folder.path()));
        assert_eq!(caches(&gpu).ignored, 2);
    }
}

#[test]
fn a_folder_that_cannot_be_made_is_ignored() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "content").unwrap();
    for impossible in [file.clone(), file.join("folder"), PathBuf::from("a\0b")] {
        let gpu = open(&options(&impossible));
        product(&gpu);
        gpu.save_caches();
        let stats = caches(&gpu);
        assert_eq!((stats.saved, stats.loaded_bytes), (0, 0), "{impossible:?}");
        assert!(
            stats.ignored >= expected_files(&gpu).len() as u64,
            "{impossible:?}"
        );
    }
    assert_eq!(fs::read(file).unwrap(), b"content");
}

#[test]
fn a_folder_in_place_of_a_file_is_ignored() {
    let (folder, files, bits) = filled();
    for file in &files {
        fs::remove_file(file).unwrap();
        fs::create_dir(file).unwrap();
    }
    let gpu = open(&options(folder.path()));
    assert_eq!(product(&gpu).len(), bits.len());
    gpu.save_caches();
    let stats = caches(&gpu);
    assert_eq!((stats.saved, stats.ignored), (0, 2 * files.len() as u64));
    assert!(files.iter().all(|file| file.is_dir()));
}

/// Opening a pipe would wait for its other end.
#[cfg(unix)]
#[test]
fn a_pipe_in_place_of_a_file_is_ignored() {
    let (folder, files, bits) = filled();
    for file in &files {
        fs::remove_file(file).unwrap();
        assert!(
            std::process::Command::new("mkfifo")
                .arg(file)
                .status()
                .unwrap()
                .success()
        );
    }
    let gpu = open(&options(folder.path()));
    assert_eq!(product(&gpu).len(), bits.len());
    gpu.save_caches();
    let stats = caches(&gpu);
    assert_eq!((stats.saved, stats.ignored), (0, 2 * files.len() as u64));
    assert!(files.iter().all(|file| file.exists() && !file.is_file()));
}

#[cfg(unix)]
#[test]
fn a_read_only_folder_is_read() {
    use std::os::unix::fs::PermissionsExt;
    let (folder, made, bits) = filled();
    let access = |mode| fs::set_permissions(folder.path(), fs::Permissions::from_mode(mode));
    let last = made.last().map(|file| (file, fs::read(file).unwrap()));
    access(0o555).unwrap();
    let gpu = open(&options(folder.path()));
    assert_eq!(product(&gpu), bits);
    assert_eq!(caches(&gpu).ignored, 0);
    gpu.save_caches();
    drop(gpu);
    if let Some((file, content)) = last {
        assert!(fs::read(file).unwrap() == content);
    }
    // Nothing could be written but by an administrator, whom permissions do not stop.
    assert_eq!(files(folder.path()), made);
    access(0o755).unwrap();
}

#[test]
fn threads_that_need_one_choice_measure_once() {
    let gpu = open(&options(Path::new("")));
    let bits: Vec<Vec<u32>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..3).map(|_| scope.spawn(|| product(&gpu))).collect();
        let results = threads.into_iter().map(|thread| thread.join().unwrap());
        results.collect()
    });
    assert!(bits.iter().all(|other| *other == bits[0]));
    let measured = measurable(&gpu);
    assert_eq!(
        (tuning(&gpu).measured, tuning(&gpu).hits),
        (measured, 2 * measured)
    );
}

/// Where a second process writes the bits that it computed; other runs of this test do nothing.
const RESULT_VARIABLE: &str = "ENERGYFLOW_TEST_RESULT";

/// What a second process does: everything by the environment.
#[test]
fn second_process() {
    let Some(path) = std::env::var_os(RESULT_VARIABLE) else {
        return;
    };
    let gpu = open(&GpuOptions::from_env().unwrap().barrier_free(false));
    let bits = product(&gpu);
    let tuning = gpu.report().tuning.unwrap_or_default();
    let result = (
        bits,
        tuning.measured,
        tuning.hits,
        gpu.report().tuning.is_some(),
    );
    drop(gpu);
    fs::write(path, serde_json::to_vec(&result).unwrap()).unwrap();
}

fn start(folder: &Path, autotune: &str, result: &Path) -> Child {
    itself::command()
        .args(["--exact", "second_process"])
        .env("ENERGYFLOW_CACHE_DIR", folder)
        .env("ENERGYFLOW_AUTOTUNE", autotune)
        .env(RESULT_VARIABLE, result)
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap()
}

type Outcome = (Vec<u32>, u64, u64, bool);

fn finish(mut child: Child, result: &Path) -> Outcome {
    assert!(child.wait().unwrap().success());
    serde_json::from_slice(&fs::read(result).unwrap()).unwrap()
}

#[test]
fn eight_processes_share_a_folder() {
    let results = tempfile::tempdir().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let paths: [_; 8] = std::array::from_fn(|i| results.path().join(i.to_string()));
    let children = paths.each_ref().map(|path| start(folder.path(), "1", path));
    let mut outcomes = Vec::new();
    for (child, path) in children.into_iter().zip(&paths) {
        outcomes.push(finish(child, path));
    }
    let (_, measured, hits, on) = &outcomes[0];
    assert!(on);
    let timestamps = measured + hits == 1;

    // The last one's files are whole, and what they say is what it used.
    let (bits, measured, hits, _) = finish(start(folder.path(), "1", &paths[0]), &paths[0]);
    assert_eq!((measured, hits), (0, u64::from(timestamps)));
    assert!(outcomes.iter().any(|outcome| outcome.0 == bits));
    let gpu = open(&options(folder.path()));
    assert_eq!(kinds(folder.path()), expected_files(&gpu));
    assert_eq!(caches(&gpu).ignored, 0);
    assert_eq!(product(&gpu), bits);
    assert_eq!(tuning(&gpu).measured, 0);
}

#[test]
fn the_environment_turns_both_off_again() {
    let results = tempfile::tempdir().unwrap();
    let path = results.path().join("off");
    for autotune in ["", "0"] {
        let (_, measured, hits, on) = finish(start(Path::new(""), autotune, &path), &path);
        assert_eq!((measured, hits, on), (0, 0, false));
    }
}
