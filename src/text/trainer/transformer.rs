//! Training of a transformer.

use super::{Trainer, TrainerOptions};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::text::{Model, TransformerModel, TransformerOptions};

impl Trainer {
    /// Trains a transformer further, a sentence-transformers model for example: mode A, with its weights. Usually on pairs of texts
    /// ([`TrainerOptions::pair_loss`]); without them it is distilled from a teacher's embeddings, as [`Trainer::distill`] does it.
    ///
    /// Texts have up to `length` tokens in the training, at most as many as the model has positions. The length of the model itself stays as it
    /// is.
    ///
    /// # Errors
    /// As [`Trainer::distill`]; as [`Weights::apply`](crate::train::Weights::apply).
    pub fn from_transformer(
        gpu: &Gpu,
        model: &TransformerModel,
        length: usize,
        options: &TrainerOptions,
    ) -> Result<Self> {
        let mut sizes = model.clone().with_weights(Default::default());
        sizes.options.length = length;
        let model_length = model.options.length;
        let mut trainer = Self::new(gpu, (Model::default(), Some(sizes)), options)?;
        trainer.set_weights(&model.weights)?;
        trainer.model_length = model_length;
        Ok(trainer)
    }

    /// Sizes of the transformer, if this trainer has one. The length is that of the training.
    #[must_use]
    pub fn transformer(&self) -> Option<&TransformerOptions> {
        self.transformer.as_ref().map(|model| &model.options)
    }

    /// The transformer with its present weights, ready to be saved.
    ///
    /// # Errors
    /// [`Error::Config`] for a trainer of other networks; as [`Trainer::weights`].
    pub fn transformer_model(&self) -> Result<TransformerModel> {
        let Some(model) = &self.transformer else {
            return Err(Error::Config {
                field: "model",
                reason: "is no transformer: use Trainer::model".into(),
            });
        };
        let mut model = model.clone().with_weights(self.weights()?);
        model.options.length = self.model_length;
        Ok(model)
    }
}
