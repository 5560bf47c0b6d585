//! Scalars as TensorBoard event files.
//!
//! A file is a sequence of records: length (u64), its checksum (u32), that many bytes, their checksum (u32), little-endian. The
//! checksum is CRC-32C, rotated and shifted as in TensorFlow's `crc32c::Mask`. The bytes are an `Event` as a protocol buffer
//! (`tensorflow/core/util/event.proto`), of which few fields are needed.

use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::{FlushTimer, Recorder};
use crate::error::{Error, Result};

/// What an event file must begin with.
const FILE_VERSION: &str = "brain.Event:2";

/// Fields of `Event`.
mod event {
    pub const WALL_TIME: u32 = 1;
    pub const STEP: u32 = 2;
    pub const FILE_VERSION: u32 = 3;
    pub const SUMMARY: u32 = 5;
    pub const SESSION_LOG: u32 = 7;
}

/// The field `value` of `Summary`, and the fields of `Summary.Value`.
mod summary {
    pub const VALUE: u32 = 1;
    pub const TAG: u32 = 1;
    pub const SIMPLE_VALUE: u32 = 2;
}

/// The field `status` of `SessionLog`, and its value `START`.
const STATUS: u32 = 1;
const START: u64 = 1;

/// Writes an event file that `tensorboard --logdir FOLDER` shows. Values are stored as f32, NaN and infinities included.
///
/// Records are written at most a second after they came, and by [`flush`](Recorder::flush) and drop.
#[derive(Debug)]
pub struct TensorBoard {
    path: PathBuf,
    file: BufWriter<File>,
    timer: FlushTimer,
}

impl TensorBoard {
    /// Starts an event file in a folder, which is created if it is not there. A folder is one run: use another folder for another
    /// training.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn create(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let fail = |error| Error::io(folder, error);
        fs::create_dir_all(folder).map_err(fail)?;
        let now = seconds();
        let process = std::process::id();
        // TensorBoard reads the files of a folder in the order of their names; a later file gets a larger name.
        for number in 0..u32::MAX {
            let name = format!("events.out.tfevents.{now:010.0}.{number:06}.{process}.energyflow");
            let prefix = format!("events.out.tfevents.{now:010.0}.{number:06}.");
            if starts(folder, &prefix).map_err(fail)? {
                continue;
            }
            let path = folder.join(name);
            let file = match OpenOptions::new().write(true).create_new(true).open(&path) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
                file => file.map_err(|error| Error::io(&path, error))?,
            };
            let mut board = Self {
                path,
                file: BufWriter::new(file),
                timer: FlushTimer::new(),
            };
            let mut message = Message::event(0);
            message.bytes(event::FILE_VERSION, FILE_VERSION.as_bytes());
            board.write(&message.0)?;
            board.flush()?;
            return Ok(board);
        }
        Err(fail(ErrorKind::AlreadyExists.into()))
    }

    /// [`create`](Self::create) for a training that is resumed after `step`: the file tells TensorBoard to leave out what earlier files
    /// have of later steps.
    ///
    /// # Errors
    /// As for [`create`](Self::create).
    pub fn resume(folder: impl AsRef<Path>, step: u64) -> Result<Self> {
        let mut board = Self::create(folder)?;
        let mut log = Message::default();
        log.integer(STATUS, START);
        let mut message = Message::event(step.saturating_add(1));
        message.bytes(event::SESSION_LOG, &log.0);
        board.write(&message.0)?;
        board.flush()?;
        Ok(board)
    }

    /// The event file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a record.
    fn write(&mut self, content: &[u8]) -> Result<()> {
        let length = (content.len() as u64).to_le_bytes();
        let parts: [&[u8]; 4] = [
            &length,
            &masked(crc32c(&length)).to_le_bytes(),
            content,
            &masked(crc32c(content)).to_le_bytes(),
        ];
        let due = self.timer.is_due();
        self.file
            .write_all(&parts.concat())
            .and_then(|()| if due { self.file.flush() } else { Ok(()) })
            .map_err(|error| Error::io(&self.path, error))
    }
}

impl Recorder for TensorBoard {
    fn scalars(&mut self, step: u64, scalars: &[(&str, f64)]) -> Result<()> {
        if scalars.is_empty() {
            return Ok(());
        }
        let mut values = Message::default();
        for (name, number) in scalars {
            let mut value = Message::default();
            value.bytes(summary::TAG, name.as_bytes());
            value.float(summary::SIMPLE_VALUE, *number as f32);
            values.bytes(summary::VALUE, &value.0);
        }
        let mut message = Message::event(step);
        message.bytes(event::SUMMARY, &values.0);
        self.write(&message.0)
    }

    fn flush(&mut self) -> Result<()> {
        let flushed = self.file.flush();
        flushed.map_err(|error| Error::io(&self.path, error))
    }
}

/// Whether a folder has a file whose name starts so.
fn starts(folder: &Path, prefix: &str) -> std::io::Result<bool> {
    let mut entries = fs::read_dir(folder)?;
    Ok(entries.any(|entry| {
        entry.is_ok_and(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
    }))
}

/// Seconds since 1970.
fn seconds() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default().as_secs_f64()
}

/// A protocol buffer: fields in the order of the calls.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    const VARINT: u32 = 0;
    const FIXED_64: u32 = 1;
    const LENGTH: u32 = 2;
    const FIXED_32: u32 = 5;

    /// An `Event` of now.
    fn event(step: u64) -> Self {
        let mut message = Self::default();
        message.key(event::WALL_TIME, Self::FIXED_64);
        message.0.extend(seconds().to_le_bytes());
        message.integer(event::STEP, step);
        message
    }

    fn key(&mut self, field: u32, kind: u32) {
        self.varint(u64::from(field << 3 | kind));
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn integer(&mut self, field: u32, value: u64) {
        self.key(field, Self::VARINT);
        self.varint(value);
    }

    fn float(&mut self, field: u32, value: f32) {
        self.key(field, Self::FIXED_32);
        self.0.extend(value.to_le_bytes());
    }

    fn bytes(&mut self, field: u32, bytes: &[u8]) {
        self.key(field, Self::LENGTH);
        self.varint(bytes.len() as u64);
        self.0.extend(bytes);
    }
}

/// CRC-32C (Castagnoli) of each byte, reflected.
const TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            let low = crc & 1;
            crc >>= 1;
            if low == 1 {
                crc ^= 0x82f6_3b78;
            }
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| crc >> 8 ^ TABLE[(crc as u8 ^ byte) as usize];
    !bytes.iter().fold(!0, step)
}

fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_the_definition() {
        // RFC 3720, appendix B.4.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(b""), 0);
    }

    #[test]
    fn numbers_are_encoded_as_protocol_buffers_are() {
        let mut message = Message::default();
        message.integer(1, 150);
        message.bytes(2, b"testing");
        message.integer(16, u64::MAX);
        let expected =
            b"\x08\x96\x01\x12\x07testing\x80\x01\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01";
        assert_eq!(message.0, expected);
    }

    #[test]
    fn later_files_of_a_folder_have_larger_names() {
        let folder = tempfile::tempdir().unwrap();
        let mut before = PathBuf::new();
        for step in 0..3 {
            let board = TensorBoard::resume(folder.path(), step).unwrap();
            assert!(board.path() > before.as_path());
            board.path().clone_into(&mut before);
        }
    }
}
