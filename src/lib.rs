//! Define a network once with static shapes; energyflow compiles it to a short list of fused WGSL kernels with every buffer,
//! pipeline and binding already in place. Running it is one submission, training included, on Metal, Vulkan and DX12.
//!
//! ```
//! use energyflow::graph::Graph;
//! use energyflow::runtime::{Host, Session};
//! use energyflow::types::DType;
//! use energyflow::nn::Linear;
//! use energyflow::{Gpu, GpuOptions};
//!
//! # fn main() -> energyflow::Result<()> {
//! let mut graph = Graph::new();
//! let x = graph.input("x", &[4, 3], DType::F32)?;
//! let y = Linear::new(&mut graph, "layer", 3, 2, true)?.forward(&mut graph, x)?;
//! graph.output("y", y)?;
//!
//! let mut session = Session::new(&Gpu::new(&GpuOptions::default())?, 0);
//! let executable = session.compile(&graph)?;
//! let outputs = executable.run(&[("x", Host::F32(&[0.5; 12]))])?.wait()?;
//! assert_eq!(outputs.get("y")?.len(), 4 * 2);
//! # Ok(())
//! # }
//! ```
//!
//! From the bottom up: [`gpu`] is the device, [`graph`] the network as written, [`runtime`] what it is compiled to and how that runs, [`nn`]
//! the layers, [`train`] the optimizer, [`text`] sentence encoders, a decoder, transformers and search. [`mod@reference`] computes every
//! graph once more on the CPU in f64; the tests compare every kernel with it.
//!
//! The folder `docs` of the repository has short answers with code (`guide.md`), the way from a text file to a search (`textbridge.md`)
//! and how all of it works (`architecture.md`).
#![warn(missing_docs)]

#[cfg(all(test, feature = "trace"))]
extern crate self as energyflow;

#[cfg(test)]
mod checked;
mod compile;
pub mod direct;
pub mod error;
mod file;
mod fnv;
pub mod gpu;
pub mod graph;
mod kernels;
pub mod nn;
pub mod reference;
pub mod runtime;
mod setters;
/// Kernels computed as Metal would, or compiled as Direct3D would, see `tests/stand_in`.
#[cfg(all(test, feature = "trace"))]
#[path = "../tests/stand_in/mod.rs"]
mod stand_in;
pub mod text;
pub mod train;
/// Kernels in the languages of all platforms.
#[cfg(all(test, not(feature = "trace")))]
#[path = "../tests/stand_in/translate.rs"]
mod translate;
pub mod types;

#[cfg(all(test, feature = "trace"))]
use stand_in::translate;

pub use error::{Error, Result};
pub use gpu::{Gpu, GpuOptions};
pub use graph::Graph;
pub use half;
pub use runtime::{Executable, Host, Session};
pub use types::DType;
pub use wgpu;

/// Compiles and runs the examples of the documentation.
#[cfg(doctest)]
#[doc = include_str!("../docs/guide.md")]
struct Guide;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

#[cfg(all(doctest, feature = "tokenizer"))]
#[doc = include_str!("../docs/textbridge.md")]
struct TextBridge;
