//! A trained model as a folder: sizes, weights, tokenizer, model card.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::card::Card;
use super::decoder::{Decoder, DecoderOptions};
use super::encoder::{Encoder, EncoderOptions};
use crate::error::{Error, Result};
use crate::file::{AtomicFile, AtomicFolder, InputFile, find, newer};
use crate::graph::Graph;
use crate::nn::TcnBlock;
use crate::runtime::Session;
use crate::setters::setters;
use crate::train::{WeightType, Weights};

/// Sizes, options and the card as JSON.
const CONFIG: &str = "config.json";
/// Parameters.
const WEIGHTS: &str = "model.safetensors";
/// Described as the crate `tokenizers` does.
const TOKENIZER: &str = "tokenizer.json";
/// The card as Markdown, for readers.
const CARD: &str = "README.md";

const FORMAT: &str = "energyflow.model";
const VERSION: u32 = 1;

/// Upper bound on the size of `config.json` in bytes.
const LARGEST_CONFIG: u64 = 1 << 20;
/// Upper bound on the size of `tokenizer.json` in bytes.
const LARGEST_TOKENIZER: u64 = 1 << 30;

/// A trained encoder, decoder or both, on the host.
///
/// [`Model::save`] writes a folder that [`Model::load`] reads on any machine:
///
/// | file | content |
/// |---|---|
/// | `config.json` | format version, sizes of encoder and decoder, options, card |
/// | `model.safetensors` | parameters in f32 or f16, by the names of [`Encoder`] and [`Decoder`] |
/// | `tokenizer.json` | the tokenizer, if the model has one |
/// | `README.md` | the [card](Card) for readers; it is never read |
///
/// [`Model::apply`] takes the parameters to a session.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Model {
    /// Sizes of the encoder, if the model has one.
    pub encoder: Option<EncoderOptions>,
    /// Sizes of the decoder, if the model has one.
    pub decoder: Option<DecoderOptions>,
    /// Whether the decoder's last block is the encoder's, see [`Decoder::sharing`]. Its parameters then exist once, under the encoder's
    /// name: `blocks.N`, where N is the number of the encoder's last block.
    pub shared_last_block: bool,
    /// Whether embeddings are meant to be divided by their norm.
    pub normalize: bool,
    /// Every parameter of encoder and decoder, and no other.
    pub weights: Weights,
    /// The content of a `tokenizer.json`. `None`: texts are given as token ids.
    pub tokenizer: Option<Vec<u8>>,
    /// What a reader should know of the model.
    pub card: Card,
}

/// What `config.json` holds.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    format: String,
    version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    encoder: Option<EncoderOptions>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    decoder: Option<DecoderOptions>,
    #[serde(default)]
    shared_last_block: bool,
    #[serde(default)]
    normalize: bool,
    #[serde(default)]
    card: Card,
}

/// What every version of `config.json` holds.
#[derive(Deserialize)]
struct Header {
    #[serde(default)]
    format: String,
    #[serde(default)]
    version: u32,
}

impl Model {
    setters! {
        encoder: Option<EncoderOptions>,
        decoder: Option<DecoderOptions>,
        shared_last_block: bool,
        normalize: bool,
        tokenizer: Option<Vec<u8>>,
        card: Card,
    }

    /// A model of these weights; set `encoder`, `decoder` or both.
    #[must_use]
    pub fn new(weights: Weights) -> Self {
        Self {
            weights,
            ..Self::default()
        }
    }

