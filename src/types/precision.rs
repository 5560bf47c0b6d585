//! What a network computes in.

/// What the network between tokens and embedding computes in. Sums, statistics, the loss, master weights and the optimizer are
/// f32 in either case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// f32 storage.
    #[default]
    F32,
    /// f16 storage and matrix inputs, with loss scaling.
    Mixed,
}
