//! Any dataset as a sequence of records, whether its samples have token ids or not.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use super::efb::Efb;
use super::jsonl::{self, JsonLines, Record};
use super::npy::{self, NpyReader};
use super::rows::Rows;
use super::sample::{OpenOptions, SampleBuffer};
use super::tensors::{self, Tensors};
use super::text_lines::TextLines;
use super::{efb1, efb2};
use crate::error::{Error, Result};
use crate::file::{InputFile, TensorFile, is_tensor_file, newer};

/// As many first bytes of a file as are looked at to tell its format.
const START: u64 = 4096;

/// A file of a dataset, whose content told its format.
#[derive(Debug)]
pub(super) enum Opened {
    Efb(Efb),
    Tensors(Box<Tensors>),
    Lines(JsonLines),
    /// Texts, and embeddings of as many rows.
    Texts(TextLines, Embeddings),
}

/// A matrix of embeddings in a file of its own.
#[derive(Debug)]
pub(super) struct Embeddings {
    pub file: InputFile,
    pub rows: Rows,
}

impl Opened {
    /// Opens and checks a file; the lines of JSON and text are checked as they are read.
    pub fn new(path: &Path, options: &OpenOptions) -> Result<Self> {
        let mut file = InputFile::open(path)?;
        if file.len() == 0 {
            return Err(file.fail(0, "the file is empty"));
        }
        let start = file.read_vec(0, START.min(file.len()), "the first bytes")?;
        if options.embeddings.is_some() {
            return Self::texts(file, options);
        }
        if start.starts_with(&efb1::MAGIC) || start.starts_with(&efb2::MAGIC) {
            file.hold(options.in_memory)?;
            return Ok(Self::Efb(Efb::new(file, options.limit())?));
        }
        if start.starts_with(&npy::MAGIC) {
            return Self::embeddings(Embeddings::npy(file, options)?, options);
        }
        if is_tensor_file(&start) {
            file.hold(options.in_memory)?;
            let file = TensorFile::new(file)?;
            if tensors::is_matrix(&file)? {
                return Self::embeddings(Embeddings::tensors(file)?, options);
            }
            let tensors = Tensors::new(file, options.limit())?;
            return Ok(Self::Tensors(Box::new(tensors)));
        }
        if jsonl::is_json_lines(&start) {
            return Ok(Self::Lines(JsonLines::new(file, options.limit())));
        }
        match is_text(&start) {
            true => Self::texts(file, options),
            false => Err(unknown(&file, &start)),
        }
    }

    /// A file of texts, and the embeddings beside it.
    fn texts(file: InputFile, options: &OpenOptions) -> Result<Self> {
        let path = match options.embeddings {
            Some(path) => path.to_owned(),
            None => beside(&file, &["npy", "safetensors"], "embeddings")?,
        };
        let embeddings = Embeddings::open(&path, options)?;
        Ok(Self::Texts(TextLines::new(file), embeddings))
    }

    /// A file of embeddings, and the texts beside it.
    fn embeddings(embeddings: Embeddings, options: &OpenOptions) -> Result<Self> {
        let path = match options.texts {
            Some(path) => path.to_owned(),
            None => beside(&embeddings.file, &["txt"], "texts")?,
        };
        Ok(Self::Texts(TextLines::open(&path)?, embeddings))
    }
}

impl Embeddings {
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self> {
        let mut file = InputFile::open(path)?;
        let start = file.read_vec(0, START.min(file.len()), "the first bytes")?;
        if start.starts_with(&npy::MAGIC) {
            return Self::npy(file, options);
        }
        if is_tensor_file(&start) {
            file.hold(options.in_memory)?;
            return Self::tensors(TensorFile::new(file)?);
        }
        Err(file.fail(
            0,
            "neither an .npy file nor a safetensors file of embeddings",
        ))
    }

    fn npy(mut file: InputFile, options: &OpenOptions) -> Result<Self> {
        file.hold(options.in_memory)?;
        let (file, rows) = NpyReader::new(file)?.into_parts();
        Self::checked(file, rows)
    }

    fn tensors(file: TensorFile) -> Result<Self> {
        let rows = tensors::matrix(&file)?;
        Self::checked(file.into_file(), rows)
    }

