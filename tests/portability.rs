//! Every kernel of every variant is valid WGSL and translates to what the other platforms compile.

mod common;
#[cfg_attr(
    feature = "trace",
    allow(clippy::duplicate_mod, reason = "common has it, too")
)]
#[path = "stand_in/translate.rs"]
mod translate;

use std::collections::{BTreeMap, BTreeSet};

use common::{baseline_gpu, gpu, packed_gpu, tiled_gpu};
use energyflow::graph::{AttentionOptions, Graph, Init, Op, ValueId};
use energyflow::types::{BinaryOp, Broadcast, DType, Padding, Rates, Trans, UnaryOp, Window};
use energyflow::{Gpu, Session};

const BATCH: usize = 2;
const TIME: usize = 5;
const VOCABULARY: usize = 11;

struct Builder {
    graph: Graph,
    dtype: DType,
}

impl Builder {
    /// A parameter in the element type of the network.
    fn parameter(&mut self, name: &str, dims: &[usize]) -> ValueId {
        let init = Init::Uniform(0.1);
        let p = self.graph.parameter(name, dims, init).unwrap();
        self.graph.cast(p, self.dtype).unwrap()
    }
}

/// A whole training step: embedding, a TCN block, both losses, gradients, clipping, AdamW.
fn training(dtype: DType, width: usize) -> Graph {
    let mut b = Builder {
        graph: Graph::new(),
        dtype,
    };
    let rows = BATCH * TIME;
    let ids = b.graph.index_input("ids", rows, VOCABULARY as u32).unwrap();
    let mask = b.graph.input("mask", &[rows], DType::F32).unwrap();
    let teacher = b.graph.input("teacher", &[BATCH, width], dtype).unwrap();
    let table = b.parameter("table", &[VOCABULARY, width]);
    let z = b.parameter("z", &[BATCH, width]);
    let (gamma, beta) = (
        b.parameter("gamma", &[width]),
        b.parameter("beta", &[width]),
    );
    let conv = b.parameter("conv", &[2 * width, 3 * width]);
    let bias = b.parameter("bias", &[2 * width]);
    let back = b.parameter("back", &[width, 2 * width]);
    let head = b.parameter("head", &[width, VOCABULARY]);
    let g = &mut b.graph;
    let x = g.gather(table, ids, Some(0)).unwrap();
    let x = g.reshape(x, &[BATCH, TIME, width]).unwrap();
    let x = g.add_over_time(x, z).unwrap();
    let h = g.layer_norm(x, gamma, beta, 1e-5).unwrap();
    let window = Window::new(TIME, 3, 2, 1, Padding::Same).unwrap();
    let gathered = g.conv1d(h, conv, window).unwrap();
    let h = g.im2col(h, 3, 2).unwrap();
    let h = g.matmul(h, conv, Trans::NT).unwrap();
    let h = g.reshape(h, &[BATCH, TIME, 2 * width]).unwrap();
    let h = g.add(h, gathered).unwrap();
    let h = g.add_bias(h, bias).unwrap();
    let h = g.unary(UnaryOp::GeluTanh, h).unwrap();
    let h = g.matmul(h, back, Trans::NT).unwrap();
    let h = g.reshape(h, &[BATCH, TIME, width]).unwrap();
    let y = g.add(x, h).unwrap();
    let y = g.mul_rows(y, mask).unwrap();
    let pooled = g.masked_mean(y, mask).unwrap();
    let kd = g.kd_loss(pooled, teacher, 1.0, 0.5).unwrap();
    let logits = g.matmul(y, head, Trans::NN).unwrap();
    let ce = g.cross_entropy(logits, ids, Some(0), 0.1).unwrap();
    let weighted = g.mul(ce.loss, kd.loss).unwrap();
    let activity = g.sum_all(h).unwrap();
    let loss = g.add(weighted, activity).unwrap();
    let parameters: Vec<ValueId> = g.parameters().map(|(id, _)| id).collect();
    let gradients = g.gradients(loss, &parameters).unwrap();
    let norm = g.global_norm(&gradients).unwrap();
    let steps = g.state("steps", &[1], 0.0).unwrap();
    let next = g.affine(steps, 1.0, 1.0).unwrap();
    g.assign(steps, next).unwrap();
    let apply = g.unary(UnaryOp::IsFinite, norm).unwrap();
    let hyper = g.stack(&[norm, next, apply]).unwrap();
    let op = Op::AdamW {
        rates: vec![Rates::decay(0.01); parameters.len()],
        params: parameters,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
    };
    g.apply(op, &[gradients, vec![hyper]].concat()).unwrap();
    g.output("loss", loss).unwrap();
    b.graph
}

