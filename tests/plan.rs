//! Memory plans of real training steps, at full size: nothing here is compiled or allocated.

mod common;

#[allow(dead_code, reason = "shared with the bench example")]
#[path = "../examples/bench/cases.rs"]
mod cases;
#[allow(dead_code, reason = "shared with the bench example")]
#[path = "../examples/bench/workload.rs"]
mod workload;

use common::{gpu, tiled_gpu};
use energyflow::graph::{Graph, Init, LinearCrossEntropy};
use energyflow::nn::{Embedding, Gelu, Linear, Tcn, TcnOptions};
use energyflow::runtime::{Plan, Session};
use energyflow::train::{AdamW, LossScale};
use energyflow::types::DType;
use energyflow::{Gpu, Result};

/// What a plan may need of what is alive at once.
const MOST: f64 = 1.15;

fn check(name: &str, gpu: &Gpu, graph: &Graph) -> Plan {
    let pool = gpu.report().pool;
    let session = Session::new(gpu, 0);
    let plan = session.plan(graph).unwrap();
    let again = session.plan(graph).unwrap();
    assert_eq!(plan.slots, again.slots, "the same every time");
    assert_eq!(gpu.report().pool, pool, "nothing is allocated");
    let ratio = plan.intermediates() as f64 / plan.lower_bound as f64;
    println!("{ratio:.4} {name}: {plan}");
    assert!((1.0..=MOST).contains(&ratio), "{name}: {plan}");
    plan
}

/// A decoder whose logits are computed a chunk at a time.
fn chunked_decoder(dtype: DType, blocks: usize) -> Result<Graph> {
    let (batch, length, width, vocabulary) = (32, 128, 256, 30_522);
    let mut graph = Graph::new();
    let init = Init::Uniform(0.5);
    let embedding = Embedding::new(&mut graph, "embedding", vocabulary, width, None, init)?;
    let options = TcnOptions {
        width,
        hidden: 512,
        kernel: 5,
        dilations: (0..blocks).map(|i| 1 << (i % 5)).collect(),
        gelu: Gelu::Tanh,
        eps: 1e-5,
        dropout: 0.0,
    };
    let tcn = Tcn::new(&mut graph, "blocks", &options)?;
    let head = Linear::new(&mut graph, "head", width, vocabulary, true)?;
    let ids = graph.index_input("ids", batch * length, vocabulary as u32)?;
    let targets = graph.index_input("targets", batch * length, vocabulary as u32)?;
    let x = embedding.forward(&mut graph, ids, dtype)?;
    let x = graph.reshape(x, &[batch, length, width])?;
    let x = tcn.forward(&mut graph, x, None)?;
    let weight = graph.cast(head.weight, dtype)?;
    let x = graph.reshape(x, &[batch * length, width])?;
    let ce = graph.linear_cross_entropy(x, weight, head.bias, targets, Some(0), 0.1)?;
    graph.output("loss", ce.loss)?;
    let optimizer = AdamW {
        clip: Some(1.0),
        loss_scale: (dtype == DType::F16).then(LossScale::default),
        ..AdamW::default()
    };
    let parameters: Vec<_> = graph.parameters().map(|(id, _)| id).collect();
    optimizer.step(&mut graph, ce.loss, &parameters)?;
    Ok(graph)
}

#[test]
fn training_steps_need_little_more_than_what_is_alive_at_once() {
    for gpu in [gpu(), tiled_gpu()] {
        for dtype in [DType::F32, DType::F16] {
            for case in &cases::CASES {
                if [
                    "tcn_block_fwdbwd",
                    "encoder_fwd",
                    "encoder_train",
                    "encoder_train_dropout",
                    "encoder_train_checkpoint",
                    "decoder_train",
                    "decoder_train_chunked",
                ]
                .contains(&case.name)
                {
                    let graph = case.workload(dtype).unwrap().graph;
                    check(&format!("{} {dtype}", case.name), &gpu, &graph);
                }
            }
            for blocks in [1, 4, 8] {
                let graph = chunked_decoder(dtype, blocks).unwrap();
                let plan = check(&format!("decoder of {blocks} {dtype}"), &gpu, &graph);
                // The gradient of f32 logits takes their place.
                let chunks = if dtype == DType::F32 { 1 } else { 2 };
                assert!(plan.intermediates() > chunks * LinearCrossEntropy::CHUNK_BYTES);
            }
        }
    }
}

#[test]
fn a_plan_is_what_compiling_allocates() {
    let options = energyflow::text::EncoderOptions {
        vocabulary: 50,
        length: 8,
        width: 32,
        hidden: 64,
        dilations: vec![1, 2],
        embedding: 24,
        ..energyflow::text::EncoderOptions::default()
    };
    for dtype in [DType::F32, DType::F16] {
        let mut graph = Graph::new();
        let encoder = energyflow::text::Encoder::new(&mut graph, &options).unwrap();
        let ids = graph.index_input("ids", 4 * 8, 50).unwrap();
        let mask = graph.input("mask", &[4 * 8], DType::F32).unwrap();
        let target = graph.input("target", &[4, 24], DType::F32).unwrap();
        let z = encoder.forward(&mut graph, ids, mask, dtype).unwrap();
        let loss = graph.kd_loss(z, target, 1.0, 1.0).unwrap().loss;
        let parameters: Vec<_> = graph.parameters().map(|(id, _)| id).collect();
        let optimizer = AdamW::default();
        optimizer.step(&mut graph, loss, &parameters).unwrap();

        // A device of its own: other tests allocate meanwhile.
        let gpu = Gpu::new(&energyflow::GpuOptions::from_env().unwrap()).unwrap();
        let mut session = Session::new(&gpu, 0);
        let plan = session.plan(&graph).unwrap();
        let executable = session.compile(&graph).unwrap();
        assert_eq!(executable.plan().slots, plan.slots);
        assert_eq!(executable.plan().peak(), plan.peak());
        assert_eq!(
            session.plan(&graph).unwrap().peak(),
            plan.peak(),
            "known already"
        );
        // Small buffers are rounded up to 256 bytes, large ones by a sixteenth.
        let used = gpu.report().pool.in_use_bytes;
        assert!(used >= plan.peak(), "{used} {plan}");
        assert!(
            used as f64 <= 1.0625 * plan.peak() as f64 + 8192.0,
            "{used} {plan}"
        );
    }
}
