//! One dispatch of each distinct kernel, in files: for sanitizers, mutants and other compilers, which need no graph then.
//!
//! Of the first [`SEEN`] dispatches the last one stays: the first finds states, moments and rings that hold nothing yet.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use energyflow::gpu::trace::Kernel;

/// Dispatches with more bytes than this are not kept.
const MOST_BYTES: usize = 4 << 20;
/// Dispatches of a kernel that are looked at.
const SEEN: usize = 8;

pub struct Record {
    folder: PathBuf,
    /// By WGSL: how many more dispatches are looked at.
    wanted: Mutex<HashMap<String, usize>>,
}

/// A dispatch that was recorded.
#[derive(Clone, Debug)]
pub struct Case {
    /// Key of the kernel.
    pub key: String,
    pub wgsl: String,
    pub workgroups: [u32; 3],
    /// Bytes of each binding.
    pub before: Vec<Vec<u8>>,
    pub after: Vec<Vec<u8>>,
}

impl Record {
    pub fn new(folder: PathBuf) -> Self {
        std::fs::create_dir_all(&folder).expect("ENERGYFLOW_RECORD: a folder");
        Self {
            folder,
            wanted: Mutex::default(),
        }
    }

    fn path(&self, wgsl: &str) -> PathBuf {
        let mut hasher = DefaultHasher::new();
        wgsl.hash(&mut hasher);
        self.folder.join(format!("{:016x}.case", hasher.finish()))
    }

    /// Whether the next dispatch of this kernel is to be kept. What another process has kept stays.
    pub fn wants(&self, wgsl: &str) -> bool {
        let mut wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        match wanted.get(wgsl) {
            Some(&left) => left > 0,
            None => {
                let left = if self.path(wgsl).exists() { 0 } else { SEEN };
                wanted.insert(wgsl.to_owned(), left);
                left > 0
            }
        }
    }

    pub fn keep(
        &self,
        kernel: Kernel<'_>,
        workgroups: [u32; 3],
        before: &[Vec<u8>],
        after: &[Vec<u8>],
    ) {
        // Held until the file is written: several threads may run one kernel.
        let mut wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(left) = wanted.get_mut(kernel.wgsl) {
            *left = left.saturating_sub(1);
        }
        if before.iter().map(Vec::len).sum::<usize>() > MOST_BYTES {
            return;
        }
        let mut bytes = Vec::new();
        let mut push = |part: &[u8]| {
            bytes.extend((part.len() as u64).to_le_bytes());
            bytes.extend(part);
        };
        push(kernel.key.as_bytes());
        push(kernel.wgsl.as_bytes());
        push(&workgroups.map(u32::to_le_bytes).concat());
        before.iter().chain(after).for_each(|part| push(part));
        let path = self.path(kernel.wgsl);
        let part = path.with_extension(format!("{}.part", std::process::id()));
        std::fs::write(&part, bytes).expect("a recorded dispatch can be written");
        std::fs::rename(&part, path).expect("a recorded dispatch can be written");
    }
}

impl Case {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let mut parts = Vec::new();
        let mut rest = bytes;
        while let Some((length, after)) = rest.split_first_chunk() {
            let (part, after) = after.split_at_checked(u64::from_le_bytes(*length) as usize)?;
            parts.push(part.to_vec());
            rest = after;
        }
        let memory = parts.split_off(3);
        let text = |part: &[u8]| String::from_utf8(part.to_vec()).ok();
        let number = |i: usize| {
            let bytes = parts[2].get(4 * i..4 * i + 4)?;
            Some(u32::from_le_bytes(bytes.try_into().ok()?))
        };
        let (before, after) = memory.split_at(memory.len() / 2);
        Some(Self {
            key: text(&parts[0])?,
            wgsl: text(&parts[1])?,
            workgroups: [number(0)?, number(1)?, number(2)?],
            before: before.to_vec(),
            after: after.to_vec(),
        })
    }

    /// Name of the template.
    pub fn template(&self) -> &str {
        self.key.split(' ').next().unwrap_or_default()
    }

    /// The element type of each binding, `u32` if the key does not tell.
    pub fn dtypes(&self) -> Vec<String> {
        let before_program = self.key.split(" { ").next().unwrap_or_default();
        let mut after_name = before_program
            .split(' ')
            .filter_map(|word| word.split_once(':'));
        let dtype = |_: &Vec<u8>| {
            let known = after_name.next().and_then(|(_, rest)| rest.split_once('['));
            known.map_or("u32", |(dtype, _)| dtype).to_owned()
        };
        self.before.iter().map(dtype).collect()
    }

    /// All that a folder holds, in the order of their keys.
    pub fn all(folder: &Path) -> Vec<Self> {
        let Ok(entries) = std::fs::read_dir(folder) else {
            return Vec::new();
        };
        let paths = entries.map(|entry| entry.expect("a folder that can be read").path());
        let mut cases: Vec<Self> = paths
            .filter(|path| path.extension().is_some_and(|e| e == "case"))
            .map(|path| {
                let bytes = std::fs::read(&path).expect("a file that can be read");
                Self::parse(&bytes).unwrap_or_else(|| panic!("{}: damaged", path.display()))
            })
            .collect();
        cases.sort_by(|a, b| a.key.cmp(&b.key));
        cases
    }
}
