//! A file that appears under its name only when it is complete.

use std::ffi::OsStr;
use std::fs::{self, Metadata, OpenOptions, TryLockError};
use std::io::{self, BufWriter, ErrorKind, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use tempfile::{Builder, NamedTempFile};

use super::input::not_regular;
use crate::error::{Error, Result};

/// Temporary files are called `.energyflow-PROCESS-RANDOM.tmp`.
const PREFIX: &str = ".energyflow-";
const SUFFIX: &str = ".tmp";
pub(super) const EXTENSION: &str = "tmp";
const RANDOM: usize = 12;

/// As many symbolic links as Linux follows.
const MAX_LINKS: usize = 40;

/// Written to a temporary file in the folder of its destination. [`commit`](Self::commit) moves it there; dropping it removes it.
///
/// A process that is killed leaves its temporary file behind. The writer holds a lock on its temporary file, which the operating
/// system releases when the process ends. The next [`create`](Self::create) in the same folder removes the temporary files that
/// nobody has locked.
pub(crate) struct AtomicFile {
    /// As the caller gave it, for errors.
    path: PathBuf,
    /// Where the file goes: `path` with symbolic links followed.
    target: PathBuf,
    /// Of the file that is replaced, for its permissions.
    #[cfg_attr(not(unix), allow(dead_code))]
    replaced: Option<Metadata>,
    file: BufWriter<NamedTempFile>,
}

impl AtomicFile {
    /// Starts a file. An existing regular file at `path` stays as it is until [`commit`](Self::commit), a symbolic link stays a link.
    ///
    /// # Errors
    /// [`Error::Io`], also where `path` is a directory, a device, a pipe or a socket.
    pub fn create(path: &Path) -> Result<Self> {
        let fail = |error| Error::io(path, error);
        let (target, replaced) = resolve(path).map_err(fail)?;
        let folder = parent(&target);
        remove_dead(folder);
        let file = temporary(folder, replaced.as_ref()).map_err(fail)?;
        Ok(Self {
            path: path.to_owned(),
            target,
            replaced,
            file: BufWriter::new(file),
        })
    }

    /// The destination as the caller gave it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file
            .write_all(bytes)
            .map_err(|error| Error::io(&self.path, error))
    }

    /// Overwrites bytes written before.
    pub fn patch(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.file
            .seek(SeekFrom::Start(offset))
            .and_then(|_| self.file.write_all(bytes))
            .and_then(|()| self.file.seek(SeekFrom::End(0)))
            .map(|_| ())
            .map_err(|error| Error::io(&self.path, error))
    }

    /// Writes everything to the disk and moves the file to its destination. A file that is replaced passes on its permissions.
    ///
    /// # Errors
    /// [`Error::Io`]; then the destination is as it was, except if only the folder could not be written to the disk.
    pub fn commit(self) -> Result<()> {
        let path = self.path.clone();
        self.finish().map_err(|error| Error::io(path, error))
    }

    fn finish(self) -> io::Result<()> {
        let file = self.file.into_inner().map_err(|error| error.into_error())?;
        // On other systems the only permission is "read-only", which would keep the file from being moved.
        #[cfg(unix)]
        if let Some(replaced) = &self.replaced {
            use std::os::unix::fs::PermissionsExt;
            let mode = replaced.permissions().mode() & 0o777;
            file.as_file()
                .set_permissions(fs::Permissions::from_mode(mode))?;
        }
        file.as_file().sync_all()?;
        file.persist(&self.target).map_err(|error| error.error)?;
        sync_folder(parent(&self.target))
    }
}

/// Follows symbolic links: the file to write, which need not exist, and its metadata if it does.
fn resolve(path: &Path) -> io::Result<(PathBuf, Option<Metadata>)> {
    let mut target = path.to_owned();
    for _ in 0..MAX_LINKS {
        let metadata = match fs::symlink_metadata(&target) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok((target, None)),
            Err(error) => return Err(error),
        };
        if metadata.is_symlink() {
            let link = fs::read_link(&target)?;
            // A relative link starts at the folder in which it lies.
            target = parent(&target).join(link);
        } else if metadata.is_file() {
            return Ok((target, Some(metadata)));
        } else {
            return Err(not_regular(&metadata));
        }
    }
    Err(io::Error::other("too many symbolic links"))
}

