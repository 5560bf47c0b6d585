//! A linear layer with its cross entropy, whose logits exist some rows at a time.

mod common;

use common::{Case, Tolerance, baseline_gpu, gpu, tiled_gpu, tolerance};
use energyflow::graph::{Graph, Init, LinearCrossEntropy, Op, ValueId};
use energyflow::train::AdamW;
use energyflow::types::{DType, Trans};
use energyflow::{Error, Session};

/// Sums with cancellation.
fn bound(dtype: DType) -> Tolerance {
    let Tolerance { relative, .. } = tolerance(dtype);
    Tolerance {
        normalised: relative,
        relative: 2.0 * relative,
    }
}

/// Makes every chunk 64 rows.
const LEAST: u64 = 1;

#[derive(Clone, Copy, Debug)]
struct Options {
    dtype: DType,
    /// N, D, V
    extents: [usize; 3],
    bias: bool,
    ignore: Option<u32>,
    smoothing: f32,
    chunk_bytes: u64,
}

struct Layer {
    case: Case,
    operands: Vec<ValueId>,
    options: Options,
}

impl Layer {
    /// f16 networks have f32 parameters.
    fn new(options: Options) -> Self {
        let [n, d, v] = options.extents;
        let dtype = options.dtype;
        let mut case = Case::new((n + d + v) as u64, dtype);
        let x = case.input(&[n, d]);
        let weight = case.parameter(&[v, d]);
        let ids = (0..n).map(|i| ((v - 1 + 7 * i) % v) as u32).collect();
        let targets = case.ids_of(ids, v as u32);
        let mut operands = vec![x, weight, targets];
        if options.bias {
            operands.push(case.parameter(&[v]));
        }
        Self {
            case,
            operands,
            options,
        }
    }

    fn op(&self) -> LinearCrossEntropy {
        LinearCrossEntropy::new(self.options.dtype)
            .ignore(self.options.ignore)
            .smoothing(self.options.smoothing)
            .chunk_bytes(self.options.chunk_bytes)
    }

    /// Everything but the weights, which are cast.
    fn apply(&mut self) -> Vec<ValueId> {
        let op = Op::LinearCrossEntropy(self.op());
        let g = &mut self.case.graph;
        let mut operands = self.operands.clone();
        operands[1] = g.cast(operands[1], self.options.dtype).unwrap();
        g.apply(op, &operands).unwrap()
    }

    /// What is differentiated by: all operands but the targets.
    fn variables(&self) -> Vec<ValueId> {
        let mut variables = self.operands.clone();
        variables.remove(2);
        variables
    }

    fn output_gradients(&mut self, loss: ValueId) {
        let variables = self.variables();
        let gradients = self.case.graph.gradients(loss, &variables).unwrap();
        for (name, gradient) in ["dx", "dweight", "dbias"].iter().zip(gradients) {
            self.case.output(name, gradient);
        }
    }

    fn with_everything(mut self) -> Case {
        let results = self.apply();
        for (name, &value) in ["loss", "count", "rows"].iter().zip(&results) {
            self.case.output(name, value);
        }
        self.output_gradients(results[0]);
        self.case
    }
}

fn kernels(case: &Case, gpu: &energyflow::Gpu) -> Vec<String> {
    let executable = case.start(gpu).executable;
    let names = executable
        .sources()
        .map(|(key, _)| key.split(' ').next().unwrap().to_owned());
    names.collect()
}

fn count(names: &[String], wanted: &str) -> usize {
    names.iter().filter(|name| *name == wanted).count()
}

#[test]
fn values_and_gradients() {
    let rows = [1, 7, 64, 65, 130, 200];
    for dtype in [DType::F32, DType::F16] {
        for (i, v) in [1, 3, 4, 5, 31, 127, 129, 1000].into_iter().enumerate() {
            let n = rows[i % rows.len()];
            let case = Layer::new(Options {
                dtype,
                extents: [n, [8, 13, 33][i % 3], v],
                bias: i % 2 == 0,
                ignore: (i % 3 != 0).then_some(v as u32 / 2),
                smoothing: [0.0, 0.1][i / 2 % 2],
                chunk_bytes: LEAST,
            })
            .with_everything();
            let names = kernels(&case, &gpu());
            let chunks = n.div_ceil(64);
            assert_eq!(count(&names, "cross_entropy_value_grad"), chunks);
            assert_eq!(count(&names, "cross_entropy_grad"), 0);
            case.check(bound(dtype));
        }
    }
}

