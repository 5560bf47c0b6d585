//! The model card: what a reader should know of a model.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::setters::setters;

/// What a reader should know of a model. All of it is optional.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Card {
    /// Title.
    pub name: String,
    /// What the model is for, as Markdown.
    pub description: String,
    /// What it was trained on, as Markdown: data, number of samples, teacher.
    pub data: String,
    /// How it was trained, as Markdown: steps, batch, optimizer, precision.
    pub training: String,
    /// Results on validation data by name, such as `cosine`. They must be finite.
    pub figures: BTreeMap<String, f64>,
    /// Seed of the training.
    pub seed: Option<u64>,
    /// Licence of the weights, as an SPDX identifier such as `cc-by-4.0`.
    pub license: Option<String>,
    /// Languages of the texts, as ISO 639 codes such as `en`.
    pub languages: Vec<String>,
    /// Version of this crate that made the model.
    pub version: String,
}

impl Default for Card {
    fn default() -> Self {
        Self {
            name: String::new(),
            description: String::new(),
            data: String::new(),
            training: String::new(),
            figures: BTreeMap::new(),
            seed: None,
            license: None,
            languages: Vec::new(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}

impl Card {
    setters! {
        figures: BTreeMap<String, f64>,
        seed: Option<u64>,
        license: Option<String>,
        languages: Vec<String>,
    }

    /// Sets the title.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// Sets what the model is for.
    #[must_use]
    pub fn description(mut self, description: impl Into<String>) -> Self {
        self.description = description.into();
        self
    }

    /// Sets what the model was trained on.
    #[must_use]
    pub fn data(mut self, data: impl Into<String>) -> Self {
        self.data = data.into();
        self
    }

    /// Sets how the model was trained.
    #[must_use]
    pub fn training(mut self, training: impl Into<String>) -> Self {
        self.training = training.into();
        self
    }

    /// Adds a result.
    #[must_use]
    pub fn figure(mut self, name: impl Into<String>, value: f64) -> Self {
        self.figures.insert(name.into(), value);
        self
    }

    /// JSON has no other numbers.
    pub(super) fn check(&self) -> Result<()> {
        match self.figures.iter().find(|(_, value)| !value.is_finite()) {
            Some((name, value)) => Err(Error::Data {
                name: name.clone(),
                reason: format!("the figure {name:?} of the card is {value}; leave it out"),
            }),
            None => Ok(()),
        }
    }

    /// The card as Markdown, with the front matter that model hubs read.
    pub(super) fn markdown(&self, parts: &[String], embeds: bool) -> String {
        let quote = |text: &str| serde_json::Value::from(text).to_string();
        let mut page = String::from("---\nlibrary_name: energyflow\n");
        // Writing to a string cannot fail.
        let mut line = |text: String| {
            let _ = writeln!(page, "{text}");
        };
        if let Some(license) = &self.license {
            line(format!("license: {}", quote(license)));
        }
        if !self.languages.is_empty() {
            line("language:".into());
            for language in &self.languages {
                line(format!("- {}", quote(language)));
            }
        }
        if embeds {
            line("pipeline_tag: sentence-similarity".into());
        }
        line("tags:\n- sentence-embedding\n- energyflow\n---\n".into());
        let name = match self.name.is_empty() {
            true => "energyflow model",
            false => &self.name,
        };
        line(format!("# {name}\n"));
        if !self.description.is_empty() {
            line(format!("{}\n", self.description));
        }
        for part in parts {
            line(part.clone());
        }
        for (title, text) in [("Data", &self.data), ("Training", &self.training)] {
            if !text.is_empty() {
                line(format!("\n## {title}\n\n{text}"));
            }
        }
        if !self.figures.is_empty() {
            line("\n## Results on validation data\n\n| figure | value |\n|---|---|".into());
            for (name, value) in &self.figures {
                line(format!("| {} | {value:.4} |", name.replace('|', "\\|")));
            }
        }
        line("\n## Made with\n".into());
        let seed = self.seed.map(|seed| format!(", seed {seed}"));
        line(format!(
            "energyflow {}{}.",
            self.version,
            seed.unwrap_or_default()
        ));
        if embeds {
            line("\n## Use\n\n```rust\nlet encoder = energyflow::text::TextEncoder::load(&gpu, \"path/of/this/folder\")?;\nlet embeddings = encoder.encode(&[\"a text\"])?;\n```".into());
        }
        page
    }
}
