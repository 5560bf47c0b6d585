//! 1-D convolutions that gather their windows: forward, both gradients, against the reference and against a matrix of windows.

mod common;

use common::convolution::by_definition;
use common::{Case, F32, compare, cooperative_gpu, gpu, tiled_gpu, tolerance};
use energyflow::graph::{Graph, Op, ValueId};
use energyflow::nn::{Conv1d, ConvMethod};
use energyflow::reference::Array;
use energyflow::runtime::Host;
use energyflow::types::{DType, Padding, UnaryOp, Window};
use energyflow::{Gpu, Session};

/// Samples, time steps, channels, outputs, taps, dilation. Channels that are multiples of four are gathered, others are not; of 32 and
/// 16 a tile has one tap.
const EXTENTS: [[usize; 6]; 14] = [
    [1, 1, 4, 4, 1, 1],
    [2, 7, 12, 8, 3, 2],
    // Reaches back beyond the start from everywhere.
    [3, 5, 4, 20, 5, 8],
    [2, 13, 8, 5, 3, 1],
    [1, 31, 28, 4, 2, 31],
    [2, 32, 32, 64, 4, 5],
    [1, 33, 64, 36, 3, 4],
    [2, 16, 68, 32, 5, 1],
    [1, 63, 36, 12, 2, 1],
    [3, 64, 4, 33, 7, 9],
    [1, 65, 16, 128, 3, 64],
    [2, 127, 20, 132, 2, 3],
    [2, 9, 3, 4, 3, 2],
    [2, 9, 8, 7, 3, 1],
];

/// Stride and padding, one after the other for the extents.
const SHAPES: [(usize, Padding); 7] = [
    (1, Padding::Causal),
    (1, Padding::Same),
    (2, Padding::Causal),
    (1, Padding::Causal),
    (3, Padding::Same),
    (1, Padding::Valid),
    (5, Padding::Causal),
];

fn window([_, time, _, _, kernel, dilation]: [usize; 6], i: usize) -> Window {
    let (stride, padding) = SHAPES[i % SHAPES.len()];
    let causal = || Window::new(time, kernel, dilation, stride, Padding::Causal).unwrap();
    Window::new(time, kernel, dilation, stride, padding).unwrap_or_else(|_| causal())
}

/// GELU(conv(x) + bias), which is one kernel, and all gradients.
fn block(extents: [usize; 6], window: Window, dtype: DType) -> Case {
    let [b, time, channels, outputs, kernel, _] = extents;
    let mut case = Case::new(1, dtype);
    let x = case.input(&[b, time, channels]);
    let w = case.parameter(&[outputs, kernel * channels]);
    let bias = case.parameter(&[outputs]);
    let weight = case.graph.cast(w, dtype).unwrap();
    let y = case.graph.conv1d(x, weight, window).unwrap();
    let y = case.graph.add_bias(y, bias).unwrap();
    let y = case.graph.unary(UnaryOp::Tanh, y).unwrap();
    case.output("y", y);
    case.gradients(y, &[x, w, bias]);
    case
}

#[test]
fn forward_and_gradients() {
    for (i, &extents) in EXTENTS.iter().enumerate() {
        // A software driver takes a while to compile each.
        let dtype = [DType::F32, DType::F16][i % 2];
        let case = block(extents, window(extents, i), dtype);
        case.check(tolerance(dtype));
    }
}

#[test]
#[ignore = "needs matrix units"]
fn forward_and_gradients_on_matrix_units() {
    for (i, &extents) in EXTENTS.iter().enumerate().step_by(2) {
        let case = block(extents, window(extents, i), DType::F16);
        case.check_on(&cooperative_gpu(), tolerance(DType::F16));
    }
}

/// Enough rows that the weight gradient is made of several parts.
#[test]
fn long_sums_are_split() {
    for (i, (stride, padding)) in SHAPES.into_iter().enumerate().take(3) {
        let window = Window::new(150, 3, 4, stride, padding).unwrap();
        let case = block([9, 150, 4 + 4 * i, 8, 3, 4], window, DType::F32);
        case.check_on(&tiled_gpu(), tolerance(DType::F32));
    }
}