#[test]
fn a_vocabulary() {
    for dtype in [DType::F32, DType::F16] {
        let case = Layer::new(Options {
            dtype,
            extents: [65, 5, 30_522],
            bias: true,
            ignore: Some(3),
            smoothing: 0.1,
            chunk_bytes: LEAST,
        })
        .with_everything();
        case.check_on(&gpu(), bound(dtype));
        case.check_on(&tiled_gpu(), bound(dtype));
    }
}

#[test]
fn chunks_that_do_and_do_not_divide_the_rows() {
    for n in [128, 192, 256, 257, 300] {
        // Row of 40 logits: 192 bytes with padding.
        for rows in [64, 100, 128, 192, 1000] {
            let case = Layer::new(Options {
                dtype: DType::F32,
                extents: [n, 9, 40],
                bias: true,
                ignore: None,
                smoothing: 0.1,
                chunk_bytes: 192 * rows,
            })
            .with_everything();
            let most = if rows >= n as u64 {
                n
            } else {
                rows as usize / 64 * 64
            };
            let names = kernels(&case, &gpu());
            let chunks = count(&names, "cross_entropy_value_grad");
            assert_eq!(chunks, n.div_ceil(most), "{n} rows by {rows}");
            case.check_on(&gpu(), bound(DType::F32));
            if rows == 100 {
                case.check_on(&tiled_gpu(), bound(DType::F32));
            }
        }
    }
}

/// As a product, an addition and a cross entropy.
#[test]
fn the_same_as_its_parts() {
    for dtype in [DType::F32, DType::F16] {
        let options = Options {
            dtype,
            extents: [150, 24, 101],
            bias: true,
            ignore: Some(7),
            smoothing: 0.1,
            chunk_bytes: LEAST,
        };
        let whole = Layer::new(options).with_everything();
        let mut parts = Layer::new(options);
        let (ignore, smoothing) = (options.ignore, options.smoothing);
        let &[x, weight, targets, bias] = parts.operands.as_slice() else {
            unreachable!()
        };
        let g = &mut parts.case.graph;
        let weight = g.cast(weight, dtype).unwrap();
        let logits = g.matmul(x, weight, Trans::NT).unwrap();
        let logits = g.add_bias(logits, bias).unwrap();
        let op = Op::CrossEntropy { ignore, smoothing };
        let results = g.apply(op, &[logits, targets]).unwrap();
        for (name, &value) in ["loss", "count", "rows"].iter().zip(&results) {
            parts.case.output(name, value);
        }
        parts.output_gradients(results[0]);
        for gpu in [gpu(), tiled_gpu()] {
            let (a, _) = whole.run_on(&gpu);
            let (b, _) = parts.case.run_on(&gpu);
            for name in ["loss", "count", "rows", "dx", "dweight", "dbias"] {
                let (a, b) = (a.get(name).unwrap(), b.get(name).unwrap());
                let square: f32 = b.iter().map(|b| b * b).sum();
                let rms = (square / b.len() as f32).sqrt();
                let far = bound(dtype).relative as f32;
                let close = |(a, b): (&f32, &f32)| (a - b).abs() <= far * (b.abs() + rms);
                assert!(a.iter().zip(&b).all(close), "{name}");
            }
        }
    }
}

#[test]
fn the_method_and_its_defaults() {
    let mut case = Case::new(3, DType::F32);
    // More than one row a sample.
    let (x, weight) = (case.input(&[3, 25, 8]), case.input(&[12, 8]));
    let targets = case.ids(75, 12);
    let g = &mut case.graph;
    let ce = g
        .linear_cross_entropy(x, weight, None, targets, None, 0.0)
        .unwrap();
    let gradients = g.gradients(ce.loss, &[x, weight]).unwrap();
    case.output("loss", ce.loss);
    case.output("count", ce.count);
    case.output("dx", gradients[0]);
    case.output("dweight", gradients[1]);
    // The seed; logits, loss and gradient, dx, dweight; the total.
    let names = kernels(&case, &gpu());
    assert_eq!(names.len(), 6, "{names:?}");
    case.check(bound(DType::F32));
}

#[test]
fn the_value_alone() {
    for dtype in [DType::F32, DType::F16] {
        let mut layer = Layer::new(Options {
            dtype,
            extents: [130, 8, 33],
            bias: true,
            ignore: Some(0),
            smoothing: 0.1,
            chunk_bytes: LEAST,
        });
        let results = layer.apply();
        for (name, &value) in ["loss", "count", "rows"].iter().zip(&results) {
            layer.case.output(name, value);
        }
        let names = kernels(&layer.case, &gpu());
        assert_eq!(count(&names, "cross_entropy"), 3, "{names:?}");
        layer.case.check(bound(dtype));
    }
}

