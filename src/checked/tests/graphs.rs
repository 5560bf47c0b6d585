//! Every kernel at awkward shapes, for every tier.

use std::collections::BTreeSet;

use super::network::check;
use crate::error::Result;
use crate::gpu::MatrixUnits;
use crate::graph::{AttentionOptions, Graph, Init, LinearCrossEntropy, Op, ValueId};
use crate::kernels::{Target, templates};
use crate::nn::{Conv1d, ConvMethod, LayerNorm, Linear};
use crate::train::AdamW;
use crate::types::{BinaryOp, Broadcast, DType, Padding, Trans, UnaryOp};

fn target(f16: bool, barrier_free: bool, invocations: u32, units: Option<MatrixUnits>) -> Target {
    Target {
        f16,
        barrier_free,
        matrix_units: units,
        invocations,
        cores: 132,
    }
}

/// A software adapter, the WebGPU baseline, a large GPU with and without 16 × 16 matrices, a Mac.
pub(super) fn targets() -> [(&'static str, Target); 5] {
    let units = |size, lanes, scalar| MatrixUnits {
        size,
        lanes,
        f16: true,
        f32: scalar,
        scalar,
        storage: if scalar { 32 << 10 } else { 48 << 10 },
        invocations: 256,
    };
    [
        ("barrier-free", target(true, true, 256, None)),
        ("baseline", target(false, false, 256, None)),
        ("large", target(true, false, 1024, None)),
        (
            "matrices",
            target(true, false, 1024, Some(units(16, 32, false))),
        ),
        ("Metal", target(true, false, 1024, Some(units(8, 32, true)))),
    ]
}

fn every_target(
    build: impl Fn(DType) -> Result<Graph>,
    what: &str,
    apart: &[&str],
) -> BTreeSet<&'static str> {
    let mut ran = BTreeSet::new();
    for (name, target) in targets() {
        for dtype in [DType::F32, DType::F16] {
            let graph = build(dtype).unwrap_or_else(|error| panic!("{what} {dtype}: {error}"));
            let what = format!("{what}, {dtype}, {name}");
            ran.extend(check(&graph, target, &what, apart));
        }
    }
    ran
}

/// A loss of all elements that no gradient is constant for.
fn square(graph: &mut Graph, x: ValueId) -> Result<ValueId> {
    let x = graph.cast(x, DType::F32)?;
    let x = graph.unary(UnaryOp::Square, x)?;
    graph.sum_all(x)
}

fn train(graph: &mut Graph, loss: ValueId) -> Result<()> {
    let parameters: Vec<_> = graph.parameters().map(|(id, _)| id).collect();
    graph.output("loss", loss)?;
    AdamW {
        clip: Some(0.5),
        ..AdamW::default()
    }
    .step(graph, loss, &parameters)
}

/// Widths of rows that end in the middle of a `vec4`, of a row's alignment, and of what one invocation holds.
fn norms(rows: usize, width: usize, dtype: DType) -> Result<Graph> {
    let mut graph = Graph::new();
    let x = graph.input("x", &[rows, width], dtype)?;
    let norm = LayerNorm::new(&mut graph, "norm", width, 1e-5)?;
    let linear = Linear::new(&mut graph, "linear", width, width, true)?;
    let h = linear.forward(&mut graph, x)?;
    let y = norm.forward(&mut graph, h)?;
    let y = graph.unary(UnaryOp::GeluTanh, y)?;
    let sums = graph.sum_cols(y)?;
    graph.output("sums", sums)?;
    let [max, at] = graph.row_max(x)?;
    graph.output("max", max)?;
    graph.output("at", at)?;
    let loss = square(&mut graph, y)?;
    train(&mut graph, loss)?;
    Ok(graph)
}

/// Around the tiles, with heads that end inside a matrix, and with one that is too wide for matrices.
const ATTENTIONS: [([usize; 5], bool, bool); 5] = [
    ([1, 1, 1, 1, 4], false, false),
    ([2, 5, 37, 3, 12], true, false),
    ([1, 131, 70, 1, 32], false, true),
    ([1, 3, 9, 2, 80], true, true),
    ([1, 9, 3, 1, 132], true, false),
];

