//! Gradients of the losses against finite differences, and losses on the device against the reference.

use std::collections::HashMap;

use super::*;
use crate::gpu::{Gpu, GpuOptions};
use crate::graph::Source;
use crate::reference::{Array, Interpreter, numeric_gradient};
use crate::runtime::{Host, Session};
use crate::text::{Contrastive, DecoderOptions, EncoderOptions, PairLoss, next_tokens};

const SAMPLES: usize = 3;
const LENGTH: usize = 4;
const WIDTH: usize = 5;
const VOCABULARY: usize = 7;

fn model(shared: bool) -> Model {
    let encoder = EncoderOptions::default()
        .vocabulary(VOCABULARY)
        .length(LENGTH)
        .width(4)
        .hidden(6)
        .kernel(2)
        .dilations(vec![1, 2])
        .embedding(WIDTH)
        // So that terms are not nearly linear.
        .table_bound(1.0);
    let decoder = DecoderOptions::default()
        .vocabulary(VOCABULARY)
        .length(LENGTH)
        .width(4)
        .hidden(6)
        .kernel(2)
        .dilations(vec![2])
        .embedding(WIDTH)
        .table_bound(1.0);
    Model::default()
        .encoder(Some(encoder))
        .decoder(Some(decoder))
        .shared_last_block(shared)
}

/// Ids, mask, targets, z and target.
struct Data {
    ids: Vec<u32>,
    mask: Vec<f32>,
    targets: Vec<u32>,
    z: Vec<f32>,
    /// Of pairs.
    labels: Vec<u32>,
    anchors: Vec<u32>,
    candidates: Vec<f32>,
    score: Vec<f32>,
}

impl Data {
    fn new(texts: usize) -> Self {
        let n = texts * LENGTH;
        let ids: Vec<u32> = (0..n as u32).map(|i| (i * i + 2) % 7).collect();
        // Texts of four, three and two tokens.
        let mask: Vec<f32> = (0..n)
            .map(|i| f32::from(u8::from(i % LENGTH + i / LENGTH % 3 < LENGTH)))
            .collect();
        let mut targets = vec![0; n];
        next_tokens(&ids, &mask, LENGTH, VOCABULARY as u32, &mut targets).unwrap();
        let z = (0..SAMPLES * WIDTH).map(|i| ((i * 7 + 3) % 11) as f32 / 5.0 - 1.0);
        Self {
            ids,
            mask,
            targets,
            z: z.collect(),
            labels: Vec::new(),
            anchors: Vec::new(),
            candidates: Vec::new(),
            score: Vec::new(),
        }
    }

    /// For two samples of `each` texts.
    fn pairs(each: u32) -> Self {
        let none = 2;
        Self {
            labels: vec![1, each + 1],
            anchors: match each {
                2 => vec![none, 0, none, 1],
                _ => vec![none, 0, none, none, 1, none],
            },
            candidates: match each {
                2 => vec![-1e30, 0.0, -1e30, 0.0],
                _ => vec![-1e30, 0.0, 0.0, -1e30, 0.0, 0.0],
            },
            score: vec![0.9, -0.3],
            ..Self::new(2 * each as usize)
        }
    }

    fn host(&self, name: &str) -> Host<'_> {
        match name {
            "ids" => Host::from(&self.ids),
            "mask" => Host::from(&self.mask),
            "targets" => Host::from(&self.targets),
            "labels" => Host::from(&self.labels),
            "anchors" => Host::from(&self.anchors),
            "candidates" => Host::from(&self.candidates),
            "score" => Host::from(&self.score),
            _ => Host::from(&self.z),
        }
    }

    fn array(&self, name: &str, dims: &[usize]) -> Array {
        match name {
            "ids" => Array::from_u32(dims, &self.ids).unwrap(),
            "mask" => Array::from_f32(dims, &self.mask).unwrap(),
            "targets" => Array::from_u32(dims, &self.targets).unwrap(),
            "labels" => Array::from_u32(dims, &self.labels).unwrap(),
            "anchors" => Array::from_u32(dims, &self.anchors).unwrap(),
            "candidates" => Array::from_f32(dims, &self.candidates).unwrap(),
            "score" => Array::from_f32(dims, &self.score).unwrap(),
            _ => Array::from_f32(dims, &self.z).unwrap(),
        }
    }
}

/// Gradients of the loss against finite differences in f64, and loss and gradients on the device against the reference.
/// `still` are parameters whose gradient is left out on purpose.
fn check(
    build: impl FnOnce(&mut Graph) -> Result<Objective>,
    still: impl Fn(&str) -> bool,
    what: &str,
) {
    check_on(&Data::new(SAMPLES), build, still, what);
}

