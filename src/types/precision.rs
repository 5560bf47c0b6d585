//! The element type that a network computes in.

/// The element type of the activations between tokens and embedding.
///
/// Sums, statistics, the loss, master weights and the optimizer are f32 in both cases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// f32 storage.
    #[default]
    F32,
    /// f16 storage and matrix inputs, with loss scaling.
    Mixed,
}
