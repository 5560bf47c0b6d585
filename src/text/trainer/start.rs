//! The start of a student from its teacher: token table, blocks, head.

use nalgebra::{DMatrix, DVector};

use super::Trainer;
use super::objective::{self, Pass};
use crate::error::{Error, Result};
use crate::graph::Graph;
use crate::runtime::Host;
use crate::setters::setters;
use crate::text::{Batches, Dataset, TeacherTable};
use crate::types::DType;

/// How [`Trainer::start`] sets the initial values.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct StartOptions {
    /// Standard deviation of the token table. Steps of the optimizer are as large for any table, so that a table of a larger one keeps more of
    /// its start.
    pub deviation: f32,
    /// Factor on the initial weights of each block's last convolution, at least 0. With 0 a block passes its input on, so that the
    /// training begins with a static encoder.
    pub block_scale: f32,
    /// Strength of the regularisation of the head, as a share of the mean variance of its inputs, at least 0.
    pub ridge: f32,
    /// Number of texts that the head is solved on; if the dataset has more, its first ones.
    pub samples: usize,
}

impl Default for StartOptions {
    /// A deviation of 0.2, blocks that pass their input on, a ridge of 1e-3, 8192 texts.
    fn default() -> Self {
        Self {
            deviation: 0.2,
            block_scale: 0.0,
            ridge: 1e-3,
            samples: 8192,
        }
    }
}

impl StartOptions {
    setters! {
        deviation: f32,
        block_scale: f32,
        ridge: f32,
        samples: usize,
    }

    fn check(&self) -> Result<()> {
        let fail = |field, reason: String| Err(Error::Config { field, reason });
        if !(self.deviation.is_finite() && self.deviation > 0.0) {
            return fail(
                "deviation",
                format!("is {}, but must be positive", self.deviation),
            );
        }
        for (field, value) in [("block_scale", self.block_scale), ("ridge", self.ridge)] {
            if !(value.is_finite() && value >= 0.0) {
                return fail(field, format!("is {value}, but must be finite and >= 0"));
            }
        }
        match self.samples {
            0 => fail("samples", "must be at least 1".into()),
            _ => Ok(()),
        }
    }
}

impl Trainer {
    /// Gives the encoder a start from its teacher, before the first step.
    ///
    /// - The token table becomes the teacher's vectors of single tokens, reduced to the width of the encoder.
    /// - The last convolution of each block is scaled, and its bias becomes zero.
    /// - Attention pooling starts with equal weights.
    /// - The head is solved by ridge regression, so that the encoder's embeddings of the texts of `data` are nearest to the teacher's. A
    ///   [`tanh`](crate::text::EncoderOptions::tanh) after it is not taken into account.
    ///
    /// # Errors
    /// [`Error::Config`] without an encoder, for options out of range, and for a table or dataset that does not fit the encoder;
    /// [`Error::Data`] for a table whose vectors are all alike, and for texts that make the regression singular; table and blocks have changed
    /// then. [`Error::OutOfMemory`], [`Error::DeviceLost`].
    pub fn start(
        &mut self,
        table: &TeacherTable,
        data: &Dataset,
        options: &StartOptions,
    ) -> Result<()> {
        options.check()?;
        let fail = |field, reason: String| Err(Error::Config { field, reason });
        let Some(encoder) = self.model.encoder.clone() else {
            return fail("encoder", "is missing: this trainer has none".into());
        };
        if table.vocabulary() != encoder.vocabulary {
            let reason = format!(
                "is {}, but the teacher's table has {} tokens",
                encoder.vocabulary,
                table.vocabulary()
            );
            return fail("vocabulary", reason);
        }
        if data.width() != encoder.embedding {
            let reason = format!(
                "is {}, but the embeddings of {} have {} values",
                encoder.embedding,
                data.path().display(),
                data.width()
            );
            return fail("embedding", reason);
        }
        let values = table.initial(encoder.width, options.deviation)?;
        self.session.set("embedding.weight", &values)?;
        let names: Vec<String> = self
            .session
            .parameters()
            .map(|(name, _)| name.to_owned())
            .collect();
        for name in names {
            let of_block = name.starts_with("blocks.");
            let scale = match &*name {
                "pooling.weight" => 0.0,
                name if of_block && name.ends_with(".conv2.weight") => options.block_scale,
                name if of_block && name.ends_with(".conv2.bias") => 0.0,
                _ => continue,
            };
            let mut values = self.session.get(&name)?;
            values.iter_mut().for_each(|value| *value *= scale);
            self.session.set(&name, &values)?;
        }
        let (weight, bias) = self.solve_head(data, options)?;
        self.session.set("projection.weight", &weight)?;
        self.session.set("projection.bias", &bias)
    }

    /// Weight [E, W] and bias `[E]` of the head for the present network before it.
    fn solve_head(
        &mut self,
        data: &Dataset,
        options: &StartOptions,
    ) -> Result<(Vec<f32>, Vec<f32>)> {
        let size = self.options.batch;
        let [length, width] = self.sizes();
        let mut graph = Graph::new();
        let pass = Pass::evaluate(size, DType::F32);
        let inputs = objective::features(&mut graph, &self.model, pass)?;
        let features = self.session.compile(&graph)?;
        let data = data.take(options.samples);
        let mut batches = Batches::evaluation(data, size, length)?.padding(self.padding());
        let mut normal = Normal::new(inputs, width);
        while let Some(batch) = batches.next_batch()? {
            let hosts = [
                ("ids", Host::from(&batch.ids)),
                ("mask", Host::from(&batch.mask)),
            ];
            let x = features.run(&hosts)?.wait()?.get("features")?;
            let rows = batch.valid;
            normal.add(&x[..rows * inputs], &batch.targets[..rows * width]);
        }
        drop(features);
        self.session.forget(&graph);
        normal.solve(f64::from(options.ridge))
    }
}