    /// Writes the model as a folder, whole or not at all. The folders above it are made where they are missing.
    ///
    /// An existing folder of a model is replaced; any other folder that is not empty is left alone, with an error. On Linux, Android and
    /// Apple's systems the two are exchanged in one step: whenever the process is killed, the old or the new model is there, whole.
    /// Elsewhere, and on file systems that cannot do it, the old folder has another name for a moment; [`Model::load`] finds it there.
    /// What a killed process leaves behind is a hidden folder `.energyflow-…` beside the model, which the next save removes.
    ///
    /// # Errors
    /// [`Error::Config`] for a model without encoder and decoder, or sizes that do not fit together; [`Error::Data`] naming a parameter that
    /// is missing, unknown, of another shape, or does not fit f16, or a figure of the card that is not finite; [`Error::Io`], also for a
    /// folder of something else. What was there is then unchanged.
    pub fn save(&self, dir: impl AsRef<Path>, dtype: WeightType) -> Result<()> {
        let dir = dir.as_ref();
        self.check()?;
        self.card.check()?;
        let config = Config {
            format: FORMAT.to_owned(),
            version: VERSION,
            encoder: self.encoder.clone(),
            decoder: self.decoder.clone(),
            shared_last_block: self.shared_last_block,
            normalize: self.normalize,
            card: self.card.clone(),
        };
        let config = serde_json::to_string_pretty(&config)
            .map_err(|error| Error::io(dir.join(CONFIG), std::io::Error::other(error)))?;
        let folder = AtomicFolder::create(dir, replaceable)?;
        let write = || {
            let put = |name: &str, bytes: &[u8]| {
                let mut file = AtomicFile::create(&folder.folder().join(name))?;
                file.write(bytes)?;
                file.commit()
            };
            put(CONFIG, config.as_bytes())?;
            put(CARD, self.readme().as_bytes())?;
            if let Some(tokenizer) = &self.tokenizer {
                put(TOKENIZER, tokenizer)?;
            }
            self.weights.save(folder.folder().join(WEIGHTS), dtype)
        };
        write().map_err(|error| folder.rename(error))?;
        folder.commit()
    }

    /// Reads a folder that [`Model::save`] wrote.
    ///
    /// # Errors
    /// [`Error::Io`] naming a file that is missing or cannot be read; [`Error::Format`] for a malformed file, a file of a newer version, NaN
    /// or infinity; [`Error::Config`] and [`Error::Data`] for sizes and parameters that do not fit together.
    pub fn load(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = find(dir.as_ref());
        let config = read_config(&dir)?;
        let weights = Weights::load(dir.join(WEIGHTS))?;
        let tokenizer = dir.join(TOKENIZER);
        let tokenizer = match tokenizer.exists() {
            true => Some(InputFile::open(&tokenizer)?.read_all(LARGEST_TOKENIZER)?),
            false => None,
        };
        let model = Self {
            encoder: config.encoder,
            decoder: config.decoder,
            shared_last_block: config.shared_last_block,
            normalize: config.normalize,
            weights,
            tokenizer,
            card: config.card,
        };
        model.check().map_err(|error| match error {
            Error::Data { name, reason } => Error::Format {
                path: dir.join(WEIGHTS),
                offset: 0,
                reason: format!("parameter {name:?}: {reason}"),
            },
            Error::Config { field, reason } => Error::Format {
                path: dir.join(CONFIG),
                offset: 0,
                reason: format!("{field} {reason}"),
            },
            other => other,
        })?;
        Ok(model)
    }

    /// Declares the encoder's parameters in a graph.
    ///
    /// # Errors
    /// [`Error::Config`] if the model has no encoder; as [`Encoder::new`].
    pub fn build_encoder(&self, graph: &mut Graph) -> Result<Encoder> {
        let Some(options) = &self.encoder else {
            return Err(Error::Config {
                field: "encoder",
                reason: "is missing: the model has a decoder only".into(),
            });
        };
        Encoder::new(graph, options)
    }

