//! A whole network with its loss and data, against the reference: the loss, every gradient, and those by finite differences.

use energyflow::graph::{Graph, Init, Source, ValueId};
use energyflow::reference::{Array, Interpreter, numeric_gradient};
use energyflow::runtime::Host;
use energyflow::train::AdamW;
use energyflow::types::DType;
use energyflow::{Gpu, Session};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{Tolerance, compare};

#[derive(Clone)]
enum Data {
    Float(Vec<f32>),
    Index(Vec<u32>),
}

pub struct Network {
    pub graph: Graph,
    /// `[1]`
    pub loss: ValueId,
    pub rng: ChaCha8Rng,
    inputs: Vec<(String, Data)>,
    /// In host order; drawn when the graph is complete.
    parameters: Vec<(String, Vec<f32>)>,
}

impl Network {
    pub fn new(seed: u64) -> Self {
        let mut graph = Graph::new();
        let loss = graph.constant(&[1], 0.0).unwrap();
        Self {
            graph,
            loss,
            rng: ChaCha8Rng::seed_from_u64(seed),
            inputs: Vec::new(),
            parameters: Vec::new(),
        }
    }

    pub fn float(&mut self, name: &str, dims: &[usize], data: Vec<f32>) -> ValueId {
        self.inputs.push((name.into(), Data::Float(data)));
        self.graph.input(name, dims, DType::F32).unwrap()
    }

    /// Uniform in ±1.
    pub fn uniform(&mut self, name: &str, dims: &[usize]) -> ValueId {
        let data = (0..dims.iter().product())
            .map(|_| self.rng.random_range(-1.0..1.0))
            .collect();
        self.float(name, dims, data)
    }

    pub fn indices(&mut self, name: &str, data: Vec<u32>, below: usize) -> ValueId {
        let n = data.len();
        self.inputs.push((name.into(), Data::Index(data)));
        self.graph.index_input(name, n, below as u32).unwrap()
    }

    /// Random tokens and the mask of texts of these lengths: 0 is an empty row, `length` a full one.
    pub fn tokens(
        &mut self,
        used: &[usize],
        length: usize,
        vocabulary: usize,
    ) -> (Vec<u32>, Vec<f32>) {
        let n = used.len() * length;
        let (mut ids, mut mask) = (vec![0; n], vec![0.0; n]);
        for (row, &used) in used.iter().enumerate() {
            for i in row * length..row * length + used {
                ids[i] = self.rng.random_range(1..vocabulary as u32);
                mask[i] = 1.0;
            }
        }
        (ids, mask)
    }

    /// Parameters get values: drawn from their range, or somewhere near their constant.
    fn draw_parameters(&mut self) -> Vec<(ValueId, String)> {
        let mut drawn = Vec::new();
        let parameters: Vec<(ValueId, String, usize, Init)> = self
            .graph
            .parameters()
            .filter_map(|(id, value)| match value.source {
                Source::Parameter(init) => Some((id, value.name.clone(), value.shape.len(), init)),
                _ => None,
            })
            .collect();
        for (id, name, len, init) in parameters {
            let (low, high) = match init {
                Init::Uniform(bound) => (-bound, bound),
                Init::Constant(number) => (number - 0.2, number + 0.2),
                other => panic!("{other:?}"),
            };
            let data = (0..len).map(|_| self.rng.random_range(low..high)).collect();
            self.parameters.push((name.clone(), data));
            drawn.push((id, name));
        }
        drawn
    }

    /// The graph becomes a training step of all parameters.
    pub fn train(&mut self, loss: ValueId, optimizer: &AdamW) {
        self.loss = loss;
        let parameters = self.draw_parameters();
        let ids: Vec<ValueId> = parameters.iter().map(|parameter| parameter.0).collect();
        self.graph.output("loss", loss).unwrap();
        optimizer.step(&mut self.graph, loss, &ids).unwrap();
    }

    /// Some training steps on the GPU and on the reference, which must have the same losses and end with the same parameters and states.
    pub fn check_steps_on(&self, gpu: &Gpu, steps: usize, tolerance: Tolerance) {
        let mut session = Session::new(gpu, 0);
        let executable = session.compile(&self.graph).unwrap();
        let mut interpreter = self.interpreter();
        for (name, data) in &self.parameters {
            session.set(name, data).unwrap();
        }
        for step in 0..steps {
            executable.poison().unwrap();
            let outputs = executable.run(&self.hosts()).unwrap().wait().unwrap();
            let expected = interpreter.run(&self.graph, &self.arrays()).unwrap();
            for (name, array) in &expected {
                let got = outputs.get(name).unwrap();
                compare(name, &got, array, tolerance, || format!("step {step}"));
            }
        }
        for (_, value) in self.graph.values() {
            if matches!(value.source, Source::Parameter(_) | Source::State(_)) {
                let got = session.get(&value.name).unwrap();
                let got: Vec<f32> = array(&got, value.shape.dims(), value.taps)
                    .data()
                    .iter()
                    .map(|&x| x as f32)
                    .collect();
                let expected = interpreter.get(&value.name).unwrap();
                compare(&value.name, &got, expected, tolerance, String::new);
            }
        }
        for (name, before) in &self.parameters {
            let after = session.get(name).unwrap();
            assert!(&after != before, "{name} has not moved");
        }
    }

