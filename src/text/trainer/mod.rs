//! Training of encoder, decoder or both.

mod evaluation;
mod fit;
mod graphs;
mod metrics;
mod objective;
mod options;
mod pairs;
mod progress;
mod start;
mod step;
mod transformer;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

pub use evaluation::{DecoderScores, EncoderScores, Evaluation};
pub use fit::{Best, Event, FitOptions, FitReport, Stop};
use graphs::{check_freeze, graph_of, trainable_names};
pub use metrics::Metrics;
use objective::{Network, Objective, Pass};
pub use options::{Condition, Contrastive, InfoNce, PairLoss, TrainerOptions, TrainingMode};
use pairs::Labels;
pub use pairs::PairScores;
use progress::Progress;
pub use start::StartOptions;
use step::{Step, Whole, check_length};

use super::batches::{Batch, Batches};
use super::card::Card;
use super::decoder::{DecoderOptions, next_tokens};
use super::encoder::EncoderOptions;
use super::model::Model;
use super::transformer_model::TransformerModel;
use crate::error::{Error, Result};
use crate::gpu::{Gate, Gpu};
use crate::graph::Graph;
use crate::runtime::{Executable, Host, Outputs, Pending, Session};
use crate::train::{AdamW, LossScale, SKIPPED, StepOutputs, Weights};
use crate::types::{DType, Precision};

/// Upper bound on the bytes of the logits in an evaluation.
const LOGITS: usize = 64 << 20;

/// An encoder, a decoder or both in training, with their session.
///
/// - [`Trainer::distill`]: mode A. The encoder learns to give a teacher's sentence embeddings.
/// - [`Trainer::decode`]: mode B. The decoder learns to continue a text, given the teacher's embedding of the whole.
/// - [`Trainer::joint`]: both in alternation.
///
/// [`Trainer::fit`] runs a whole training with validation, early stop and checkpoints. For loops of your own there are
/// [`Trainer::epoch`], [`Trainer::step`] and [`Trainer::submit`].
#[derive(Debug)]
pub struct Trainer {
    /// Sizes; without weights, which the session has.
    model: Model,
    /// In place of the encoder; without weights.
    transformer: Option<TransformerModel>,
    /// Length of the transformer outside of the training.
    model_length: usize,
    options: TrainerOptions,
    session: Session,
    /// Chunks of a batch that are steps of mode A.
    of_a: usize,
    a: Option<Training>,
    b: Option<Training>,
    /// Steps of both modes accumulate gradients in the same place.
    order: Gate,
    embed: Option<Arc<Executable>>,
    score: Option<Arc<Executable>>,
    /// Of training on pairs.
    labels: Option<Labels>,
    /// Samples of a run of `score`.
    scored: usize,
    /// Next tokens of the chunk at hand.
    targets: Mutex<Vec<u32>>,
    progress: Progress,
    /// Of the best validation so far.
    best: Option<Weights>,
}

/// The step of one mode.
#[derive(Debug)]
struct Training {
    step: Step,
    optimizer: AdamW,
    /// Skipped steps that were reported, as the bits of an f32.
    skipped: AtomicU32,
}

/// A step under way: [`Trainer::wait`] takes its metrics.
#[derive(Debug)]
pub struct PendingStep {
    mode: TrainingMode,
    pending: Pending,
}

impl Trainer {
    /// Mode A: builds and compiles the training step of an encoder, and the forward pass.
    ///
    /// # Errors
    /// [`Error::Config`] for sizes or rates out of range, and names in `freeze` or in parameter groups that fit no parameter;
    /// what [`Session::compile`] returns.
    pub fn distill(gpu: &Gpu, encoder: &EncoderOptions, options: &TrainerOptions) -> Result<Self> {
        let model = Model::default().encoder(Some(encoder.clone()));
        Self::new(gpu, (model, None), options)
    }

    /// Mode B: builds and compiles the training step of a decoder that is given the teacher's embedding of each text as z, or whatever stands
    /// in [`Batch::targets`], and its evaluation.
    ///
    /// # Errors
    /// As [`Trainer::distill`].
    pub fn decode(gpu: &Gpu, decoder: &DecoderOptions, options: &TrainerOptions) -> Result<Self> {
        let model = Model::default().decoder(Some(decoder.clone()));
        Self::new(gpu, (model, None), options)
    }

    /// Both modes in alternation, see [`TrainerOptions`]. With [`TrainerOptions::shared_last_block`] the last blocks of both must be equal
    /// in width, hidden, kernel, dilation and form of GELU.
    ///
    /// # Errors
    /// As [`Trainer::distill`]; [`Error::Config`] where encoder and decoder, or their last blocks if they are shared, do not fit each other,
    /// and for chunks that leave one mode without a step.
    pub fn joint(
        gpu: &Gpu,
        encoder: &EncoderOptions,
        decoder: &DecoderOptions,
        options: &TrainerOptions,
    ) -> Result<Self> {
        let model = Model::default()
            .encoder(Some(encoder.clone()))
            .decoder(Some(decoder.clone()))
            .shared_last_block(options.shared_last_block);
        Self::new(gpu, (model, None), options)
    }

