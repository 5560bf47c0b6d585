//! Random graphs: what an adapter computes is what the reference computes, gradients and updates included.
//!
//! A program is a list of instructions, each of which applies an operation to values that are there. Proptest shrinks the list, and a
//! failure prints the graph. `PROPTEST_CASES=2000 ENERGYFLOW_GRAPH_SEED=1 cargo test --test random_graphs` tries others and more.

mod common;

use common::{Case, Tolerance, baseline_gpu, gpu, packed_gpu, tiled_gpu};
use energyflow::Gpu;
use energyflow::graph::{AttentionOptions, Op, Source, ValueId};
use energyflow::train::AdamW;
use energyflow::types::{BinaryOp, Broadcast, DType, Padding, Trans, UnaryOp, Window};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{RngSeed, TestRunner};

/// Ones, primes, and sizes around tiles and vectors.
const EXTENTS: [usize; 14] = [1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 31, 32, 33, 65];
/// Elements of a value at most.
const MOST: usize = 1 << 13;
/// Number of operations that instructions choose from.
const OPERATIONS: u8 = 24;

#[derive(Clone, Debug)]
struct Program {
    /// Whether values are stored as f16.
    half: bool,
    /// Extents of the first value.
    dims: [usize; 3],
    /// Operation, operand, and two further choices.
    steps: Vec<[u8; 4]>,
    /// Seed of the data.
    seed: u64,
}

fn programs(half: bool) -> impl Strategy<Value = Program> {
    let extent = || (0..EXTENTS.len()).prop_map(|i| EXTENTS[i]);
    let dims = (0..3_usize, 0..6_usize, extent()).prop_map(|(b, l, c)| [b + 1, EXTENTS[l + 2], c]);
    let steps = prop::collection::vec(any::<[u8; 4]>(), 1..10);
    (dims, steps, any::<u64>()).prop_map(move |(dims, steps, seed)| Program {
        half,
        dims,
        steps,
        seed,
    })
}

