//! A transformer of the BERT family in use: texts to embeddings.

use std::path::Path;
use std::sync::Arc;

use super::embeddings::{Embeddings, Truncation};
use super::engine::Engine;
use super::engine_methods::engine_methods;
use super::text_encoder::TextEncoderOptions;
use super::tokenizer::{Tokenizer, Tokens};
use super::transformer::TransformerOptions;
use super::transformer_model::TransformerModel;
#[cfg(feature = "tokenizer")]
use crate::error::Error;
use crate::error::Result;
use crate::gpu::{Gpu, Tensor};
use crate::runtime::{Executable, Session};
use crate::train::{WeightType, Weights};

/// Turns any number of texts of any length into embeddings, with a model of the Python library sentence-transformers. Any thread may use it.
///
/// Of the networks, those of the BERT family are supported, such as all-MiniLM-L6-v2, with mean or `[CLS]` pooling.
/// Texts are sorted by length into static shapes as [`TextEncoder`](super::TextEncoder) does it, and the same [`TextEncoderOptions`] apply.
/// The embedding of a text does not depend on the texts beside it, but for rounding.
///
/// ```no_run
/// use energyflow::text::SentenceTransformer;
/// use energyflow::{Gpu, GpuOptions};
///
/// # fn main() -> energyflow::Result<()> {
/// let gpu = Gpu::new(&GpuOptions::default())?;
/// let teacher = SentenceTransformer::load(&gpu, "all-MiniLM-L6-v2")?;
/// let embeddings = teacher.encode(&["A cat sits on the mat.", "A feline rests."])?;
/// assert_eq!((embeddings.len(), embeddings.width()), (2, 384));
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct SentenceTransformer {
    /// Without its weights, which are on the device.
    model: TransformerModel,
    engine: Engine,
}

impl SentenceTransformer {
    /// Loads a folder that sentence-transformers wrote, see [`TransformerModel`], with its tokenizer. Nothing is downloaded:
    /// `text::hub::fetch` (feature `hub`) gives the folder of a model on the Hugging Face hub.
    ///
    /// # Errors
    /// As [`TransformerModel::load`] and [`SentenceTransformer::new`].
    #[cfg(feature = "tokenizer")]
    pub fn load(gpu: &Gpu, dir: impl AsRef<Path>) -> Result<Self> {
        Self::load_with(gpu, dir, &TextEncoderOptions::default())
    }

    /// As [`SentenceTransformer::load`], with options.
    ///
    /// # Errors
    /// As [`SentenceTransformer::load`].
    #[cfg(feature = "tokenizer")]
    pub fn load_with(
        gpu: &Gpu,
        dir: impl AsRef<Path>,
        options: &TextEncoderOptions,
    ) -> Result<Self> {
        Self::new(gpu, TransformerModel::load(dir)?, options)
    }

    /// A model at work, with its tokenizer.
    ///
    /// # Errors
    /// [`Error::Config`] if the model has no tokenizer, and for options out of range; [`Error::Tokenizer`]; as [`TransformerModel::apply`].
    #[cfg(feature = "tokenizer")]
    pub fn new(gpu: &Gpu, model: TransformerModel, options: &TextEncoderOptions) -> Result<Self> {
        let Some(json) = &model.tokenizer else {
            return Err(Error::Config {
                field: "tokenizer",
                reason: "is missing: the folder has no tokenizer.json; use SentenceTransformer::with_tokenizer".into(),
            });
        };
        let tokenizer = super::WordPiece::from_bytes(json, model.options.length)?;
        let tokenizer = Arc::new(tokenizer.control_tokens(options.control_tokens));
        Self::with_tokenizer(gpu, model, tokenizer, options)
    }

    /// A model at work, with a tokenizer of the caller, which should cut texts to the network's length.
    ///
    /// # Errors
    /// [`Error::Config`] if the tokenizer has more tokens than the network knows, and for options out of range; as [`TransformerModel::apply`].
    pub fn with_tokenizer(
        gpu: &Gpu,
        mut model: TransformerModel,
        tokenizer: Arc<dyn Tokenizer>,
        options: &TextEncoderOptions,
    ) -> Result<Self> {
        let network = Box::new(model.options.clone());
        let normalize = model.options.normalize;
        let tokenizer: Arc<dyn Tokenizer> = match model.lower_case {
            true => Arc::new(LowerCase(tokenizer)),
            false => tokenizer,
        };
        let weights = std::mem::take(&mut model.weights);
        let apply = |session: &mut Session| weights.apply(session);
        let engine = Engine::new(gpu, network, tokenizer, normalize, options, apply)?;
        Ok(Self { model, engine })
    }

    /// The network's sizes.
    #[must_use]
    pub fn options(&self) -> &TransformerOptions {
        &self.model.options
    }

    /// The model on the host; waits for the device.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::DeviceLost`].
    pub fn model(&self) -> Result<TransformerModel> {
        let weights = self.engine.with_session(Weights::from_session)?;
        Ok(self.model.clone().with_weights(weights))
    }

    /// Writes the model as a folder that sentence-transformers can load.
    ///
    /// # Errors
    /// As [`SentenceTransformer::model`] and [`TransformerModel::save`].
    pub fn save(&self, dir: impl AsRef<Path>, dtype: WeightType) -> Result<()> {
        self.model()?.save(dir, dtype)
    }

    engine_methods!();
}

impl TransformerModel {
    /// The tokenizer of the model for texts of up to `length` tokens.
    ///
    /// # Errors
    /// [`Error::Config`] if the model has none, or one with more tokens than the network knows; [`Error::Tokenizer`].
    #[cfg(feature = "tokenizer")]
    pub fn word_piece(&self, length: usize) -> Result<Arc<dyn Tokenizer>> {
        let Some(json) = &self.tokenizer else {
            return Err(Error::Config {
                field: "tokenizer",
                reason: "is missing: the folder has no tokenizer.json".into(),
            });
        };
        let tokenizer = super::WordPiece::from_bytes(json, length)?;
        super::engine::check_vocabulary(&tokenizer, self.options.vocabulary)?;
        Ok(match self.lower_case {
            true => Arc::new(LowerCase(Arc::new(tokenizer))),
            false => Arc::new(tokenizer),
        })
    }
}

/// A tokenizer of texts in lower case.
struct LowerCase(Arc<dyn Tokenizer>);

impl Tokenizer for LowerCase {
    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.0.encode(&text.to_lowercase())
    }

    fn tokenize(&self, text: &str) -> Result<Tokens> {
        self.0.tokenize(&text.to_lowercase())
    }

    fn decode(&self, ids: &[u32]) -> Result<String> {
        self.0.decode(ids)
    }

    fn vocab_size(&self) -> u32 {
        self.0.vocab_size()
    }

    fn token_id(&self, token: &str) -> Option<u32> {
        self.0.token_id(token)
    }

    fn padding_id(&self) -> Option<u32> {
        self.0.padding_id()
    }
}
