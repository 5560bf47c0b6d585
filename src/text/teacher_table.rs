//! The teacher's own vectors of single tokens, from which a student's token table starts.

use std::borrow::Cow;
use std::path::Path;

use nalgebra::{DMatrix, SymmetricEigen};
use safetensors::Dtype;

use super::dataset_writer::EmbeddingType;
use super::npy::encode;
use super::records::Embeddings;
use super::sample::OpenOptions;
use crate::error::{Error, Result};
use crate::file::{AtomicFile, TensorOut, quantize, write_tensors};
use crate::types::DType;

const FORMAT: &str = "table";
const VERSION: u32 = 1;

/// Rows that are multiplied at once.
const ROWS: usize = 1024;

/// One vector per token of the vocabulary: the teacher's output for a text of this token alone. A student whose token table
/// [starts](super::Trainer::start) from it needs far fewer texts than one that starts at random.
///
/// ```no_run
/// use energyflow::text::{EmbeddingType, TeacherTable};
///
/// # fn main() -> energyflow::Result<()> {
/// let table = TeacherTable::load("teacher.npy")?;
/// table.reduced(128)?.save("table.safetensors", EmbeddingType::Int8)?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct TeacherTable {
    width: usize,
    /// Row by row.
    values: Vec<f32>,
}

impl TeacherTable {
    /// A table of rows of `width` values, one row per token id.
    ///
    /// # Errors
    /// [`Error::Data`] for a width of zero, no rows, values that are no whole rows, NaN or infinity.
    pub fn new(width: usize, values: Vec<f32>) -> Result<Self> {
        let fail = |reason: String| {
            Err(Error::Data {
                name: "teacher table".into(),
                reason,
            })
        };
        if width == 0 || values.is_empty() || !values.len().is_multiple_of(width) {
            return fail(format!(
                "{} values are no rows of {width} values",
                values.len()
            ));
        }
        match values.iter().position(|value| !value.is_finite()) {
            Some(i) => fail(format!("value {i} is {}", values[i])),
            None => Ok(Self { width, values }),
        }
    }

    /// The table of a teacher with `vocabulary` tokens. `encode` is given the token ids of texts, `before`, the token and `after`, and
    /// returns one vector per text, one after the other: the mean of the teacher's output over the tokens, not divided by its norm.
    /// For BERT `before` is `[CLS]` and `after` `[SEP]`.
    ///
    /// # Errors
    /// Those of `encode`; as [`TeacherTable::new`].
    pub fn encode(
        vocabulary: u32,
        [before, after]: [u32; 2],
        mut encode: impl FnMut(&[[u32; 3]]) -> Result<Vec<f32>>,
    ) -> Result<Self> {
        let texts: Vec<[u32; 3]> = (0..vocabulary).map(|id| [before, id, after]).collect();
        let values = encode(&texts)?;
        Self::new(values.len() / texts.len().max(1), values)
    }

