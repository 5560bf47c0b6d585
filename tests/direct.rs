//! Fused operations as functions on tensors.

mod common;

use common::{gpu, tiled_gpu};
use energyflow::direct::{Direct, Norm, Weight};
use energyflow::gpu::{Gpu, Layout, Tensor};
use energyflow::types::{DType, Shape};

fn tensor(gpu: &Gpu, dims: &[usize], dtype: DType) -> Tensor {
    let layout = Layout::of(&Shape::new(dims).unwrap(), dtype).unwrap();
    let tensor = Tensor::uninit(gpu, layout).unwrap();
    tensor.poison(gpu).unwrap();
    tensor
}

fn filled(gpu: &Gpu, dims: &[usize], dtype: DType, data: &[f32]) -> Tensor {
    let tensor = tensor(gpu, dims, dtype);
    tensor.upload(gpu, data).unwrap();
    tensor
}

/// Multiples of 1/64 in ±1, which halves hold.
fn numbers(n: usize, seed: usize) -> Vec<f32> {
    (0..n)
        .map(|i| ((i * i * 7 + seed * (i + 3)) % 129) as f32 / 64.0 - 1.0)
        .collect()
}

struct Problem {
    n: usize,
    d: usize,
    out: usize,
    dtype: DType,
    x: Vec<f32>,
    weight: Vec<f32>,
    bias: Vec<f32>,
    gamma: Vec<f32>,
    beta: Vec<f32>,
}

const EPS: f32 = 1e-5;

impl Problem {
    fn new([n, d, out]: [usize; 3], dtype: DType) -> Self {
        Self {
            n,
            d,
            out,
            dtype,
            x: numbers(n * d, 3),
            weight: numbers(out * d, 5),
            bias: numbers(out, 7),
            gamma: numbers(d, 11),
            beta: numbers(d, 13),
        }
    }

    fn norm(&self) -> Vec<f64> {
        let mut y = Vec::new();
        for row in self.x.chunks(self.d) {
            let n = self.d as f64;
            let mean = row.iter().copied().map(f64::from).sum::<f64>() / n;
            let square = |x: &f32| (f64::from(*x) - mean).powi(2);
            let variance = row.iter().map(square).sum::<f64>() / n;
            for (c, x) in row.iter().enumerate() {
                let xhat = (f64::from(*x) - mean) / (variance + f64::from(EPS)).sqrt();
                y.push(xhat * f64::from(self.gamma[c]) + f64::from(self.beta[c]));
            }
        }
        y
    }

    fn product(&self, x: &[f64], bias: bool) -> Vec<f64> {
        let mut y = Vec::new();
        for row in x.chunks(self.d) {
            for (o, weight) in self.weight.chunks(self.d).enumerate() {
                let pairs = row.iter().zip(weight);
                let sum: f64 = pairs.map(|(x, w)| x * f64::from(*w)).sum();
                y.push(sum + if bias { f64::from(self.bias[o]) } else { 0.0 });
            }
        }
        y
    }

    fn check_all(&self, gpu: &Gpu) {
        let Self {
            n, d, out, dtype, ..
        } = *self;
        let direct = Direct::new(gpu);
        let x = filled(gpu, &[n, d], dtype, &self.x);
        let w = filled(gpu, &[out, d], dtype, &self.weight);
        let b = filled(gpu, &[out], DType::F32, &self.bias);
        let gamma = filled(gpu, &[d], DType::F32, &self.gamma);
        let beta = filled(gpu, &[d], DType::F32, &self.beta);
        let norm = Norm {
            gamma: &gamma,
            beta: &beta,
            eps: EPS,
        };
        let [with, without] = [Some(&b), None].map(|bias| Weight { weight: &w, bias });
        let plain: Vec<f64> = self.x.iter().copied().map(f64::from).collect();
        let gelus = |x: &[f64]| -> Vec<f64> { x.iter().copied().map(gelu).collect() };
        let tensors: Vec<Tensor> = [d, out, out, out]
            .iter()
            .map(|&cols| tensor(gpu, &[n, cols], dtype))
            .collect();
        let expected = [
            self.norm(),
            self.product(&plain, true),
            self.product(&gelus(&plain), false),
            self.product(&gelus(&self.norm()), true),
        ];
        let mut first: Vec<Vec<f32>> = Vec::new();
        for round in 0..2 {
            let mut recorder = gpu.recorder("direct");
            let r = &mut recorder;
            direct.layer_norm(r, &x, norm, &tensors[0]).unwrap();
            direct.linear(r, &x, with, &tensors[1]).unwrap();
            direct.gelu_gemm(r, &x, without, &tensors[2]).unwrap();
            direct.ln_gelu_gemm(r, &x, norm, with, &tensors[3]).unwrap();
            recorder.submit().unwrap();
            for (i, (tensor, expected)) in tensors.iter().zip(&expected).enumerate() {
                let got: Vec<f32> = tensor.download(gpu).unwrap().wait().unwrap();
                compare(&got, expected, dtype);
                match round {
                    0 => first.push(got),
                    _ => assert_eq!(got, first[i], "the second call differs"),
                }
            }
            let stats = direct.stats();
            assert_eq!((stats.misses, stats.hits), (4, 4 * round));
        }
    }
}

