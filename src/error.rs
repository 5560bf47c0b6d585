//! The one error type of the crate.

use std::path::PathBuf;

use crate::types::Shape;

/// What every fallible function of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong. Nothing here is reached by panicking.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No adapter satisfies the request; nothing is computed on the CPU instead.
    #[error("no usable GPU adapter: {reason}")]
    NoAdapter {
        /// What was asked for, what was found, and what to do.
        reason: String,
    },
    /// The adapter exists, but refused to open a device.
    #[error(
        "adapter {adapter:?} could not open a device: {reason}; ask for fewer features, or for another adapter of Gpu::adapters"
    )]
    DeviceRequest {
        /// The adapter's name.
        adapter: String,
        /// What the driver said.
        reason: String,
    },
    /// The device has no memory left for an allocation.
    #[error("out of GPU memory while {what} ({bytes} bytes)")]
    OutOfMemory {
        /// What was being done.
        what: String,
        /// The size of the request in bytes.
        bytes: u64,
    },
    /// The device is gone (driver reset, unplugged, destroyed); a new [`Gpu`](crate::Gpu) is needed.
    #[error("GPU device lost: {reason}; open a new Gpu, and go on from what was last saved")]
    DeviceLost {
        /// What the driver said.
        reason: String,
    },
    /// wgpu rejected a call: a defect of this crate or of the driver, never of user data.
    #[error("wgpu rejected {what}: {reason}")]
    Validation {
        /// What was being done.
        what: String,
        /// wgpu's message.
        reason: String,
    },
    /// A request exceeds a limit of the adapter.
    #[error("{what} needs {needed}, but the adapter's limit {limit} is {available}")]
    Limit {
        /// What was being done.
        what: String,
        /// The limit's name in `wgpu::Limits`.
        limit: &'static str,
        /// What would be needed.
        needed: u64,
        /// What the adapter has.
        available: u64,
    },
    /// Rows, columns, type and alignment do not make a valid memory layout, or do not fit a buffer.
    #[error("invalid layout of {rows} rows x {cols} columns: {reason}")]
    Layout {
        /// Number of rows.
        rows: usize,
        /// Number of columns.
        cols: usize,
        /// Which rule is broken.
        reason: String,
    },
    /// Extents are zero or too large, or the operands of an operation do not fit together.
    #[error("{}", show_shape_error(.layer.as_deref(), .op, .shapes, .reason))]
    Shape {
        /// The layer that was being built, see [`Graph::scoped`](crate::Graph::scoped).
        layer: Option<String>,
        /// The operation.
        op: &'static str,
        /// Shapes of its operands, in order.
        shapes: Vec<Shape>,
        /// Which rule is broken.
        reason: String,
    },
    /// A graph is used in a way it cannot be: an unknown name, a second definition, a missing gradient.
    #[error("graph: {0}")]
    Graph(String),
    /// Host data does not match the value it is meant for.
    #[error("{}", show_data_error(.name, .reason))]
    Data {
        /// The input, parameter or state.
        name: String,
        /// What does not match.
        reason: String,
    },
    /// A configuration value is out of its range.
    #[error("configuration: {field} {reason}")]
    Config {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A file is malformed.
    #[error("{}: byte {offset}: {reason}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Byte offset of the first offending value.
        offset: u64,
        /// What is wrong there.
        reason: String,
    },
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// A file could not be fetched, or is not what its server states.
    #[error("download of {what}: {reason}")]
    Download {
        /// The model or the address.
        what: String,
        /// What went wrong.
        reason: String,
    },
    /// Text could not be tokenised, or a tokeniser could not be loaded.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The device was opened without an optional feature that this call cannot do without.
    #[error("{what} needs the device feature {feature}, which is not available")]
    Unsupported {
        /// What was being done.
        what: String,
        /// The feature's name in `wgpu::Features`.
        feature: &'static str,
    },
}

impl Error {
    pub(crate) fn shape(op: &'static str, shapes: &[&Shape], reason: impl Into<String>) -> Self {
        Self::Shape {
            layer: None,
            op,
            shapes: shapes.iter().map(|&shape| shape.clone()).collect(),
            reason: reason.into(),
        }
    }

    pub(crate) fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Io {
            path: path.into(),
            source,
        }
    }

    /// The same error, with the layer that was being built unless an inner layer is named already.
    pub(crate) fn in_layer(self, path: &str) -> Self {
        match self {
            Self::Shape {
                layer: None,
                op,
                shapes,
                reason,
            } => Self::Shape {
                layer: Some(path.to_owned()),
                op,
                shapes,
                reason,
            },
            Self::Graph(reason) if !reason.starts_with(LAYER) => {
                Self::Graph(format!("{LAYER}{path:?}: {reason}"))
            }
            Self::Config { field, reason } if !reason.contains(LAYER) => Self::Config {
                field,
                reason: format!("{reason} ({LAYER}{path:?})"),
            },
            other => other,
        }
    }
}

/// How the name of a layer begins in a message.
const LAYER: &str = "layer ";

/// Shapes that the reason names already are not listed again.
fn show_shape_error(layer: Option<&str>, op: &str, shapes: &[Shape], reason: &str) -> String {
    let layer = layer.map(|path| format!("{LAYER}{path:?}: "));
    let layer = layer.unwrap_or_default();
    let shapes: Vec<String> = shapes.iter().map(Shape::to_string).collect();
    if !shapes.iter().all(|shape| reason.contains(shape)) {
        return format!("{layer}{op} {}: {reason}", shapes.join(", "));
    }
    match reason.starts_with('[') && reason.contains(": ") {
        true => format!("{layer}{op} {reason}"),
        false => format!("{layer}{op}: {reason}"),
    }
}

/// A name that the reason mentions already is not repeated.
fn show_data_error(name: &str, reason: &str) -> String {
    match reason.contains(&format!("{name:?}")) {
        true => reason.to_owned(),
        false => format!("value {name:?}: {reason}"),
    }
}