/// Attention to itself and to others, with its gradients, and softmax. `dims`: batch, queries, keys, heads, columns per head.
fn attention(dims: [usize; 5], masked: bool, causal: bool, dtype: DType) -> Result<Graph> {
    let [batch, queries, keys, heads, d] = dims;
    let mut graph = Graph::new();
    let options = AttentionOptions::new(heads).causal(causal);
    let width = heads * d;
    let qkv = graph.input("qkv", &[batch, queries, 3 * width], dtype)?;
    let q = graph.input("q", &[batch, queries, width], dtype)?;
    let kv = graph.input("kv", &[batch, keys, 2 * width], dtype)?;
    let mut mask = |name: &str, n: usize| match masked {
        true => graph.input(name, &[batch * n], DType::F32).map(Some),
        false => Ok(None),
    };
    let (own, other) = (mask("mask", queries)?, mask("mask of keys", keys)?);
    let one = graph.attention(qkv, own, options)?;
    let two = graph.cross_attention(q, kv, other, options)?;
    let y = graph.add(one, two)?;
    let p = graph.softmax(y)?;
    let l = graph.log_softmax(y)?;
    let z = graph.mul(p, l)?;
    let loss = square(&mut graph, z)?;
    let gradients = graph.gradients(loss, &[qkv, q, kv])?;
    for (name, value) in ["dqkv", "dq", "dkv"].into_iter().zip(gradients) {
        let value = graph.cast(value, DType::F32)?;
        graph.output(name, value)?;
    }
    let y = graph.cast(y, DType::F32)?;
    graph.output("y", y)?;
    Ok(graph)
}

fn entropy(rows: usize, classes: usize, ignore: Option<u32>, dtype: DType) -> Result<Graph> {
    let mut graph = Graph::new();
    let x = graph.input("x", &[rows, 5], dtype)?;
    let head = Linear::new(&mut graph, "head", 5, classes, true)?;
    let targets = graph.index_input("targets", rows, classes as u32)?;
    let logits = head.forward(&mut graph, x)?;
    let first = graph.cross_entropy(logits, targets, ignore, 0.0)?;
    let smooth = graph.cross_entropy(logits, targets, ignore, 0.1)?;
    graph.output("count", first.count)?;
    let loss = graph.add(first.loss, smooth.loss)?;
    train(&mut graph, loss)?;
    Ok(graph)
}

/// The loss and the gradient in one kernel, and in several chunks of rows, or apart.
fn head(rows: usize, classes: usize, together: bool, dtype: DType) -> Result<Graph> {
    let mut graph = Graph::new();
    let x = graph.input("x", &[rows, 12], dtype)?;
    let weight = graph.parameter("weight", &[classes, 12], Init::Uniform(0.1))?;
    let bias = graph.parameter("bias", &[classes], Init::Uniform(0.1))?;
    let layer = LinearCrossEntropy {
        ignore: together.then_some(1),
        smoothing: 0.1,
        logits: dtype,
        chunk_bytes: 64 * 4 * classes as u64,
    };
    let weight = graph.cast(weight, dtype)?;
    let targets = graph.index_input("targets", rows, classes as u32)?;
    let out = graph.apply(Op::LinearCrossEntropy(layer), &[x, weight, targets, bias])?;
    let mut loss = out[0];
    if !together {
        // The gradient depends on the loss.
        loss = graph.unary(UnaryOp::Square, loss)?;
    }
    train(&mut graph, loss)?;
    Ok(graph)
}

fn conv(channels: usize, stride: usize, method: ConvMethod, dtype: DType) -> Result<Graph> {
    let mut graph = Graph::new();
    let x = graph.input("x", &[3, 11, channels], dtype)?;
    let first = Conv1d::new(&mut graph, "first", channels, 7, 1, true)?;
    let second = Conv1d::new(&mut graph, "second", channels, channels, 3, true)?
        .dilation(2)
        .stride(stride)
        .padding(Padding::Same)
        .method(method);
    let y = second.forward(&mut graph, x)?;
    let y = second.forward(&mut graph, y)?;
    let y = first.forward(&mut graph, y)?;
    let loss = square(&mut graph, y)?;
    train(&mut graph, loss)?;
    Ok(graph)
}

