//! What Hugging Face's `BertModel` keeps in its files: `config.json`, and the names and shapes of its weights.

use std::collections::BTreeSet;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::transformer::TransformerOptions;
use crate::error::Result;
use crate::file::InputFile;
use crate::nn::{Activation, NormOrder};
use crate::train::Weights;

/// The fields of `config.json` that say what is computed.
#[derive(Deserialize)]
pub(super) struct Config {
    model_type: Option<String>,
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    #[serde(default = "gelu")]
    hidden_act: String,
    #[serde(default = "tenth")]
    hidden_dropout_prob: f32,
    max_position_embeddings: usize,
    #[serde(default = "two")]
    type_vocab_size: usize,
    #[serde(default = "tiny")]
    layer_norm_eps: f32,
    #[serde(default)]
    pad_token_id: Option<u32>,
    position_embedding_type: Option<String>,
    #[serde(default)]
    is_decoder: bool,
}

fn gelu() -> String {
    "gelu".into()
}

fn tenth() -> f32 {
    0.1
}

fn two() -> usize {
    2
}

fn tiny() -> f32 {
    1e-12
}

impl Config {
    /// Reads a `config.json`; `bytes` are its content.
    ///
    /// # Errors
    /// [`Error::Format`](crate::Error::Format) for a malformed file and for a network that is not BERT's.
    pub fn options(file: &InputFile, bytes: &[u8]) -> Result<TransformerOptions> {
        let fail = |reason: String| Err(file.fail(0, reason));
        #[derive(Deserialize)]
        struct Kind {
            model_type: Option<String>,
        }
        let kind: Kind = super::model::parse(file, bytes)?;
        match kind.model_type.as_deref() {
            Some("bert") => {}
            Some(other) => {
                return fail(format!(
                    "model_type is {other:?}, which is not supported: only \"bert\" is, that is BERT, MiniLM and what has the same layers"
                ));
            }
            None => {
                let reason = "model_type is missing; only \"bert\" is supported (a model of energyflow is a TextEncoder)";
                return fail(reason.into());
            }
        }
        let config: Self = super::model::parse(file, bytes)?;
        debug_assert_eq!(config.model_type.as_deref(), Some("bert"));
        let activation = match config.hidden_act.as_str() {
            "gelu" => Activation::GeluErf,
            "gelu_new" | "gelu_pytorch_tanh" => Activation::GeluTanh,
            "relu" => Activation::Relu,
            other => {
                return fail(format!(
                    "hidden_act is {other:?}; supported are gelu, gelu_new, gelu_pytorch_tanh and relu"
                ));
            }
        };
        if let Some(kind) = config.position_embedding_type.as_deref()
            && kind != "absolute"
        {
            return fail(format!(
                "position_embedding_type is {kind:?}; only \"absolute\" is supported"
            ));
        }
        if config.is_decoder {
            return fail("is_decoder is true; only encoders are supported".into());
        }
        Ok(TransformerOptions::default()
            .vocabulary(config.vocab_size)
            .length(config.max_position_embeddings)
            .positions(config.max_position_embeddings)
            .types(config.type_vocab_size)
            .width(config.hidden_size)
            .heads(config.num_attention_heads)
            .hidden(config.intermediate_size)
            .layers(config.num_hidden_layers)
            .activation(activation)
            .norm(NormOrder::Post)
            .eps(config.layer_norm_eps)
            .dropout(config.hidden_dropout_prob)
            .normalize(false)
            .padding(config.pad_token_id))
    }
}

/// Writes the sizes over those of a `config.json`, which keeps its other fields.
pub(super) fn describe(options: &TransformerOptions, config: &mut Map<String, Value>) {
    let activation = match options.activation {
        Activation::GeluTanh => "gelu_new",
        Activation::Relu => "relu",
        Activation::GeluErf => "gelu",
    };
    let own = json!({
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": options.vocabulary,
        "hidden_size": options.width,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "intermediate_size": options.hidden,
        "hidden_act": activation,
        "hidden_dropout_prob": options.dropout,
        "max_position_embeddings": options.positions,
        "type_vocab_size": options.types,
        "layer_norm_eps": options.eps,
        "pad_token_id": options.padding,
        "position_embedding_type": "absolute",
    });
    if let Value::Object(own) = own {
        config.extend(own);
    }
}