/// As [`check`], on these data. Returns metrics and gradients in f64 by name.
fn check_on(
    data: &Data,
    build: impl FnOnce(&mut Graph) -> Result<Objective>,
    still: impl Fn(&str) -> bool,
    what: &str,
) -> HashMap<String, Array> {
    let mut graph = Graph::new();
    let objective = build(&mut graph).unwrap();
    let parameters = objective.parameters.clone();
    let forward = graph.clone();
    let one = graph.constant(&[1], 1.0).unwrap();
    let gradients = graph
        .reached_gradients(objective.loss, one, &parameters)
        .unwrap();
    for &(name, value) in &objective.metrics {
        graph.output(name, value).unwrap();
    }
    let mut session = Session::new(&Gpu::new(&GpuOptions::default()).unwrap(), 3);
    for (&parameter, gradient) in parameters.iter().zip(&gradients) {
        let name = graph.value(parameter).unwrap().name.clone();
        if let Some(gradient) = gradient {
            graph.output(&name, *gradient).unwrap();
        }
    }
    let executable = session.compile(&graph).unwrap();
    let mut reference = Interpreter::new(&graph);
    for (_, value) in graph.parameters() {
        let n = value.shape.len();
        let data = values(&value.name, n);
        let taps = value.taps.unwrap_or(1);
        let inner = value.shape.cols() / taps;
        // The host has taps last.
        let host: Vec<f32> = (0..n)
            .map(|i| {
                let (row, rest) = (i / value.shape.cols(), i % value.shape.cols());
                let (channel, tap) = (rest / taps, rest % taps);
                data[row * value.shape.cols() + tap * inner + channel]
            })
            .collect();
        session.set(&value.name, &host).unwrap();
        let array = Array::from_f32(value.shape.dims(), &data).unwrap();
        reference.set(value.name.clone(), array);
    }
    let inputs: Vec<(&str, &[usize])> = graph
        .values()
        .filter(|(_, value)| matches!(value.source, Source::Input { .. }))
        .map(|(_, value)| (value.name.as_str(), value.shape.dims()))
        .collect();
    let arrays: Vec<(&str, Array)> = inputs
        .iter()
        .map(|&(name, dims)| (name, data.array(name, dims)))
        .collect();
    let hosts: Vec<(&str, Host<'_>)> = inputs
        .iter()
        .map(|&(name, _)| (name, data.host(name)))
        .collect();
    let outputs = executable.run(&hosts).unwrap().wait().unwrap();
    let expected = reference.clone().run(&graph, &arrays).unwrap();
    for (name, array) in &expected {
        let got = outputs.get(name).unwrap();
        for (got, want) in got.iter().zip(array.data()) {
            let error = (f64::from(*got) - want).abs();
            assert!(
                error <= 2e-4 * want.abs().max(0.02),
                "{what} {name}: {got} {want}"
            );
        }
    }
    for (&parameter, gradient) in parameters.iter().zip(gradients) {
        let name = &graph.value(parameter).unwrap().name;
        if still(name) {
            continue;
        }
        let numeric =
            numeric_gradient(&reference, &forward, &arrays, objective.loss, parameter).unwrap();
        let Some(_) = gradient else {
            assert!(
                numeric.data().iter().all(|x| x.abs() < 1e-9),
                "{what} {name}"
            );
            continue;
        };
        for (got, want) in expected[name].data().iter().zip(numeric.data()) {
            assert!(
                (got - want).abs() <= 1e-6 * want.abs().max(0.1),
                "{what} {name}: {got} {want}"
            );
        }
    }
    expected
}

fn pass() -> Pass {
    Pass::train(SAMPLES, DType::F32, None, false)
}

/// Values of a parameter in the order of the graph: what is compared does not depend on where they come from.
fn values(name: &str, n: usize) -> Vec<f32> {
    let value = |i| (((i * 37 + name.len() * 11) % 29) as f32 / 14.5 - 1.0) * 0.5;
    (0..n).map(value).collect()
}

/// The embeddings of texts in f64.
fn embeddings(data: &Data, texts: usize) -> Vec<f64> {
    let mut graph = Graph::new();
    embed(
        &mut graph,
        Network::Encoder(&model(false)),
        Pass::evaluate(texts, DType::F32),
    )
    .unwrap();
    let mut reference = Interpreter::new(&graph);
    for (_, value) in graph.parameters() {
        let data = values(&value.name, value.shape.len());
        let array = Array::from_f32(value.shape.dims(), &data).unwrap();
        reference.set(value.name.clone(), array);
    }
    let dims = [texts * LENGTH];
    let inputs = ["ids", "mask"].map(|name| (name, data.array(name, &dims)));
    let mut outputs = reference.run(&graph, &inputs).unwrap();
    outputs.remove("z").unwrap().data().to_vec()
}

/// Losses of pairs as their definitions say, from z [n·k, E] in f64: loss and mean cosine.
fn defined(loss: PairLoss, z: &[f64], score: &[f32]) -> [f64; 2] {
    let each = loss.texts();
    let z: Vec<&[f64]> = z.chunks(WIDTH).collect();
    let n = z.len() / each;
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let cos = |a: usize, b: usize| dot(z[a], z[b]) / (dot(z[a], z[a]) * dot(z[b], z[b])).sqrt();
    let own: Vec<f64> = (0..n).map(|i| cos(i * each, i * each + 1)).collect();
    let mean = |values: Vec<f64>| values.iter().sum::<f64>() / n as f64;
    let options = match loss {
        PairLoss::Cosine => {
            let squares = own.iter().zip(score);
            let squares = squares.map(|(cos, score)| (cos - f64::from(*score)).powi(2));
            return [mean(squares.collect()), mean(own)];
        }
        PairLoss::Contrastive(options) => options,
    };
    let scale = f64::from(options.scale);
    let candidates: Vec<usize> = (0..z.len()).filter(|text| text % each != 0).collect();
    let nll = |text: usize, right: usize, among: &[usize]| {
        let sum: f64 = among.iter().map(|&c| (scale * cos(text, c)).exp()).sum();
        sum.ln() - scale * cos(text, right)
    };
    let forward = (0..n).map(|i| nll(i * each, i * each + 1, &candidates));
    let forward = mean(forward.collect());
    let anchors: Vec<usize> = (0..n).map(|i| i * each).collect();
    let backward = (0..n).map(|i| nll(i * each + 1, i * each, &anchors));
    let backward = mean(backward.collect());
    let value = match options.symmetric {
        true => (forward + backward) / 2.0,
        false => forward,
    };
    [value, mean(own)]
}

#[test]
fn losses_of_pairs_and_their_gradients() {
    let contrastive = Contrastive::default().scale(4.0);
    let losses = [
        PairLoss::Cosine,
        PairLoss::Contrastive(contrastive),
        PairLoss::Contrastive(contrastive.negatives(true).symmetric(true)),
    ];
    for loss in losses {
        let each = loss.texts();
        let data = Data::pairs(each as u32);
        let options = TrainerOptions::default().pair_loss(Some(loss)).batch(2);
        let pass = Pass::train(2, DType::F32, None, false);
        let build =
            |graph: &mut Graph| distill(graph, Network::Encoder(&model(false)), &options, pass);
        let what = format!("{loss:?}");
        let got = check_on(&data, build, |_| false, &what);
        let z = embeddings(&data, 2 * each);
        let [value, cosine] = defined(loss, &z, &data.score);
        for (name, want) in [("loss", value), ("cosine", cosine)] {
            let got = got[name].data()[0];
            assert!((got - want).abs() < 1e-9, "{what} {name}: {got} {want}");
        }
    }
}

#[test]
fn gradients_of_the_contrastive_term() {
    let info_nce = InfoNce::new(0.7).temperature(0.3);
    let options = TrainerOptions::default().info_nce(Some(info_nce));
    let build =
        |graph: &mut Graph| distill(graph, Network::Encoder(&model(false)), &options, pass());
    check(build, |_| false, "InfoNCE");
}

#[test]
fn gradients_of_the_cycle_term() {
    let teacher = TrainerOptions::default().cycle(0.8).smoothing(0.1);
    // The shared block measures the text as a part of the encoder, too, and that is differentiated like all else.
    for shared in [false, true] {
        let build = |graph: &mut Graph| decode(graph, &model(shared), &teacher, pass());
        check(build, |_| false, "cycle");
    }
    // z is a constant in the cosine, and with `Student` everywhere: only what does not make z is compared.
    for condition in [Condition::Student, Condition::TrainedStudent] {
        let options = teacher.clone().condition(condition);
        let build = |graph: &mut Graph| decode(graph, &model(false), &options, pass());
        check(build, |name| !name.starts_with("decoder."), "student");
    }
}

#[test]
fn a_students_z_trains_the_encoder_only_if_asked() {
    let options = TrainerOptions::default();
    for (condition, trained) in [
        (Condition::Student, false),
        (Condition::TrainedStudent, true),
    ] {
        let options = options.clone().condition(condition);
        // The encoder's part is differentiated through z, the shared block in both of its places.
        let build = |graph: &mut Graph| decode(graph, &model(true), &options, pass());
        let still = |name: &str| !trained && name.starts_with("blocks.1.");
        check(build, still, "condition");
        let mut graph = Graph::new();
        let objective = build(&mut graph).unwrap();
        let one = graph.constant(&[1], 1.0).unwrap();
        let all: Vec<ValueId> = graph.parameters().map(|(id, _)| id).collect();
        let gradients = graph.reached_gradients(objective.loss, one, &all).unwrap();
        for (id, gradient) in all.into_iter().zip(gradients) {
            let name = &graph.value(id).unwrap().name;
            let of_decoder = name.starts_with("decoder.") || name.starts_with("blocks.1.");
            assert_eq!(gradient.is_some(), of_decoder || trained, "{name}");
        }
    }
}
