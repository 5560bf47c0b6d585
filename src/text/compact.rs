//! EFC1, the compact format: half the size of EFB1, with the texts in it, for data that travels with a project.
//!
//! Little-endian. A header of 32 bytes, then sections; each starts at the next multiple of 16 bytes, gaps are zero,
//! and nothing follows the last one. The header alone tells the size of the file.
//!
//! | header | type |
//! |---|---|
//! | magic | `"EFC1"` |
//! | samples n, at least 1 | u32 |
//! | width E, at least 1 | u32 |
//! | flags: bit 0 a mask is stored, bit 1 texts are stored | u32 |
//! | tokens N of all samples | u32 |
//! | bytes T of all texts, 0 without texts | u32 |
//! | zero | u8 × 8 |
//!
//! | section | type |
//! |---|---|
//! | token bounds: sample i has tokens bounds\[i\] .. bounds\[i+1\], at least one; the last bound is N | u32 × (n + 1) |
//! | token ids | u16 × N |
//! | mask, 0 or 1; without it every token counts | u8 × N, if flagged |
//! | text bounds: sample i has bytes bounds\[i\] .. bounds\[i+1\]; the last bound is T | u32 × (n + 1), if flagged |
//! | texts, each valid UTF-8 by itself | u8 × T, if flagged |
//! | targets, finite | f16 × n × E |

use std::ops::Range;
use std::path::Path;

use half::f16;

use crate::error::Result;

use super::mapped::Mapped;
use super::sample::{
    Ids, OpenOptions, Sample, Target, check_sample, check_samples, check_width, data,
};
use crate::atomic::AtomicFile;

/// First bytes of a file in this format.
pub const MAGIC: [u8; 4] = *b"EFC1";

const HEADER: u64 = 32;
const ALIGN: u64 = 16;
const HAS_MASK: u32 = 1;
const HAS_TEXTS: u32 = 2;

/// The counts of a header.
#[derive(Clone, Copy, Debug)]
struct Header {
    samples: u32,
    width: u32,
    flags: u32,
    tokens: u32,
    text_bytes: u32,
}

/// Where the sections lie, in file order; those that are not stored are empty.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Sections<T> {
    bounds: Range<T>,
    ids: Range<T>,
    mask: Range<T>,
    text_bounds: Range<T>,
    texts: Range<T>,
    targets: Range<T>,
}

impl Header {
    /// `None` if the size of the file would overflow.
    fn sections(self) -> Option<Sections<u64>> {
        let (samples, tokens) = (u64::from(self.samples), u64::from(self.tokens));
        let stored = |flag: u32, bytes: u64| if self.flags & flag == 0 { 0 } else { bytes };
        let bounds_bytes = 4 * (samples + 1);
        let target_bytes = (samples * u64::from(self.width)).checked_mul(2)?;
        let mut end = HEADER;
        let mut section = |bytes: u64| {
            // An absent section takes no room, not even a gap.
            let start = if bytes == 0 {
                end
            } else {
                end.checked_next_multiple_of(ALIGN)?
            };
            end = start.checked_add(bytes)?;
            Some(start..end)
        };
        Some(Sections {
            bounds: section(bounds_bytes)?,
            ids: section(2 * tokens)?,
            mask: section(stored(HAS_MASK, tokens))?,
            text_bounds: section(stored(HAS_TEXTS, bounds_bytes))?,
            texts: section(stored(HAS_TEXTS, self.text_bytes.into()))?,
            targets: section(target_bytes)?,
        })
    }

    fn bytes(self) -> [u8; HEADER as usize] {
        let mut bytes = [0; HEADER as usize];
        bytes[..4].copy_from_slice(&MAGIC);
        let fields = [
            self.samples,
            self.width,
            self.flags,
            self.tokens,
            self.text_bytes,
        ];
        for (to, field) in bytes[4..].chunks_exact_mut(4).zip(fields) {
            to.copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }
}

/// A file in the compact format, mapped into memory and checked whole.
#[derive(Debug)]
pub struct Compact {
    file: Mapped,
    width: usize,
    /// n + 1 bounds of the samples' tokens.
    bounds: Vec<u32>,
    /// n + 1 bounds of the samples' texts, if stored.
    text_bounds: Option<Vec<u32>>,
    has_mask: bool,
    sections: Sections<usize>,
}

impl Compact {
    /// Opens and checks a file. It must not be changed while it is open.
    ///
    /// # Errors
    /// [`Io`](crate::Error::Io), or [`Format`](crate::Error::Format) with the offset of the first thing wrong.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, OpenOptions::default())
    }

