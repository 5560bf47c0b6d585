//! The loss scaler: skipped steps change nothing, the scale halves, grows and stays within its bounds.

mod common;

use common::gpu;
use common::toy::{ACTIVATIONS, Data, Toy, bits, parameters};
use energyflow::graph::Graph;
use energyflow::nn::Linear;
use energyflow::runtime::{Executable, Host, Session};
use energyflow::train::{AdamW, LossScale, Schedule, StepOutputs};
use energyflow::types::{DType, UnaryOp};
use std::sync::Arc;

const ROWS: usize = 7;
const TYPES: [DType; 2] = [DType::F32, DType::F16];

fn start(dtype: DType, loss_scale: LossScale) -> (Toy, Session, Arc<Executable>) {
    let optimizer = AdamW::default()
        .schedule(Schedule::Constant { rate: 0.01 })
        .clip(Some(1.0))
        .loss_scale(Some(loss_scale));
    let toy = Toy::step(ROWS, dtype, &optimizer);
    let mut session = Session::new(&gpu(), 1);
    let step = session.compile(&toy.graph).unwrap();
    (toy, session, step)
}

/// A run whose gradients are not finite.
fn bad(toy: &Toy) -> Data {
    let mut data = toy.data(0, ROWS);
    data.inject(ACTIVATIONS, f32::NAN);
    data
}

fn scale(session: &Session) -> f32 {
    session.get("train.loss_scale").unwrap()[0]
}

#[test]
fn a_bad_number_anywhere_at_any_step_skips_the_step_whole() {
    for dtype in TYPES {
        let (toy, mut session, step) = start(dtype, LossScale::default());
        let mut skipped = 0.0;
        for (i, (name, _)) in toy.injections.iter().enumerate() {
            for (j, x) in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY]
                .into_iter()
                .enumerate()
            {
                // The first step of all is a bad one, too.
                if i + j > 0 {
                    let good = toy.data((3 * i + j) as u64, ROWS).run(&step);
                    assert!(good.scalar(StepOutputs::GRADIENT_NORM).unwrap().is_finite());
                }
                let states = |s: &Session| {
                    let names = s.parameters().map(|(name, _)| name);
                    let corrections =
                        names.flat_map(|name| s.bias_corrections(name).unwrap().unwrap());
                    let all = corrections.chain(s.get("train.step").unwrap());
                    all.map(f32::to_bits).collect::<Vec<u32>>()
                };
                let before = (bits(&session), states(&session));
                let old = scale(&session);
                let mut data = toy.data(i as u64, ROWS);
                data.inject(name, x);
                let out = data.run(&step);
                skipped += 1.0;
                assert!(!out.scalar(StepOutputs::GRADIENT_NORM).unwrap().is_finite());
                assert_eq!(out.scalar(StepOutputs::SKIPPED).unwrap(), skipped);
                assert!(
                    (bits(&session), states(&session)) == before,
                    "{dtype} {name} {x}"
                );
                assert_eq!(scale(&session), 0.5 * old, "{dtype} {name} {x}");
                session.set("train.loss_scale", &[1024.0]).unwrap();
            }
        }
    }
}

/// NaN in the input of a network of one hidden layer: no activation hides it from the check of the gradients.
#[test]
fn nan_in_an_input_passes_every_activation() {
    let optimizer = AdamW::default()
        .schedule(Schedule::Constant { rate: 0.01 })
        .clip(Some(1.0))
        .loss_scale(Some(LossScale::default()));
    let (min, max) = (-1.0, 1.0);
    for (dtype, op) in [
        (DType::F32, UnaryOp::Tanh),
        (DType::F16, UnaryOp::Tanh),
        (DType::F32, UnaryOp::Relu),
        (DType::F32, UnaryOp::Clamp { min, max }),
    ] {
        let mut graph = Graph::new();
        let g = &mut graph;
        let first = Linear::new(g, "first", 6, 5, true).unwrap();
        let second = Linear::new(g, "second", 5, 3, true).unwrap();
        let x = g.input("x", &[4, 6], dtype).unwrap();
        let target = g.input("target", &[4, 3], DType::F32).unwrap();
        let h = first.forward(g, x).unwrap();
        let h = g.unary(op, h).unwrap();
        let y = second.forward_as(g, h, DType::F32).unwrap();
        let y = g.unary(UnaryOp::Tanh, y).unwrap();
        let loss = g.kd_loss(y, target, 0.5, 1.0).unwrap().loss;
        g.output("loss", loss).unwrap();
        let all = parameters(g);
        optimizer.step(g, loss, &all).unwrap();
        let mut session = Session::new(&gpu(), 1);
        let step = session.compile(&graph).unwrap();
        let target = vec![0.5; 12];
        let mut skipped = 0.0;
        for bad in [None, Some(f32::NAN), None, Some(-f32::NAN)] {
            let mut x: Vec<f32> = (0..24_u8).map(|i| 0.1 * f32::from(i) - 1.0).collect();
            if let Some(bad) = bad {
                x[7] = bad;
                skipped += 1.0;
            }
            let before = bits(&session);
            let hosts = [("x", Host::from(&x)), ("target", Host::from(&target))];
            let out = step.run(&hosts).unwrap().wait().unwrap();
            let name = format!("{dtype} {op:?} {bad:?}");
            assert_eq!(
                out.scalar("loss").unwrap().is_nan(),
                bad.is_some(),
                "{name}"
            );
            assert_eq!(out.scalar(StepOutputs::SKIPPED).unwrap(), skipped, "{name}");
            assert_eq!(bits(&session) == before, bad.is_some(), "{name}");
        }
    }
}

