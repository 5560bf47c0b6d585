//! Files: what is no regular file is refused, what is saved is there whole, dead writers leave nothing for long, newer versions are
//! named.

#[path = "common/itself.rs"]
mod itself;

use std::fs;
use std::path::Path;

use energyflow::Error;
use energyflow::text::Dataset;
use energyflow::train::{Checkpoint, WeightType, Weights};
use tempfile::TempDir;

/// A safetensors file of f32 tensors.
fn tensors(metadata: &[(&str, &str)], tensors: &[(&str, &str, Vec<u8>)]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let metadata = metadata
        .iter()
        .map(|&(key, value)| (key.to_owned(), value.into()));
    header.insert(
        "__metadata__".into(),
        serde_json::Value::Object(metadata.collect()),
    );
    let mut data = Vec::new();
    for (name, dtype, bytes) in tensors {
        let size = match *dtype {
            "I64" | "F64" => 8,
            "F8_E4M3" => 1,
            "F32" => 4,
            _ => 2,
        };
        let offsets = [data.len(), data.len() + bytes.len()];
        data.extend(bytes);
        let info = serde_json::json!({
            "dtype": dtype, "shape": [bytes.len() / size], "data_offsets": offsets
        });
        header.insert((*name).into(), info);
    }
    let header = serde_json::to_vec(&header).unwrap();
    let length = (header.len() as u64).to_le_bytes();
    [&length[..], &header, &data].concat()
}

fn words(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

/// Weights of one parameter, without a device.
fn weights(folder: &Path, values: &[f32]) -> Weights {
    let path = folder.join("source.safetensors");
    fs::write(&path, tensors(&[], &[("weight", "F32", words(values))])).unwrap();
    let weights = Weights::load(&path).unwrap();
    fs::remove_file(path).unwrap();
    weights
}

fn reason<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
    match result {
        Err(Error::Format { reason, .. }) => reason,
        other => panic!("expected a format error, got {other:?}"),
    }
}

#[test]
fn tensors_of_other_types_are_skipped_and_named() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("pytorch.safetensors");
    let half = half::bf16::from_f32(-1.5).to_le_bytes().to_vec();
    let file = tensors(
        &[("format", "pt")],
        &[
            (
                "norm.num_batches_tracked",
                "I64",
                vec![7, 0, 0, 0, 0, 0, 0, 0],
            ),
            ("norm.weight", "F32", words(&[0.5, 2.0])),
            ("norm.bias", "BF16", half),
            ("double", "F64", (-0.25_f64).to_le_bytes().to_vec()),
            ("tiny", "F8_E4M3", vec![0; 2]),
        ],
    );
    fs::write(&path, file).unwrap();
    let weights = Weights::load(&path).unwrap();
    let names: Vec<&str> = weights.names().collect();
    assert_eq!(names, ["double", "norm.bias", "norm.weight"]);
    assert_eq!(weights.get("double").unwrap().1, [-0.25]);
    assert_eq!(weights.get("norm.bias").unwrap().1, [-1.5]);
    assert_eq!(weights.get("norm.weight").unwrap().1, [0.5, 2.0]);
    let skipped: Vec<_> = weights.skipped().collect();
    let expected = [("norm.num_batches_tracked", "I64"), ("tiny", "F8_E4M3")];
    assert_eq!(skipped, expected);
}

#[test]
fn newer_versions_and_other_kinds_say_what_to_do() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("file");
    let write = |format: &str, version: &str| {
        let metadata = [("format", format), ("version", version)];
        fs::write(&path, tensors(&metadata, &[])).unwrap();
    };
    write("energyflow.weights", "3");
    let text = reason(Weights::load(&path));
    assert!(
        text.contains("weights format 3") && text.contains("update energyflow"),
        "{text}"
    );
    write("energyflow.checkpoint", "12");
    let text = reason(Checkpoint::load(&path));
    assert!(
        text.contains("checkpoint format 12") && text.contains("update energyflow"),
        "{text}"
    );
    write("energyflow.dataset", "2");
    let text = reason(Dataset::open(&path));
    assert!(
        text.contains("dataset format 2") && text.contains("update energyflow"),
        "{text}"
    );
    for version in ["0", "-1", "", "1.5", "99999999999"] {
        write("energyflow.weights", version);
        let text = reason(Weights::load(&path));
        assert!(text.contains(&format!("{version:?}")), "{text}");
    }
    write("energyflow.checkpoint", "1");
    let text = reason(Weights::load(&path));
    assert!(
        text.contains("checkpoint") && text.contains("weights"),
        "{text}"
    );
    write("pt", "1");
    assert!(Weights::load(&path).is_ok(), "somebody else's version");
    assert!(reason(Checkpoint::load(&path)).contains("no checkpoint"));
}

