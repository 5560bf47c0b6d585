//! A small classifier of tokens, with inputs that put any number into its activations and gradients.

use energyflow::graph::{Graph, Init, Source, ValueId};
use energyflow::nn::{Embedding, Gelu, LayerNorm, Linear};
use energyflow::reference::{Array, Interpreter};
use energyflow::runtime::{Executable, Host, Outputs, Pending, Session};
use energyflow::train::AdamW;
use energyflow::types::DType;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub const CLASSES: usize = 11;
/// Rows of the first layer's weight have the same stride in f32 and in f16, so that the session keeps its f16 copy.
const WIDTH: usize = 20;
/// A target that does not count.
const IGNORED: u32 = CLASSES as u32;
/// Parameters whose gradients an input is added to: few, since a software driver compiles each shape for seconds.
const INJECTED: [&str; 3] = ["embedding.weight", "first.bias", "second.weight"];
pub const ACTIVATIONS: &str = "into activations";

/// A graph with the loss and its count, and what its inputs need.
pub struct Toy {
    pub graph: Graph,
    pub loss: ValueId,
    pub count: ValueId,
    rows: usize,
    /// Inputs added to activations or gradients, with their lengths.
    pub injections: Vec<(String, usize)>,
}

/// Data of one run. Injections are zero unless set.
#[derive(Clone)]
pub struct Data {
    ids: Vec<u32>,
    targets: Vec<u32>,
    injections: Vec<(String, Vec<usize>, Vec<f32>)>,
}

fn layers(graph: &mut Graph) -> (Embedding, Linear, LayerNorm, Linear) {
    let uniform = Init::Uniform(1.0);
    (
        Embedding::new(graph, "embedding", CLASSES, WIDTH, None, uniform).unwrap(),
        Linear::new(graph, "first", WIDTH, 9, true).unwrap(),
        LayerNorm::new(graph, "norm", 9, 1e-5).unwrap(),
        Linear::new(graph, "second", 9, CLASSES, true).unwrap(),
    )
}

impl Toy {
    pub fn new(rows: usize, dtype: DType) -> Self {
        let mut graph = Graph::new();
        let (embedding, first, norm, second) = layers(&mut graph);
        let below = CLASSES as u32;
        let ids = graph.index_input("ids", rows, below).unwrap();
        let targets = graph.index_input("targets", rows, below + 1).unwrap();
        let x = embedding.forward(&mut graph, ids, dtype).unwrap();
        let mut injections = vec![(ACTIVATIONS.to_owned(), rows * WIDTH)];
        let into = graph.input(ACTIVATIONS, &[rows, WIDTH], dtype).unwrap();
        let x = graph.add(x, into).unwrap();
        let h = first.forward(&mut graph, x).unwrap();
        let h = Gelu::Tanh.forward(&mut graph, h).unwrap();
        let h = norm.forward(&mut graph, h).unwrap();
        let logits = second.forward(&mut graph, h).unwrap();
        let ce = graph
            .cross_entropy(logits, targets, Some(IGNORED), 0.1)
            .unwrap();
        // Its gradient for a parameter is the input.
        let mut loss = ce.loss;
        for name in INJECTED {
            let parameter = graph.find(name).unwrap();
            let value = graph.value(parameter).unwrap().clone();
            let name = format!("into {}", value.name);
            let into = graph.input(&name, value.shape.dims(), DType::F32).unwrap();
            let product = graph.mul(parameter, into).unwrap();
            let sum = graph.sum_all(product).unwrap();
            loss = graph.add(loss, sum).unwrap();
            injections.push((name, value.shape.len()));
        }
        Self {
            graph,
            loss,
            count: ce.count,
            rows,
            injections,
        }
    }

    /// The whole step as one graph.
    pub fn step(rows: usize, dtype: DType, optimizer: &AdamW) -> Self {
        let mut toy = Self::new(rows, dtype);
        toy.graph.output("loss", toy.loss).unwrap();
        let parameters = parameters(&toy.graph);
        optimizer
            .step(&mut toy.graph, toy.loss, &parameters)
            .unwrap();
        toy
    }