/// Every function of one and two elements, every derivative, every broadcast.
fn elements(dtype: DType, width: usize) -> Graph {
    let mut graph = Graph::new();
    let dims = [BATCH, TIME, width];
    let x = graph.input("x", &dims, dtype).unwrap();
    let dy = graph.input("dy", &dims, DType::F32).unwrap();
    let (scale, offset, min, max) = (2.0, f32::MIN_POSITIVE, -1.0, f32::INFINITY);
    for (i, op) in [
        UnaryOp::Identity,
        UnaryOp::Affine { scale, offset },
        UnaryOp::Clamp { min, max },
        UnaryOp::Abs,
        UnaryOp::Square,
        UnaryOp::Sqrt,
        UnaryOp::Rsqrt,
        UnaryOp::Recip,
        UnaryOp::Exp,
        UnaryOp::Log,
        UnaryOp::Cos,
        UnaryOp::Tanh,
        UnaryOp::Sigmoid,
        UnaryOp::Relu,
        UnaryOp::GeluTanh,
        UnaryOp::GeluErf,
        UnaryOp::IsFinite,
        UnaryOp::Detach,
    ]
    .into_iter()
    .enumerate()
    {
        let y = graph.unary(op, x).unwrap();
        let derivative = BinaryOp::UnaryGrad(op);
        let dx = graph.binary(derivative, Broadcast::Same, x, dy).unwrap();
        graph.output(&format!("y{i}"), y).unwrap();
        graph.output(&format!("dx{i}"), dx).unwrap();
    }
    let mut y = x;
    for (i, (broadcast, dims)) in [
        (Broadcast::Same, dims.to_vec()),
        (Broadcast::Cols, vec![width]),
        (Broadcast::Rows, vec![BATCH * TIME]),
        (Broadcast::Scalar, vec![1]),
        (Broadcast::Groups { period: TIME }, vec![BATCH, width]),
        (Broadcast::Tiles { period: TIME }, vec![TIME, width]),
    ]
    .into_iter()
    .enumerate()
    {
        let operand = graph.input(&format!("b{i}"), &dims, dtype).unwrap();
        for op in [
            BinaryOp::Add,
            BinaryOp::Sub,
            BinaryOp::Mul,
            BinaryOp::Div,
            BinaryOp::Max,
            BinaryOp::Min,
            BinaryOp::Greater,
        ] {
            y = graph.binary(op, broadcast, y, operand).unwrap();
        }
    }
    graph.output("y", y).unwrap();
    let [max, at] = graph.row_max(x).unwrap();
    graph.output("max", max).unwrap();
    graph.output("at", at).unwrap();
    // Copies between rows of other lengths: of numbers and of indices.
    let flat = graph.reshape(x, &[BATCH * TIME * width]).unwrap();
    graph.output("flat", flat).unwrap();
    let ids = graph.index_input("ids", BATCH * TIME, 9).unwrap();
    let ids = graph.reshape(ids, &[BATCH, TIME]).unwrap();
    graph.output("ids", ids).unwrap();
    graph
}

