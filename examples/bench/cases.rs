//! The cases: names, shapes, work.

use energyflow::graph::{AttentionOptions, Init, Op};
use energyflow::nn::{Draws, Embedding, Linear, Mode, Tcn, TcnOptions};
use energyflow::text::{Encoder, EncoderOptions};
use energyflow::train::{AdamW, LossScale};
use energyflow::types::{Rates, Trans};
use energyflow::{DType, Error, Result};

use crate::teacher;
use crate::workload::Workload;

/// A named piece of work.
pub struct Case {
    /// What it is selected by.
    pub name: &'static str,
    /// Adds its graph, f16 or f32 in storage.
    build: fn(&mut Workload, DType) -> Result<()>,
}

impl Case {
    /// The graph with its data.
    pub fn workload(&self, dtype: DType) -> Result<Workload> {
        let mut workload = Workload::default();
        (self.build)(&mut workload, dtype)?;
        Ok(workload)
    }
}

const fn case(name: &'static str, build: fn(&mut Workload, DType) -> Result<()>) -> Case {
    Case { name, build }
}

/// All cases.
pub static CASES: [Case; 33] = [
    case("gemm_4096", |w, dtype| gemm(w, dtype, 4096)),
    case("gemm_1024", |w, dtype| gemm(w, dtype, 1024)),
    case("gemm_512", |w, dtype| gemm(w, dtype, 512)),
    case("linear_vocab", linear_vocab),
    case("ln_gelu_gemm", ln_gelu_gemm),
    case("gelu_gemm", gelu_gemm),
    case("layer_norm", layer_norm),
    case("gelu", gelu),
    case("softmax", softmax),
    case("softmax_ce", softmax_ce),
    case("attention_fwd", |w, dtype| attention(w, dtype, false)),
    case("attention_fwdbwd", |w, dtype| attention(w, dtype, true)),
    case("adamw", adamw),
    case("conv1d", |w, dtype| {
        conv(w, dtype, [32, 128, 768], [512, 3, 2])
    }),
    case("conv1d_k5", |w, dtype| {
        conv(w, dtype, [64, 128, 256], [512, 5, 4])
    }),
    case("conv1d_gemm", |w, dtype| {
        product(w, dtype, [32 * 128, 3 * 768])
    }),
    case("conv1d_k5_gemm", |w, dtype| {
        product(w, dtype, [64 * 128, 5 * 256])
    }),
    case("conv1d_k5_columns", conv_columns),
    case("tcn_block_fwd", tcn_block_fwd),
    case("tcn_block_fwdbwd", tcn_block_fwdbwd),
    case("encoder_fwd", encoder_fwd),
    case("encoder_train", |w, dtype| {
        encoder_train(w, dtype, 0.0, false)
    }),
    case("encoder_train_dropout", |w, dtype| {
        encoder_train(w, dtype, 0.1, false)
    }),
    case("encoder_train_recompute", |w, dtype| {
        encoder_train(w, dtype, 0.0, true)
    }),
    case("decoder_train", |w, dtype| decoder_train(w, dtype, false)),
    case("decoder_train_chunked", |w, dtype| {
        decoder_train(w, dtype, true)
    }),
    case("teacher_fwd_1x16", |w, dtype| {
        teacher::forward(w, dtype, 1, 16)
    }),
    case("teacher_fwd_1x64", |w, dtype| {
        teacher::forward(w, dtype, 1, 64)
    }),
    case("teacher_fwd_32x32", |w, dtype| {
        teacher::forward(w, dtype, 32, 32)
    }),
    case("teacher_fwd_256x32", |w, dtype| {
        teacher::forward(w, dtype, 256, 32)
    }),
    case("teacher_fwd_256x64", |w, dtype| {
        teacher::forward(w, dtype, 256, 64)
    }),
    case("teacher_fwd_64x128", |w, dtype| {
        teacher::forward(w, dtype, 64, 128)
    }),
    case("teacher_train", teacher::train),
];

