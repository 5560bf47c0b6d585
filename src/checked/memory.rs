//! Memory that knows its size and who touched it.

/// A storage buffer, or a variable in workgroup memory.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    len: u64,
    /// Empty where the content is not kept: reads give zero, and only bounds are checked.
    bytes: Vec<u8>,
    /// By two bytes, the smallest element.
    written: Vec<Mark>,
    read: Vec<Mark>,
}

/// Who touched two bytes last, and between which barriers.
#[derive(Clone, Copy, Debug, Default)]
struct Mark {
    epoch: u32,
    who: u32,
    /// Workgroup, or [`MANY`].
    group: u32,
    phase: u32,
}

/// Nobody, in a [`Mark`].
const NOBODY: u32 = 0;
/// More than one invocation.
const MANY: u32 = u32::MAX;

/// What is wrong with an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Kind {
    ReadOutside,
    WriteOutside,
    /// Another invocation touches the same bytes, one of them writes, and no barrier is between.
    Race,
    /// Workgroup memory that nobody wrote since the workgroup began.
    Uninitialised,
}

/// Who accesses, and when: marks of other epochs do not conflict.
#[derive(Clone, Copy, Debug)]
pub(super) struct Access {
    pub who: u32,
    pub epoch: u32,
    /// Of storage buffers: the workgroup, and how many storage barriers there were. What is before a barrier does not conflict with what
    /// the same workgroup does after it.
    pub group: u32,
    pub phase: u32,
    /// Epoch in which the workgroup began; 0 for storage buffers, whose content is what was there before.
    pub since: u32,
}

impl Access {
    fn mark(self) -> Mark {
        Mark {
            epoch: self.epoch,
            who: self.who,
            group: self.group,
            phase: self.phase,
        }
    }
}

impl Mark {
    /// Whether somebody else touched the bytes since the last barrier.
    fn conflicts(self, access: Access) -> bool {
        let ordered = self.group == access.group && self.phase < access.phase;
        self.who != NOBODY && self.epoch == access.epoch && self.who != access.who && !ordered
    }
}

impl Memory {
    /// Of exactly this size, every bit set: NaN in every float.
    pub fn poisoned(len: u64) -> Self {
        Self::of(vec![0xff; len as usize])
    }

    /// With this content.
    pub fn of(bytes: Vec<u8>) -> Self {
        let marks = vec![Mark::default(); bytes.len().div_ceil(2)];
        Self {
            len: bytes.len() as u64,
            bytes,
            written: marks.clone(),
            read: marks,
        }
    }

    /// Of a size that this machine may not have: what is written is forgotten.
    pub fn vast(len: u64) -> Self {
        Self {
            len,
            ..Self::default()
        }
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn halves(&self, at: u64, size: u32) -> std::ops::Range<usize> {
        match self.bytes.is_empty() {
            true => 0..0,
            false => at as usize / 2..(at as usize + size as usize).div_ceil(2),
        }
    }

    /// The caller checked that the bytes are inside.
    pub(super) fn load(&mut self, at: u64, size: u32, access: Access) -> (u32, Option<Kind>) {
        let mut fault = None;
        for half in self.halves(at, size) {
            let written = self.written[half];
            if access.since > 0 && (written.who == NOBODY || written.epoch < access.since) {
                fault = Some(Kind::Uninitialised);
            } else if written.conflicts(access) {
                fault = Some(Kind::Race);
            }
            let read = &mut self.read[half];
            let mut mark = access.mark();
            if read.conflicts(access) {
                mark.who = MANY;
                if read.group != access.group {
                    mark.group = MANY;
                }
            }
            *read = mark;
        }
        let at = at as usize;
        let bits = match (self.bytes.is_empty(), size) {
            (true, _) => 0,
            (false, 2) => u32::from(u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])),
            (false, _) => u32::from_le_bytes([0, 1, 2, 3].map(|i| self.bytes[at + i])),
        };
        (bits, fault)
    }

    /// The caller checked that the bytes are inside.
    pub(super) fn store(&mut self, at: u64, size: u32, bits: u32, access: Access) -> Option<Kind> {
        let mut fault = None;
        for half in self.halves(at, size) {
            for mark in [self.written[half], self.read[half]] {
                if mark.conflicts(access) {
                    fault = Some(Kind::Race);
                }
            }
            self.written[half] = access.mark();
        }
        if !self.bytes.is_empty() {
            let at = at as usize;
            self.bytes[at..at + size as usize]
                .copy_from_slice(&bits.to_le_bytes()[..size as usize]);
        }
        fault
    }
}
