//! Training: everything that a step needs besides the loss. It is added to the graph of the loss, so that a step is one submission.

mod accumulation;
mod checkpoint;
mod freeze;
mod group;
mod mapping;
mod optimizer;
pub mod record;
mod scale;
mod schedule;
mod stored;
mod weights;

pub(crate) use accumulation::discard;
pub use checkpoint::Checkpoint;
pub use freeze::trainable;
pub use group::ParameterGroup;
pub(crate) use group::has_prefix;
pub use mapping::{Fitting, Mapping, OtherShape};
pub(crate) use optimizer::SKIPPED;
pub use optimizer::{AdamW, StepOutputs};
pub use scale::LossScale;
pub use schedule::Schedule;
pub use weights::{WeightType, Weights};
