//! Tensors of a session on the host, by kind and name: what weights and checkpoints have in common.

use std::collections::BTreeMap;

use safetensors::Dtype;

use super::mapping::{Fitting, OtherShape};
use crate::error::{Error, Result};
use crate::file::TensorOut;
use crate::runtime::Session;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Parameter,
    FirstMoment,
    SecondMoment,
    Corrections,
    State,
}

impl Kind {
    pub const ALL: [Self; 5] = [
        Self::Parameter,
        Self::FirstMoment,
        Self::SecondMoment,
        Self::Corrections,
        Self::State,
    ];

    pub fn what(self) -> &'static str {
        match self {
            Self::Parameter => "parameter",
            Self::FirstMoment => "first moment of this parameter",
            Self::SecondMoment => "second moment of this parameter",
            Self::Corrections => "bias correction of this parameter",
            Self::State => "state",
        }
    }

    /// The first element that cannot be right: one that is not finite, or a negative mean of squares or correction.
    pub fn find_bad(self, data: &[f32]) -> Option<usize> {
        let positive = matches!(self, Self::SecondMoment | Self::Corrections);
        let bad = |x: &f32| !x.is_finite() || (positive && *x < 0.0);
        data.iter().position(bad)
    }
}

pub(super) type Key = (Kind, String);

/// Elements in the order of the host shape.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Stored {
    pub shape: Vec<usize>,
    pub data: Vec<f32>,
}

impl Stored {
    /// To be written as f32.
    pub fn exact(&self, name: String) -> TensorOut<'_> {
        TensorOut {
            name,
            dtype: Dtype::F32,
            shape: self.shape.clone(),
            bytes: bytemuck::cast_slice(&self.data).into(),
        }
    }
}

pub(super) type Tensors = BTreeMap<Key, Stored>;

pub(super) fn fail<T>(name: &str, reason: impl Into<String>) -> Result<T> {
    Err(Error::Data {
        name: name.to_owned(),
        reason: reason.into(),
    })
}

/// Checks that `tensors`, which come from `source`, are those of a session: the same names and shapes, and no value that
/// [`Kind::find_bad`] finds. `kinds` are the kinds that `source` holds; `hint` is added where it lacks a parameter of this name.
///
/// # Errors
/// [`Error::Graph`] for a session without parameters, [`Error::Data`] naming the first tensor that does not fit.
pub(super) fn check(
    tensors: &Tensors,
    session: &Session,
    source: &str,
    kinds: &[Kind],
    hint: impl Fn(&str) -> String,
) -> Result<()> {
    let declared = declared(session, kinds)?;
    if declared.is_empty() && !tensors.is_empty() {
        return Err(no_parameters());
    }
    for (key, shape) in &declared {
        let (name, what) = (&key.1, key.0.what());
        match tensors.get(key) {
            None => {
                let hint = hint(name);
                let lack = if source == "weights" { "lack" } else { "lacks" };
                return fail(name, format!("the {source} {lack} the {what}{hint}"));
            }
            Some(stored) if stored.shape != *shape => {
                let stored = &stored.shape;
                let reason = format!(
                    "the {what} has shape {stored:?} in the {source}, {shape:?} in the session"
                );
                return fail(name, reason);
            }
            Some(_) => {}
        }
    }
    for (key, stored) in tensors {
        let (name, what) = (&key.1, key.0.what());
        if !declared.contains_key(key) {
            return fail(name, format!("the session has no such {what}"));
        }
        check_values(key, stored)?;
    }
    Ok(())
}

/// The parameters among `tensors` that fit a parameter of a session, and what is said of all.
///
/// # Errors
/// [`Error::Graph`] for a session without parameters, [`Error::Data`] naming the first parameter that fits but is not finite.
pub(super) fn fitting(tensors: &Tensors, session: &Session) -> Result<(Tensors, Fitting)> {
    let declared = declared(session, &[Kind::Parameter])?;
    if declared.is_empty() {
        return Err(no_parameters());
    }
    let (mut fits, mut fitting) = (Tensors::new(), Fitting::default());
    for (key, stored) in tensors {
        let name = key.1.clone();
        match declared.get(key) {
            None => fitting.left_over.push(name),
            Some(shape) if *shape != stored.shape => fitting.other_shape.push(OtherShape {
                name,
                weights: stored.shape.clone(),
                session: shape.clone(),
            }),
            Some(_) => {
                check_values(key, stored)?;
                fits.insert(key.clone(), stored.clone());
                fitting.loaded.push(name);
            }
        }
    }
    let missing = declared.keys().filter(|key| !tensors.contains_key(key));
    fitting.missing = missing.map(|(_, name)| name.clone()).collect();
    Ok((fits, fitting))
}

fn no_parameters() -> Error {
    Error::Graph("session has no parameters yet: compile a graph first".into())
}

/// Refuses what [`Kind::find_bad`] finds.
fn check_values((kind, name): &Key, stored: &Stored) -> Result<()> {
    match kind.find_bad(&stored.data) {
        None => Ok(()),
        Some(i) => {
            let (what, x) = (kind.what(), stored.data[i]);
            fail(name, format!("element {i} of the {what} is {x}"))
        }
    }
}

/// Writes tensors that were [checked](check) into a session.
///
/// # Errors
/// [`Error::OutOfMemory`], [`Error::DeviceLost`]
pub(super) fn put(tensors: &Tensors, session: &mut Session) -> Result<()> {
    for ((kind, name), stored) in tensors {
        match kind {
            Kind::Parameter | Kind::State => session.set(name, &stored.data)?,
            Kind::FirstMoment => {
                if let Some(second) = tensors.get(&(Kind::SecondMoment, name.clone())) {
                    session.set_moments(name, [&stored.data, &second.data])?;
                }
            }
            // Written together with the first.
            Kind::SecondMoment => {}
            Kind::Corrections => {
                if let [c1, c2] = *stored.data {
                    session.set_bias_corrections(name, [c1, c2])?;
                }
            }
        }
    }
    Ok(())
}

/// The tensors that a session holds, with shapes.
fn declared(session: &Session, kinds: &[Kind]) -> Result<BTreeMap<Key, Vec<usize>>> {
    let mut declared = BTreeMap::new();
    for (name, shape) in session.parameters() {
        if session.has_moments(name)? {
            for kind in [Kind::FirstMoment, Kind::SecondMoment] {
                declared.insert((kind, name.to_owned()), shape.clone());
            }
            declared.insert((Kind::Corrections, name.to_owned()), vec![2]);
        }
        declared.insert((Kind::Parameter, name.to_owned()), shape);
    }
    for (name, len) in session.states() {
        declared.insert((Kind::State, name.to_owned()), vec![len]);
    }
    declared.retain(|(kind, _), _| kinds.contains(kind));
    Ok(declared)
}
