//! Checkpoints of a training: what a session keeps, how far the training is, and what it must agree with to go on.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Trainer;
use crate::error::{Error, Result};
use crate::text::Batches;
use crate::train::Checkpoint;

/// How far a training is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Progress {
    pub epoch: u64,
    /// Batches of the epoch that were trained on.
    pub batch: usize,
    /// Optimizer steps so far, skipped ones too.
    pub steps: u64,
    /// The best value of the metric that is watched, and the step after which it was reached.
    #[serde(with = "as_bits")]
    pub best: Option<(f64, u64)>,
    /// The name of that metric.
    #[serde(default)]
    pub best_by: Option<String>,
    /// Validations since then.
    pub since_best: u64,
    /// The data; `None` before [`Trainer::fit`] has seen any.
    pub data: Option<Data>,
}

/// Numbers as their bits: JSON is not read back exactly, and has no infinities.
mod as_bits {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    type Best = Option<(f64, u64)>;

    pub fn serialize<S: Serializer>(best: &Best, serializer: S) -> Result<S::Ok, S::Error> {
        best.map(|(value, step)| (value.to_bits(), step))
            .serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Best, D::Error> {
        let best: Option<(u64, u64)> = Option::deserialize(deserializer)?;
        Ok(best.map(|(bits, step)| (f64::from_bits(bits), step)))
    }
}

/// What the position in the data depends on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Data {
    samples: usize,
    batch: usize,
    length: usize,
    seed: Option<u64>,
}

impl Data {
    pub fn of(batches: &Batches) -> Self {
        Self {
            samples: batches.dataset().len(),
            batch: batches.batch_size(),
            length: batches.length(),
            seed: batches.seed(),
        }
    }
}

/// The text in the header of a checkpoint.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    version: u32,
    config: Value,
    progress: Progress,
}

const VERSION: u32 = 1;

const PREFIX: &str = "checkpoint-";
const SUFFIX: &str = ".safetensors";

impl Trainer {
    /// Everything that continues this training bit for bit: parameters, moments, counters, the options, and the position in the data if
    /// [`Trainer::fit`] trains. In loops of your own, keep the [position](Batches::position) of the batches yourself.
    ///
    /// # Errors
    /// As [`Checkpoint::from_session`].
    pub fn checkpoint(&self) -> Result<Checkpoint> {
        let mut checkpoint = Checkpoint::from_session(&self.session)?;
        let header = Header {
            version: VERSION,
            config: self.config()?,
            progress: self.progress.clone(),
        };
        checkpoint.metadata = serde_json::to_string(&header).map_err(not_json)?;
        Ok(checkpoint)
    }

    /// Continues where a checkpoint of a training with the same networks and options was taken. [`Trainer::fit`] then goes on with the
    /// next batch.
    ///
    /// # Errors
    /// [`Error::Data`] for a checkpoint of another program, and naming the first option that differs; as [`Checkpoint::apply`]. The training is
    /// then as it was, except after errors of the device.
    pub fn resume(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        let foreign = |error| {
            mismatch(format!(
                "was not made by a Trainer of this version: {error}"
            ))
        };
        let mut header: Header = serde_json::from_str(&checkpoint.metadata).map_err(foreign)?;
        if header.version != VERSION {
            let version = header.version;
            let reason = format!("has version {version} of the training's header, not {VERSION}");
            return Err(mismatch(reason));
        }
        // Read as that of the checkpoint was: JSON does not give every number back exactly.
        let mut now: Value = serde_json::from_str(&self.config()?.to_string()).map_err(not_json)?;
        if self.model.encoder.is_none() || self.model.decoder.is_none() {
            // It has no meaning there, and a trainer from a model has that of the model.
            for config in [&mut header.config, &mut now] {
                let options = config.get_mut("options").and_then(Value::as_object_mut);
                options.map(|options| options.remove("shared_last_block"));
            }
        }
        if let Some(difference) = difference("", &header.config, &now) {
            return Err(mismatch(difference));
        }
        checkpoint.apply(&mut self.session)?;
        for training in self.trainings() {
            training.forget_skipped(&self.session)?;
        }
        self.progress = header.progress;
        self.best = None;
        Ok(())
    }

