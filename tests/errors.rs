//! What errors say: layer, operation, shapes, what was expected, what to do.

mod common;

use common::gpu;
use energyflow::graph::{Graph, Init, Op, ValueId};
use energyflow::nn::{Conv1d, Embedding, LayerNorm, Linear, Mode, Tcn, TcnOptions};
use energyflow::reference::{Array, Interpreter};
use energyflow::runtime::Host;
use energyflow::train::{AdamW, Weights};
use energyflow::types::{BinaryOp, Broadcast, DType, Padding, Trans, Window};
use energyflow::{Error, Session};
use half::f16;

fn input(graph: &mut Graph, dims: &[usize]) -> ValueId {
    let name = format!("x{}", graph.values().len());
    graph.input(&name, dims, DType::F32).unwrap()
}

fn says<T>(result: Result<T, Error>, text: &str) {
    match result {
        Ok(_) => panic!("not refused: {text}"),
        Err(error) => assert_eq!(error.to_string(), text),
    }
}

#[test]
fn operations() {
    let mut graph = Graph::new();
    let a = input(&mut graph, &[4, 3]);
    let b = input(&mut graph, &[2, 5]);
    let vector = input(&mut graph, &[5]);
    let three = input(&mut graph, &[3]);
    let g = &mut graph;
    says(g.add(a, vector), "add: [4, 3] and [5] cannot be broadcast");
    says(
        g.mul(a, three),
        "mul: [4, 3] and [3] cannot be broadcast; for a row vector use add_bias or Broadcast::Cols",
    );
    says(
        g.matmul(a, b, Trans::NT),
        "matmul [4, 3] · [2, 5]ᵀ: inner extents 3 and 5 differ",
    );
    says(
        g.matmul(a, b, Trans::NN),
        "matmul [4, 3] · [2, 5]: inner extents 3 and 2 differ",
    );
    says(
        g.add_bias(a, vector),
        "add [4, 3], [5]: the operand of one element per column must have shape [3], not [5]",
    );
    says(
        g.reshape(a, &[11]),
        "reshape [4, 3] to [11]: 12 elements cannot become 11",
    );
    says(
        g.reshape(a, &[3, 0]),
        "reshape [4, 3] to [3, 0]: every extent must be at least 1",
    );
    says(
        g.input("x", &[1 << 63, 2, 4], DType::F32),
        "shape: an input \"x\" [9223372036854775808, 2, 4]: a value has at most 2^32 - 1 elements",
    );
    says(g.stack(&[]), "stack: needs an operand");
}

#[test]
fn layers() {
    let mut graph = Graph::new();
    let x = input(&mut graph, &[4, 5]);
    let series = input(&mut graph, &[2, 8, 5]);
    let g = &mut graph;
    let head = Linear::new(g, "head", 3, 2, true).unwrap();
    says(
        head.forward(g, x),
        "layer \"head\": matmul [4, 5] · [2, 3]ᵀ: inner extents 5 and 3 differ",
    );
    let conv = Conv1d::new(g, "conv", 3, 2, 3, true).unwrap();
    says(
        conv.forward(g, series),
        "layer \"conv\": conv1d [2, 8, 5]: x has 5 channels, the layer takes 3",
    );
    let norm = LayerNorm::new(g, "norm", 3, 1e-5).unwrap();
    says(
        norm.forward(g, x),
        "layer \"norm\": layer_norm [4, 5], [3], [3]: gamma must have shape [5], not [3]",
    );
    let tcn = Tcn::new(g, "blocks", &TcnOptions::new(3, 6, &[1, 2])).unwrap();
    let scoped = g.scoped("encoder", |g| tcn.forward_in(g, series, None, Mode::Eval));
    says(
        scoped,
        "layer \"encoder/blocks.0.norm\": layer_norm [2, 8, 5], [3], [3]: gamma must have shape [5], not [3]",
    );
    let valid = conv.padding(Padding::Valid).dilation(9);
    let narrow = input(g, &[2, 8, 3]);
    let error = valid.forward(g, narrow).unwrap_err();
    assert!(error.to_string().contains("layer \"conv\""), "{error}");
    // Nothing of it stays.
    says(
        g.add(x, series),
        "add: [4, 5] and [2, 8, 5] cannot be broadcast",
    );
}

