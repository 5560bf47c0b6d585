//! Checkpoints: all that a training needs to continue bit for bit, in one file.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::{Dtype, View};
use serde::{Deserialize, Serialize};

use super::accumulation;
use super::file::{self, File};
use crate::error::{Error, Result};
use crate::fnv::fnv1a;
use crate::runtime::Session;

/// Parameters, optimizer moments and states of a session (step, bias corrections, loss scale, counters), exact, and a text of
/// the caller: a configuration, a seed, an epoch, as JSON or otherwise.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Checkpoint {
    /// By kind and name.
    tensors: BTreeMap<(Kind, String), Stored>,
    /// Free text that travels in the file's header.
    pub metadata: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Parameter,
    FirstMoment,
    SecondMoment,
    State,
}

#[derive(Clone, Debug, PartialEq)]
struct Stored {
    shape: Vec<usize>,
    data: Vec<f32>,
}

/// The key of the header in a file's metadata.
const KEY: &str = "energyflow.checkpoint";
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Header {
    version: u32,
    /// Of names, shapes, elements and metadata: against accidents, not against forgery.
    checksum: String,
    metadata: String,
}

impl Kind {
    const ALL: [Self; 4] = [
        Self::Parameter,
        Self::FirstMoment,
        Self::SecondMoment,
        Self::State,
    ];

    /// What names in a file begin with.
    fn prefix(self) -> &'static str {
        match self {
            Self::Parameter => "parameter.",
            Self::FirstMoment => "first_moment.",
            Self::SecondMoment => "second_moment.",
            Self::State => "state.",
        }
    }

    fn what(self) -> &'static str {
        match self {
            Self::Parameter => "parameter",
            Self::FirstMoment => "first moment of this parameter",
            Self::SecondMoment => "second moment of this parameter",
            Self::State => "state",
        }
    }
}

impl View for &Stored {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(bytemuck::cast_slice(&self.data))
    }
    fn data_len(&self) -> usize {
        4 * self.data.len()
    }
}

fn fail<T>(name: &str, reason: impl Into<String>) -> Result<T> {
    Err(Error::Data {
        name: name.to_owned(),
        reason: reason.into(),
    })
}

impl Checkpoint {
    /// Reads everything from a session between two steps; waits for the device.
    ///
    /// # Errors
    /// [`Error::Data`] for a parameter, moment or state that is not finite, and where gradients are accumulated that no step has used yet;
    /// [`Error::OutOfMemory`], [`Error::DeviceLost`].
    pub fn from_session(session: &Session) -> Result<Self> {
        if let Some(name) = accumulation::pending(session)? {
            return fail(name, "gradients are accumulated for a step; save behind it");
        }
        let mut tensors = BTreeMap::new();
        let mut insert = |kind, name: &str, shape: &[usize], data: Vec<f32>| {
            if let Some(i) = data.iter().position(|x| !x.is_finite()) {
                let (what, x) = (Kind::what(kind), data[i]);
                return fail(name, format!("element {i} of the {what} is {x}"));
            }
            let shape = shape.to_vec();
            tensors.insert((kind, name.to_owned()), Stored { shape, data });
            Ok(())
        };
        for (name, shape) in session.parameters() {
            insert(Kind::Parameter, name, &shape, session.get(name)?)?;
            if let Some([first, second]) = session.moments(name)? {
                insert(Kind::FirstMoment, name, &shape, first)?;
                insert(Kind::SecondMoment, name, &shape, second)?;
            }
        }
        for (name, len) in session.states() {
            insert(Kind::State, name, &[len], session.get(name)?)?;
        }
        Ok(Self {
            tensors,
            metadata: String::new(),
        })
    }

