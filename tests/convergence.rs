//! Small tasks whose result is known, trained from a random start in f32 and in mixed precision.

mod common;

use common::gpu;
use energyflow::graph::{Graph, ValueId};
use energyflow::nn::{Embedding, Gelu, Linear, Tcn, TcnOptions};
use energyflow::runtime::{Executable, Host};
use energyflow::train::{AdamW, LossScale, Schedule};
use energyflow::types::{DType, UnaryOp};
use energyflow::{Session, graph::Init};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

/// A training step whose outputs are `loss` and, of a classifier, `logits`.
struct Task {
    session: Session,
    step: Arc<Executable>,
}

impl Task {
    /// Trains all parameters with a learning rate that rises to `peak` and falls to nearly 0.
    fn new(mut graph: Graph, loss: ValueId, dtype: DType, peak: f32, steps: u32) -> Self {
        let scale = (dtype == DType::F16).then(LossScale::default);
        let optimizer = AdamW::default()
            .weight_decay(0.0)
            .loss_scale(scale)
            .schedule(Schedule::WarmupCosine {
                peak,
                end: 1e-3 * peak,
                warmup: steps / 10,
                total: steps,
            });
        let parameters: Vec<ValueId> = graph.parameters().map(|(id, _)| id).collect();
        graph.output("loss", loss).unwrap();
        optimizer.step(&mut graph, loss, &parameters).unwrap();
        let mut session = Session::new(&gpu(), 7);
        let step = session.compile(&graph).unwrap();
        Self { session, step }
    }