#[test]
fn names() {
    let mut graph = Graph::new();
    let g = &mut graph;
    Linear::new(g, "layer", 3, 2, true).unwrap();
    says(
        Linear::new(g, "layer", 3, 2, true),
        "graph: parameter \"layer.weight\" exists already in this graph (declared by Linear \"layer\"); call forward of its layer again to share it, or give this parameter another name",
    );
    Embedding::new(g, "table", 5, 2, None, Init::Uniform(0.5)).unwrap();
    let error = g.state("table.weight", &[1], 0.0).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("declared by Embedding \"table\""), "{text}");
    says(
        g.input("", &[1], DType::F32),
        "graph: an input needs a name, not \"\"",
    );
    g.input("x", &[1], DType::F32).unwrap();
    let x = g.constant(&[1], 1.0).unwrap();
    g.output("y", x).unwrap();
    says(
        g.output("y", x),
        "graph: output \"y\" exists already in this graph; give this one another name",
    );
    says(
        g.parameter("x", &[1], Init::Constant(0.0)),
        "graph: input \"x\" exists already in this graph; a parameter of this graph needs another name",
    );
}

#[test]
fn steps_and_weights() {
    let mut graph = Graph::new();
    let x = input(&mut graph, &[4, 3]);
    let layer = Linear::new(&mut graph, "layer", 3, 2, true).unwrap();
    let y = layer.forward(&mut graph, x).unwrap();
    let loss = graph.sum_all(y).unwrap();
    let optimizer = AdamW::default();
    optimizer.step(&mut graph, loss, &[layer.weight]).unwrap();
    let before = graph.clone();
    let bias = layer.bias.unwrap();
    says(
        optimizer.step(&mut graph, loss, &[bias]),
        "graph: this graph has an optimizer step already; put parameter groups into one step (AdamW::group)",
    );
    assert_eq!(graph, before);
    let mut taken = Graph::new();
    let w = taken.parameter("w", &[1], Init::Constant(1.0)).unwrap();
    taken.output("loss_scale", w).unwrap();
    let before = taken.clone();
    says(
        optimizer.step(&mut taken, w, &[w]),
        "graph: output \"loss_scale\" exists already in this graph, but an optimizer step adds one of this name (train::StepOutputs lists them all); give yours another name",
    );
    assert_eq!(taken, before);

    let mut session = Session::new(&gpu(), 0);
    let plan = session.compile(&graph).unwrap().plan().to_string();
    assert!(plan.contains("KiB") && !plan.contains("MiB"), "{plan}");
    let weights = Weights::from_session(&session).unwrap();
    says(
        weights.apply(&mut Session::new(&gpu(), 0)),
        "graph: session has no parameters yet: compile a graph first",
    );
}

#[test]
fn element_types_that_do_not_meet() {
    let mut graph = Graph::new();
    let g = &mut graph;
    let a = g.input("a", &[2, 3, 4], DType::F16).unwrap();
    let b = g.input("b", &[2, 3, 4], DType::F32).unwrap();
    let z = g.input("z", &[2, 4], DType::F32).unwrap();
    let w = g.input("w", &[5, 4], DType::F32).unwrap();
    let kernel = g.input("kernel", &[5, 8], DType::F32).unwrap();
    let window = Window::causal(3, 2, 1).unwrap();
    says(
        g.add(a, b),
        "add [2, 3, 4] f16 and [2, 3, 4] f32 have different element types: cast one of them (Graph::cast)",
    );
    for (result, op) in [
        (g.mul(b, a), "mul"),
        (g.add_over_time(a, z), "add"),
        (g.matmul(a, w, Trans::NT), "matmul"),
        (g.conv1d(a, kernel, window), "conv"),
        (g.binary(BinaryOp::Max, Broadcast::Same, a, b), "max"),
    ] {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Shape { op: named, .. } if named == op));
        assert!(error.to_string().contains("cast"), "{error}");
    }
    // Bias, mask, scale, constant, normalisation, mean and loss.
    let bias = g.input("bias", &[4], DType::F32).unwrap();
    let mask = g.input("mask", &[6], DType::F32).unwrap();
    let scale = g.input("scale", &[1], DType::F32).unwrap();
    let one = g.constant(&[2, 3, 4], 1.0).unwrap();
    let y = g.add_bias(a, bias).unwrap();
    let y = g.mul_rows(y, mask).unwrap();
    let y = g.mul_scalar(y, scale).unwrap();
    let y = g.add(y, one).unwrap();
    let y = g.layer_norm(y, bias, bias, 1e-5).unwrap();
    let y = g.masked_mean(y, mask).unwrap();
    g.kd_loss(y, z, 1.0, 1.0).unwrap();
}

