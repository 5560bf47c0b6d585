//! A tiny random BERT as a folder of sentence-transformers, and its embeddings in f64 from the definition, without a graph.

use std::collections::BTreeMap;
use std::path::Path;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize_to_file};
use serde_json::{Value, json};

pub const VOCABULARY: usize = 30;
pub const WIDTH: usize = 16;
pub const HEADS: usize = 2;
pub const HIDDEN: usize = 24;
pub const LAYERS: usize = 2;
pub const POSITIONS: usize = 14;
pub const EPS: f64 = 1e-12;

/// What the folder says.
#[derive(Clone, Copy, Debug)]
pub struct Bert {
    pub seed: u64,
    /// `[CLS]` instead of the mean.
    pub cls: bool,
    pub normalize: bool,
    /// Prefix of the names of the weights.
    pub prefix: &'static str,
}

impl Default for Bert {
    fn default() -> Self {
        Self {
            seed: 1,
            cls: false,
            normalize: true,
            prefix: "",
        }
    }
}

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

impl Bert {
    /// By the names of Hugging Face's `BertModel`.
    pub fn tensors(&self) -> Tensors {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let mut tensors = Tensors::new();
        let mut add = |name: String, shape: &[usize], around: f32| {
            let len = shape.iter().product();
            let data = (0..len).map(|_| around + rng.random_range(-0.5_f32..0.5));
            let data = data.collect();
            tensors.insert(format!("{}{name}", self.prefix), (shape.to_vec(), data));
        };
        let tables = [
            ("word", VOCABULARY),
            ("position", POSITIONS),
            ("token_type", 2),
        ];
        for (name, rows) in tables {
            add(
                format!("embeddings.{name}_embeddings.weight"),
                &[rows, WIDTH],
                0.0,
            );
        }
        let mut norms = vec!["embeddings.LayerNorm".to_owned()];
        let mut linears = vec![("pooler.dense".to_owned(), WIDTH, WIDTH)];
        for layer in 0..LAYERS {
            let name = |part: &str| format!("encoder.layer.{layer}.{part}");
            for part in ["query", "key", "value"] {
                linears.push((name(&format!("attention.self.{part}")), WIDTH, WIDTH));
            }
            linears.push((name("attention.output.dense"), WIDTH, WIDTH));
            linears.push((name("intermediate.dense"), WIDTH, HIDDEN));
            linears.push((name("output.dense"), HIDDEN, WIDTH));
            norms.push(name("attention.output.LayerNorm"));
            norms.push(name("output.LayerNorm"));
        }
        for name in norms {
            add(format!("{name}.weight"), &[WIDTH], 1.0);
            add(format!("{name}.bias"), &[WIDTH], 0.0);
        }
        for (name, inputs, outputs) in linears {
            add(format!("{name}.weight"), &[outputs, inputs], 0.0);
            add(format!("{name}.bias"), &[outputs], 0.0);
        }
        tensors
    }