fn gelu(x: f64) -> f64 {
    let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
    0.5 * x * (1.0 + inner.tanh())
}

fn compare(got: &[f32], expected: &[f64], dtype: DType) {
    assert_eq!(got.len(), expected.len());
    let square: f64 = expected.iter().map(|x| x * x).sum();
    let rms = (square / expected.len() as f64).sqrt().max(1e-3);
    // In f16 the activations between the steps are rounded, too.
    let bound = if dtype == DType::F16 { 6e-3 } else { 2e-5 };
    for (i, (&g, &e)) in got.iter().zip(expected).enumerate() {
        let error = (f64::from(g) - e).abs() / (e.abs() + rms);
        assert!(error <= bound, "element {i}: {g}, expected {e}");
    }
}

/// The sizes of the seed, and awkward ones; the second call of each is a hit and gives the same bits.
#[test]
fn every_function_at_every_shape() {
    for gpu in [gpu(), tiled_gpu()] {
        for dtype in [DType::F32, DType::F16] {
            for dims in [[4, 8, 5], [1, 2, 1], [13, 31, 33], [65, 7, 129]] {
                Problem::new(dims, dtype).check_all(&gpu);
            }
        }
    }
}

#[test]
fn layers_of_one_shape_do_not_mix_and_updates_are_seen() {
    let gpu = gpu();
    let direct = Direct::new(&gpu);
    let x = filled(&gpu, &[2, 3], DType::F32, &[1.0; 6]);
    let one = filled(&gpu, &[2, 3], DType::F32, &[1.0; 6]);
    let two = filled(&gpu, &[2, 3], DType::F32, &[2.0; 6]);
    let (y, z) = (
        tensor(&gpu, &[2, 2], DType::F32),
        tensor(&gpu, &[2, 2], DType::F32),
    );
    let run = || {
        let mut recorder = gpu.recorder("layers");
        for (weight, y) in [(&one, &y), (&two, &z)] {
            let weight = Weight { weight, bias: None };
            direct.linear(&mut recorder, &x, weight, y).unwrap();
        }
        recorder.submit().unwrap();
        let down = |t: &Tensor| -> Vec<f32> { t.download(&gpu).unwrap().wait().unwrap() };
        (down(&y), down(&z))
    };
    assert_eq!(run(), (vec![3.0; 4], vec![6.0; 4]));
    two.upload(&gpu, &[-1.0; 6]).unwrap();
    assert_eq!(run(), (vec![3.0; 4], vec![-3.0; 4]));
    assert_eq!((direct.stats().misses, direct.stats().hits), (1, 3));
}

#[test]
fn what_does_not_fit_is_refused() {
    let gpu = gpu();
    let direct = Direct::new(&gpu);
    let f32s = |dims: &[usize]| filled(&gpu, dims, DType::F32, &vec![0.0; dims.iter().product()]);
    let (x, w, y) = (f32s(&[2, 3]), f32s(&[4, 3]), f32s(&[2, 4]));
    let mut recorder = gpu.recorder("refused");
    let r = &mut recorder;
    for (weight, bias, y) in [
        (&f32s(&[4, 2]), None, &y),
        (&w, Some(&f32s(&[3])), &y),
        (&w, None, &f32s(&[2, 5])),
        (&filled(&gpu, &[4, 3], DType::F16, &[0.0; 12]), None, &y),
    ] {
        assert!(direct.linear(r, &x, Weight { weight, bias }, y).is_err());
    }
    let gamma = f32s(&[3]);
    for eps in [0.0, -1.0, f32::NAN] {
        let norm = Norm {
            gamma: &gamma,
            beta: &gamma,
            eps,
        };
        assert!(direct.layer_norm(r, &x, norm, &x).is_err());
    }
    let weight = Weight {
        weight: &w,
        bias: None,
    };
    direct.linear(r, &x, weight, &y).unwrap();
}

