//! AdamW, clipping and schedules over 50 steps against their formulas in f64, written down here once more.

mod common;

use common::gpu;
use energyflow::Session;
use energyflow::graph::{Graph, Init, ValueId};
use energyflow::runtime::Host;
use energyflow::train::{AdamW, LossScale, ParameterGroup, Schedule, StepOutputs};
use energyflow::types::DType;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const STEPS: usize = 50;
/// Names, lengths and sizes of the gradients.
const PARAMETERS: [(&str, usize, f32); 3] = [("a", 33, 1.0), ("b", 7, 1e-3), ("c", 130, 20.0)];

/// AdamW as Loshchilov & Hutter write it, one step number after the other.
struct Expected {
    p: Vec<f64>,
    m: Vec<f64>,
    v: Vec<f64>,
    step: i32,
}

impl Expected {
    fn new(p: &[f32]) -> Self {
        Self {
            p: p.iter().map(|&x| f64::from(x)).collect(),
            m: vec![0.0; p.len()],
            v: vec![0.0; p.len()],
            step: 0,
        }
    }

    fn update(&mut self, options: &AdamW, (rate, decay): (f64, f64), gradient: &[f64]) {
        self.step += 1;
        let (beta1, beta2) = (f64::from(options.beta1), f64::from(options.beta2));
        let eps = f64::from(options.eps);
        for (i, &g) in gradient.iter().enumerate() {
            self.m[i] = beta1 * self.m[i] + (1.0 - beta1) * g;
            self.v[i] = beta2 * self.v[i] + (1.0 - beta2) * g * g;
            let m = self.m[i] / (1.0 - beta1.powi(self.step));
            let v = self.v[i] / (1.0 - beta2.powi(self.step));
            self.p[i] -= rate * (m / (v.sqrt() + eps) + decay * self.p[i]);
        }
    }
}

/// Warm-up, half a cosine, the end.
fn rate(schedule: Schedule, t: i32) -> f64 {
    match schedule {
        Schedule::WarmupCosine {
            peak,
            end,
            warmup,
            total,
        } => {
            let (t, warmup, total) = (f64::from(t), f64::from(warmup), f64::from(total));
            let (peak, end) = (f64::from(peak), f64::from(end));
            if t < warmup {
                peak * t / warmup
            } else {
                let done = ((t - warmup) / (total - warmup)).min(1.0);
                end + (peak - end) * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
            }
        }
        Schedule::Constant { rate } => f64::from(rate),
        _ => panic!("another schedule"),
    }
}

/// A loss whose gradients are inputs.
fn graph() -> (Graph, ValueId, Vec<ValueId>) {
    let mut graph = Graph::new();
    let mut loss = None;
    let mut parameters = Vec::new();
    for (name, n, _) in PARAMETERS {
        let p = graph.parameter(name, &[n], Init::Uniform(1.0)).unwrap();
        let g = graph.input(&format!("d{name}"), &[n], DType::F32).unwrap();
        let product = graph.mul(p, g).unwrap();
        let sum = graph.sum_all(product).unwrap();
        loss = Some(match loss {
            Some(loss) => graph.add(loss, sum).unwrap(),
            None => sum,
        });
        parameters.push(p);
    }
    (graph, loss.unwrap(), parameters)
}

/// Recorded gradients: by step and micro-batch, of every parameter. Steps of `BAD` have one that is not finite.
const BAD: [usize; 4] = [0, 7, 8, 31];

fn record(micro: usize) -> Vec<Vec<Vec<Vec<f32>>>> {
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    (0..STEPS)
        .map(|step| {
            // Some steps are clipped, some are not.
            let size = if step % 3 == 0 { 0.01 } else { 1.0 };
            let mut batch = |_| {
                let mut draw = |(_, n, scale): (&str, usize, f32)| -> Vec<f32> {
                    (0..n)
                        .map(|_| size * scale * rng.random_range(-1.0..1.0))
                        .collect()
                };
                PARAMETERS.map(&mut draw).to_vec()
            };
            let mut batches: Vec<_> = (0..micro).map(&mut batch).collect();
            if BAD.contains(&step) {
                let bad = [f32::NAN, f32::INFINITY][step % 2];
                batches[step % micro][step % 3][5] = bad;
            }
            batches
        })
        .collect()
}

fn hosts(gradients: &[Vec<f32>]) -> Vec<(&'static str, Host<'_>)> {
    let names = ["da", "db", "dc"].into_iter();
    names.zip(gradients.iter().map(Host::from)).collect()
}

fn close(what: &str, step: usize, got: &[f32], expected: &[f64], bound: f64) {
    let largest = expected.iter().fold(0.0_f64, |max, x| max.max(x.abs()));
    for (i, (&a, b)) in got.iter().zip(expected).enumerate() {
        let error = (f64::from(a) - b).abs();
        assert!(
            error <= bound * largest,
            "{what} {i} in step {step}: {a} {b}"
        );
    }
}

const NO_GROUPS: Groups = [None; 3];
const GROUPS: Groups = [Some((0.25, 0.0)), None, Some((2.0, 0.3))];

/// Learning-rate factor and weight decay of each parameter that has its own.
type Groups = [Option<(f32, f32)>; 3];