fn config(cases: u32) -> ProptestConfig {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    // The same graphs everywhere, unless others are asked for.
    let seed = number("ENERGYFLOW_GRAPH_SEED").unwrap_or(1);
    let cases = number("PROPTEST_CASES").map_or(cases, |cases: u64| cases as u32);
    ProptestConfig {
        cases,
        rng_seed: RngSeed::Fixed(seed),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// A graph under construction.
struct Builder {
    case: Case,
    /// Values so far, of any shape, in the element type of the case.
    values: Vec<ValueId>,
    /// Parameters and inputs to differentiate by.
    leaves: Vec<ValueId>,
    parameters: Vec<ValueId>,
    /// Where the gradient jumps, rounding decides: such operations are used in graphs without gradients.
    kinks: bool,
    draws: Option<ValueId>,
    /// Operations that fitted.
    applied: Vec<u8>,
}

impl Builder {
    fn new(program: &Program, kinks: bool) -> Self {
        let dtype = if program.half { DType::F16 } else { DType::F32 };
        let mut case = Case::new(program.seed, dtype);
        let x = case.input(&program.dims);
        let mut builder = Self {
            case,
            values: vec![x],
            leaves: vec![x],
            parameters: Vec::new(),
            kinks,
            draws: None,
            applied: Vec::new(),
        };
        for &step in &program.steps {
            if let Some(value) = builder.apply(step) {
                builder.values.push(value);
                builder.applied.push(step[0] % OPERATIONS);
            }
        }
        builder
    }

    fn dims(&self, value: ValueId) -> Vec<usize> {
        self.case.graph.value(value).unwrap().shape.dims().to_vec()
    }

    fn dtype(&self, value: ValueId) -> DType {
        self.case.graph.value(value).unwrap().dtype
    }

    /// A weight in the element type of `like`, whose products with `inputs` terms stay near ±1.
    fn weight(&mut self, dims: &[usize], inputs: usize, like: ValueId) -> ValueId {
        let p = self.case.parameter(dims);
        self.parameters.push(p);
        let graph = &mut self.case.graph;
        let scaled = graph.affine(p, 1.0 / (inputs as f32).sqrt(), 0.0).unwrap();
        let dtype = graph.value(like).unwrap().dtype;
        graph.cast(scaled, dtype).unwrap()
    }

    fn vector(&mut self, n: usize) -> ValueId {
        let p = self.case.parameter(&[n]);
        self.parameters.push(p);
        p
    }

    /// One of the values, by number.
    fn pick(&self, number: u8) -> ValueId {
        self.values[number as usize % self.values.len()]
    }

    /// A value of the same shape and type as `x`, or x.
    fn alike(&self, x: ValueId, number: u8) -> ValueId {
        let (dims, dtype) = (self.dims(x), self.dtype(x));
        let others: Vec<ValueId> = self
            .values
            .iter()
            .copied()
            .filter(|&y| self.dims(y) == dims && self.dtype(y) == dtype)
            .collect();
        others[number as usize % others.len()]
    }

    fn counter(&mut self) -> ValueId {
        match self.draws {
            Some(counter) => counter,
            None => {
                let counter = self.case.graph.state("runs", &[1], 3.0).unwrap();
                self.draws = Some(counter);
                counter
            }
        }
    }

    /// Applies an instruction, or nothing where it does not fit.
    fn apply(&mut self, [what, operand, a, b]: [u8; 4]) -> Option<ValueId> {
        let x = self.pick(operand);
        let dims = self.dims(x);
        let cols = *dims.last()?;
        let rows = dims.iter().product::<usize>() / cols;
        let f32 = self.dtype(x) == DType::F32;
        let choose = |list: &[usize], number: u8| list[number as usize % list.len()];
        Some(match what % OPERATIONS {
            0 | 1 => {
                let smooth = [
                    UnaryOp::Tanh,
                    UnaryOp::Sigmoid,
                    UnaryOp::GeluTanh,
                    UnaryOp::GeluErf,
                    UnaryOp::Cos,
                    UnaryOp::Affine {
                        scale: -0.5,
                        offset: 0.25,
                    },
                ];
                let kinked = [
                    UnaryOp::Relu,
                    UnaryOp::Abs,
                    UnaryOp::Clamp {
                        min: -0.5,
                        max: 0.25,
                    },
                ];
                let op = match self.kinks && a > 127 {
                    true => kinked[b as usize % kinked.len()],
                    false => smooth[b as usize % smooth.len()],
                };
                self.case.graph.unary(op, x).ok()?
            }
            2 | 3 => {
                let y = self.alike(x, a);
                let op = match (self.kinks, b % 5) {
                    (true, 3) => BinaryOp::Max,
                    (true, 4) => BinaryOp::Min,
                    (_, 0) => BinaryOp::Sub,
                    (_, 1) => BinaryOp::Mul,
                    _ => BinaryOp::Add,
                };
                let z = self.case.graph.binary(op, Broadcast::Same, x, y).ok()?;
                // Stays near ±1.
                self.case.graph.affine(z, 0.5, 0.0).ok()?
            }
            4 => {
                let bias = self.vector(cols);
                self.case.graph.add_bias(x, bias).ok()?
            }
            5 => {
                let mask = self.case.mask(rows);
                self.case.graph.mul_rows(x, mask).ok()?
            }
            6 => {
                let scalar = self.vector(1);
                self.case.graph.mul_scalar(x, scalar).ok()?
            }
            7 | 8 => {
                let n = choose(&EXTENTS, a);
                if rows * n > MOST {
                    return None;
                }
                let weight = self.weight(&[n, cols], cols, x);
                self.case.graph.matmul(x, weight, Trans::NT).ok()?
            }
            9 => {
                let n = choose(&EXTENTS, a);
                if rows * n > MOST {
                    return None;
                }
                let weight = self.weight(&[cols, n], cols, x);
                self.case.graph.matmul(x, weight, Trans::NN).ok()?
            }
            10 | 11 => {
                let (gamma, beta) = (self.vector(cols), self.vector(cols));
                // One column would be 0/√eps: nothing but rounding.
                if cols < 3 {
                    return None;
                }
                self.case.graph.layer_norm(x, gamma, beta, 1e-2).ok()?
            }
            12 | 13 => {
                let &[_, time, _] = &dims[..] else {
                    return None;
                };
                let (taps, dilation) = (a as usize % 4 + 1, b as usize % 3 + 1);
                let n = choose(&EXTENTS[..11], b);
                if rows * n > MOST || rows * cols * taps > 4 * MOST {
                    return None;
                }
                let padding = match a % 2 {
                    0 => Padding::Causal,
                    _ => Padding::Same,
                };
                let window = Window::new(time, taps, dilation, 1, padding).ok()?;
                let weight = self.weight(&[n, taps * cols], taps * cols, x);
                self.case.graph.conv1d(x, weight, window).ok()?
            }
            14 => {
                let &[batch, time, _] = &dims[..] else {
                    return None;
                };
                let mask = self.case.mask(batch * time);
                self.case.graph.masked_mean(x, mask).ok()?
            }
            15 => {
                let graph = &mut self.case.graph;
                let x = graph.cast(x, DType::F32).ok()?;
                let (sum, n) = match a % 3 {
                    0 => (graph.sum_cols(x).ok()?, cols),
                    1 => (graph.sum_rows(x).ok()?, rows),
                    _ => (graph.sum_all(x).ok()?, rows * cols),
                };
                // Terms of both signs cancel; beside 1 what is left of them may be compared.
                graph.affine(sum, 1.0 / n as f32, 1.0).ok()?
            }
            16 => self.case.graph.reshape(x, &[rows * cols]).ok()?,
            17 => {
                // There and back. The value is rounded if it is stored in between; scaled, it does not cancel with x but for that rounding.
                let other = if f32 { DType::F16 } else { DType::F32 };
                let y = self.case.graph.cast(x, other).ok()?;
                let y = self.case.graph.affine(y, 0.75, 0.0).ok()?;
                match self.case.dtype == DType::F16 || a > 127 {
                    true => y,
                    false => self.case.graph.cast(y, self.case.dtype).ok()?,
                }
            }
            18 => {
                let (rows, n) = (choose(&EXTENTS, a), choose(&EXTENTS, b));
                let width = choose(&EXTENTS, a.wrapping_add(b));
                let table = self.case.parameter(&[rows, width]);
                self.parameters.push(table);
                let ids = self.case.ids(n, rows as u32);
                let padding = (a > 200).then_some(0);
                let rows = self.case.graph.gather(table, ids, padding).ok()?;
                self.case.graph.cast(rows, self.case.dtype).ok()?
            }
            19 => match a % 3 {
                0 => self.case.graph.softmax(x).ok()?,
                1 => self.case.graph.log_softmax(x).ok()?,
                _ if f32 => self.case.graph.log_sum_exp(x).ok()?,
                _ => return None,
            },
            20 => {
                let &[batch, time, _] = &dims[..] else {
                    return None;
                };
                let heads = a as usize % 3 + 1;
                let width = heads * 4 * (b as usize % 3 + 1);
                let weight = self.weight(&[3 * width, cols], cols, x);
                let graph = &mut self.case.graph;
                let packed = graph.matmul(x, weight, Trans::NT).ok()?;
                let packed = graph.reshape(packed, &[batch, time, 3 * width]).ok()?;
                let mask = (b > 127).then(|| self.case.mask(batch * time));
                let options = AttentionOptions::new(heads).causal(a > 127);
                self.case.graph.attention(packed, mask, options).ok()?
            }
            21 => {
                let &[batch, time, _] = &dims[..] else {
                    return None;
                };
                if batch * time * time > MOST {
                    return None;
                }
                let y = self.case.graph.batch_matmul(x, x, Trans::NT).ok()?;
                self.case.graph.affine(y, 1.0 / cols as f32, 0.0).ok()?
            }
            22 => {
                let counter = self.counter();
                self.case
                    .graph
                    .dropout(x, 0.25, counter, u64::from(a))
                    .ok()?
            }
            _ => {
                // A block that is computed again for the backward pass.
                if cols < 3 {
                    return None;
                }
                let (gamma, beta) = (self.vector(cols), self.vector(cols));
                let weight = self.weight(&[cols, cols], cols, x);
                let block = self.case.graph.recompute(|graph| {
                    let h = graph.layer_norm(x, gamma, beta, 1e-2)?;
                    let h = graph.matmul(h, weight, Trans::NT)?;
                    let h = graph.unary(UnaryOp::GeluTanh, h)?;
                    let h = graph.add(h, x)?;
                    graph.affine(h, 0.5, 0.0)
                });
                block.ok()?
            }
        })
    }

    /// The last value and another one are outputs.
    fn outputs(&mut self) {
        let last = self.values[self.values.len() - 1];
        let middle = self.values[self.values.len() / 2];
        self.case.output("last", last);
        if middle != last {
            self.case.output("middle", middle);
        }
    }

    /// A loss over the last value.
    fn loss(&mut self) -> ValueId {
        let last = self.values[self.values.len() - 1];
        let last = self.case.graph.cast(last, DType::F32).unwrap();
        let n: usize = self.dims(last).iter().product();
        let dtype = std::mem::replace(&mut self.case.dtype, DType::F32);
        let loss = self.case.random_loss(last);
        self.case.dtype = dtype;
        // Terms of both signs cancel; beside 1 what is left of them may be compared.
        self.case.graph.affine(loss, 1.0 / n as f32, 1.0).unwrap()
    }
}

/// One of the devices, by the seed of the program.
fn device(program: &Program) -> Gpu {
    match (program.half, program.seed % 4) {
        (true, 0) => packed_gpu(),
        (true, 1) | (false, 0) => baseline_gpu(),
        (_, 2) => tiled_gpu(),
        _ => gpu(),
    }
}

/// Chains of f16 operations round at every step.
const HALF: Tolerance = Tolerance {
    normalised: 8e-3,
    relative: 6e-2,
};
/// Sums that cancel lose digits.
const SINGLE: Tolerance = Tolerance {
    normalised: 2e-5,
    relative: 4e-4,
};

fn tolerance(case: &Case) -> Tolerance {
    match case.graph.values().any(|(_, v)| v.dtype == DType::F16) {
        true => HALF,
        false => SINGLE,
    }
}

fn forward(program: &Program) {
    let mut builder = Builder::new(program, true);
    builder.outputs();
    let gpu = device(program);
    builder.case.check_on(&gpu, tolerance(&builder.case));
    // Nothing is fused when every value is an output.
    let mut unfused = Builder::new(program, true);
    let all: Vec<ValueId> = unfused.case.graph.values().map(|(id, _)| id).collect();
    for (i, id) in all.into_iter().enumerate() {
        let value = unfused.case.graph.value(id).unwrap();
        let computed = matches!(value.source, Source::Node { .. });
        if computed && matches!(value.dtype, DType::F32 | DType::F16) {
            unfused.case.output(&format!("value {i}"), id);
        }
    }
    if program.seed.is_multiple_of(3) && !unfused.case.graph.outputs().is_empty() {
        unfused.case.check_on(&gpu, tolerance(&unfused.case));
    }
}

fn backward(program: &Program) {
    let mut builder = Builder::new(program, false);
    let mut loss = builder.loss();
    if program.half {
        // Small gradients vanish in f16.
        loss = builder.case.graph.affine(loss, 256.0, 0.0).unwrap();
    }
    builder.outputs();
    builder.case.output("loss", loss);
    let wrt: Vec<ValueId> = builder
        .leaves
        .iter()
        .chain(&builder.parameters)
        .copied()
        .collect();
    let gradients = builder.case.graph.gradients(loss, &wrt).unwrap();
    for (i, gradient) in gradients.into_iter().enumerate() {
        // What the loss does not depend on has the constant 0.
        let source = &builder.case.graph.value(gradient).unwrap().source;
        if matches!(source, Source::Node { .. }) {
            builder.case.output(&format!("gradient {i}"), gradient);
        }
    }
    let tolerance = tolerance(&builder.case);
    builder.case.check_on(&device(program), tolerance);
}

/// Two steps of AdamW, whose state lives from one to the next.
fn update(program: &Program) {
    let mut builder = Builder::new(program, false);
    let loss = builder.loss();
    let parameters = builder.parameters.clone();
    let optimizer = AdamW::default().clip(1.0);
    if parameters.is_empty()
        || optimizer
            .step(&mut builder.case.graph, loss, &parameters)
            .is_err()
    {
        return;
    }
    let mut running = builder.case.start(&device(program));
    let tolerance = tolerance(&builder.case);
    for _ in 0..2 {
        running.step(&builder.case, tolerance);
    }
    // A gradient near zero has a direction, and AdamW's first steps are as long for it as for any other.
    let bound = Tolerance {
        normalised: 5e-3,
        relative: 5e-2,
    };
    running.compare_variables(&builder.case, bound);
}

fn differences(program: &Program) {
    let mut builder = Builder::new(program, false);
    let last = builder.values[builder.values.len() - 1];
    let wrt: Vec<ValueId> = builder
        .leaves
        .iter()
        .chain(&builder.parameters)
        .copied()
        .collect();
    let elements = |id: ValueId| builder.dims(id).iter().product::<usize>();
    // Dropout's states would move on between the evaluations.
    if builder.draws.is_some() || wrt.iter().map(|&id| elements(id)).sum::<usize>() > 600 {
        return;
    }
    // A row of padding has no gradient by definition.
    let padded = |op: &Op| matches!(op, Op::Gather { padding: Some(_) });
    if builder.case.graph.nodes().iter().any(|n| padded(&n.op)) {
        return;
    }
    // Rounding to f16 is a staircase.
    if builder
        .case
        .graph
        .values()
        .any(|(_, v)| v.dtype == DType::F16)
    {
        return;
    }
    builder.case.check_finite_differences(last, &wrt, 2e-4);
}

/// An instruction that never fits would be left out of every graph, unnoticed.
#[test]
fn every_operation_occurs() {
    for half in [false, true] {
        let mut runner = TestRunner::new(config(0));
        let mut counts = [0; OPERATIONS as usize];
        for _ in 0..500 {
            let program = programs(half).new_tree(&mut runner).unwrap().current();
            let applied = Builder::new(&program, true).applied;
            applied
                .into_iter()
                .for_each(|what| counts[usize::from(what)] += 1);
        }
        assert!(counts.iter().all(|&count| count >= 20), "{half} {counts:?}");
    }
}

proptest! {
    #![proptest_config(config(24))]

    #[test]
    fn forward_f32(program in programs(false)) {
        forward(&program);
    }

    #[test]
    fn forward_f16(program in programs(true)) {
        forward(&program);
    }

    #[test]
    fn backward_f32(program in programs(false)) {
        backward(&program);
    }

    #[test]
    fn backward_f16(program in programs(true)) {
        backward(&program);
    }

    #[test]
    fn gradients_are_those_of_differences(program in programs(false)) {
        differences(&program);
    }
}

proptest! {
    #![proptest_config(config(12))]

    #[test]
    fn updates_f32(program in programs(false)) {
        update(&program);
    }
}