/// The folder of a file or folder. Both must be on one file system, within which a rename is atomic.
pub(super) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// A new locked temporary file.
pub(super) fn temporary(folder: &Path, replaced: Option<&Metadata>) -> io::Result<NamedTempFile> {
    let prefix = format!("{PREFIX}{}-", std::process::id());
    let mut builder = Builder::new();
    builder.prefix(&prefix).suffix(SUFFIX).rand_bytes(RANDOM);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // What the umask leaves of it; never more than a file that is replaced allows.
        let mode = replaced.map_or(0o666, |replaced| replaced.permissions().mode() & 0o666);
        builder.permissions(fs::Permissions::from_mode(mode));
    }
    #[cfg(not(unix))]
    let _ = replaced;
    loop {
        let file = builder.tempfile_in(folder)?;
        match file.as_file().try_lock() {
            // Between creation and lock another process may have taken it for dead and removed it.
            Ok(()) if !file.path().exists() => {}
            // Some file systems have no locks; then nobody removes dead files either.
            Ok(()) | Err(TryLockError::Error(_)) => return Ok(file),
            // Another process is removing it.
            Err(TryLockError::WouldBlock) => {}
        }
    }
}

/// Removes the temporary files of processes that are gone. Whatever fails is left for the next time.
pub(super) fn remove_dead(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        if !is_temporary(&entry.file_name()) || !entry.file_type().is_ok_and(|kind| kind.is_file())
        {
            continue;
        }
        let path = entry.path();
        let file = OpenOptions::new().read(true).write(true).open(&path);
        // The lock is held until the file is removed, so that its writer, if there is one, sees one or the other.
        if let Ok(file) = file
            && file.try_lock().is_ok()
        {
            let _ = fs::remove_file(&path);
        }
    }
}

pub(super) fn is_temporary(name: &OsStr) -> bool {
    let middle = name
        .to_str()
        .and_then(|name| name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX));
    middle
        .and_then(|middle| middle.split_once('-'))
        .is_some_and(|(process, random)| {
            !process.is_empty()
                && process.bytes().all(|byte| byte.is_ascii_digit())
                && random.len() == RANDOM
                && random.bytes().all(|byte| byte.is_ascii_alphanumeric())
        })
}

/// Makes a rename last through a power failure.
#[cfg(unix)]
pub(super) fn sync_folder(folder: &Path) -> io::Result<()> {
    let synced = fs::File::open(folder).and_then(|folder| folder.sync_all());
    match synced {
        // Not every folder can be opened for reading, and not every file system can do it.
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::PermissionDenied | ErrorKind::InvalidInput | ErrorKind::Unsupported
            ) =>
        {
            Ok(())
        }
        synced => synced,
    }
}

/// Other systems have no such call.
#[cfg(not(unix))]
pub(super) fn sync_folder(_: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_temporary_files_are_taken_for_them() {
        let yes = [".energyflow-1-abcDEF012345.tmp"];
        let no = [
            "energyflow-1-abcDEF012345.tmp",
            ".energyflow-1-abcDEF01234.tmp",
            ".energyflow--abcDEF012345.tmp",
            ".energyflow-x-abcDEF012345.tmp",
            ".energyflow-1-abcDEF0123.5.tmp",
            ".energyflow-1-abcDEF012345.tmp2",
            ".energyflow-notes.tmp",
        ];
        assert!(yes.iter().all(|name| is_temporary(OsStr::new(name))));
        assert!(!no.iter().any(|name| is_temporary(OsStr::new(name))));
    }

    #[test]
    fn living_writers_of_one_target_do_not_disturb_each_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let mut first = AtomicFile::create(&path).unwrap();
        first.write(b"first").unwrap();
        let mut second = AtomicFile::create(&path).unwrap();
        second.write(b"second").unwrap();
        second.commit().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        first.commit().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"first");

        let dead = folder.path().join(".energyflow-1-abcDEF012345.tmp");
        let foreign = folder.path().join(".energyflow-notes.tmp");
        fs::write(&dead, "left behind").unwrap();
        fs::write(&foreign, "not ours").unwrap();
        let writer = AtomicFile::create(&path).unwrap();
        assert!(!dead.exists() && foreign.exists());
        drop(writer);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn many_writers_at_once_leave_one_whole_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::thread::scope(|scope| {
            for writer in 0..4 {
                let path = &path;
                scope.spawn(move || {
                    for _ in 0..25 {
                        let mut file = AtomicFile::create(path).unwrap();
                        file.write(&[writer; 10_000]).unwrap();
                        file.commit().unwrap();
                    }
                });
            }
        });
        let content = fs::read(&path).unwrap();
        assert!(content.len() == 10_000 && content.iter().all(|byte| *byte == content[0]));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
