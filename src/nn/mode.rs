//! Whether a forward pass is for evaluation or for training.

use super::Draws;

/// How a network is applied.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Mode {
    /// Nothing is dropped, and nothing is kept for gradients.
    #[default]
    Eval,
    /// With dropout and gradients; see [`Mode::train`].
    #[non_exhaustive]
    Train {
        /// The random numbers of dropout. Without them nothing is dropped.
        draws: Option<Draws>,
        /// Whether the values inside of a block are computed again for the backward pass instead of being kept:
        /// [`Graph::recompute`](crate::Graph::recompute).
        recompute: bool,
    },
}

impl Mode {
    /// For training, with dropout if there are `draws`, without recomputation.
    #[must_use]
    pub fn train(draws: Option<Draws>) -> Self {
        Self::Train {
            draws,
            recompute: false,
        }
    }

    /// With or without recomputation. Has no effect on [`Mode::Eval`], which has no backward pass.
    #[must_use]
    pub fn recompute(self, recompute: bool) -> Self {
        match self {
            Self::Eval => Self::Eval,
            Self::Train { draws, .. } => Self::Train { draws, recompute },
        }
    }

    /// The random numbers of dropout; none in evaluation.
    #[must_use]
    pub fn draws(&self) -> Option<Draws> {
        match self {
            Self::Eval => None,
            Self::Train { draws, .. } => *draws,
        }
    }

    /// Whether blocks are recomputed.
    #[must_use]
    pub fn recomputes(&self) -> bool {
        matches!(
            self,
            Self::Train {
                recompute: true,
                ..
            }
        )
    }
}
