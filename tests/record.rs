//! Logs of a training that is interrupted and resumed.

use std::path::Path;

use energyflow::Error;
use energyflow::train::record::{Curves, JsonLinesLog, Recorder, TensorBoard, read_json_lines};
use tempfile::TempDir;

fn steps(path: &Path) -> Vec<(u64, String, f64)> {
    let mut all = Vec::new();
    read_json_lines(path, |step, name, value| {
        all.push((step, name.into(), value))
    })
    .unwrap();
    all
}

#[test]
fn a_resumed_log_continues_without_duplicates() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("metrics.jsonl");
    let mut whole = JsonLinesLog::create(&path).unwrap();
    for step in 1..=6 {
        whole
            .scalars(
                step,
                &[("train/loss", 1.0 / step as f64), ("ört \"x\"", 0.1)],
            )
            .unwrap();
        if step == 4 {
            whole
                .scalars(step, &[("validation/loss", f64::NAN)])
                .unwrap();
        }
    }
    whole.flush().unwrap();
    let expected = std::fs::read_to_string(&path).unwrap();
    assert!(
        expected.starts_with("{\"step\":1,\"train/loss\":1.0,\"ört \\\"x\\\"\":0.1}\n"),
        "{expected}"
    );
    assert!(expected.contains("{\"step\":4,\"validation/loss\":null}\n"));
    drop(whole);
    let all = steps(&path);
    assert_eq!(all.len(), 13);
    assert!(all[8].0 == 4 && all[8].2.is_nan());

    // Killed after step 6 with a line cut off; the checkpoint is of step 3.
    for cut in ["", "{\"step\":7,\"tra", "{\"step\":7}"] {
        std::fs::write(&path, expected.clone() + cut).unwrap();
        let mut resumed = JsonLinesLog::resume(&path, 3).unwrap();
        assert_eq!(steps(&path).len(), 6);
        for step in 4..=6 {
            resumed
                .scalars(
                    step,
                    &[("train/loss", 1.0 / step as f64), ("ört \"x\"", 0.1)],
                )
                .unwrap();
            if step == 4 {
                resumed
                    .scalars(step, &[("validation/loss", f64::NAN)])
                    .unwrap();
            }
        }
        drop(resumed);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), expected);
    }
    // After the last step, a line without its end is removed all the same.
    std::fs::write(&path, expected.clone() + "{\"step\":5}").unwrap();
    drop(JsonLinesLog::resume(&path, u64::MAX).unwrap());
    assert_eq!(std::fs::read_to_string(&path).unwrap(), expected);
    drop(JsonLinesLog::resume(&path, 0).unwrap());
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
    let new = folder.path().join("new.jsonl");
    drop(JsonLinesLog::resume(&new, 5).unwrap());
    assert!(new.exists());
}

#[test]
fn a_file_that_is_no_log_stays_as_it_is() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("file");
    for (content, line, offset) in [
        ("{\"step\":1}\nnotes\n", "line 2: ", 11),
        ("{\"step\":1}\n\n{\"loss\":1}\n", "line 3: ", 12),
        ("{\"step\":1,\"text\":\"a\"}\n", "line 1: ", 0),
        ("{\"step\":-1}\n", "line 1: ", 0),
        ("[1]\n", "line 1: ", 0),
    ] {
        std::fs::write(&path, content).unwrap();
        match JsonLinesLog::resume(&path, 9) {
            Err(Error::Format {
                offset: found,
                reason,
                ..
            }) => {
                assert!(reason.starts_with(line), "{reason}");
                assert_eq!(found, offset, "{reason}");
            }
            other => panic!("{content:?}: {other:?}"),
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), content);
    }
    let error = JsonLinesLog::create(folder.path()).unwrap_err();
    assert!(matches!(error, Error::Io { .. }));
    let mut log = JsonLinesLog::create(&path).unwrap();
    assert!(matches!(
        log.scalars(1, &[("step", 1.0)]),
        Err(Error::Data { .. })
    ));
}

#[test]
fn curves_continue_from_a_log() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("metrics.jsonl");
    let mut log = JsonLinesLog::create(&path).unwrap();
    for step in 1..=3 {
        log.scalars(step, &[("loss", step as f64)]).unwrap();
    }
    drop(log);
    let mut curves = Curves::new();
    curves.read(&path).unwrap();
    curves.scalars(4, &[("loss", 4.0)]).unwrap();
    assert_eq!(
        curves.points("loss").unwrap(),
        [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0), (4.0, 4.0)]
    );
}

/// Writes event files of an interrupted and a resumed run for `scripts/check-tensorboard`, which reads them with the Python package.
#[test]
#[ignore = "needs the environment variable EVENTS, see scripts/check-tensorboard"]
fn write_events() {
    let folder = std::env::var("EVENTS").unwrap();
    let mut board = TensorBoard::create(&folder).unwrap();
    for step in 0..300_u64 {
        let loss = 1.0 / (1.0 + step as f64);
        board
            .scalars(step, &[("train/loss", loss), ("train/räte", 1e-3)])
            .unwrap();
    }
    board.scalars(300, &[("train/loss", f64::NAN)]).unwrap();
    drop(board);
    let mut board = TensorBoard::resume(&folder, 199).unwrap();
    for step in 200..400_u64 {
        board
            .scalars(step, &[("train/loss", 2.0 + step as f64)])
            .unwrap();
    }
}

/// Draws what a training of an hour looks like, to be looked at: `CURVES=curves.svg cargo test --test record -- --ignored draw`.
#[test]
#[cfg(feature = "plot")]
#[ignore = "writes a picture to the file that CURVES names"]
fn draw_curves() {
    let mut curves = Curves::new();
    for step in 1..=20_000_u64 {
        let t = step as f64;
        let noise = (t * 12.9898).sin() * (t * 78.233).cos() * 0.2;
        let loss = 0.3 + 2.0 * (-t / 3000.0).exp() * (1.0 + noise) + 0.05 * noise;
        let cosine = 0.9 * (1.0 - (-t / 2500.0).exp()) + 0.04 * noise;
        let rate = 3e-4 * (t / 500.0).min(1.0);
        curves
            .scalars(
                step,
                &[
                    ("train/loss", loss),
                    ("train/cosine", cosine),
                    ("learning_rate", rate),
                ],
            )
            .unwrap();
        if step % 1000 == 0 {
            let scalars = [
                ("validation/loss", loss + 0.12),
                ("validation/cosine", cosine - 0.03),
            ];
            curves.scalars(step, &scalars).unwrap();
        }
    }
    curves.draw_svg(std::env::var("CURVES").unwrap()).unwrap();
}
