//! Products that gather windows, by every tile.

use super::*;
use crate::kernels::gemm_windows::Role;
use crate::types::{Padding, Window};

pub(super) const ROLES: [Role; 3] = [Role::Forward, Role::Input, Role::Weight];

#[derive(Clone, Copy, Debug)]
pub(super) struct Convolution {
    pub role: Role,
    pub window: Window,
    pub samples: usize,
    pub channels: usize,
    pub outputs: usize,
}

impl Convolution {
    pub fn gemm(&self, dtype: DType, target: Target) -> Result<(Gemm, usize)> {
        let Self {
            window,
            samples,
            channels,
            outputs,
            ..
        } = *self;
        let columns = window.kernel * channels;
        let x = matrix(samples * window.time, channels, dtype)?;
        let dy = matrix(samples * window.steps, outputs, dtype)?;
        let weight = matrix(outputs, columns, dtype)?;
        let width = |n: usize| n.div_ceil(16) * 4;
        Ok(match self.role {
            Role::Forward => (
                Gemm::conv(window, [x, weight], width(outputs), target),
                outputs,
            ),
            Role::Input => (
                Gemm::conv_grad_input(window, [dy, weight], width(channels), target),
                channels,
            ),
            Role::Weight => (
                Gemm::conv_grad_weight(window, [dy, x], width(columns), target),
                columns,
            ),
        })
    }

    pub fn expected(&self, a: &[f32], b: &[f32]) -> Vec<f32> {
        let Self {
            role,
            window,
            samples,
            channels,
            outputs,
        } = *self;
        let columns = window.kernel * channels;
        let mut result = match role {
            Role::Forward => vec![0.0; samples * window.steps * outputs],
            Role::Input => vec![0.0; samples * window.time * channels],
            Role::Weight => vec![0.0; outputs * columns],
        };
        for row in 0..samples * window.steps {
            for tap in 0..window.kernel {
                let place = row % window.steps * window.stride + tap * window.dilation;
                if place < window.before || place - window.before >= window.time {
                    continue;
                }
                let source = row / window.steps * window.time + place - window.before;
                for h in 0..outputs {
                    for c in 0..channels {
                        let (y, x) = (row * outputs + h, source * channels + c);
                        let w = h * columns + tap * channels + c;
                        match role {
                            Role::Forward => result[y] += a[x] * b[w],
                            Role::Input => result[x] += a[y] * b[w],
                            Role::Weight => result[w] += a[y] * b[x],
                        }
                    }
                }
            }
        }
        result
    }

    fn check(&self, gpu: &Gpu, dtype: DType, choice: Choice) -> Result<()> {
        let (gemm, n) = self.gemm(dtype, Target::new(gpu.capabilities()))?;
        let gemm = Gemm { choice, ..gemm };
        let (x, y) = (
            integers(gemm.operands.a.len(), 3),
            integers(gemm.operands.b.len(), 5),
        );
        let got = compute(gpu, gemm, n, [&x, &y])?;
        assert_same(&got, &self.expected(&x, &y), || {
            format!("{self:?} {dtype} by {choice}")
        });
        Ok(())
    }
}

/// Taps that fill a tile and such that do not, parts of K; every kind of window.
pub(super) fn convolutions(role: Role) -> Result<Vec<(Convolution, usize)>> {
    let causal = Window::causal(16, 3, 2)?;
    let same = Window::new(7, 4, 3, 1, Padding::Same)?;
    let strided = Window::new(29, 5, 3, 2, Padding::Causal)?;
    let long = Window::causal(67, 8, 1)?;
    let extents = [
        (causal, 7, 32, 36, 1),
        (same, 10, 20, 68, 1),
        (strided, 3, 12, 8, 1),
        (long, 2, 32, 32, 3),
    ];
    Ok(extents
        .into_iter()
        .map(|(window, samples, channels, outputs, splits)| {
            let convolution = Convolution {
                role,
                window,
                samples,
                channels,
                outputs,
            };
            (convolution, splits)
        })
        .collect())
}

/// Few enough for a kernel without tiles: one short text, and several whose taps reach before their start.
pub(super) fn few_rows() -> Result<[Convolution; 3]> {
    let forward = |window, samples, channels, outputs| Convolution {
        role: Role::Forward,
        window,
        samples,
        channels,
        outputs,
    };
    Ok([
        forward(Window::causal(8, 5, 2)?, 1, 16, 12),
        forward(Window::causal(16, 3, 8)?, 2, 20, 5),
        forward(Window::new(7, 4, 3, 1, Padding::Same)?, 1, 4, 33),
    ])
}

/// One kernel for each way in which the text differs.
pub(super) fn kernels(dtype: DType, target: Target, tier: Tier) -> Vec<Kernel> {
    let mut kernels = Vec::new();
    for role in ROLES {
        for (convolution, splits) in convolutions(role).unwrap() {
            if !fits(tier, role, dtype) {
                continue;
            }
            let (gemm, n) = convolution.gemm(dtype, target).unwrap();
            let gemm = Gemm {
                choice: Choice { tier, splits },
                ..gemm
            };
            let layout = matrix(splits * gemm.operands.m, n, DType::F32).unwrap();
            kernels.push(gemm.partial(layout));
        }
    }
    kernels
}

/// Not every tile takes every orientation.
pub(super) fn fits(tier: Tier, role: Role, dtype: DType) -> bool {
    let trans = match role {
        Role::Forward => Trans::NT,
        Role::Input => Trans::NN,
        Role::Weight => Trans::TN,
    };
    match tier {
        Tier::Cooperative(tile, units) => {
            cooperative::tiles(trans, dtype, units).any(|other| other == tile)
        }
        _ => true,
    }
}

fn every_convolution(gpu: &Gpu, dtype: DType, tier: Tier) -> Result<()> {
    for role in ROLES {
        if fits(tier, role, dtype) {
            for (convolution, splits) in convolutions(role)? {
                convolution.check(gpu, dtype, Choice { tier, splits })?;
            }
        }
    }
    Ok(())
}

#[test]
fn every_vector_tile_gathers() -> Result<()> {
    let gpu = Gpu::new(&GpuOptions::from_env()?.cooperative(false))?;
    for (i, tile) in TILES.into_iter().enumerate() {
        every_convolution(&gpu, DTYPES[i % 2], Tier::Tiled(tile))?;
    }
    for dtype in DTYPES {
        every_convolution(&gpu, dtype, Tier::Direct)?;
        for convolution in few_rows()? {
            let choice = Choice {
                tier: Tier::Skinny,
                splits: 1,
            };
            convolution.check(&gpu, dtype, choice)?;
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs matrix units"]
fn every_tile_of_the_matrix_units_gathers() -> Result<()> {
    let gpu = Gpu::new(&GpuOptions::from_env()?.cooperative(true))?;
    let units = gpu.capabilities().matrix_units;
    let units = units.expect("the test needs an adapter with matrix units");
    for dtype in DTYPES {
        for tile in cooperative::tiles(Trans::NN, dtype, units) {
            every_convolution(&gpu, dtype, Tier::Cooperative(tile, units))?;
        }
    }
    Ok(())
}