/// The normal equations of a linear regression with a bias, in f64.
struct Normal {
    count: f64,
    /// Σ x xᵀ
    squares: DMatrix<f64>,
    /// Σ x yᵀ
    products: DMatrix<f64>,
    sum_x: DVector<f64>,
    sum_y: DVector<f64>,
}

impl Normal {
    fn new(inputs: usize, outputs: usize) -> Self {
        Self {
            count: 0.0,
            squares: DMatrix::zeros(inputs, inputs),
            products: DMatrix::zeros(inputs, outputs),
            sum_x: DVector::zeros(inputs),
            sum_y: DVector::zeros(outputs),
        }
    }

    /// Adds rows of x and y.
    fn add(&mut self, x: &[f32], y: &[f32]) {
        let columns = |values: &[f32], width: usize| {
            let wide = values.iter().map(|&value| f64::from(value));
            DMatrix::from_iterator(width, values.len() / width, wide)
        };
        let x = columns(x, self.sum_x.len());
        let y = columns(y, self.sum_y.len());
        self.count += x.ncols() as f64;
        self.squares.gemm(1.0, &x, &x.transpose(), 1.0);
        self.products.gemm(1.0, &x, &y.transpose(), 1.0);
        self.sum_x += x.column_sum();
        self.sum_y += y.column_sum();
    }

    /// Weight [outputs, inputs] row by row, and bias.
    fn solve(mut self, ridge: f64) -> Result<(Vec<f32>, Vec<f32>)> {
        let mean_x = self.sum_x / self.count;
        let mean_y = self.sum_y / self.count;
        self.squares.ger(-self.count, &mean_x, &mean_x, 1.0);
        self.products.ger(-self.count, &mean_x, &mean_y, 1.0);
        let inputs = mean_x.len();
        let shift = ridge * self.squares.trace() / inputs as f64;
        for i in 0..inputs {
            self.squares[(i, i)] += shift;
        }
        let singular = || Error::Data {
            name: "start".into(),
            reason: format!(
                "the regression of the head is singular: its {inputs} inputs depend on each other over {} texts; use more texts or a larger ridge",
                self.count
            ),
        };
        let diagonal = self.squares.diagonal();
        let factors = self.squares.cholesky().ok_or_else(singular)?;
        // What rounding leaves of a zero.
        let pivots = factors.l_dirty().diagonal();
        if pivots
            .iter()
            .zip(&diagonal)
            .any(|(pivot, &whole)| pivot * pivot <= 1e-12 * whole)
        {
            return Err(singular());
        }
        // Column by column, which is row by row of the transpose.
        let weight = factors.solve(&self.products);
        let bias = mean_y - weight.tr_mul(&mean_x);
        let narrow = |values: &[f64]| values.iter().map(|&value| value as f32).collect::<Vec<_>>();
        let (weight, bias) = (narrow(weight.as_slice()), narrow(bias.as_slice()));
        match weight.iter().chain(&bias).all(|value| value.is_finite()) {
            true => Ok((weight, bias)),
            false => Err(Error::Data {
                name: "start".into(),
                reason: "the regression of the head has no finite solution; use a larger ridge"
                    .into(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// y = A·x + b comes back.
    #[test]
    fn a_linear_map_is_found() {
        let a = [[1.0_f32, -2.0, 0.5], [0.0, 3.0, -1.0]];
        let b = [0.25_f32, -4.0];
        let mut normal = Normal::new(3, 2);
        for part in 0..4 {
            let x: Vec<f32> = (0..15)
                .map(|i| (((part * 15 + i) * 7919) % 101) as f32 / 50.0 - 1.0)
                .collect();
            let y: Vec<f32> = x
                .chunks(3)
                .flat_map(|x| {
                    [0, 1].map(|e| b[e] + a[e].iter().zip(x).map(|(a, x)| a * x).sum::<f32>())
                })
                .collect();
            normal.add(&x, &y);
        }
        let (weight, bias) = normal.solve(0.0).unwrap();
        let close = |found: &[f32], wanted: &[f32]| {
            found.iter().zip(wanted).all(|(a, b)| (a - b).abs() < 1e-5)
        };
        assert!(close(&weight, a.as_flattened()), "{weight:?}");
        assert!(close(&bias, &b), "{bias:?}");
    }

    #[test]
    fn a_singular_regression_is_an_error_unless_regularised() {
        let normal = || {
            let mut normal = Normal::new(2, 1);
            normal.add(&[1.0, 2.0, 2.0, 4.0, 3.0, 6.0], &[1.0, 2.0, 3.0]);
            normal
        };
        assert!(
            normal()
                .solve(0.0)
                .unwrap_err()
                .to_string()
                .contains("ridge")
        );
        let (weight, bias) = normal().solve(1e-6).unwrap();
        assert!((weight[0] + 2.0 * weight[1] - 1.0).abs() < 1e-3 && bias[0].abs() < 1e-3);
    }
}
