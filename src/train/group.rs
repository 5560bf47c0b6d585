//! Groups of parameters that an optimizer treats differently.

use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

use crate::error::{Error, Result};
use crate::graph::{Graph, ValueId};
use crate::types::Rates;

use super::AdamW;

/// Parameters with a weight decay or a learning rate of their own, for [`AdamW::group`].
///
/// A group selects parameters by name, by suffix or by rank; a parameter belongs to it when any of the selectors fits.
///
/// ```
/// use energyflow::train::{AdamW, ParameterGroup};
///
/// let table = ParameterGroup::new("table").names(["embedding"]).lr_scale(0.1);
/// let optimizer = AdamW::default().group(table).no_decay_for_biases_and_norms();
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ParameterGroup {
    label: String,
    names: Vec<String>,
    suffixes: Vec<String>,
    vectors: bool,
    lr_scale: f32,
    weight_decay: Option<f32>,
}

impl ParameterGroup {
    /// A group without selectors and with the rates of the optimizer. `label` names it in errors.
    #[must_use]
    pub fn new(label: impl Into<String>) -> Self {
        Self {
            label: label.into(),
            names: Vec::new(),
            suffixes: Vec::new(),
            vectors: false,
            lr_scale: 1.0,
            weight_decay: None,
        }
    }

    /// Selects parameters by their whole name or by what stands before a dot of it: `blocks.0` selects `blocks.0.norm.weight`.
    #[must_use]
    pub fn names<N: Into<String>>(mut self, names: impl IntoIterator<Item = N>) -> Self {
        self.names.extend(names.into_iter().map(Into::into));
        self
    }

    /// Selects parameters by their whole name or by what stands after a dot of it: `bias` selects `projection.bias`.
    #[must_use]
    pub fn suffix(mut self, suffix: impl Into<String>) -> Self {
        self.suffixes.push(suffix.into());
        self
    }

    /// Selects parameters of rank 1: biases, and gains and offsets of normalisations.
    #[must_use]
    pub fn vectors(mut self) -> Self {
        self.vectors = true;
        self
    }

    /// Sets the decoupled weight decay of the group, instead of that of the optimizer.
    #[must_use]
    pub fn weight_decay(mut self, weight_decay: f32) -> Self {
        self.weight_decay = Some(weight_decay);
        self
    }

    /// Sets the factor on the scheduled learning rate, 1 by default.
    #[must_use]
    pub fn lr_scale(mut self, lr_scale: f32) -> Self {
        self.lr_scale = lr_scale;
        self
    }

    pub(super) fn check(&self) -> Result<()> {
        let sound = |x: f32| x.is_finite() && x >= 0.0;
        if !sound(self.lr_scale) || !self.weight_decay.is_none_or(sound) {
            return self.fail("needs a finite learning-rate factor and weight decay, both >= 0");
        }
        if self.names.is_empty() && self.suffixes.is_empty() && !self.vectors {
            return self.fail("selects nothing: give it names, a suffix or vectors()");
        }
        Ok(())
    }

    /// Every name and suffix selects something, so that a typing error does not pass unnoticed.
    fn check_against(&self, graph: &Graph) -> Result<()> {
        let any = |fits: &dyn Fn(&str) -> bool| {
            let mut parameters = graph.parameters();
            parameters.any(|(_, value)| fits(&value.name))
        };
        for prefix in &self.names {
            if !any(&|name| has_prefix(name, prefix)) {
                return self.fail(&format!(
                    "names {prefix:?}, which is no parameter and no prefix of one{}",
                    near_prefixes(graph, prefix)
                ));
            }
        }
        for suffix in &self.suffixes {
            if !any(&|name| has_suffix(name, suffix)) {
                let parameters = graph.parameters();
                let suffixes = parameters.flat_map(|(_, value)| {
                    let dots = value.name.match_indices('.').map(|(dot, _)| dot + 1);
                    dots.map(|start| &value.name[start..])
                });
                return self.fail(&format!(
                    "has the suffix {suffix:?}, which is no last part of a name{}; write it without the dot",
                    near(suffix, suffixes)
                ));
            }
        }
        Ok(())
    }

