//! A sentence transformer on the host: sizes, weights and tokenizer, as a folder of the Python library sentence-transformers.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::bert;
use super::model::parse;
use super::transformer::{Pooling, Transformer, TransformerOptions};
use crate::error::{Error, Result};
use crate::file::{AtomicFile, AtomicFolder, InputFile, find};
use crate::fnv::Fnv;
use crate::graph::Graph;
use crate::nn::NormOrder;
use crate::runtime::Session;
use crate::setters::setters;
use crate::train::{WeightType, Weights};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const TOKENIZER: &str = "tokenizer.json";
const MODULES: &str = "modules.json";
const LENGTH: &str = "sentence_bert_config.json";
const CARD: &str = "README.md";
const POOLING: &str = "1_Pooling";
const NORMALIZE: &str = "2_Normalize";

/// Files that are kept as they are, for readers in Python.
const KEPT: [&str; 4] = [
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "config_sentence_transformers.json",
];

/// Files of other formats that may lie beside them, and that a new folder does not have.
const DROPPED: [&str; 3] = ["data_config.json", "train_script.py", "pytorch_model.bin"];

/// Upper bound on the size of a file of JSON in bytes.
const LARGEST_JSON: u64 = 1 << 20;
/// Upper bound on the size of `tokenizer.json`, and of files that are kept, in bytes.
const LARGEST_TOKENIZER: u64 = 1 << 30;

/// A transformer of the BERT family with its tokenizer, on the host.
///
/// [`TransformerModel::load`] reads a folder as the Python library sentence-transformers writes it, and [`TransformerModel::save`] writes one
/// that it can load:
///
/// | file | content |
/// |---|---|
/// | `config.json` | sizes, as Hugging Face's `BertModel` has them |
/// | `model.safetensors` | parameters in f32 or f16, by the names of `BertModel` |
/// | `tokenizer.json` | the tokenizer; its padding and truncation are not used |
/// | `modules.json` | the parts: transformer, pooling, perhaps normalisation |
/// | `1_Pooling/config.json` | mean or `[CLS]` |
/// | `sentence_bert_config.json` | the longest text in tokens, and whether texts become lower case |
///
/// The weights have the names of [`Transformer`] here; q, k and v of a layer are packed into one parameter.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct TransformerModel {
    /// Sizes of the network, pooling and normalisation.
    pub options: TransformerOptions,
    /// Every parameter of the network, and no other.
    pub weights: Weights,
    /// The content of a `tokenizer.json`. `None`: texts are given as token ids.
    pub tokenizer: Option<Vec<u8>>,
    /// Whether texts become lower case before they are tokenised.
    pub lower_case: bool,
    /// Tensors of the file that the network does not use, such as those of BERT's pooler; written back as they were.
    unused: Weights,
    /// `config.json` as it was read.
    config: Map<String, Value>,
    /// Other files, by name, written back as they were.
    files: Vec<(String, Vec<u8>)>,
}

/// An entry of `modules.json`.
#[derive(Deserialize)]
struct Module {
    path: String,
    r#type: String,
}

/// `1_Pooling/config.json`. Modes that are not listed are refused by name.
#[derive(Deserialize)]
struct PoolingConfig {
    #[serde(flatten)]
    fields: Map<String, Value>,
}

/// `sentence_bert_config.json`
#[derive(Default, Deserialize)]
struct LengthConfig {
    #[serde(default)]
    max_seq_length: Option<usize>,
    #[serde(default)]
    do_lower_case: bool,
}

impl TransformerModel {
    setters! {
        options: TransformerOptions,
        tokenizer: Option<Vec<u8>>,
        lower_case: bool,
    }

    /// A model of these weights, which have the names of [`Transformer`].
    #[must_use]
    pub fn new(options: TransformerOptions, weights: Weights) -> Self {
        Self {
            options,
            weights,
            ..Self::default()
        }
    }