    /// [`open`](Self::open), with more to check.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn open_with(path: impl AsRef<Path>, options: OpenOptions) -> Result<Self> {
        Self::check(Mapped::open(path.as_ref())?, options)
    }

    pub(super) fn check(file: Mapped, options: OpenOptions) -> Result<Self> {
        let header = read_header(&file)?;
        let sections = locate(&file, header)?;
        let bounds = read_bounds(&file, &sections.bounds, header.tokens, 1)?;
        let text_bounds = (header.flags & HAS_TEXTS != 0)
            .then(|| read_bounds(&file, &sections.text_bounds, header.text_bytes, 0))
            .transpose()?;
        let compact = Self {
            width: header.width as usize,
            has_mask: header.flags & HAS_MASK != 0,
            file,
            bounds,
            text_bounds,
            sections,
        };
        compact.check_contents(options)?;
        Ok(compact)
    }

    fn check_contents(&self, options: OpenOptions) -> Result<()> {
        let Self { file, sections, .. } = self;
        let bytes = file.bytes();
        let ids = Ids::U16(bytes[sections.ids.clone()].as_chunks().0);
        file.check_ids(sections.ids.start, 2, options.vocab, ids.iter())?;
        file.check_mask(sections.mask.start, &bytes[sections.mask.clone()])?;
        let texts = &bytes[sections.texts.clone()];
        for bounds in self.text_bounds.iter().flat_map(|bounds| bounds.windows(2)) {
            let (start, end) = (bounds[0] as usize, bounds[1] as usize);
            if let Err(error) = std::str::from_utf8(&texts[start..end]) {
                let at = sections.texts.start + start + error.valid_up_to();
                return Err(file.fail(at, "text is not valid UTF-8"));
            }
        }
        let targets = Target::F16(bytes[sections.targets.clone()].as_chunks().0);
        file.check_target(sections.targets.start, 2, targets.iter())
    }

    /// Number of samples, at least one.
    #[must_use]
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.bounds.len() - 1
    }

    /// Values in a target.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Sample number `index`, `None` past the end.
    #[must_use]
    pub fn sample(&self, index: usize) -> Option<Sample<'_>> {
        let bytes = self.file.bytes();
        let section =
            |range: &Range<usize>, start: usize, end: usize| bytes[range.clone()].get(start..end);
        let (start, end) = span(&self.bounds, index)?;
        let row = 2 * self.width;
        let mask = match self.has_mask {
            true => Some(section(&self.sections.mask, start, end)?),
            false => None,
        };
        let text = self.text_bounds.as_ref().and_then(|bounds| {
            let (start, end) = span(bounds, index)?;
            std::str::from_utf8(section(&self.sections.texts, start, end)?).ok()
        });
        let ids = section(&self.sections.ids, 2 * start, 2 * end)?;
        let target = section(&self.sections.targets, row * index, row * (index + 1))?;
        Some(Sample {
            ids: Ids::U16(ids.as_chunks().0),
            mask,
            target: Target::F16(target.as_chunks().0),
            text,
        })
    }
}

fn span(bounds: &[u32], index: usize) -> Option<(usize, usize)> {
    let (&start, &end) = (bounds.get(index)?, bounds.get(index + 1)?);
    Some((start as usize, end as usize))
}

