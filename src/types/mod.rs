//! Plain data that every layer speaks: element types, shapes, windows of convolutions, elementwise functions.

mod op;
mod precision;
mod shape;
mod window;

pub use op::{BinaryOp, Broadcast, Rates, Trans, UnaryOp};
pub use precision::Precision;
pub use shape::{DType, Shape};
pub use window::{Padding, Window};