    /// Trains a model further, or evaluates it: as [`Trainer::distill`], [`Trainer::decode`] or [`Trainer::joint`], whichever fits what the model
    /// has, with its weights. Its last block is shared if it is shared in the model. The optimizer begins anew.
    ///
    /// Training encoder and decoder needs two chunks. If `options` have one, and an [`ab_ratio`](TrainerOptions::ab_ratio) that asks for steps of
    /// both modes, an even batch is cut into two.
    ///
    /// Of the [`Card`], name, description, licence and languages stay. What it says of the earlier training does not: data, training, figures
    /// and seed are empty.
    ///
    /// # Errors
    /// As those; as [`Weights::apply`].
    pub fn from_model(gpu: &Gpu, model: &Model, options: &TrainerOptions) -> Result<Self> {
        let mut options = options.clone().shared_last_block(model.shared_last_block);
        let joint = model.encoder.is_some() && model.decoder.is_some();
        let both = joint && options.ab_ratio > 0.0 && options.ab_ratio < 1.0;
        if both && options.chunks == 1 && options.batch.is_multiple_of(2) {
            options.chunks = 2;
        }
        let old = &model.card;
        let card = Card::default()
            .name(old.name.clone())
            .description(old.description.clone())
            .license(old.license.clone())
            .languages(old.languages.clone());
        let sizes = Model {
            encoder: model.encoder.clone(),
            decoder: model.decoder.clone(),
            shared_last_block: model.shared_last_block,
            normalize: model.normalize,
            tokenizer: model.tokenizer.clone(),
            weights: Weights::default(),
            card,
        };
        let mut trainer = Self::new(gpu, (sizes, None), &options)?;
        trainer.set_weights(&model.weights)?;
        Ok(trainer)
    }

    fn new(
        gpu: &Gpu,
        (model, transformer): (Model, Option<TransformerModel>),
        options: &TrainerOptions,
    ) -> Result<Self> {
        let network = match &transformer {
            Some(transformer) => Some(Network::Transformer(&transformer.options)),
            None => model.encoder.as_ref().map(|_| Network::Encoder(&model)),
        };
        let of_a = options.check(&model, network.is_some())?;
        let joint = model.encoder.is_some() && model.decoder.is_some();
        let dtype = match options.precision {
            Precision::F32 => DType::F32,
            Precision::Mixed => DType::F16,
        };
        let optimizer = |mode: &str| {
            let own = options.decoder_optimizer.as_ref();
            let own = own.filter(|_| joint && mode == "b");
            let mut optimizer = own.unwrap_or(&options.optimizer).clone();
            optimizer.name = match joint {
                true => format!("{}.{mode}", options.optimizer.name),
                false => options.optimizer.name.clone(),
            };
            if options.precision == Precision::Mixed {
                optimizer.loss_scale.get_or_insert_with(LossScale::default);
            }
            optimizer
        };
        let mut graphs = [None, None];
        for (mode, graph) in graphs.iter_mut().enumerate() {
            if [of_a == 0, of_a == options.chunks][mode] {
                continue;
            }
            *graph = Some(graph_of(&model, network, options, dtype, mode)?);
        }
        check_freeze(&graphs, &options.freeze)?;
        let mut session = Session::new(gpu, options.seed);
        let mut compile = |graph: Option<(Graph, Objective)>, mode: &str| -> Result<_> {
            let Some(graph) = graph else {
                return Ok(None);
            };
            let optimizer = optimizer(mode);
            let fits = |name: &&String| trainable_names(&graph.0, name);
            let freeze: Vec<String> = options.freeze.iter().filter(fits).cloned().collect();
            let sizes = (options.step(), options.micro_batches);
            Ok(Some(Training {
                step: Step::new(&mut session, graph, &optimizer, &freeze, sizes)?,
                optimizer,
                skipped: AtomicU32::new(0),
            }))
        };
        let [graph_a, graph_b] = graphs;
        let a = compile(graph_a, "a")?;
        let b = compile(graph_b, "b")?;
        let embed = match network {
            Some(network) => {
                let mut graph = Graph::new();
                let each = options.pair_loss.map_or(1, |loss| loss.texts());
                // A batch for training is as large.
                let pass = Pass::evaluate(options.batch * each, dtype);
                objective::embed(&mut graph, network, pass)?;
                Some(session.compile(&graph)?)
            }
            None => None,
        };
        let mut scored = 0;
        let mut targets = 0;
        let score = match &model.decoder {
            Some(decoder) => {
                let places = decoder
                    .vocabulary
                    .max(1)
                    .saturating_mul(decoder.length.max(1));
                scored = (LOGITS / places.saturating_mul(4)).clamp(1, options.batch);
                targets = objective::tokens(options.step(), decoder.length)?;
                let mut graph = Graph::new();
                objective::score(&mut graph, &model, Pass::evaluate(scored, dtype))?;
                Some(session.compile(&graph)?)
            }
            None => None,
        };
        Ok(Self {
            model,
            transformer,
            model_length: 0,
            options: options.clone(),
            session,
            of_a,
            a,
            b,
            order: Gate::default(),
            embed,
            score,
            labels: Labels::new(options),
            scored,
            targets: Mutex::new(vec![0; targets]),
            progress: Progress::default(),
            best: None,
        })
    }