    /// The loss is an output, and the gradient of every parameter under its name; parameters get values: drawn from their range, or
    /// somewhere near their constant.
    pub fn differentiate(&mut self, loss: ValueId) {
        self.loss = loss;
        let parameters = self.draw_parameters();
        let ids: Vec<ValueId> = parameters.iter().map(|parameter| parameter.0).collect();
        let gradients = self.graph.gradients(loss, &ids).unwrap();
        self.graph.output("loss", loss).unwrap();
        for ((_, name), gradient) in parameters.into_iter().zip(gradients) {
            self.graph.output(&name, gradient).unwrap();
        }
    }

    fn interpreter(&self) -> Interpreter {
        let mut interpreter = Interpreter::new(&self.graph);
        for (name, data) in &self.parameters {
            let value = self.graph.value(self.graph.find(name).unwrap()).unwrap();
            interpreter.set(name, array(data, value.shape.dims(), value.taps));
        }
        interpreter
    }

    fn arrays(&self) -> Vec<(&str, Array)> {
        let arrays = self.inputs.iter().map(|(name, data)| {
            let value = self.graph.value(self.graph.find(name).unwrap()).unwrap();
            let array = match data {
                Data::Float(data) => Array::from_f32(value.shape.dims(), data),
                Data::Index(data) => Array::from_u32(value.shape.dims(), data),
            };
            (name.as_str(), array.unwrap())
        });
        arrays.collect()
    }

    fn hosts(&self) -> Vec<(&str, Host<'_>)> {
        let hosts = self.inputs.iter().map(|(name, data)| {
            let host = match data {
                Data::Float(data) => Host::from(data),
                Data::Index(data) => Host::from(data),
            };
            (name.as_str(), host)
        });
        hosts.collect()
    }

    /// Every output against the reference, all intermediate memory filled with NaN before.
    pub fn check_on(&self, gpu: &Gpu, tolerance: Tolerance) {
        let mut session = Session::new(gpu, 0);
        let executable = session.compile(&self.graph).unwrap();
        for (name, data) in &self.parameters {
            session.set(name, data).unwrap();
        }
        executable.poison().unwrap();
        let outputs = executable.run(&self.hosts()).unwrap().wait().unwrap();
        let expected = self.interpreter().run(&self.graph, &self.arrays()).unwrap();
        assert_eq!(expected.len(), self.graph.outputs().len());
        for (name, array) in &expected {
            let got = outputs.get(name).unwrap();
            compare(name, &got, array, tolerance, String::new);
            assert!(outputs.padding_is_zero(name).unwrap(), "{name}: padding");
        }
    }

    /// An output in f64.
    pub fn evaluate(&self, name: &str) -> Vec<f64> {
        let outputs = self.interpreter().run(&self.graph, &self.arrays()).unwrap();
        outputs[name].data().to_vec()
    }

    /// The gradients of the reference against finite differences of its loss.
    pub fn check_finite_differences(&self, bound: f64) {
        let interpreter = self.interpreter();
        let exact = interpreter
            .clone()
            .run(&self.graph, &self.arrays())
            .unwrap();
        for (name, _) in &self.parameters {
            let parameter = self.graph.find(name).unwrap();
            let numeric = numeric_gradient(
                &interpreter,
                &self.graph,
                &self.arrays(),
                self.loss,
                parameter,
            )
            .unwrap();
            let pairs = exact[name].data().iter().zip(numeric.data());
            for (i, (a, b)) in pairs.enumerate() {
                let error = (a - b).abs() / (1.0 + b.abs());
                assert!(error < bound, "{name} {i}: {a} by rule, {b} by differences");
            }
            let all_zero = exact[name].data().iter().all(|&x| x == 0.0);
            assert!(!all_zero, "{name} has no gradient");
        }
    }
}

/// Host order [out, in, k] → graph order [out, k·in].
pub fn array(host: &[f32], dims: &[usize], taps: Option<usize>) -> Array {
    let Some(taps) = taps else {
        return Array::from_f32(dims, host).unwrap();
    };
    let channels = dims[1] / taps;
    let mut data = vec![0.0; host.len()];
    for (i, &x) in host.iter().enumerate() {
        let (out, c, j) = (i / dims[1], i % dims[1] / taps, i % taps);
        data[out * dims[1] + j * channels + c] = x;
    }
    Array::from_f32(dims, &data).unwrap()
}