fn text(places: usize, vocabulary: usize, width: usize, dtype: DType) -> Result<Graph> {
    let mut graph = Graph::new();
    let ids = graph.index_input("ids", 3 * places, vocabulary as u32)?;
    let mask = graph.input("mask", &[3 * places], DType::F32)?;
    let teacher = graph.input("teacher", &[3, width], DType::F32)?;
    let table = graph.parameter("table", &[vocabulary, width], Init::Uniform(0.1))?;
    let rows = graph.gather(table, ids, Some(0))?;
    let rows = graph.cast(rows, dtype)?;
    let x = graph.reshape(rows, &[3, places, width])?;
    let z = graph.parameter("z", &[3, width], Init::Uniform(0.1))?;
    let z = graph.cast(z, dtype)?;
    let x = graph.add_over_time(x, z)?;
    let y = graph.masked_mean(x, mask)?;
    let y = graph.cast(y, DType::F32)?;
    let kd = graph.kd_loss(y, teacher, 0.7, 0.3)?;
    graph.output("cosine", kd.cosine)?;
    graph.output("mse", kd.mse)?;
    train(&mut graph, kd.loss)?;
    Ok(graph)
}

/// The gradient of a table of one column that is read so often that its places are sorted as a whole.
fn many_places() -> Result<Graph> {
    const PLACES: usize = 4099;
    let mut graph = Graph::new();
    let ids = graph.index_input("ids", PLACES, 5)?;
    let table = graph.parameter("table", &[5, 1], Init::Uniform(0.1))?;
    let rows = graph.gather(table, ids, None)?;
    let loss = square(&mut graph, rows)?;
    let gradient = graph.gradients(loss, &[table])?[0];
    graph.output("gradient", gradient)?;
    Ok(graph)
}

/// Every broadcast, and results with rows of several strides.
fn broadcasts(rows: usize, cols: usize, dtype: DType) -> Result<Graph> {
    let mut graph = Graph::new();
    let x = graph.input("x", &[6 * rows, cols], dtype)?;
    let y = graph.input("y", &[6 * rows, cols], dtype)?;
    let groups = graph.input("groups", &[6, cols], dtype)?;
    let column = graph.input("column", &[cols], DType::F32)?;
    let row = graph.input("row", &[6 * rows], DType::F32)?;
    let scalar = graph.input("scalar", &[1], DType::F32)?;
    let add = |broadcast| Op::Binary(BinaryOp::Add, broadcast);
    let a = graph.add(x, y)?;
    let a = graph.apply(add(Broadcast::Groups { period: rows }), &[a, groups])?[0];
    let tiles = graph.parameter("tiles", &[8, cols], Init::Uniform(1.0))?;
    let tiles = graph.cast(tiles, dtype)?;
    let tiles = match dtype {
        DType::F32 => tiles,
        _ => groups,
    };
    let a = graph.apply(add(Broadcast::Tiles { period: 6 }), &[a, tiles])?[0];
    let sums = Op::SumTiles { period: 6, rows: 8 };
    let tile_sums = graph.apply(sums, &[a])?[0];
    graph.output("tile sums", tile_sums)?;
    let a = graph.add_bias(a, column)?;
    let a = graph.mul_rows(a, row)?;
    // Moves the elements, since rows are padded.
    let moved = graph.reshape(a, &[cols, 6 * rows])?;
    let moved = graph.cast(moved, DType::F32)?;
    graph.output("moved", moved)?;
    let a = graph.mul_scalar(a, scalar)?;
    let b = graph.cast(a, DType::F32)?;
    let counter = graph.input("mask", &[1], DType::F32)?;
    let c = graph.dropout(b, 0.4, counter, 7)?;
    let sums = graph.sum_rows(b)?;
    for (name, value) in [("a", a), ("b", b), ("c", c), ("sums", sums)] {
        graph.output(name, value)?;
    }
    Ok(graph)
}