#[test]
fn inputs_of_a_run() {
    let mut graph = Graph::new();
    let x = graph.input("x", &[4, 3], DType::F32).unwrap();
    let ids = graph.index_input("ids", 2, 4).unwrap();
    let unused = graph.input("unused", &[2], DType::F16).unwrap();
    graph.affine(unused, 2.0, 0.0).unwrap();
    let rows = graph.gather(x, ids, None).unwrap();
    graph.output("rows", rows).unwrap();
    let mut session = Session::new(&gpu(), 0);
    let executable = session.compile(&graph).unwrap();
    let floats = [1.0f32; 12];
    let (x, ids) = (("x", Host::F32(&floats)), ("ids", Host::U32(&[3, 0])));
    let halves = [f16::ONE; 11];
    for (inputs, text) in [
        (
            vec![("X", x.1), ids],
            "unknown input \"X\"; inputs are: x [4, 3] f32, ids [2] u32, unused [2] f16",
        ),
        (
            vec![("x", Host::F16(&halves)), ids],
            "input \"x\" [4, 3]: needs 12 f32, got 11 f16",
        ),
        (vec![ids], "input \"x\" is not given: x [4, 3] f32"),
        (vec![x, ids, x], "input \"x\" is given 2 times"),
        (
            vec![x, ("ids", Host::U32(&[0, 4]))],
            "input \"ids\" [2]: element 1 is 4, the bound is 4",
        ),
        // One that nothing reads may be left out, but must fit.
        (
            vec![x, ids, ("unused", Host::F32(&floats))],
            "input \"unused\" [2]: needs 2 f16 or f32, got 12 f32",
        ),
    ] {
        says(executable.run(&inputs), text);
    }
    for inputs in [vec![x, ids], vec![x, ids, ("unused", Host::F32(&[1.0; 2]))]] {
        let outputs = executable.run(&inputs).unwrap().wait().unwrap();
        assert_eq!(outputs.get("rows").unwrap(), [1.0; 6]);
    }

    let mut interpreter = Interpreter::new(&graph);
    let x = ("x", Array::from_f32(&[4, 3], &floats).unwrap());
    let ids = ("ids", Array::from_u32(&[2], &[3, 0]).unwrap());
    interpreter.run(&graph, &[x.clone(), ids.clone()]).unwrap();
    says(
        interpreter.run(&graph, std::slice::from_ref(&ids)),
        "input \"x\" is not given: x [4, 3] f32",
    );
    says(
        interpreter.run(&graph, &[ids, x.clone(), ("X", x.1)]),
        "unknown input \"X\"; inputs are: x [4, 3] f32, ids [2] u32, unused [2] f16",
    );
}

/// Nodes carry their layer, gradients that of what they differentiate; executables are cached without it.
#[test]
fn layers_of_nodes_and_dispatches() {
    let build = |outer: &str| {
        let mut graph = Graph::new();
        let x = input(&mut graph, &[4, 3]);
        let layer = Linear::new(&mut graph, "layer", 3, 2, true).unwrap();
        let y = graph.scoped(outer, |g| layer.forward(g, x)).unwrap();
        let loss = graph.sum_all(y).unwrap();
        let gradient = graph.gradients(loss, &[layer.weight]).unwrap()[0];
        graph.output("y", y).unwrap();
        graph.output("gradient", gradient).unwrap();
        graph
    };
    let graph = build("model");
    let scopes: Vec<_> = graph
        .nodes()
        .iter()
        .filter(|node| matches!(node.op, Op::MatMul { .. }))
        .map(|node| node.scope.as_deref())
        .collect();
    assert_eq!(scopes, [Some("model/layer"); 2]);
    let mut session = Session::new(&gpu(), 0);
    let executable = session.compile(&graph).unwrap();
    let text = executable.to_string();
    assert!(text.contains("model/layer: gemm"), "{text}");
    let other = build("other");
    assert_eq!(graph, other);
    session.compile(&other).unwrap();
    assert_eq!(session.stats().hits, 1);
}