    /// The same model with other weights, such as those of a training that began with it.
    #[must_use]
    pub fn with_weights(self, weights: Weights) -> Self {
        Self { weights, ..self }
    }

    /// Reads a folder that sentence-transformers or [`TransformerModel::save`] wrote. Without `modules.json`, the embedding is the mean of
    /// the tokens' vectors, as there.
    ///
    /// # Errors
    /// [`Error::Io`] naming a file that is missing or cannot be read; [`Error::Format`] naming the file, for one that is malformed, for
    /// networks and parts that are not supported, and for parameters that are missing or of another shape.
    pub fn load(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = &*find(dir.as_ref());
        let metadata = std::fs::metadata(dir).map_err(|error| Error::io(dir, error))?;
        if !metadata.is_dir() {
            let reason = "is a file, not the folder of a model";
            let source = std::io::Error::new(std::io::ErrorKind::NotADirectory, reason);
            return Err(Error::io(dir, source));
        }
        let parts = Parts::read(dir)?;
        let transformer = dir.join(&parts.transformer);
        let (file, bytes) = read(&transformer.join(CONFIG), LARGEST_JSON)?;
        let config: Map<String, Value> = parse(&file, &bytes)?;
        let mut options = bert::Config::options(&file, &bytes)?
            .pooling(parts.pooling)
            .normalize(parts.normalize);
        let path = transformer.join(LENGTH);
        let length: LengthConfig = match path.exists() {
            true => {
                let (file, bytes) = read(&path, LARGEST_JSON)?;
                parse(&file, &bytes)?
            }
            false => LengthConfig::default(),
        };
        if let Some(longest) = length.max_seq_length {
            options.length = longest.min(options.positions);
        }
        let path = transformer.join(WEIGHTS);
        if !path.exists() && transformer.join("pytorch_model.bin").exists() {
            let reason = "is missing, and pytorch_model.bin is not read: save the model with safe_serialization=True";
            let source = std::io::Error::new(std::io::ErrorKind::NotFound, reason);
            return Err(Error::io(path, source));
        }
        let mut weights = Weights::load_with(&path, bert::name_here)?;
        // Before anything is made for each layer: the number may be any, and layers that are left out would change every embedding.
        let layers = bert::layers(&weights);
        if layers != options.layers {
            let reason = format!(
                "num_hidden_layers is {}, but model.safetensors has {layers} layers",
                options.layers
            );
            return Err(file.fail(0, reason));
        }
        bert::pack(&mut weights, layers);
        let tokenizer = transformer.join(TOKENIZER);
        let tokenizer = match tokenizer.exists() {
            true => Some(read(&tokenizer, LARGEST_TOKENIZER)?.1),
            false => None,
        };
        let mut files = Vec::new();
        for name in KEPT {
            let path = transformer.join(name);
            if path.is_file() {
                files.push((name.to_owned(), read(&path, LARGEST_TOKENIZER)?.1));
            }
        }
        let mut model = Self {
            options,
            weights,
            tokenizer,
            lower_case: length.do_lower_case,
            unused: Weights::default(),
            config,
            files,
        };
        let in_file = |path: &Path, offset, reason| Error::Format {
            path: path.to_owned(),
            offset,
            reason,
        };
        let graph = model.graph().map_err(|error| match error {
            Error::Config { field, reason } => in_file(file.path(), 0, format!("{field} {reason}")),
            other => in_file(file.path(), 0, other.to_string()),
        })?;
        let names: Vec<String> = model.weights.names().map(str::to_owned).collect();
        for name in names.iter().filter(|name| graph.find(name).is_none()) {
            if let Some((shape, data)) = model.weights.remove(name) {
                model.unused.insert(name.clone(), shape, data);
            }
        }
        model.check(&graph).map_err(|error| match error {
            Error::Data { name, reason } => {
                in_file(&path, 0, format!("parameter {name:?} {reason}"))
            }
            other => other,
        })?;
        // Those of BERT's pooler and heads come after the embedding; these would change it.
        let inner = |name: &&str| name.starts_with("embeddings.") || name.starts_with("encoder.");
        if let Some(name) = model.unused.names().find(inner) {
            let reason = format!("{name:?} is no parameter of the network of config.json");
            return Err(in_file(&path, 0, reason));
        }
        Ok(model)
    }

