//! `encode`: texts to embeddings, many at once on the device, one from call to vector, a file's worth from end to end.

use std::sync::Arc;
use std::time::Instant;

use energyflow::graph::Graph;
use energyflow::runtime::Host;
use energyflow::text::{
    Dataset, Encoder, EncoderOptions, EncoderPooling, Model, Precision, TextEncoder,
    TextEncoderOptions,
};
use energyflow::train::Weights;
use energyflow::{DType, Executable, Gpu, Session};

use crate::measure::Failure;
use crate::wall::{Row, median_milliseconds};

const LENGTH: usize = 32;
const BATCH: usize = 1024;
const TEXTS: usize = 100_000;

/// D 256, H 512, four blocks, L 32, E 384.
fn sizes() -> EncoderOptions {
    EncoderOptions::default().length(LENGTH).embedding(384)
}

/// The large student of docs/quality.md.
fn large_student() -> EncoderOptions {
    sizes()
        .width(384)
        .hidden(768)
        .kernel(3)
        .dilations(vec![1, 2, 4, 8, 1, 2, 4, 8])
        .centred(true)
        .pooling(EncoderPooling::Attention)
        .expansion(Some(1024))
}

/// With random weights and the bundled tokenizer.
fn encoder(gpu: &Gpu, dtype: DType, options: EncoderOptions) -> Result<TextEncoder, Failure> {
    let mut graph = Graph::new();
    let layers = Encoder::new(&mut graph, &options)?;
    graph.output("bias", layers.projection.weight)?;
    let mut session = Session::new(gpu, 0);
    session.compile(&graph)?;
    let json = std::fs::read(data("tokenizer.json"))?;
    let model = Model::new(Weights::from_session(&session)?)
        .encoder(Some(options))
        .tokenizer(Some(json));
    let options = TextEncoderOptions::default().precision(match dtype {
        DType::F16 => Precision::Mixed,
        _ => Precision::F32,
    });
    Ok(TextEncoder::new(gpu, &model, &options)?)
}

fn data(name: &str) -> String {
    format!("{}/data/{name}", env!("CARGO_MANIFEST_DIR"))
}