/// Nothing is copied: the kernels of a call bind the caller's tensors, and a function has memory for intermediate values only.
#[test]
fn tensors_are_bound_where_they_are() {
    let gpu = Gpu::new(&energyflow::GpuOptions::default()).unwrap();
    let direct = Direct::new(&gpu);
    let (rows, width) = (256, 512);
    let x = filled(&gpu, &[rows, width], DType::F32, &vec![1.0; rows * width]);
    let w = filled(&gpu, &[width, width], DType::F32, &vec![0.5; width * width]);
    let y = tensor(&gpu, &[rows, width], DType::F32);
    let weight = Weight {
        weight: &w,
        bias: None,
    };
    let before = gpu.report();
    let mut recorder = gpu.recorder("bound");
    direct.linear(&mut recorder, &x, weight, &y).unwrap();
    recorder.submit().unwrap();
    let got: Vec<f32> = y.download(&gpu).unwrap().wait().unwrap();
    assert!(got.iter().all(|y| (y - 256.0).abs() < 1e-3));
    // Memory for the result alone, which is used where it may not be bound.
    let made = gpu.report().pool.in_use_bytes - before.pool.in_use_bytes;
    let result = (rows * width * 4) as u64;
    // Large GPUs split the product, and so need more.
    let software = gpu.capabilities().device_type == energyflow::wgpu::DeviceType::Cpu;
    assert!(!software || made <= result + result / 16, "{made}");
    // Calls on the same tensors find their bind groups, on others they make new ones.
    let groups = |y: &Tensor| {
        let before = gpu.report().bind_groups.misses;
        let mut recorder = gpu.recorder("again");
        direct.linear(&mut recorder, &x, weight, y).unwrap();
        recorder.submit().unwrap();
        gpu.report().bind_groups.misses - before
    };
    assert_eq!(groups(&y), 0);
    assert!(groups(&tensor(&gpu, &[rows, width], DType::F32)) > 0);
}

/// The result is an operand, or lies in one buffer with it: computed elsewhere, and copied.
#[test]
fn results_may_take_the_place_of_operands() {
    for gpu in [gpu(), tiled_gpu()] {
        let direct = Direct::new(&gpu);
        let n = 24;
        let data = numbers(n * n, 3);
        let square = |data: &[f32]| filled(&gpu, &[n, n], DType::F32, data);
        let gamma = filled(&gpu, &[n], DType::F32, &numbers(n, 11));
        let norm = Norm {
            gamma: &gamma,
            beta: &gamma,
            eps: EPS,
        };
        let weight_data = numbers(n * n, 5);
        let down = |tensor: &Tensor| -> Vec<f32> { tensor.download(&gpu).unwrap().wait().unwrap() };
        let run = |x: &Tensor, w: &Tensor, y: &Tensor| {
            let weight = Weight {
                weight: w,
                bias: None,
            };
            let mut recorder = gpu.recorder("in place");
            let r = &mut recorder;
            direct.ln_gelu_gemm(r, x, norm, weight, y).unwrap();
            recorder.submit().unwrap();
            down(y)
        };
        let expected = {
            let y = tensor(&gpu, &[n, n], DType::F32);
            run(&square(&data), &square(&weight_data), &y)
        };
        let x = square(&data);
        assert_eq!(run(&x, &square(&weight_data), &x), expected);
        let w = square(&weight_data);
        assert_eq!(run(&square(&data), &w, &w), expected);

        // Halves of one buffer.
        let layout = *x.layout();
        let bytes = layout.size_bytes();
        let at = bytes.next_multiple_of(energyflow::gpu::OFFSET_ALIGNMENT);
        let buffer = gpu.zeroed_buffer(at + bytes, "halves").unwrap();
        let [first, second] = [0, at].map(|at| {
            let slice = buffer.slice(at, bytes).unwrap();
            Tensor::from_slice(slice, layout).unwrap()
        });
        first.upload(&gpu, &data).unwrap();
        assert_eq!(run(&first, &square(&weight_data), &second), expected);
        assert_eq!(down(&first), data);
        // Two operands of one buffer are no conflict.
        first.upload(&gpu, &data).unwrap();
        second.upload(&gpu, &weight_data).unwrap();
        let y = tensor(&gpu, &[n, n], DType::F32);
        assert_eq!(run(&first, &second, &y), expected);
    }
}