fn read_header(file: &Mapped) -> Result<Header> {
    file.expect_magic(MAGIC)?;
    let header = Header {
        samples: file.count(4, "the number of samples")?,
        width: file.count(8, "the width of the targets")?,
        flags: file.u32(12, "the flags")?,
        tokens: file.count(16, "the number of tokens")?,
        text_bytes: file.u32(20, "the size of the texts")?,
    };
    if header.flags & !(HAS_MASK | HAS_TEXTS) != 0 {
        return Err(file.fail(12, format!("unknown flags {:#x}", header.flags)));
    }
    if header.flags & HAS_TEXTS == 0 && header.text_bytes != 0 {
        return Err(file.fail(20, "texts have a size, but are not flagged"));
    }
    check_zero(file, 24..HEADER as usize)?;
    Ok(header)
}

/// Places the sections; they and the gaps between them make up the file exactly.
fn locate(file: &Mapped, header: Header) -> Result<Sections<usize>> {
    let sections = header
        .sections()
        .filter(|sections| sections.targets.end <= file.len())
        .ok_or_else(|| {
            let reason = format!(
                "{} samples of width {} with {} tokens and {} bytes of text do not fit the {} bytes of the file",
                header.samples, header.width, header.tokens, header.text_bytes, file.len()
            );
            file.fail(4, reason)
        })?;
    // All lie in the map, so they fit.
    let fit = |range: Range<u64>| range.start as usize..range.end as usize;
    let sections = Sections {
        bounds: fit(sections.bounds),
        ids: fit(sections.ids),
        mask: fit(sections.mask),
        text_bounds: fit(sections.text_bounds),
        texts: fit(sections.texts),
        targets: fit(sections.targets),
    };
    let mut end = HEADER as usize;
    for section in sections.in_order() {
        check_zero(file, end..section.start)?;
        end = section.end;
    }
    if end as u64 != file.len() {
        let reason = format!("{} bytes follow the targets", file.len() - end as u64);
        return Err(file.fail(end, reason));
    }
    Ok(sections)
}

impl<T> Sections<T> {
    fn in_order(&self) -> [&Range<T>; 6] {
        [
            &self.bounds,
            &self.ids,
            &self.mask,
            &self.text_bounds,
            &self.texts,
            &self.targets,
        ]
    }
}

fn check_zero(file: &Mapped, range: Range<usize>) -> Result<()> {
    let bytes = file.slice(range.start, range.len(), "padding")?;
    match bytes.iter().position(|&byte| byte != 0) {
        None => Ok(()),
        Some(at) => Err(file.fail(range.start + at, "padding is not zero")),
    }
}

/// Bounds from 0 to `total`, each at least `step` after the one before.
fn read_bounds(file: &Mapped, section: &Range<usize>, total: u32, step: u32) -> Result<Vec<u32>> {
    let bytes = file.slice(section.start, section.len(), "a table of bounds")?;
    let bounds: Vec<u32> = Ids::U32(bytes.as_chunks().0).iter().collect();
    if bounds.first() != Some(&0) {
        return Err(file.fail(section.start, "the first bound is not zero"));
    }
    let rises = |pair: &[u32]| {
        pair[1]
            .checked_sub(pair[0])
            .is_some_and(|rise| rise >= step)
    };
    if let Some(at) = bounds.windows(2).position(|pair| !rises(pair)) {
        let reason = format!("bound {} follows bound {}", bounds[at + 1], bounds[at]);
        return Err(file.fail(section.start + 4 * (at + 1), reason));
    }
    match bounds.last() {
        Some(&last) if last == total => Ok(bounds),
        last => {
            let reason = format!("the last bound is {last:?}, but the header says {total}");
            Err(file.fail(section.end - 4, reason))
        }
    }
}

/// Collects samples and writes them as one compact file.
///
/// The samples are held in memory until [`finish`](Self::finish), because the sections lie one after the other.
pub struct CompactWriter {
    file: AtomicFile,
    width: u32,
    bounds: Vec<u32>,
    ids: Vec<u8>,
    mask: Vec<u8>,
    text_bounds: Vec<u32>,
    texts: Vec<u8>,
    targets: Vec<u8>,
}