pub fn run(gpu: &Gpu, dtype: DType, seconds: f64) -> Result<Vec<Row>, Failure> {
    let encoder = encoder(gpu, dtype, sizes())?;
    let dataset = Dataset::open(data("wordnet_val.safetensors"))?;
    let texts: Vec<String> = dataset
        .iter()
        .map(|sample| Ok(sample?.text().unwrap_or_default().to_owned()))
        .collect::<Result<_, Failure>>()?;
    let mut rows = Vec::new();

    // One text, of a length of its own bucket.
    let one = [texts[0].as_str()];
    let tokens = encoder.tokenizer().encode(one[0])?.len();
    let executable = encoder.compiled(tokens, 1)?;
    let dispatches = executable.plan().dispatches;
    let whole = median_milliseconds(seconds, || {
        encoder.encode(&one)?;
        Ok(())
    })?;
    let empty = floor(gpu, dispatches)?;
    let inputs = vec![1.0_f32; LENGTH];
    let least = median_milliseconds(seconds, || {
        empty.run(&[("x", Host::from(&inputs))])?.wait()?.get("y")?;
        Ok(())
    })?;
    let what = format!("one text of {tokens} tokens, call to vector, {dispatches} dispatches");
    rows.push(Row::new(what, whole, "ms").floor(least));
    let tokenise = median_milliseconds(seconds / 4.0, || {
        encoder.tokenizer().tokenize(one[0])?;
        Ok(())
    })?;
    rows.push(Row::new("of it tokenised in", tokenise, "ms"));
    let device = device_milliseconds(gpu, &executable, seconds / 4.0)?;
    rows.push(Row::new("of it on the device", device, "ms"));

    // Many, on the device.
    let large = gpu.capabilities().device_type != energyflow::wgpu::DeviceType::Cpu;
    let batch = if large { BATCH } else { 64 };
    let executable = encoder.compiled(LENGTH, batch)?;
    encoder.encode_ids(&vec![vec![1; LENGTH]; batch])?;
    let device = device_milliseconds(gpu, &executable, seconds)?;
    let what = format!("batch of {batch} x {LENGTH} tokens on the device");
    rows.push(Row::new(what.clone(), device, "ms"));
    rows.push(Row::new(what, 1e3 * batch as f64 / device, "texts/s"));

    // From texts in memory to embeddings in memory.
    let n = if large { TEXTS } else { 2_000 };
    let many: Vec<&str> = texts.iter().map(String::as_str).cycle().take(n).collect();
    encoder.warm_up(n)?;
    let best = |call: &dyn Fn() -> Result<(), Failure>| -> Result<f64, Failure> {
        let mut best = f64::INFINITY;
        for _ in 0..3 {
            let start = Instant::now();
            call()?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        Ok(best)
    };
    let whole = best(&|| encoder.encode(&many).map(drop).map_err(Into::into))?;
    rows.push(Row::new(
        format!("{n} texts, end to end, best of 3"),
        whole,
        "s",
    ));
    let ids: Vec<Vec<u32>> = many
        .iter()
        .map(|text| encoder.tokenizer().encode(text))
        .collect::<Result<_, _>>()?;
    let embedded = best(&|| encoder.encode_ids(&ids).map(drop).map_err(Into::into))?;
    rows.push(Row::new("the same from token ids", embedded, "s"));
    if large {
        rows.extend(student(gpu, dtype, &ids, seconds)?);
    }
    Ok(rows)
}

/// The large student: the rate on the device, where each text of `ids` is in a full batch of its length, and from end to end.
fn student(gpu: &Gpu, dtype: DType, ids: &[Vec<u32>], seconds: f64) -> Result<Vec<Row>, Failure> {
    let encoder = encoder(gpu, dtype, large_student())?;
    let mut spent = 0.0;
    let mut shorter = 0;
    for length in [8, 16, LENGTH] {
        let texts = ids
            .iter()
            .filter(|ids| (shorter + 1..=length).contains(&ids.len().min(LENGTH)));
        let executable = encoder.compiled(length, BATCH)?;
        encoder.encode_ids(&vec![vec![1; length]; BATCH])?;
        let device = device_milliseconds(gpu, &executable, seconds / 4.0)?;
        spent += device * 1e-3 * texts.count() as f64 / BATCH as f64;
        shorter = length;
    }
    let device = ids.len() as f64 / spent;
    encoder.encode_ids(ids)?;
    let start = Instant::now();
    encoder.encode_ids(ids)?;
    let whole = ids.len() as f64 / start.elapsed().as_secs_f64();
    Ok(vec![
        Row::new("large student, on the device", device, "texts/s"),
        Row::new(
            "large student, from token ids to embeddings",
            whole,
            "texts/s",
        ),
    ])
}

/// As many dispatches as dependent ones can be short: each adds up one number, which is the result of the one before. They are submitted and
/// read back as the encoder's are.
fn floor(gpu: &Gpu, dispatches: usize) -> Result<Arc<Executable>, Failure> {
    let mut graph = Graph::new();
    let x = graph.input("x", &[LENGTH], DType::F32)?;
    let mut y = x;
    for _ in 0..dispatches {
        y = graph.sum_cols(y)?;
    }
    graph.output("y", y)?;
    let executable = Session::new(gpu, 0).compile(&graph)?;
    match executable.plan().dispatches == dispatches {
        true => Ok(executable),
        false => Err(format!(
            "the floor has {} dispatches instead of {dispatches}",
            executable.plan().dispatches
        )
        .into()),
    }
}

/// Median time of a run, of passes of many runs.
fn device_milliseconds(gpu: &Gpu, executable: &Executable, seconds: f64) -> Result<f64, Failure> {
    let sequence = executable.sequence();
    let (once, _) = gpu.time_on_any_clock(&[&sequence])?;
    let repeats = (2e6 / once).clamp(1.0, 50.0) as usize;
    let pass = vec![&sequence; repeats];
    let begin = Instant::now();
    let mut times = Vec::new();
    while times.len() < 5 || begin.elapsed().as_secs_f64() < seconds {
        times.push(gpu.time_on_any_clock(&pass)?.0 / repeats as f64 * 1e-6);
    }
    // The first half warms up.
    let mut late = times.split_off(times.len() / 2);
    late.sort_by(f64::total_cmp);
    Ok(late[late.len() / 2])
}
