//! Everything that touches wgpu, and nothing that knows about networks.

mod layout;

pub use layout::{Alignment, Layout};
