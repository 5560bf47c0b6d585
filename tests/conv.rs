//! 1-D convolutions with a matrix of windows: the windows, their transpose, and the product of both with a weight.
//! Those that gather their windows are in `conv_implicit.rs`.

mod common;

use common::convolution::by_definition;
use common::{Case, F32, baseline_gpu, compare, gpu, tiled_gpu, tolerance};
use energyflow::graph::{Graph, Init, Op};
use energyflow::reference::Array;
use energyflow::runtime::Host;
use energyflow::types::{DType, Trans, Window};
use energyflow::{Gpu, Session};

/// Samples, time steps, channels, taps, dilation.
const EXTENTS: [[usize; 5]; 12] = [
    [1, 1, 1, 1, 1],
    [2, 7, 3, 3, 2],
    // Reaches back beyond the start from everywhere.
    [3, 5, 4, 5, 8],
    [2, 13, 8, 3, 1],
    [1, 31, 7, 2, 31],
    [2, 32, 31, 4, 5],
    [1, 33, 64, 3, 4],
    [2, 16, 65, 5, 1],
    [1, 63, 33, 1, 1],
    [3, 64, 2, 7, 9],
    [1, 65, 13, 3, 64],
    [2, 127, 5, 2, 3],
];

#[test]
fn windows_and_back() {
    for dtype in [DType::F32, DType::F16] {
        for [b, time, channels, kernel, dilation] in EXTENTS {
            let mut case = Case::new(1, dtype);
            let x = case.input(&[b, time, channels]);
            let columns = case.graph.im2col(x, kernel, dilation).unwrap();
            case.output("im2col", columns);
            let given = case.input(&[b * time, kernel * channels]);
            let window = Window::causal(time, kernel, dilation).unwrap();
            let back = case.graph.apply(Op::Col2im(window), &[given]).unwrap()[0];
            case.output("col2im", back);
            case.check(tolerance(dtype));
        }
    }
}

#[test]
fn windows_with_something_behind() {
    for dtype in [DType::F32, DType::F16] {
        let mut case = Case::new(2, dtype);
        let x = case.input(&[2, 9, 5]);
        let scale = case.input(&[15]);
        let columns = case.graph.im2col(x, 3, 2).unwrap();
        let y = case.graph.mul(columns, columns).unwrap();
        let y = case.graph.add_bias(y, scale).unwrap();
        case.output("y", y);
        assert_eq!(case.dispatches(), 1);
        case.gradients(y, &[x]);
        case.check(tolerance(dtype));
    }
}

#[test]
fn gradients() {
    for (i, dtype) in [DType::F32, DType::F16].into_iter().enumerate() {
        for &[b, time, channels, kernel, dilation] in EXTENTS.iter().skip(i).step_by(2) {
            let out = 1 + (channels * 3) % 35;
            let mut case = Case::new(3, dtype);
            let x = case.input(&[b, time, channels]);
            let w = case.parameter(&[out, kernel * channels]);
            let bias = case.parameter(&[out]);
            let half = case.graph.cast(w, dtype).unwrap();
            let columns = case.graph.im2col(x, kernel, dilation).unwrap();
            let y = case.graph.matmul(columns, half, Trans::NT).unwrap();
            let y = case.graph.add_bias(y, bias).unwrap();
            case.output("y", y);
            case.gradients(y, &[x, w, bias]);
            case.check(tolerance(dtype));
        }
    }
}

#[test]
fn gradients_agree_with_finite_differences() {
    for [b, time, channels, kernel, dilation] in [[2, 5, 3, 3, 2], [1, 4, 2, 2, 7], [2, 3, 4, 1, 1]]
    {
        let mut case = Case::new(4, DType::F32);
        let x = case.input(&[b, time, channels]);
        let w = case.parameter(&[3, kernel * channels]);
        let columns = case.graph.im2col(x, kernel, dilation).unwrap();
        let y = case.graph.matmul(columns, w, Trans::NT).unwrap();
        case.check_finite_differences(y, &[x, w], 1e-7);

        let mut case = Case::new(4, DType::F32);
        let columns = case.input(&[b * time, kernel * channels]);
        let window = Window::causal(time, kernel, dilation).unwrap();
        let y = case.graph.apply(Op::Col2im(window), &[columns]).unwrap()[0];
        case.check_finite_differences(y, &[columns], 1e-7);
    }
}

fn convolve(gpu: &Gpu, extents: [usize; 5], out: usize) {
    let [b, time, channels, kernel, dilation] = extents;
    let mut case = Case::new(5, DType::F32);
    let x = case.uniform(b * time * channels, -1.0, 1.0);
    let w = case.uniform(out * channels * kernel, -1.0, 1.0);
    let bias = case.uniform(out, -1.0, 1.0);
    let mut graph = Graph::new();
    let zero = Init::Constant(0.0);
    let input = graph.input("x", &[b, time, channels], DType::F32).unwrap();
    let weight = graph
        .conv_parameter("w", [out, channels, kernel], zero)
        .unwrap();
    let offset = graph.parameter("b", &[out], zero).unwrap();
    let columns = graph.im2col(input, kernel, dilation).unwrap();
    let y = graph.matmul(columns, weight, Trans::NT).unwrap();
    let y = graph.add_bias(y, offset).unwrap();
    graph.output("y", y).unwrap();
    let mut session = Session::new(gpu, 0);
    let executable = session.compile(&graph).unwrap();
    session.set("w", &w).unwrap();
    session.set("b", &bias).unwrap();
    let outputs = executable.run(&[("x", Host::from(&x))]).unwrap();
    let got = outputs.wait().unwrap().get("y").unwrap();
    let causal = (time, 1, (kernel - 1) * dilation);
    let extents = [b, time, channels, out, kernel, dilation];
    let expected = by_definition(extents, causal, &x, &w, &bias);
    let expected = Array::new(&[b * time, out], expected).unwrap();
    compare("y", &got, &expected, F32, || format!("{extents:?}"));
}

#[test]
fn a_convolution_is_what_it_is_defined_to_be() {
    for (i, extents) in EXTENTS.into_iter().enumerate() {
        let out = [1, 7, 12, 33][i % 4];
        for gpu in [gpu(), tiled_gpu(), baseline_gpu()] {
            convolve(&gpu, extents, out);
        }
    }
}
