//! Every kernel and every way to cut a product, whatever the model would choose, at shapes around its tile. Operands are small
//! integers: all sums are exact, whatever their order, and must be equal.

mod checked;
mod windows;

use super::*;
use crate::error::{Error, Result};
use crate::gpu::{Access, Alignment, BufferSlice, Gpu, GpuOptions, Recorder, Tensor};
use crate::types::DType;

const DTYPES: [DType; 2] = [DType::F32, DType::F16];
const ORIENTATIONS: [Trans; 3] = [Trans::NN, Trans::NT, Trans::TN];

fn matrix(rows: usize, cols: usize, dtype: DType) -> Result<Layout> {
    Layout::new(rows, cols, dtype, Alignment::Bytes64)
}

fn integers(n: usize, seed: usize) -> Vec<f32> {
    (0..n)
        .map(|i| ((i * i + seed * i + seed) % 7) as f32 - 3.0)
        .collect()
}

struct Product {
    trans: Trans,
    batch: usize,
    m: usize,
    n: usize,
    k: usize,
}

impl Product {
    fn layouts(&self, dtype: DType) -> Result<[Layout; 2]> {
        let Self {
            trans,
            batch,
            m,
            n,
            k,
        } = *self;
        let (a, b) = match trans {
            Trans::NN => ((m, k), (k, n)),
            Trans::NT => ((m, k), (n, k)),
            Trans::TN => ((k, m), (k, n)),
        };
        Ok([
            matrix(batch * a.0, a.1, dtype)?,
            matrix(batch * b.0, b.1, dtype)?,
        ])
    }

    fn expected(&self, a: &[f32], b: &[f32]) -> Vec<f32> {
        let Self { m, n, k, .. } = *self;
        let element = |z: usize, i: usize, j: usize| -> f32 {
            let (a, b) = (&a[z * m * k..], &b[z * k * n..]);
            (0..k)
                .map(|l| {
                    let x = match self.trans {
                        Trans::TN => a[l * m + i],
                        Trans::NN | Trans::NT => a[i * k + l],
                    };
                    let y = match self.trans {
                        Trans::NT => b[j * k + l],
                        Trans::NN | Trans::TN => b[l * n + j],
                    };
                    x * y
                })
                .sum()
        };
        (0..self.batch * m * n)
            .map(|at| element(at / (m * n), at / n % m, at % n))
            .collect()
    }

    /// Computes the product by `choice` and compares.
    fn check(&self, gpu: &Gpu, dtype: DType, choice: Choice) -> Result<()> {
        let [a, b] = self.layouts(dtype)?;
        let gemm = Gemm {
            operands: Operands {
                a,
                b,
                trans: self.trans,
                batch: self.batch,
                m: self.m,
                k: self.k,
                windows: None,
            },
            target: Target::new(gpu.capabilities()),
            choice,
        };
        let (x, y) = (integers(a.len(), 3), integers(b.len(), 5));
        let got = compute(gpu, gemm, self.n, [&x, &y])?;
        let expected = self.expected(&x, &y);
        assert_same(&got, &expected, || {
            format!(
                "{:?} {}x{}x{}x{} {dtype} by {choice}",
                self.trans, self.batch, self.m, self.n, self.k
            )
        });
        Ok(())
    }
}

fn assert_same(got: &[f32], expected: &[f32], what: impl FnOnce() -> String) {
    assert_eq!(got.len(), expected.len());
    if let Some(i) = got.iter().zip(expected).position(|(a, b)| a != b) {
        panic!("element {i} is {}, not {}: {}", got[i], expected[i], what());
    }
}

