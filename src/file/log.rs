//! A file that grows by lines or records while a program runs.

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::path::Path;

use super::input::not_regular;
use crate::error::{Error, Result};

/// Opens a regular file for reading and writing, and creates it if it is not there. What it holds stays.
///
/// # Errors
/// [`Error::Io`], also for a directory, a device, a pipe or a socket.
pub(crate) fn open_log(path: &Path) -> Result<File> {
    let open = || {
        match fs::metadata(path) {
            Ok(metadata) if !metadata.is_file() => return Err(not_regular(&metadata)),
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.open(path)?;
        // Again, because the path may name another file by now.
        let metadata = file.metadata()?;
        match metadata.is_file() {
            true => Ok(file),
            false => Err(not_regular(&metadata)),
        }
    };
    open().map_err(|error| Error::io(path, error))
}
