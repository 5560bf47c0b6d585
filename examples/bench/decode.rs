//! Text token by token: what a token costs, against as many empty dispatches and its weights.

use std::sync::Arc;
use std::time::Instant;

use energyflow::gpu::{Access, Alignment, KernelSource, Layout, Sequence, Tensor};
use energyflow::graph::Graph;
use energyflow::text::{
    DecodeOptions, Decoder, DecoderOptions, Model, Precision, TextDecoder, TextDecoderOptions,
    Tokenizer,
};
use energyflow::train::Weights;
use energyflow::wgpu::DeviceType;
use energyflow::{DType, Gpu, Result, Session};
use serde::Serialize;

use crate::measure::{Failure, median};
use crate::{PEER, round};
use energyflow::runtime::Ceilings;

/// What the case is selected by.
pub const NAME: &str = "decode";

/// Tokens of a timed pass, and passes at least.
const TOKENS: usize = 16;
const LEAST: usize = 50;
/// Tokens of a text from call to result.
const WHOLE: usize = 1024;

/// A vocabulary without words and without an end.
struct Endless(u32);

impl Tokenizer for Endless {
    fn encode(&self, _: &str) -> Result<Vec<u32>> {
        Ok(vec![0])
    }

    fn decode(&self, _: &[u32]) -> Result<String> {
        Ok(String::new())
    }

    fn vocab_size(&self) -> u32 {
        self.0
    }

    fn token_id(&self, token: &str) -> Option<u32> {
        (token == "[CLS]").then_some(0)
    }
}

/// What a batch size, a position and a way to choose tokens gave.
#[derive(Serialize)]
struct Row {
    peer: &'static str,
    case: &'static str,
    dtype: String,
    batch: usize,
    position: u32,
    choice: &'static str,
    /// On the device, for the whole batch.
    us_per_token: f64,
    tokens_per_s: f64,
    dispatches: usize,
    /// As many dependent dispatches that do nothing.
    empty_us: f64,
    /// Weights at the copy rate.
    weights_us: f64,
    ratio: f64,
    /// From call to result of texts of 1024 tokens, per token.
    call_us_per_token: f64,
    call_tokens_per_s: f64,
    device: String,
}

/// Prints a row for every batch size, position and way to choose tokens.
pub fn run(
    gpu: &Gpu,
    ceilings: &Ceilings,
    dtype: DType,
    seconds: f64,
    json: bool,
) -> Result<(), Failure> {
    let precision = match dtype {
        DType::F16 => Precision::Mixed,
        _ => Precision::F32,
    };
    let options = DecoderOptions::default().embedding(384).length(1);
    let decoder = decoder(gpu, &options, precision)?;
    if !json {
        println!(
            "decode: D {}, H {}, {} blocks, kernel {}, V {}",
            options.width,
            options.hidden,
            options.dilations.len(),
            options.kernel,
            options.vocabulary
        );
        println!(
            "{:6} {:5} {:>5} {:>8} {:7} {:>9} {:>12} {:>10} {:>9} {:>10} {:>6} {:>9} {:>12}",
            "case",
            "dtype",
            "batch",
            "position",
            "choice",
            "us/token",
            "tokens/s",
            "dispatches",
            "empty us",
            "weights us",
            "ratio",
            "call us",
            "call tok/s"
        );
    }
    let greedy = DecodeOptions::default();
    let drawn = greedy
        .clone()
        .temperature(0.8)
        .top_k(Some(40))
        .top_p(0.95)
        .repetition_penalty(1.1);
    let empty = Empty::new(gpu)?;
    for batch in [1, 64] {
        for (choice, options) in [("greedy", &greedy), ("sampled", &drawn)] {
            let call = call(gpu, &decoder, batch, options)?;
            for position in [10, 1000] {
                let step = decoder.step(batch, position, options)?;
                let time = time(gpu, &step.sequence, seconds)?;
                let dispatches = step.sequence.len();
                let empty_us = empty.time(dispatches, seconds)?;
                let weights_us = step.weight_bytes as f64 / ceilings.bytes * 1e6;
                let row = Row {
                    peer: PEER,
                    case: NAME,
                    dtype: dtype.to_string(),
                    batch,
                    position,
                    choice,
                    us_per_token: round(time, 3),
                    tokens_per_s: round(batch as f64 / time * 1e6, 0),
                    dispatches,
                    empty_us: round(empty_us, 3),
                    weights_us: round(weights_us, 3),
                    ratio: round(time / (empty_us + weights_us), 3),
                    call_us_per_token: round(call, 3),
                    call_tokens_per_s: round(batch as f64 / call * 1e6, 0),
                    device: gpu.capabilities().adapter.clone(),
                };
                print(&row, json)?;
            }
        }
    }
    Ok(())
}

fn print(row: &Row, json: bool) -> Result<(), Failure> {
    if json {
        println!("{}", serde_json::to_string(row)?);
        return Ok(());
    }
    println!(
        "{:6} {:5} {:5} {:8} {:7} {:9.2} {:12.0} {:10} {:9.2} {:10.2} {:6.2} {:9.2} {:12.0}",
        row.case,
        row.dtype,
        row.batch,
        row.position,
        row.choice,
        row.us_per_token,
        row.tokens_per_s,
        row.dispatches,
        row.empty_us,
        row.weights_us,
        row.ratio,
        row.call_us_per_token,
        row.call_tokens_per_s
    );
    Ok(())
}

