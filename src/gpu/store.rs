//! A folder of cache files that make the next start faster. They can always be made again, so a failure is logged and is never an error.

use std::fs;
use std::path::PathBuf;
use std::sync::Mutex;

use super::capabilities::Capabilities;
use super::envelope;
use super::lock::lock;
use crate::error::{Error, Result};
use crate::file::{AtomicFile, InputFile};
use crate::fnv::fnv1a;

/// Upper bound on the size of a cache file in bytes. No cache comes near it; a larger file is not read.
const LARGEST: u64 = 1 << 30;

/// Counts of the cache files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CacheStats {
    /// Bytes of content read when the device was opened.
    pub loaded_bytes: u64,
    /// Files written.
    pub saved: u64,
    /// Files that were damaged, belong to another adapter, driver or version, or could not be read or written. The log says why.
    pub ignored: u64,
}

#[derive(Debug, Default)]
struct State {
    stats: CacheStats,
    /// Checksum of the known content of each file, by kind.
    on_disk: Vec<(&'static str, u64)>,
}

/// The cache files of one adapter, driver and version of this crate. Without a folder it does nothing.
#[derive(Debug)]
pub(super) struct Store {
    folder: Option<PathBuf>,
    identity: String,
    state: Mutex<State>,
}

impl Store {
    /// An empty `folder` is none.
    pub(super) fn new(folder: Option<PathBuf>, capabilities: &Capabilities) -> Self {
        let folder = folder
            .filter(|folder| !folder.as_os_str().is_empty())
            // The process may change its working directory before it saves.
            .map(|folder| std::path::absolute(&folder).unwrap_or(folder));
        let identity = format!(
            "{}\n{}\n{}\n{}",
            capabilities.adapter,
            capabilities.backend.to_str(),
            capabilities.driver,
            env!("CARGO_PKG_VERSION")
        );
        Self {
            folder,
            identity,
            state: Mutex::default(),
        }
    }

    pub(super) fn stats(&self) -> CacheStats {
        lock(&self.state).stats
    }

    pub(super) fn is_on(&self) -> bool {
        self.folder.is_some()
    }

    fn key(&self, kind: &str) -> String {
        format!("{kind}\n{}", self.identity)
    }

    fn path(&self, kind: &str) -> Option<PathBuf> {
        // The checksum in the name keeps adapters from overwriting each other's files; the key inside is what counts.
        let name = format!("{kind}-{:016x}.bin", fnv1a(self.key(kind).as_bytes()));
        Some(self.folder.as_ref()?.join(name))
    }

    /// The content that was saved as `kind`, if `accept` takes it. The error of `accept` is the reason for the warning.
    pub(super) fn load<T>(
        &self,
        kind: &'static str,
        accept: impl FnOnce(&[u8]) -> Result<T, String>,
    ) -> Option<T> {
        let path = self.path(kind)?;
        let file = match read(&path) {
            Ok(file) => file?,
            Err(error) => {
                self.ignore(&path, &error);
                return None;
            }
        };
        let opened = envelope::open(&self.key(kind), &file).map_err(str::to_owned);
        let accepted = opened.and_then(|content| Ok((accept(content)?, content)));
        match accepted {
            Ok((value, content)) => {
                let mut state = lock(&self.state);
                state.stats.loaded_bytes += content.len() as u64;
                state.on_disk.push((kind, fnv1a(content)));
                Some(value)
            }
            Err(reason) => {
                self.ignore(&path, &reason);
                None
            }
        }
    }

    /// Saves `content` as `kind`, unless the file holds it already.
    pub(super) fn save(&self, kind: &'static str, content: &[u8]) {
        let Some(path) = self.path(kind) else {
            return;
        };
        let entry = (kind, fnv1a(content));
        // Held while writing, so that two threads that save do it one after the other.
        let mut state = lock(&self.state);
        if state.on_disk.contains(&entry) && path.exists() {
            return;
        }
        match self.write(&path, &envelope::seal(&self.key(kind), content)) {
            Ok(()) => {
                state.stats.saved += 1;
                state.on_disk.retain(|(other, _)| *other != kind);
                state.on_disk.push(entry);
            }
            Err(error) => {
                drop(state);
                self.ignore(&path, &error);
            }
        }
    }

    fn write(&self, path: &std::path::Path, file: &[u8]) -> Result<()> {
        if let Some(folder) = &self.folder {
            fs::create_dir_all(folder).map_err(|error| Error::io(folder, error))?;
        }
        let mut atomic = AtomicFile::create(path)?;
        atomic.write(file)?;
        atomic.commit()
    }

    fn ignore(&self, path: &std::path::Path, reason: &dyn std::fmt::Display) {
        log::warn!("cache file {} is ignored: {reason}", path.display());
        lock(&self.state).stats.ignored += 1;
    }
}

/// The whole file, `None` if there is none.
fn read(path: &std::path::Path) -> Result<Option<Vec<u8>>> {
    match InputFile::open(path) {
        Ok(file) => file.read_all(LARGEST).map(Some),
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
