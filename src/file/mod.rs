//! Files: regular files read by position, files and folders that appear under their name only when complete, and safetensors on top.

mod atomic;
mod folder;
mod input;
mod integers;
mod log;
mod tensors;

pub(crate) use atomic::AtomicFile;
pub(crate) use folder::{AtomicFolder, find};
pub(crate) use input::{InputFile, Sequential};
pub(crate) use integers::quantize;
pub(crate) use log::open_log;
pub(crate) use tensors::{
    TensorFile, TensorOut, TensorPlace, TensorStream, floats, is_tensor_file, newer,
    stream_tensors, write_tensors,
};