/// The product of `n` columns.
fn compute(gpu: &Gpu, gemm: Gemm, n: usize, [x, y]: [&[f32]; 2]) -> Result<Vec<f32>> {
    let Operands { a, b, m, batch, .. } = gemm.operands;
    let c = matrix(batch * m, n, DType::F32)?;
    let [a, b] = [(a, x), (b, y)].map(|(layout, data)| {
        let tensor = Tensor::zeroed(gpu, layout)?;
        tensor.upload(gpu, data)?;
        Ok::<_, Error>(tensor)
    });
    let (a, b, c) = (a?, b?, Tensor::uninit(gpu, c)?);
    c.poison(gpu)?;
    let program = |layout: Layout| Program {
        rows: layout.rows(),
        cols: layout.cols(),
        operands: Vec::new(),
        instructions: vec![Instruction::Sum],
        results: vec![(0, layout)],
    };
    let slices = |tensors: &[&Tensor]| -> Vec<BufferSlice> {
        tensors
            .iter()
            .map(|tensor| tensor.slice().clone())
            .collect()
    };
    let mut recorder = gpu.recorder("product");
    if gemm.splits() == 1 {
        let kernel = gemm.single(program(*c.layout()));
        dispatch(gpu, &mut recorder, &kernel, &slices(&[&a, &b, &c]))?;
    } else {
        let partial = matrix(gemm.splits() * batch * m, n, DType::F32)?;
        let parts = Tensor::uninit(gpu, partial)?;
        parts.poison(gpu)?;
        let kernel = gemm.partial(partial);
        dispatch(gpu, &mut recorder, &kernel, &slices(&[&a, &b, &parts]))?;
        let kernel = gemm.add_up(partial, program(*c.layout()));
        dispatch(gpu, &mut recorder, &kernel, &slices(&[&parts, &c]))?;
    }
    recorder.submit()?;
    c.download(gpu)?.wait()
}

fn dispatch(
    gpu: &Gpu,
    recorder: &mut Recorder,
    kernel: &Kernel,
    slices: &[BufferSlice],
) -> Result<()> {
    let target = Target::new(gpu.capabilities());
    let bindings = kernel.bindings();
    assert_eq!(bindings.len(), slices.len());
    assert_eq!(bindings.last().map(|b| b.access), Some(Access::ReadWrite));
    let pipeline = gpu.trusted_pipeline(&kernel.key(target), || kernel.source(target))?;
    let group = gpu.bind_group(&pipeline, slices)?;
    recorder.dispatch(&pipeline, &group, kernel.workgroups())
}

/// Shapes around a tile, with odd and even numbers of steps, whole and not.
fn around(gpu: &Gpu, speed: Speed, dtype: DType, trans: Trans, tier: Tier) -> Result<()> {
    let Speed {
        rows, cols, depth, ..
    } = speed;
    for (batch, m, n, k, splits) in [
        (1, rows, cols, 2 * depth, 1),
        (1, rows + 1, cols - 1, 3 * depth - 1, 1),
        (1, rows - 1, cols + 1, depth + 1, 1),
        (1, 5, 3, 1, 1),
        (1, rows + 3, cols + 2, 7 * depth + 5, 3),
        (2, rows - 2, cols + 6, 2 * depth + 3, 1),
        (3, 5, 6, 7 * depth + 5, 3),
    ] {
        // Matrix units take parts of one product only.
        if batch > 1 && splits > 1 && matches!(tier, Tier::Cooperative(..)) {
            continue;
        }
        let product = Product {
            trans,
            batch,
            m,
            n,
            k,
        };
        product.check(gpu, dtype, Choice { tier, splits })?;
    }
    Ok(())
}

fn tiled(dtype: DType) -> Result<()> {
    let gpu = Gpu::new(&GpuOptions::from_env()?.cooperative(false))?;
    for tile in TILES {
        for trans in ORIENTATIONS {
            around(&gpu, tile.speed(), dtype, trans, Tier::Tiled(tile))?;
        }
    }
    Ok(())
}

#[test]
fn every_tile_f32() -> Result<()> {
    tiled(DType::F32)
}

#[test]
fn every_tile_f16() -> Result<()> {
    tiled(DType::F16)
}

#[test]
fn without_workgroup_memory() -> Result<()> {
    let gpu = Gpu::new(&GpuOptions::from_env()?.cooperative(false))?;
    for dtype in DTYPES {
        for trans in ORIENTATIONS {
            for (batch, m, n, k, splits) in [
                (1, 17, 7, 5, 1),
                (1, 1, 1, 1, 1),
                (3, 15, 9, 8, 1),
                (1, 17, 7, 1037, 3),
                (2, 3, 5, 22, 2),
            ] {
                let product = Product {
                    trans,
                    batch,
                    m,
                    n,
                    k,
                };
                let tier = Tier::Direct;
                product.check(&gpu, dtype, Choice { tier, splits })?;
            }
        }
    }
    Ok(())
}

