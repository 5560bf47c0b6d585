//! Attention and transformer layers: results and gradients of PyTorch's layers against the reference and the adapters.
//!
//! `scripts/torch_layers.py` writes the file.

mod common;

use common::{gpu, tiled_gpu};
use energyflow::graph::{Graph, ValueId};
use energyflow::nn::{
    Activation, Mode, MultiHeadAttention, NormOrder, TransformerEncoder, TransformerEncoderLayer,
    TransformerEncoderOptions,
};
use energyflow::reference::{Array, Interpreter};
use energyflow::types::DType;
use energyflow::{Gpu, Host, Session};
use safetensors::SafeTensors;
use serde::Deserialize;

static FILE: &[u8] = include_bytes!("data/torch_layers.safetensors");

#[derive(Deserialize)]
struct Description {
    origin: String,
    samples: Vec<Sample>,
}

#[derive(Debug, Deserialize)]
struct Sample {
    kind: String,
    batch: usize,
    time: usize,
    width: usize,
    masked: bool,
    heads: usize,
    causal: bool,
    #[serde(default)]
    hidden: usize,
    #[serde(default)]
    layers: usize,
    #[serde(default)]
    norm_first: bool,
    #[serde(default)]
    activation: String,
}

fn samples() -> Vec<Sample> {
    let (_, header) = SafeTensors::read_metadata(FILE).unwrap();
    let text = &header.metadata().as_ref().unwrap()["description"];
    let description: Description = serde_json::from_str(text).unwrap();
    println!("{}", description.origin);
    description.samples
}

/// A layer of PyTorch and its numbers.
struct Layer {
    sample: Sample,
    number: usize,
    file: SafeTensors<'static>,
    graph: Graph,
    /// Name and host values.
    parameters: Vec<(String, Vec<usize>, Vec<f32>)>,
}

impl Layer {
    fn new(number: usize, sample: Sample) -> Self {
        let mut graph = Graph::new();
        let (rows, dims) = (
            sample.batch * sample.time,
            [sample.batch, sample.time, sample.width],
        );
        let x = graph.input("x", &dims, DType::F32).unwrap();
        let mask = graph.input("mask", &[rows], DType::F32).unwrap();
        let dy = graph.input("dy", &dims, DType::F32).unwrap();
        let mask = sample.masked.then_some(mask);
        let y = forward(&mut graph, &sample, x, mask);
        let product = graph.mul(y, dy).unwrap();
        let loss = graph.sum_all(product).unwrap();
        let mut wrt = vec![("x".to_owned(), x)];
        let declared = graph.parameters();
        wrt.extend(declared.map(|(id, value)| (short(&value.name).to_owned(), id)));
        let ids: Vec<ValueId> = wrt.iter().map(|(_, id)| *id).collect();
        let gradients = graph.gradients(loss, &ids).unwrap();
        graph.output("y", y).unwrap();
        for ((name, _), gradient) in wrt.iter().zip(gradients) {
            graph.output(&format!("gradient/{name}"), gradient).unwrap();
        }
        let mut layer = Self {
            sample,
            number,
            file: SafeTensors::deserialize(FILE).unwrap(),
            parameters: Vec::new(),
            graph,
        };
        let declared = layer.graph.parameters();
        layer.parameters = declared
            .map(|(_, value)| {
                let data = layer.f32(&format!("parameter/{}", short(&value.name)));
                (value.name.clone(), value.shape.dims().to_vec(), data)
            })
            .collect();
        let prefix = format!("{number}/parameter/");
        let given = layer.file.names();
        let given = given.into_iter().filter(|name| name.starts_with(&prefix));
        assert_eq!(given.count(), layer.parameters.len());
        layer
    }

    fn f32(&self, name: &str) -> Vec<f32> {
        let tensor = self.file.tensor(&format!("{}/{name}", self.number));
        let (numbers, _) = tensor.unwrap().data().as_chunks::<4>();
        numbers.iter().map(|&b| f32::from_le_bytes(b)).collect()
    }

    fn f64(&self, name: &str) -> Vec<f64> {
        let tensor = self.file.tensor(&format!("{}/{name}", self.number));
        let (numbers, _) = tensor.unwrap().data().as_chunks::<8>();
        numbers.iter().map(|&b| f64::from_le_bytes(b)).collect()
    }

