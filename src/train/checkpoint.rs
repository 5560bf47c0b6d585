//! Checkpoints: all that a training needs to continue bit for bit, in one file.

use std::path::Path;

use safetensors::Dtype;

use super::accumulation;
use super::stored::{self, Kind, Stored, Tensors, fail};
use crate::error::Result;
use crate::file::{AtomicFile, TensorFile, floats, write_tensors};
use crate::fnv::fnv1a;
use crate::runtime::Session;

/// Parameters, optimizer moments, bias corrections and states of a session (step, loss scale, counters), exact, and a text of
/// the caller: a configuration, a seed, an epoch, as JSON or otherwise.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Checkpoint {
    tensors: Tensors,
    /// Free text that is stored in the file's header.
    pub metadata: String,
}

const FORMAT: &str = "checkpoint";
const VERSION: u32 = 2;

/// Keys in a file's metadata. The checksum covers names, shapes, elements and the caller's text; it finds accidents, not forgery.
const CHECKSUM: &str = "checksum";
const METADATA: &str = "metadata";

impl Kind {
    /// What names in a file begin with.
    fn prefix(self) -> &'static str {
        match self {
            Self::Parameter => "parameter.",
            Self::FirstMoment => "first_moment.",
            Self::SecondMoment => "second_moment.",
            Self::Corrections => "bias_corrections.",
            Self::State => "state.",
        }
    }
}

