//! Times this crate's kernels on the GPU, against what the device can do at best.
//!
//! ```text
//! cargo run --release --example bench -- --list
//! cargo run --release --example bench -- --cases gemm_512,layer_norm --dtype f16
//! cargo run --release --example bench -- --json > results.jsonl
//! cargo run --release --example bench -- --cases decode --dtype f16
//! cargo run --release --example bench -- --profile encoder_train
//! ```
//!
//! A time is that of a whole run, all dispatches and what lies between them, by GPU timestamps around as many runs as make a
//! millisecond, on rotating data. Where there are no timestamps or they do not count, the host's clock takes their place, and the header
//! says so. The bound of a case is the time its operations would take at the device's f32 multiply-add rate
//! (that of its matrix units where the case uses them), or its bytes at the device's copy rate, whichever is longer; the rates are
//! measured first. Operations and bytes are those of the definition (`cases.rs`), however it is computed.
//!
//! `encode`, `index` and `decode` are uses of the library: they run only when they are named. The first two are timed on the host, `decode`
//! both on the device and on the host.

mod cases;
mod decode;
#[cfg(feature = "tokenizer")]
mod encode;
mod index;
mod measure;
mod teacher;
mod wall;
mod workload;

use std::process::ExitCode;

use clap::Parser;
use energyflow::{DType, Gpu, GpuOptions};
use serde::Serialize;

use cases::{CASES, Case};
use energyflow::runtime::{Ceilings, Clock};
use measure::{Failure, Measured};
use wall::Wall;

#[derive(Parser)]
#[command(about = "Times this crate's kernels on the GPU, against what the device can do at best")]
struct Args {
    /// Names of cases, separated by commas.
    #[arg(long, value_delimiter = ',', value_parser = find, default_value = "all")]
    cases: Vec<Selection>,
    /// Storage of activations and weights.
    #[arg(long, value_parser = parse_dtype, default_value = "f32")]
    dtype: DType,
    /// One JSON object a case instead of a table.
    #[arg(long)]
    json: bool,
    /// How long to measure a case; at least 20 runs.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Print the names of all cases.
    #[arg(long)]
    list: bool,
    /// Print the time of every dispatch of this case.
    #[arg(long, value_parser = find)]
    profile: Option<Selection>,
}

/// Uses of the library.
static USES: &[Wall] = &[
    #[cfg(feature = "tokenizer")]
    Wall {
        name: "encode",
        run: encode::run,
    },
    Wall {
        name: "index",
        run: index::run,
    },
];

