//! A regular file that is read by position.

use std::fs::{self, File, Metadata};
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// An open regular file of the length that it had when it was opened.
///
/// Every read copies bytes out of the file. If another process truncates the file, reads fail with an error; nothing is mapped into
/// memory. Reads take `&self` and may run on several threads at once.
#[derive(Debug)]
pub(crate) struct InputFile {
    path: PathBuf,
    file: File,
    len: u64,
    /// The whole content, or nothing: see [`hold`](Self::hold).
    held: Vec<u8>,
}

impl InputFile {
    /// Opens a regular file. Symbolic links are followed.
    ///
    /// # Errors
    /// [`Error::Io`], also for a directory, a device, a pipe or a socket: those may be endless or block.
    pub fn open(path: &Path) -> Result<Self> {
        let fail = |error| Error::io(path, error);
        // Checked before opening, because opening a pipe blocks until its other end is opened.
        check_regular(&fs::metadata(path).map_err(fail)?).map_err(fail)?;
        let file = File::open(path).map_err(fail)?;
        // Checked again, because the path may name another file by now.
        let metadata = file.metadata().map_err(fail)?;
        check_regular(&metadata).map_err(fail)?;
        Ok(Self {
            path: path.to_owned(),
            file,
            len: metadata.len(),
            held: Vec::new(),
        })
    }

    /// A file that has no name, because it is temporary; errors call it `path`.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn temporary(file: File, path: &Path) -> Result<Self> {
        let metadata = file.metadata().map_err(|error| Error::io(path, error))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            len: metadata.len(),
            held: Vec::new(),
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length in bytes when the file was opened.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Reads the whole content into memory if it has at most `limit` bytes. Reads then take no system call each.
    ///
    /// # Errors
    /// As [`read_vec`](Self::read_vec).
    pub fn hold(&mut self, limit: u64) -> Result<()> {
        if self.len <= limit {
            self.held = self.read_vec(0, self.len, "the file")?;
        }
        Ok(())
    }

    /// The error for something wrong at a byte offset.
    pub fn fail(&self, offset: u64, reason: impl Into<String>) -> Error {
        Error::Format {
            path: self.path.clone(),
            offset,
            reason: reason.into(),
        }
    }

    /// Checks that `length` bytes at `offset` lie in the file; the error calls them `what`.
    pub fn check_range(&self, offset: u64, length: u64, what: &str) -> Result<()> {
        match offset.checked_add(length) {
            Some(end) if end <= self.len => Ok(()),
            _ => {
                let reason = format!(
                    "{what} takes {length} bytes from here, but the file ends at byte {}",
                    self.len
                );
                Err(self.fail(offset.min(self.len), reason))
            }
        }
    }

    /// Fills `bytes` from `offset`.
    ///
    /// # Errors
    /// [`Error::Format`] if the file has fewer bytes, or has become shorter; [`Error::Io`].
    pub fn read_at(&self, offset: u64, bytes: &mut [u8], what: &str) -> Result<()> {
        self.check_range(offset, bytes.len() as u64, what)?;
        if !self.held.is_empty() {
            // Both ends lie in the file, which is in memory, hence a usize.
            let start = offset as usize;
            bytes.copy_from_slice(&self.held[start..start + bytes.len()]);
            return Ok(());
        }
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            match read_some(&self.file, &mut bytes[done..], at) {
                Ok(0) => return Err(self.shrunk(at)),
                Ok(read) => done += read,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io(&self.path, error)),
            }
        }
        Ok(())
    }

    /// `length` bytes at `offset`. Allocates nothing if the file does not have them.
    ///
    /// # Errors
    /// As [`read_at`](Self::read_at); [`Error::Io`] if there is no memory for them.
    pub fn read_vec(&self, offset: u64, length: u64, what: &str) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.resize(offset, length, what, &mut bytes)?;
        self.read_at(offset, &mut bytes, what)?;
        Ok(bytes)
    }

    /// Makes room in a buffer that is used again for `length` bytes at `offset`.
    ///
    /// # Errors
    /// As [`read_vec`](Self::read_vec).
    pub fn resize(&self, offset: u64, length: u64, what: &str, bytes: &mut Vec<u8>) -> Result<()> {
        self.check_range(offset, length, what)?;
        let no_memory = || Error::io(&self.path, ErrorKind::OutOfMemory.into());
        let length = usize::try_from(length).map_err(|_| no_memory())?;
        let more = length.saturating_sub(bytes.len());
        bytes.try_reserve_exact(more).map_err(|_| no_memory())?;
        bytes.resize(length, 0);
        Ok(())
    }

    /// The whole file, if it has at most `limit` bytes.
    ///
    /// # Errors
    /// As [`read_vec`](Self::read_vec); [`Error::Format`] for a longer file.
    pub fn read_all(&self, limit: u64) -> Result<Vec<u8>> {
        if self.len > limit {
            let reason = format!("the file has {} bytes, at most {limit} are read", self.len);
            return Err(self.fail(limit, reason));
        }
        self.read_vec(0, self.len, "the file")
    }

    fn shrunk(&self, at: u64) -> Error {
        let reason = format!(
            "the file ends here or before, but had {} bytes when it was opened",
            self.len
        );
        self.fail(at, reason)
    }
}