fn products(dtype: DType) -> Result<Graph> {
    let mut graph = Graph::new();
    let a = graph.input("a", &[3, 7, 13], dtype)?;
    let b = graph.input("b", &[3, 5, 13], dtype)?;
    let c = graph.batch_matmul(a, b, Trans::NT)?;
    let d = graph.batch_matmul(c, b, Trans::NN)?;
    let e = graph.batch_matmul(c, a, Trans::TN)?;
    let long = graph.input("long", &[3, 1031], dtype)?;
    let weight = graph.input("weight", &[9, 1031], dtype)?;
    let f = graph.matmul(long, weight, Trans::NT)?;
    let tall = graph.input("tall", &[1031, 9], dtype)?;
    let g = graph.matmul(tall, tall, Trans::TN)?;
    // A program behind the sum of parts.
    let g = graph.unary(UnaryOp::GeluErf, g)?;
    for (name, value) in [("c", c), ("d", d), ("e", e), ("f", f), ("g", g)] {
        let value = graph.cast(value, DType::F32)?;
        graph.output(name, value)?;
    }
    Ok(graph)
}

fn accumulated(update: bool) -> Result<Graph> {
    let mut graph = Graph::new();
    let optimizer = AdamW::default();
    let linear = Linear::new(&mut graph, "linear", 5, 3, true)?;
    let unused = Linear::new(&mut graph, "more", 33, 7, true)?;
    let parameters: Vec<_> = graph.parameters().map(|(id, _)| id).collect();
    let x = graph.input("x", &[7, 5], DType::F32)?;
    let z = graph.input("z", &[7, 33], DType::F32)?;
    let weight = graph.input("weight", &[1], DType::F32)?;
    let y = linear.forward(&mut graph, x)?;
    let z = unused.forward(&mut graph, z)?;
    let losses = [square(&mut graph, y)?, square(&mut graph, z)?];
    let loss = graph.add(losses[0], losses[1])?;
    optimizer.accumulate(&mut graph, loss, weight, &parameters, &[loss])?;
    if update {
        return optimizer.update(&[&graph]);
    }
    graph.output("loss", loss)?;
    Ok(graph)
}

#[test]
fn every_kernel_stays_inside_its_memory() {
    let mut ran = BTreeSet::new();
    let mut run = |build: &dyn Fn(DType) -> Result<Graph>, what: &str| {
        ran.extend(every_target(build, what, &[]));
    };
    for (rows, width) in [(1, 1), (7, 5), (37, 67), (5, 64), (3, 1031)] {
        run(
            &|dtype| norms(rows, width, dtype),
            &format!("norms {rows}x{width}"),
        );
    }
    for (dims, masked, causal) in ATTENTIONS {
        run(
            &|dtype| attention(dims, masked, causal, dtype),
            &format!("attention {dims:?}"),
        );
    }
    for (rows, classes, ignore) in [
        (1, 2, None),
        (5, 7, Some(3)),
        (67, 131, Some(0)),
        (9, 1027, None),
    ] {
        run(
            &|dtype| entropy(rows, classes, ignore, dtype),
            &format!("entropy {rows}x{classes}"),
        );
    }
    for together in [true, false] {
        run(&|dtype| head(71, 37, together, dtype), "head");
    }
    for (channels, stride) in [(1, 1), (5, 2), (8, 1), (12, 11)] {
        for method in [ConvMethod::Implicit, ConvMethod::Columns] {
            run(
                &|dtype| conv(channels, stride, method, dtype),
                &format!("conv {channels} /{stride}"),
            );
        }
    }
    for (places, vocabulary, width) in [(1, 1, 1), (5, 11, 7), (131, 13, 12), (263, 3, 1)] {
        run(
            &|dtype| text(places, vocabulary, width, dtype),
            &format!("text {places} of {vocabulary}x{width}"),
        );
    }
    for (rows, cols) in [(1, 1), (3, 5), (11, 29), (1, 64)] {
        run(
            &|dtype| broadcasts(rows, cols, dtype),
            &format!("broadcasts {rows}x{cols}"),
        );
    }
    run(&products, "products");
    run(&|_| many_places(), "places");
    for update in [false, true] {
        run(&|_| accumulated(update), "accumulation");
    }
    // What no graph has is executed by tests of its own.
    let elsewhere = |name: &&str| name.starts_with("decode_") || name.starts_with("top_k");
    let missing: Vec<_> = templates::names()
        .filter(|name| !ran.contains(name) && !elsewhere(name))
        .collect();
    assert!(missing.is_empty(), "no graph here uses {missing:?}");
}