/// Cases by name; `all` is every graph.
#[derive(Clone)]
enum Selection {
    Graphs(&'static [Case]),
    Use(&'static Wall),
    Decode,
}

impl Selection {
    fn graphs(&self) -> &'static [Case] {
        match self {
            Self::Graphs(cases) => cases,
            Self::Use(_) | Self::Decode => &[],
        }
    }
}

fn find(name: &str) -> Result<Selection, String> {
    match name {
        "all" => return Ok(Selection::Graphs(&CASES)),
        decode::NAME => return Ok(Selection::Decode),
        _ => {}
    }
    let graph = CASES.iter().find(|case| case.name == name);
    let graph = graph.map(|case| Selection::Graphs(std::slice::from_ref(case)));
    let used = || {
        USES.iter()
            .find(|case| case.name == name)
            .map(Selection::Use)
    };
    graph
        .or_else(used)
        .ok_or_else(|| "no such case; --list names them".to_owned())
}

fn parse_dtype(name: &str) -> Result<DType, String> {
    match name {
        "f16" => Ok(DType::F16),
        "f32" => Ok(DType::F32),
        _ => Err("must be f16 or f32".to_owned()),
    }
}

fn main() -> ExitCode {
    let filter = env_logger::Env::default().default_filter_or("energyflow=info,warn");
    env_logger::init_from_env(filter);
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<(), Failure> {
    if args.list {
        let graphs = CASES.iter().map(|case| case.name);
        for name in graphs.chain(USES.iter().map(|case| case.name)) {
            println!("{name}");
        }
        println!("{}", decode::NAME);
        return Ok(());
    }
    let gpu = Gpu::new(&GpuOptions::from_env()?)?;
    if let Some(selected) = &args.profile {
        for case in selected.graphs() {
            print_profile(&gpu, case, args.dtype)?;
        }
        if matches!(selected, Selection::Decode) {
            decode::profile(&gpu, args.dtype)?;
        }
        return Ok(());
    }
    for selected in &args.cases {
        if let Selection::Use(case) = selected {
            let result = (case.run)(&gpu, args.dtype, args.seconds);
            wall::print(&gpu, case, args.dtype, args.json, &result)?;
        }
    }
    let graphs: Vec<&Case> = args.cases.iter().flat_map(Selection::graphs).collect();
    let decodes = args.cases.iter().any(|x| matches!(x, Selection::Decode));
    if graphs.is_empty() && !decodes {
        return Ok(());
    }
    let ceilings = Ceilings::measure(&gpu)?;
    if !args.json {
        print_header(&gpu, &ceilings);
    }
    // What as many dependent dispatches take that do nothing.
    let empty_us = match graphs.is_empty() {
        true => 0.0,
        false => decode::Empty::new(&gpu)?.time(1, args.seconds.min(0.5))?,
    };
    for case in graphs {
        let result = measure::measure(&gpu, case, args.dtype, args.seconds);
        if args.json {
            println!(
                "{}",
                json_line(&gpu, (&ceilings, empty_us), case, args.dtype, &result)?
            );
        } else {
            print_row((&ceilings, empty_us), case, args.dtype, &result);
        }
    }
    if decodes {
        decode::run(&gpu, &ceilings, args.dtype, args.seconds, args.json)?;
    }
    Ok(())
}

/// Milliseconds that a case takes at least.
fn bound(ceilings: &Ceilings, measured: &Measured) -> f64 {
    let flops = match ceilings.matrix_flops {
        Some(flops) if measured.matrix_units => flops,
        _ => ceilings.flops,
    };
    1e3 * (measured.flops / flops).max(measured.bytes / ceilings.bytes)
}

/// The kernels that a case's products use.
fn tier(gpu: &Gpu, measured: &Measured) -> &'static str {
    match (measured.matrix_units, gpu.capabilities().barrier_free) {
        (true, _) => "cooperative",
        (false, false) => "vector, workgroup tiles",
        (false, true) => "vector, barrier-free",
    }
}

fn print_header(gpu: &Gpu, ceilings: &Ceilings) {
    let capabilities = gpu.capabilities();
    println!(
        "{}, {} ({})",
        capabilities.adapter,
        capabilities.kernel_tier(),
        capabilities.f16_storage()
    );
    if ceilings.clock == Clock::Host {
        println!("times by the host's clock: the GPU has no timestamps that count");
    }
    if let Some(flops) = ceilings.matrix_flops {
        println!("matrix units at best {:.2} TFLOP/s", flops * 1e-12);
    }
    println!(
        "at best {:.2} TFLOP/s in f32, {:.1} GB/s; an empty pass takes {:.4} ms",
        ceilings.flops * 1e-12,
        ceilings.bytes * 1e-9,
        ceilings.empty_pass * 1e-6
    );
    println!(
        "{:18} {:5} {:>10} {:>10} {:>10} {:>8} {:>8} {:>10} {:>7} {:>9} {:>10} {:>9}",
        "case",
        "dtype",
        "ms",
        "min",
        "max",
        "TFLOP/s",
        "GB/s",
        "bound ms",
        "bound %",
        "MiB",
        "dispatches",
        "empty ms"
    );
}

fn print_row(
    (ceilings, empty_us): (&Ceilings, f64),
    case: &Case,
    dtype: DType,
    result: &Result<Measured, Failure>,
) {
    let measured = match result {
        Ok(measured) => measured,
        Err(failure) => {
            println!("{:18} {dtype:5} {failure}", case.name);
            return;
        }
    };
    let bound = bound(ceilings, measured);
    let tflops = rate(measured.flops, measured.median, 1e12);
    println!(
        "{:18} {:5} {:10.4} {:10.4} {:10.4} {:>8} {:8.1} {:10.4} {:7.1} {:9.1} {:10} {:9.4}",
        case.name,
        dtype.to_string(),
        measured.median,
        measured.min,
        measured.max,
        tflops.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.2}")),
        measured.bytes / measured.median * 1e-6,
        bound,
        100.0 * bound / measured.median,
        measured.memory,
        measured.dispatches,
        measured.dispatches as f64 * empty_us * 1e-3
    );
}