impl CompactWriter {
    /// Starts a file whose targets have `width` values.
    ///
    /// # Errors
    /// [`Io`](crate::Error::Io), or [`Data`](crate::Error::Data) if `width` is zero or does not fit 32 bits.
    pub fn create(path: impl AsRef<Path>, width: usize) -> Result<Self> {
        Ok(Self {
            width: check_width(width)?,
            file: AtomicFile::create(path.as_ref())?,
            bounds: vec![0],
            ids: Vec::new(),
            mask: Vec::new(),
            text_bounds: vec![0],
            texts: Vec::new(),
            targets: Vec::new(),
        })
    }

    /// Adds a sample: token ids `[L]` below 65536, mask `[L]` of 0 and 1, target `[width]` within ±65504, and its text,
    /// which all samples have or none. Targets are rounded to f16.
    ///
    /// # Errors
    /// [`Data`](crate::Error::Data) if the sample is not like that; nothing of it is kept then.
    pub fn push(
        &mut self,
        ids: &[u32],
        mask: &[u8],
        target: &[f32],
        text: Option<&str>,
    ) -> Result<()> {
        let index = self.bounds.len() - 1;
        let fail = |reason: String| data(&format!("sample {index}"), reason);
        check_sample(index, self.width as usize, ids, mask, target)?;
        if let Some(id) = ids.iter().find(|&&id| id > u32::from(u16::MAX)) {
            return Err(fail(format!("token id {id} does not fit 16 bits")));
        }
        if let Some(value) = target
            .iter()
            .find(|&&value| !f16::from_f32(value).is_finite())
        {
            return Err(fail(format!("target value {value} does not fit f16")));
        }
        let has_texts = self.text_bounds.len() > 1;
        if index > 0 && has_texts != text.is_some() {
            return Err(fail("all samples have a text, or none".into()));
        }
        let too_many = |_| fail("tokens or texts do not fit 32 bits together".into());
        let tokens = u32::try_from(self.mask.len() + ids.len()).map_err(too_many)?;
        let text_end = self.texts.len() + text.map_or(0, str::len);
        let text_end = u32::try_from(text_end).map_err(too_many)?;

        self.bounds.push(tokens);
        self.ids
            .extend(ids.iter().flat_map(|&id| (id as u16).to_le_bytes()));
        self.mask.extend_from_slice(mask);
        if let Some(text) = text {
            self.text_bounds.push(text_end);
            self.texts.extend_from_slice(text.as_bytes());
        }
        self.targets.extend(
            target
                .iter()
                .flat_map(|&value| f16::from_f32(value).to_le_bytes()),
        );
        Ok(())
    }

    /// Writes the file and moves it to its place. The mask is left out if every token counts.
    ///
    /// # Errors
    /// [`Data`](crate::Error::Data) if there are no samples, or more than fit 32 bits; [`Io`](crate::Error::Io).
    pub fn finish(mut self) -> Result<()> {
        let samples = check_samples(self.bounds.len() - 1)?;
        let mut header = Header {
            samples,
            width: self.width,
            flags: 0,
            // `push` keeps both within 32 bits.
            tokens: self.mask.len() as u32,
            text_bytes: self.texts.len() as u32,
        };
        if self.mask.contains(&0) {
            header.flags |= HAS_MASK;
        } else {
            self.mask.clear();
        }
        if self.text_bounds.len() > 1 {
            header.flags |= HAS_TEXTS;
        } else {
            self.text_bounds.clear();
        }
        let little_endian = |bounds: &[u32]| -> Vec<u8> {
            bounds
                .iter()
                .flat_map(|bound| bound.to_le_bytes())
                .collect()
        };
        let contents = [
            little_endian(&self.bounds),
            self.ids,
            self.mask,
            little_endian(&self.text_bounds),
            self.texts,
            self.targets,
        ];
        self.file.write(&header.bytes())?;
        let mut end = HEADER as usize;
        for bytes in contents.iter().filter(|bytes| !bytes.is_empty()) {
            let start = end.next_multiple_of(ALIGN as usize);
            self.file.write(&[0; ALIGN as usize][..start - end])?;
            self.file.write(bytes)?;
            end = start + bytes.len();
        }
        self.file.commit()
    }
}
