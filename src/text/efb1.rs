//! EFB1: token ids and teacher embeddings in one file. All values are little-endian; nothing is aligned.
//!
//! | field | type |
//! |---|---|
//! | magic | `"EFB1"` |
//! | samples n, at least 1 | u32 |
//! | width E, at least 1 | u32 |
//! | then for each sample: length L, at least 1 | u32 |
//! | token ids | u32 × L |
//! | mask, 0 or 1 | u8 × L |
//! | target, finite | f32 × E |

use std::io::{BufReader, Read};
use std::path::Path;

use safetensors::Dtype;

use super::decode::At;
use super::sample::{SampleBuffer, check_sample, check_samples, check_width, data};
use crate::error::Result;
use crate::file::{AtomicFile, InputFile, Sequential};

/// First bytes of a file in this format.
pub const MAGIC: [u8; 4] = *b"EFB1";

const HEADER: u64 = 12;

/// Bytes that are read at once while a file is checked.
const WINDOW: usize = 1 << 20;

/// An EFB1 file, checked whole when it is opened and again as its samples are read.
#[derive(Debug)]
pub(super) struct Efb1 {
    file: InputFile,
    width: usize,
    vocab: Option<u32>,
    /// Where each sample starts, and after them where the file ends.
    starts: Vec<u64>,
}

impl Efb1 {
    pub fn new(file: InputFile, vocab: Option<u32>) -> Result<Self> {
        let mut header = [0; HEADER as usize];
        file.read_at(0, &mut header, "the header")?;
        let [_, samples, width] = [0, 4, 8].map(|at| {
            let word = [header[at], header[at + 1], header[at + 2], header[at + 3]];
            u32::from_le_bytes(word)
        });
        if samples == 0 {
            return Err(file.fail(4, "the number of samples is zero"));
        }
        if width == 0 {
            return Err(file.fail(8, "the width of the targets is zero"));
        }

        // Checked before anything is allocated by these counts: the smallest sample has one token.
        let smallest = 4 + 5 + 4 * u64::from(width);
        let needed = u64::from(samples)
            .saturating_mul(smallest)
            .saturating_add(HEADER);
        if needed > file.len() {
            let reason = format!(
                "{samples} samples of width {width} take at least {needed} bytes, but the file has {}",
                file.len()
            );
            return Err(file.fail(4, reason));
        }

        let mut efb1 = Self {
            width: width as usize,
            vocab,
            starts: Vec::with_capacity(samples as usize + 1),
            file,
        };
        let mut reader = BufReader::with_capacity(WINDOW, Sequential::new(&efb1.file));
        let read = |reader: &mut BufReader<Sequential<&InputFile>>, bytes: &mut [u8]| {
            let result = reader.read_exact(bytes);
            result.map_err(|error| reader.get_ref().error(error))
        };
        read(&mut reader, &mut header)?;
        let mut buffer = SampleBuffer::default();
        let mut at = HEADER;
        for _ in 0..samples {
            efb1.starts.push(at);
            let mut length = [0; 4];
            efb1.file.check_range(at, 4, "the length of a sample")?;
            read(&mut reader, &mut length)?;
            let length = match u32::from_le_bytes(length) {
                0 => return Err(efb1.file.fail(at, "the length of a sample is zero")),
                length => length,
            };
            // At most 9 · 2^32.
            let body = 5 * u64::from(length) + 4 * u64::from(width);
            let rest = "the rest of the sample";
            efb1.file.resize(at + 4, body, rest, &mut buffer.bytes)?;
            read(&mut reader, &mut buffer.bytes)?;
            efb1.decode(at + 4, &mut buffer)?;
            at += 4 + body;
        }
        if at != efb1.file.len() {
            let reason = format!("{} bytes follow the last sample", efb1.file.len() - at);
            return Err(efb1.file.fail(at, reason));
        }
        efb1.starts.push(at);
        Ok(efb1)
    }

    /// Number of samples, at least one.
    pub fn len(&self) -> usize {
        self.starts.len() - 1
    }

    pub fn width(&self) -> usize {
        self.width
    }

    /// Reads sample number `index`, which exists.
    pub fn read(&self, index: usize, buffer: &mut SampleBuffer) -> Result<()> {
        let (start, end) = (self.starts[index], self.starts[index + 1]);
        let (what, bytes) = ("a sample", &mut buffer.bytes);
        self.file.resize(start + 4, end - start - 4, what, bytes)?;
        self.file.read_at(start + 4, bytes, what)?;
        self.decode(start + 4, buffer)
    }

    /// Decodes ids, mask and target, which are all of the buffer's bytes.
    fn decode(&self, offset: u64, buffer: &mut SampleBuffer) -> Result<()> {
        let SampleBuffer { sample, bytes } = buffer;
        let length = (bytes.len() - 4 * self.width) / 5;
        let (ids, rest) = bytes.split_at(4 * length);
        let (mask, target) = rest.split_at(length);
        let at = |before: usize| At {
            file: &self.file,
            offset: offset + before as u64,
        };
        at(0).ids(ids, Dtype::U32, self.vocab, &mut sample.ids)?;
        at(4 * length).mask(mask, &mut sample.mask)?;
        at(5 * length).target(target, Dtype::F32, &mut sample.target)
    }
}

/// Writes an EFB1 file, sample by sample. The file appears under its name when it is [finished](Self::finish).
pub struct Efb1Writer {
    file: AtomicFile,
    width: usize,
    samples: usize,
}

impl Efb1Writer {
    /// Starts a file whose targets have `width` values.
    ///
    /// # Errors
    /// [`Io`](crate::Error::Io), also if `path` is a directory or a special file; [`Data`](crate::Error::Data) if `width` is zero or does not
    /// fit 32 bits.
    pub fn create(path: impl AsRef<Path>, width: usize) -> Result<Self> {
        let stored_width = check_width(width)?;
        let mut file = AtomicFile::create(path.as_ref())?;
        file.write(&MAGIC)?;
        file.write(&[0; 4])?;
        file.write(&stored_width.to_le_bytes())?;
        Ok(Self {
            file,
            width,
            samples: 0,
        })
    }

    /// Adds a sample: token ids `[L]`, mask `[L]` of 0 and 1, finite target `[width]`.
    ///
    /// # Errors
    /// [`Data`](crate::Error::Data) if the sample is not like that, [`Io`](crate::Error::Io).
    pub fn push(&mut self, ids: &[u32], mask: &[u8], target: &[f32]) -> Result<()> {
        check_sample(self.samples, self.width, ids, mask, target)?;
        let length = u32::try_from(ids.len()).map_err(|_| {
            data(
                &format!("sample {}", self.samples),
                "more than 2^32 - 1 tokens",
            )
        })?;
        self.file.write(&length.to_le_bytes())?;
        for id in ids {
            self.file.write(&id.to_le_bytes())?;
        }
        self.file.write(mask)?;
        for value in target {
            self.file.write(&value.to_le_bytes())?;
        }
        self.samples += 1;
        Ok(())
    }

    /// Completes the file and moves it to its place.
    ///
    /// # Errors
    /// [`Data`](crate::Error::Data) if there are no samples, or more than fit 32 bits; [`Io`](crate::Error::Io).
    pub fn finish(mut self) -> Result<()> {
        let samples = check_samples(self.samples)?;
        self.file.patch(4, &samples.to_le_bytes())?;
        self.file.commit()
    }
}