/// Reads an [`InputFile`] from its start to the length that it had when it was opened.
///
/// An `io::Error` that it returns may hold an [`Error`]: see [`Sequential::error`].
#[derive(Debug)]
pub(crate) struct Sequential<F> {
    file: F,
    at: u64,
}

impl<F: std::borrow::Borrow<InputFile>> Sequential<F> {
    pub fn new(file: F) -> Self {
        Self { file, at: 0 }
    }

    pub fn file(&self) -> &InputFile {
        self.file.borrow()
    }

    /// What went wrong, from an error that this reader returned.
    pub fn error(&self, error: io::Error) -> Error {
        match error.downcast() {
            Ok(error) => error,
            Err(error) => Error::io(self.file().path(), error),
        }
    }
}

impl<F: std::borrow::Borrow<InputFile>> Read for Sequential<F> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let file = self.file.borrow();
        let rest = usize::try_from(file.len - self.at).unwrap_or(usize::MAX);
        let wanted = bytes.len().min(rest);
        if wanted == 0 {
            return Ok(0);
        }
        if !file.held.is_empty() {
            bytes[..wanted].copy_from_slice(&file.held[self.at as usize..][..wanted]);
            self.at += wanted as u64;
            return Ok(wanted);
        }
        match read_some(&file.file, &mut bytes[..wanted], self.at)? {
            0 => Err(io::Error::other(file.shrunk(self.at))),
            read => {
                self.at += read as u64;
                Ok(read)
            }
        }
    }
}

#[cfg(unix)]
fn read_some(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, bytes, offset)
}

#[cfg(windows)]
fn read_some(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, bytes, offset)
}

fn check_regular(metadata: &Metadata) -> io::Result<()> {
    if metadata.is_file() {
        return Ok(());
    }
    Err(not_regular(metadata))
}

/// The error for a directory, a device, a pipe or a socket.
pub(super) fn not_regular(metadata: &Metadata) -> io::Error {
    match metadata.is_dir() {
        true => io::Error::new(ErrorKind::IsADirectory, "is a directory, not a file"),
        false => io::Error::new(
            ErrorKind::InvalidInput,
            "is not a regular file, but a device, pipe or socket",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shrinking(shrink: impl FnOnce(&File)) -> InputFile {
        let temp = tempfile::NamedTempFile::new().unwrap();
        fs::write(temp.path(), [7; 100]).unwrap();
        let file = InputFile::open(temp.path()).unwrap();
        shrink(temp.as_file());
        file
    }

    #[test]
    fn a_file_that_shrinks_gives_an_error_with_the_offset() {
        let file = shrinking(|file| file.set_len(40).unwrap());
        let mut bytes = [0; 60];
        file.read_at(10, &mut bytes[..30], "x").unwrap();
        let error = file.read_at(20, &mut bytes, "x").unwrap_err();
        assert!(
            matches!(&error, Error::Format { offset: 40, .. }),
            "{error}"
        );
        let mut reader = Sequential::new(&file);
        let error = io::copy(&mut reader, &mut io::sink()).unwrap_err();
        let error = reader.error(error);
        assert!(
            matches!(&error, Error::Format { offset: 40, .. }),
            "{error}"
        );
    }

    #[test]
    fn a_file_that_grows_is_read_as_it_was() {
        let file = shrinking(|file| file.set_len(200).unwrap());
        assert_eq!(file.read_all(1000).unwrap(), [7; 100]);
        let mut all = Vec::new();
        Sequential::new(&file).read_to_end(&mut all).unwrap();
        assert_eq!(all, [7; 100]);
    }

    #[test]
    fn absurd_ranges_allocate_nothing() {
        let file = shrinking(|_| ());
        for (offset, length) in [(0, 101), (101, 0), (u64::MAX, 1), (1, u64::MAX)] {
            let error = file.read_vec(offset, length, "x").unwrap_err();
            assert!(matches!(&error, Error::Format { .. }), "{error}");
        }
        assert!(matches!(file.read_all(99), Err(Error::Format { .. })));
    }
}