/// What follows a skipped step is what would have followed without it, at the same scale.
#[test]
fn a_skipped_step_leaves_no_trace() {
    for dtype in TYPES {
        let run = |skip: bool| {
            let (toy, mut session, step) = start(dtype, LossScale::default());
            for number in 0..6 {
                if number == 3 && skip {
                    bad(&toy).run(&step);
                }
                if number == 3 {
                    session.set("train.loss_scale", &[512.0]).unwrap();
                }
                toy.data(number, ROWS).run(&step);
            }
            bits(&session)
        };
        assert!(run(true) == run(false), "{dtype}");
    }
}

#[test]
fn the_scale_doubles_after_the_interval() {
    for dtype in TYPES {
        let interval = 5;
        let options = LossScale::default().start(8.0).interval(interval);
        let (toy, session, step) = start(dtype, options);
        let good = toy.data(0, ROWS);
        for doublings in 1..=2_u8 {
            for _ in 1..interval {
                good.run(&step);
                assert_eq!(scale(&session), 8.0 * 2_f32.powi(i32::from(doublings) - 1));
            }
            good.run(&step);
            assert_eq!(scale(&session), 8.0 * 2_f32.powi(doublings.into()));
        }
        // A bad step begins the count anew.
        for _ in 1..interval {
            good.run(&step);
        }
        bad(&toy).run(&step);
        for _ in 1..interval {
            good.run(&step);
            assert_eq!(scale(&session), 16.0);
        }
        good.run(&step);
        assert_eq!(scale(&session), 32.0);
    }
}

#[test]
fn the_scale_stays_within_its_bounds() {
    for dtype in TYPES {
        for (first, after_good, after_bad) in [
            (1.0, 2.0, 1.0),
            (1.5, 3.0, 1.0),
            (65_536.0, 65_536.0, 32_768.0),
            (40_000.0, 65_536.0, 20_000.0),
            // Outside of them only in the first step.
            (0.25, 1.0, 1.0),
        ] {
            let options = LossScale::default().start(first).interval(1);
            let (toy, session, step) = start(dtype, options);
            let out = toy.data(0, ROWS).run(&step);
            assert_eq!(out.scalar(StepOutputs::LOSS_SCALE).unwrap(), first);
            let fine = out.scalar(StepOutputs::GRADIENT_NORM).unwrap().is_finite();
            assert!(fine || first > 30_000.0, "{dtype} {first}");
            let expected = if fine { after_good } else { after_bad };
            assert_eq!(scale(&session), expected, "{dtype} {first}");
            let (toy, session, step) = start(dtype, options);
            bad(&toy).run(&step);
            assert_eq!(scale(&session), after_bad, "{dtype} {first}");
        }
    }
}

/// From 2²⁴ the scale comes down to where gradients are finite, and never rises above its bound again.
#[test]
fn an_overflow_on_purpose_recovers() {
    for dtype in TYPES {
        let options = LossScale::default().start(16_777_216.0).interval(2);
        let (toy, session, step) = start(dtype, options);
        let good = toy.data(0, ROWS);
        let mut history = Vec::new();
        for _ in 0..40 {
            let out = good.run(&step);
            history.push(out.scalar(StepOutputs::LOSS_SCALE).unwrap());
            assert!((1.0..=65_536.0).contains(&scale(&session)));
        }
        let skipped = session.get("train.skipped").unwrap()[0];
        let done = session.get("train.step").unwrap()[0];
        assert_eq!(history[0], options.start);
        assert_eq!(skipped + done, 40.0);
        assert!(done >= 20.0, "{dtype}: {history:?}");
        assert_eq!(skipped > 0.0, dtype == DType::F16, "2^24 overflows f16");
        // Down to the smallest scale, if nothing helps.
        for _ in 0..20 {
            bad(&toy).run(&step);
        }
        assert_eq!(scale(&session), 1.0);
    }
}
