//! Runs a graph on the GPU and on the reference and compares all outputs.
#![allow(dead_code, reason = "every test file uses its part")]

pub mod convolution;
pub mod network;
#[cfg(feature = "trace")]
#[path = "../stand_in/mod.rs"]
pub mod stand_in;
pub mod toy;

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use energyflow::graph::{Graph, Init, Source, ValueId};
use energyflow::reference::{Array, Interpreter, numeric_gradient};
use energyflow::runtime::{Host, Outputs};
use energyflow::types::{DType, Shape};
use energyflow::{Executable, Gpu, GpuOptions, Session};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Options of the devices of tests. What computes the kernels may be something else than the adapter, see `tests/stand_in`.
/// `ENERGYFLOW_TEST_BASELINE` restricts them to the WebGPU baseline: `0` with workgroup memory, `1` barrier-free.
pub fn options() -> GpuOptions {
    #[cfg(feature = "trace")]
    stand_in::prepare();
    let options = GpuOptions::from_env().unwrap();
    match std::env::var("ENERGYFLOW_TEST_BASELINE") {
        Ok(barrier_free) => options.baseline(true).barrier_free(barrier_free == "1"),
        Err(_) => options,
    }
}

/// The device of a test process. Without an adapter every test fails here.
pub fn gpu() -> Gpu {
    static GPU: LazyLock<Gpu> =
        LazyLock::new(|| Gpu::new(&options()).expect("tests need a GPU adapter"));
    GPU.clone()
}

/// A device with nothing but WebGPU's baseline: f16 storage through pack2x16float.
pub fn baseline_gpu() -> Gpu {
    static GPU: LazyLock<Gpu> = LazyLock::new(|| {
        Gpu::new(&options().baseline(true).barrier_free(false)).expect("tests need a GPU adapter")
    });
    GPU.clone()
}

/// A device whose kernels use workgroup memory and barriers, as on hardware, whatever the adapter.
pub fn tiled_gpu() -> Gpu {
    static GPU: LazyLock<Gpu> = LazyLock::new(|| {
        Gpu::new(&options().barrier_free(false)).expect("tests need a GPU adapter")
    });
    GPU.clone()
}

/// A barrier-free device without 16-bit floats in shaders.
pub fn packed_gpu() -> Gpu {
    static GPU: LazyLock<Gpu> = LazyLock::new(|| {
        Gpu::new(&options().f16(false).barrier_free(true)).expect("tests need a GPU adapter")
    });
    GPU.clone()
}

/// A device whose products use matrix units. Fails where the adapter has none, or where they fail their test.
pub fn cooperative_gpu() -> Gpu {
    static GPU: LazyLock<Gpu> = LazyLock::new(|| {
        let options = options().cooperative(true).barrier_free(false);
        let gpu = Gpu::new(&options).expect("tests need a GPU adapter");
        let capabilities = gpu.capabilities();
        assert!(
            capabilities.matrix_units.is_some(),
            "no matrix units:\n{capabilities}"
        );
        gpu
    });
    GPU.clone()
}

/// Sizes around the tiles of the kernels, with primes.
pub const SIZES: [usize; 12] = [1, 7, 13, 31, 32, 33, 63, 64, 65, 127, 128, 129];

enum Data {
    Float(String, Vec<f32>),
    Index(String, Vec<u32>),
}

/// A graph under construction together with random data for its inputs and parameters.
pub struct Case {
    pub graph: Graph,
    rng: ChaCha8Rng,
    data: Vec<Data>,
    parameters: Vec<(String, Vec<f32>)>,
    names: usize,
    pub dtype: DType,
}

/// How far GPU and reference may differ.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    /// ‖gpu − reference‖ / ‖reference‖
    pub normalised: f64,
    /// Largest |gpu − reference| / (|reference| + rms of the reference).
    pub relative: f64,
}

impl Case {
    pub fn new(seed: u64, dtype: DType) -> Self {
        Self {
            graph: Graph::new(),
            rng: ChaCha8Rng::seed_from_u64(seed),
            data: Vec::new(),
            parameters: Vec::new(),
            names: 0,
            dtype,
        }
    }

    fn name(&mut self, kind: &str) -> String {
        self.names += 1;
        format!("{kind}{}", self.names)
    }

