//! The memory that submissions of a bundle use in turn.

use std::collections::VecDeque;
use std::sync::Arc;

use super::readback::Download;
use super::waiter::Arrival;

/// Memory for submissions, all of it made for the first. More is made only while a caller keeps more than [`IN_FLIGHT`](super::IN_FLIGHT) results.
///
/// The lock of a ring is held for moments only, and never while anything of wgpu's runs that could run a callback. What keeps turns apart
/// is the gate.
#[derive(Debug, Default)]
pub(super) struct Ring {
    /// Oldest first.
    pub(super) flights: VecDeque<Flight>,
    pub(super) downloads: Vec<Arc<Download>>,
    /// Number of submissions so far.
    pub(super) submitted: u64,
}

/// A submission, or the memory for one.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) turn: usize,
    /// Which submission it is; 0 for none.
    pub(super) number: u64,
    /// Nothing until the submission has returned, which runs callbacks of the caller.
    pub(super) index: Option<wgpu::SubmissionIndex>,
    /// The submission is done.
    pub(super) landed: bool,
    /// Nothing where there is nothing to write.
    pub(super) upload: Option<Upload>,
}

impl Flight {
    pub(super) fn new(turn: usize, upload: Option<Upload>) -> Self {
        Self {
            turn,
            number: 0,
            index: None,
            landed: true,
            upload,
        }
    }
}

/// Memory that the host writes, which owns whether it is mapped.
#[derive(Clone, Debug)]
pub(super) struct Upload {
    pub(super) buffer: wgpu::Buffer,
    pub(super) mapped: Arc<Arrival>,
}

impl Upload {
    /// Maps the memory once the work submitted so far is done with it.
    pub(super) fn map(&self, bytes: u64) {
        let (buffer, mode) = (&self.buffer, wgpu::MapMode::Write);
        self.mapped.map(buffer, mode, bytes);
    }

    pub(super) fn unmap(&self) {
        self.mapped.unmap(&self.buffer);
    }
}

/// What has to happen before the next turn.
pub(super) enum Next {
    /// Nothing: the memory for it.
    Ready(Flight),
    /// A submission has to be done. Without an index, all that are known.
    Landing {
        number: u64,
        index: Option<wgpu::SubmissionIndex>,
    },
    /// Memory has to be mapped.
    Mapping { mapped: Arc<Arrival>, round: u64 },
}

impl Ring {
    /// The device is past this submission, and so past those before.
    pub(super) fn landed(&mut self, number: u64) {
        for flight in &mut self.flights {
            if flight.number <= number && !flight.landed {
                flight.landed = true;
                if let Some(Upload { mapped, .. }) = &flight.upload
                    && let Some(round) = mapped.awaited()
                {
                    mapped.expect(round);
                }
            }
        }
    }

    pub(super) fn find(&mut self, number: u64) -> Option<usize> {
        self.flights
            .iter()
            .position(|flight| flight.number == number)
    }
}
