//! What a graph refuses, and how it reads.

use energyflow::Error;
use energyflow::graph::{Graph, Init, Op, ValueId};
use energyflow::types::{BinaryOp, Broadcast, DType, Rates, Trans, UnaryOp, Window};

fn input(graph: &mut Graph, dims: &[usize]) -> ValueId {
    let name = format!("x{}", graph.values().len());
    graph.input(&name, dims, DType::F32).unwrap()
}

/// One wrong call: the operation, the shapes of its f32 operands, a part of the reason.
type Wrong = (Op, &'static str, Vec<Vec<usize>>, &'static str);

fn wrong_calls() -> Vec<Wrong> {
    let window = |time, kernel, dilation| Window::causal(time, kernel, dilation).unwrap();
    let binary = |broadcast| Op::Binary(BinaryOp::Add, broadcast);
    let matmul = |trans| Op::MatMul {
        batch: 1,
        trans,
        out: DType::F32,
    };
    let conv = |window| Op::Conv {
        window,
        out: DType::F32,
    };
    let unary = |min, max| Op::Unary(UnaryOp::Clamp { min, max });
    let norm = |eps| Op::LayerNorm { eps };
    let kd = Op::KdLoss {
        alpha: 1.0,
        beta: 1.0,
    };
    let kd_grad = Op::KdLossGrad {
        alpha: 1.0,
        beta: 1.0,
    };
    let groups = |period| binary(Broadcast::Groups { period });
    vec![
        (unary(1.0, 0.0), "clamp", vec![vec![2]], "min <= max"),
        (unary(0.0, 1.0), "clamp", vec![vec![2], vec![2]], "takes 1"),
        (
            binary(Broadcast::Same),
            "add",
            vec![vec![2, 3], vec![3, 2]],
            "[2, 3] and [3, 2] cannot be broadcast",
        ),
        (
            binary(Broadcast::Cols),
            "add",
            vec![vec![2, 3], vec![2]],
            "[3]",
        ),
        (
            binary(Broadcast::Rows),
            "add",
            vec![vec![2, 3], vec![3]],
            "[2]",
        ),
        (
            binary(Broadcast::Scalar),
            "add",
            vec![vec![2, 3], vec![2]],
            "[1]",
        ),
        (
            groups(3),
            "add",
            vec![vec![4, 3], vec![2, 3]],
            "rows/period",
        ),
        (groups(0), "add", vec![vec![4, 3], vec![2, 3]], "period"),
        (
            Op::Cast(DType::U32),
            "cast",
            vec![vec![2]],
            "given, not computed",
        ),
        (Op::Reshape, "reshape", vec![vec![2]], "Graph::reshape"),
        (
            matmul(Trans::NN),
            "matmul",
            vec![vec![2, 3], vec![4, 5]],
            "inner extents",
        ),
        (
            matmul(Trans::NT),
            "matmul",
            vec![vec![2, 3], vec![3, 5]],
            "inner extents",
        ),
        (
            matmul(Trans::TN),
            "matmul",
            vec![vec![2, 3], vec![3, 5]],
            "inner extents",
        ),
        (
            matmul(Trans::NT),
            "matmul",
            vec![vec![2, 3], vec![3]],
            "rank 2 or 3",
        ),
        (
            norm(1e-5),
            "layer_norm",
            vec![vec![2, 3], vec![2], vec![3]],
            "gamma",
        ),
        (
            norm(0.0),
            "layer_norm",
            vec![vec![2, 3], vec![3], vec![3]],
            "eps",
        ),
        (
            Op::LayerNormGrad,
            "layer_norm_grad",
            vec![vec![4, 3], vec![3], vec![2, 3], vec![4, 3]],
            "statistics",
        ),
        (
            Op::LayerNormParamGrad,
            "layer_norm_param_grad",
            vec![vec![4, 3], vec![3, 4], vec![4, 2]],
            "dy",
        ),
        (
            Op::Im2col(window(3, 2, 1)),
            "im2col",
            vec![vec![4, 3]],
            "multiple of the time",
        ),
        (
            Op::Col2im(window(2, 2, 1)),
            "col2im",
            vec![vec![4, 3]],
            "multiple of the kernel",
        ),
        (
            conv(window(3, 2, 1)),
            "conv",
            vec![vec![4, 3], vec![5, 6]],
            "multiple of the time",
        ),
        (
            conv(window(2, 2, 1)),
            "conv",
            vec![vec![4, 3], vec![5, 7]],
            "[H, k·C]",
        ),
        (
            Op::ConvGradInput {
                window: window(2, 2, 1),
                out: DType::F32,
            },
            "conv_grad_input",
            vec![vec![4, 3], vec![5, 6]],
            "[H, k·C]",
        ),
        (
            Op::ConvGradInput {
                window: window(2, 2, 1),
                out: DType::F32,
            },
            "conv_grad_input",
            vec![vec![4, 3], vec![3, 7]],
            "multiple of the kernel",
        ),
        (
            Op::ConvGradWeight {
                window: window(2, 2, 1),
                out: DType::F32,
            },
            "conv_grad_weight",
            vec![vec![4, 3], vec![6, 2]],
            "rows of the result",
        ),
        (
            Op::SumGroups { period: 3 },
            "sum_groups",
            vec![vec![4, 3]],
            "multiple of the period",
        ),
        (Op::SumRows, "sum_rows", vec![], "takes 1"),
        (Op::SumCols, "sum_cols", vec![vec![1], vec![1]], "takes 1"),
        (Op::SumAll, "sum_all", vec![vec![1], vec![1]], "takes 1"),
        (
            Op::MaskedMean,
            "masked_mean",
            vec![vec![6, 3], vec![6]],
            "[B, L, C]",
        ),
        (
            Op::MaskedMean,
            "masked_mean",
            vec![vec![2, 3, 4], vec![2, 3]],
            "mask",
        ),
        (
            Op::MaskedMeanGrad { time: 3 },
            "masked_mean_grad",
            vec![vec![2, 4], vec![5]],
            "mask",
        ),
        (Op::Stack, "stack", vec![], "operand"),
        (Op::Stack, "stack", vec![vec![1], vec![2]], "[1]"),
        (
            kd.clone(),
            "kd_loss",
            vec![vec![2, 3], vec![2, 4]],
            "target",
        ),
        (kd, "kd_loss", vec![vec![3], vec![3]], "[B, E]"),
        (
            kd_grad,
            "kd_loss_grad",
            vec![vec![2, 3], vec![2, 3], vec![2, 3], vec![1]],
            "statistics",
        ),
        (Op::GlobalNorm, "global_norm", vec![], "operand"),
    ]
}

