//! `.npy`, the file format of NumPy arrays: matrices of floats, one row per embedding.
//!
//! Rows are read and written one by one, errors have offsets, and a writer learns the number of rows only at its end. No published crate
//! does this without an array library or a parser generator, so the format is read here: a header that is a Python literal, then the
//! elements. f16, f32 and f64 are read, in C order and little-endian.

use std::path::Path;

use half::f16;
use half::slice::HalfFloatSliceExt;
use safetensors::Dtype;

use super::rows::Rows;
use super::sample::{check_width, data};
use crate::error::{Error, Result};
use crate::file::{AtomicFile, InputFile};
use crate::types::DType;

/// First bytes of a file in this format.
pub const MAGIC: [u8; 6] = *b"\x93NUMPY";

/// Upper bound on the size of a header in bytes. NumPy itself writes less than 200 for a matrix.
const MAX_HEADER: u64 = 1 << 16;

/// Bytes before the elements of a file that is written here: room for any number of rows.
const HEADER: usize = 128;

/// An open `.npy` file with a matrix `[rows, width]` of f16, f32 or f64, read row by row as f32.
#[derive(Debug)]
pub struct NpyReader {
    file: InputFile,
    rows: Rows,
}

impl NpyReader {
    /// Opens a file and checks its header.
    ///
    /// # Errors
    /// [`Error::Io`], also for a directory or a special file; [`Error::Format`] with the offset for a file that is damaged, of another
    /// element type or number of dimensions, in Fortran order, or longer or shorter than its header says.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::new(InputFile::open(path.as_ref())?)
    }

    pub(super) fn new(file: InputFile) -> Result<Self> {
        let mut start = [0; 8];
        file.read_at(0, &mut start, "the header")?;
        if !start.starts_with(&MAGIC) {
            return Err(file.fail(0, "not an .npy file"));
        }
        let (at, length) = match start[6] {
            1 => {
                let mut length = [0; 2];
                file.read_at(8, &mut length, "the header")?;
                (10, u64::from(u16::from_le_bytes(length)))
            }
            2 | 3 => {
                let mut length = [0; 4];
                file.read_at(8, &mut length, "the header")?;
                (12, u64::from(u32::from_le_bytes(length)))
            }
            version => {
                let reason = format!("version {version} of the .npy format; 1 to 3 are read");
                return Err(file.fail(6, reason));
            }
        };
        if length > MAX_HEADER {
            return Err(file.fail(
                8,
                format!("a header of {length} bytes: not an array of floats"),
            ));
        }
        let bytes = file.read_vec(at, length, "the header")?;
        let header = Header::parse(&bytes)
            .map_err(|(offset, reason)| file.fail(at + offset as u64, reason))?;
        let rows = header
            .rows(at + length)
            .map_err(|reason| file.fail(at, reason))?;
        let size = (rows.dtype.bitsize() / 8) as u64;
        let bytes = (rows.rows as u64)
            .checked_mul(rows.width as u64)
            .and_then(|elements| elements.checked_mul(size));
        let rest = file.len() - rows.start;
        if bytes != Some(rest) {
            let bytes = bytes.map_or("more than 2^64".into(), |bytes| bytes.to_string());
            let reason = format!(
                "[{}, {}] values of {size} bytes take {bytes} bytes, but {rest} follow the header",
                rows.rows, rows.width
            );
            return Err(file.fail(rows.start, reason));
        }
        Ok(Self { file, rows })
    }

    /// Number of rows; there may be none.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows.rows
    }

    /// Number of values in a row.
    #[must_use]
    pub fn width(&self) -> usize {
        self.rows.width
    }

    /// Reads a row into a vector, which is cleared before.
    ///
    /// # Errors
    /// [`Error::Data`] past the end; [`Error::Format`] for a value that is not finite as f32; [`Error::Io`] and [`Error::Format`] if the
    /// file can no longer be read or was changed.
    pub fn read(&self, row: usize, values: &mut Vec<f32>) -> Result<()> {
        if row >= self.rows() {
            let reason = format!("is past the end: there are {} rows", self.rows());
            return Err(data(&format!("row {row}"), reason));
        }
        let mut bytes = Vec::new();
        self.rows.read(&self.file, row, &mut bytes, values)
    }

    pub(super) fn into_parts(self) -> (InputFile, Rows) {
        (self.file, self.rows)
    }
}

/// What the header of a file says.
#[derive(Debug, Default)]
struct Header {
    descr: Option<String>,
    fortran_order: Option<bool>,
    shape: Option<Vec<u64>>,
}

type Fault = (usize, String);