    /// Sizes of the encoder, if there is one.
    #[must_use]
    pub fn encoder(&self) -> Option<&EncoderOptions> {
        self.model.encoder.as_ref()
    }

    /// Sizes of the decoder, if there is one.
    #[must_use]
    pub fn decoder(&self) -> Option<&DecoderOptions> {
        self.model.decoder.as_ref()
    }

    /// The options of the training.
    #[must_use]
    pub fn options(&self) -> &TrainerOptions {
        &self.options
    }

    /// The compiled step of a mode, if the training has the mode: its plan, its kernels. With micro-batches it is the part that every one of
    /// them goes through.
    #[must_use]
    pub fn training_step(&self, mode: TrainingMode) -> Option<&Executable> {
        Some(&*self.training(mode)?.step.train)
    }

    /// The parameters.
    #[must_use]
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The mode of chunk number `chunk` of every batch.
    #[must_use]
    pub fn mode(&self, chunk: usize) -> TrainingMode {
        match chunk < self.of_a {
            true => TrainingMode::A,
            false => TrainingMode::B,
        }
    }

    fn training(&self, mode: TrainingMode) -> Option<&Training> {
        match mode {
            TrainingMode::A => self.a.as_ref(),
            TrainingMode::B => self.b.as_ref(),
        }
    }

    fn trainings(&self) -> impl Iterator<Item = &Training> {
        self.a.iter().chain(&self.b)
    }