    /// Reads a table from an `.npy` file, or from a safetensors file with a tensor `embeddings` [V, E] and, if it has integers, `scales` `[V]`.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] for a malformed file, NaN or infinity.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let Embeddings { file, rows } =
            Embeddings::open(path.as_ref(), &OpenOptions::default().in_memory(u64::MAX))?;
        let mut values = Vec::new();
        let (mut bytes, mut row) = (Vec::new(), Vec::new());
        for number in 0..rows.rows {
            rows.read(&file, number, &mut bytes, &mut row)?;
            values.extend_from_slice(&row);
        }
        Self::new(rows.width, values)
    }

    /// Writes a safetensors file, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Data`] for a value that does not fit the type.
    pub fn save(&self, path: impl AsRef<Path>, kind: EmbeddingType) -> Result<()> {
        let tensor = |name: &str, dtype, shape, bytes| TensorOut {
            name: name.into(),
            dtype,
            shape,
            bytes: Cow::Owned(bytes),
        };
        let mut bytes = Vec::new();
        let mut scales = Vec::new();
        let mut row_bytes = Vec::new();
        for (number, row) in self.rows().enumerate() {
            let encoded = match kind {
                EmbeddingType::F32 => encode(row, DType::F32, &mut row_bytes),
                EmbeddingType::F16 => encode(row, DType::F16, &mut row_bytes),
                EmbeddingType::Int8 => {
                    let scale = quantize(row, &mut row_bytes);
                    scales.extend_from_slice(&scale.to_le_bytes());
                    Ok(())
                }
            };
            encoded.map_err(|reason| Error::Data {
                name: format!("row {number}"),
                reason,
            })?;
            bytes.extend_from_slice(&row_bytes);
        }
        let dtype = match kind {
            EmbeddingType::F32 => Dtype::F32,
            EmbeddingType::F16 => Dtype::F16,
            EmbeddingType::Int8 => Dtype::I8,
        };
        let shape = vec![self.vocabulary(), self.width];
        let mut tensors = vec![tensor("embeddings", dtype, shape, bytes)];
        if kind == EmbeddingType::Int8 {
            let shape = vec![self.vocabulary()];
            tensors.push(tensor("scales", Dtype::F32, shape, scales));
        }
        let file = AtomicFile::create(path.as_ref())?;
        write_tensors(file, (FORMAT, VERSION), &[], tensors)
    }

    /// Number of tokens, V.
    #[must_use]
    pub fn vocabulary(&self) -> usize {
        self.values.len() / self.width
    }

    /// Values per token.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    /// The vectors in the order of the token ids.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = &[f32]> {
        self.values.chunks_exact(self.width)
    }

    /// The vectors without their mean, in `width` directions in which they differ most, in falling order: principal component analysis
    /// (Hotelling, 1933). A table of this width already is only centred.
    ///
    /// # Errors
    /// [`Error::Config`] for a width of zero or above that of the table.
    pub fn reduced(&self, width: usize) -> Result<Self> {
        if width == 0 || width > self.width {
            return Err(Error::Config {
                field: "width",
                reason: format!(
                    "is {width}, but the teacher's vectors have {} values",
                    self.width
                ),
            });
        }
        let count = self.vocabulary() as f64;
        let mut mean = vec![0.0_f64; self.width];
        for row in self.rows() {
            for (mean, &value) in mean.iter_mut().zip(row) {
                *mean += f64::from(value) / count;
            }
        }
        let centred = |chunk: &[f32]| {
            let means = mean.iter().cycle();
            let values = chunk
                .iter()
                .zip(means)
                .map(|(&x, mean)| f64::from(x) - mean);
            DMatrix::from_iterator(self.width, chunk.len() / self.width, values)
        };
        let chunks = || self.values.chunks(ROWS * self.width);
        if width == self.width {
            let values = chunks().flat_map(|chunk| {
                let rows = centred(chunk);
                rows.iter().map(|&x| x as f32).collect::<Vec<_>>()
            });
            return Self::new(width, values.collect());
        }
        let mut covariance = DMatrix::zeros(self.width, self.width);
        for chunk in chunks() {
            let rows = centred(chunk);
            covariance.gemm(1.0 / count, &rows, &rows.transpose(), 1.0);
        }
        let eigen = SymmetricEigen::new(covariance);
        let mut order: Vec<usize> = (0..self.width).collect();
        order.sort_by(|&a, &b| eigen.eigenvalues[b].total_cmp(&eigen.eigenvalues[a]));
        let directions = order[..width].iter().map(|&i| {
            let direction = eigen.eigenvectors.column(i);
            // The sign is free. With this one the result does not depend on how it was found.
            let sign = direction[direction.iamax()].signum();
            direction * sign
        });
        let directions = DMatrix::from_columns(&directions.collect::<Vec<_>>()).transpose();
        let mut values = Vec::with_capacity(self.vocabulary() * width);
        for chunk in chunks() {
            let reduced = &directions * centred(chunk);
            values.extend(reduced.iter().map(|&x| x as f32));
        }
        Self::new(width, values)
    }

    /// Initial values of a student's token table [V, width], with this standard deviation: the [reduced](Self::reduced) vectors, or if the
    /// student is wider than the teacher, the teacher's vectors and zeros.
    ///
    /// # Errors
    /// As [`TeacherTable::reduced`]; [`Error::Data`] if all rows are equal.
    pub fn initial(&self, width: usize, deviation: f32) -> Result<Vec<f32>> {
        let reduced = self.reduced(width.min(self.width))?;
        let squares = reduced.values.iter().map(|&x| f64::from(x).powi(2));
        // Every column has the mean 0.
        let found = (squares.sum::<f64>() / reduced.values.len() as f64).sqrt();
        if found == 0.0 {
            return Err(Error::Data {
                name: "teacher table".into(),
                reason: "has the same vector for all tokens".into(),
            });
        }
        let scale = (f64::from(deviation) / found) as f32;
        let mut values = vec![0.0; self.vocabulary() * width];
        for (to, from) in values.chunks_exact_mut(width).zip(reduced.rows()) {
            for (to, from) in to.iter_mut().zip(from) {
                *to = from * scale;
            }
        }
        Ok(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Points around a line in three dimensions, off the origin.
    fn table() -> TeacherTable {
        let points = (0..50).flat_map(|i| {
            let t = i as f32 / 10.0 - 2.0;
            let off = 0.01 * ((i * 7) % 5) as f32;
            [1.0 + t, 2.0 - 2.0 * t + off, 3.0 + 2.0 * t + off]
        });
        TeacherTable::new(3, points.collect()).unwrap()
    }

    #[test]
    fn the_first_direction_is_that_of_the_line() {
        let reduced = table().reduced(1).unwrap();
        assert_eq!((reduced.vocabulary(), reduced.width()), (50, 1));
        let steps: Vec<f32> = reduced.values.windows(2).map(|w| w[1] - w[0]).collect();
        // 0.1 along (1, -2, 2), whose length is 3.
        assert!(
            steps.iter().all(|step| (step.abs() - 0.3).abs() < 0.01),
            "{steps:?}"
        );
        assert!(reduced.values.iter().sum::<f32>().abs() < 1e-4);
        // Distances stay when nothing is left out.
        let [whole, all] = [table(), table().reduced(3).unwrap()];
        for (a, b) in whole.values.chunks(3).zip(all.values.chunks(3)) {
            let difference = (a[0] - b[0]) - (whole.values[0] - all.values[0]);
            assert!(difference.abs() < 1e-5);
        }
        assert!(table().reduced(4).is_err() && table().reduced(0).is_err());
    }

    #[test]
    fn initial_values_have_the_deviation_and_the_width() {
        for width in [1, 3, 5] {
            let values = table().initial(width, 0.05).unwrap();
            assert_eq!(values.len(), 50 * width);
            let used = width.min(3);
            let sum: f32 = values.iter().map(|x| x * x).sum();
            let deviation = (sum / (50 * used) as f32).sqrt();
            assert!((deviation - 0.05).abs() < 1e-5, "{deviation}");
        }
        let same = TeacherTable::new(2, vec![1.0; 8]).unwrap();
        assert!(
            same.initial(2, 1.0)
                .unwrap_err()
                .to_string()
                .contains("same vector")
        );
    }

    #[test]
    fn a_table_comes_back_from_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table.safetensors");
        for (kind, error) in [
            (EmbeddingType::F32, 0.0),
            (EmbeddingType::F16, 1e-2),
            (EmbeddingType::Int8, 0.05),
        ] {
            table().save(&path, kind).unwrap();
            let back = TeacherTable::load(&path).unwrap();
            assert_eq!(back.width, 3);
            for (a, b) in back.values.iter().zip(&table().values) {
                assert!((a - b).abs() <= error, "{a} {b}");
            }
        }
        assert!(TeacherTable::new(2, vec![0.0; 3]).is_err());
        assert!(TeacherTable::new(1, vec![f32::NAN]).is_err());
    }

    #[test]
    fn every_token_is_a_text_of_its_own() {
        let mut seen = Vec::new();
        let table = TeacherTable::encode(3, [7, 8], |texts| {
            seen.extend_from_slice(texts);
            Ok(vec![0.5; 2 * texts.len()])
        });
        assert_eq!(seen, [[7, 0, 8], [7, 1, 8], [7, 2, 8]]);
        assert_eq!(table.unwrap().width(), 2);
    }
}