    /// Writes the model as a folder that sentence-transformers can load, whole or not at all, as [`Model::save`](super::Model::save) does.
    /// An existing folder of sentence-transformers is replaced; any other folder that is not empty is left alone, with an error.
    ///
    /// # Errors
    /// [`Error::Config`] for a network that `BertModel` is not: pre-norm layers or attention pooling; [`Error::Data`] naming a parameter
    /// that is missing, of another shape, or does not fit f16; [`Error::Io`], also for a folder of something else. What was there is then
    /// unchanged.
    pub fn save(&self, dir: impl AsRef<Path>, dtype: WeightType) -> Result<()> {
        let dir = dir.as_ref();
        self.check(&self.graph()?)?;
        let fail = |field, reason: &str| {
            let reason = format!("{reason}, which sentence-transformers cannot load");
            Err(Error::Config { field, reason })
        };
        if self.options.norm != NormOrder::Post {
            return fail("norm", "is pre-norm");
        }
        let pooling = match self.options.pooling {
            Pooling::Mean => "pooling_mode_mean_tokens",
            Pooling::Cls => "pooling_mode_cls_token",
            Pooling::Attention => return fail("pooling", "is attention"),
        };
        let mut config = self.config.clone();
        bert::describe(&self.options, &mut config);
        let stored = match dtype {
            WeightType::F32 => "float32",
            WeightType::F16 => "float16",
            WeightType::Int8 => return fail("dtype", "is Int8"),
        };
        config.insert("torch_dtype".into(), stored.into());
        let mut pooled = json!({
            "word_embedding_dimension": self.options.width,
            "pooling_mode_cls_token": false,
            "pooling_mode_mean_tokens": false,
            "pooling_mode_max_tokens": false,
            "pooling_mode_mean_sqrt_len_tokens": false,
        });
        pooled[pooling] = true.into();
        let length = json!({
            "max_seq_length": self.options.length,
            "do_lower_case": self.lower_case,
        });
        let mut theirs = bert::unpack(&self.weights);
        for name in self.unused.names() {
            if let Some((shape, data)) = self.unused.get(name) {
                theirs.insert(name.to_owned(), shape.to_vec(), data.to_vec());
            }
        }
        let folder = AtomicFolder::create(dir, replaceable)?;
        let write = || {
            let root = folder.folder();
            let put = |name: &str, bytes: &[u8]| {
                let mut file = AtomicFile::create(&root.join(name))?;
                file.write(bytes)?;
                file.commit()
            };
            let put_json = |name: &str, value: Value| put(name, format!("{value:#}\n").as_bytes());
            let make = |name: &str| {
                let path = root.join(name);
                std::fs::create_dir(&path).map_err(|error| Error::io(path, error))
            };
            put_json(CONFIG, Value::Object(config))?;
            put_json(MODULES, modules(self.options.normalize))?;
            put_json(LENGTH, length)?;
            make(POOLING)?;
            put_json(&format!("{POOLING}/{CONFIG}"), pooled)?;
            if self.options.normalize {
                make(NORMALIZE)?;
            }
            if let Some(tokenizer) = &self.tokenizer {
                put(TOKENIZER, tokenizer)?;
            }
            for (name, bytes) in &self.files {
                put(name, bytes)?;
            }
            put(CARD, self.readme().as_bytes())?;
            theirs.save_for_pytorch(root.join(WEIGHTS), dtype)
        };
        write().map_err(|error| folder.rename(error))?;
        folder.commit()
    }