/// A gradient that takes the loss to start: the logits are computed again.
#[test]
fn the_gradient_apart() {
    for dtype in [DType::F32, DType::F16] {
        let mut layer = Layer::new(Options {
            dtype,
            extents: [130, 8, 33],
            bias: true,
            ignore: Some(0),
            smoothing: 0.1,
            chunk_bytes: LEAST,
        });
        let results = layer.apply();
        let squared = layer.case.graph.mul(results[0], results[0]).unwrap();
        layer.case.output("squared", squared);
        layer.output_gradients(squared);
        let names = kernels(&layer.case, &gpu());
        assert_eq!(count(&names, "cross_entropy"), 3, "{names:?}");
        assert_eq!(count(&names, "cross_entropy_grad"), 3, "{names:?}");
        layer.case.check(bound(dtype));
    }
}

/// Only what is asked for: a frozen layer has no gradients of its parameters.
#[test]
fn some_of_the_gradients() {
    let options = Options {
        dtype: DType::F32,
        extents: [70, 8, 33],
        bias: true,
        ignore: None,
        smoothing: 0.0,
        chunk_bytes: LEAST,
    };
    // dx, dweight, dbias: the dispatches of two chunks beside logits, loss, and the seed.
    for (wanted, dispatches) in [(0, 2), (1, 2), (2, 3)] {
        let mut layer = Layer::new(options);
        let loss = layer.apply()[0];
        let variable = layer.variables()[wanted];
        let gradient = layer.case.graph.gradients(loss, &[variable]).unwrap()[0];
        layer.case.output("gradient", gradient);
        let names = kernels(&layer.case, &gpu());
        // The seed, the padding of the rows, two products, two losses, the total.
        assert_eq!(names.len(), 7 + dispatches, "{names:?}");
        layer.case.check(bound(DType::F32));
    }
}

#[test]
fn agrees_with_finite_differences() {
    for smoothing in [0.0, 0.1] {
        let mut layer = Layer::new(Options {
            dtype: DType::F32,
            extents: [5, 3, 4],
            bias: true,
            ignore: Some(1),
            smoothing,
            chunk_bytes: LEAST,
        });
        let loss = layer.apply()[0];
        let variables = layer.variables();
        layer.case.check_finite_differences(loss, &variables, 1e-7);
    }
}

#[test]
fn everything_ignored_is_no_loss() {
    for dtype in [DType::F32, DType::F16] {
        let mut case = Case::new(5, dtype);
        let (x, weight) = (case.input(&[70, 8]), case.input(&[9, 8]));
        let targets = case.ids_of(vec![9; 70], 10);
        let layer = LinearCrossEntropy::new(dtype).ignore(Some(9));
        let layer = layer.smoothing(0.1).chunk_bytes(LEAST);
        let op = Op::LinearCrossEntropy(layer);
        let loss = case.graph.apply(op, &[x, weight, targets]).unwrap()[0];
        let gradients = case.graph.gradients(loss, &[x, weight]).unwrap();
        case.output("loss", loss);
        case.output("dx", gradients[0]);
        case.output("dweight", gradients[1]);
        case.check(bound(dtype));
        let (outputs, _) = case.run_on(&tiled_gpu());
        for name in ["loss", "dx", "dweight"] {
            assert!(outputs.get(name).unwrap().iter().all(|&x| x == 0.0));
        }
    }
}

/// The gradients of the parameters are summed in the gradient arena.
#[test]
fn training() {
    for (dtype, far) in [(DType::F32, 2e-4), (DType::F16, 2e-2)] {
        let mut layer = Layer::new(Options {
            dtype,
            extents: [150, 8, 33],
            bias: true,
            ignore: Some(2),
            smoothing: 0.1,
            chunk_bytes: LEAST,
        });
        let loss = layer.apply()[0];
        layer.case.output("loss", loss);
        let optimizer = AdamW::default().clip(Some(1.0));
        let parameters = [layer.operands[1], layer.operands[3]];
        let graph = &mut layer.case.graph;
        optimizer.step(graph, loss, &parameters).unwrap();
        let bound = Tolerance {
            normalised: far,
            relative: far,
        };
        for gpu in [gpu(), tiled_gpu()] {
            let mut running = layer.case.start(&gpu);
            // One dispatch for the norm of all gradients, one for all parameters: they lie in one arena.
            let names: Vec<&str> = running.executable.sources().map(|(key, _)| key).collect();
            let of = |family: &str| names.iter().filter(|key| key.starts_with(family)).count();
            assert_eq!((of("norm_partial"), of("adamw")), (1, 1));
            for _ in 0..4 {
                running.step(&layer.case, bound);
            }
            running.compare_variables(&layer.case, bound);
        }
    }
}

