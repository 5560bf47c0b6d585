//! A teacher's embeddings of a text file, kept in a file.

use std::cell::Cell;
use std::path::{Path, PathBuf};

use safetensors::Dtype;

use super::dataset_writer::EmbeddingType;
use super::embeddings::Embeddings;
use super::npy::encode as encode_row;
use super::text_file::TextFile;
use crate::error::{Error, Result};
use crate::file::{AtomicFile, TensorFile, TensorStream, stream_tensors};
use crate::fnv::Fnv;
use crate::types::DType;

const FORMAT: &str = "teacher_cache";
const VERSION: u32 = 1;

/// Entries of the header: what the embeddings are of.
const TEXTS: &str = "texts";
const TEACHER: &str = "teacher";

const EMBEDDINGS: &str = "embeddings";
/// FNV-1a of the bytes of the embeddings, little-endian.
const CHECKSUM: &str = "checksum";

/// Lines that are embedded at a time; less if they are long.
const LINES: usize = 8192;
/// Bytes of such lines, up to one line more.
const TEXT: usize = 1 << 24;
/// Bytes that are read at a time.
const WINDOW: u64 = 1 << 20;

/// A teacher's embeddings of all lines of a text file, in a safetensors file of their own. Its header says which texts and which teacher they
/// are of, so that they are made only once, and made again when either has changed.
///
/// ```no_run
/// use std::path::Path;
///
/// use energyflow::text::{CacheState, EmbeddingType, TeacherCache, TextEncoder, TextFile, fingerprint};
/// use energyflow::{Gpu, GpuOptions};
///
/// # fn main() -> energyflow::Result<()> {
/// let gpu = Gpu::new(&GpuOptions::default())?;
/// let teacher = TextEncoder::load(&gpu, "out/model")?;
/// let texts = TextFile::open("texts.txt")?;
/// let source = fingerprint(&["out/model/config.json", "out/model/model.safetensors"])?;
/// let cache = TeacherCache::new("texts.txt.teacher.safetensors", &texts, &source);
/// if cache.state()? != CacheState::Whole {
///     let encode = |lines: &[String]| teacher.encode(lines);
///     cache.write(&texts, teacher.width(), EmbeddingType::F16, encode, |_| ())?;
/// }
/// let dataset = texts.dataset(cache.path(), teacher.tokenizer())?;
/// assert_eq!(dataset.len(), texts.lines());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TeacherCache {
    path: PathBuf,
    texts: String,
    teacher: String,
    lines: usize,
}

/// What a [`TeacherCache`] finds under its name.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CacheState {
    /// The embeddings of these texts by this teacher.
    Whole,
    /// Nothing.
    Missing,
    /// Embeddings of other texts.
    OtherTexts,
    /// Embeddings of another teacher, or with other settings.
    OtherTeacher,
    /// A file that is no cache, or one that was changed after it was written. The reason names the file.
    Damaged(String),
}