    /// Runs the step of chunk number `chunk` of a batch of texts [B, L] and teacher's embeddings [B, E]; its metrics arrive later. Without
    /// chunks the number is 0. A batch of pairs has k texts per sample [B, k·L], one after the other, and scores [B, 1].
    ///
    /// # Errors
    /// [`Error::Config`] for a chunk that there is not; [`Error::Data`] for a batch of another shape or an id outside the vocabulary;
    /// [`Error::OutOfMemory`], [`Error::DeviceLost`].
    pub fn submit(&self, batch: &Batch, chunk: usize) -> Result<PendingStep> {
        let mode = self.mode(chunk);
        let training = self.training(mode).filter(|_| chunk < self.options.chunks);
        let Some(training) = training else {
            return Err(Error::Config {
                field: "chunks",
                reason: format!("is {}; there is no chunk {chunk}", self.options.chunks),
            });
        };
        let (size, step) = (self.options.batch, self.options.step());
        let [length, width] = self.sample();
        check_length("ids", batch.ids.len(), size * length)?;
        check_length("mask", batch.mask.len(), size * length)?;
        check_length("target", batch.targets.len(), size * width)?;
        let rows = chunk * step..(chunk + 1) * step;
        let places = rows.start * length..rows.end * length;
        let (ids, mask) = (&batch.ids[places.clone()], &batch.mask[places]);
        let teacher = &batch.targets[rows.start * width..rows.end * width];
        let ids_and_mask = [
            ("ids", Host::from(ids), length),
            ("mask", Host::from(mask), length),
        ];
        let [ids_input, mask_input] = ids_and_mask;
        let submit =
            |inputs: &[Whole<'_>]| training.step.submit(&self.session, &self.order, inputs);
        let pending = match (mode, &self.model.decoder, &self.labels) {
            (TrainingMode::A, _, Some(labels)) => labels.with(ids_and_mask, teacher, submit)?,
            (TrainingMode::B, Some(decoder), _) => {
                let mut targets = self.targets.lock().unwrap_or_else(PoisonError::into_inner);
                next_tokens(ids, mask, length, decoder.ignored_target(), &mut targets)?;
                let targets = ("targets", Host::from(&*targets), length);
                match self.options.condition {
                    Condition::Teacher => {
                        let z = ("z", Host::from(teacher), width);
                        submit(&[ids_input, mask_input, z, targets])?
                    }
                    _ => submit(&[ids_input, mask_input, targets])?,
                }
            }
            _ => {
                let target = ("target", Host::from(teacher), width);
                submit(&[ids_input, mask_input, target])?
            }
        };
        Ok(PendingStep { mode, pending })
    }

    /// Waits for a step. One that was skipped gives a warning in the log.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::DeviceLost`]
    pub fn wait(&self, step: PendingStep) -> Result<Metrics> {
        let PendingStep { mode, pending } = step;
        let outputs = pending.wait()?;
        let Some(training) = self.training(mode) else {
            return Err(Error::Graph("this step is one of another trainer".into()));
        };
        training.report_skipped(&outputs)?;
        Metrics::new(mode, &training.step, &outputs)
    }

    /// Runs the step of one chunk of a batch and waits for its metrics, as [`Trainer::submit`] and [`Trainer::wait`].
    ///
    /// # Errors
    /// As [`Trainer::submit`].
    pub fn step(&self, batch: &Batch, chunk: usize) -> Result<Metrics> {
        self.wait(self.submit(batch, chunk)?)
    }

    /// Trains on all remaining batches of the current epoch, [`Executable::IN_FLIGHT`] steps ahead of the reported metrics: the next
    /// batch is prepared while the device works on earlier ones. Steps that were skipped give warnings in the log.
    ///
    /// # Errors
    /// As [`Trainer::submit`].
    pub fn epoch(&self, batches: &mut Batches, mut report: impl FnMut(&Metrics)) -> Result<()> {
        let mut flight = fit::Flight::default();
        while let Some(batch) = batches.next_batch()? {
            for chunk in 0..self.options.chunks {
                if let Some(metrics) = flight.make_room(self)? {
                    report(&metrics);
                }
                flight.push(self.submit(batch, chunk)?);
            }
        }
        while let Some(metrics) = flight.land(self)? {
            report(&metrics);
        }
        Ok(())
    }

    /// Tokens of a sample, and values of its target.
    fn sample(&self) -> [usize; 2] {
        let [length, width] = self.sizes();
        match self.options.pair_loss {
            Some(loss) => [length * loss.texts(), 1],
            None => [length, width],
        }
    }

    /// Length of the texts and width of the embeddings.
    fn sizes(&self) -> [usize; 2] {
        if let Some(transformer) = self.transformer() {
            return [transformer.length, transformer.width];
        }
        match (&self.model.encoder, &self.model.decoder) {
            (Some(encoder), _) => [encoder.length, encoder.embedding],
            (None, Some(decoder)) => [decoder.length, decoder.embedding],
            (None, None) => [0, 0],
        }
    }

    /// All parameters, with the networks' sizes as JSON in the description.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::DeviceLost`]
    pub fn weights(&self) -> Result<Weights> {
        let mut weights = Weights::from_session(&self.session)?;
        let json = match (&self.model.encoder, &self.model.decoder) {
            (None, None) => serde_json::to_string(&self.transformer()),
            (Some(encoder), None) => serde_json::to_string(encoder),
            (None, Some(decoder)) => serde_json::to_string(decoder),
            both => serde_json::to_string(&both),
        };
        weights.description = json.map_err(|error| Error::Config {
            field: "description",
            reason: format!("the networks' sizes cannot be written as JSON: {error}"),
        })?;
        Ok(weights)
    }

    /// Replaces all parameters.
    ///
    /// # Errors
    /// As [`Weights::apply`].
    pub fn set_weights(&mut self, weights: &Weights) -> Result<()> {
        weights.apply(&mut self.session)
    }

    /// Encoder and decoder with their present weights, ready to be given a tokenizer and saved.
    ///
    /// # Errors
    /// [`Error::Config`] for a trainer of a transformer, which has a [`Trainer::transformer_model`]; as [`Trainer::weights`].
    pub fn model(&self) -> Result<Model> {
        if self.transformer.is_some() {
            return Err(Error::Config {
                field: "model",
                reason: "is a transformer: use Trainer::transformer_model".into(),
            });
        }
        Ok(Model {
            weights: self.weights()?,
            ..self.model.clone()
        })
    }
}

impl Training {
    fn report_skipped(&self, outputs: &Outputs) -> Result<()> {
        let skipped = outputs.scalar(StepOutputs::SKIPPED)?;
        let before = f32::from_bits(self.skipped.swap(skipped.to_bits(), Ordering::Relaxed));
        if skipped > before {
            let scale = outputs.scalar(StepOutputs::LOSS_SCALE)?;
            log::warn!(
                "a step was skipped, because a gradient was not finite; loss scale {scale}, skipped steps so far: {skipped}"
            );
        }
        Ok(())
    }

    /// Skips from before a checkpoint are no news.
    fn forget_skipped(&self, session: &Session) -> Result<()> {
        let skipped = session.get(&self.optimizer.state(SKIPPED))?;
        self.skipped.store(skipped[0].to_bits(), Ordering::Relaxed);
        Ok(())
    }
}
