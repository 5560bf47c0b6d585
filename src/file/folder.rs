//! A folder that appears under its name only when it is complete.

use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::atomic::{parent, sync_folder, temporary};
use crate::error::{Error, Result};

/// Temporary folders are called like the temporary file that is their lock, with this ending.
const SUFFIX: &str = "folder";

/// Written to a temporary folder beside its destination. [`commit`](Self::commit) moves it there; dropping it removes it.
///
/// An existing folder is exchanged with the new one in one step where the system can (Linux, Android, Apple's), so that at every moment
/// one of the two is there, whole. Elsewhere the old folder is first moved to a name beside it ([`previous`]), which [`find`] and the next
/// [`create`](Self::create) know: a process that is killed between the two steps loses nothing there either.
///
/// A process that is killed leaves its temporary folder behind. Beside the folder lies a temporary file on which the writer holds a lock.
/// The next [`create`](Self::create) in the same place removes the folders whose locks nobody holds.
pub(crate) struct AtomicFolder {
    /// As the caller gave it, for errors.
    path: PathBuf,
    /// Where the folder goes: `path` with symbolic links followed.
    target: PathBuf,
    folder: PathBuf,
    /// Removed after the folder.
    _lock: NamedTempFile,
}

impl AtomicFolder {
    /// Starts a folder; the folders above it are made. `check` looks at an existing folder that is not empty, and fails if it must not be
    /// replaced.
    ///
    /// # Errors
    /// [`Error::Io`], also where `path` is no folder; what `check` returns.
    pub fn create(path: &Path, check: impl FnOnce(&Path) -> Result<()>) -> Result<Self> {
        let fail = |error| Error::io(path, error);
        let target = resolve(path).map_err(fail)?;
        let above = parent(&target);
        fs::create_dir_all(above).map_err(fail)?;
        restore(&target).map_err(fail)?;
        if target.exists() {
            let mut entries = fs::read_dir(&target).map_err(fail)?;
            if entries.next().is_some() {
                check(&target)?;
            }
        }
        remove_dead(above);
        let lock = temporary(above, None).map_err(fail)?;
        let folder = lock.path().with_extension(SUFFIX);
        fs::create_dir(&folder).map_err(fail)?;
        Ok(Self {
            path: path.to_owned(),
            target,
            folder,
            _lock: lock,
        })
    }

    /// Where to write the files.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The same error about a file of the temporary folder, with the name that the caller knows.
    pub fn rename(&self, error: Error) -> Error {
        match error {
            Error::Io { path, source } => {
                let path = match path.strip_prefix(&self.folder) {
                    Ok(file) => self.path.join(file),
                    Err(_) => path,
                };
                Error::Io { path, source }
            }
            other => other,
        }
    }

    /// Moves the folder, whose files have been written to the disk, to its destination. What it replaces is removed.
    ///
    /// # Errors
    /// [`Error::Io`]; then the destination is as it was, except if only the folder above it could not be written to the disk.
    pub fn commit(self) -> Result<()> {
        self.finish()
            .map_err(|error| Error::io(self.path.clone(), error))
    }

    fn finish(&self) -> io::Result<()> {
        sync_folder(&self.folder)?;
        match self.target.exists() {
            false => fs::rename(&self.folder, &self.target)?,
            true => replace(&self.folder, &self.target, exchange)?,
        }
        sync_folder(parent(&self.target))
    }
}