    /// Optimizer steps so far, in all modes; skipped steps count. A checkpoint keeps the number.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.progress.steps
    }

    /// Networks and options.
    fn config(&self) -> Result<Value> {
        let encoder = serde_json::to_value(&self.model.encoder).map_err(not_json)?;
        let decoder = serde_json::to_value(&self.model.decoder).map_err(not_json)?;
        let options = serde_json::to_value(&self.options).map_err(not_json)?;
        let mut config =
            serde_json::json!({ "encoder": encoder, "decoder": decoder, "options": options });
        if let Some(transformer) = self.transformer() {
            config["transformer"] = serde_json::to_value(transformer).map_err(not_json)?;
        }
        Ok(config)
    }

    /// Whether these batches can continue the training.
    pub(super) fn check_data(&self, batches: &Batches) -> Result<Data> {
        let data = Data::of(batches);
        if data.seed.is_none() {
            return Err(Error::Config {
                field: "batches",
                reason: "are for evaluation, in the order of the file and filled up; use Batches::training".into(),
            });
        }
        let [length, _] = self.sample();
        if data.batch != self.options.batch || data.length != length {
            return Err(Error::Config {
                field: "batch",
                reason: format!(
                    "is {} of {} tokens, but the batches are {} of {}",
                    self.options.batch, length, data.batch, data.length
                ),
            });
        }
        match &self.progress.data {
            Some(before) if *before != data => Err(mismatch(format!(
                "was trained on {before:?}, which is not the data at hand, {data:?}"
            ))),
            _ => Ok(data),
        }
    }
}

/// The newest checkpoint of [`Trainer::fit`] in a folder, if there is one.
///
/// # Errors
/// [`Error::Io`] where the folder cannot be read.
pub(super) fn checkpoints(folder: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io(folder, error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| Error::io(folder, error))?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let number = name.and_then(|name| name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX));
        if let Some(step) = number.and_then(|number| number.parse().ok()) {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}

/// The file of a checkpoint after so many steps. Names sort by their steps.
pub(super) fn checkpoint_path(folder: &Path, steps: u64) -> PathBuf {
    folder.join(format!("{PREFIX}{steps:08}{SUFFIX}"))
}

impl Trainer {
    /// The newest checkpoint that [`Trainer::fit`] has left in a folder, if there is one.
    ///
    /// # Errors
    /// [`Error::Io`] where the folder cannot be read.
    pub fn latest_checkpoint(folder: impl AsRef<Path>) -> Result<Option<PathBuf>> {
        let newest = checkpoints(folder.as_ref())?.pop();
        Ok(newest.map(|(_, path)| path))
    }
}

/// The first place where two configurations differ, and how.
fn difference(place: &str, before: &Value, now: &Value) -> Option<String> {
    if let (Value::Object(before), Value::Object(now)) = (before, now) {
        let keys = before.keys().chain(now.keys());
        let inside = |key: &String| {
            let place = match place {
                "" => key.clone(),
                place => format!("{place}.{key}"),
            };
            let of = |all: &serde_json::Map<_, _>| all.get(key).cloned().unwrap_or(Value::Null);
            difference(&place, &of(before), &of(now))
        };
        return keys.into_iter().find_map(inside);
    }
    (before != now).then(|| format!("{place} was {before}, but is {now} here"))
}

fn mismatch(reason: String) -> Error {
    Error::Data {
        name: "checkpoint".into(),
        reason,
    }
}

fn not_json(error: serde_json::Error) -> Error {
    Error::Config {
        field: "options",
        reason: format!("cannot be written as JSON: {error}"),
    }
}
