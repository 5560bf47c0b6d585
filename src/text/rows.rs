//! A matrix of floats in a file, read row by row.

use safetensors::Dtype;

use super::decode::At;
use super::sample::MAX_SAMPLE;
use crate::error::Result;
use crate::file::{InputFile, floats};

/// Bytes that are read at once while a matrix is checked; a multiple of every element's size.
const WINDOW: u64 = 1 << 18;

/// Where a matrix `[rows, width]` lies in a file, row by row without gaps. It is in the file as a whole.
#[derive(Clone, Debug)]
pub(super) struct Rows {
    /// Offset of the first byte.
    pub start: u64,
    pub rows: usize,
    pub width: usize,
    /// F16, BF16, F32, F64, or I8 with scales.
    pub dtype: Dtype,
    /// Offset of one f32 per row, by which its values are multiplied.
    pub scales: Option<u64>,
}

impl Rows {
    fn row_bytes(&self) -> u64 {
        self.width as u64 * (self.dtype.bitsize() / 8) as u64
    }

    /// Checks that all values are finite.
    pub fn check(&self, file: &InputFile) -> Result<()> {
        if self.row_bytes() > MAX_SAMPLE {
            let bytes = self.row_bytes();
            let reason = format!("a row has {bytes} bytes; at most {MAX_SAMPLE} are read");
            return Err(file.fail(self.start, reason));
        }
        let (mut bytes, mut values) = (Vec::new(), Vec::new());
        // Rows lie in the file, so that no product overflows.
        let end = self.start + self.row_bytes() * self.rows as u64;
        let mut offset = self.start;
        while self.dtype != Dtype::I8 && offset < end {
            let length = WINDOW.min(end - offset);
            file.resize(offset, length, "embeddings", &mut bytes)?;
            file.read_at(offset, &mut bytes, "embeddings")?;
            At { file, offset }.target(&bytes, self.dtype, &mut values)?;
            offset += length;
        }
        if let Some(start) = self.scales {
            let mut scales = Vec::new();
            for first in (0..self.rows).step_by(WINDOW as usize / 4) {
                let (offset, count) = (start + 4 * first as u64, self.rows - first);
                file.resize(offset, WINDOW.min(4 * count as u64), "scales", &mut bytes)?;
                file.read_at(offset, &mut bytes, "scales")?;
                scales.clear();
                scales.extend(floats(&bytes));
                for (row, scale) in (first..).zip(&scales) {
                    // Integers are finite, but not always what a scale makes of them.
                    if !(*scale >= 0.0 && (scale * 128.0).is_finite()) {
                        self.read(file, row, &mut bytes, &mut values)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Reads row number `row`, which exists.
    pub fn read(
        &self,
        file: &InputFile,
        row: usize,
        bytes: &mut Vec<u8>,
        values: &mut Vec<f32>,
    ) -> Result<()> {
        let offset = self.start + self.row_bytes() * row as u64;
        file.resize(offset, self.row_bytes(), "embeddings", bytes)?;
        file.read_at(offset, bytes, "embeddings")?;
        At { file, offset }.target(bytes, self.dtype, values)?;
        if let Some(start) = self.scales {
            let scale = self.scale(file, start, row)?;
            for value in values {
                *value *= scale;
                if !value.is_finite() {
                    let reason = format!("row {row}: the scale {scale} makes a value infinite");
                    return Err(file.fail(start + 4 * row as u64, reason));
                }
            }
        }
        Ok(())
    }

    fn scale(&self, file: &InputFile, start: u64, row: usize) -> Result<f32> {
        let offset = start + 4 * row as u64;
        let mut bytes = [0; 4];
        file.read_at(offset, &mut bytes, "a scale")?;
        let scale = f32::from_le_bytes(bytes);
        match scale.is_finite() && scale >= 0.0 {
            true => Ok(scale),
            false => Err(file.fail(offset, format!("the scale of row {row} is {scale}"))),
        }
    }
}