    /// Declares the decoder's parameters in a graph; those of a shared last block under the encoder's name, whether or not the graph has
    /// the encoder, too.
    ///
    /// # Errors
    /// [`Error::Config`] if the model has no decoder, or the shared block does not fit; as [`Decoder::new`].
    pub fn build_decoder(&self, graph: &mut Graph, encoder: Option<&Encoder>) -> Result<Decoder> {
        let Some(options) = &self.decoder else {
            return Err(Error::Config {
                field: "decoder",
                reason: "is missing: the model has an encoder only".into(),
            });
        };
        if !self.shared_last_block {
            return Decoder::new(graph, options);
        }
        let fail = |reason: &str| {
            Err(Error::Config {
                field: "shared_last_block",
                reason: reason.into(),
            })
        };
        let Some(of_encoder) = &self.encoder else {
            return fail("is true, but the model has no encoder");
        };
        let sizes = |width, hidden, kernel, last: Option<&usize>, gelu| {
            (width, hidden, kernel, last.copied(), gelu)
        };
        let theirs = sizes(
            of_encoder.width,
            of_encoder.hidden,
            of_encoder.kernel,
            of_encoder.dilations.last(),
            of_encoder.gelu,
        );
        let ours = sizes(
            options.width,
            options.hidden,
            options.kernel,
            options.dilations.last(),
            options.gelu,
        );
        let (Some(&dilation), true) = (options.dilations.last(), ours == theirs) else {
            return fail(
                "is true, but the last blocks of encoder and decoder differ in width, hidden, kernel, dilation or gelu",
            );
        };
        for (field, is) in [("centred", of_encoder.centred), ("gated", of_encoder.gated)] {
            if is {
                return Err(Error::Config {
                    field,
                    reason: "must be false where the decoder shares the encoder's last block, because a decoder is causal and has no gates: set shared_last_block to false, or change the encoder".into(),
                });
            }
        }
        let last = match encoder.and_then(|encoder| encoder.tcn.blocks.last()) {
            Some(&last) => last,
            None => {
                let name = format!("blocks.{}", of_encoder.dilations.len() - 1);
                TcnBlock::new(graph, &name, &options.tcn(), dilation)?
            }
        };
        Decoder::sharing(graph, options, last)
    }

    /// Writes the parameters that a session declares into it; each must be in the model.
    ///
    /// # Errors
    /// [`Error::Data`] naming a parameter that the model lacks or has in another shape, before anything is written;
    /// [`Error::OutOfMemory`], [`Error::DeviceLost`].
    pub fn apply(&self, session: &mut Session) -> Result<()> {
        let declared: Vec<(String, Vec<usize>)> = session
            .parameters()
            .map(|(name, shape)| (name.to_owned(), shape))
            .collect();
        for (name, shape) in &declared {
            self.parameter(name, shape)?;
        }
        for (name, shape) in &declared {
            session.set(name, self.parameter(name, shape)?)?;
        }
        Ok(())
    }

    fn parameter(&self, name: &str, shape: &[usize]) -> Result<&[f32]> {
        let reason = match self.weights.get(name) {
            Some((found, data)) if found == shape => return Ok(data),
            Some((found, _)) => {
                format!("has shape {found:?}, but the sizes of the model need {shape:?}")
            }
            None => {
                let skipped = self.weights.skipped().find(|(skipped, _)| *skipped == name);
                match skipped {
                    Some((_, dtype)) => format!("is {dtype}, which is not read; convert it to F32"),
                    None => "is missing".to_owned(),
                }
            }
        };
        Err(Error::Data {
            name: name.to_owned(),
            reason,
        })
    }

    /// Checks that sizes and parameters fit together.
    fn check(&self) -> Result<()> {
        if self.encoder.is_none() && self.decoder.is_none() {
            return Err(Error::Config {
                field: "encoder",
                reason: "is missing, and so is the decoder: a model has one of them or both".into(),
            });
        }
        let mut graph = Graph::new();
        let encoder = match self.encoder {
            Some(_) => Some(self.build_encoder(&mut graph)?),
            None => None,
        };
        if self.decoder.is_some() {
            self.build_decoder(&mut graph, encoder.as_ref())?;
        }
        if let (Some(encoder), Some(decoder)) = (&self.encoder, &self.decoder)
            && encoder.embedding != decoder.embedding
        {
            return Err(Error::Config {
                field: "embedding",
                reason: format!(
                    "is {} in the encoder, but {} in the decoder",
                    encoder.embedding, decoder.embedding
                ),
            });
        }
        for (_, value) in graph.parameters() {
            self.parameter(&value.name, &value.host_shape())?;
        }
        match self.weights.names().find(|name| graph.find(name).is_none()) {
            Some(name) => Err(Error::Data {
                name: name.to_owned(),
                reason: "is no parameter of a model of these sizes".into(),
            }),
            None => Ok(()),
        }
    }

