//! Samples in memory.

use super::sample::{Sample, SampleBuffer, check_sample};
use crate::error::Result;

/// Samples that are held in memory: those of a JSON-lines file, and those that a writer collects.
#[derive(Debug, Default)]
pub(super) struct Samples {
    pub width: usize,
    /// Token ids of all samples, one after the other.
    pub ids: Vec<u32>,
    /// As long as the ids.
    pub mask: Vec<u8>,
    /// Where each sample's tokens end.
    pub ends: Vec<usize>,
    pub targets: Vec<f32>,
    /// A text or `None` for each sample.
    pub texts: Vec<Option<String>>,
}

impl Samples {
    pub fn new(width: usize) -> Self {
        Self {
            width,
            ..Self::default()
        }
    }

    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Adds a sample.
    ///
    /// # Errors
    /// [`Data`](crate::Error::Data) for a sample that a file could not hold; nothing of it is kept then.
    pub fn push(
        &mut self,
        ids: &[u32],
        mask: &[u8],
        target: &[f32],
        text: Option<String>,
    ) -> Result<()> {
        check_sample(self.len(), self.width, ids, mask, target)?;
        self.ids.extend_from_slice(ids);
        self.mask.extend_from_slice(mask);
        self.ends.push(self.ids.len());
        self.targets.extend_from_slice(target);
        self.texts.push(text);
        Ok(())
    }

    /// Copies sample number `index`, which exists.
    pub fn read(&self, index: usize, with_text: bool, buffer: &mut SampleBuffer) {
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        let tokens = start..self.ends[index];
        let Sample {
            ids,
            mask,
            target,
            text,
        } = &mut buffer.sample;
        ids.clear();
        ids.extend_from_slice(&self.ids[tokens.clone()]);
        mask.clear();
        mask.extend_from_slice(&self.mask[tokens]);
        target.clear();
        target.extend_from_slice(&self.targets[self.width * index..self.width * (index + 1)]);
        *text = self.texts[index].clone().filter(|_| with_text);
    }
}
