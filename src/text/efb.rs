//! Reads files whose samples lie one after the other: [EFB1](super::efb1), [EFB2](super::efb2), and the temporary files of
//! [`Store`](super::store).

use std::io::{BufReader, Read};
use std::ops::Range;

use safetensors::Dtype;

use super::decode::At;
use super::offsets::Offsets;
use super::sample::{MAX_SAMPLE, SampleBuffer};
use super::{efb1, efb2};
use crate::error::Result;
use crate::file::{InputFile, Sequential};

/// Bytes that are read at once while a file is checked.
const WINDOW: usize = 1 << 20;

/// Bytes that are read at once on the way to a sample whose start is not known.
const STRIDE: u64 = 1 << 16;

/// The byte length of a text that is not there, in temporary files.
pub(super) const NO_TEXT: u32 = u32::MAX;

/// What a sample consists of: text, tokens, target, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub text: bool,
    pub tokens: bool,
    pub width: usize,
    /// Whether a text may be [`NO_TEXT`].
    pub optional_text: bool,
    /// Whether targets have the length 1.
    pub normalised: bool,
}

/// An open file, checked whole when it is opened and again as its samples are read.
#[derive(Debug)]
pub(super) struct Efb {
    file: InputFile,
    layout: Layout,
    vocab: Option<u32>,
    offsets: Offsets,
}

impl Efb {
    /// Reads the header of an EFB1 or EFB2 file and checks all samples.
    pub fn new(file: InputFile, vocab: Option<u32>) -> Result<Self> {
        Self::with_limit(file, vocab, Offsets::MOST)
    }

    /// [`new`](Self::new), keeping at most so many offsets.
    fn with_limit(file: InputFile, vocab: Option<u32>, most: usize) -> Result<Self> {
        let mut magic = [0; 4];
        file.read_at(0, &mut magic, "the header")?;
        let words = if magic == efb2::MAGIC { 3 } else { 2 };
        let mut header = [0; 12];
        file.read_at(4, &mut header[..4 * words], "the header")?;
        let [samples, width, flags] = [0, 4, 8].map(|at| word(&header[at..]));
        if samples == 0 {
            return Err(file.fail(4, "the number of samples is zero"));
        }
        if width == 0 {
            return Err(file.fail(8, "the width of the targets is zero"));
        }
        let flags = match magic {
            efb1::MAGIC => efb2::TOKENS,
            _ => flags,
        };
        if flags & !efb2::KNOWN != 0 {
            let reason = format!(
                "the flags {flags:#x} have unknown bits; {:#x} are known",
                efb2::KNOWN
            );
            return Err(file.fail(12, reason));
        }
        if flags & (efb2::TOKENS | efb2::TEXT) == 0 {
            return Err(file.fail(12, "by its flags the file has neither tokens nor texts"));
        }
        let layout = Layout {
            text: flags & efb2::TEXT != 0,
            tokens: flags & efb2::TOKENS != 0,
            width: width as usize,
            optional_text: false,
            normalised: flags & efb2::NORMALISED != 0,
        };

        // Checked before anything is allocated by these counts: the smallest sample has one token, and no text.
        let header = 4 + 4 * words as u64;
        let smallest = layout.smallest();
        let needed = u64::from(samples)
            .saturating_mul(smallest)
            .saturating_add(header);
        if needed > file.len() {
            let reason = format!(
                "{samples} samples of width {width} take at least {needed} bytes, but the file has {}",
                file.len()
            );
            return Err(file.fail(4, reason));
        }
        let mut efb = Self {
            layout,
            vocab,
            offsets: Offsets::new(samples as usize, most),
            file,
        };
        efb.scan(header, samples)?;
        Ok(efb)
    }

    /// A file whose samples are known to be right.
    pub fn trusted(file: InputFile, layout: Layout, offsets: Offsets) -> Self {
        Self {
            file,
            layout,
            vocab: None,
            offsets,
        }
    }