    fn checked(file: InputFile, rows: Rows) -> Result<Self> {
        if rows.rows == 0 {
            return Err(file.fail(rows.start, "there are no embeddings"));
        }
        rows.check(&file)?;
        Ok(Self { file, rows })
    }
}

/// The file beside another one of the same name, with one of these endings.
fn beside(file: &InputFile, endings: &[&str], what: &str) -> Result<PathBuf> {
    let own = file.path().extension().and_then(OsStr::to_str);
    let paths = endings
        .iter()
        .filter(|ending| Some(**ending) != own)
        .map(|ending| file.path().with_extension(ending));
    let mut found = paths.filter(|path| path.exists());
    let names: Vec<String> = endings
        .iter()
        .map(|ending| file.path().with_extension(ending).display().to_string())
        .collect();
    let both = names.join(" and ");
    let names = names.join(" or ");
    match (found.next(), found.next()) {
        (Some(path), None) => Ok(path),
        (None, _) => {
            let taken = match what {
                "embeddings" => {
                    not_texts(file, own)?;
                    "taken for texts, one per line, "
                }
                _ => "",
            };
            Err(file.fail(
                0,
                format!(
                    "{taken}the file needs {what}, which are looked for in {names}: put them there, or name another file with OpenOptions::{what}"
                ),
            ))
        }
        (Some(_), Some(_)) => Err(file.fail(
            0,
            format!("both {both} are there: remove one, or say which with OpenOptions::{what}"),
        )),
    }
}

/// Refuses files that are mistaken for texts: a JSON array, and tables.
fn not_texts(file: &InputFile, ending: Option<&str>) -> Result<()> {
    let start = file.read_vec(0, START.min(file.len()), "the first bytes")?;
    let ending = ending.map(str::to_ascii_lowercase);
    let what = match (start.trim_ascii_start().first(), ending.as_deref()) {
        (Some(b'['), _) | (_, Some("json")) => "a JSON array is not read",
        (_, Some("csv" | "tsv")) => "a table of comma- or tab-separated values is not read",
        _ => return Ok(()),
    };
    Err(file.fail(
        0,
        format!("{what}: write JSON lines, one object with a text and its embedding per line"),
    ))
}

/// Whether these first bytes are UTF-8 without control characters; the last character may be cut off.
fn is_text(start: &[u8]) -> bool {
    let text = match std::str::from_utf8(start) {
        Ok(text) => text,
        Err(error) if error.error_len().is_none() => {
            std::str::from_utf8(&start[..error.valid_up_to()]).unwrap_or_default()
        }
        Err(_) => return false,
    };
    !text.contains(|c: char| c.is_control() && !c.is_whitespace())
}

/// The error for a file of no known format, with what is known about its first bytes.
fn unknown(file: &InputFile, start: &[u8]) -> Error {
    let reason = match start {
        [b'E', b'F', b'C', b'1', ..] => {
            "EFC1 files are no longer read: write the dataset again as safetensors, see data/README.md".into()
        }
        [b'E', b'F', b'B', version @ b'3'..=b'9', ..] => {
            newer("EFB", char::from(*version), 2)
        }
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => {
            "this looks like UTF-16 text: save it as UTF-8".into()
        }
        _ => format!(
            "the file begins with \"{}\": this is neither a safetensors file, nor EFB1 or EFB2, nor JSON lines, nor .npy, nor text",
            start[..start.len().min(8)].escape_ascii()
        ),
    };
    file.fail(0, reason)
}

/// The samples of a dataset in any format, one by one in order, whether they have token ids or only texts. The iterator ends after
/// the first error. Texts are not tokenised.
#[derive(Debug)]
pub struct Records {
    opened: Opened,
    /// Texts that replace those of the file.
    texts: Option<TextLines>,
    index: usize,
    buffer: SampleBuffer,
    failed: bool,
}