/// Products large enough for every size of tile, and one deep enough to be split.
fn products(dtype: DType) -> Graph {
    let mut graph = Graph::new();
    for (i, (m, n, k)) in [(17, 33, 9), (512, 520, 24), (2048, 1000, 35), (40, 24, 517)]
        .into_iter()
        .enumerate()
    {
        for trans in [Trans::NN, Trans::NT, Trans::TN] {
            let (of_a, of_b) = match trans {
                Trans::NN => ([m, k], [k, n]),
                Trans::NT => ([m, k], [n, k]),
                Trans::TN => ([k, m], [k, n]),
            };
            let [a, b] = [("a", of_a), ("b", of_b)].map(|(name, dims)| {
                let name = format!("{name} {i} {trans:?}");
                graph.input(&name, &dims, dtype).unwrap()
            });
            let mut c = graph.matmul(a, b, trans).unwrap();
            // Parts of K are added up otherwise where something follows.
            if trans == Trans::TN {
                c = graph.unary(UnaryOp::Tanh, c).unwrap();
            }
            graph.output(&format!("c {i} {trans:?}"), c).unwrap();
        }
    }
    graph
}

/// A loss whose gradient needs its value first, so that they are computed apart; and a product of a few rows.
fn rest(dtype: DType) -> Graph {
    let mut graph = Graph::new();
    let qkv = graph.input("qkv", &[BATCH, TIME, 3 * 24], dtype).unwrap();
    let keep = graph.input("keep", &[BATCH * TIME], DType::F32).unwrap();
    let options = AttentionOptions::new(2).causal(true);
    let y = graph.attention(qkv, Some(keep), options).unwrap();
    let kv = graph.input("kv", &[BATCH, 9, 2 * 24], dtype).unwrap();
    let y = graph.cross_attention(y, kv, None, options).unwrap();
    let p = graph.softmax(y).unwrap();
    let log = graph.log_softmax(p).unwrap();
    let loss = graph.sum_all(log).unwrap();
    let gradient = graph.gradients(loss, &[qkv]).unwrap()[0];
    graph.output("dqkv", gradient).unwrap();
    let logits = graph.input("logits", &[10, VOCABULARY], dtype).unwrap();
    let targets = graph.index_input("targets", 10, VOCABULARY as u32).unwrap();
    let loss = graph
        .cross_entropy(logits, targets, None, 0.0)
        .unwrap()
        .loss;
    let square = graph.mul(loss, loss).unwrap();
    let gradients = graph.gradients(square, &[logits]).unwrap();
    graph.output("dlogits", gradients[0]).unwrap();
    let (x, w) = (
        graph.input("x", &[3, 33], dtype).unwrap(),
        graph.input("w", &[7, 33], dtype).unwrap(),
    );
    let y = graph.matmul(x, w, Trans::NT).unwrap();
    graph.output("y", y).unwrap();
    graph
}