    fn inputs(&self) -> [(&'static str, Vec<f32>); 3] {
        ["x", "mask", "dy"].map(|name| (name, self.f32(name)))
    }

    /// Result and gradients by the reference.
    fn on_reference(&self) -> Vec<(String, Vec<f64>)> {
        let mut interpreter = Interpreter::new(&self.graph);
        for (name, dims, data) in &self.parameters {
            interpreter.set(name, Array::from_f32(dims, data).unwrap());
        }
        let arrays = self.inputs().map(|(name, data)| {
            let id = self.graph.find(name).unwrap();
            let dims = self.graph.value(id).unwrap().shape.dims();
            (name, Array::from_f32(dims, &data).unwrap())
        });
        let found = interpreter.run(&self.graph, &arrays).unwrap();
        let numbers = found.into_iter();
        numbers
            .map(|(name, array)| (name, array.data().to_vec()))
            .collect()
    }

    /// Result and gradients by an adapter.
    fn on(&self, gpu: &Gpu) -> Vec<(String, Vec<f64>)> {
        let mut session = Session::new(gpu, 0);
        let executable = session.compile(&self.graph).unwrap();
        for (name, _, data) in &self.parameters {
            session.set(name, data).unwrap();
        }
        executable.poison().unwrap();
        let data = self.inputs();
        let inputs: Vec<(&str, Host<'_>)> = data
            .iter()
            .map(|(name, data)| (*name, Host::from(data)))
            .collect();
        let found = executable.run(&inputs).unwrap().wait().unwrap();
        let names = self.graph.outputs().iter().map(|(name, _)| name.clone());
        names
            .map(|name| {
                let numbers = found.get(&name).unwrap();
                (name, numbers.into_iter().map(f64::from).collect())
            })
            .collect()
    }

    /// Fails where an element differs by more than this share of itself and the rms of all elements, or of all gradients: that of a bias
    /// of keys is zero, and what rounding leaves of it is as large as the terms that cancel.
    fn check(&self, found: &[(String, Vec<f64>)], bound: f64, by: &str) {
        assert!(found.len() > 1);
        let all = found.iter().map(|(name, _)| (name, self.f64(name)));
        let all: Vec<_> = all.collect();
        let most = all.iter().map(|(_, wanted)| rms(wanted));
        let most = most.fold(0.0, f64::max);
        for ((name, wanted), (_, found)) in all.iter().zip(found) {
            assert_eq!(wanted.len(), found.len(), "{name}");
            for (i, (wanted, found)) in wanted.iter().zip(found).enumerate() {
                let error = (wanted - found).abs() / (wanted.abs() + most);
                assert!(
                    error <= bound,
                    "{by}: {name}[{i}] is {found:e}, PyTorch has {wanted:e}, error {error:e}; {:?}",
                    self.sample
                );
            }
        }
    }
}

/// A parameter's name without that of the layer.
fn short(name: &str) -> &str {
    name.strip_prefix("t.").unwrap()
}

fn rms(numbers: &[f64]) -> f64 {
    (numbers.iter().map(|x| x * x).sum::<f64>() / numbers.len() as f64).sqrt()
}

fn forward(graph: &mut Graph, sample: &Sample, x: ValueId, mask: Option<ValueId>) -> ValueId {
    if sample.kind == "attention" {
        let layer = MultiHeadAttention::new(graph, "t", sample.width, sample.heads).unwrap();
        let y = layer.causal(sample.causal).forward(graph, x, mask);
        return y.unwrap();
    }
    let options = TransformerEncoderOptions::new(sample.width, sample.heads, sample.layers)
        .hidden(sample.hidden)
        .norm(match sample.norm_first {
            true => NormOrder::Pre,
            false => NormOrder::Post,
        })
        .activation(match &*sample.activation {
            "relu" => Activation::Relu,
            "gelu" => Activation::GeluErf,
            other => panic!("activation {other}"),
        })
        .eps(1e-5)
        .dropout(0.0)
        .causal(sample.causal);
    let y = match &*sample.kind {
        "layer" => TransformerEncoderLayer::new(graph, "t", &options)
            .unwrap()
            .forward(graph, x, mask, Mode::Eval),
        "encoder" => TransformerEncoder::new(graph, "t", &options)
            .unwrap()
            .forward(graph, x, mask, Mode::Eval),
        other => panic!("layer {other}"),
    };
    y.unwrap()
}

#[test]
fn the_reference_agrees() {
    let samples = samples();
    assert!(samples.len() >= 40);
    for (number, sample) in samples.into_iter().enumerate() {
        let layer = Layer::new(number, sample);
        layer.check(&layer.on_reference(), 1e-9, "reference");
    }
}

/// Every fifth layer: kernels take long to compile.
#[test]
fn adapters_agree() {
    for (number, sample) in samples().into_iter().enumerate().step_by(5) {
        let layer = Layer::new(number, sample);
        layer.check(&layer.on(&gpu()), 2e-5, "adapter");
        layer.check(&layer.on(&tiled_gpu()), 2e-5, "with barriers");
    }
}