    pub fn uniform(&mut self, n: usize, low: f32, high: f32) -> Vec<f32> {
        (0..n).map(|_| self.rng.random_range(low..high)).collect()
    }

    /// An input in the case's element type, uniform in ±1.
    pub fn input(&mut self, dims: &[usize]) -> ValueId {
        self.input_in(dims, -1.0, 1.0)
    }

    pub fn input_in(&mut self, dims: &[usize], low: f32, high: f32) -> ValueId {
        let data = self.uniform(dims.iter().product(), low, high);
        let dtype = self.dtype;
        self.input_of(dims, dtype, data)
    }

    pub fn input_of(&mut self, dims: &[usize], dtype: DType, data: Vec<f32>) -> ValueId {
        let name = self.name("x");
        let id = self.graph.input(&name, dims, dtype).unwrap();
        self.data.push(Data::Float(name, data));
        id
    }

    /// Zeros and ones, f32.
    pub fn mask(&mut self, n: usize) -> ValueId {
        let data = (0..n)
            .map(|_| f32::from(self.rng.random_bool(0.6)))
            .collect();
        self.input_of(&[n], DType::F32, data)
    }

    pub fn ids(&mut self, n: usize, below: u32) -> ValueId {
        let data = (0..n).map(|_| self.rng.random_range(0..below)).collect();
        self.ids_of(data, below)
    }

    pub fn ids_of(&mut self, data: Vec<u32>, below: u32) -> ValueId {
        let name = self.name("ids");
        let id = self.graph.index_input(&name, data.len(), below).unwrap();
        self.data.push(Data::Index(name, data));
        id
    }

    /// An f32 parameter, uniform in ±1.
    pub fn parameter(&mut self, dims: &[usize]) -> ValueId {
        let name = self.name("p");
        let data = self.uniform(dims.iter().product(), -1.0, 1.0);
        let id = self
            .graph
            .parameter(&name, dims, Init::Constant(0.0))
            .unwrap();
        self.parameters.push((name, data));
        id
    }

    /// Random values, uniform in ± `bound`, for the parameters that layers declared.
    pub fn fill_parameters(&mut self, bound: f32) {
        let known: Vec<String> = self
            .parameters
            .iter()
            .map(|(name, _)| name.clone())
            .collect();
        let declared = self.graph.parameters();
        let declared = declared.map(|(_, value)| (value.name.clone(), value.shape.len()));
        let declared: Vec<_> = declared.collect();
        for (name, len) in declared {
            if !known.contains(&name) {
                let data = self.uniform(len, -bound, bound);
                self.parameters.push((name, data));
            }
        }
    }

    /// A weighted sum of `y`, so that its gradient is random: what gradient tests differentiate.
    pub fn random_loss(&mut self, y: ValueId) -> ValueId {
        let value = self.graph.value(y).unwrap();
        let (dims, dtype) = (value.shape.dims().to_vec(), value.dtype);
        let data = self.uniform(dims.iter().product(), -1.0, 1.0);
        let weights = self.input_of(&dims, dtype, data);
        let product = self.graph.mul(y, weights).unwrap();
        self.graph.sum_all(product).unwrap()
    }

    pub fn output(&mut self, name: &str, value: ValueId) {
        self.graph.output(name, value).unwrap();
    }

    /// Outputs the gradients of a random loss of `y` with respect to `wrt`.
    pub fn gradients(&mut self, y: ValueId, wrt: &[ValueId]) {
        let loss = self.random_loss(y);
        let gradients = self.graph.gradients(loss, wrt).unwrap();
        for (i, gradient) in gradients.into_iter().enumerate() {
            self.output(&format!("gradient {i}"), gradient);
        }
    }

    fn arrays(&self) -> Vec<(&str, Array)> {
        let array = |name: &str, data: Vec<f64>| {
            let id = self.graph.find(name).unwrap();
            let dims = self.graph.value(id).unwrap().shape.dims();
            Array::new(dims, data).unwrap()
        };
        self.data
            .iter()
            .map(|data| match data {
                Data::Float(name, data) => {
                    let data = data.iter().copied().map(f64::from).collect();
                    (name.as_str(), array(name, data))
                }
                Data::Index(name, data) => {
                    let data = data.iter().copied().map(f64::from).collect();
                    (name.as_str(), array(name, data))
                }
            })
            .collect()
    }