    /// The last loss, and the logits before the last update.
    fn train(
        &self,
        steps: u32,
        mut inputs: impl FnMut(u32, &mut dyn FnMut(&[(&str, Host<'_>)])),
    ) -> f32 {
        let mut loss = f32::NAN;
        for t in 0..steps {
            inputs(t, &mut |inputs| {
                let outputs = self.step.run(inputs).unwrap().wait().unwrap();
                loss = outputs.scalar("loss").unwrap();
            });
        }
        loss
    }
}

fn classifier(graph: &mut Graph, logits: ValueId, rows: usize, classes: usize) -> ValueId {
    let targets = graph.index_input("targets", rows, classes as u32).unwrap();
    let logits32 = graph.cast(logits, DType::F32).unwrap();
    graph.output("logits", logits32).unwrap();
    let loss = graph.cross_entropy(logits, targets, None, 0.0).unwrap();
    loss.loss
}

/// Share of the rows whose largest logit is the target's.
fn accuracy(logits: &[f32], targets: &[u32]) -> f64 {
    let classes = logits.len() / targets.len();
    let right = logits
        .chunks_exact(classes)
        .zip(targets)
        .filter(|(row, target)| {
            let best = (0..classes).max_by(|&a, &b| row[a].total_cmp(&row[b]));
            best == Some(**target as usize)
        });
    right.count() as f64 / targets.len() as f64
}

/// Solves the normal equations XᵀX w = Xᵀy by Gaussian elimination.
fn least_squares(x: &[f64], y: &[f64], n: usize) -> Vec<f64> {
    let mut a = vec![vec![0.0; n + 1]; n];
    for (row, y) in x.chunks_exact(n).zip(y) {
        for i in 0..n {
            for j in 0..n {
                a[i][j] += row[i] * row[j];
            }
            a[i][n] += row[i] * y;
        }
    }
    for i in 0..n {
        let pivot = a[i].clone();
        for (k, row) in a.iter_mut().enumerate() {
            let factor = row[i] / pivot[i];
            if k != i {
                row.iter_mut()
                    .zip(&pivot)
                    .for_each(|(x, p)| *x -= factor * p);
            }
        }
    }
    (0..n).map(|i| a[i][n] / a[i][i]).collect()
}

#[test]
fn linear_regression_reaches_the_closed_form() {
    let (rows, n) = (64, 5);
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let x: Vec<f32> = (0..rows * n).map(|_| rng.random_range(-1.0..1.0)).collect();
    let y: Vec<f32> = x
        .chunks_exact(n)
        .map(|row| {
            let exact: f32 = row
                .iter()
                .enumerate()
                .map(|(i, x)| (i as f32 - 1.5) * x)
                .sum();
            exact + 0.7 + rng.random_range(-0.3..0.3)
        })
        .collect();
    // A column of ones for the bias.
    let columns: Vec<f64> = x
        .chunks_exact(n)
        .flat_map(|row| row.iter().map(|&x| f64::from(x)).chain([1.0]))
        .collect();
    let wanted = least_squares(
        &columns,
        &y.iter().map(|&y| f64::from(y)).collect::<Vec<_>>(),
        n + 1,
    );
    for (dtype, bound) in [(DType::F32, 1e-4), (DType::F16, 5e-3)] {
        let mut graph = Graph::new();
        let input = graph.input("x", &[rows, n], dtype).unwrap();
        let target = graph.input("y", &[rows, 1], DType::F32).unwrap();
        let layer = Linear::new(&mut graph, "layer", n, 1, true).unwrap();
        let out = layer.forward(&mut graph, input).unwrap();
        let out = graph.cast(out, DType::F32).unwrap();
        let error = graph.sub(out, target).unwrap();
        let square = graph.unary(UnaryOp::Square, error).unwrap();
        let sum = graph.sum_all(square).unwrap();
        let loss = graph.affine(sum, 1.0 / rows as f32, 0.0).unwrap();
        let steps = 600;
        let task = Task::new(graph, loss, dtype, 0.05, steps);
        task.train(steps, |_, run| {
            run(&[("x", (&x).into()), ("y", (&y).into())])
        });
        let mut found = task.session.get("layer.weight").unwrap();
        found.extend(task.session.get("layer.bias").unwrap());
        for (found, wanted) in found.iter().zip(&wanted) {
            let error = (f64::from(*found) - wanted).abs();
            assert!(error < bound, "{dtype:?}: {found} instead of {wanted}");
        }
    }
}

/// A network of one hidden layer over all patterns of `bits` bits, whose class is their parity. With two bits it is XOR.
fn parity(bits: usize, hidden: usize, steps: u32) {
    let rows = 1 << bits;
    let x: Vec<f32> = (0..rows)
        .flat_map(|row| (0..bits).map(move |bit| if row >> bit & 1 == 1 { 1.0 } else { -1.0 }))
        .collect();
    let targets: Vec<u32> = (0..rows as u32).map(|row| row.count_ones() % 2).collect();
    for dtype in [DType::F32, DType::F16] {
        let mut graph = Graph::new();
        let input = graph.input("x", &[rows, bits], dtype).unwrap();
        let first = Linear::new(&mut graph, "first", bits, hidden, true).unwrap();
        let second = Linear::new(&mut graph, "second", hidden, 2, true).unwrap();
        let h = first.forward(&mut graph, input).unwrap();
        let h = graph.unary(UnaryOp::Tanh, h).unwrap();
        let logits = second.forward(&mut graph, h).unwrap();
        let loss = classifier(&mut graph, logits, rows, 2);
        let task = Task::new(graph, loss, dtype, 0.05, steps);
        let inputs = [("x", Host::from(&x)), ("targets", Host::from(&targets))];
        let loss = task.train(steps, |_, run| run(&inputs));
        let outputs = task.step.run(&inputs).unwrap().wait().unwrap();
        let accuracy = accuracy(&outputs.get("logits").unwrap(), &targets);
        assert_eq!(accuracy, 1.0, "{dtype:?}, loss {loss}");
        assert!(loss < 0.05, "{dtype:?}: {loss}");
    }
}

#[test]
fn xor_is_learnt() {
    parity(2, 8, 300);
}

#[test]
fn parity_of_five_bits_is_learnt() {
    parity(5, 24, 900);
}

/// The token five steps earlier, which a network sees only through dilated convolutions. Each batch is new.
#[test]
fn copying_is_learnt() {
    let (batch, length, symbols, delay, steps) = (8, 16, 8_u32, 5, 400);
    for dtype in [DType::F32, DType::F16] {
        let mut graph = Graph::new();
        let ids = graph.index_input("ids", batch * length, symbols).unwrap();
        let embedding =
            Embedding::new(&mut graph, "embedding", 8, 16, None, Init::Uniform(1.0)).unwrap();
        let options = TcnOptions::new(16, 32, &[1, 2, 4]).gelu(Gelu::Tanh);
        let tcn = Tcn::new(&mut graph, "blocks", &options).unwrap();
        let head = Linear::new(&mut graph, "head", 16, 8, true).unwrap();
        let x = embedding.forward(&mut graph, ids, dtype).unwrap();
        let x = graph.reshape(x, &[batch, length, 16]).unwrap();
        let x = tcn.forward(&mut graph, x, None).unwrap();
        let logits = head.forward(&mut graph, x).unwrap();
        // The first steps have nothing to copy: their class is the first symbol.
        let loss = classifier(&mut graph, logits, batch * length, 8);
        let task = Task::new(graph, loss, dtype, 1e-2, steps);
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let mut data = || {
            let ids: Vec<u32> = (0..batch * length)
                .map(|_| rng.random_range(0..symbols))
                .collect();
            let targets = (0..batch * length).map(|i| match i % length < delay {
                true => 0,
                false => ids[i - delay],
            });
            let targets: Vec<u32> = targets.collect();
            (ids, targets)
        };
        let loss = task.train(steps, |_, run| {
            let (ids, targets) = data();
            run(&[("ids", Host::from(&ids)), ("targets", Host::from(&targets))]);
        });
        let (ids, targets) = data();
        let inputs = [("ids", Host::from(&ids)), ("targets", Host::from(&targets))];
        let outputs = task.step.run(&inputs).unwrap().wait().unwrap();
        let accuracy = accuracy(&outputs.get("logits").unwrap(), &targets);
        assert_eq!(accuracy, 1.0, "{dtype:?}, loss {loss}");
    }
}