    /// The folder as Python writes it.
    pub fn write(&self, dir: &Path) {
        let put = |name: &str, value: Value| {
            let path = dir.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, format!("{value:#}")).unwrap();
        };
        put("config.json", config());
        let module = |idx: usize, path: &str, kind: &str| json!({"idx": idx, "name": idx.to_string(), "path": path, "type": format!("sentence_transformers.models.{kind}")});
        let mut modules = vec![
            module(0, "", "Transformer"),
            module(1, "1_Pooling", "Pooling"),
        ];
        if self.normalize {
            modules.push(module(2, "2_Normalize", "Normalize"));
        }
        put("modules.json", Value::Array(modules));
        put(
            "1_Pooling/config.json",
            json!({"word_embedding_dimension": WIDTH, "pooling_mode_cls_token": self.cls, "pooling_mode_mean_tokens": !self.cls, "pooling_mode_max_tokens": false}),
        );
        put(
            "sentence_bert_config.json",
            json!({"max_seq_length": 11, "do_lower_case": false}),
        );
        put("tokenizer.json", tokenizer());
        let tensors = self.tensors();
        let bytes: BTreeMap<_, Vec<u8>> = tensors
            .iter()
            .map(|(name, (_, data))| (name, data.iter().flat_map(|x| x.to_le_bytes()).collect()))
            .collect();
        let mut views: Vec<_> = tensors
            .iter()
            .map(|(name, (shape, _))| {
                let view = TensorView::new(Dtype::F32, shape.clone(), &bytes[name]).unwrap();
                (name.clone(), view)
            })
            .collect();
        // A buffer that PyTorch keeps.
        let positions: Vec<u8> = (0..POSITIONS as i64).flat_map(i64::to_le_bytes).collect();
        let view = TensorView::new(Dtype::I64, vec![1, POSITIONS], &positions).unwrap();
        views.push((format!("{}embeddings.position_ids", self.prefix), view));
        let metadata = [("format".to_owned(), "pt".to_owned())].into();
        serialize_to_file(views, Some(metadata), &dir.join("model.safetensors")).unwrap();
    }

    /// The embedding of a text of these tokens.
    pub fn embed(&self, ids: &[u32]) -> Vec<f64> {
        let tensors = self.tensors();
        let get = |name: &str| -> &[f32] { &tensors[&format!("{}{name}", self.prefix)].1 };
        let linear = |name: &str, x: &[f64]| -> Vec<f64> {
            let (weight, bias) = (get(&format!("{name}.weight")), get(&format!("{name}.bias")));
            let rows = weight.chunks(x.len()).zip(bias);
            rows.map(|(row, b)| {
                row.iter()
                    .zip(x)
                    .map(|(w, x)| f64::from(*w) * x)
                    .sum::<f64>()
                    + f64::from(*b)
            })
            .collect()
        };
        let norm = |name: &str, x: &[f64]| -> Vec<f64> {
            let n = x.len() as f64;
            let mean = x.iter().sum::<f64>() / n;
            let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
            let (weight, bias) = (get(&format!("{name}.weight")), get(&format!("{name}.bias")));
            let scale = weight.iter().zip(bias);
            x.iter()
                .zip(scale)
                .map(|(x, (w, b))| {
                    (x - mean) / (variance + EPS).sqrt() * f64::from(*w) + f64::from(*b)
                })
                .collect()
        };
        let sum =
            |a: &[f64], b: &[f64]| -> Vec<f64> { a.iter().zip(b).map(|(a, b)| a + b).collect() };
        let row = |name: &str, row: usize| -> Vec<f64> {
            let table = get(&format!("embeddings.{name}_embeddings.weight"));
            table[row * WIDTH..][..WIDTH]
                .iter()
                .map(|&x| f64::from(x))
                .collect()
        };
        let mut x: Vec<Vec<f64>> = ids
            .iter()
            .enumerate()
            .map(|(t, &id)| {
                let e = sum(&row("word", id as usize), &row("token_type", 0));
                norm("embeddings.LayerNorm", &sum(&e, &row("position", t)))
            })
            .collect();
        for layer in 0..LAYERS {
            let name = |part: &str| format!("encoder.layer.{layer}.{part}");
            let project = |part: &str| -> Vec<Vec<f64>> {
                let name = name(&format!("attention.self.{part}"));
                x.iter().map(|x| linear(&name, x)).collect()
            };
            let [q, k, v] = ["query", "key", "value"].map(project);
            let d = WIDTH / HEADS;
            let mixed = q.iter().map(|q| {
                let mut out = vec![0.0; WIDTH];
                for columns in (0..HEADS).map(|h| h * d..(h + 1) * d) {
                    let scores: Vec<f64> = k
                        .iter()
                        .map(|k| {
                            let products = q[columns.clone()].iter().zip(&k[columns.clone()]);
                            products.map(|(q, k)| q * k).sum::<f64>() / (d as f64).sqrt()
                        })
                        .map(f64::exp)
                        .collect();
                    let total: f64 = scores.iter().sum();
                    for (p, v) in scores.iter().zip(&v) {
                        for c in columns.clone() {
                            out[c] += p / total * v[c];
                        }
                    }
                }
                out
            });
            let mixed: Vec<Vec<f64>> = mixed.collect();
            x = x
                .iter()
                .zip(&mixed)
                .map(|(x, mixed)| {
                    let h = sum(&linear(&name("attention.output.dense"), mixed), x);
                    let x = norm(&name("attention.output.LayerNorm"), &h);
                    let h = linear(&name("intermediate.dense"), &x);
                    let h: Vec<f64> = h.into_iter().map(gelu).collect();
                    let h = sum(&linear(&name("output.dense"), &h), &x);
                    norm(&name("output.LayerNorm"), &h)
                })
                .collect();
        }
        let mut z = x[0].clone();
        if !self.cls {
            z = (0..WIDTH)
                .map(|c| x.iter().map(|x| x[c]).sum::<f64>() / x.len() as f64)
                .collect();
        }
        let norm = match self.normalize {
            true => z.iter().map(|x| x * x).sum::<f64>().sqrt(),
            false => 1.0,
        };
        z.into_iter().map(|x| x / norm).collect()
    }
}

pub fn config() -> Value {
    json!({
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": HIDDEN,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": 2,
        "layer_norm_eps": EPS,
        "pad_token_id": 0,
        "initializer_range": 0.02,
        "position_embedding_type": "absolute",
    })
}

/// Words `w0` to `w24` after five control tokens. Its padding to 128 and its truncation to 3 tokens must not matter.
pub fn tokenizer() -> Value {
    let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];
    let mut vocab: BTreeMap<String, usize> = BTreeMap::new();
    for (i, token) in special.iter().enumerate() {
        vocab.insert((*token).to_owned(), i);
    }
    for i in 0..VOCABULARY - special.len() {
        vocab.insert(format!("w{i}"), i + special.len());
    }
    let added = special.iter().enumerate().map(|(id, content)| json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false}));
    let added: Vec<Value> = added.collect();
    json!({
        "version": "1.0",
        "truncation": {"max_length": 3, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 128}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"},
        "added_tokens": added,
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "[SEP]", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]}, "[SEP]": {"id": "[SEP]", "ids": [3], "tokens": ["[SEP]"]}}},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": vocab}
    })
}

/// Exact form, with erf from a series.
fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2))
}

fn erf(x: f64) -> f64 {
    // Abramowitz & Stegun 7.1.6; all terms are of one sign.
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= 2.0 * x * x / f64::from(2 * n + 1);
        sum += term;
    }
    2.0 / std::f64::consts::PI.sqrt() * (-x * x).exp() * sum
}