    fn interpreter(&self) -> Interpreter {
        let mut interpreter = Interpreter::new(&self.graph);
        for (name, data) in &self.parameters {
            let id = self.graph.find(name).unwrap();
            let dims = self.graph.value(id).unwrap().shape.dims();
            interpreter.set(name, Array::from_f32(dims, data).unwrap());
        }
        interpreter
    }

    fn hosts(&self) -> Vec<(&str, Host<'_>)> {
        self.data
            .iter()
            .map(|data| match data {
                Data::Float(name, data) => (name.as_str(), Host::from(data)),
                Data::Index(name, data) => (name.as_str(), Host::from(data)),
            })
            .collect()
    }

    /// Other data for an input that exists.
    pub fn replace(&mut self, input: ValueId, new: Vec<f32>) {
        let wanted = &self.graph.value(input).unwrap().name;
        for data in &mut self.data {
            if let Data::Float(name, data) = data
                && name == wanted
            {
                assert_eq!(data.len(), new.len());
                *data = new;
                return;
            }
        }
        panic!("{wanted:?} is no float input");
    }

    /// Compiles the graph on `gpu` and sets its parameters, there and in an interpreter.
    pub fn start(&self, gpu: &Gpu) -> Running {
        let mut session = Session::new(gpu, 0);
        let executable = session.compile(&self.graph).unwrap();
        for (name, data) in &self.parameters {
            session.set(name, data).unwrap();
        }
        Running {
            session,
            executable,
            interpreter: self.interpreter(),
        }
    }

    /// The outputs of one run on `gpu` and on the reference, not compared.
    pub fn run_on(&self, gpu: &Gpu) -> (Outputs, HashMap<String, Array>) {
        let mut running = self.start(gpu);
        let executable = &running.executable;
        executable.poison().unwrap();
        let outputs = executable.run(&self.hosts()).unwrap().wait().unwrap();
        let expected = running.interpreter.run(&self.graph, &self.arrays());
        (outputs, expected.unwrap())
    }

    /// Number of dispatches that a run takes.
    pub fn dispatches(&self) -> usize {
        let mut session = Session::new(&gpu(), 0);
        session.compile(&self.graph).unwrap().plan().dispatches
    }

    /// Compares every output with the reference: barrier-free kernels, kernels with workgroup memory, and, where the graph has
    /// f16 values, those of the WebGPU baseline.
    pub fn check(&self, tolerance: Tolerance) {
        self.check_on(&gpu(), tolerance);
        self.check_on(&tiled_gpu(), tolerance);
        if self
            .graph
            .values()
            .any(|(_, value)| value.dtype == DType::F16)
        {
            self.check_on(&baseline_gpu(), tolerance);
        }
    }

    /// Compares every output with the reference, after filling all intermediate memory with NaN, and its padding with zero.
    pub fn check_on(&self, gpu: &Gpu, tolerance: Tolerance) {
        let mut running = self.start(gpu);
        let (outputs, expected) = running.step(self, tolerance);
        assert!(!expected.is_empty(), "nothing to compare");
        let executable = running.executable;
        let again = executable.run(&self.hosts()).unwrap().wait().unwrap();
        for name in expected.keys() {
            let (first, second) = (outputs.get(name).unwrap(), again.get(name).unwrap());
            let same = first
                .iter()
                .zip(&second)
                .all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{name}: two runs differ");
        }
    }

    /// Checks the reference's gradient of `loss` with respect to `wrt` by finite differences.
    pub fn check_finite_differences(&mut self, y: ValueId, wrt: &[ValueId], bound: f64) {
        let loss = self.random_loss(y);
        let gradients = self.graph.gradients(loss, wrt).unwrap();
        let interpreter = self.interpreter();
        let values = interpreter
            .clone()
            .run_values(&self.graph, &self.arrays())
            .unwrap();
        for (&value, gradient) in wrt.iter().zip(&gradients) {
            let numeric =
                numeric_gradient(&interpreter, &self.graph, &self.arrays(), loss, value).unwrap();
            let exact = &values[gradient];
            for (i, (a, b)) in exact.data().iter().zip(numeric.data()).enumerate() {
                let error = (a - b).abs() / (1.0 + b.abs());
                assert!(
                    error < bound,
                    "element {i}: {a} by rule, {b} by differences\n{}",
                    self.graph
                );
            }
        }
    }
}

