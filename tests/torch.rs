//! A second witness: samples of PyTorch's own tests, with PyTorch's results, against the reference and the adapters.
//!
//! `scripts/torch_samples.py` writes the file; it says where the samples come from, and why others are left out.

mod common;

use std::collections::BTreeMap;

use common::{gpu, tiled_gpu};
use energyflow::graph::{AttentionOptions, Graph, Init, ValueId};
use energyflow::reference::{Array, Interpreter};
use energyflow::runtime::Host;
use energyflow::train::{AdamW, ParameterGroup, Schedule};
use energyflow::types::{BinaryOp, Broadcast, DType, Padding, Trans, UnaryOp, Window};
use energyflow::{Gpu, Session};
use safetensors::SafeTensors;
use serde::Deserialize;
use serde_json::Value;

static FILE: &[u8] = include_bytes!("data/torch.safetensors");

/// Samples of an operation that adapters compute; the reference computes all of them. Samples of functions of one or two elements are joined
/// into one.
const ON_ADAPTERS: usize = 6;

#[derive(Deserialize)]
struct Description {
    origin: String,
    samples: Vec<Sample>,
    left_out: BTreeMap<String, BTreeMap<String, usize>>,
}

#[derive(Clone, Deserialize)]
struct Input {
    data: String,
    shape: Vec<usize>,
}

#[derive(Clone, Deserialize)]
struct Sample {
    op: String,
    options: serde_json::Map<String, Value>,
    inputs: Vec<Input>,
    results: Vec<String>,
    shape: Vec<usize>,
    dy: Option<String>,
    #[serde(default)]
    gradients: BTreeMap<String, String>,
}

/// The data of an input.
#[derive(Clone)]
enum Data {
    Float(Vec<f32>),
    Index(Vec<u32>),
}

/// A sample with its numbers.
#[derive(Clone)]
struct Given {
    op: String,
    options: serde_json::Map<String, Value>,
    inputs: Vec<(Vec<usize>, Data)>,
    shape: Vec<usize>,
    dy: Option<Vec<f32>>,
    /// Results, then gradients, by the name of the output.
    expected: Vec<(String, Vec<f64>)>,
}

fn description() -> Description {
    let (_, header) = SafeTensors::read_metadata(FILE).unwrap();
    let metadata = header.metadata().as_ref().unwrap();
    serde_json::from_str(&metadata["description"]).unwrap()
}