impl TeacherCache {
    /// The cache of these texts in the file `path`. `teacher` names everything else that the embeddings depend on: a
    /// [`fingerprint`](super::fingerprint) of the teacher's files, and its settings.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>, texts: &TextFile, teacher: &str) -> Self {
        Self {
            path: path.into(),
            texts: format!("{:016x}", texts.fingerprint()),
            teacher: teacher.to_owned(),
            lines: texts.lines(),
        }
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the file, and says what it is.
    ///
    /// # Errors
    /// [`Error::Io`] for a file that is there and cannot be read.
    pub fn state(&self) -> Result<CacheState> {
        match self.look() {
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                Ok(CacheState::Missing)
            }
            Err(error @ Error::Format { .. }) => Ok(CacheState::Damaged(error.to_string())),
            state => state,
        }
    }

    fn look(&self) -> Result<CacheState> {
        let tensors = TensorFile::open(&self.path)?;
        let file = tensors.file();
        if tensors.version(FORMAT, VERSION)?.is_none() {
            return Err(file.fail(0, "the file is no cache of a teacher's embeddings"));
        }
        if tensors.metadata(TEXTS) != Some(&*self.texts) {
            return Ok(CacheState::OtherTexts);
        }
        if tensors.metadata(TEACHER) != Some(&*self.teacher) {
            return Ok(CacheState::OtherTeacher);
        }
        let place = |name: &str| {
            let place = tensors.tensors().get(name);
            place.ok_or_else(|| file.fail(0, format!("the tensor {name:?} is missing")))
        };
        let (embeddings, checksum) = (place(EMBEDDINGS)?, place(CHECKSUM)?);
        if embeddings.shape.first() != Some(&self.lines) {
            let reason = format!("{:?} embeddings of {} lines", embeddings.shape, self.lines);
            return Err(file.fail(embeddings.bytes.start, reason));
        }
        let mut hash = Fnv::new();
        let mut bytes = Vec::new();
        let mut offset = embeddings.bytes.start;
        while offset < embeddings.bytes.end {
            let length = WINDOW.min(embeddings.bytes.end - offset);
            file.resize(offset, length, EMBEDDINGS, &mut bytes)?;
            file.read_at(offset, &mut bytes, EMBEDDINGS)?;
            hash = hash.write(&bytes);
            offset += length;
        }
        match tensors.read(CHECKSUM, checksum)? == hash.finish().to_le_bytes() {
            true => Ok(CacheState::Whole),
            false => Err(file.fail(
                checksum.bytes.start,
                "the checksum does not fit the embeddings",
            )),
        }
    }

    /// Embeds all texts, and writes the file whole or not at all; a file that is there is replaced. Blank lines become zeros. `encode` is given
    /// some texts at a time and returns as many embeddings of `width` values. `progress` hears how many lines are done.
    ///
    /// Returns how many texts did not fit the teacher's length and were cut.
    ///
    /// # Errors
    /// [`Error::Data`] for embeddings of another number, width, or with values that do not fit `store`, and for texts that have changed since
    /// [`TextFile::open`]; those of `encode`; [`Error::Io`].
    pub fn write(
        &self,
        texts: &TextFile,
        width: usize,
        store: EmbeddingType,
        mut encode: impl FnMut(&[String]) -> Result<Embeddings>,
        mut progress: impl FnMut(usize),
    ) -> Result<usize> {
        let (dtype, bits) = match store {
            EmbeddingType::F32 => (DType::F32, Dtype::F32),
            EmbeddingType::F16 => (DType::F16, Dtype::F16),
            EmbeddingType::Int8 => {
                return Err(Error::Config {
                    field: "store",
                    reason: "is Int8, but a cache holds F16 or F32".into(),
                });
            }
        };
        let cut = Cell::new(0);
        let checksum = Cell::new(0);
        let write_embeddings = |file: &mut AtomicFile| {
            let mut hash = Fnv::new();
            let mut all = Fnv::new();
            let mut lines = texts.read()?;
            let mut bytes = Vec::new();
            let mut done = 0;
            loop {
                let (mut window, mut size) = (Vec::new(), 0);
                while window.len() < LINES && size < TEXT {
                    let Some(line) = lines.next().transpose()? else {
                        break;
                    };
                    size += line.len();
                    window.push(line);
                }
                if window.is_empty() {
                    break;
                }
                for line in &window {
                    all = all.write(line.as_bytes()).write(b"\n");
                }
                let is_text = |line: &&String| !line.trim().is_empty();
                let asked: Vec<String> = window.iter().filter(is_text).cloned().collect();
                let embeddings = encode(&asked)
                    .map_err(|error| within(texts, [done + 1, done + window.len()], error))?;
                if embeddings.len() != asked.len() || embeddings.width() != width {
                    return Err(Error::Data {
                        name: EMBEDDINGS.into(),
                        reason: format!(
                            "the teacher gave [{}, {}] for {} texts, not [{}, {width}]",
                            embeddings.len(),
                            embeddings.width(),
                            asked.len(),
                            asked.len()
                        ),
                    });
                }
                cut.set(cut.get() + embeddings.truncated().len());
                let zeros = vec![0.0; width];
                let mut rows = embeddings.iter();
                for (number, line) in window.iter().enumerate() {
                    let row = match is_text(&line) {
                        true => rows.next().unwrap_or(&zeros),
                        false => &zeros,
                    };
                    encode_row(row, dtype, &mut bytes).map_err(|reason| Error::Data {
                        name: EMBEDDINGS.into(),
                        reason: format!(
                            "{}: line {}: {reason}",
                            texts.path().display(),
                            done + number + 1
                        ),
                    })?;
                    hash = hash.write(&bytes);
                    file.write(&bytes)?;
                }
                done += window.len();
                progress(done);
            }
            if all.finish() != texts.fingerprint() {
                return Err(Error::Data {
                    name: TEXTS.into(),
                    reason: format!("{} has changed while it was read", texts.path().display()),
                });
            }
            checksum.set(hash.finish());
            Ok(())
        };
        let write_checksum = |file: &mut AtomicFile| file.write(&checksum.get().to_le_bytes());
        let tensors = vec![
            TensorStream {
                name: EMBEDDINGS.into(),
                dtype: bits,
                shape: vec![texts.lines(), width],
                write: Box::new(write_embeddings),
            },
            // Bytes come after wider elements.
            TensorStream {
                name: CHECKSUM.into(),
                dtype: Dtype::U8,
                shape: vec![8],
                write: Box::new(write_checksum),
            },
        ];
        let header = [(TEXTS, &*self.texts), (TEACHER, &*self.teacher)];
        let file = AtomicFile::create(&self.path)?;
        stream_tensors(file, (FORMAT, VERSION), &header, tensors)?;
        Ok(cut.get())
    }
}