/// What the built-in model would like, a baseline device cannot bind; parts that a long K needs are taken as far as they fit.
#[test]
fn parts_fit_a_binding() -> Result<()> {
    const BASELINE: u64 = 128 << 20;
    let target = |barrier_free, cores| Target {
        f16: true,
        barrier_free,
        matrix_units: None,
        invocations: 256,
        cores,
    };
    for (trans, m, n, k, most) in [
        (Trans::TN, 30_522, 768, 4096, BASELINE),
        (Trans::NT, 30_522, 768, 4096, BASELINE),
        (Trans::TN, 512, 512, 1 << 20, BASELINE),
        (Trans::NN, 9, 5, 300_000, BASELINE),
        (Trans::NN, 9, 5, 300_000, 1024),
        (Trans::TN, 64, 64, 1 << 16, 1 << 14),
    ] {
        let product = Product {
            trans,
            batch: 1,
            m,
            n,
            k,
        };
        for target in [target(false, 132), target(false, 2), target(true, 2)] {
            let [a, b] = product.layouts(DType::F32)?;
            let c = matrix(m, n, DType::F32)?;
            let gemm = Gemm::new(a, b, trans, c.row_stride() / 4, target);
            let program = Program {
                rows: m,
                cols: n,
                operands: Vec::new(),
                instructions: vec![Instruction::Sum],
                results: vec![(0, c)],
            };
            let candidates = gemm.candidates(&program, most);
            assert!(!candidates.is_empty());
            for candidate in candidates {
                let parts = candidate.splits();
                let bytes = parts as u64 * c.size_bytes();
                assert!(
                    parts == 1 || bytes <= most,
                    "{trans:?} {m}x{n}x{k}: {candidate}"
                );
                let needed = k.div_ceil(PART) as u64 * c.size_bytes();
                assert!(
                    needed > most || k / parts <= PART,
                    "{trans:?} {m}x{n}x{k}: {candidate}"
                );
            }
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs matrix units"]
fn every_tile_of_the_matrix_units() -> Result<()> {
    let gpu = Gpu::new(&GpuOptions::from_env()?.cooperative(true))?;
    let units = gpu.capabilities().matrix_units;
    let units = units.expect("the test needs an adapter with matrix units");
    let mut tried = 0;
    for dtype in DTYPES {
        for trans in ORIENTATIONS {
            for tile in cooperative::tiles(trans, dtype, units) {
                let tier = Tier::Cooperative(tile, units);
                around(&gpu, tile.speed(), dtype, trans, tier)?;
                tried += 1;
            }
        }
    }
    assert!(tried >= 6, "{tried} tiles");
    Ok(())
}

/// Matrix units add up without blocks: parts of K are short, or, in f32, another kernel with blocks takes the product.
#[test]
fn parts_on_matrix_units_are_short() -> Result<()> {
    let units = translation::units(8, 32, true);
    let target = translation::target(true, Some(units));
    for (dtype, longest) in [(DType::F32, FLUSHED), (DType::F16, 1 << 16)] {
        for (k, most) in [
            (longest, 0),
            (longest + 1, 1 << 20),
            (300_000, 1 << 20),
            (300_000, 0),
        ] {
            for batch in [1, 2] {
                let product = Product {
                    trans: Trans::NN,
                    batch,
                    m: 9,
                    n: 5,
                    k,
                };
                let [a, b] = product.layouts(dtype)?;
                let c = matrix(batch * 9, 5, DType::F32)?;
                let program = Program {
                    rows: batch * 9,
                    cols: 5,
                    operands: Vec::new(),
                    instructions: vec![Instruction::Sum],
                    results: vec![(0, c)],
                };
                let gemm = Gemm::batched(batch, [a, b], Trans::NN, c.row_stride() / 4, target);
                for candidate in gemm.candidates(&program, most) {
                    let on_units = matches!(candidate.choice.tier, Tier::Cooperative(..));
                    let fits = k == longest || (batch == 1 && most > 0);
                    assert_eq!(on_units, fits, "{dtype} {batch} {k} {most}: {candidate}");
                    // Whole steps of 32.
                    let part = k.div_ceil(candidate.splits());
                    assert!(!on_units || part <= longest + 32, "{candidate}");
                }
            }
        }
    }
    Ok(())
}

/// Metal, Direct3D and Vulkan get every tile of every tier, also those that no device here chooses.
pub(in crate::kernels) mod translation {
    use super::*;
    use crate::gpu::MatrixUnits;
    use crate::translate::{self, Translated};

    pub(in crate::kernels) fn translate(
        kernel: &Kernel,
        target: Target,
        direct3d: bool,
    ) -> Translated {
        let key = kernel.key(target);
        let source = kernel.source(target).unwrap();
        // In SPIR-V it orders no workgroup memory.
        let text = &source.wgsl;
        assert!(!text.contains("subgroupBarrier"), "{key}:\n{text}");
        translate::everywhere(text, direct3d).unwrap_or_else(|error| panic!("{key}: {error}"))
    }

    /// A kernel for each way in which the text differs: whole and not, split, of a batch.
    fn kernels(speed: Speed, dtype: DType, target: Target, tier: Tier) -> Vec<Kernel> {
        let Speed {
            rows, cols, depth, ..
        } = speed;
        let mut kernels = Vec::new();
        for trans in ORIENTATIONS {
            for (batch, m, n, k, splits) in [
                (1, rows, cols, 4 * depth, 1),
                (1, rows + 1, cols + 1, 3 * depth + 1, 1),
                (1, rows, cols, 8 * depth + 3, 3),
                (2, rows - 1, cols, depth, 1),
            ] {
                let product = Product {
                    trans,
                    batch,
                    m,
                    n,
                    k,
                };
                let [a, b] = product.layouts(dtype).unwrap();
                let operands = Operands {
                    a,
                    b,
                    trans,
                    batch,
                    m,
                    k,
                    windows: None,
                };
                let choice = Choice { tier, splits };
                let gemm = Gemm {
                    operands,
                    target,
                    choice,
                };
                let layout = matrix(batch.max(splits) * m, n, DType::F32).unwrap();
                kernels.push(gemm.partial(layout));
            }
        }
        kernels.extend(windows::kernels(dtype, target, tier));
        kernels
    }

    pub(in crate::kernels) fn target(f16: bool, matrix_units: Option<MatrixUnits>) -> Target {
        Target {
            f16,
            barrier_free: false,
            matrix_units,
            invocations: 256,
            cores: 132,
        }
    }

    #[test]
    fn every_vector_tile() {
        for tile in TILES {
            for (dtype, f16) in [(DType::F32, true), (DType::F16, true), (DType::F16, false)] {
                let target = target(f16, None);
                for kernel in kernels(tile.speed(), dtype, target, Tier::Tiled(tile)) {
                    translate(&kernel, target, true);
                }
            }
        }
    }

    pub(in crate::kernels) fn units(size: usize, lanes: usize, scalar: bool) -> MatrixUnits {
        MatrixUnits {
            size,
            lanes,
            f16: true,
            f32: scalar,
            scalar,
            storage: if scalar { 32 << 10 } else { 48 << 10 },
            invocations: 256,
        }
    }

    fn cooperative_kernels(units: MatrixUnits, dtype: DType) -> Vec<Kernel> {
        let target = target(true, Some(units));
        let mut all = Vec::new();
        for trans in ORIENTATIONS {
            for tile in cooperative::tiles(trans, dtype, units) {
                let tier = Tier::Cooperative(tile, units);
                all.extend(kernels(tile.speed(), dtype, target, tier));
            }
        }
        assert!(!all.is_empty(), "{units} {dtype}");
        all
    }

    #[test]
    fn every_tile_of_matrix_units_on_vulkan() {
        for (size, lanes) in [(16, 32), (8, 8), (8, 32)] {
            let units = units(size, lanes, false);
            for kernel in cooperative_kernels(units, DType::F16) {
                let spirv = translate(&kernel, target(true, Some(units)), false).spirv;
                // OpCapability CooperativeMatrixKHR
                assert!(spirv.contains(&6022));
            }
        }
    }

    #[test]
    fn every_tile_of_matrix_units_on_metal() {
        let units = units(8, 32, true);
        for dtype in DTYPES {
            for kernel in cooperative_kernels(units, dtype) {
                let metal = translate(&kernel, target(true, Some(units)), false)
                    .metal
                    .text;
                let operand = match dtype {
                    DType::F16 => "simdgroup_half8x8",
                    _ => "simdgroup_float8x8",
                };
                for text in [
                    operand,
                    "simdgroup_float8x8",
                    "simdgroup_load",
                    "simdgroup_store",
                    "simdgroup_multiply_accumulate",
                ] {
                    assert!(metal.contains(text), "{text}\n{metal}");
                }
            }
        }
    }
}