    /// A hash of all that embeddings depend on: sizes, weights and tokenizer, as 16 hexadecimal digits. It tells models that differ apart, and
    /// is no protection against somebody who wants two to look alike.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let sizes = json!([self.options, self.lower_case, self.tokenizer.is_some()]);
        let tokenizer = self.tokenizer.as_deref().unwrap_or_default();
        let mut hash = Fnv::new();
        let mut add = |bytes: &[u8]| {
            let length = (bytes.len() as u64).to_le_bytes();
            hash = hash.write(&length).write(bytes);
        };
        add(sizes.to_string().as_bytes());
        add(tokenizer);
        for name in self.weights.names() {
            if let Some((shape, data)) = self.weights.get(name) {
                add(name.as_bytes());
                add(format!("{shape:?}").as_bytes());
                add(bytemuck::cast_slice(data));
            }
        }
        format!("{:016x}", hash.finish())
    }

    /// Declares the network's parameters in a graph.
    ///
    /// # Errors
    /// As [`Transformer::new`].
    pub fn build(&self, graph: &mut Graph) -> Result<Transformer> {
        Transformer::new(graph, &self.options)
    }

    /// Writes the parameters into a session whose graphs declare exactly those of the network.
    ///
    /// # Errors
    /// As [`Weights::apply`].
    pub fn apply(&self, session: &mut Session) -> Result<()> {
        self.weights.apply(session)
    }

    fn graph(&self) -> Result<Graph> {
        let mut graph = Graph::new();
        self.build(&mut graph)?;
        Ok(graph)
    }

    /// Checks that the weights are those that `graph` declares.
    fn check(&self, graph: &Graph) -> Result<()> {
        let fail = |name: &str, reason: String| {
            let name = name.to_owned();
            Err(Error::Data { name, reason })
        };
        for (_, value) in graph.parameters() {
            let shape = value.host_shape();
            match self.weights.get(&value.name) {
                Some((found, _)) if found == shape => {}
                Some((found, _)) => {
                    let reason =
                        format!("has shape {found:?}, but the sizes of config.json need {shape:?}");
                    return fail(&value.name, reason);
                }
                None => {
                    let unread = self.weights.skipped().next().map(|(name, dtype)| {
                        format!("; {name:?} is {dtype}, which is not read: convert it to F32")
                    });
                    let reason = format!("is missing{}", unread.unwrap_or_default());
                    return fail(&value.name, reason);
                }
            }
        }
        match self.weights.names().find(|name| graph.find(name).is_none()) {
            Some(name) => fail(name, "is no parameter of a network of these sizes".into()),
            None => Ok(()),
        }
    }

    fn readme(&self) -> String {
        let options = &self.options;
        let normalised = match options.normalize {
            true => " The vector has norm 1.",
            false => "",
        };
        format!(
            "---\nlibrary_name: sentence-transformers\npipeline_tag: sentence-similarity\ntags:\n- sentence-transformers\n- feature-extraction\n---\n\n\
             Text of up to {} tokens to a vector of {}: BERT with {} layers, {} heads and a vocabulary of {}.{normalised}\n",
            options.length, options.width, options.layers, options.heads, options.vocabulary
        )
    }
}

/// What the folder is made of.
struct Parts {
    /// Folder of the transformer inside.
    transformer: String,
    pooling: Pooling,
    normalize: bool,
}

