//! Scalars as JSON lines: `{"step":12,"train/loss":0.5}`.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::{FlushTimer, Recorder};
use crate::error::{Error, Result};
use crate::file::{InputFile, Sequential, open_log};

const STEP: &str = "step";

/// Upper bound on the length of a line in bytes.
const MAX_LINE: u64 = 1 << 20;

/// Appends one JSON object per call to a file: the step, then the scalars by name. NaN and infinities are `null`.
///
/// Lines are written at most a second after they were recorded, and by [`flush`](Recorder::flush) and drop.
#[derive(Debug)]
pub struct JsonLinesLog {
    path: PathBuf,
    file: BufWriter<File>,
    timer: FlushTimer,
}

impl JsonLinesLog {
    /// Starts an empty file; one that is there is overwritten.
    ///
    /// # Errors
    /// [`Error::Io`], also for a directory or a special file.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let file = open_log(path.as_ref())?;
        Self::start(path.as_ref(), file, 0)
    }

    /// Continues the file of a training that is resumed after `step`. Lines of later steps, and a last line that was cut off, are
    /// removed. A file that is not there is created.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] with line number and offset for a line that is not of this format, and then the file stays as it
    /// was.
    pub fn resume(path: impl AsRef<Path>, step: u64) -> Result<Self> {
        let path = path.as_ref();
        let file = open_log(path)?;
        let mut end = 0;
        scan(path, |line| {
            let keep = line.complete && line.step <= step;
            if keep {
                end = line.end;
            }
            keep
        })?;
        Self::start(path, file, end)
    }

    fn start(path: &Path, mut file: File, end: u64) -> Result<Self> {
        file.set_len(end)
            .and_then(|()| file.seek(SeekFrom::Start(end)))
            .map_err(|error| Error::io(path, error))?;
        Ok(Self {
            path: path.to_owned(),
            file: BufWriter::new(file),
            timer: FlushTimer::new(),
        })
    }
}

impl Recorder for JsonLinesLog {
    /// # Errors
    /// [`Error::Data`] for a scalar that is called `step`; [`Error::Io`].
    fn scalars(&mut self, step: u64, scalars: &[(&str, f64)]) -> Result<()> {
        let mut line = format!("{{\"{STEP}\":{step}");
        for (name, value) in scalars {
            if *name == STEP {
                return Err(Error::Data {
                    name: STEP.into(),
                    reason: "the number of the step has this name".into(),
                });
            }
            // NaN and infinities become null.
            line += &format!(",{}:{}", Value::from(*name), Value::from(*value));
        }
        line += "}\n";
        let due = self.timer.is_due();
        self.file
            .write_all(line.as_bytes())
            .and_then(|()| if due { self.file.flush() } else { Ok(()) })
            .map_err(|error| Error::io(&self.path, error))
    }

    fn flush(&mut self) -> Result<()> {
        let flushed = self.file.flush();
        flushed.map_err(|error| Error::io(&self.path, error))
    }
}

/// Reads what a [`JsonLinesLog`] has written, in order: step, name, value. `null` is NaN.
///
/// A last line without a line end was cut off; it is left out.
///
/// # Errors
/// [`Error::Io`]; [`Error::Format`] with line number and offset.
pub fn read_json_lines(path: impl AsRef<Path>, mut each: impl FnMut(u64, &str, f64)) -> Result<()> {
    scan(path.as_ref(), |line| {
        for (name, value) in line.scalars.iter().filter(|_| line.complete) {
            each(line.step, name, value.as_f64().unwrap_or(f64::NAN));
        }
        true
    })
}

struct Line {
    step: u64,
    scalars: Map<String, Value>,
    /// Where the next line starts.
    end: u64,
    /// Whether it has a line end.
    complete: bool,
}

/// Shows the lines in order to `each` while it returns true.
fn scan(path: &Path, mut each: impl FnMut(&Line) -> bool) -> Result<()> {
    let mut reader = BufReader::new(Sequential::new(InputFile::open(path)?));
    let (mut end, mut number) = (0, 0);
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        let read = (&mut reader)
            .take(MAX_LINE + 1)
            .read_until(b'\n', &mut bytes)
            .map_err(|error| reader.get_ref().error(error))?;
        if read == 0 {
            return Ok(());
        }
        let start = end;
        end += read as u64;
        number += 1;
        let complete = bytes.ends_with(b"\n");
        let fail = |reason: String| {
            let reason = format!("line {number}: {reason}");
            Err(reader.get_ref().file().fail(start, reason))
        };
        if read as u64 > MAX_LINE {
            return fail(format!("longer than {MAX_LINE} bytes"));
        }
        if !complete {
            log::warn!("{}: line {number} is cut off and left out", path.display());
        } else if bytes.trim_ascii().is_empty() {
            continue;
        }
        let (step, scalars) = match parse(&bytes) {
            Ok(line) => line,
            Err(_) if !complete => (0, Map::new()),
            Err(reason) => return fail(reason),
        };
        let line = Line {
            step,
            scalars,
            end,
            complete,
        };
        if !each(&line) {
            return Ok(());
        }
    }
}

/// Step and scalars of a line.
fn parse(bytes: &[u8]) -> Result<(u64, Map<String, Value>), String> {
    let mut scalars: Map<String, Value> =
        serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    let step = scalars.remove(STEP);
    let step = step.as_ref().and_then(Value::as_u64);
    let step = step.ok_or_else(|| format!("no whole number {STEP:?}: not a log of a training"))?;
    match scalars
        .iter()
        .find(|(_, value)| !value.is_number() && !value.is_null())
    {
        Some((name, _)) => Err(format!("{name:?} is neither a number nor null")),
        None => Ok((step, scalars)),
    }
}
