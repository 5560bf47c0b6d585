//! The memory that submissions of a bundle use in turn.

use std::collections::VecDeque;
use std::sync::Arc;

use super::readback::Download;
use super::waiter::Arrival;

/// Memory for submissions. The first submission allocates all of it. More is allocated only while a caller keeps more than
/// [`IN_FLIGHT`](super::IN_FLIGHT) results.
///
/// The lock of a ring is held for moments only, and never during a call of wgpu that could run a callback. The gate keeps turns apart.
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
    /// Number of the submission, or 0 for none.
    pub(super) number: u64,
    /// `None` until the submission has returned, because it runs callbacks of the caller.
    pub(super) index: Option<wgpu::SubmissionIndex>,
    /// The submission is done.
    pub(super) landed: bool,
    /// `None` if there is nothing to write.
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

/// Memory that the host writes, with the state of its mapping.
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
    /// Nothing. This is the memory for the turn.
    Ready(Flight),
    /// The device has to finish a submission, or without an index all submissions so far.
    Landing {
        number: u64,
        index: Option<wgpu::SubmissionIndex>,
    },
    /// Memory has to be mapped.
    Mapping { mapped: Arc<Arrival>, round: u64 },
}

impl Ring {
    /// The device has finished this submission, and so those before it.
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