impl Parts {
    fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(MODULES);
        if !path.exists() {
            let pooling = dir.join(POOLING).join(CONFIG);
            return Ok(Self {
                transformer: String::new(),
                pooling: match pooling.exists() {
                    true => read_pooling(&pooling)?,
                    false => Pooling::Mean,
                },
                normalize: dir.join(NORMALIZE).is_dir(),
            });
        }
        let (file, bytes) = read(&path, LARGEST_JSON)?;
        let modules: Vec<Module> = parse(&file, &bytes)?;
        let kinds: Vec<&str> = modules
            .iter()
            .map(|module| module.r#type.rsplit('.').next().unwrap_or_default())
            .collect();
        let inside = |path: &str| {
            let mut parts = Path::new(path).components();
            parts.all(|part| matches!(part, std::path::Component::Normal(_)))
        };
        let known = matches!(
            kinds[..],
            ["Transformer", "Pooling"] | ["Transformer", "Pooling", "Normalize"]
        );
        if !known || !modules.iter().all(|module| inside(&module.path)) {
            return Err(file.fail(
                0,
                format!(
                    "the modules are {}; supported are Transformer, Pooling and perhaps Normalize, each in a folder inside",
                    kinds.join(", ")
                ),
            ));
        }
        Ok(Self {
            transformer: modules[0].path.clone(),
            pooling: read_pooling(&dir.join(&modules[1].path).join(CONFIG))?,
            normalize: modules.len() > 2,
        })
    }
}

fn read_pooling(path: &Path) -> Result<Pooling> {
    let (file, bytes) = read(path, LARGEST_JSON)?;
    let config: PoolingConfig = parse(&file, &bytes)?;
    let fields = config.fields.iter();
    let modes: Vec<&str> = fields
        .filter(|(name, value)| name.starts_with("pooling_mode_") && **value == Value::Bool(true))
        .map(|(name, _)| name.as_str())
        .collect();
    match modes[..] {
        ["pooling_mode_mean_tokens"] => Ok(Pooling::Mean),
        ["pooling_mode_cls_token"] => Ok(Pooling::Cls),
        _ => Err(file.fail(
            0,
            format!(
                "the modes of pooling are {modes:?}; supported is either pooling_mode_mean_tokens or pooling_mode_cls_token, alone"
            ),
        )),
    }
}

fn modules(normalize: bool) -> Value {
    let parts = [
        ("", "Transformer"),
        (POOLING, "Pooling"),
        (NORMALIZE, "Normalize"),
    ];
    let parts = parts[..2 + usize::from(normalize)].iter().enumerate();
    let parts = parts.map(|(i, (path, kind))| {
        json!({
            "idx": i,
            "name": i.to_string(),
            "path": path,
            "type": format!("sentence_transformers.models.{kind}"),
        })
    });
    Value::Array(parts.collect())
}

/// Whether a folder that is not empty may be replaced: it is one of sentence-transformers and holds nothing else.
fn replaceable(dir: &Path) -> Result<()> {
    let fail = |reason: String| {
        let source = std::io::Error::new(std::io::ErrorKind::AlreadyExists, reason);
        Err(Error::io(dir, source))
    };
    let known = [
        CONFIG, WEIGHTS, TOKENIZER, MODULES, LENGTH, CARD, POOLING, NORMALIZE,
    ];
    let known = [&known[..], &KEPT, &DROPPED].concat();
    for entry in std::fs::read_dir(dir).map_err(|error| Error::io(dir, error))? {
        let name = entry.map_err(|error| Error::io(dir, error))?.file_name();
        if !name.to_str().is_some_and(|name| known.contains(&name)) {
            return fail(format!(
                "holds {name:?}, which is no part of a model of sentence-transformers, and is not replaced; choose another folder"
            ));
        }
    }
    match Parts::read(dir) {
        Ok(_) if dir.join(MODULES).exists() => Ok(()),
        Ok(_) => fail(
            "has no modules.json, so it is no model of sentence-transformers and is not replaced; choose another folder".into(),
        ),
        Err(error) => fail(format!(
            "is no model of sentence-transformers that this crate reads and is not replaced ({error}); choose another folder"
        )),
    }
}

fn read(path: &Path, most: u64) -> Result<(InputFile, Vec<u8>)> {
    let file = InputFile::open(path)?;
    let bytes = file.read_all(most)?;
    Ok((file, bytes))
}
