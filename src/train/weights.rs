//! Weights as safetensors files.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use half::f16;
use half::slice::HalfFloatSliceExt;
use safetensors::tensor::{Dtype, View};

use super::file::{self, File};
use crate::error::{Error, Result};
use crate::runtime::Session;

/// Element type of a weight file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightType {
    /// Exact.
    F32,
    /// Half the size, rounded to nearest even.
    F16,
}

/// All parameters of a session on the host, in PyTorch's names, shapes and order of elements.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Weights {
    tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    /// Free text that travels in the file's header, such as a configuration as JSON.
    pub description: String,
}

/// The key of the description in a file's metadata.
const KEY: &str = "energyflow";

struct Stored<'a> {
    shape: &'a [usize],
    dtype: Dtype,
    bytes: Vec<u8>,
}

impl View for Stored<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

impl Weights {
    /// Reads all parameters of a session; waits for the device.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::DeviceLost`]
    pub fn from_session(session: &Session) -> Result<Self> {
        let mut tensors = BTreeMap::new();
        for (name, shape) in session.parameters() {
            tensors.insert(name.to_owned(), (shape, session.get(name)?));
        }
        Ok(Self {
            tensors,
            description: String::new(),
        })
    }

    /// Writes them into a session whose graphs declare exactly these parameters.
    ///
    /// # Errors
    /// [`Error::Data`] naming the first parameter that is missing, unknown or of another shape, [`Error::Graph`] before a graph with
    /// parameters is compiled; then nothing is changed.
    pub fn apply(&self, session: &mut Session) -> Result<()> {
        let fail = |name: &str, reason: String| {
            Err(Error::Data {
                name: name.to_owned(),
                reason,
            })
        };
        let declared: BTreeMap<String, Vec<usize>> = session
            .parameters()
            .map(|(name, shape)| (name.to_owned(), shape))
            .collect();
        if declared.is_empty() && !self.tensors.is_empty() {
            return Err(Error::Graph(
                "session has no parameters yet: compile a graph first".into(),
            ));
        }
        for (name, shape) in &declared {
            match self.tensors.get(name) {
                None => return fail(name, "the weights lack this parameter".into()),
                Some((stored, _)) if stored != shape => {
                    return fail(
                        name,
                        format!("has shape {stored:?} in the weights, {shape:?} in the network"),
                    );
                }
                Some(_) => {}
            }
        }
        if let Some(name) = self
            .tensors
            .keys()
            .find(|name| !declared.contains_key(*name))
        {
            return fail(name, "the network has no such parameter".into());
        }
        for (name, (_, data)) in &self.tensors {
            session.set(name, data)?;
        }
        Ok(())
    }

    /// Shape and elements of one parameter.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<(&[usize], &[f32])> {
        let (shape, data) = self.tensors.get(name)?;
        Some((shape, data))
    }

    /// Names in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Writes a safetensors file, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Data`] naming a parameter that does not fit the type.
    pub fn save(&self, path: impl AsRef<Path>, dtype: WeightType) -> Result<()> {
        let mut views = Vec::new();
        for (name, (shape, data)) in &self.tensors {
            let (dtype, bytes) = match dtype {
                WeightType::F32 => (Dtype::F32, bytemuck::cast_slice(data).to_vec()),
                WeightType::F16 => {
                    let mut halves = vec![f16::ZERO; data.len()];
                    halves.convert_from_f32_slice(data);
                    if let Some(i) = halves.iter().position(|half| !half.is_finite()) {
                        return Err(Error::Data {
                            name: name.clone(),
                            reason: format!("element {i}, {}, does not fit f16", data[i]),
                        });
                    }
                    (Dtype::F16, bytemuck::cast_slice(&halves).to_vec())
                }
            };
            views.push((
                name.as_str(),
                Stored {
                    shape,
                    dtype,
                    bytes,
                },
            ));
        }
        file::save(path.as_ref(), views, KEY, self.description.clone())
    }

    /// Reads a safetensors file of f32 and f16 tensors.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] for a malformed file, another element type, NaN or infinity.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let file = File::read(path.as_ref())?;
        let (views, description) = file.tensors(KEY)?;
        let mut tensors = BTreeMap::new();
        for (name, view) in views.tensors() {
            let words = view.data();
            let offset = file.offset(words);
            let data: Vec<f32> = match view.dtype() {
                Dtype::F32 => file::floats(words),
                Dtype::F16 => words
                    .chunks_exact(2)
                    .map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())
                    .collect(),
                other => {
                    let reason = format!("tensor {name:?} is {other:?}, not F32 or F16");
                    return Err(file.fail(offset, reason));
                }
            };
            if let Some(i) = data.iter().position(|x| !x.is_finite()) {
                let at = offset + i * words.len() / data.len();
                return Err(file.fail(at, format!("tensor {name:?}: element {i} is {}", data[i])));
            }
            tensors.insert(name, (view.shape().to_vec(), data));
        }
        Ok(Self {
            tensors,
            description: description.unwrap_or_default(),
        })
    }
}