    /// Checks all samples and notes where they are.
    fn scan(&mut self, start: u64, samples: u32) -> Result<()> {
        let mut reader = BufReader::with_capacity(WINDOW, Sequential::new(&self.file));
        let read = |reader: &mut BufReader<Sequential<&InputFile>>, bytes: &mut [u8]| {
            let result = reader.read_exact(bytes);
            result.map_err(|error| reader.get_ref().error(error))
        };
        skip(&mut reader, start)?;
        let mut buffer = SampleBuffer::default();
        let mut at = start;
        for _ in 0..samples {
            let first = at;
            let mut length = [0; 4];
            if self.layout.text {
                let what = "the length of a text";
                self.file.check_range(at, 4, what)?;
                read(&mut reader, &mut length)?;
                let bytes = u64::from(u32::from_le_bytes(length));
                self.check_size(at, bytes, "the text")?;
                self.file
                    .resize(at + 4, bytes, "the text", &mut buffer.bytes)?;
                read(&mut reader, &mut buffer.bytes)?;
                self.at(at + 4).text(&buffer.bytes)?;
                at += 4 + bytes;
            }
            let mut tokens = 0;
            let body = at + 4 * u64::from(self.layout.tokens);
            if self.layout.tokens {
                let what = "the length of a sample";
                self.file.check_range(at, 4, what)?;
                read(&mut reader, &mut length)?;
                tokens = u32::from_le_bytes(length);
                if tokens == 0 {
                    return Err(self.file.fail(at, "the length of a sample is zero"));
                }
            }
            // At most 9 · 2^32.
            let rest = 5 * u64::from(tokens) + 4 * self.layout.width as u64;
            self.check_size(at, rest, "the rest of the sample")?;
            self.file
                .resize(body, rest, "the rest of the sample", &mut buffer.bytes)?;
            read(&mut reader, &mut buffer.bytes)?;
            let SampleBuffer { sample, bytes } = &mut buffer;
            self.decode(body, tokens as usize, bytes, sample)?;
            at = body + rest;
            if self.layout.normalised {
                self.at(at - 4 * self.layout.width as u64)
                    .unit(&sample.target)?;
            }
            self.offsets.push(first, at);
        }
        if at != self.file.len() {
            let reason = format!("{} bytes follow the last sample", self.file.len() - at);
            return Err(self.file.fail(at, reason));
        }
        Ok(())
    }

    /// Refuses a part of a sample that no memory should be spent on, if the file has it at all.
    fn check_size(&self, at: u64, bytes: u64, what: &str) -> Result<()> {
        self.file.check_range(at, 4, what)?;
        match bytes > MAX_SAMPLE {
            true if self.file.len() - at > bytes => {
                let reason = format!("{what} has {bytes} bytes; at most {MAX_SAMPLE} are read");
                Err(self.file.fail(at, reason))
            }
            _ => Ok(()),
        }
    }