#[test]
fn gradients_agree_with_finite_differences() {
    let extents = [[2, 5, 3, 4, 3, 2], [1, 6, 4, 3, 2, 7], [2, 7, 2, 2, 4, 1]];
    for (i, extents) in extents.into_iter().enumerate() {
        for shift in 0..SHAPES.len() {
            let [b, time, channels, outputs, kernel, _] = extents;
            let mut case = Case::new(4, DType::F32);
            let x = case.input(&[b, time, channels]);
            let w = case.parameter(&[outputs, kernel * channels]);
            let window = window(extents, i + shift);
            let y = case.graph.conv1d(x, w, window).unwrap();
            case.check_finite_differences(y, &[x, w], 1e-7);
        }
    }
}

/// The layer, by both methods, against the definition.
fn layer(gpu: &Gpu, extents: [usize; 6], stride: usize, padding: Padding, before: usize) {
    let [b, time, channels, outputs, kernel, dilation] = extents;
    let mut case = Case::new(5, DType::F32);
    let x = case.uniform(b * time * channels, -1.0, 1.0);
    let w = case.uniform(outputs * channels * kernel, -1.0, 1.0);
    let bias = case.uniform(outputs, -1.0, 1.0);
    for method in [ConvMethod::Implicit, ConvMethod::Columns] {
        let mut graph = Graph::new();
        let input = graph.input("x", &[b, time, channels], DType::F32).unwrap();
        let conv = Conv1d::new(&mut graph, "c", channels, outputs, kernel, true).unwrap();
        let conv = conv
            .dilation(dilation)
            .stride(stride)
            .padding(padding)
            .method(method);
        let y = conv.forward(&mut graph, input).unwrap();
        let steps = graph.value(y).unwrap().shape.dims()[1];
        graph.output("y", y).unwrap();
        let mut session = Session::new(gpu, 0);
        let executable = session.compile(&graph).unwrap();
        session.set("c.weight", &w).unwrap();
        session.set("c.bias", &bias).unwrap();
        let outcome = executable.run(&[("x", Host::from(&x))]).unwrap();
        let got = outcome.wait().unwrap().get("y").unwrap();
        let expected = by_definition(extents, (steps, stride, before), &x, &w, &bias);
        let expected = Array::new(&[b * steps, outputs], expected).unwrap();
        compare("y", &got, &expected, F32, || {
            format!("{extents:?} {method:?}")
        });
    }
}

#[test]
fn layers_are_what_they_are_defined_to_be() {
    for gpu in [gpu(), tiled_gpu()] {
        layer(&gpu, [2, 11, 8, 12, 3, 2], 1, Padding::Causal, 4);
        layer(&gpu, [2, 11, 8, 12, 4, 1], 1, Padding::Same, 1);
        layer(&gpu, [2, 11, 8, 12, 3, 2], 2, Padding::Valid, 0);
        layer(&gpu, [2, 11, 7, 5, 5, 4], 3, Padding::Same, 8);
        layer(&gpu, [2, 11, 4, 5, 1, 1], 2, Padding::Causal, 0);
    }
}

fn dispatches(channels: usize, wanted: fn(&mut Case, ValueId, ValueId)) -> Vec<String> {
    let mut case = Case::new(6, DType::F32);
    let x = case.input(&[2, 40, channels]);
    let w = case.parameter(&[8, 3 * channels]);
    wanted(&mut case, x, w);
    let running = case.start(&tiled_gpu());
    let kernels = running.executable.sources();
    // Whether matrix units compute a product does not matter.
    let name = |key: &str| match key.split(' ').next().unwrap_or_default() {
        "gemm_cooperative" => "gemm_tiled".to_owned(),
        other => other.to_owned(),
    };
    kernels.map(|(key, _)| name(key)).collect()
}

/// No matrix of windows, but for odd numbers of channels.
#[test]
fn windows_are_not_stored() {
    let forward = |case: &mut Case, x, w| {
        let window = Window::causal(40, 3, 2).unwrap();
        let y = case.graph.conv1d(x, w, window).unwrap();
        case.output("y", y);
    };
    assert_eq!(dispatches(8, forward), ["gemm_tiled"]);
    assert_eq!(dispatches(7, forward), ["im2col", "gemm_tiled"]);
    let input = |case: &mut Case, x, w| {
        let op = Op::ConvGradInput {
            window: Window::causal(40, 3, 2).unwrap(),
            out: DType::F32,
        };
        let dy = case.input(&[2, 40, 8]);
        let dx = case.graph.apply(op, &[dy, w]).unwrap()[0];
        let sum = case.graph.add(dx, x).unwrap();
        case.output("dx", sum);
    };
    assert_eq!(dispatches(8, input), ["gemm_tiled"]);
    assert_eq!(dispatches(7, input), ["gemm_tiled", "col2im"]);
}