const VOCABULARY: usize = 30_522;
const LENGTH: usize = 128;

/// C = A·B, square.
fn gemm(w: &mut Workload, dtype: DType, n: usize) -> Result<()> {
    let a = w.uniform("a", &[n, n], dtype)?;
    let b = w.weight("b", &[n, n], n, dtype)?;
    let c = w.graph.matmul(a, b, Trans::NN)?;
    w.flops = 2.0 * (n as f64).powi(3);
    w.output("c", c)
}

fn linear_vocab(w: &mut Workload, dtype: DType) -> Result<()> {
    let x = w.uniform("x", &[4096, 768], dtype)?;
    let (y, _) = w.linear("l", x, VOCABULARY)?;
    w.output("y", y)
}

fn ln_gelu_gemm(w: &mut Workload, dtype: DType) -> Result<()> {
    let x = w.uniform("x", &[4096, 768], dtype)?;
    let (h, _) = w.layer_norm("ln", x)?;
    let h = w.gelu(h)?;
    let (y, _) = w.linear("l", h, 3072)?;
    w.output("y", y)
}

fn gelu_gemm(w: &mut Workload, dtype: DType) -> Result<()> {
    let x = w.uniform("x", &[4096, 3072], dtype)?;
    let h = w.gelu(x)?;
    let (y, _) = w.linear("l", h, 768)?;
    w.output("y", y)
}

fn layer_norm(w: &mut Workload, dtype: DType) -> Result<()> {
    let x = w.uniform("x", &[16_384, 1024], dtype)?;
    let (y, _) = w.layer_norm("ln", x)?;
    w.output("y", y)
}

fn gelu(w: &mut Workload, dtype: DType) -> Result<()> {
    let x = w.uniform("x", &[16_384, 4096], dtype)?;
    let y = w.gelu(x)?;
    w.output("y", y)
}

fn softmax(w: &mut Workload, dtype: DType) -> Result<()> {
    let x = w.uniform("x", &[4096, 4096], dtype)?;
    let y = w.graph.softmax(x)?;
    w.output("y", y)
}

/// Self-attention of 64 texts of 128 tokens, 12 heads of 32 columns; with the gradients of queries, keys and values, where every ∂/∂y is 0.01.
fn attention(w: &mut Workload, dtype: DType, backward: bool) -> Result<()> {
    let (heads, columns) = (12, 32);
    let qkv = w.uniform("qkv", &[BATCH, LENGTH, 3 * heads * columns], dtype)?;
    let y = w.graph.attention(qkv, None, AttentionOptions::new(heads))?;
    w.output("y", y)?;
    let product = 2.0 * (BATCH * heads * LENGTH * LENGTH * columns) as f64;
    w.flops = 2.0 * product;
    if backward {
        // Only its gradient is wanted: the sum itself is not computed. The scores are computed again.
        w.flops += 5.0 * product;
        let loss = w.graph.affine(y, 1e-2, 0.0)?;
        let loss = w.graph.sum_all(loss)?;
        let gradient = w.graph.gradients(loss, &[qkv])?[0];
        w.output("gradient", gradient)?;
    }
    Ok(())
}

/// Value and gradient.
fn softmax_ce(w: &mut Workload, dtype: DType) -> Result<()> {
    let logits = w.uniform("x", &[4096, VOCABULARY], dtype)?;
    let targets = w.indices("t", 4096, VOCABULARY)?;
    let loss = w.graph.cross_entropy(logits, targets, None, 0.0)?.loss;
    let gradients = w.graph.gradients(loss, &[logits])?;
    w.output("loss", loss)?;
    w.output("dx", gradients[0])
}