    /// Puts everything back into a session in which the same graphs are compiled. Gradients that were accumulated there are forgotten.
    ///
    /// # Errors
    /// [`Error::Data`] naming the first parameter or state that is missing, unknown or of another shape; then nothing is changed.
    /// [`Error::OutOfMemory`], [`Error::DeviceLost`].
    pub fn apply(&self, session: &mut Session) -> Result<()> {
        let known = declared(session)?;
        for (key, shape) in &known {
            let (name, what) = (&key.1, key.0.what());
            match self.tensors.get(key) {
                None => return fail(name, format!("the checkpoint lacks the {what}")),
                Some(stored) if stored.shape != *shape => {
                    let stored = &stored.shape;
                    return fail(
                        name,
                        format!(
                            "the {what} has shape {stored:?} in the checkpoint, {shape:?} in the session"
                        ),
                    );
                }
                Some(_) => {}
            }
        }
        if let Some((kind, name)) = self.tensors.keys().find(|key| !known.contains_key(key)) {
            return fail(name, format!("the session has no such {}", kind.what()));
        }
        accumulation::discard(session)?;
        let none = Vec::new();
        for ((kind, name), stored) in &self.tensors {
            match kind {
                Kind::Parameter | Kind::State => session.set(name, &stored.data)?,
                Kind::FirstMoment => {
                    let second = self.tensors.get(&(Kind::SecondMoment, name.clone()));
                    let second = second.map_or(&none, |stored| &stored.data);
                    session.set_moments(name, [&stored.data, second])?;
                }
                // Together with the first.
                Kind::SecondMoment => {}
            }
        }
        Ok(())
    }

    /// Writes a safetensors file, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let header = Header {
            version: VERSION,
            checksum: self.checksum(),
            metadata: self.metadata.clone(),
        };
        let header = serde_json::to_string(&header)
            .map_err(|error| Error::io(path, std::io::Error::other(error)))?;
        let views = self
            .tensors
            .iter()
            .map(|((kind, name), stored)| (format!("{}{name}", kind.prefix()), stored));
        file::save(path, views, KEY, header)
    }

    /// Reads a file that [`Checkpoint::save`] has written.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] for a file that is damaged, of another kind or of another version.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let file = File::read(path.as_ref())?;
        let (views, header) = file.tensors(KEY)?;
        let header = header.ok_or_else(|| file.fail(0, "this is no checkpoint"))?;
        // Another version may have another header, but has its number.
        let number: serde_json::Value =
            serde_json::from_str(&header).map_err(|error| file.fail(0, error.to_string()))?;
        if number["version"] != VERSION {
            let found = &number["version"];
            return Err(file.fail(0, format!("version {found}, this is version {VERSION}")));
        }
        let header: Header =
            serde_json::from_value(number).map_err(|error| file.fail(0, error.to_string()))?;
        let mut tensors = BTreeMap::new();
        for (full, view) in views.tensors() {
            let mut kinds = Kind::ALL.into_iter();
            let key =
                kinds.find_map(|kind| Some((kind, full.strip_prefix(kind.prefix())?.to_owned())));
            let (Some(key), Dtype::F32) = (key, view.dtype()) else {
                let reason = format!("tensor {full:?} has no place in a checkpoint");
                return Err(file.fail(file.offset(view.data()), reason));
            };
            let stored = Stored {
                shape: view.shape().to_vec(),
                data: file::floats(view.data()),
            };
            tensors.insert(key, stored);
        }
        let checkpoint = Self {
            tensors,
            metadata: header.metadata,
        };
        if checkpoint.checksum() != header.checksum {
            return Err(file.fail(0, "the checksum is wrong: the file is damaged"));
        }
        Ok(checkpoint)
    }

    fn checksum(&self) -> String {
        // Hashes of parts of known length, so that no two checkpoints give the same bytes.
        let mut hashes = fnv1a(self.metadata.as_bytes()).to_le_bytes().to_vec();
        for ((kind, name), stored) in &self.tensors {
            let shape: Vec<u64> = stored.shape.iter().map(|&extent| extent as u64).collect();
            for part in [
                kind.prefix().as_bytes(),
                name.as_bytes(),
                bytemuck::cast_slice(&shape),
                bytemuck::cast_slice(&stored.data),
            ] {
                hashes.extend(fnv1a(part).to_le_bytes());
            }
        }
        format!("{:016x}", fnv1a(&hashes))
    }
}

/// What a checkpoint for a session holds, with shapes.
fn declared(session: &Session) -> Result<BTreeMap<(Kind, String), Vec<usize>>> {
    let mut declared = BTreeMap::new();
    for (name, shape) in session.parameters() {
        if session.has_moments(name)? {
            for kind in [Kind::FirstMoment, Kind::SecondMoment] {
                declared.insert((kind, name.to_owned()), shape.clone());
            }
        }
        declared.insert((Kind::Parameter, name.to_owned()), shape);
    }
    for (name, len) in session.states() {
        declared.insert((Kind::State, name.to_owned()), vec![len]);
    }
    Ok(declared)
}