    fn selects(&self, name: &str, rank: usize) -> bool {
        (self.vectors && rank == 1)
            || self.names.iter().any(|prefix| has_prefix(name, prefix))
            || self.suffixes.iter().any(|suffix| has_suffix(name, suffix))
    }

    fn fail<T>(&self, reason: &str) -> Result<T> {
        Err(Error::Config {
            field: "groups",
            reason: format!("{:?} {reason}", self.label),
        })
    }
}

impl AdamW {
    /// Adds a group. Of several groups that select a parameter the first counts; a parameter of no group has the rates of the
    /// optimizer. All groups share schedule, bias correction, clipping and loss scale.
    #[must_use]
    pub fn group(mut self, group: ParameterGroup) -> Self {
        self.groups.push(group);
        self
    }

    /// Adds a group of all parameters of rank 1, which do not decay.
    #[must_use]
    pub fn no_decay_for_biases_and_norms(self) -> Self {
        let group = ParameterGroup::new("biases and norms");
        self.group(group.vectors().weight_decay(0.0))
    }

    /// Rates of each of `parameters`.
    pub(super) fn rates(&self, graph: &Graph, parameters: &[ValueId]) -> Result<Vec<Rates>> {
        for group in &self.groups {
            group.check_against(graph)?;
        }
        let rates = |&id: &ValueId| {
            let value = graph.value(id)?;
            let selects = |group: &&ParameterGroup| group.selects(&value.name, value.shape.rank());
            let group = self.groups.iter().find(selects);
            Ok(Rates {
                lr_scale: group.map_or(1.0, |group| group.lr_scale),
                weight_decay: group
                    .and_then(|group| group.weight_decay)
                    .unwrap_or(self.weight_decay),
            })
        };
        parameters.iter().map(rates).collect()
    }
}

/// Whether `prefix` is all of `name` or ends before a dot of it.
pub(crate) fn has_prefix(name: &str, prefix: &str) -> bool {
    match name.strip_prefix(prefix) {
        Some(rest) => rest.is_empty() || (rest.starts_with('.') && !prefix.is_empty()),
        None => false,
    }
}

/// Names of parameters, and of what holds several, that look like `wanted`, as a part of a message; empty where there is none.
pub(super) fn near_prefixes(graph: &Graph, wanted: &str) -> String {
    let parameters = graph.parameters();
    let prefixes = parameters.flat_map(|(_, value)| {
        let dots = value.name.match_indices('.').map(|(dot, _)| dot);
        let ends = dots.chain([value.name.len()]);
        ends.map(|end| &value.name[..end])
    });
    near(wanted, prefixes)
}

/// The three of `names` that look most like `wanted`.
fn near<'a>(wanted: &str, names: impl Iterator<Item = &'a str>) -> String {
    let names: BTreeSet<&str> = names.collect();
    let mut names: Vec<(f64, &str)> = names
        .into_iter()
        .map(|name| (strsim::jaro_winkler(wanted, name), name))
        .filter(|(likeness, _)| *likeness > 0.8)
        .collect();
    names.sort_by(|a, b| b.0.total_cmp(&a.0));
    let names: Vec<String> = names
        .iter()
        .take(3)
        .map(|(_, n)| format!("{n:?}"))
        .collect();
    match names.is_empty() {
        true => String::new(),
        false => format!(" (near: {})", names.join(", ")),
    }
}

/// Whether `suffix` is all of `name` or begins after a dot of it.
fn has_suffix(name: &str, suffix: &str) -> bool {
    match name.strip_suffix(suffix) {
        Some(rest) => rest.is_empty() || (rest.ends_with('.') && !suffix.is_empty()),
        None => false,
    }
}