struct Numbers(SafeTensors<'static>);

impl Numbers {
    fn bytes<const N: usize>(&self, name: &str, dtype: safetensors::Dtype) -> Vec<[u8; N]> {
        let view = self.0.tensor(name).unwrap();
        assert_eq!(view.dtype(), dtype, "tensor {name}");
        let (chunks, rest) = view.data().as_chunks::<N>();
        assert!(rest.is_empty());
        chunks.to_vec()
    }

    fn f32(&self, name: &str) -> Vec<f32> {
        let bytes = self.bytes(name, safetensors::Dtype::F32);
        bytes.into_iter().map(f32::from_le_bytes).collect()
    }

    fn f64(&self, name: &str) -> Vec<f64> {
        let bytes = self.bytes(name, safetensors::Dtype::F64);
        bytes.into_iter().map(f64::from_le_bytes).collect()
    }

    fn data(&self, name: &str) -> Data {
        match self.0.tensor(name).unwrap().dtype() {
            safetensors::Dtype::U32 => {
                let bytes = self.bytes(name, safetensors::Dtype::U32);
                Data::Index(bytes.into_iter().map(u32::from_le_bytes).collect())
            }
            _ => Data::Float(self.f32(name)),
        }
    }

    fn given(&self, sample: &Sample) -> Given {
        let inputs = sample.inputs.iter();
        let results = sample.results.iter().enumerate();
        let results = results.map(|(i, name)| (format!("y{i}"), self.f64(name)));
        let gradients = sample.gradients.iter();
        let gradients = gradients.map(|(i, name)| (format!("d{i}"), self.f64(name)));
        Given {
            op: sample.op.clone(),
            options: sample.options.clone(),
            inputs: inputs
                .map(|input| (input.shape.clone(), self.data(&input.data)))
                .collect(),
            shape: sample.shape.clone(),
            dy: sample.dy.as_deref().map(|name| self.f32(name)),
            expected: results.chain(gradients).collect(),
        }
    }
}

fn numbers() -> Numbers {
    Numbers(SafeTensors::deserialize(FILE).unwrap())
}

impl Given {
    fn number(&self, option: &str) -> f32 {
        match &self.options[option] {
            Value::String(text) => text.parse().unwrap(),
            value => value.as_f64().unwrap() as f32,
        }
    }

    fn size(&self, option: &str) -> usize {
        usize::try_from(self.options[option].as_u64().unwrap()).unwrap()
    }

    fn index(&self, option: &str) -> Option<u32> {
        self.options
            .get(option)
            .map(|value| u32::try_from(value.as_u64().unwrap()).unwrap())
    }

    /// A function of one element.
    fn unary(&self) -> Option<UnaryOp> {
        Some(match self.op.as_str() {
            "abs" => UnaryOp::Abs,
            "square" => UnaryOp::Square,
            "sqrt" => UnaryOp::Sqrt,
            "rsqrt" => UnaryOp::Rsqrt,
            "recip" => UnaryOp::Recip,
            "exp" => UnaryOp::Exp,
            "log" => UnaryOp::Log,
            "cos" => UnaryOp::Cos,
            "tanh" => UnaryOp::Tanh,
            "sigmoid" => UnaryOp::Sigmoid,
            "relu" => UnaryOp::Relu,
            "is_finite" => UnaryOp::IsFinite,
            "neg" => UnaryOp::Affine {
                scale: -1.0,
                offset: 0.0,
            },
            "gelu" if self.options["form"] == "tanh" => UnaryOp::GeluTanh,
            "gelu" => UnaryOp::GeluErf,
            "clamp" => UnaryOp::Clamp {
                min: self.number("min"),
                max: self.number("max"),
            },
            _ => return None,
        })
    }

    /// A function of two elements, and how the second operand is broadcast.
    fn binary(&self) -> Option<(BinaryOp, Broadcast)> {
        let op = match self.op.as_str() {
            "add" => BinaryOp::Add,
            "sub" => BinaryOp::Sub,
            "mul" => BinaryOp::Mul,
            "div" => BinaryOp::Div,
            "max" => BinaryOp::Max,
            "min" => BinaryOp::Min,
            "greater" => BinaryOp::Greater,
            _ => return None,
        };
        let broadcast = match self.options["broadcast"].as_str().unwrap() {
            "same" => Broadcast::Same,
            "cols" => Broadcast::Cols,
            "rows" => Broadcast::Rows,
            "scalar" => Broadcast::Scalar,
            other => panic!("broadcast {other}"),
        };
        Some((op, broadcast))
    }

    /// Whether samples of this kind can be joined: each element is by itself.
    fn is_elementwise(&self) -> bool {
        self.unary().is_some() || self.binary().is_some_and(|(_, how)| how == Broadcast::Same)
    }

    /// Appends the elements of another sample.
    fn join(&mut self, other: &Self) {
        for ((shape, data), (_, more)) in self.inputs.iter_mut().zip(&other.inputs) {
            let (Data::Float(data), Data::Float(more)) = (data, more) else {
                panic!("indices have no elements to join");
            };
            data.extend(more);
            *shape = vec![data.len()];
        }
        if let (Some(dy), Some(more)) = (&mut self.dy, &other.dy) {
            dy.extend(more);
        }
        for ((name, numbers), (other, more)) in self.expected.iter_mut().zip(&other.expected) {
            assert_eq!(name, other);
            numbers.extend(more);
        }
        self.shape = vec![self.expected[0].1.len()];
    }

    /// The graph, whose outputs are named like the expected numbers.
    fn graph(&self) -> Graph {
        let mut graph = Graph::new();
        let mut x = Vec::new();
        for (i, (shape, data)) in self.inputs.iter().enumerate() {
            let name = format!("x{i}");
            let shape: &[usize] = if shape.is_empty() { &[1] } else { shape };
            x.push(match data {
                Data::Float(_) => graph.input(&name, shape, DType::F32).unwrap(),
                Data::Index(ids) => {
                    let below = match self.op.as_str() {
                        "embedding" => self.inputs[1].0[0],
                        _ => self.inputs[0].0[1],
                    };
                    let below = u32::try_from(below).unwrap();
                    // A target that does not count may be outside of the classes.
                    let below = below.max(self.index("ignore").map_or(0, |ignore| ignore + 1));
                    graph.index_input(&name, ids.len(), below).unwrap()
                }
            });
        }
        let results = self.apply(&mut graph, &x);
        for (i, &y) in results.iter().enumerate() {
            graph.output(&format!("y{i}"), y).unwrap();
        }
        if let Some(dy) = &self.dy {
            let y = results[0];
            let dims = graph.value(y).unwrap().shape.dims().to_vec();
            assert_eq!(dims.iter().product::<usize>(), dy.len());
            let dy = graph.input("dy", &dims, DType::F32).unwrap();
            let product = graph.mul(y, dy).unwrap();
            let loss = graph.sum_all(product).unwrap();
            let wrt = self.expected.iter();
            let wrt: Vec<usize> = wrt
                .filter_map(|(name, _)| name.strip_prefix('d').map(|i| i.parse().unwrap()))
                .collect();
            let values: Vec<ValueId> = wrt.iter().map(|&i| x[i]).collect();
            let gradients = graph.gradients(loss, &values).unwrap();
            for (i, gradient) in wrt.iter().zip(gradients) {
                graph.output(&format!("d{i}"), gradient).unwrap();
            }
        }
        graph
    }

    fn apply(&self, graph: &mut Graph, x: &[ValueId]) -> Vec<ValueId> {
        if let Some(op) = self.unary() {
            return vec![graph.unary(op, x[0]).unwrap()];
        }
        if let Some((op, broadcast)) = self.binary() {
            return vec![graph.binary(op, broadcast, x[0], x[1]).unwrap()];
        }
        let y = match self.op.as_str() {
            "matmul" if self.inputs[0].0.len() == 3 => graph.batch_matmul(x[0], x[1], Trans::NN),
            "matmul" => graph.matmul(x[0], x[1], Trans::NN),
            "linear" => {
                let y = graph.matmul(x[0], x[1], Trans::NT).unwrap();
                match x.get(2) {
                    Some(&bias) => graph.add_bias(y, bias),
                    None => Ok(y),
                }
            }
            "layer_norm" => graph.layer_norm(x[0], x[1], x[2], self.number("eps")),
            "conv1d" => {
                let padding = match self.options["padding"] == "same" {
                    true => Padding::Same,
                    false => Padding::Valid,
                };
                let (time, taps) = (self.inputs[0].0[1], self.size("taps"));
                let (dilation, stride) = (self.size("dilation"), self.size("stride"));
                let window = Window::new(time, taps, dilation, stride, padding).unwrap();
                let y = graph.conv1d(x[0], x[1], window).unwrap();
                match x.get(2) {
                    Some(&bias) => graph.add_bias(y, bias),
                    None => Ok(y),
                }
            }
            "embedding" => graph.gather(x[1], x[0], self.index("padding")),
            "softmax" => graph.softmax(x[0]),
            "log_softmax" => graph.log_softmax(x[0]),
            "log_sum_exp" => graph.log_sum_exp(x[0]),
            "sum" if self.options["over"] == "all" => graph.sum_all(x[0]),
            "sum" => graph.sum_cols(x[0]),
            "row_max" => return graph.row_max(x[0]).unwrap().to_vec(),
            "cross_entropy" => {
                let (ignore, smoothing) = (self.index("ignore"), self.number("smoothing"));
                let loss = graph.cross_entropy(x[0], x[1], ignore, smoothing);
                loss.map(|loss| loss.loss)
            }
            "attention" => {
                let options = AttentionOptions::new(self.size("heads"))
                    .causal(self.options["causal"] == true);
                graph.cross_attention(x[0], x[1], None, options)
            }
            "normalize" => energyflow::nn::normalize(graph, x[0]),
            other => panic!("no operation {other}"),
        };
        vec![y.unwrap()]
    }

    fn arrays(&self) -> Vec<(String, Array)> {
        let inputs = self.inputs.iter().enumerate();
        let mut arrays: Vec<_> = inputs
            .map(|(i, (shape, data))| {
                let shape: &[usize] = if shape.is_empty() { &[1] } else { shape };
                let array = match data {
                    Data::Float(data) => Array::from_f32(shape, data),
                    Data::Index(data) => Array::from_u32(shape, data),
                };
                (format!("x{i}"), array.unwrap())
            })
            .collect();
        if let Some(dy) = &self.dy {
            let shape: &[usize] = if self.shape.is_empty() {
                &[1]
            } else {
                &self.shape
            };
            arrays.push(("dy".into(), Array::from_f32(shape, dy).unwrap()));
        }
        arrays
    }

    /// What the reference computes.
    fn on_reference(&self) -> Vec<(String, Vec<f64>)> {
        let graph = self.graph();
        let arrays = self.arrays();
        let inputs: Vec<_> = arrays
            .iter()
            .map(|(name, array)| (name.as_str(), array.clone()))
            .collect();
        let found = Interpreter::new(&graph).run(&graph, &inputs).unwrap();
        let names = self.expected.iter().map(|(name, _)| name);
        names
            .map(|name| (name.clone(), found[name].data().to_vec()))
            .collect()
    }

    /// What an adapter computes.
    fn on(&self, gpu: &Gpu) -> Vec<(String, Vec<f64>)> {
        let graph = self.graph();
        let mut session = Session::new(gpu, 0);
        let executable = session.compile(&graph).unwrap();
        let names: Vec<String> = (0..self.inputs.len()).map(|i| format!("x{i}")).collect();
        let mut inputs: Vec<(&str, Host<'_>)> = Vec::new();
        for (name, (_, data)) in names.iter().zip(&self.inputs) {
            inputs.push((
                name,
                match data {
                    Data::Float(data) => Host::from(data),
                    Data::Index(data) => Host::from(data),
                },
            ));
        }
        if let Some(dy) = &self.dy {
            inputs.push(("dy", Host::from(dy)));
        }
        executable.poison().unwrap();
        let found = executable.run(&inputs).unwrap().wait().unwrap();
        let names = self.expected.iter().map(|(name, _)| name);
        names
            .map(|name| {
                let numbers = found.get(name).unwrap();
                (name.clone(), numbers.into_iter().map(f64::from).collect())
            })
            .collect()
    }

    /// Element `i` of each operand of a function of one or two elements.
    fn elements(&self, i: usize) -> Vec<f32> {
        let inputs = self.inputs.iter().filter(|_| self.is_elementwise());
        inputs
            .filter_map(|(_, data)| match data {
                Data::Float(data) => Some(data[i]),
                Data::Index(_) => None,
            })
            .collect()
    }

    /// Why element `i` of an output need not be PyTorch's.
    fn exception(&self, output: &str, i: usize) -> Option<&'static str> {
        let gradient = output.starts_with('d');
        match (self.op.as_str(), self.elements(i).as_slice()) {
            ("abs" | "relu" | "clamp", [x]) if gradient && x.is_nan() => {
                Some("derivatives at NaN are NaN, PyTorch's are 0 or dy")
            }
            ("gelu", [x]) if x.is_infinite() => Some("the limit, PyTorch has NaN"),
            ("rsqrt", [x]) if gradient && *x == 0.0 => {
                Some("-0 is taken for 0, PyTorch's derivative changes its sign there")
            }
            ("max" | "min", [a, b]) if gradient && a == b => {
                Some("one of equal operands gets the gradient, PyTorch halves it")
            }
            ("max" | "min", [a, b]) if gradient && (a.is_nan() || b.is_nan()) => {
                Some("beside NaN one operand gets the gradient, PyTorch gives it to both")
            }
            _ => None,
        }
    }

    /// The first element that differs from PyTorch's by more than allowed, in words.
    fn difference(&self, found: &[(String, Vec<f64>)], adapter: bool) -> Option<String> {
        for ((name, found), (_, expected)) in found.iter().zip(&self.expected) {
            assert_eq!(found.len(), expected.len(), "{}: {name}", self.op);
            let finite: Vec<f64> = expected.iter().copied().filter(|x| x.is_finite()).collect();
            let square: f64 = finite.iter().map(|x| x * x).sum();
            let rms = (square / finite.len().max(1) as f64).sqrt();
            // Elements of a sum are as exact as its largest ones, elements by themselves as themselves.
            let scale = if self.is_elementwise() { 0.0 } else { rms };
            for (i, (&got, &wanted)) in found.iter().zip(expected).enumerate() {
                if self.exception(name, i).is_some() {
                    continue;
                }
                let same = match adapter {
                    true => close(got, f64::from(wanted as f32), 2e-5, scale, 2e-6),
                    false => close(got, wanted, 1e-9, scale, 1e-13),
                };
                if !same {
                    let inputs = self.elements(i);
                    let options = serde_json::to_string(&self.options).unwrap();
                    return Some(format!(
                        "{} {options}: {name}[{i}] of {inputs:?} is {got:e}, PyTorch has {wanted:e}",
                        self.op
                    ));
                }
            }
        }
        None
    }
}

fn close(got: f64, wanted: f64, relative: f64, scale: f64, absolute: f64) -> bool {
    if wanted.is_nan() || got.is_nan() {
        return wanted.is_nan() && got.is_nan();
    }
    if wanted.is_infinite() || got.is_infinite() {
        return wanted == got;
    }
    (got - wanted).abs() <= relative * (wanted.abs() + scale) + absolute
}

/// All samples of operations; optimizers have a test of their own.
fn all() -> Vec<Given> {
    let numbers = numbers();
    let samples = description().samples;
    let samples = samples.iter().filter(|sample| sample.op != "adamw");
    samples.map(|sample| numbers.given(sample)).collect()
}

#[test]
fn the_reference_agrees() {
    let mut table: BTreeMap<String, [usize; 2]> = BTreeMap::new();
    let mut differences = Vec::new();
    for given in all() {
        let from = given.options["torch"].as_str().unwrap();
        let counts = table.entry(format!("{} ({from})", given.op)).or_default();
        counts[0] += 1;
        match given.difference(&given.on_reference(), false) {
            None => counts[1] += 1,
            Some(difference) => differences.push(difference),
        }
    }
    let description = description();
    let mut exceptions: BTreeMap<_, usize> = BTreeMap::new();
    for given in all() {
        for (name, numbers) in &given.expected {
            for i in 0..numbers.len() {
                if let Some(why) = given.exception(name, i) {
                    *exceptions.entry((given.op.clone(), why)).or_default() += 1;
                }
            }
        }
    }
    println!("{}", description.origin);
    println!("elements that need not agree: {exceptions:?}");
    println!("| operation | samples | agree | left out, and why |\n|---|---|---|---|");
    for (name, [samples, agree]) in &table {
        let source = name.split(['(', ')']).nth(1).unwrap_or_default();
        let why = description.left_out.get(source).map(|reasons| {
            let reasons = reasons.iter().map(|(why, n)| format!("{n}: {why}"));
            reasons.collect::<Vec<_>>().join("; ")
        });
        println!(
            "| {name} | {samples} | {agree} | {} |",
            why.unwrap_or_default()
        );
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[test]
fn adapters_agree() {
    let mut joined: BTreeMap<String, Given> = BTreeMap::new();
    let mut taken: BTreeMap<String, usize> = BTreeMap::new();
    let mut chosen = Vec::new();
    for mut given in all() {
        if given.is_elementwise() {
            given.options.remove("torch");
            let kind = format!("{} {:?} {}", given.op, given.options, given.dy.is_some());
            match joined.get_mut(&kind) {
                Some(whole) => whole.join(&given),
                None => {
                    joined.insert(kind, given);
                }
            }
            continue;
        }
        let count = taken.entry(given.op.clone()).or_default();
        *count += 1;
        if *count <= ON_ADAPTERS || given.options["torch"] == "extreme values" {
            chosen.push(given);
        }
    }
    let mut differences = Vec::new();
    for given in joined.values().chain(&chosen) {
        for (name, gpu) in [("adapter", gpu()), ("with barriers", tiled_gpu())] {
            if let Some(difference) = given.difference(&given.on(&gpu), true) {
                differences.push(format!("{name}: {difference}"));
            }
        }
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[test]
fn fifty_steps_of_adamw_agree() {
    let (numbers, description) = (numbers(), description());
    let trainings = description.samples.iter().filter(|s| s.op == "adamw");
    let mut count = 0;
    for sample in trainings {
        count += 1;
        let option = |name: &str| sample.options[name].as_f64().map(|x| x as f32);
        let steps = sample.options["steps"].as_u64().unwrap() as usize;
        let schedule = Schedule::WarmupCosine {
            peak: 1e-2,
            end: option("end").unwrap(),
            warmup: sample.options["warmup"].as_u64().unwrap() as u32,
            total: steps as u32,
        };
        let optimizer = AdamW::default()
            .schedule(schedule)
            .beta2(0.99)
            .weight_decay(option("decay").unwrap())
            .clip(option("clip"))
            .group(ParameterGroup::new("b").names(["b"]).weight_decay(0.0));
        let mut graph = Graph::new();
        let mut parameters = Vec::new();
        let mut losses = Vec::new();
        for (name, input) in ["a", "b"].into_iter().zip(&sample.inputs) {
            let p = graph
                .parameter(name, &input.shape, Init::Constant(0.0))
                .unwrap();
            let gradient = format!("{name}'");
            let g = graph.input(&gradient, &input.shape, DType::F32).unwrap();
            let product = graph.mul(p, g).unwrap();
            losses.push(graph.sum_all(product).unwrap());
            parameters.push(p);
        }
        let loss = graph.add(losses[0], losses[1]).unwrap();
        optimizer.step(&mut graph, loss, &parameters).unwrap();
        let mut session = Session::new(&gpu(), 0);
        let executable = session.compile(&graph).unwrap();
        let mut interpreter = Interpreter::new(&graph);
        for (name, input) in ["a", "b"].into_iter().zip(&sample.inputs) {
            let start = numbers.f32(&input.data);
            session.set(name, &start).unwrap();
            interpreter.set(name, Array::from_f32(&input.shape, &start).unwrap());
        }
        let gradients = [&sample.inputs[2], &sample.inputs[3]].map(|i| numbers.f32(&i.data));
        let rates = numbers.f64(&sample.results[2]);
        for (step, rate) in rates.iter().enumerate() {
            let ours = f64::from(schedule.at(step as u32 + 1));
            assert!(
                (ours - rate).abs() < 1e-6 * rate,
                "step {step}: {ours}, {rate}"
            );
            let [a, b] = [0, 1].map(|i| {
                let n = gradients[i].len() / steps;
                gradients[i][step * n..(step + 1) * n].to_vec()
            });
            let inputs = [("a'", Host::from(&a)), ("b'", Host::from(&b))];
            executable.run(&inputs).unwrap().wait().unwrap();
            let arrays = [
                ("a'", Array::from_f32(&sample.inputs[0].shape, &a).unwrap()),
                ("b'", Array::from_f32(&sample.inputs[1].shape, &b).unwrap()),
            ];
            interpreter.run(&graph, &arrays).unwrap();
        }
        for (name, result) in ["a", "b"].into_iter().zip(&sample.results) {
            let wanted = numbers.f64(result);
            let reference = interpreter.get(name).unwrap();
            let found = session.get(name).unwrap();
            for (i, wanted) in wanted.iter().enumerate() {
                // The schedule and the rates are f32 in both.
                let error = (reference.data()[i] - wanted).abs();
                assert!(error < 2e-6, "reference, {name}[{i}]: {error:e}");
                let error = (f64::from(found[i]) - wanted).abs();
                assert!(error < 1e-5, "adapter, {name}[{i}]: {error:e}");
            }
        }
    }
    assert_eq!(count, 4);
}