    fn readme(&self) -> String {
        let mut parts = Vec::new();
        if let Some(encoder) = &self.encoder {
            parts.push(format!(
                "Encoder: text of up to {} tokens to a vector of {}; width {}, hidden {}, {} blocks of kernel {}, vocabulary {}.",
                encoder.length,
                encoder.embedding,
                encoder.width,
                encoder.hidden,
                encoder.dilations.len(),
                encoder.kernel,
                encoder.vocabulary
            ));
        }
        if let Some(decoder) = &self.decoder {
            parts.push(format!(
                "Decoder: a vector of {} to text; trained on up to {} tokens; width {}, hidden {}, {} blocks of kernel {}, vocabulary {}.",
                decoder.embedding,
                decoder.length,
                decoder.width,
                decoder.hidden,
                decoder.dilations.len(),
                decoder.kernel,
                decoder.vocabulary
            ));
        }
        if self.shared_last_block {
            parts.push("Encoder and decoder share their last block.".to_owned());
        }
        if self.normalize {
            parts.push("Embeddings are meant to be divided by their norm.".to_owned());
        }
        self.card.markdown(&parts, self.encoder.is_some())
    }
}

/// Whether a folder that is not empty may be replaced by a model: it holds a model and nothing else.
fn replaceable(dir: &Path) -> Result<()> {
    let fail = |reason: String| {
        let source = std::io::Error::new(std::io::ErrorKind::AlreadyExists, reason);
        Err(Error::io(dir, source))
    };
    let entries = std::fs::read_dir(dir).map_err(|error| Error::io(dir, error))?;
    for entry in entries {
        let entry = entry.map_err(|error| Error::io(dir, error))?;
        let name = entry.file_name();
        let is_part = entry.path().is_file()
            && [CONFIG, WEIGHTS, TOKENIZER, CARD]
                .map(Some)
                .contains(&name.to_str());
        if !is_part {
            return fail(format!(
                "holds {name:?}, which is no part of a model, and is not replaced; choose another folder"
            ));
        }
    }
    match read_header(dir) {
        Ok(_) => Ok(()),
        Err(error) => fail(format!(
            "is no model of energyflow and is not replaced ({error}); choose another folder"
        )),
    }
}

/// The bytes of `config.json`, if it is one of a model of this crate.
fn read_header(dir: &Path) -> Result<(InputFile, Vec<u8>, Header)> {
    let file = InputFile::open(&dir.join(CONFIG))?;
    let bytes = file.read_all(LARGEST_CONFIG)?;
    let header: Header = parse(&file, &bytes)?;
    if header.format != FORMAT {
        let reason = format!(
            "the format is {:?}, not {FORMAT:?}: this is no model of energyflow (a transformer is a SentenceTransformer)",
            header.format
        );
        return Err(file.fail(0, reason));
    }
    Ok((file, bytes, header))
}

fn read_config(dir: &Path) -> Result<Config> {
    let (file, bytes, header) = read_header(dir)?;
    match header.version {
        0 => Err(file.fail(0, "the version of the model format is missing or 0")),
        version if version > VERSION => Err(file.fail(0, newer("model", version, VERSION))),
        _ => parse(&file, &bytes),
    }
}

/// Reads JSON; the error has the offset.
pub(super) fn parse<T: for<'a> Deserialize<'a>>(file: &InputFile, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|error| {
        let before = bytes.split_inclusive(|&byte| byte == b'\n');
        let lines: usize = before
            .take(error.line().saturating_sub(1))
            .map(<[u8]>::len)
            .sum();
        let offset = lines + error.column().saturating_sub(1);
        file.fail(offset.min(bytes.len()) as u64, error.to_string())
    })
}
