//! Decoded samples that no file can be read again for cheaply: in memory while they are few, then in a temporary file.

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::efb::{Efb, Layout, NO_TEXT};
use super::offsets::Offsets;
use super::sample::{SampleBuffer, check_length, check_sample};
use super::samples::Samples;
use crate::error::{Error, Result};
use crate::file::InputFile;

/// Takes samples one by one.
#[derive(Debug)]
pub(super) struct StoreWriter {
    width: usize,
    /// Samples are held in memory up to this many bytes.
    in_memory: u64,
    held: u64,
    memory: Samples,
    /// Folder of the temporary file.
    folder: PathBuf,
    spool: Option<Spool>,
}

/// Samples that were stored.
#[derive(Debug)]
pub(super) enum Store {
    Memory(Samples),
    File(Box<Efb>),
}

/// A temporary file without a name, in the layout of [`Efb`].
#[derive(Debug)]
struct Spool {
    file: BufWriter<File>,
    offsets: Offsets,
    end: u64,
}

impl StoreWriter {
    /// For targets of `width` values, which may be 0. `folder` is where the temporary file goes; the system's by default.
    pub fn new(width: usize, in_memory: u64, folder: Option<&Path>) -> Self {
        Self {
            width,
            in_memory,
            held: 0,
            memory: Samples::new(width),
            folder: folder.map_or_else(std::env::temp_dir, Path::to_owned),
            spool: None,
        }
    }

    /// Adds a sample.
    ///
    /// # Errors
    /// [`Error::Data`] for a sample that a file could not hold; [`Error::Io`] from the temporary file.
    pub fn push(
        &mut self,
        ids: &[u32],
        mask: &[u8],
        target: &[f32],
        text: Option<String>,
    ) -> Result<()> {
        let index = match &self.spool {
            Some(spool) => spool.offsets.len(),
            None => self.memory.len(),
        };
        let length = text.as_ref().map_or(0, String::len);
        check_sample(index, self.width, ids, mask, target)?;
        check_length(index, 5 * ids.len() + 4 * target.len())?;
        check_length(index, length)?;
        if let Some(spool) = &mut self.spool {
            let pushed = spool.push(ids, mask, target, text.as_deref());
            return pushed.map_err(|error| fail(&self.folder, error));
        }
        // Tokens, masks, targets, text, and what addresses them.
        self.held += (5 * ids.len() + 4 * target.len() + length + 32) as u64;
        if self.held <= self.in_memory {
            return self.memory.push(ids, mask, target, text);
        }
        let moved = Spool::new(&self.folder).and_then(|mut spool| {
            let mut buffer = SampleBuffer::default();
            for index in 0..self.memory.len() {
                self.memory.read(index, true, &mut buffer);
                let sample = &buffer.sample;
                let text = sample.text.as_deref();
                spool.push(&sample.ids, &sample.mask, &sample.target, text)?;
            }
            spool.push(ids, mask, target, text.as_deref())?;
            Ok(spool)
        });
        self.spool = Some(moved.map_err(|error| fail(&self.folder, error))?);
        self.memory = Samples::new(self.width);
        Ok(())
    }

    /// What was stored. `origin` is the file that the samples came from, for errors.
    pub fn finish(self, origin: &Path) -> Result<Store> {
        let Some(spool) = self.spool else {
            return Ok(Store::Memory(self.memory));
        };
        let layout = Layout {
            text: true,
            tokens: true,
            width: self.width,
            optional_text: true,
            normalised: false,
        };
        let name = format!("{} (its temporary copy)", origin.display());
        let file = spool.file.into_inner().map_err(|error| error.into_error());
        let file = file.map_err(|error| fail(&self.folder, error))?;
        let file = InputFile::temporary(file, Path::new(&name))?;
        Ok(Store::File(Box::new(Efb::trusted(
            file,
            layout,
            spool.offsets,
        ))))
    }
}

impl Store {
    pub fn len(&self) -> usize {
        match self {
            Self::Memory(samples) => samples.len(),
            Self::File(efb) => efb.len(),
        }
    }

    pub fn width(&self) -> usize {
        match self {
            Self::Memory(samples) => samples.width,
            Self::File(efb) => efb.width(),
        }
    }

    /// Reads sample number `index`, which exists.
    pub fn read(&self, index: usize, with_text: bool, buffer: &mut SampleBuffer) -> Result<()> {
        match self {
            Self::Memory(samples) => {
                samples.read(index, with_text, buffer);
                Ok(())
            }
            Self::File(efb) => efb.read(index, with_text, buffer),
        }
    }
}

impl Spool {
    fn new(folder: &Path) -> std::io::Result<Self> {
        let mut file = tempfile::tempfile_in(folder)?;
        file.seek(SeekFrom::Start(0))?;
        Ok(Self {
            file: BufWriter::with_capacity(1 << 18, file),
            offsets: Offsets::new(0, Offsets::MOST),
            end: 0,
        })
    }

    /// Adds a sample, which was checked.
    fn push(
        &mut self,
        ids: &[u32],
        mask: &[u8],
        target: &[f32],
        text: Option<&str>,
    ) -> std::io::Result<()> {
        let start = self.end;
        let length = text.map_or(NO_TEXT, |text| text.len() as u32);
        let text = text.unwrap_or_default();
        self.file.write_all(&length.to_le_bytes())?;
        self.file.write_all(text.as_bytes())?;
        self.file.write_all(&(ids.len() as u32).to_le_bytes())?;
        for id in ids {
            self.file.write_all(&id.to_le_bytes())?;
        }
        self.file.write_all(mask)?;
        for value in target {
            self.file.write_all(&value.to_le_bytes())?;
        }
        self.end += (8 + text.len() + 5 * ids.len() + 4 * target.len()) as u64;
        self.offsets.push(start, self.end);
        Ok(())
    }
}

fn fail(folder: &Path, error: std::io::Error) -> Error {
    let reason = format!(
        "temporary file: {error}; choose another folder with OpenOptions::temporary, or convert the dataset, which then needs no such file"
    );
    Error::io(folder, std::io::Error::new(error.kind(), reason))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_come_back_from_memory_and_from_a_temporary_file() {
        for in_memory in [0, 1000, u64::MAX] {
            let mut writer = StoreWriter::new(2, in_memory, None);
            let samples = (0..50_u32).map(|i| {
                let ids: Vec<u32> = (0..=i % 7).map(|id| id * i).collect();
                let mask: Vec<u8> = ids.iter().map(|id| (id % 2) as u8).collect();
                let text = [None, Some(String::new()), Some("é".repeat(i as usize))];
                let text = text[i as usize % 3].clone();
                (ids, mask, [i as f32, -1.0], text)
            });
            let samples: Vec<_> = samples.collect();
            for (ids, mask, target, text) in &samples {
                writer.push(ids, mask, target, text.clone()).unwrap();
            }
            let store = writer.finish(Path::new("origin")).unwrap();
            assert_eq!(matches!(store, Store::Memory(_)), in_memory == u64::MAX);
            assert_eq!((store.len(), store.width()), (50, 2));
            let mut buffer = SampleBuffer::default();
            for (index, (ids, mask, target, text)) in samples.iter().enumerate().rev() {
                for with_text in [true, false] {
                    store.read(index, with_text, &mut buffer).unwrap();
                    let sample = &buffer.sample;
                    assert_eq!((&sample.ids, &sample.mask), (ids, mask));
                    assert_eq!(sample.target, target);
                    assert_eq!(sample.text, text.clone().filter(|_| with_text));
                }
            }
        }
    }
}