#[test]
fn every_operation_names_itself_and_its_operands() {
    for (op, name, shapes, part) in wrong_calls() {
        let mut graph = Graph::new();
        let operands: Vec<ValueId> = shapes.iter().map(|dims| input(&mut graph, dims)).collect();
        let before = graph.clone();
        let error = graph.apply(op.clone(), &operands).unwrap_err();
        let text = error.to_string();
        let Error::Shape {
            op: named,
            shapes: shown,
            reason,
            ..
        } = error
        else {
            panic!("{op:?}: {text}");
        };
        assert_eq!(named, name);
        assert!(reason.contains(part), "{text}");
        let dims: Vec<Vec<usize>> = shown.iter().map(|shape| shape.dims().to_vec()).collect();
        assert_eq!(dims, shapes, "{text}");
        for dims in shapes {
            assert!(text.contains(&format!("{dims:?}")), "{text}");
        }
        // A refused operation leaves nothing behind.
        assert_eq!(graph, before);
    }
}

#[test]
fn operations_with_indices() {
    let mut graph = Graph::new();
    let table = input(&mut graph, &[5, 3]);
    let vector = input(&mut graph, &[4]);
    let scalar = input(&mut graph, &[1]);
    let rows = input(&mut graph, &[2, 4]);
    let logits = input(&mut graph, &[4, 5]);
    let ids = graph.index_input("ids", 4, 5).unwrap();
    let few = graph.index_input("few", 3, 5).unwrap();
    let six = graph.index_input("six", 4, 6).unwrap();
    let gather = Op::Gather { padding: None };
    let gather_grad = |rows| Op::GatherGrad {
        rows,
        padding: None,
    };
    let entropy = |ignore, smoothing| Op::CrossEntropy { ignore, smoothing };
    let entropy_grad = Op::CrossEntropyGrad {
        ignore: None,
        smoothing: 0.0,
    };
    let add = Op::Binary(BinaryOp::Add, Broadcast::Same);
    for (op, name, operands, part) in [
        (gather.clone(), "gather", vec![table, vector], "must not be"),
        (gather.clone(), "gather", vec![vector, ids], "[V, C]"),
        (gather.clone(), "gather", vec![ids, ids], "must not be u32"),
        (gather, "gather", vec![table, six], "beyond 5 rows"),
        (gather_grad(5), "gather_grad", vec![few, logits], "ids"),
        (gather_grad(0), "gather_grad", vec![ids, logits], "no rows"),
        (gather_grad(4), "gather_grad", vec![ids, logits], "beyond"),
        (
            entropy(None, 0.0),
            "cross_entropy",
            vec![logits, few],
            "targets",
        ),
        (
            entropy(None, 1.0),
            "cross_entropy",
            vec![logits, ids],
            "smoothing",
        ),
        (
            entropy(Some(4), 0.0),
            "cross_entropy",
            vec![logits, six],
            "beyond",
        ),
        (
            entropy_grad,
            "cross_entropy_grad",
            vec![logits, ids, rows, vector, scalar],
            "count",
        ),
        (add, "add", vec![vector, ids], "must not be u32"),
    ] {
        match graph.apply(op, &operands) {
            Err(Error::Shape { op, reason, .. }) => {
                assert_eq!(op, name);
                assert!(reason.contains(part), "{name}: {reason}");
            }
            other => panic!("{name}: {other:?}"),
        }
    }
    let fits = entropy(Some(5), 0.0);
    graph.apply(fits, &[logits, six]).unwrap();
}