/// Prints the time of every dispatch of a token, each in a pass of its own.
pub fn profile(gpu: &Gpu, dtype: DType) -> Result<(), Failure> {
    let precision = match dtype {
        DType::F16 => Precision::Mixed,
        _ => Precision::F32,
    };
    let options = DecoderOptions::default().embedding(384).length(1);
    let decoder = decoder(gpu, &options, precision)?;
    let greedy = DecodeOptions::default();
    let drawn = greedy.clone().temperature(0.8).top_k(Some(40)).top_p(0.95);
    for batch in [1, 64] {
        for options in [&greedy, &drawn] {
            let step = decoder.step(batch, 1000, options)?;
            let runs: Vec<_> = (0..20)
                .map(|_| gpu.profile(&[&step.sequence]))
                .collect::<Result<_>>()?;
            println!(
                "decode {dtype}, batch {batch}, drawn: {}",
                options.samples()
            );
            for (i, part) in runs[0].iter().enumerate() {
                let mut times: Vec<f64> = runs.iter().map(|run| run[i].nanoseconds).collect();
                let kernel: String = part.label.chars().take(100).collect();
                println!("{:10.2} us  {kernel}", median(&mut times) * 1e-3);
            }
        }
    }
    Ok(())
}

fn decoder(gpu: &Gpu, options: &DecoderOptions, precision: Precision) -> Result<TextDecoder> {
    let mut graph = Graph::new();
    let decoder = Decoder::new(&mut graph, options)?;
    let ids = graph.index_input("ids", 1, options.vocabulary as u32)?;
    let z = graph.input("z", &[1, options.embedding], DType::F32)?;
    let states = decoder.forward(&mut graph, ids, z, None, DType::F32)?;
    let logits = decoder.logits(&mut graph, states)?;
    graph.output("logits", logits)?;
    let mut session = Session::new(gpu, 1);
    let _executable = session.compile(&graph)?;
    let model = Model::new(Weights::from_session(&session)?).decoder(Some(options.clone()));
    let tokenizer = Arc::new(Endless(options.vocabulary as u32));
    let options = TextDecoderOptions::default().precision(precision);
    TextDecoder::with_tokenizer(gpu, &model, tokenizer, &options)
}

/// Microseconds per token from call to result.
fn call(gpu: &Gpu, decoder: &TextDecoder, batch: usize, options: &DecodeOptions) -> Result<f64> {
    // A software adapter takes its time.
    let (tokens, calls) = match gpu.capabilities().device_type {
        DeviceType::Cpu => (16, 1),
        _ => (WHOLE, 3),
    };
    let z: Vec<f32> = (0..batch * decoder.embedding())
        .map(|i| (i % 17) as f32 / 17.0 - 0.5)
        .collect();
    decoder.warm_up(batch, options)?;
    let options = options.clone().max_len(tokens);
    let mut best = f64::INFINITY;
    for _ in 0..calls {
        let start = Instant::now();
        decoder.decode(&z, &options)?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best * 1e6 / tokens as f64)
}

/// Median microseconds of a token on the device, in passes of [`TOKENS`].
fn time(gpu: &Gpu, token: &Sequence, seconds: f64) -> Result<f64> {
    let pass = vec![token; TOKENS];
    let start = Instant::now();
    let mut times = Vec::new();
    while times.len() < LEAST || start.elapsed().as_secs_f64() < seconds / 2.0 {
        times.push(gpu.time_on_any_clock(&pass)?.0 * 1e-3 / TOKENS as f64);
        if times.len() >= 3 && start.elapsed().as_secs_f64() > 4.0 * seconds {
            break;
        }
    }
    // The first passes find the device idle.
    let late = times.len() / 4;
    Ok(median(&mut times[late..]))
}

/// Dispatches that do nothing, each of which waits for the one before it: they bind the same buffer for writing.
pub struct Empty<'a> {
    gpu: &'a Gpu,
    sequence: Sequence,
}

impl<'a> Empty<'a> {
    pub fn new(gpu: &'a Gpu) -> Result<Self> {
        let pipeline = gpu.pipeline("bench.empty", || {
            let wgsl = "
@group(0) @binding(0) var<storage, read_write> x: array<u32>;
@compute @workgroup_size(64)
fn main(@builtin(local_invocation_index) lid: u32) {
    // Never.
    if (lid == 64u) {
        x[0] = 1u;
    }
}
";
            Ok(KernelSource::new(wgsl.to_owned(), vec![Access::ReadWrite]))
        })?;
        let x = Tensor::zeroed(gpu, Layout::new(1, 4, DType::U32, Alignment::Bytes16)?)?;
        let group = gpu.bind_group(&pipeline, std::slice::from_ref(x.slice()))?;
        let mut sequence = Sequence::new();
        sequence.dispatch(gpu, &pipeline, &group, [1, 1, 1])?;
        Ok(Self { gpu, sequence })
    }

    /// Microseconds of so many.
    pub fn time(&self, dispatches: usize, seconds: f64) -> Result<f64> {
        let each = time(self.gpu, &self.sequence, seconds)?;
        Ok(each * dispatches as f64)
    }
}
