//! A trained encoder in use: texts to embeddings.

use std::sync::Arc;

use super::embeddings::{Embeddings, Truncation};
use super::encoder::{Encoder, EncoderOptions};
use super::engine::{Engine, Network};
use super::engine_methods::engine_methods;
use super::model::Model;
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::gpu::{Gpu, Tensor};
use crate::graph::{Graph, ValueId};
use crate::runtime::{Executable, Session};
use crate::setters::setters;
use crate::types::{DType, Precision};

/// How a [`TextEncoder`] or a [`SentenceTransformer`](super::SentenceTransformer) computes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TextEncoderOptions {
    /// Element type of activations and matrix operands. [`Precision::Mixed`] is f16 storage with f32 sums.
    pub precision: Precision,
    /// Whether embeddings are divided by their norm. `None`: as [`Model::normalize`] says.
    pub normalize: Option<bool>,
    /// Lengths in tokens that texts are padded to. Those of the model's length or more are left out, and the model's length is added.
    pub lengths: Vec<usize>,
    /// Batch sizes in texts.
    pub batches: Vec<usize>,
    /// Most tokens of a batch, padding included: larger batch sizes are not used for long texts, nor such whose values would exceed the
    /// adapter's largest binding. The smallest batch size is always used.
    pub most_tokens: usize,
    /// Threads that tokenise. `None`: one per core.
    pub threads: Option<usize>,
    /// Whether control tokens in a text, such as `[SEP]`, become the tokens of that name, instead of being text. It concerns the tokenizer
    /// of a [`Model`], not one of the caller.
    pub control_tokens: bool,
}

impl Default for TextEncoderOptions {
    /// f32, lengths 8, 16, 32, 64, 128, 256, batches of 1, 8, 64, 256 and 1024 texts, at most 32 768 tokens.
    fn default() -> Self {
        Self {
            precision: Precision::F32,
            normalize: None,
            lengths: vec![8, 16, 32, 64, 128, 256],
            batches: vec![1, 8, 64, 256, 1024],
            most_tokens: 32_768,
            threads: None,
            control_tokens: false,
        }
    }
}

impl TextEncoderOptions {
    setters! {
        precision: Precision,
        normalize: Option<bool>,
        lengths: Vec<usize>,
        batches: Vec<usize>,
        most_tokens: usize,
        threads: Option<usize>,
        control_tokens: bool,
    }
}

/// Turns any number of texts of any length into embeddings. Any thread may use it.
///
/// Texts are sorted by length into static shapes, the *buckets*: pairs of a length in tokens and a batch size. Each is compiled when it is
/// first needed, or by [`TextEncoder::warm_up`]. What is left over after full batches is computed in one more batch of the same size, unless a
/// smaller size is compiled already. A text does not pay for longer ones beside it, and its embedding does not depend on them,
/// or on the bucket, but for rounding: padding does not count.
///
/// There is no optimizer state. Parameters are kept in f32, and once more in f16 if activations are.
#[derive(Debug)]
pub struct TextEncoder {
    options: EncoderOptions,
    engine: Engine,
}

impl TextEncoder {
    /// Loads the encoder of a [model folder](Model), with its tokenizer.
    ///
    /// # Errors
    /// As [`Model::load`] and [`TextEncoder::new`].
    #[cfg(feature = "tokenizer")]
    pub fn load(gpu: &Gpu, dir: impl AsRef<std::path::Path>) -> Result<Self> {
        Self::load_with(gpu, dir, &TextEncoderOptions::default())
    }

    /// As [`TextEncoder::load`], with options.
    ///
    /// # Errors
    /// As [`TextEncoder::load`].
    #[cfg(feature = "tokenizer")]
    pub fn load_with(
        gpu: &Gpu,
        dir: impl AsRef<std::path::Path>,
        options: &TextEncoderOptions,
    ) -> Result<Self> {
        Self::new(gpu, &Model::load(dir)?, options)
    }

    /// The encoder of a model, with its tokenizer.
    ///
    /// # Errors
    /// [`Error::Config`] if the model has no encoder or no tokenizer, and for options out of range; [`Error::Tokenizer`]; as [`Model::apply`].
    #[cfg(feature = "tokenizer")]
    pub fn new(gpu: &Gpu, model: &Model, options: &TextEncoderOptions) -> Result<Self> {
        let Some(json) = &model.tokenizer else {
            return Err(Error::Config {
                field: "tokenizer",
                reason: "is missing: the model folder has no tokenizer.json; use TextEncoder::with_tokenizer".into(),
            });
        };
        let length = encoder_of(model)?.length;
        let tokenizer = super::WordPiece::from_bytes(json, length)?;
        let tokenizer = tokenizer.control_tokens(options.control_tokens);
        Self::with_tokenizer(gpu, model, Arc::new(tokenizer), options)
    }

    /// The encoder of a model, with a tokenizer of the caller, which should cut texts to the encoder's length.
    ///
    /// # Errors
    /// [`Error::Config`] if the model has no encoder, the tokenizer has more tokens than the encoder knows, and for options out of range; as
    /// [`Model::apply`].
    pub fn with_tokenizer(
        gpu: &Gpu,
        model: &Model,
        tokenizer: Arc<dyn Tokenizer>,
        options: &TextEncoderOptions,
    ) -> Result<Self> {
        let encoder = encoder_of(model)?;
        let network = Box::new(encoder.clone());
        let apply = |session: &mut Session| model.apply(session);
        Ok(Self {
            options: encoder.clone(),
            engine: Engine::new(gpu, network, tokenizer, model.normalize, options, apply)?,
        })
    }

    /// The network's sizes.
    #[must_use]
    pub fn options(&self) -> &EncoderOptions {
        &self.options
    }

    engine_methods!();
}

impl Network for EncoderOptions {
    fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    fn length(&self) -> usize {
        self.length
    }

    fn embedding(&self) -> usize {
        self.embedding
    }

    fn widest(&self) -> usize {
        self.hidden.max(self.width)
    }

    fn padding(&self) -> Option<u32> {
        self.padding
    }

    fn forward(
        &self,
        graph: &mut Graph,
        length: usize,
        ids: ValueId,
        mask: ValueId,
        dtype: DType,
    ) -> Result<ValueId> {
        let encoder = Encoder::new(graph, &self.clone().length(length))?;
        graph.scoped("encoder", |graph| encoder.forward(graph, ids, mask, dtype))
    }
}

fn encoder_of(model: &Model) -> Result<&EncoderOptions> {
    model.encoder.as_ref().ok_or_else(|| Error::Config {
        field: "encoder",
        reason: "is missing: the model has a decoder only".into(),
    })
}