    /// The part of a step that every micro-batch goes through.
    pub fn accumulation(rows: usize, dtype: DType, optimizer: &AdamW) -> Self {
        let mut toy = Self::new(rows, dtype);
        let parameters = parameters(&toy.graph);
        let (loss, count) = (toy.loss, toy.count);
        optimizer
            .accumulate(&mut toy.graph, loss, count, &parameters, &[loss])
            .unwrap();
        toy
    }

    /// Random tokens, of which the first `counted` have a target that counts.
    pub fn data(&self, seed: u64, counted: usize) -> Data {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut draw = || rng.random_range(0..CLASSES as u32);
        let ids = (0..self.rows).map(|_| draw()).collect();
        let target = |row| if row < counted { draw() } else { IGNORED };
        let targets = (0..self.rows).map(target).collect();
        let injections = self.injections.iter().map(|(name, len)| {
            let id = self.graph.find(name).unwrap();
            let dims = self.graph.value(id).unwrap().shape.dims().to_vec();
            (name.clone(), dims, vec![0.0; *len])
        });
        Data {
            ids,
            targets,
            injections: injections.collect(),
        }
    }
}

/// The other part: the update from what was accumulated.
pub fn update(optimizer: &AdamW) -> Graph {
    let toy = Toy::accumulation(1, DType::F32, optimizer);
    optimizer.update(&[&toy.graph]).unwrap()
}

pub fn parameters(graph: &Graph) -> Vec<ValueId> {
    graph.parameters().map(|(id, _)| id).collect()
}

impl Data {
    /// One batch of several.
    pub fn concat(parts: &[Self]) -> Self {
        let mut whole = parts[0].clone();
        for part in &parts[1..] {
            whole.ids.extend(&part.ids);
            whole.targets.extend(&part.targets);
        }
        let (_, dims, data) = &mut whole.injections[0];
        dims[0] = whole.ids.len();
        *data = vec![0.0; whole.ids.len() * WIDTH];
        whole
    }

    /// Puts `number` into the middle of an injection.
    pub fn inject(&mut self, name: &str, number: f32) {
        let mut injections = self.injections.iter_mut();
        let (.., data) = injections.find(|(known, ..)| known == name).unwrap();
        let middle = data.len() / 2;
        data[middle] = number;
    }

    pub fn run(&self, executable: &Executable) -> Outputs {
        self.submit(executable).wait().unwrap()
    }

    pub fn submit(&self, executable: &Executable) -> Pending {
        let mut hosts = vec![
            ("ids", Host::from(&self.ids)),
            ("targets", Host::from(&self.targets)),
        ];
        for (name, _, data) in &self.injections {
            hosts.push((name, Host::from(data)));
        }
        executable.run(&hosts).unwrap()
    }

    pub fn arrays(&self) -> Vec<(&str, Array)> {
        let index = |data: &[u32]| Array::from_u32(&[data.len()], data).unwrap();
        let mut arrays = vec![("ids", index(&self.ids)), ("targets", index(&self.targets))];
        for (name, dims, data) in &self.injections {
            arrays.push((name, Array::from_f32(dims, data).unwrap()));
        }
        arrays
    }
}

/// Parameters and moments of a session as bits.
pub fn bits(session: &Session) -> Vec<(String, Vec<u32>)> {
    let mut all = Vec::new();
    for (name, _) in session.parameters() {
        let mut data = session.get(name).unwrap();
        for moments in session.moments(name).unwrap().unwrap() {
            data.extend(moments);
        }
        all.push((name.to_owned(), data.iter().map(|x| x.to_bits()).collect()));
    }
    all
}

/// Parameters and states of a graph as they are in the session.
pub fn interpreter(session: &Session, graph: &Graph) -> Interpreter {
    let mut interpreter = Interpreter::new(graph);
    for (_, value) in graph.values() {
        if matches!(value.source, Source::Parameter(_) | Source::State(_)) {
            let data = session.get(&value.name).unwrap();
            let array = Array::from_f32(value.shape.dims(), &data).unwrap();
            interpreter.set(&value.name, array);
        }
    }
    interpreter
}