impl Drop for AtomicFolder {
    /// Removes what was not committed, or what was replaced.
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// The folder to read for `path`: itself, or the one that a killed process was about to replace.
pub(crate) fn find(path: &Path) -> PathBuf {
    match resolve(path) {
        Ok(target) if !target.exists() && previous(&target).is_dir() => previous(&target),
        _ => path.to_owned(),
    }
}

/// Puts `new` in the place of `old`, and leaves the old one under the name of the new one, or removes it.
fn replace(
    new: &Path,
    old: &Path,
    exchange: impl FnOnce(&Path, &Path) -> io::Result<bool>,
) -> io::Result<()> {
    if exchange(new, old)? {
        return Ok(());
    }
    let aside = previous(old);
    fs::rename(old, &aside)?;
    if let Err(error) = fs::rename(new, old) {
        let _ = fs::rename(&aside, old);
        return Err(error);
    }
    let _ = fs::remove_dir_all(aside);
    Ok(())
}

/// Exchanges two folders in one step; false where the system or the file system cannot.
#[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
fn exchange(new: &Path, old: &Path) -> io::Result<bool> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    use rustix::io::Errno;
    // What kernels and file systems say that do not know it.
    let unknown = [Errno::INVAL, Errno::NOSYS, Errno::NOTSUP, Errno::OPNOTSUPP];
    match renameat_with(CWD, new, CWD, old, RenameFlags::EXCHANGE) {
        Ok(()) => Ok(true),
        Err(error) if unknown.contains(&error) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
fn exchange(_: &Path, _: &Path) -> io::Result<bool> {
    Ok(false)
}

/// Where a folder lies while it is replaced in two steps.
fn previous(target: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".energyflow-previous-");
    name.push(target.file_name().unwrap_or_default());
    target.with_file_name(name)
}

/// Moves a folder back that a killed process was about to replace, or removes it if its successor is there.
fn restore(target: &Path) -> io::Result<()> {
    let aside = previous(target);
    match (aside.is_dir(), target.exists()) {
        (false, _) => Ok(()),
        (true, false) => fs::rename(aside, target),
        (true, true) => fs::remove_dir_all(aside),
    }
}

/// Follows symbolic links: the folder to write, which need not exist.
fn resolve(path: &Path) -> io::Result<PathBuf> {
    match fs::canonicalize(path) {
        Ok(target) if target.is_dir() && target.file_name().is_some() => Ok(target),
        Ok(_) => Err(ErrorKind::NotADirectory.into()),
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        // A link to nothing is no place to write to.
        Err(error) if fs::symlink_metadata(path).is_ok() => Err(error),
        Err(_) => match path.file_name() {
            Some(_) => std::path::absolute(path),
            None => Err(ErrorKind::NotFound.into()),
        },
    }
}

/// Removes the temporary folders of processes that are gone, and their locks. Whatever fails is left for the next time.
fn remove_dead(above: &Path) {
    let Ok(entries) = fs::read_dir(above) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let lock = path.with_extension(super::atomic::EXTENSION);
        let ours = path.extension() == Some(OsStr::new(SUFFIX))
            && lock.file_name().is_some_and(super::atomic::is_temporary)
            && entry.file_type().is_ok_and(|kind| kind.is_dir());
        if !ours {
            continue;
        }
        match OpenOptions::new().read(true).write(true).open(&lock) {
            // A writer makes the lock before the folder, and removes it after the folder.
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let _ = fs::remove_dir_all(&path);
            }
            Ok(file) if file.try_lock().is_ok() => {
                let _ = fs::remove_dir_all(&path);
            }
            _ => {}
        }
    }
    super::atomic::remove_dead(above);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap().flatten();
        let mut names: Vec<String> = entries
            .map(|entry| entry.file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn write(target: &Path, content: &str) -> AtomicFolder {
        let folder = AtomicFolder::create(target, |_| Ok(())).unwrap();
        fs::write(folder.folder().join("file"), content).unwrap();
        folder
    }

    #[test]
    fn a_folder_is_there_when_committed_and_replaces_another_whole() {
        let above = tempfile::tempdir().unwrap();
        let target = above.path().join("a").join("model");
        let first = write(&target, "first");
        assert!(!target.exists());
        first.commit().unwrap();
        assert_eq!(fs::read(target.join("file")).unwrap(), b"first");
        drop(write(&target, "dropped"));
        assert_eq!(fs::read(target.join("file")).unwrap(), b"first");
        let second = write(&target, "second");
        fs::write(target.join("other"), "goes with the first").unwrap();
        second.commit().unwrap();
        assert_eq!(names(&target), ["file"]);
        assert_eq!(fs::read(target.join("file")).unwrap(), b"second");
        assert_eq!(names(&above.path().join("a")), ["model"]);
    }

    #[test]
    fn without_an_exchange_the_old_folder_is_found_between_the_two_steps() {
        let above = tempfile::tempdir().unwrap();
        let target = above.path().join("model");
        write(&target, "old").commit().unwrap();
        let new = write(&target, "new");
        replace(new.folder(), &target, |_, _| Ok(false)).unwrap();
        drop(new);
        assert_eq!(fs::read(target.join("file")).unwrap(), b"new");
        assert_eq!(names(above.path()), ["model"]);

        // Killed between the two steps.
        fs::rename(&target, previous(&target)).unwrap();
        assert_eq!(fs::read(find(&target).join("file")).unwrap(), b"new");
        drop(write(&target, "not committed"));
        assert_eq!(fs::read(target.join("file")).unwrap(), b"new");
        // Killed after them, before the old one was removed.
        fs::create_dir(previous(&target)).unwrap();
        assert_eq!(find(&target), target);
        write(&target, "last").commit().unwrap();
        assert_eq!(fs::read(target.join("file")).unwrap(), b"last");
        assert_eq!(names(above.path()), ["model"]);
    }

    #[test]
    fn the_folders_of_dead_writers_are_removed_and_no_others() {
        let above = tempfile::tempdir().unwrap();
        let path = |name: &str| above.path().join(name);
        fs::create_dir(path(".energyflow-1-abcDEF012345.folder")).unwrap();
        fs::create_dir(path(".energyflow-2-abcDEF012345.folder")).unwrap();
        fs::write(path(".energyflow-2-abcDEF012345.tmp"), "").unwrap();
        fs::create_dir(path(".energyflow-notes.folder")).unwrap();
        let living = write(&path("model"), "living");
        let second = write(&path("model"), "second");
        assert!(living.folder().exists());
        drop(second);
        living.commit().unwrap();
        assert_eq!(names(above.path()), [".energyflow-notes.folder", "model"]);
    }

    #[test]
    fn what_is_no_folder_is_refused() {
        let above = tempfile::tempdir().unwrap();
        let file = above.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(AtomicFolder::create(&file, |_| Ok(())).is_err());
        assert!(AtomicFolder::create(Path::new("/"), |_| Ok(())).is_err());
        assert_eq!(names(above.path()), ["file"]);
    }
}
