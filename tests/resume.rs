//! Checkpoints: the same trajectory with and without a stop, damaged and foreign files refused.

mod common;

use std::fs;

use common::gpu;
use common::toy::{self, Data, Toy, bits};
use energyflow::graph::{Graph, Init};
use energyflow::runtime::Session;
use energyflow::train::{AdamW, Checkpoint, LossScale, Schedule};
use energyflow::types::DType;
use energyflow::{Error, Executable};
use std::sync::Arc;

const ROWS: usize = 7;
const STEPS: u64 = 200;

fn optimizer() -> AdamW {
    AdamW::default()
        .schedule(Schedule::WarmupCosine {
            peak: 0.02,
            end: 0.001,
            warmup: 20,
            total: 180,
        })
        .clip(Some(1.0))
        // So that steps are skipped, and the scale moves, on both sides of the stop.
        .loss_scale(Some(LossScale::default().start(16_777_216.0).interval(15)))
}

/// A session with a training step compiled.
struct Training {
    toy: Toy,
    session: Session,
    step: Arc<Executable>,
}

impl Training {
    fn new(dtype: DType, seed: u64) -> Self {
        let toy = Toy::step(ROWS, dtype, &optimizer());
        let mut session = Session::new(&gpu(), seed);
        let step = session.compile(&toy.graph).unwrap();
        Self { toy, session, step }
    }

    fn data(&self, number: u64) -> Data {
        let mut data = self.toy.data(number, 1 + number as usize % ROWS);
        if [57, 58, 140].contains(&number) {
            data.inject("into first.bias", f32::NAN);
        }
        data
    }

    /// Bits of the losses.
    fn run(&self, steps: std::ops::Range<u64>) -> Vec<u32> {
        let pending: Vec<_> = steps.map(|n| self.data(n).submit(&self.step)).collect();
        let outputs = pending.into_iter().map(|run| run.wait().unwrap());
        outputs
            .map(|out| out.scalar("loss").unwrap().to_bits())
            .collect()
    }

    fn result(&self) -> (Vec<(String, Vec<u32>)>, Checkpoint) {
        (
            bits(&self.session),
            Checkpoint::from_session(&self.session).unwrap(),
        )
    }
}

#[test]
fn two_runs_and_a_resumed_one_are_the_same_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("training.safetensors");
    for dtype in [DType::F32, DType::F16] {
        let whole = Training::new(dtype, 1);
        let losses = whole.run(0..STEPS);
        let expected = whole.result();
        let skipped = whole.session.get("train.skipped").unwrap()[0];
        assert!((3.0..100.0).contains(&skipped), "{dtype}: {skipped}");

        let first = Training::new(dtype, 1);
        let mut again = first.run(0..STEPS / 2);
        let mut checkpoint = Checkpoint::from_session(&first.session).unwrap();
        checkpoint.metadata = format!("{{\"step\": {}}}", STEPS / 2);
        checkpoint.save(&path).unwrap();
        again.extend(first.run(STEPS / 2..STEPS));
        assert!(again == losses, "{dtype} is not reproducible");
        assert!(first.result() == expected, "{dtype} is not reproducible");

        // Another seed: everything comes from the file. The step has run, so that its f16 copies are out of date.
        let mut second = Training::new(dtype, 2);
        second.run(0..3);
        let loaded = Checkpoint::load(&path).unwrap();
        assert_eq!(loaded.metadata, "{\"step\": 100}");
        assert!(loaded == checkpoint, "a file is exact");
        loaded.apply(&mut second.session).unwrap();
        let copies = second.session.stats().shadow_refreshes;
        let rest = second.run(STEPS / 2..STEPS);
        let copies = second.session.stats().shadow_refreshes - copies;
        let expected_copies = u64::from(dtype == DType::F16);
        assert_eq!(copies, expected_copies, "f16 copies are made anew once");
        assert!(rest == losses[STEPS as usize / 2..], "{dtype}: losses");
        assert!(
            second.result() == expected,
            "{dtype}: weights, moments, states"
        );

        let other = folder.path().join("again.safetensors");
        loaded.save(&other).unwrap();
        assert!(fs::read(&path).unwrap() == fs::read(&other).unwrap());
    }
}

/// A session with an optimizer step on one parameter, which has taps, so that its order on the host is another.
fn small(name: &str, shape: [usize; 3], state: Option<&str>) -> Session {
    let mut graph = Graph::new();
    let p = graph
        .conv_parameter(name, shape, Init::Uniform(1.0))
        .unwrap();
    let square = graph.mul(p, p).unwrap();
    let loss = graph.sum_all(square).unwrap();
    AdamW::default().step(&mut graph, loss, &[p]).unwrap();
    if let Some(state) = state {
        let state = graph.state(state, &[1], 1.0).unwrap();
        let next = graph.affine(state, 2.0, 0.0).unwrap();
        graph.assign(state, next).unwrap();
    }
    let mut session = Session::new(&gpu(), 1);
    let step = session.compile(&graph).unwrap();
    step.run(&[]).unwrap().wait().unwrap();
    session
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let saved = small("weight", [2, 3, 2], Some("draws"));
    let checkpoint = Checkpoint::from_session(&saved).unwrap();
    let mut fits = small("weight", [2, 3, 2], Some("draws"));
    checkpoint.apply(&mut fits).unwrap();
    for (mut other, culprit) in [
        (small("weight", [3, 2, 2], Some("draws")), "weight"),
        (small("weight", [2, 2, 3], Some("draws")), "weight"),
        (small("bias", [2, 3, 2], Some("draws")), "bias"),
        (small("weight", [2, 3, 2], Some("counter")), "counter"),
        (small("weight", [2, 3, 2], None), "draws"),
    ] {
        let before = Checkpoint::from_session(&other).unwrap();
        let error = checkpoint.apply(&mut other).unwrap_err();
        assert!(
            matches!(&error, Error::Data { name, .. } if name == culprit),
            "{error}"
        );
        assert!(
            Checkpoint::from_session(&other).unwrap() == before,
            "{culprit}"
        );
    }
    // A graph that does not train has no moments to put.
    let mut graph = Graph::new();
    let p = graph
        .conv_parameter("weight", [2, 3, 2], Init::Constant(0.0))
        .unwrap();
    graph.output("weight", p).unwrap();
    let mut session = Session::new(&gpu(), 1);
    session.compile(&graph).unwrap();
    assert!(session.moments("weight").unwrap().is_none());
    assert!(matches!(
        session.moments("nothing"),
        Err(Error::Data { .. })
    ));
    let error = checkpoint.apply(&mut session).unwrap_err();
    assert!(
        matches!(&error, Error::Data { name, .. } if name == "weight"),
        "{error}"
    );
    assert_eq!(session.get("weight").unwrap(), [0.0; 12]);
    assert!(session.set_moments("weight", [&[0.0; 12]; 2]).is_err());
}

