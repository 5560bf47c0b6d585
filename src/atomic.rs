//! A file that appears under its name only when it is complete.

use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::error::{Error, Result};

/// Written beside its destination; [`commit`](Self::commit) moves it there, dropping it removes it.
pub(crate) struct AtomicFile {
    path: PathBuf,
    file: BufWriter<NamedTempFile>,
}

impl AtomicFile {
    pub(crate) fn create(path: &Path) -> Result<Self> {
        // The same directory, since a rename is atomic only within one file system.
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let mut builder = tempfile::Builder::new();
        // Temporary files are private to their owner; this one becomes an ordinary file, as the umask has it.
        #[cfg(unix)]
        let permissions =
            <std::fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o666);
        #[cfg(unix)]
        builder.permissions(permissions);
        let file = builder
            .tempfile_in(folder)
            .map_err(|error| Error::io(path, error))?;
        Ok(Self {
            path: path.to_owned(),
            file: BufWriter::new(file),
        })
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file
            .write_all(bytes)
            .map_err(|error| Error::io(&self.path, error))
    }

    /// Overwrites bytes written before.
    pub(crate) fn patch(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.file
            .seek(SeekFrom::Start(offset))
            .and_then(|_| self.file.write_all(bytes))
            .and_then(|()| self.file.seek(SeekFrom::End(0)))
            .map(|_| ())
            .map_err(|error| Error::io(&self.path, error))
    }

    pub(crate) fn commit(self) -> Result<()> {
        let Self { path, file } = self;
        let file = file
            .into_inner()
            .map_err(|error| Error::io(&path, error.into_error()))?;
        file.as_file()
            .sync_all()
            .map_err(|error| Error::io(&path, error))?;
        file.persist(&path)
            .map(|_| ())
            .map_err(|error| Error::io(&path, error.error))
    }
}