/// What a case gave, as one line of JSON.
#[derive(Serialize)]
struct Line<'a> {
    peer: &'static str,
    case: &'static str,
    dtype: String,
    ms: f64,
    min_ms: f64,
    max_ms: f64,
    tflops: Option<f64>,
    gbps: Option<f64>,
    bound_ms: f64,
    bound_pct: f64,
    tier: &'static str,
    peak_mem_mib: f64,
    dispatches: usize,
    /// As many dependent dispatches that do nothing.
    empty_ms: f64,
    device: &'a str,
    ceiling_tflops: f64,
    ceiling_matrix_tflops: Option<f64>,
    ceiling_gbps: f64,
    empty_pass_ms: f64,
}

/// Why a case gave nothing.
#[derive(Serialize)]
struct ErrorLine {
    peer: &'static str,
    case: &'static str,
    dtype: String,
    error: String,
}

const PEER: &str = "energyflow";

fn json_line(
    gpu: &Gpu,
    (ceilings, empty_us): (&Ceilings, f64),
    case: &Case,
    dtype: DType,
    result: &Result<Measured, Failure>,
) -> serde_json::Result<String> {
    let measured = match result {
        Ok(measured) => measured,
        Err(failure) => {
            return serde_json::to_string(&ErrorLine {
                peer: PEER,
                case: case.name,
                dtype: dtype.to_string(),
                error: failure.to_string(),
            });
        }
    };
    let capabilities = gpu.capabilities();
    let bound = bound(ceilings, measured);
    let rate = |amount, unit| Some(round(rate(amount, measured.median, unit)?, 4));
    serde_json::to_string(&Line {
        peer: PEER,
        case: case.name,
        dtype: dtype.to_string(),
        ms: round(measured.median, 6),
        min_ms: round(measured.min, 6),
        max_ms: round(measured.max, 6),
        tflops: rate(measured.flops, 1e12),
        gbps: rate(measured.bytes, 1e9),
        bound_ms: round(bound, 6),
        bound_pct: round(100.0 * bound / measured.median, 2),
        tier: tier(gpu, measured),
        peak_mem_mib: round(measured.memory, 1),
        dispatches: measured.dispatches,
        empty_ms: round(measured.dispatches as f64 * empty_us * 1e-3, 6),
        device: &capabilities.adapter,
        ceiling_tflops: round(ceilings.flops * 1e-12, 4),
        ceiling_matrix_tflops: ceilings.matrix_flops.map(|flops| round(flops * 1e-12, 4)),
        ceiling_gbps: round(ceilings.bytes * 1e-9, 4),
        empty_pass_ms: round(ceilings.empty_pass * 1e-6, 6),
    })
}

/// `amount` a second in `unit`s; none where it does not describe the case.
fn rate(amount: f64, milliseconds: f64, unit: f64) -> Option<f64> {
    (amount > 0.0).then(|| amount / (milliseconds * 1e-3) / unit)
}

fn round(number: f64, digits: i32) -> f64 {
    let scale = 10_f64.powi(digits);
    (number * scale).round() / scale
}

fn print_profile(gpu: &Gpu, case: &Case, dtype: DType) -> Result<(), Failure> {
    let parts = measure::profile(gpu, case, dtype)?;
    let total: f64 = parts.iter().map(|part| part.milliseconds).sum();
    println!(
        "{} {dtype}: {} dispatches, {total:.4} ms",
        case.name,
        parts.len()
    );
    for part in &parts {
        println!(
            "{:10.4} ms {:5.1} %  {}",
            part.milliseconds,
            100.0 * part.milliseconds / total,
            part.kernel
        );
    }
    Ok(())
}
