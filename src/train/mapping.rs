//! Weights of other programs: which of their tensors are which parameters, and what fitted.

use std::fmt;

/// Says which parameter a tensor of a foreign file becomes. Rules are tried in this order: a name of its own, then the prefixes in the
/// order in which they were added. A name without a rule is kept.
///
/// ```
/// use energyflow::train::Mapping;
///
/// let mapping = Mapping::new()
///     .rename("bert.embeddings.word_embeddings.weight", "embedding.weight")
///     .prefix("bert.encoder.layer.", "blocks.")
///     .strip("bert.");
/// let name = |name| mapping.name(name);
/// assert_eq!(name("bert.embeddings.word_embeddings.weight").unwrap(), "embedding.weight");
/// assert_eq!(name("bert.encoder.layer.0.norm.bias").unwrap(), "blocks.0.norm.bias");
/// assert_eq!(name("bert.projection.bias").unwrap(), "projection.bias");
/// assert_eq!(name("other").unwrap(), "other");
///
/// // The token table and nothing else.
/// let table = Mapping::only("embeddings.weight", "embedding.weight");
/// assert_eq!(table.name("projection.bias"), None);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mapping {
    names: Vec<(String, String)>,
    prefixes: Vec<(String, String)>,
    /// Whether names without a rule are left out.
    strict: bool,
}

impl Mapping {
    /// Keeps all names.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads one tensor, as the parameter `to`, and leaves out everything else. Add [`rename`](Self::rename)s for more.
    #[must_use]
    pub fn only(from: impl Into<String>, to: impl Into<String>) -> Self {
        Self::new().rename(from, to).without_others()
    }

    /// Calls the tensor `from` `to`.
    #[must_use]
    pub fn rename(mut self, from: impl Into<String>, to: impl Into<String>) -> Self {
        self.names.push((from.into(), to.into()));
        self
    }

    /// Replaces `from` at the start of a name by `to`.
    #[must_use]
    pub fn prefix(mut self, from: impl Into<String>, to: impl Into<String>) -> Self {
        self.prefixes.push((from.into(), to.into()));
        self
    }

    /// Removes a prefix, such as `model.`.
    #[must_use]
    pub fn strip(self, prefix: impl Into<String>) -> Self {
        self.prefix(prefix, "")
    }

    /// Leaves out tensors that no rule names.
    #[must_use]
    pub fn without_others(mut self) -> Self {
        self.strict = true;
        self
    }

    /// The parameter's name for a tensor's name; `None` if the tensor is left out.
    #[must_use]
    pub fn name(&self, name: &str) -> Option<String> {
        if let Some((_, to)) = self.names.iter().find(|(from, _)| from == name) {
            return Some(to.clone());
        }
        let mut prefixes = self.prefixes.iter();
        let replaced =
            prefixes.find_map(|(from, to)| Some(format!("{to}{}", name.strip_prefix(&**from)?)));
        replaced.or_else(|| (!self.strict).then(|| name.to_owned()))
    }
}

/// What [`Weights::apply_fitting`](super::Weights::apply_fitting) did with each tensor; all lists are in alphabetical order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Fitting {
    /// Parameters that were replaced.
    pub loaded: Vec<String>,
    /// Parameters of the session that the weights lack; they are as they were.
    pub missing: Vec<String>,
    /// Tensors of the weights that the session has no parameter for.
    pub left_over: Vec<String>,
    /// Parameters that have another shape in the weights; they are as they were.
    pub other_shape: Vec<OtherShape>,
    /// Tensors of the file that were not read because of their type: names and types.
    pub skipped: Vec<(String, String)>,
}

/// A parameter that has another shape in the weights than in the session.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct OtherShape {
    /// The parameter.
    pub name: String,
    /// Its shape in the weights.
    pub weights: Vec<usize>,
    /// Its shape in the session.
    pub session: Vec<usize>,
}

impl Fitting {
    /// Whether every parameter was replaced and nothing was left over.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.missing.is_empty() && self.left_over.is_empty() && self.other_shape.is_empty()
    }
}

impl fmt::Display for Fitting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} parameters loaded", self.loaded.len())?;
        let mut list = |what: &str, names: Vec<String>| match names.is_empty() {
            true => Ok(()),
            false => write!(f, "; {what}: {}", names.join(", ")),
        };
        list("missing", self.missing.clone())?;
        list("left over", self.left_over.clone())?;
        let shapes = self.other_shape.iter().map(|other| {
            let OtherShape {
                name,
                weights,
                session,
            } = other;
            format!("{name} ({weights:?} instead of {session:?})")
        });
        list("of another shape", shapes.collect())?;
        let skipped = self.skipped.iter();
        let skipped = skipped.map(|(name, dtype)| format!("{name} ({dtype})"));
        list("not read", skipped.collect())
    }
}