/// An error of the teacher, which knows only the texts of the lines that it was given.
fn within(texts: &TextFile, [first, last]: [usize; 2], error: Error) -> Error {
    let place = format!(
        "{}, lines {first} to {last} without blank ones",
        texts.path().display()
    );
    match error {
        Error::Data { name, reason } => Error::Data {
            name,
            reason: format!("{place}: {reason}"),
        },
        Error::Tokenizer(reason) => Error::Tokenizer(format!("{place}: {reason}")),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lines_are_embedded_a_few_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        let line = "long text ".repeat(900_000);
        std::fs::write(&path, format!("{line}\n").repeat(3)).unwrap();
        let texts = TextFile::open(&path).unwrap();
        let cache = TeacherCache::new(folder.path().join("cache"), &texts, "one");
        let mut sizes = Vec::new();
        let encode = |lines: &[String]| {
            sizes.push(lines.len());
            Ok(Embeddings::new(vec![0.5; lines.len()], 1, Vec::new()))
        };
        cache
            .write(&texts, 1, EmbeddingType::F16, encode, |_| ())
            .unwrap();
        assert_eq!(sizes, [2, 1]);
        assert_eq!(cache.state().unwrap(), CacheState::Whole);
    }

    /// Three values that depend on the text.
    fn embed(lines: &[String]) -> Embeddings {
        let row = |line: &String| [line.len() as f32, 0.5, -(line.len() as f32) / 3.0];
        Embeddings::new(lines.iter().flat_map(row).collect(), 3, Vec::new())
    }

    #[test]
    fn what_was_embedded_is_not_embedded_again() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let content: String = (0..LINES + 3)
            .map(|i| match i % 1000 {
                7 => " \n".to_owned(),
                _ => format!("text {i}\n"),
            })
            .collect();
        std::fs::write(at("a.txt"), content).unwrap();
        let texts = TextFile::open(at("a.txt")).unwrap();
        assert_eq!((texts.lines(), texts.texts()), (LINES + 3, LINES - 6));
        let cache = TeacherCache::new(at("a.cache"), &texts, "one");
        assert_eq!(cache.state().unwrap(), CacheState::Missing);
        let mut seen = Vec::new();
        let mut calls = 0;
        let encode = |lines: &[String]| {
            calls += 1;
            assert!(lines.iter().all(|line| line.starts_with("text ")));
            Ok(embed(lines))
        };
        cache
            .write(&texts, 3, EmbeddingType::F32, encode, |done| {
                seen.push(done)
            })
            .unwrap();
        assert_eq!((calls, seen), (2, vec![LINES, LINES + 3]));
        assert_eq!(cache.state().unwrap(), CacheState::Whole);
        let tokenizer = crate::text::Whitespace::new(["text"], 8).unwrap();
        let dataset = texts.dataset(cache.path(), &tokenizer).unwrap();
        for (index, target) in [
            (0, [6.0, 0.5, -2.0]),
            (7, [0.0; 3]),
            (LINES + 2, [9.0, 0.5, -3.0]),
        ] {
            assert_eq!(dataset.sample(index).unwrap().target(), target);
        }
        // Another teacher, other texts.
        let other = TeacherCache::new(at("a.cache"), &texts, "two");
        assert_eq!(other.state().unwrap(), CacheState::OtherTeacher);
        std::fs::write(at("b.txt"), "text 0\n").unwrap();
        let others = TextFile::open(at("b.txt")).unwrap();
        let other = TeacherCache::new(at("a.cache"), &others, "one");
        assert_eq!(other.state().unwrap(), CacheState::OtherTexts);
    }

    #[test]
    fn damage_is_seen_and_failures_leave_the_file_as_it_was() {
        type Encode<'a> = &'a dyn Fn(&[String]) -> Result<Embeddings>;
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("a.txt"), "one\n\ntwo two").unwrap();
        let texts = TextFile::open(at("a.txt")).unwrap();
        let cache = TeacherCache::new(at("cache"), &texts, "teacher");
        let write = |encode: Encode<'_>| cache.write(&texts, 3, EmbeddingType::F16, encode, |_| ());
        write(&|lines| Ok(embed(lines))).unwrap();
        let whole = std::fs::read(at("cache")).unwrap();
        let failures: [(Encode<'_>, &str); 4] = [
            (
                &|_| Err(Error::Tokenizer("text 1: bad".into())),
                "lines 1 to 3",
            ),
            (&|lines| Ok(embed(&lines[1..])), "[1, 3] for 2 texts"),
            (
                &|_| Ok(Embeddings::new(vec![1.0; 4], 2, Vec::new())),
                "[2, 2] for 2 texts",
            ),
            (
                &|_| Ok(Embeddings::new(vec![1e6; 6], 3, Vec::new())),
                "line 1: the value 1000000 does not fit f16",
            ),
        ];
        for (encode, word) in failures {
            let error = write(encode).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
            assert_eq!(std::fs::read(at("cache")).unwrap(), whole);
        }
        let names = std::fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(names, 2, "nothing is left behind");
        // Every byte of embeddings and checksum counts, and the length.
        let start = whole.len() - 3 * 3 * 2 - 8;
        for at_byte in start..whole.len() {
            let mut bytes = whole.clone();
            bytes[at_byte] ^= 1;
            std::fs::write(at("cache"), bytes).unwrap();
            let state = cache.state().unwrap();
            assert!(
                matches!(state, CacheState::Damaged(_)),
                "{at_byte}: {state:?}"
            );
        }
        for bytes in [&whole[..whole.len() - 1], b"", b"no such thing"] {
            std::fs::write(at("cache"), bytes).unwrap();
            let state = cache.state().unwrap();
            assert!(matches!(state, CacheState::Damaged(_)), "{state:?}");
        }
        // The texts change while they are embedded.
        std::fs::write(at("a.txt"), "one\n\ntwo three").unwrap();
        let error = write(&|lines| Ok(embed(lines))).unwrap_err().to_string();
        assert!(error.contains("has changed"), "{error}");
    }
}
