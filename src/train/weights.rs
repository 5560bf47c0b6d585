//! Weights as safetensors files.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use safetensors::Dtype;

use super::mapping::{Fitting, Mapping};
use super::stored::{self, Kind, Stored, Tensors, fail};
use crate::error::Result;
use crate::file::{AtomicFile, TensorFile, TensorOut, floats, write_tensors};
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
    /// Of [`Kind::Parameter`] only.
    tensors: Tensors,
    /// Tensors that a file has, but that are not read: names and element types.
    skipped: BTreeMap<String, String>,
    /// Free text that is stored in the file's header, such as a configuration as JSON.
    pub description: String,
}

const FORMAT: &str = "weights";
const VERSION: u32 = 1;

/// The key of the description in a file's metadata.
const DESCRIPTION: &str = "description";

impl Weights {
    /// Reads all parameters of a session; waits for the device.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory), [`Error::DeviceLost`](crate::Error::DeviceLost)
    pub fn from_session(session: &Session) -> Result<Self> {
        let mut weights = Self::default();
        for (name, shape) in session.parameters() {
            let data = session.get(name)?;
            let key = (Kind::Parameter, name.to_owned());
            weights.tensors.insert(key, Stored { shape, data });
        }
        Ok(weights)
    }

    /// Writes them into a session whose graphs declare exactly these parameters.
    ///
    /// # Errors
    /// [`Error::Data`](crate::Error::Data) naming the first parameter that is missing, unknown, of another shape or not finite. Everything
    /// is checked before the first parameter is written, so the session is then unchanged.
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory) and [`Error::DeviceLost`](crate::Error::DeviceLost) from the device, after which some parameters may have been written.
    pub fn apply(&self, session: &mut Session) -> Result<()> {
        let hint = |name: &str| match self.skipped.get(name) {
            Some(dtype) => {
                format!(": the file has it as {dtype}, which is not read; convert it to F32")
            }
            None => String::new(),
        };
        stored::check(&self.tensors, session, "weights", &[Kind::Parameter], hint)?;
        stored::put(&self.tensors, session)
    }

    /// Writes those into a session that fit one of its parameters in name and shape, and reports what did not. The other parameters
    /// stay as they are.
    ///
    /// # Errors
    /// [`Error::Data`](crate::Error::Data) if nothing fits, which is most likely a matter of names, and naming a parameter that is not
    /// finite; the session is then unchanged. [`Error::Graph`](crate::Error::Graph) for a session without parameters;
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory) and [`Error::DeviceLost`](crate::Error::DeviceLost) as for
    /// [`apply`](Self::apply).
    pub fn apply_fitting(&self, session: &mut Session) -> Result<Fitting> {
        let (fits, mut fitting) = stored::fitting(&self.tensors, session)?;
        let skipped = self.skipped();
        fitting.skipped = skipped
            .map(|(name, dtype)| (name.into(), dtype.into()))
            .collect();
        if fits.is_empty() {
            return fail("weights", format!("no tensor fits; {fitting}"));
        }
        stored::put(&fits, session)?;
        Ok(fitting)
    }

    /// Shape and elements of one parameter.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<(&[usize], &[f32])> {
        let stored = self.tensors.get(&(Kind::Parameter, name.to_owned()))?;
        Some((&stored.shape, &stored.data))
    }

    /// Adds a parameter or replaces it. There are as many elements as the shape says.
    pub(crate) fn insert(&mut self, name: String, shape: Vec<usize>, data: Vec<f32>) {
        debug_assert_eq!(shape.iter().product::<usize>(), data.len());
        self.tensors
            .insert((Kind::Parameter, name), Stored { shape, data });
    }

    /// Takes a parameter out: shape and elements.
    pub(crate) fn remove(&mut self, name: &str) -> Option<(Vec<usize>, Vec<f32>)> {
        let stored = self.tensors.remove(&(Kind::Parameter, name.to_owned()))?;
        Some((stored.shape, stored.data))
    }

    /// Names in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(|(_, name)| name.as_str())
    }

    /// Tensors of the file that were not read, because their elements are neither F32, F16, BF16 nor F64: names and element types,
    /// in alphabetical order.
    pub fn skipped(&self) -> impl Iterator<Item = (&str, &str)> {
        let skipped = self.skipped.iter();
        skipped.map(|(name, dtype)| (name.as_str(), dtype.as_str()))
    }

    /// Writes a safetensors file, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io), also if `path` is a directory or a special file; [`Error::Data`](crate::Error::Data) naming a
    /// parameter that does not fit the type.
    pub fn save(&self, path: impl AsRef<Path>, dtype: WeightType) -> Result<()> {
        let more = [(DESCRIPTION, self.description.as_str())];
        self.write(path.as_ref(), dtype, &more)
    }

    /// As [`save`](Self::save), with the metadata without which Python's transformers refuses a file.
    pub(crate) fn save_for_pytorch(&self, path: impl AsRef<Path>, dtype: WeightType) -> Result<()> {
        self.write(path.as_ref(), dtype, &[("format", "pt")])
    }

    fn write(&self, path: &Path, dtype: WeightType, more: &[(&str, &str)]) -> Result<()> {
        let mut tensors = Vec::new();
        for ((_, name), stored) in &self.tensors {
            let exact = stored.exact(name.clone());
            tensors.push(match dtype {
                WeightType::F32 => exact,
                WeightType::F16 => TensorOut {
                    dtype: Dtype::F16,
                    bytes: Cow::Owned(halves(name, &stored.data)?),
                    ..exact
                },
            });
        }
        let file = AtomicFile::create(path)?;
        write_tensors(file, (FORMAT, VERSION), more, tensors)
    }

    /// Reads the F32, F16, BF16 and F64 tensors of a safetensors file, whoever wrote it. Tensors of other types, such as the I64 counters
    /// that PyTorch's batch normalisation keeps, or F8, are [skipped](Self::skipped) with a warning in the log. F64 is rounded to f32.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io), also for a special file; [`Error::Format`](crate::Error::Format) for a malformed file, a file of another kind or a newer
    /// version, NaN or infinity.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        Self::load_with(path, |name| Some(name.to_owned()))
    }

    /// [`load`](Self::load) with other names. Tensors that the mapping leaves out are not read.
    ///
    /// # Errors
    /// As for [`load_with`](Self::load_with).
    pub fn load_mapped(path: impl AsRef<Path>, mapping: &Mapping) -> Result<Self> {
        Self::load_with(path, |name| mapping.name(name))
    }

    /// [`load`](Self::load) of the tensors for which `rename` returns a name, under that name. Others are not read.
    ///
    /// # Errors
    /// As for [`load`](Self::load); [`Error::Format`](crate::Error::Format) if two tensors get the same name.
    pub fn load_with(
        path: impl AsRef<Path>,
        mut rename: impl FnMut(&str) -> Option<String>,
    ) -> Result<Self> {
        let file = TensorFile::open(path.as_ref())?;
        file.version(FORMAT, VERSION)?;
        let mut weights = Self {
            description: file.metadata(DESCRIPTION).unwrap_or_default().to_owned(),
            ..Self::default()
        };
        let mut origins = BTreeMap::new();
        for (old, place) in file.tensors() {
            let Some(name) = rename(old) else {
                continue;
            };
            if let Some(other) = origins.insert(name.clone(), old) {
                let reason = format!("tensors {other:?} and {old:?} both become {name:?}");
                return Err(file.file().fail(place.bytes.start, reason));
            }
            if !matches!(
                place.dtype,
                Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F64
            ) {
                let dtype = format!("{:?}", place.dtype);
                log::warn!(
                    "{}: tensor {old:?} is {dtype} and is skipped; F32, F16, BF16 and F64 are read",
                    path.as_ref().display()
                );
                weights.skipped.insert(name, dtype);
                continue;
            }
            let bytes = file.read(old, place)?;
            let words = bytes.as_chunks().0.iter();
            let data: Vec<f32> = match place.dtype {
                Dtype::F16 => words.map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
                Dtype::BF16 => words.map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
                Dtype::F64 => {
                    let words = bytes.as_chunks().0.iter();
                    words.map(|b| f64::from_le_bytes(*b) as f32).collect()
                }
                _ => floats(&bytes).collect(),
            };
            if let Some(i) = Kind::Parameter.find_bad(&data) {
                let at = place.bytes.start + (i * (bytes.len() / data.len())) as u64;
                let reason = format!("tensor {old:?}: element {i} is {} as f32", data[i]);
                return Err(file.file().fail(at, reason));
            }
            let shape = place.shape.clone();
            let key = (Kind::Parameter, name);
            weights.tensors.insert(key, Stored { shape, data });
        }
        Ok(weights)
    }
}

/// The bytes of a parameter rounded to f16.
fn halves(name: &str, data: &[f32]) -> Result<Vec<u8>> {
    let mut halves = vec![f16::ZERO; data.len()];
    halves.convert_from_f32_slice(data);
    match halves.iter().position(|half| !half.is_finite()) {
        Some(i) => fail(name, format!("element {i}, {}, does not fit f16", data[i])),
        None => Ok(bytemuck::cast_slice(&halves).to_vec()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    /// The name under which safetensors files hold their metadata.
    #[test]
    fn a_reserved_name_is_not_saved() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        let mut weights = Weights::default();
        let key = (Kind::Parameter, "__metadata__".to_owned());
        let (shape, data) = (vec![1], vec![1.0]);
        weights.tensors.insert(key, Stored { shape, data });
        let error = weights.save(&path, WeightType::F32).unwrap_err();
        assert!(
            matches!(&error, Error::Data { name, .. } if name == "__metadata__"),
            "{error}"
        );
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
