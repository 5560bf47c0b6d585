//! Memory plans of real training steps, at full size: nothing here is compiled or allocated.

mod common;

#[allow(dead_code, reason = "shared with the bench example")]
#[path = "../examples/bench/cases.rs"]
mod cases;
#[allow(dead_code, reason = "shared with the bench example")]
#[path = "../examples/bench/teacher.rs"]
mod teacher;
#[allow(dead_code, reason = "shared with the bench example")]
#[path = "../examples/bench/workload.rs"]
mod workload;

use common::{gpu, tiled_gpu};
use energyflow::graph::{Graph, Init, LinearCrossEntropy};
use energyflow::nn::{Embedding, Linear, Tcn, TcnOptions};
use energyflow::runtime::{Plan, Session};
use energyflow::train::{AdamW, LossScale};
use energyflow::types::DType;
use energyflow::{Gpu, Result};

/// What a plan may need of what is alive at once.
const MOST: f64 = 1.15;

fn check(name: &str, gpu: &Gpu, graph: &Graph) -> Plan {
    let pool = gpu.report().pool;
    let session = Session::new(gpu, 0);
    // Those of a large GPU: some of the values are larger than a software adapter binds.
    let limits = energyflow::wgpu::Limits {
        max_storage_buffer_binding_size: (2 << 30) - 4,
        max_buffer_size: 1 << 40,
        ..gpu.capabilities().limits.clone()
    };
    let plan = session.plan_for(graph, &limits).unwrap();
    let again = session.plan_for(graph, &limits).unwrap();
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
    let dilations: Vec<usize> = (0..blocks).map(|i| 1 << (i % 5)).collect();
    let options = TcnOptions::new(width, 512, &dilations).kernel(5);
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
    let optimizer = AdamW::default()
        .clip(Some(1.0))
        .loss_scale((dtype == DType::F16).then(LossScale::default));
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
                    "encoder_train_recompute",
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
    let options = energyflow::text::EncoderOptions::default()
        .vocabulary(50)
        .length(8)
        .width(32)
        .hidden(64)
        .dilations(vec![1, 2])
        .embedding(24);
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

/// A device of the caller with limits of its own.
fn limited(limits: energyflow::wgpu::Limits) -> Gpu {
    use energyflow::wgpu;
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let (device, queue) = pollster::block_on(async {
        let adapter = instance.request_adapter(&Default::default()).await.unwrap();
        let descriptor = wgpu::DeviceDescriptor {
            required_limits: limits,
            ..Default::default()
        };
        adapter.request_device(&descriptor).await.unwrap()
    });
    Gpu::from_device(device, queue, &energyflow::GpuOptions::default()).unwrap()
}

/// y = w·x and a state that counts, of any size.
fn scaled(parameter: &str, dims: &[usize]) -> Graph {
    let mut graph = Graph::new();
    let x = graph.input("x", dims, DType::F32).unwrap();
    let init = Init::Constant(2.0);
    let w = graph.parameter(parameter, &[dims[1]], init).unwrap();
    let count = graph.state("count", &[1], 0.0).unwrap();
    let next = graph.affine(count, 1.0, 1.0).unwrap();
    graph.assign(count, next).unwrap();
    let y = graph
        .binary(
            energyflow::types::BinaryOp::Mul,
            energyflow::types::Broadcast::Cols,
            x,
            w,
        )
        .unwrap();
    graph.output("y", y).unwrap();
    graph
}

/// Planning and compiling refuse the same for the same reason, and neither leaves anything behind.
fn refused(session: &mut Session, graph: &Graph, limit: &str, names: &[&str]) {
    let gpu = session.gpu().clone();
    let state = |session: &Session| {
        let parameters: Vec<_> = session
            .parameters()
            .map(|(name, _)| name.to_owned())
            .collect();
        (parameters, gpu.report().pool.in_use_bytes)
    };
    let before = state(session);
    let planned = session.plan(graph).unwrap_err();
    let compiled = session.compile(graph).unwrap_err();
    assert_eq!(planned.to_string(), compiled.to_string());
    let text = compiled.to_string();
    assert!(text.contains(limit), "{text}");
    for name in names {
        assert!(text.contains(name), "{text}");
    }
    assert_eq!(state(session), before);
    assert_eq!(gpu.report().uncaptured_errors, 0);
}

#[test]
fn what_the_device_refuses_is_refused_before_anything_is_made() {
    let limits = energyflow::wgpu::Limits {
        max_storage_buffer_binding_size: 1 << 16,
        ..Default::default()
    };
    let gpu = limited(limits);
    let mut session = Session::new(&gpu, 0);
    let binding = "max_storage_buffer_binding_size";
    // An input, a parameter, a result, a state.
    let graph = scaled("w", &[1025, 16]);
    refused(
        &mut session,
        &graph,
        binding,
        &["input \"x\"", "[1025, 16]"],
    );
    let graph = scaled("w", &[1, 1 << 15]);
    refused(
        &mut session,
        &graph,
        binding,
        &["\"w\"", "[32768]", "131072"],
    );
    let mut graph = scaled("w", &[3, 16]);
    let [a, b] = ["a", "b"].map(|name| graph.input(name, &[256, 16], DType::F32).unwrap());
    let y = graph.matmul(a, b, energyflow::types::Trans::NT).unwrap();
    graph.output("product", y).unwrap();
    refused(
        &mut session,
        &graph,
        binding,
        &["\"product\"", "[256, 256]"],
    );
    let mut graph = scaled("w", &[3, 16]);
    graph.state("large", &[1 << 15], 0.0).unwrap();
    refused(&mut session, &graph, binding, &["state \"large\""]);
    // Nothing of it is in the session: the name may have another shape.
    assert!(session.get("w").is_err() && session.get("count").is_err());
    let executable = session.compile(&scaled("w", &[3, 7])).unwrap();
    let x = [1.0; 21];
    let y = executable.run(&[("x", energyflow::runtime::Host::from(&x[..]))]);
    assert_eq!(y.unwrap().wait().unwrap().get("y").unwrap(), [2.0; 21]);
    // Nor does a failure change what is there.
    let mut graph = scaled("other", &[3, 7]);
    graph.input("huge", &[1 << 20], DType::F32).unwrap();
    refused(&mut session, &graph, binding, &["input \"huge\""]);
    assert_eq!(session.get("count").unwrap(), [1.0]);
    assert_eq!(session.get("w").unwrap(), [2.0; 7]);
    assert!(session.get("other").is_err());

    let limits = energyflow::wgpu::Limits {
        max_compute_workgroups_per_dimension: 8,
        ..Default::default()
    };
    let gpu = limited(limits);
    let mut session = Session::new(&gpu, 0);
    let graph = scaled("w", &[1 << 16, 64]);
    let groups = "max_compute_workgroups_per_dimension";
    refused(
        &mut session,
        &graph,
        groups,
        &["output \"y\"", "[65536, 64]"],
    );
    assert_eq!(session.parameters().count(), 0);
}

/// Names that mean something else already, and outputs that are none.
#[test]
fn plans_fail_as_compiling_does() {
    let mut session = Session::new(&gpu(), 0);
    session.compile(&scaled("w", &[3, 7])).unwrap();
    let same = |session: &mut Session, graph: &Graph, part: &str| {
        let planned = session.plan(graph).unwrap_err().to_string();
        assert_eq!(planned, session.compile(graph).unwrap_err().to_string());
        assert!(planned.contains(part), "{planned}");
        assert_eq!(session.parameters().count(), 1);
    };
    same(&mut session, &scaled("w", &[3, 8]), "\"w\" has shape [8]");
    let mut graph = Graph::new();
    let s = graph.state("count", &[2], 0.0).unwrap();
    graph.output("s", s).unwrap();
    same(&mut session, &graph, "\"count\" has shape [2]");
    let mut graph = scaled("new", &[3, 7]);
    let constant = graph.constant(&[1], 1.0).unwrap();
    graph.output("constant", constant).unwrap();
    same(&mut session, &graph, "is a constant");
}

/// Failures of the device come after parameters were made.
#[test]
fn a_lost_device_leaves_the_names_of_a_session() {
    let gpu = Gpu::new(&energyflow::GpuOptions::default()).unwrap();
    let mut session = Session::new(&gpu, 0);
    session.compile(&scaled("w", &[3, 7])).unwrap();
    gpu.device().destroy();
    let error = session.compile(&scaled("v", &[3, 7])).unwrap_err();
    assert!(
        matches!(error, energyflow::Error::DeviceLost { .. }),
        "{error}"
    );
    let names: Vec<_> = session.parameters().collect();
    assert_eq!(names, [("w", vec![7])]);
}

/// A session keeps moments and accumulated gradients for all its parameters, those of other graphs included.
#[test]
fn a_plan_counts_what_other_graphs_left() {
    let gpu = Gpu::new(&energyflow::GpuOptions::default()).unwrap();
    let mut session = Session::new(&gpu, 0);
    session.compile(&scaled("w", &[3, 4000])).unwrap();
    let mut graph = Graph::new();
    let w = graph.parameter("v", &[5000], Init::Constant(1.0)).unwrap();
    let square = graph.unary(energyflow::types::UnaryOp::Square, w).unwrap();
    let loss = graph.sum_all(square).unwrap();
    AdamW::default().step(&mut graph, loss, &[w]).unwrap();
    let plan = session.plan(&graph).unwrap();
    assert!(plan.parameters >= 4 * 9000, "{plan}");
    // Beside the moments, a few bytes per parameter for bias corrections.
    let corrections = plan.moments - 2 * plan.parameters;
    assert!(corrections > 0 && corrections <= 1024, "{plan}");
    let before = gpu.report().pool.in_use_bytes;
    let executable = session.compile(&graph).unwrap();
    assert_eq!(executable.plan().peak(), plan.peak());
    let made = gpu.report().pool.in_use_bytes - before;
    let known = 4 * 4000;
    let expected = (plan.peak() - known) as f64;
    assert!(
        (expected * 0.95..expected * 1.0625 + 8192.0).contains(&(made as f64)),
        "{made} {plan}"
    );
}