impl Header {
    /// Reads `{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }`.
    fn parse(bytes: &[u8]) -> Result<Self, Fault> {
        let mut header = Self::default();
        let mut literal = Literal { bytes, at: 0 };
        literal.expect(b'{')?;
        while !literal.takes(b'}') {
            let (at, key) = (literal.at, literal.string()?);
            literal.expect(b':')?;
            let twice = match key.as_str() {
                "descr" => {
                    if literal.peek() == Some(b'[') {
                        let reason = "an array of records; a matrix of floats is needed";
                        return Err((literal.at, reason.into()));
                    }
                    header.descr.replace(literal.string()?).is_some()
                }
                "fortran_order" => header.fortran_order.replace(literal.boolean()?).is_some(),
                "shape" => header.shape.replace(literal.tuple()?).is_some(),
                _ => return Err((at, format!("unknown key {key:?} in the header"))),
            };
            if twice {
                return Err((at, format!("the header has {key:?} twice")));
            }
            if !literal.takes(b',') {
                literal.expect(b'}')?;
                break;
            }
        }
        match literal.peek() {
            None => Ok(header),
            Some(_) => Err((
                literal.at,
                "something follows the header's dictionary".into(),
            )),
        }
    }

    /// The matrix that starts at this offset.
    fn rows(&self, start: u64) -> Result<Rows, String> {
        let missing = |key: &str| format!("the header lacks {key:?}");
        let descr = self.descr.as_deref().ok_or_else(|| missing("descr"))?;
        let shape = self.shape.as_ref().ok_or_else(|| missing("shape"))?;
        let fortran = self.fortran_order;
        let fortran = fortran.ok_or_else(|| missing("fortran_order"))?;
        let dtype = match descr {
            "<f2" => Dtype::F16,
            "<f4" => Dtype::F32,
            "<f8" => Dtype::F64,
            ">f2" | ">f4" | ">f8" => {
                return Err(format!(
                    "the elements are big-endian ({descr:?}): save array.astype(\"<f4\")"
                ));
            }
            _ => {
                return Err(format!(
                    "the elements are {descr:?}; \"<f2\", \"<f4\" and \"<f8\" are read: save array.astype(\"<f4\")"
                ));
            }
        };
        let &[rows, width] = shape.as_slice() else {
            let n = shape.len();
            return Err(format!(
                "the array has {n} dimensions; rows and columns are needed"
            ));
        };
        if width == 0 {
            return Err("the rows have no values".into());
        }
        if fortran && rows > 1 && width > 1 {
            return Err(
                "the array is in Fortran order: save numpy.ascontiguousarray(array)".into(),
            );
        }
        let too_large = |_| format!("[{rows}, {width}] values are too many");
        Ok(Rows {
            start,
            rows: usize::try_from(rows).map_err(too_large)?,
            width: usize::try_from(width).map_err(too_large)?,
            dtype,
            scales: None,
        })
    }
}

/// Reads a Python literal from its start to its end.
struct Literal<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Literal<'_> {
    /// The next byte that is not white space.
    fn peek(&mut self) -> Option<u8> {
        let rest = &self.bytes[self.at..];
        self.at += rest.len() - rest.trim_ascii_start().len();
        self.bytes.get(self.at).copied()
    }

    fn takes(&mut self, byte: u8) -> bool {
        let found = self.peek() == Some(byte);
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, byte: u8) -> Result<(), Fault> {
        match self.takes(byte) {
            true => Ok(()),
            false => Err(self.fault(&format!("{:?}", char::from(byte)))),
        }
    }

    fn fault(&self, expected: &str) -> Fault {
        (
            self.at,
            format!("the header is malformed: {expected} is expected here"),
        )
    }

    fn string(&mut self) -> Result<String, Fault> {
        let quote = self.peek().filter(|byte| matches!(byte, b'\'' | b'"'));
        let quote = quote.ok_or_else(|| self.fault("a string"))?;
        let rest = &self.bytes[self.at + 1..];
        let end = rest.iter().position(|byte| *byte == quote);
        let text = end.and_then(|end| std::str::from_utf8(&rest[..end]).ok());
        let text = text.filter(|text| !text.contains('\\'));
        let text = text.ok_or_else(|| self.fault("a string"))?;
        self.at += text.len() + 2;
        Ok(text.to_owned())
    }

    fn boolean(&mut self) -> Result<bool, Fault> {
        self.peek();
        let rest = &self.bytes[self.at..];
        for (word, value) in [("True", true), ("False", false)] {
            if rest.starts_with(word.as_bytes()) {
                self.at += word.len();
                return Ok(value);
            }
        }
        Err(self.fault("True or False"))
    }

    fn tuple(&mut self) -> Result<Vec<u64>, Fault> {
        let mut values = Vec::new();
        self.expect(b'(')?;
        while !self.takes(b')') {
            self.peek();
            let rest = &self.bytes[self.at..];
            let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
            let number = std::str::from_utf8(&rest[..digits]).unwrap_or_default();
            let number = number.parse().map_err(|_| self.fault("a whole number"))?;
            values.push(number);
            self.at += digits;
            // Python 2 wrote long integers so.
            self.takes(b'L');
            if !self.takes(b',') {
                self.expect(b')')?;
                break;
            }
        }
        Ok(values)
    }
}

/// Writes a matrix as an `.npy` file, row by row. The file appears under its name when it is [finished](Self::finish).
pub struct NpyWriter {
    file: AtomicFile,
    dtype: DType,
    width: usize,
    rows: u64,
    bytes: Vec<u8>,
}