/// `weights`: of the micro-batches; a single step without accumulation if empty.
fn trajectory(mut options: AdamW, weights: &[f32], groups: Groups) {
    for ((name, ..), group) in PARAMETERS.iter().zip(groups) {
        if let Some((scale, decay)) = group {
            let group = ParameterGroup::new(*name).names([*name]);
            options = options.group(group.lr_scale(scale).weight_decay(decay));
        }
    }
    let micro = weights.len().max(1);
    let mut session = Session::new(&gpu(), 4);
    let (mut first, loss, parameters) = graph();
    let mut second = Graph::new();
    if weights.is_empty() {
        options.step(&mut first, loss, &parameters).unwrap();
    } else {
        let weight = first.input("weight", &[1], DType::F32).unwrap();
        options
            .accumulate(&mut first, loss, weight, &parameters, &[])
            .unwrap();
        second = options.update(&[&first]).unwrap();
    }
    let executable = session.compile(&first).unwrap();
    let update = session.compile(&second).unwrap();
    let mut expected: Vec<Expected> = PARAMETERS
        .iter()
        .map(|(name, ..)| Expected::new(&session.get(name).unwrap()))
        .collect();
    let mut skipped = 0.0;
    for (number, batches) in record(micro).iter().enumerate() {
        let out = if weights.is_empty() {
            executable.run(&hosts(&batches[0])).unwrap().wait().unwrap()
        } else {
            for (batch, &weight) in batches.iter().zip(weights) {
                let mut inputs = hosts(batch);
                let weight = vec![weight];
                inputs.push(("weight", Host::from(&weight)));
                executable.run(&inputs).unwrap().wait().unwrap();
            }
            update.run(&[]).unwrap().wait().unwrap()
        };
        let weight = |i: usize| f64::from(weights.get(i).copied().unwrap_or(1.0));
        let total: f64 = (0..micro).map(weight).sum();
        let mut mean: Vec<Vec<f64>> = Vec::new();
        for p in 0..PARAMETERS.len() {
            let sum = |e: usize| {
                let terms = batches.iter().enumerate();
                terms
                    .map(|(i, batch)| weight(i) * f64::from(batch[p][e]))
                    .sum::<f64>()
            };
            mean.push((0..PARAMETERS[p].1).map(|e| sum(e) / total).collect());
        }
        let norm = mean.iter().flatten().map(|g| g * g).sum::<f64>().sqrt();
        let got_norm = out.scalar(StepOutputs::GRADIENT_NORM).unwrap();
        let got_rate = out.scalar(StepOutputs::LEARNING_RATE).unwrap();
        let t = expected[0].step + 1;
        let rate = rate(options.schedule, t);
        assert!(
            (f64::from(got_rate) - rate).abs() <= 2e-7 * 0.05,
            "{number}: {got_rate} {rate}"
        );
        if BAD.contains(&number) {
            skipped += 1.0;
            assert!(!norm.is_finite() && !got_norm.is_finite(), "step {number}");
        } else {
            let error = (f64::from(got_norm) - norm).abs();
            assert!(error <= 1e-5 * norm, "step {number}: {got_norm} {norm}");
            let factor = options
                .clip
                .map_or(1.0, |clip| (f64::from(clip) / norm).min(1.0));
            for (i, (state, gradient)) in expected.iter_mut().zip(&mean).enumerate() {
                let clipped: Vec<f64> = gradient.iter().map(|g| factor * g).collect();
                let (scale, decay) = match groups[i] {
                    Some((scale, decay)) => (scale, decay),
                    None => (1.0, options.weight_decay),
                };
                let rates = (f64::from(scale) * rate, f64::from(decay));
                state.update(&options, rates, &clipped);
            }
        }
        assert_eq!(out.scalar(StepOutputs::SKIPPED).unwrap(), skipped);
        for ((name, ..), state) in PARAMETERS.iter().zip(&expected) {
            close(name, number, &session.get(name).unwrap(), &state.p, 1e-5);
            let [m, v] = session.moments(name).unwrap().unwrap();
            close("first moment", number, &m, &state.m, 1e-5);
            close("second moment", number, &v, &state.v, 1e-5);
        }
    }
    assert_eq!(skipped, BAD.len() as f32);
}

fn options() -> AdamW {
    AdamW::default()
        .schedule(Schedule::WarmupCosine {
            peak: 0.05,
            end: 0.002,
            warmup: 10,
            total: 40,
        })
        .weight_decay(0.1)
}

#[test]
fn fifty_steps_with_clipping() {
    let clip = Some(5.0);
    trajectory(options().clip(clip), &[], NO_GROUPS);
}

#[test]
fn fifty_steps_with_a_loss_scale_that_moves() {
    let loss_scale = Some(LossScale::default().start(64.0).interval(6));
    let schedule = Schedule::Constant { rate: 0.01 };
    trajectory(
        options().loss_scale(loss_scale).schedule(schedule),
        &[],
        NO_GROUPS,
    );
}

#[test]
fn fifty_steps_of_weighted_micro_batches() {
    let loss_scale = Some(LossScale::default().interval(6));
    let clip = Some(5.0);
    trajectory(
        options().loss_scale(loss_scale).clip(clip),
        &[3.0, 0.0, 17.0, 1.5],
        NO_GROUPS,
    );
}

#[test]
fn fifty_steps_with_groups() {
    let clip = Some(5.0);
    trajectory(options().clip(clip), &[], GROUPS);
}

#[test]
fn fifty_steps_of_micro_batches_with_groups() {
    let loss_scale = Some(LossScale::default().interval(6));
    trajectory(options().loss_scale(loss_scale), &[3.0, 1.5], GROUPS);
}