#[test]
fn moments_are_read_and_written_in_host_order() {
    let mut session = small("weight", [2, 3, 2], None);
    let weight = small("weight", [2, 3, 2], None).get("weight").unwrap();
    assert_eq!(session.get("weight").unwrap(), weight);
    // One step from zero: m = 0.1·g and v = 0.001·g², with twice the parameter before the step as g.
    let [m, v] = session.moments("weight").unwrap().unwrap();
    for ((m, v), w) in m.iter().zip(&v).zip(&weight) {
        assert_eq!(m.signum(), w.signum());
        assert!((m - 0.2 * w).abs() < 1e-3, "{m} {w}");
        assert!((0.1 * m * m - v).abs() <= 1e-4 * v, "{m} {v}");
    }
    let data: Vec<f32> = (0..12).map(|i| i as f32).collect();
    session.set_moments("weight", [&data, &v]).unwrap();
    assert_eq!(session.moments("weight").unwrap(), Some([data, v]));
    for bad in [&[0.0; 11][..], &[f32::NAN; 12]] {
        let error = session.set_moments("weight", [&m, bad]).unwrap_err();
        assert!(matches!(error, Error::Data { .. }));
    }
}

#[test]
fn damaged_files_give_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("training.safetensors");
    let mut checkpoint = Checkpoint::from_session(&small("weight", [2, 3, 2], None)).unwrap();
    checkpoint.metadata = "{\"seed\": 7, \"text\": \"ä\"}".into();
    checkpoint.save(&path).unwrap();
    let good = fs::read(&path).unwrap();
    assert!(Checkpoint::load(&path).unwrap() == checkpoint);
    for end in 0..good.len() {
        fs::write(&path, &good[..end]).unwrap();
        let error = Checkpoint::load(&path).unwrap_err();
        assert!(
            matches!(&error, Error::Format { path: p, .. } if *p == path),
            "{end}: {error}"
        );
    }
    for at in 0..good.len() {
        let mut damaged = good.clone();
        damaged[at] ^= 4;
        fs::write(&path, &damaged).unwrap();
        match Checkpoint::load(&path) {
            Err(Error::Format { .. }) => {}
            // A blank of the header may become another one.
            Ok(same) => assert!(same == checkpoint, "byte {at}"),
            Err(error) => panic!("byte {at}: {error}"),
        }
    }
    let version = b"\"version\":\"1\"";
    let at = good.windows(version.len()).position(|w| w == version);
    let mut newer = good.clone();
    newer[at.unwrap() + version.len() - 2] = b'2';
    fs::write(&path, newer).unwrap();
    let error = Checkpoint::load(&path).unwrap_err();
    assert!(
        matches!(&error, Error::Format { reason, .. } if reason.contains("checkpoint format 2") && reason.contains("update energyflow")),
        "{error}"
    );
    let missing = Checkpoint::load(folder.path().join("missing")).unwrap_err();
    assert!(matches!(missing, Error::Io { .. }));
    let nowhere = checkpoint.save(folder.path().join("no/such/folder"));
    assert!(matches!(nowhere, Err(Error::Io { .. })));
}

#[test]
fn a_step_half_accumulated_is_not_saved() {
    let optimizer = optimizer();
    let toy = Toy::accumulation(ROWS, DType::F32, &optimizer);
    let mut session = Session::new(&gpu(), 1);
    let accumulate = session.compile(&toy.graph).unwrap();
    let update = session.compile(&toy::update(&optimizer)).unwrap();
    let step = |n: u64| {
        for part in 0..2 {
            toy.data(2 * n + part, ROWS).run(&accumulate);
        }
        update.run(&[]).unwrap().wait().unwrap();
    };
    step(0);
    let checkpoint = Checkpoint::from_session(&session).unwrap();
    step(1);
    let expected = bits(&session);
    toy.data(9, ROWS).run(&accumulate);
    let error = Checkpoint::from_session(&session).unwrap_err();
    assert!(
        matches!(&error, Error::Data { name, .. } if name == "train.accumulated_weight"),
        "{error}"
    );
    checkpoint.apply(&mut session).unwrap();
    step(1);
    assert!(
        bits(&session) == expected,
        "what was accumulated is forgotten"
    );
}