    fn at(&self, offset: u64) -> At<'_> {
        At {
            file: &self.file,
            offset,
        }
    }

    /// Number of samples, at least one.
    pub fn len(&self) -> usize {
        self.offsets.len()
    }

    pub fn width(&self) -> usize {
        self.layout.width
    }

    /// Whether samples have token ids.
    pub fn has_tokens(&self) -> bool {
        self.layout.tokens
    }

    pub fn file(&self) -> &InputFile {
        &self.file
    }

    /// Where sample number `index` starts, to be named in errors.
    pub fn start(&self, index: usize) -> u64 {
        self.offsets.before(index).1
    }

    /// Reads sample number `index`, which exists. Without token ids in the file there are none in the sample.
    pub fn read(&self, index: usize, with_text: bool, buffer: &mut SampleBuffer) -> Result<()> {
        let place = self.locate(index, &mut buffer.bytes)?;
        let (start, what) = (place.start, "a sample");
        let SampleBuffer { sample, bytes } = buffer;
        self.file.resize(start, place.end - start, what, bytes)?;
        self.file.read_at(start, bytes, what)?;
        sample.text = None;
        let changed = || {
            self.file
                .fail(start, "the file was changed while it was open")
        };
        let length = |rest| {
            let (length, rest): (&[u8; 4], &[u8]) =
                <[u8]>::split_first_chunk(rest).ok_or_else(changed)?;
            Ok((u32::from_le_bytes(*length), rest))
        };
        let (mut rest, mut at) = (&bytes[..], start);
        if self.layout.text {
            let (bytes, after) = length(rest)?;
            (rest, at) = (after, at + 4);
            if !(self.layout.optional_text && bytes == NO_TEXT) {
                let (text, after) = rest.split_at_checked(bytes as usize).ok_or_else(changed)?;
                if with_text {
                    sample.text = Some(self.at(at).text(text)?.to_owned());
                }
                (rest, at) = (after, at + u64::from(bytes));
            }
        }
        let mut tokens = 0;
        if self.layout.tokens {
            let (length, after) = length(rest)?;
            (tokens, rest, at) = (length as usize, after, at + 4);
        }
        if rest.len() as u64 != 5 * tokens as u64 + 4 * self.layout.width as u64 {
            return Err(changed());
        }
        self.decode(at, tokens, rest, sample)
    }

    /// Decodes ids, mask and target, which are all of `bytes`.
    fn decode(
        &self,
        offset: u64,
        length: usize,
        bytes: &[u8],
        sample: &mut super::Sample,
    ) -> Result<()> {
        let (ids, rest) = bytes.split_at(4 * length);
        let (mask, target) = rest.split_at(length);
        let at = |before: usize| self.at(offset + before as u64);
        at(0).ids(ids, Dtype::U32, self.vocab, &mut sample.ids)?;
        at(4 * length).mask(mask, &mut sample.mask)?;
        at(5 * length).target(target, Dtype::F32, &mut sample.target)
    }

    /// The bytes of sample number `index`. Where its start was not kept, the lengths of those before it lead there.
    fn locate(&self, index: usize, bytes: &mut Vec<u8>) -> Result<Range<u64>> {
        let (mut sample, mut at) = self.offsets.before(index);
        let end = self.offsets.after(index);
        if self.offsets.is_whole() {
            return Ok(at..end);
        }
        let mut window = 0..0;
        let mut word_at = |at: u64| {
            if at < window.start || at + 4 > window.end {
                window = at..(at + STRIDE).min(end).max(at + 4);
                let length = window.end - at;
                self.file.resize(at, length, "a sample", bytes)?;
                self.file.read_at(at, bytes, "a sample")?;
            }
            Ok(word(&bytes[(at - window.start) as usize..]))
        };
        loop {
            let start = at;
            if self.layout.text {
                let length = word_at(at)?;
                let none = self.layout.optional_text && length == NO_TEXT;
                at += 4 + if none { 0 } else { u64::from(length) };
            }
            if self.layout.tokens {
                at += 4 + 5 * u64::from(word_at(at)?);
            }
            at += 4 * self.layout.width as u64;
            if sample == index {
                return Ok(start..at);
            }
            sample += 1;
        }
    }
}

impl Layout {
    /// Bytes of the smallest sample.
    fn smallest(&self) -> u64 {
        4 * u64::from(self.text) + 9 * u64::from(self.tokens) + 4 * self.width as u64
    }
}

/// The first four of at least four bytes.
fn word(bytes: &[u8]) -> u32 {
    let first = bytes.first_chunk().copied();
    u32::from_le_bytes(first.unwrap_or_default())
}

/// Passes over the header, which was read already.
fn skip(reader: &mut BufReader<Sequential<&InputFile>>, bytes: u64) -> Result<()> {
    let copied = std::io::copy(&mut reader.take(bytes), &mut std::io::sink());
    copied
        .map(drop)
        .map_err(|error| reader.get_ref().error(error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::{Efb1Writer, Efb2Writer};

    #[test]
    fn samples_are_found_when_few_offsets_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let (first, second) = (folder.path().join("1"), folder.path().join("2"));
        let mut efb1 = Efb1Writer::create(&first, 2).unwrap();
        let mut efb2 = Efb2Writer::create(&second, 2).unwrap();
        for i in 0..300_u32 {
            // Some larger than the window.
            let length = if i % 100 == 50 {
                20_000
            } else {
                1 + i as usize % 7
            };
            let (ids, mask, target) = (vec![i; length], vec![1; length], [i as f32, 1.0]);
            efb1.push(&ids, &mask, &target).unwrap();
            let text = "é".repeat(i as usize % 5);
            efb2.push(Some(&text), Some((&ids, &mask)), &target)
                .unwrap();
        }
        efb1.finish().unwrap();
        efb2.finish().unwrap();
        for path in [first, second] {
            let open = || InputFile::open(&path).unwrap();
            let all = Efb::new(open(), None).unwrap();
            assert!(all.offsets.is_whole());
            for most in [2, 7, 100] {
                let few = Efb::with_limit(open(), None, most).unwrap();
                assert!(!few.offsets.is_whole());
                let (mut one, mut other) = (SampleBuffer::default(), SampleBuffer::default());
                for index in (0..300).rev() {
                    all.read(index, true, &mut one).unwrap();
                    few.read(index, true, &mut other).unwrap();
                    assert_eq!(one.sample, other.sample);
                    assert_eq!(one.sample.ids[0], index as u32);
                }
            }
        }
    }
}