impl Records {
    /// Opens a file; the content tells its format, see [`Dataset`](super::Dataset).
    ///
    /// # Errors
    /// As for [`Dataset::open`](super::Dataset::open).
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, OpenOptions::default())
    }

    /// [`open`](Self::open) with a vocabulary to check ids against, and files of texts or embeddings.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn open_with(path: impl AsRef<Path>, options: OpenOptions) -> Result<Self> {
        Self::new(Opened::new(path.as_ref(), &options)?, &options)
    }

    pub(super) fn new(opened: Opened, options: &OpenOptions) -> Result<Self> {
        let texts = match (&opened, options.texts) {
            (Opened::Texts(..), _) | (_, None) => None,
            (_, Some(path)) => Some(TextLines::open(path)?),
        };
        Ok(Self {
            opened,
            texts,
            index: 0,
            buffer: SampleBuffer::default(),
            failed: false,
        })
    }

    /// Number of samples, where the format tells it beforehand: not for JSON lines.
    #[must_use]
    pub fn samples(&self) -> Option<usize> {
        match &self.opened {
            Opened::Efb(file) => Some(file.len()),
            Opened::Tensors(file) => Some(file.len()),
            Opened::Texts(_, embeddings) => Some(embeddings.rows.rows),
            Opened::Lines(_) => None,
        }
    }

    /// The file of embeddings, if they lie beside texts; all records must have been read.
    pub(super) fn into_embeddings(self) -> Option<Embeddings> {
        match self.opened {
            Opened::Texts(_, embeddings) => Some(embeddings),
            _ => None,
        }
    }

    /// The error for something wrong with the record that was read last.
    pub(super) fn fail(&self, reason: impl std::fmt::Display) -> Error {
        let before = self.index.saturating_sub(1);
        match &self.opened {
            Opened::Lines(lines) => lines.fail_here(reason),
            Opened::Texts(lines, _) => lines.fail(0, reason),
            Opened::Efb(file) => {
                let reason = format!("sample {before}: {reason}");
                file.file().fail(file.start(before), reason)
            }
            Opened::Tensors(file) => file.file().fail(0, format!("sample {before}: {reason}")),
        }
    }

    fn read(&mut self) -> Result<Option<Record>> {
        let index = self.index;
        let record = match &mut self.opened {
            Opened::Lines(lines) => lines.read()?,
            Opened::Efb(file) if index < file.len() => {
                file.read(index, true, &mut self.buffer)?;
                Some(Record::from_sample(&self.buffer.sample))
            }
            Opened::Tensors(file) if index < file.len() => {
                file.read(index, true, &mut self.buffer)?;
                Some(Record::from_sample(&self.buffer.sample))
            }
            Opened::Texts(lines, embeddings) => {
                let (file, rows) = (&embeddings.file, &embeddings.rows);
                let Some(text) = next_line(lines, index, rows.rows, file.path())? else {
                    return Ok(None);
                };
                let SampleBuffer { sample, bytes } = &mut self.buffer;
                rows.read(file, index, bytes, &mut sample.target)?;
                Some(Record {
                    text: Some(text),
                    input_ids: None,
                    attention_mask: None,
                    target: sample.target.clone(),
                })
            }
            Opened::Efb(_) | Opened::Tensors(_) => None,
        };
        let Some(texts) = &mut self.texts else {
            self.index += usize::from(record.is_some());
            return Ok(record);
        };
        let Some(mut record) = record else {
            next_line(texts, index, index, Path::new("the dataset"))?;
            return Ok(None);
        };
        record.text = next_line(texts, index, usize::MAX, Path::new("the dataset"))?;
        if record.text.is_none() {
            let reason = "the file ends, but the dataset has more samples";
            return Err(texts.fail(0, reason));
        }
        self.index += 1;
        Ok(Some(record))
    }
}

/// The next of `count` lines, which belong to the rows of another file; `None` after the last.
fn next_line(
    lines: &mut TextLines,
    index: usize,
    count: usize,
    other: &Path,
) -> Result<Option<String>> {
    let line = lines.read()?;
    let other = other.display();
    match line {
        Some(_) if index == count => {
            Err(lines.fail(0, format!("one text too many: {other} has {count} samples")))
        }
        None if index < count && count != usize::MAX => {
            let texts = lines.number();
            Err(lines.fail(
                0,
                format!("{texts} texts, but {other} has {count} embeddings"),
            ))
        }
        line => Ok(line),
    }
}

impl Iterator for Records {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let record = self.read();
        self.failed = record.is_err();
        record.transpose()
    }
}
