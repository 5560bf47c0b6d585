//! A batch under way: submissions ahead of the tokens that have come back.

use std::collections::VecDeque;
use std::sync::Arc;

use super::Shared;
use super::network::{Network, STEPS, States, Tokens};
use super::options::{DecodeOptions, Generation, Piece};
use super::rows::Rows;
use crate::error::Result;
use crate::gpu::Readback;

/// Submissions under way: while the host reads the tokens of one, the device computes the next.
const AHEAD: usize = 2;

/// A network on loan, which goes back when it is dropped.
///
/// Work of it that is still under way does no harm: submissions are done in order, and a batch begins by writing all that it reads.
struct Loan {
    shared: Arc<Shared>,
    /// Nothing once it is given back.
    network: Option<Network>,
}

impl Drop for Loan {
    fn drop(&mut self) {
        if let Some(network) = self.network.take() {
            self.shared.give_back(network);
        }
    }
}

/// The texts of a batch, and the work for them that is under way.
pub(super) struct Batch {
    loan: Loan,
    z: Vec<f32>,
    options: DecodeOptions,
    rows: Rows,
    first: usize,
    submitted: usize,
    pending: VecDeque<(usize, Readback<States>)>,
}

impl Batch {
    /// Texts `first..` of the embeddings `z` [n, E]; n is at most that of the largest batch.
    pub fn new(
        shared: &Arc<Shared>,
        z: &[f32],
        first: usize,
        options: &DecodeOptions,
    ) -> Result<Self> {
        let n = z.len() / shared.weights.embedding;
        let network = shared.take(n, options.samples())?;
        let loan = Loan {
            shared: Arc::clone(shared),
            network: Some(network),
        };
        Ok(Self {
            loan,
            z: z.to_vec(),
            options: options.clone(),
            rows: Rows::new(first, n, options, shared.stop_tokens(options)),
            first,
            submitted: 0,
            pending: VecDeque::new(),
        })
    }

    /// The next submission to come back with its number of steps, after making sure that another one is under way behind it. Nothing
    /// once all texts have ended.
    fn next(&mut self) -> Result<Option<(usize, Readback<States>)>> {
        if self.rows.all_ended() {
            self.pending.clear();
            return Ok(None);
        }
        while self.pending.len() < AHEAD && self.submitted < self.options.max_len {
            self.submit()?;
        }
        Ok(self.pending.pop_front())
    }

    fn submit(&mut self) -> Result<()> {
        let Some(network) = &self.loan.network else {
            return Ok(());
        };
        let mut recorder = network.recorder();
        if self.submitted == 0 {
            let shared = &self.loan.shared;
            let tokens = Tokens {
                start: shared.start,
                padding: shared.padding,
                stop: self.rows.stop_tokens(),
            };
            let first = self.first as u64;
            network.begin(&mut recorder, &self.z, first, &tokens, &self.options)?;
        }
        let steps = STEPS.min(self.options.max_len - self.submitted);
        (0..steps).for_each(|_| network.step(&mut recorder));
        self.pending.push_back((steps, network.submit(recorder)?));
        self.submitted += steps;
        Ok(())
    }

    fn absorb(&mut self, steps: usize, states: &States) -> Result<()> {
        let tokenizer = &*self.loan.shared.tokenizer;
        self.rows.absorb(steps, states, tokenizer)
    }

    /// Waits for the next tokens; nothing once all texts have ended.
    pub fn pieces(&mut self) -> Result<Option<Vec<Piece>>> {
        let Some((steps, readback)) = self.next()? else {
            return Ok(None);
        };
        self.absorb(steps, &readback.wait()?)?;
        let tokenizer = &*self.loan.shared.tokenizer;
        self.rows.pieces(tokenizer).map(Some)
    }

    pub fn run(mut self) -> Result<impl Iterator<Item = Generation>> {
        while let Some((steps, readback)) = self.next()? {
            self.absorb(steps, &readback.wait()?)?;
        }
        Ok(self.rows.finish())
    }

    pub async fn run_async(mut self) -> Result<impl Iterator<Item = Generation>> {
        while let Some((steps, readback)) = self.next()? {
            let states = readback.await?;
            self.absorb(steps, &states)?;
        }
        Ok(self.rows.finish())
    }
}