/// Sums long enough for several passes and for blocks of blocks.
fn long(dtype: DType) -> Graph {
    let mut graph = Graph::new();
    let n = 70_000;
    let x = graph.input("x", &[1, n, 4], dtype).unwrap();
    let row = graph.input("row", &[1, n], dtype).unwrap();
    let mask = graph.input("mask", &[n], DType::F32).unwrap();
    let all = graph.sum_all(row).unwrap();
    let mean = graph.masked_mean(x, mask).unwrap();
    let groups = Op::SumGroups { period: n };
    let groups = graph.apply(groups, &[x]).unwrap()[0];
    let targets = graph.index_input("targets", n, 4).unwrap();
    let logits = graph.reshape(x, &[n, 4]).unwrap();
    let entropy = graph.cross_entropy(logits, targets, Some(1), 0.1).unwrap();
    let teacher = graph.input("teacher", &[n, 4], dtype).unwrap();
    let kd = graph.kd_loss(logits, teacher, 1.0, 0.5).unwrap();
    let table = Op::GatherGrad {
        rows: 5,
        padding: Some(2),
    };
    let table = graph.apply(table, &[targets, logits]).unwrap()[0];
    let window = Window::new(90, 70, 1, 3, Padding::Same).unwrap();
    let columns = graph
        .input("columns", &[window.steps(), 70], dtype)
        .unwrap();
    let back = graph.apply(Op::Col2im(window), &[columns]).unwrap()[0];
    let outputs = [all, mean, groups, entropy.count, table, back];
    for (i, output) in outputs.into_iter().enumerate() {
        graph.output(&format!("{i}"), output).unwrap();
    }
    let mean = graph.sum_all(mean).unwrap();
    for (i, (loss, wrt)) in [(entropy.loss, x), (kd.loss, x), (mean, x)]
        .into_iter()
        .enumerate()
    {
        let gradient = graph.gradients(loss, &[wrt]).unwrap()[0];
        graph.output(&format!("gradient {i}"), gradient).unwrap();
    }
    for (i, m) in [3, 9].into_iter().enumerate() {
        let a = graph.input(&format!("a{i}"), &[2, m, n], dtype).unwrap();
        let b = graph.input(&format!("b{i}"), &[2, 5, n], dtype).unwrap();
        let c = graph.batch_matmul(a, b, Trans::NT).unwrap();
        graph.output(&format!("batch {i}"), c).unwrap();
        let a = graph.input(&format!("c{i}"), &[m, n], dtype).unwrap();
        let b = graph.input(&format!("d{i}"), &[5, n], dtype).unwrap();
        let c = graph.matmul(a, b, Trans::NT).unwrap();
        let c = graph.unary(UnaryOp::Tanh, c).unwrap();
        graph.output(&format!("product {i}"), c).unwrap();
    }
    graph
}

fn collect(gpu: &Gpu, graph: &Graph, sources: &mut BTreeMap<String, String>) {
    let executable = Session::new(gpu, 0).compile(graph).unwrap();
    for (key, wgsl) in executable.sources() {
        let known = sources.insert(key.to_owned(), wgsl.to_owned());
        assert!(
            known.is_none_or(|known| known == wgsl),
            "one key, two sources: {key}"
        );
    }
}

/// The families of kernels: the files of wgsl/.
fn templates() -> BTreeSet<String> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/wgsl");
    std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file())
        .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
        .collect()
}

#[test]
fn every_kernel_translates_to_every_platform() {
    let mut sources = BTreeMap::new();
    let gpus = [gpu(), tiled_gpu(), packed_gpu(), baseline_gpu()];
    for gpu in &gpus {
        for dtype in [DType::F32, DType::F16] {
            collect(gpu, &rest(dtype), &mut sources);
            for width in [8, 7] {
                collect(gpu, &training(dtype, width), &mut sources);
                collect(gpu, &elements(dtype, width), &mut sources);
            }
        }
    }
    for gpu in &gpus {
        collect(gpu, &products(DType::F16), &mut sources);
    }
    for gpu in &gpus[..2] {
        collect(gpu, &long(DType::F32), &mut sources);
    }
    collect(&gpus[2], &long(DType::F16), &mut sources);
    for (key, wgsl) in &sources {
        translate::everywhere(wgsl, true).unwrap_or_else(|error| panic!("{key}: {error}"));
    }
    let used: BTreeSet<String> = sources
        .keys()
        .filter_map(|key| key.split(' ').next().map(str::to_owned))
        .collect();
    let mut expected = templates();
    // Need a device with matrix units: unit tests of the kernels translate all variants without one.
    expected.retain(|name| !name.ends_with("_cooperative"));
    // No graph has them: unit tests translate them.
    expected.retain(|name| !name.starts_with("top_k") && !name.starts_with("decode_"));
    assert_eq!(used, expected);
    for mode in ["f16=true", "f16=false"] {
        let halves = |key: &&String| key.contains(":f16[") && key.ends_with(mode);
        assert!(sources.keys().any(|key| halves(&key)), "{mode}");
    }
}