#[test]
fn weight_files_carry_their_version_and_any_description() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("out");
    let mut weights = weights(folder.path(), &[1.0]);
    weights.description = "\"\\\n ü".into();
    weights.save(&path, WeightType::F16).unwrap();
    let first = fs::read(&path).unwrap();
    weights.save(&path, WeightType::F16).unwrap();
    assert!(
        fs::read(&path).unwrap() == first,
        "equal content, equal files"
    );
    let text = String::from_utf8_lossy(&first);
    assert!(text.contains(r#""format":"energyflow.weights""#), "{text}");
    assert!(text.contains(r#""version":"1""#), "{text}");
    assert_eq!(Weights::load(&path).unwrap(), weights);
}

#[cfg(unix)]
mod unix {
    use std::io::{BufRead, BufReader};
    use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
    use std::os::unix::net::UnixListener;
    use std::path::PathBuf;
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use energyflow::text::{DatasetWriter, Efb1Writer, EmbeddingType, JsonLines};

    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// Fails instead of waiting for ever.
    fn soon<T: Send + 'static>(what: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || sender.send(work()));
        let result = receiver.recv_timeout(Duration::from_secs(20));
        result.unwrap_or_else(|_| panic!("{what} does not return"))
    }

    fn fifo(path: &Path) {
        assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
    }

    /// Whatever is no regular file, made in a folder or of the system.
    fn special(folder: &Path) -> Vec<PathBuf> {
        let at = |name: &str| folder.join(name);
        fifo(&at("fifo"));
        symlink("fifo", at("link to fifo")).unwrap();
        symlink("/dev/zero", at("link to zero")).unwrap();
        UnixListener::bind(at("socket")).unwrap();
        fs::create_dir(at("folder")).unwrap();
        symlink("folder", at("link to folder")).unwrap();
        [
            "fifo",
            "link to fifo",
            "link to zero",
            "socket",
            "folder",
            "link to folder",
        ]
        .map(at)
        .to_vec()
    }

    #[test]
    fn special_files_are_not_read() {
        let folder = TempDir::new().unwrap();
        let mut paths = special(folder.path());
        paths.extend(["/dev/zero", "/dev/null", "/dev/random"].map(PathBuf::from));
        type Load = fn(&Path) -> Result<(), Error>;
        let loaders: [(&str, Load); 5] = [
            ("weights", |path| Weights::load(path).map(drop)),
            ("checkpoint", |path| Checkpoint::load(path).map(drop)),
            ("dataset", |path| Dataset::open(path).map(drop)),
            ("JSON lines", |path| JsonLines::open(path).map(drop)),
            #[cfg(feature = "tokenizer")]
            ("tokenizer", |path| {
                energyflow::text::WordPiece::from_file(path, 8).map(drop)
            }),
            #[cfg(not(feature = "tokenizer"))]
            ("dataset", |path| Dataset::open(path).map(drop)),
        ];
        for path in paths {
            for (what, load) in loaders {
                let named = path.clone();
                let what = format!("{what} from {}", path.display());
                let error = soon(&what, move || load(&named)).unwrap_err();
                let text = error.to_string();
                assert!(
                    matches!(&error, Error::Io { path: named, .. } if *named == path),
                    "{what}: {text}"
                );
                let word = match path.is_dir() {
                    true => "is a directory",
                    false => "is not a regular file",
                };
                assert!(text.contains(word), "{what}: {text}");
            }
        }
    }

    #[test]
    fn special_files_are_not_replaced() {
        let folder = TempDir::new().unwrap();
        let weights = weights(folder.path(), &[1.0]);
        let paths = special(folder.path());
        let before = names(folder.path());
        for path in &paths {
            let kind = fs::symlink_metadata(path).unwrap().file_type();
            for (what, result) in [
                ("weights", weights.save(path, WeightType::F32)),
                ("checkpoint", Checkpoint::default().save(path)),
                ("EFB1", Efb1Writer::create(path, 1).map(drop)),
                (
                    "dataset",
                    DatasetWriter::create(path, 1, EmbeddingType::F16).map(drop),
                ),
            ] {
                let error = result.unwrap_err();
                assert!(
                    matches!(&error, Error::Io { path: named, .. } if named == path),
                    "{what}: {error}"
                );
            }
            assert_eq!(fs::symlink_metadata(path).unwrap().file_type(), kind);
        }
        assert!(fs::metadata(&paths[0]).unwrap().file_type().is_fifo());
        assert_eq!(names(folder.path()), before, "and no temporary file");
    }

    #[test]
    fn links_stay_and_their_targets_are_written() {
        let folder = TempDir::new().unwrap();
        let at = |name: &str| folder.path().join(name);
        let weights = weights(folder.path(), &[1.0, 2.0]);
        fs::create_dir(at("data")).unwrap();
        fs::write(at("data/target"), "old").unwrap();
        symlink("data/target", at("relative")).unwrap();
        symlink(at("relative"), at("chain")).unwrap();
        symlink("data/new", at("dangling")).unwrap();
        symlink("missing/new", at("nowhere")).unwrap();
        symlink("loop", at("loop")).unwrap();
        for (link, target) in [
            ("relative", "data/target"),
            ("chain", "data/target"),
            ("dangling", "data/new"),
        ] {
            weights.save(at(link), WeightType::F32).unwrap();
            assert!(at(link).is_symlink(), "{link}");
            assert!(!at(target).is_symlink());
            assert_eq!(Weights::load(at(target)).unwrap(), weights, "{link}");
            fs::write(at(target), "old").unwrap();
        }
        for link in ["nowhere", "loop"] {
            let error = weights.save(at(link), WeightType::F32).unwrap_err();
            assert!(matches!(&error, Error::Io { .. }), "{link}: {error}");
            assert!(at(link).is_symlink());
        }
        assert_eq!(names(&at("data")), ["new", "target"], "no temporary file");
    }

    #[test]
    fn a_file_that_is_replaced_passes_on_its_permissions() {
        let folder = TempDir::new().unwrap();
        let weights = weights(folder.path(), &[1.0]);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        let path = folder.path().join("file");
        for wanted in [0o644, 0o600, 0o640, 0o666, 0o444, 0o755] {
            fs::write(&path, "old").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(wanted)).unwrap();
            weights.save(&path, WeightType::F32).unwrap();
            assert_eq!(mode(&path), wanted, "{wanted:o}");
            fs::remove_file(&path).unwrap();
        }
        // A new file is as any other that this process makes.
        let ordinary = folder.path().join("ordinary");
        fs::write(&ordinary, "").unwrap();
        weights.save(&path, WeightType::F32).unwrap();
        assert_eq!(mode(&path), mode(&ordinary));
    }

    /// Where the process that is to be killed saves; other runs of its test do nothing.
    const TARGET: &str = "ENERGYFLOW_TEST_TARGET";
    const READY: &str = "it has saved once";

    /// 0.8 MB.
    fn large(folder: &Path) -> Weights {
        weights(folder, &vec![0.25; 200_000])
    }

    #[test]
    fn process_that_saves_for_ever() {
        let Some(target) = std::env::var_os(TARGET) else {
            return;
        };
        let target = PathBuf::from(target);
        let own = TempDir::new().unwrap();
        let weights = large(own.path());
        drop(own);
        weights.save(&target, WeightType::F32).unwrap();
        println!("\n{READY}");
        // Not for ever, in case that nobody kills it.
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(60) {
            weights.save(&target, WeightType::F32).unwrap();
        }
    }

    #[test]
    fn killed_writers_leave_nothing_behind_for_long() {
        let folder = TempDir::new().unwrap();
        let own = TempDir::new().unwrap();
        let expected = large(own.path());
        let target = folder.path().join("weights.safetensors");
        let mut left = 0;
        for round in 0..50 {
            let mut child = itself::command()
                .args([
                    "--exact",
                    "unix::process_that_saves_for_ever",
                    "--nocapture",
                ])
                .env(TARGET, &target)
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let lines = BufReader::new(child.stdout.take().unwrap()).lines();
            let ready = lines.map_while(Result::ok).any(|line| line == READY);
            assert!(ready, "round {round}");
            std::thread::sleep(Duration::from_micros(round * 397 % 5000));
            child.kill().unwrap();
            child.wait().unwrap();
            let others = names(folder.path()).len() - 1;
            assert!(others <= 1, "round {round}: {:?}", names(folder.path()));
            left += others;
            assert!(Weights::load(&target).unwrap() == expected, "round {round}");
        }
        assert!(left > 0, "no process was killed while it wrote");
        expected.save(&target, WeightType::F32).unwrap();
        assert_eq!(names(folder.path()), ["weights.safetensors"]);
    }
}