/// The optimizer alone, over gradients that are given.
fn adamw(w: &mut Workload, dtype: DType) -> Result<()> {
    if dtype != DType::F32 {
        return Err(Error::Config {
            field: "dtype",
            reason: "must be f32: the case is defined over f32 parameters".into(),
        });
    }
    let n = 25_000_000;
    let gradient = w.uniform("g", &[n], dtype)?;
    let options = AdamW::default();
    let hyper = w.given("hyper", vec![3e-4, 1.0, 1.0])?;
    let parameter = w.graph.parameter("p", &[n], Init::Uniform(0.5))?;
    let op = Op::AdamW {
        rates: vec![Rates::decay(0.01); 1],
        params: vec![parameter],
        beta1: options.beta1,
        beta2: options.beta2,
        eps: options.eps,
    };
    w.graph.apply(op, &[gradient, hyper])?;
    w.bytes = 28.0 * n as f64;
    Ok(())
}

fn conv(w: &mut Workload, dtype: DType, x: [usize; 3], window: [usize; 3]) -> Result<()> {
    let x = w.uniform("x", &x, dtype)?;
    let (y, _) = w.conv("c1", x, window)?;
    w.output("y", y)
}

/// The product that a convolution to 512 channels is, of a matrix of windows that is there already.
fn product(w: &mut Workload, dtype: DType, x: [usize; 2]) -> Result<()> {
    let x = w.uniform("x", &x, dtype)?;
    let (y, _) = w.linear("c1", x, 512)?;
    w.output("y", y)
}

/// `conv1d_k5` with a matrix of windows.
fn conv_columns(w: &mut Workload, dtype: DType) -> Result<()> {
    let x = w.uniform("x", &[64, 128, 256], dtype)?;
    let columns = w.graph.im2col(x, 5, 4)?;
    let (y, _) = w.linear("c1", columns, 512)?;
    w.output("y", y)
}

const TCN_INPUT: [usize; 3] = [64, LENGTH, 256];
/// Hidden width, kernel, dilation.
const TCN_BLOCK: [usize; 3] = [512, 5, 4];

fn tcn_block_fwd(w: &mut Workload, dtype: DType) -> Result<()> {
    let x = w.uniform("x", &TCN_INPUT, dtype)?;
    let (y, _) = w.tcn_block("", x, TCN_BLOCK, None)?;
    w.output("y", y)
}

/// The block and its gradients for x and all parameters, where every ∂/∂y is 0.01.
fn tcn_block_fwdbwd(w: &mut Workload, dtype: DType) -> Result<()> {
    let x = w.uniform("x", &TCN_INPUT, dtype)?;
    let (y, parameters) = w.tcn_block("", x, TCN_BLOCK, None)?;
    // Only its gradient is wanted: the sum itself is not computed.
    let loss = w.graph.affine(y, 1e-2, 0.0)?;
    let loss = w.graph.sum_all(loss)?;
    let wanted = [vec![x], parameters].concat();
    let gradients = w.graph.gradients(loss, &wanted)?;
    w.flops *= 3.0;
    w.output("y", y)?;
    for (i, gradient) in gradients.into_iter().enumerate() {
        w.output(&format!("gradient {i}"), gradient)?;
    }
    Ok(())
}

const BATCH: usize = 64;

fn encoder_fwd(w: &mut Workload, dtype: DType) -> Result<()> {
    let rows = BATCH * LENGTH;
    let ids = w.indices("ids", rows, VOCABULARY)?;
    let mask = w.mask("mask", BATCH, LENGTH)?;
    let table = w.uniform("emb", &[VOCABULARY, 256], dtype)?;
    // Only the rows that the ids name are read.
    w.bytes -= ((VOCABULARY - rows) * 256 * dtype.size()) as f64;
    let x = w.graph.gather(table, ids, None)?;
    let mut x = w.graph.reshape(x, &[BATCH, LENGTH, 256])?;
    for (i, dilation) in [1, 2, 4, 8].into_iter().enumerate() {
        let window = [512, 5, dilation];
        x = w.tcn_block(&format!("b{i}."), x, window, Some(mask))?.0;
    }
    let pooled = w.graph.masked_mean(x, mask)?;
    let (y, _) = w.linear("out", pooled, 768)?;
    w.output("y", y)
}