/// What the layers are called here and there.
const LAYER: [(&str, &str); 6] = [
    ("self_attn.in_proj", "attention.self"),
    ("self_attn.out_proj", "attention.output.dense"),
    ("norm1", "attention.output.LayerNorm"),
    ("linear1", "intermediate.dense"),
    ("linear2", "output.dense"),
    ("norm2", "output.LayerNorm"),
];

/// The parts of `in_proj`, in the order of its rows.
const PACKED: [&str; 3] = ["query", "key", "value"];

/// Here parameters of layer N begin with `encoder.layers.N.`, there with `encoder.layer.N.`.
const OURS: &str = "encoder.layers.";
const THEIRS: &str = "encoder.layer.";

/// The name here of a tensor of `BertModel`; that of q, k or v has `query`, `key` or `value` before its end.
/// `None` for tensors that are no parameters.
pub(super) fn name_here(name: &str) -> Option<String> {
    let name = name.strip_prefix("bert.").unwrap_or(name);
    if name == "embeddings.position_ids" {
        return None;
    }
    let Some(rest) = name.strip_prefix(THEIRS) else {
        return Some(name.to_owned());
    };
    let (number, rest) = rest.split_once('.')?;
    for (here, there) in LAYER {
        let part = rest
            .strip_prefix(there)
            .and_then(|rest| rest.strip_prefix('.'));
        if let Some(part) = part {
            return Some(format!("{OURS}{number}.{here}.{part}"));
        }
    }
    Some(name.to_owned())
}

/// Number of layers that a file has tensors of, also of such as are not read.
pub(super) fn layers(weights: &Weights) -> usize {
    let skipped = weights.skipped().map(|(name, _)| name);
    let of_layers = weights.names().chain(skipped).filter_map(|name| {
        let (number, _) = name.strip_prefix(OURS)?.split_once('.')?;
        Some(number)
    });
    of_layers.collect::<BTreeSet<_>>().len()
}

/// Joins q, k and v of each layer. Those that do not fit together are left as they are.
pub(super) fn pack(weights: &mut Weights, layers: usize) {
    for layer in 0..layers {
        for end in ["weight", "bias"] {
            let name = |part: &str| format!("{OURS}{layer}.self_attn.in_proj.{part}");
            let names = PACKED.map(|part| name(&format!("{part}.{end}")));
            let parts: Vec<_> = names.iter().filter_map(|name| weights.get(name)).collect();
            let [(shape, first), second, third] = parts[..] else {
                continue;
            };
            if second.0 != shape || third.0 != shape || shape.is_empty() {
                continue;
            }
            let mut whole = shape.to_vec();
            whole[0] *= PACKED.len();
            let data = [first, second.1, third.1].concat();
            for name in &names {
                weights.remove(name);
            }
            weights.insert(name(end), whole, data);
        }
    }
}

/// The weights under the names of `BertModel`, with q, k and v apart.
pub(super) fn unpack(weights: &Weights) -> Weights {
    let mut theirs = Weights::default();
    for name in weights.names() {
        let Some((shape, data)) = weights.get(name) else {
            continue;
        };
        let layer = name
            .strip_prefix(OURS)
            .and_then(|rest| rest.split_once('.'));
        let Some((number, rest)) = layer else {
            theirs.insert(name.to_owned(), shape.to_vec(), data.to_vec());
            continue;
        };
        for (here, there) in LAYER {
            let part = rest
                .strip_prefix(here)
                .and_then(|rest| rest.strip_prefix('.'));
            let Some(end) = part else {
                continue;
            };
            if there != LAYER[0].1 {
                let name = format!("{THEIRS}{number}.{there}.{end}");
                theirs.insert(name, shape.to_vec(), data.to_vec());
                continue;
            }
            let mut own = shape.to_vec();
            own[0] /= PACKED.len();
            for (part, data) in PACKED.iter().zip(data.chunks(data.len() / PACKED.len())) {
                let name = format!("{THEIRS}{number}.{there}.{part}.{end}");
                theirs.insert(name, own.clone(), data.to_vec());
            }
        }
    }
    theirs
}