#[test]
fn updates_of_the_wrong_thing() {
    let mut graph = Graph::new();
    let x = input(&mut graph, &[6]);
    let half = graph.input("half", &[6], DType::F16).unwrap();
    let hyper = input(&mut graph, &[3]);
    let p = graph.parameter("p", &[6], Init::Constant(0.0)).unwrap();
    let s = graph.state("s", &[6], 0.0).unwrap();
    let t = graph.state("t", &[4], 0.0).unwrap();
    let adamw = |params: &[ValueId]| Op::AdamW {
        rates: vec![Rates::decay(0.0); params.len()],
        params: params.to_vec(),
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
    };
    let assign = |state| Op::Assign { state };
    for (op, operands, part) in [
        (adamw(&[s]), vec![x, hyper], "only parameters"),
        (adamw(&[p]), vec![hyper, hyper], "a gradient"),
        (adamw(&[p]), vec![x, x], "hyper"),
        (adamw(&[p]), vec![half, hyper], "f32"),
        (adamw(&[p]), vec![hyper], "takes 2"),
        (adamw(&[p, p]), vec![x, x, hyper], "twice"),
        (assign(p), vec![x], "only states"),
        (assign(t), vec![x], "[4]"),
        (assign(s), vec![half], "f32"),
        (Op::GlobalNorm, vec![x, half], "f32"),
    ] {
        let error = graph.apply(op, &operands).unwrap_err();
        assert!(matches!(error, Error::Shape { .. }));
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[test]
fn names_shapes_and_values_that_do_not_exist() {
    let mut graph = Graph::new();
    let x = graph.input("x", &[2, 3], DType::F32).unwrap();
    let mut other = Graph::new();
    let foreign = input(&mut other, &[2, 3]);
    let init = Init::Constant(0.0);
    for error in [
        graph.input("x", &[1], DType::F32).unwrap_err(),
        graph.parameter("x", &[1], init).unwrap_err(),
        graph.state("", &[1], 0.0).unwrap_err(),
        graph.input("u", &[1], DType::U32).unwrap_err(),
        graph.add(x, foreign).unwrap_err(),
        graph.output("y", foreign).unwrap_err(),
        graph.value(foreign).unwrap_err(),
        graph.gradients(x, &[x]).unwrap_err(),
    ] {
        assert!(matches!(error, Error::Graph(_)), "{error}");
    }
    let huge = 1 << 63;
    for error in [
        graph.input("a", &[], DType::F32).unwrap_err(),
        graph.input("a", &[1, 2, 3, 4], DType::F32).unwrap_err(),
        graph.input("a", &[2, 0], DType::F32).unwrap_err(),
        graph.input("a", &[huge, 2, 4], DType::F32).unwrap_err(),
        graph.parameter("a", &[huge + 1, 2, 4], init).unwrap_err(),
        graph.conv_parameter("c", [2, 3, 0], init).unwrap_err(),
        graph.conv_parameter("c", [2, huge, 2], init).unwrap_err(),
        graph.constant(&[0], 1.0).unwrap_err(),
        graph.state("s", &[1 << 16, 1 << 16], 1.0).unwrap_err(),
        graph.index_input("i", 0, 4).unwrap_err(),
        graph.reshape(x, &[huge, 2, 3]).unwrap_err(),
        graph.reshape(x, &[7]).unwrap_err(),
    ] {
        assert!(matches!(error, Error::Shape { .. }), "{error}");
    }
    graph.output("y", x).unwrap();
    assert!(graph.output("y", x).is_err());
    let error = graph.im2col(x, 3, 1).unwrap_err();
    assert!(matches!(error, Error::Shape { op: "im2col", .. }));
    let error = graph.add_over_time(x, x).unwrap_err();
    assert!(error.to_string().contains("[B, L, C]"), "{error}");
    assert_eq!(graph.find("x"), Some(x));
    assert_eq!(graph.find("a"), None);
}

#[test]
fn operations_without_a_gradient_say_so() {
    let mut graph = Graph::new();
    let x = input(&mut graph, &[2, 3]);
    let ones = input(&mut graph, &[3]);
    let op = Op::LayerNorm { eps: 1e-5 };
    let normalised = graph.apply(op, &[x, ones, ones]).unwrap();
    // Through the statistics alone, and through both results.
    let statistics = graph.sum_all(normalised[1]).unwrap();
    let y = graph.sum_all(normalised[0]).unwrap();
    let both = graph.add(statistics, y).unwrap();
    let norm = graph.global_norm(&[x]).unwrap();
    let square = graph.unary(UnaryOp::Square, x).unwrap();
    let sum = graph.sum_all(square).unwrap();
    let first = graph.gradients(sum, &[x]).unwrap()[0];
    let second = graph.sum_all(first).unwrap();
    for (loss, part) in [
        (statistics, "layer_norm"),
        (both, "layer_norm"),
        (norm, "global_norm"),
        (second, "second derivatives"),
    ] {
        let error = graph.gradients(loss, &[x]).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
    }
    // What a loss does not depend on has gradient zero.
    let free = input(&mut graph, &[4]);
    let zero = graph.gradients(sum, &[free]).unwrap()[0];
    assert_eq!(graph.value(zero).unwrap().shape.dims(), [4]);
}

#[test]
fn a_graph_reads_line_by_line() {
    let mut graph = Graph::new();
    let x = graph.input("x", &[2, 3], DType::F32).unwrap();
    let ids = graph.index_input("ids", 4, 2).unwrap();
    let w = graph
        .conv_parameter("w", [2, 3, 1], Init::Uniform(0.5))
        .unwrap();
    let taps = graph
        .conv_parameter("taps", [2, 3, 2], Init::Constant(0.0))
        .unwrap();
    let count = graph.state("count", &[1], 1.0).unwrap();
    let y = graph.matmul_as(x, w, Trans::NT, DType::F16).unwrap();
    let y = graph.affine(y, 0.5, 0.0).unwrap();
    let rows = graph.gather(y, ids, Some(0)).unwrap();
    let next = graph.affine(count, 1.0, 1.0).unwrap();
    graph.assign(count, next).unwrap();
    graph.output("rows", rows).unwrap();
    graph.output("taps", taps).unwrap();
    let expected = "\
%0 = Input { below: None } \"x\" : f32 [2, 3]
%1 = Input { below: Some(2) } \"ids\" : u32 [4]
%2 = Parameter(Uniform(0.5)) \"w\" : f32 [2, 3], 1 taps
%3 = Parameter(Constant(0.0)) \"taps\" : f32 [2, 6], 2 taps
%4 = State(1.0) \"count\" : f32 [1]
%5 = MatMul { batch: 1, trans: NT, out: F16 }(%0, %2) : f16 [2, 2]
%6 = Unary(Affine { scale: 0.5, offset: 0.0 })(%5) : f16 [2, 2]
%7 = Gather { padding: Some(0) }(%6, %1) : f16 [4, 2]
%8 = Unary(Affine { scale: 1.0, offset: 1.0 })(%4) : f32 [1]
Assign { state: ValueId(4) }(%8)
output \"rows\" = %7
output \"taps\" = %3
";
    assert_eq!(graph.to_string(), expected);
}

#[test]
fn values_know_their_graph() {
    let build = || {
        let mut graph = Graph::new();
        let x = input(&mut graph, &[2, 3]);
        (graph, x)
    };
    let (mut first, x) = build();
    let (mut second, y) = build();
    // Equal graphs of other values: the name, the text and the fingerprint are the same.
    assert_ne!(x, y);
    assert_eq!(first, second);
    assert_eq!(first.to_string(), second.to_string());
    assert_eq!(format!("{x:?}"), format!("{y:?}"));
    for error in [
        first.add(x, y).unwrap_err(),
        first.reshape(y, &[6]).unwrap_err(),
        first.output("y", y).unwrap_err(),
        first.cast(y, DType::F32).unwrap_err(),
        first.dropout(y, 0.0, x, 1).unwrap_err(),
        first.gradients(y, &[x]).unwrap_err(),
        first.assign(y, x).unwrap_err(),
        first
            .scoped("layer", |g| g.value(y).map(|_| ()))
            .unwrap_err(),
    ] {
        assert!(matches!(error, Error::Graph(_)), "{error}");
        assert!(error.to_string().contains("another graph"), "{error}");
    }
    second.add(y, y).unwrap();

    // A clone has the values that its original had, and later ones of its own.
    let mut clone = first.clone();
    let of_first = first.affine(x, 1.0, 0.0).unwrap();
    let of_clone = clone.affine(x, 2.0, 0.0).unwrap();
    assert_ne!(of_first, of_clone);
    assert!(first.value(of_clone).is_err() && clone.value(of_first).is_err());
    let mut third = clone.clone();
    third.add(of_clone, x).unwrap();
    assert!(third.value(of_first).is_err());
    let again = clone.affine(of_clone, 1.0, 0.0).unwrap();
    assert!(third.value(again).is_err());
    for (id, value) in third.values() {
        assert_eq!(third.value(id).unwrap(), value);
    }
    assert_eq!(third.find("x0"), Some(x));
    let moved = third;
    moved.value(of_clone).unwrap();
}

/// A panic inside of a closure leaves neither a segment nor a layer open.
#[test]
fn closures_that_panic() {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    let mut graph = Graph::new();
    let x = input(&mut graph, &[2, 3]);
    let result = catch_unwind(AssertUnwindSafe(|| {
        graph.scoped("layer", |graph| {
            graph.recompute(|graph| -> energyflow::Result<()> {
                graph.affine(x, 1.0, 0.0)?;
                panic!("as it may happen")
            })
        })
    }));
    assert!(result.is_err());
    let y = graph.recompute(|graph| graph.affine(x, 2.0, 0.0)).unwrap();
    let scopes: Vec<_> = graph
        .nodes()
        .iter()
        .map(|node| node.scope.as_deref())
        .collect();
    assert_eq!(scopes, [Some("layer"), None]);
    let sum = graph.sum_all(y).unwrap();
    graph.gradients(sum, &[x]).unwrap();
    // Nor does an error.
    graph.recompute(|graph| graph.add(x, sum)).unwrap_err();
    graph.recompute(|graph| graph.affine(x, 3.0, 0.0)).unwrap();
}