/// A graph at work, with its twin on the reference.
pub struct Running {
    pub session: Session,
    pub executable: Arc<Executable>,
    pub interpreter: Interpreter,
}

impl Running {
    /// One run of both, with all intermediate memory filled with NaN before; compares every output and its padding.
    pub fn step(&mut self, case: &Case, tolerance: Tolerance) -> (Outputs, HashMap<String, Array>) {
        self.executable.poison().unwrap();
        let outputs = self.executable.run(&case.hosts()).unwrap().wait().unwrap();
        let expected = self.interpreter.run(&case.graph, &case.arrays()).unwrap();
        assert_eq!(expected.len(), case.graph.outputs().len());
        for (name, array) in &expected {
            let got = outputs.get(name).unwrap();
            let id = case.graph.outputs().iter().find(|(of, _)| of == name);
            let dtype = case.graph.value(id.unwrap().1).unwrap().dtype;
            compare_above(least_rms(dtype), name, &got, array, tolerance, || {
                format!("{}", case.graph)
            });
            assert!(
                outputs.padding_is_zero(name).unwrap(),
                "{name}: padding is not zero\n{}",
                case.graph
            );
        }
        (outputs, expected)
    }

    /// Compares all parameters and states.
    pub fn compare_variables(&self, case: &Case, tolerance: Tolerance) {
        let mut count = 0;
        for (_, value) in case.graph.values() {
            if matches!(value.source, Source::Parameter(_) | Source::State(_)) {
                let got = self.session.get(&value.name).unwrap();
                let expected = self.interpreter.get(&value.name).unwrap();
                compare(&value.name, &got, expected, tolerance, String::new);
                count += 1;
            }
        }
        assert!(count > 0, "nothing to compare");
    }
}

/// False for NaN.
fn within(error: f64, bound: f64) -> bool {
    error <= bound
}

/// What an rms counts as at least. Below its smallest normal number f16 has steps of 2⁻²⁴, and no relative precision: where the terms of an
/// element cancel, as in the gradient of a softmax over one key, what rounding leaves of them is one such step.
pub fn least_rms(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => half::f16::MIN_POSITIVE.to_f64(),
        _ => 1e-12,
    }
}

/// As [`compare_above`], of f32 values.
pub fn compare(
    name: &str,
    got: &[f32],
    expected: &Array,
    tolerance: Tolerance,
    context: impl FnOnce() -> String,
) {
    compare_above(
        least_rms(DType::F32),
        name,
        got,
        expected,
        tolerance,
        context,
    );
}

/// Normalised and largest relative error within bounds; the first five offenders on failure.
pub fn compare_above(
    least_rms: f64,
    name: &str,
    got: &[f32],
    expected: &Array,
    tolerance: Tolerance,
    context: impl FnOnce() -> String,
) {
    let reference = expected.data();
    assert_eq!(got.len(), reference.len(), "{name}: number of elements");
    let square: f64 = reference.iter().map(|x| x * x).sum();
    let rms = (square / reference.len() as f64).sqrt().max(least_rms);
    let mut difference = 0.0;
    let mut offenders = Vec::new();
    for (i, (&g, &r)) in got.iter().zip(reference).enumerate() {
        let error = f64::from(g) - r;
        difference += error * error;
        let relative = error.abs() / (r.abs() + rms);
        if !within(relative, tolerance.relative) {
            offenders.push((i, g, r));
        }
    }
    let normalised = (difference / reference.len() as f64).sqrt() / rms;
    if !within(normalised, tolerance.normalised) || !offenders.is_empty() {
        offenders.truncate(5);
        panic!(
            "{name}: normalised error {normalised:.3e}, {tolerance:?}; (index, gpu, reference) {offenders:?}; shape {}\n{}",
            expected.shape(),
            context()
        );
    }
}

pub const F32: Tolerance = Tolerance {
    normalised: 2e-6,
    relative: 2e-5,
};

pub const F16: Tolerance = Tolerance {
    normalised: 1e-3,
    relative: 4e-3,
};

pub fn tolerance(dtype: DType) -> Tolerance {
    match dtype {
        DType::F16 => F16,
        _ => F32,
    }
}

pub fn shape(dims: &[usize]) -> Shape {
    Shape::new(dims).unwrap()
}