/// Multiply-adds of a TCN block, counted as two.
fn block_flops(rows: usize, width: usize, hidden: usize, kernel: usize) -> f64 {
    2.0 * rows as f64 * (width * hidden * (kernel + 1)) as f64
}

/// f16 training has f32 parameters, cast in the step, and a loss scale.
pub fn optimizer(dtype: DType, clip: Option<f32>) -> AdamW {
    AdamW::default()
        .clip(clip)
        .loss_scale((dtype == DType::F16).then(LossScale::default))
}

fn encoder_train(w: &mut Workload, dtype: DType, dropout: f32, recompute: bool) -> Result<()> {
    let options = EncoderOptions::default()
        .table_bound(0.5)
        .dropout(dropout)
        .padding(Some(0));
    let encoder = Encoder::new(&mut w.graph, &options)?;
    let ids = w.indices("ids", BATCH * LENGTH, options.vocabulary)?;
    let mask = w.mask("mask", BATCH, LENGTH)?;
    let target = w.uniform("target", &[BATCH, options.embedding], DType::F32)?;
    let draws = match dropout {
        0.0 => None,
        _ => Some(Draws::new(&mut w.graph, 0)?),
    };
    let mode = Mode::train(draws).recompute(recompute);
    let y = encoder.forward_in(&mut w.graph, ids, mask, dtype, mode)?;
    let loss = w.graph.kd_loss(y, target, 1.0, 1.0)?.loss;
    let blocks = block_flops(
        BATCH * LENGTH,
        options.width,
        options.hidden,
        options.kernel,
    );
    let projection = 2.0 * (BATCH * options.width * options.embedding) as f64;
    w.flops = 3.0 * (options.dilations.len() as f64 * blocks + projection);
    w.train(loss, &optimizer(dtype, Some(1.0)))
}

/// `chunked`: the logits never exist as a whole.
fn decoder_train(w: &mut Workload, dtype: DType, chunked: bool) -> Result<()> {
    let (batch, width) = (32, 768);
    let rows = batch * LENGTH;
    let options = TcnOptions::new(width, 512, &[1, 2]);
    let init = Init::Uniform(0.5);
    let embedding = Embedding::new(&mut w.graph, "embedding", VOCABULARY, width, None, init)?;
    let condition = Linear::new(&mut w.graph, "condition", width, width, true)?;
    let tcn = Tcn::new(&mut w.graph, "blocks", &options)?;
    let head = Linear::new(&mut w.graph, "head", width, VOCABULARY, true)?;

    let ids = w.indices("ids", rows, VOCABULARY)?;
    let targets = w.indices("targets", rows, VOCABULARY)?;
    let z = w.uniform("z", &[batch, width], dtype)?;
    let x = embedding.forward(&mut w.graph, ids, dtype)?;
    let x = w.graph.reshape(x, &[batch, LENGTH, width])?;
    let z = condition.forward(&mut w.graph, z)?;
    let x = w.graph.add_over_time(x, z)?;
    let x = tcn.forward(&mut w.graph, x, None)?;
    let loss = match chunked {
        true => {
            let weight = w.graph.cast(head.weight, dtype)?;
            let bias = head.bias;
            w.graph
                .linear_cross_entropy(x, weight, bias, targets, None, 0.0)?
        }
        false => {
            let logits = head.forward(&mut w.graph, x)?;
            w.graph.cross_entropy(logits, targets, None, 0.0)?
        }
    }
    .loss;

    let blocks = 2.0 * block_flops(rows, width, options.hidden, options.kernel);
    let products = 2.0 * (batch * width * width + rows * width * VOCABULARY) as f64;
    w.flops = 3.0 * (blocks + products);
    w.train(loss, &optimizer(dtype, None))
}
