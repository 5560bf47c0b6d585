//! Files: regular files read by position, files that appear under their name only when complete, and safetensors on top of both.

mod atomic;
mod input;
mod tensors;

pub(crate) use atomic::AtomicFile;
pub(crate) use input::{InputFile, Sequential};
pub(crate) use tensors::{
    TensorFile, TensorOut, TensorPlace, floats, is_tensor_file, newer, write_tensors,
};