impl NpyWriter {
    /// Starts a file of rows of `width` values, stored as `dtype`: [`DType::F32`], or [`DType::F16`] for half the size.
    ///
    /// # Errors
    /// [`Error::Io`], also if `path` is a directory or a special file; [`Error::Data`] if `width` is zero or does not fit 32 bits;
    /// [`Error::Config`] for another `dtype`.
    pub fn create(path: impl AsRef<Path>, width: usize, dtype: DType) -> Result<Self> {
        check_width(width)?;
        if !matches!(dtype, DType::F16 | DType::F32) {
            return Err(Error::Config {
                field: "dtype",
                reason: format!("is {dtype}; .npy files of f16 or f32 are written"),
            });
        }
        let mut file = AtomicFile::create(path.as_ref())?;
        file.write(&[0; HEADER])?;
        Ok(Self {
            file,
            dtype,
            width,
            rows: 0,
            bytes: Vec::new(),
        })
    }

    /// Adds a row of `width` finite values. In a file of f16 they are rounded to nearest even and must be within ±65504.
    ///
    /// # Errors
    /// [`Error::Data`] if the row is not like that, [`Error::Io`].
    pub fn push(&mut self, row: &[f32]) -> Result<()> {
        let fail = |reason: String| Err(data(&format!("row {}", self.rows), reason));
        if row.len() != self.width {
            return fail(format!("{} values instead of {}", row.len(), self.width));
        }
        encode(row, self.dtype, &mut self.bytes).or_else(fail)?;
        self.file.write(&self.bytes)?;
        self.rows += 1;
        Ok(())
    }

    /// Completes the file and moves it to its place. It may have no rows.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn finish(mut self) -> Result<()> {
        let descr = match self.dtype {
            DType::F16 => "<f2",
            _ => "<f4",
        };
        let mut header = MAGIC.to_vec();
        header.extend([1, 0, (HEADER - 10) as u8, 0]);
        let (rows, width) = (self.rows, self.width);
        let literal =
            format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({rows}, {width}), }}");
        header.extend(literal.bytes());
        // At most 107 bytes so far.
        header.resize(HEADER - 1, b' ');
        header.push(b'\n');
        self.file.patch(0, &header)?;
        self.file.commit()
    }
}

/// Finite values as little-endian f16 or f32. The error says which value does not fit.
pub(super) fn encode(values: &[f32], dtype: DType, bytes: &mut Vec<u8>) -> Result<(), String> {
    bytes.clear();
    if let Some(bad) = values.iter().find(|value| !value.is_finite()) {
        return Err(format!("the value {bad} is not finite"));
    }
    match dtype {
        DType::F16 => {
            let mut halves = vec![f16::ZERO; values.len()];
            halves.convert_from_f32_slice(values);
            if let Some(at) = halves.iter().position(|half| !half.is_finite()) {
                return Err(format!("the value {} does not fit f16", values[at]));
            }
            bytes.extend(halves.iter().flat_map(|half| half.to_le_bytes()));
        }
        _ => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_as_python_would() {
        let good = [
            "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }",
            "{\"shape\":(3,4),\"descr\":\"<f4\",\"fortran_order\":False}   \n",
            " { 'descr' : '<f4' , 'fortran_order' : False , 'shape' : ( 3L , 4L , ) } ",
            "{'descr': '<f4', 'fortran_order': True, 'shape': (1, 4)}",
        ];
        for header in good {
            let rows = Header::parse(header.as_bytes()).unwrap().rows(7).unwrap();
            assert_eq!((rows.start, rows.width, rows.dtype), (7, 4, Dtype::F32));
        }
        let bad = [
            ("", 0, "'{' is expected"),
            (
                "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), ",
                58,
                "a string",
            ),
            ("{'descr': [('a', '<f4')]", 10, "records"),
            ("{'descr': '<f4', 'x': 1}", 17, "unknown key \"x\""),
            ("{'descr': '<f4', 'descr': '<f4'}", 17, "twice"),
            ("{'descr': '<f4'} x", 17, "follows"),
            ("{'shape': (-1,)}", 11, "whole number"),
            ("{'shape': (99999999999999999999,)}", 11, "whole number"),
            ("{'fortran_order': 0}", 18, "True or False"),
        ];
        for (header, at, word) in bad {
            let (offset, reason) = Header::parse(header.as_bytes()).unwrap_err();
            assert!(reason.contains(word), "{header}: {reason}");
            assert_eq!(offset, at, "{header}: {reason}");
        }
        let refused = [
            ("'<f4'", "True", "(3, 4)", "Fortran"),
            ("'>f4'", "False", "(3, 4)", "big-endian"),
            ("'<i8'", "False", "(3, 4)", "\"<i8\""),
            ("'<f4'", "False", "(3,)", "1 dimensions"),
            ("'<f4'", "False", "()", "0 dimensions"),
            ("'<f4'", "False", "(3, 0)", "no values"),
        ];
        for (descr, order, shape, word) in refused {
            let header =
                format!("{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}");
            let header = Header::parse(header.as_bytes()).unwrap();
            let reason = header.rows(0).unwrap_err();
            assert!(reason.contains(word), "{reason}");
        }
    }
}