fn large(graph: &mut Graph) -> [ValueId; 3] {
    let x = graph.input("x", &[1200, 4], DType::F32).unwrap();
    let weight = graph.parameter("w", &[30_522, 4], Init::Uniform(0.1));
    let targets = graph.index_input("t", 1200, 30_522).unwrap();
    [x, weight.unwrap(), targets]
}

/// 147 MB of logits, where a binding has at most 128 MiB.
#[test]
fn more_logits_than_a_binding_holds() {
    let mut graph = Graph::new();
    let [x, weight, targets] = large(&mut graph);
    let ce = graph.linear_cross_entropy(x, weight, None, targets, None, 0.0);
    let loss = ce.unwrap().loss;
    let gradients = graph.gradients(loss, &[x, weight]).unwrap();
    for (name, value) in [("loss", loss), ("dx", gradients[0]), ("dw", gradients[1])] {
        graph.output(name, value).unwrap();
    }
    let mut session = Session::new(&baseline_gpu(), 0);
    let executable = session.compile(&graph).unwrap();
    let largest = executable.plan().slots.iter().max();
    assert!(*largest.unwrap() <= LinearCrossEntropy::CHUNK_BYTES);

    let mut graph = Graph::new();
    let [x, weight, targets] = large(&mut graph);
    let logits = graph.matmul(x, weight, Trans::NT).unwrap();
    let ce = graph.cross_entropy(logits, targets, None, 0.0).unwrap();
    graph.output("loss", ce.loss).unwrap();
    let error = session.compile(&graph).unwrap_err();
    assert!(matches!(error, Error::Limit { .. }), "{error}");
}

/// A larger bound than the adapter's binding is lowered to it.
#[test]
fn a_bound_beyond_the_adapter() {
    let mut graph = Graph::new();
    let operands = large(&mut graph);
    let layer = LinearCrossEntropy::new(DType::F32).chunk_bytes(u64::MAX);
    let op = Op::LinearCrossEntropy(layer);
    let results = graph.apply(op, &operands).unwrap();
    graph.output("loss", results[0]).unwrap();
    let mut session = Session::new(&baseline_gpu(), 0);
    let executable = session.compile(&graph).unwrap();
    let keys = executable.sources().map(|(key, _)| key);
    assert_eq!(
        keys.filter(|key| key.starts_with("cross_entropy ")).count(),
        2
    );
}

#[test]
fn what_does_not_fit_is_refused() {
    let layer = LinearCrossEntropy::new(DType::F32).chunk_bytes(1);
    let refused = |layer: LinearCrossEntropy, change: fn(&mut Graph, &mut Vec<ValueId>)| {
        let mut graph = Graph::new();
        let mut operands = vec![
            graph.input("x", &[6, 4], DType::F32).unwrap(),
            graph.input("w", &[5, 4], DType::F32).unwrap(),
            graph.index_input("t", 6, 5).unwrap(),
        ];
        change(&mut graph, &mut operands);
        let op = Op::LinearCrossEntropy(layer);
        let error = graph.apply(op, &operands).unwrap_err();
        assert!(matches!(error, Error::Shape { .. }), "{error}");
    };
    let nothing = |_: &mut Graph, _: &mut Vec<ValueId>| {};
    refused(layer.smoothing(1.0), nothing);
    refused(layer.chunk_bytes(0), nothing);
    refused(LinearCrossEntropy::new(DType::U32).chunk_bytes(1), nothing);
    refused(layer, |g, x| {
        x[1] = g.input("v", &[5, 3], DType::F32).unwrap()
    });
    refused(layer, |g, x| x[0] = g.input("v", &[4], DType::F32).unwrap());
    refused(layer, |g, x| x[2] = g.index_input("v", 5, 5).unwrap());
    refused(layer, |g, x| x[2] = g.index_input("v", 6, 6).unwrap());
    refused(layer, |g, x| x[2] = g.input("v", &[6], DType::F32).unwrap());
    refused(layer, |g, x| {
        x.push(g.input("v", &[6], DType::F32).unwrap())
    });
    refused(layer, |_, x| x.truncate(2));
    refused(layer, |_, x| x.extend(vec![x[0]; 2]));
}