impl Checkpoint {
    /// Reads everything from a session between two steps; waits for the device.
    ///
    /// # Errors
    /// [`Error::Data`](crate::Error::Data) for a parameter, moment or state that is not finite, and while gradients are accumulated that no step has used;
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory), [`Error::DeviceLost`](crate::Error::DeviceLost).
    pub fn from_session(session: &Session) -> Result<Self> {
        if let Some(name) = accumulation::pending(session)? {
            return fail(
                &name,
                "gradients are accumulated that no step has used; save after the step",
            );
        }
        let mut checkpoint = Self::default();
        let mut insert = |kind: Kind, name: &str, shape: &[usize], data: Vec<f32>| {
            if let Some(i) = kind.find_bad(&data) {
                let (what, x) = (kind.what(), data[i]);
                return fail(name, format!("element {i} of the {what} is {x}"));
            }
            let shape = shape.to_vec();
            let key = (kind, name.to_owned());
            checkpoint.tensors.insert(key, Stored { shape, data });
            Ok(())
        };
        for (name, shape) in session.parameters() {
            insert(Kind::Parameter, name, &shape, session.get(name)?)?;
            if let Some([first, second]) = session.moments(name)? {
                insert(Kind::FirstMoment, name, &shape, first)?;
                insert(Kind::SecondMoment, name, &shape, second)?;
            }
            if let Some(corrections) = session.bias_corrections(name)? {
                insert(Kind::Corrections, name, &[2], corrections.to_vec())?;
            }
        }
        for (name, len) in session.states() {
            insert(Kind::State, name, &[len], session.get(name)?)?;
        }
        Ok(checkpoint)
    }

    /// Puts everything back into a session in which the same graphs are compiled. Gradients that were accumulated there are discarded.
    ///
    /// # Errors
    /// [`Error::Data`](crate::Error::Data) naming the first parameter, moment or state that is missing, unknown, of another shape or not finite. Everything
    /// is checked before the first value is written, so the session is then unchanged.
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory) and [`Error::DeviceLost`](crate::Error::DeviceLost) from the device, after which some values may have been written.
    pub fn apply(&self, session: &mut Session) -> Result<()> {
        let no_hint = |_: &str| String::new();
        stored::check(&self.tensors, session, "checkpoint", &Kind::ALL, no_hint)?;
        accumulation::discard(session)?;
        stored::put(&self.tensors, session)
    }

    /// Writes a safetensors file, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io), also if `path` is a directory or a special file.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let tensors = self.tensors.iter();
        let tensors =
            tensors.map(|((kind, name), stored)| stored.exact(format!("{}{name}", kind.prefix())));
        let checksum = self.checksum();
        let more = [(CHECKSUM, &*checksum), (METADATA, &*self.metadata)];
        let file = AtomicFile::create(path.as_ref())?;
        write_tensors(file, (FORMAT, VERSION), &more, tensors.collect())
    }

    /// Reads a file that [`Checkpoint::save`] has written.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io), also for a special file; [`Error::Format`](crate::Error::Format) for a file that is damaged, of another kind or of a newer
    /// version, and for values that no training can have.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let file = TensorFile::open(path.as_ref())?;
        let fail = |reason: &str| file.file().fail(0, reason);
        if file.version(FORMAT, VERSION)?.is_none() {
            return Err(fail("this is no checkpoint"));
        }
        let entry = |key| {
            let missing = || fail("the checkpoint lacks its checksum or metadata");
            file.metadata(key).ok_or_else(missing)
        };
        let mut checkpoint = Self {
            tensors: Tensors::new(),
            metadata: entry(METADATA)?.to_owned(),
        };
        for (full, place) in file.tensors() {
            let mut kinds = Kind::ALL.into_iter();
            let key =
                kinds.find_map(|kind| Some((kind, full.strip_prefix(kind.prefix())?.to_owned())));
            let start = place.bytes.start;
            let (Some(key), Dtype::F32) = (key, place.dtype) else {
                let reason = format!("tensor {full:?} has no place in a checkpoint");
                return Err(file.file().fail(start, reason));
            };
            let data: Vec<f32> = floats(&file.read(full, place)?).collect();
            if let Some(i) = key.0.find_bad(&data) {
                let reason = format!("tensor {full:?}: element {i} is {}", data[i]);
                return Err(file.file().fail(start + 4 * i as u64, reason));
            }
            let shape = place.shape.clone();
            checkpoint.tensors.insert(key, Stored { shape, data });
        }
        if checkpoint.checksum() != entry(CHECKSUM)? {
            return Err(fail("the checksum is wrong: the file is damaged"));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use crate::gpu::{Gpu, GpuOptions};
    use crate::graph::{Graph, Init};
    use crate::train::{AdamW, Weights};

    /// A session with two parameters, their moments and some states, after one step.
    fn session() -> Session {
        let mut graph = Graph::new();
        let names = ["a.bias", "b.weight"];
        let parameters = names.map(|name| {
            let init = Init::Uniform(1.0);
            graph.parameter(name, &[2, 3], init).unwrap()
        });
        let product = graph.mul(parameters[0], parameters[1]).unwrap();
        let loss = graph.sum_all(product).unwrap();
        AdamW::default()
            .step(&mut graph, loss, &parameters)
            .unwrap();
        let mut session = Session::new(&Gpu::new(&GpuOptions::default()).unwrap(), 1);
        let step = session.compile(&graph).unwrap();
        step.run(&[]).unwrap().wait().unwrap();
        session
    }

    /// A way to spoil a checkpoint: what is damaged, how, and what the error says of it.
    type Damage = (
        &'static str,
        &'static str,
        fn(&mut Tensors, &(Kind, String)),
    );

    #[test]
    fn a_checkpoint_that_does_not_fit_changes_nothing() {
        let mut session = session();
        let before = Checkpoint::from_session(&session).unwrap();
        let mut other = before.clone();
        for stored in other.tensors.values_mut() {
            stored.data.fill(0.25);
        }
        let damages: [Damage; 6] = [
            ("is NaN", "element 0 is NaN", |tensors, key| {
                tensors.get_mut(key).unwrap().data[0] = f32::NAN;
            }),
            ("is inf", "is inf", |tensors, key| {
                *tensors.get_mut(key).unwrap().data.last_mut().unwrap() = f32::INFINITY;
            }),
            ("lacks the", "", |tensors, key| {
                tensors.remove(key);
            }),
            ("has shape", "", |tensors, key| {
                tensors.get_mut(key).unwrap().shape.push(1);
            }),
            ("has no such", "", |tensors, key| {
                let stored = tensors[key].clone();
                tensors.insert((key.0, format!("{}.more", key.1)), stored);
            }),
            ("is -1", "is -1", |tensors, key| {
                tensors.get_mut(key).unwrap().data[0] = -1.0;
            }),
        ];
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("checkpoint");
        for (in_session, in_file, damage) in damages {
            for key in before.tensors.keys() {
                if in_session == "is -1" && key.0 != Kind::SecondMoment {
                    continue;
                }
                let mut spoiled = other.clone();
                damage(&mut spoiled.tensors, key);
                let error = spoiled.apply(&mut session).unwrap_err();
                assert!(
                    matches!(&error, Error::Data { name, reason }
                        if name.starts_with(&key.1) && reason.contains(in_session)),
                    "{key:?}: {error}"
                );
                assert!(
                    Checkpoint::from_session(&session).unwrap() == before,
                    "{key:?}: {error}"
                );
                // Values that no training can have are found when the file is read, whose checksum is right.
                if !in_file.is_empty() {
                    spoiled.save(&path).unwrap();
                    let error = Checkpoint::load(&path).unwrap_err();
                    assert!(
                        matches!(&error, Error::Format { offset, reason, .. }
                            if *offset > 0 && reason.contains(in_file)),
                        "{key:?}: {error}"
                    );
                }
            }
        }
        other.apply(&mut session).unwrap();
        assert!(Checkpoint::from_session(&session).unwrap() == other);
    }

    #[test]
    fn a_session_without_parameters_says_so() {
        let full = session();
        let checkpoint = Checkpoint::from_session(&full).unwrap();
        let mut empty = Session::new(full.gpu(), 0);
        for error in [
            checkpoint.apply(&mut empty).unwrap_err(),
            Weights::from_session(&full)
                .unwrap()
                .apply(&mut empty)
                .unwrap_err(),
        ] {
            let text = error.to_string();
            assert!(text.contains("compile a graph first"), "{text}");
        }
        Checkpoint::default().apply(&mut empty).unwrap();
    }
}
