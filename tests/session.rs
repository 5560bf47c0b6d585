//! Parameters and states between graphs, caches, inputs of a run, memory plan, threads.

mod common;

use common::{baseline_gpu, gpu, tiled_gpu};
use energyflow::graph::{Graph, Init, Op};
use energyflow::runtime::Host;
use energyflow::types::{DType, Rates, Trans, UnaryOp};
use energyflow::{Error, Executable, Gpu, GpuOptions, Session, wgpu};
use half::f16;

fn is_data(error: &Error, name: &str, part: &str) -> bool {
    matches!(error, Error::Data { name: n, reason } if n == name && reason.contains(part))
}

/// y = w·x + 1 elementwise, w a parameter [2, 3].
fn scale(init: Init) -> Graph {
    let mut graph = Graph::new();
    let x = graph.input("x", &[2, 3], DType::F32).unwrap();
    let w = graph.parameter("w", &[2, 3], init).unwrap();
    let y = graph.mul(x, w).unwrap();
    let y = graph.affine(y, 1.0, 1.0).unwrap();
    graph.output("y", y).unwrap();
    graph
}

/// w ← w − 0.1 where the gradient is positive (one AdamW step of fresh moments).
fn descend() -> Graph {
    let mut graph = Graph::new();
    let gradient = graph.input("gradient", &[2, 3], DType::F32).unwrap();
    let hyper = graph.input("hyper", &[3], DType::F32).unwrap();
    let w = graph.parameter("w", &[2, 3], Init::Constant(0.0)).unwrap();
    let op = Op::AdamW {
        rates: vec![Rates::decay(0.0); 1],
        params: vec![w],
        beta1: 0.5,
        beta2: 0.5,
        eps: 1e-8,
    };
    graph.apply(op, &[gradient, hyper]).unwrap();
    graph
}

fn run(executable: &Executable, x: &[f32]) -> Vec<f32> {
    let outputs = executable.run(&[("x", Host::from(x))]).unwrap();
    outputs.wait().unwrap().get("y").unwrap()
}

#[test]
fn graphs_of_a_session_share_parameters() {
    let mut session = Session::new(&gpu(), 0);
    let forward = session.compile(&scale(Init::Constant(2.0))).unwrap();
    let ones = [1.0; 6];
    assert_eq!(run(&forward, &ones), [3.0; 6]);
    // The parameter exists already: another start value does not touch it.
    let step = session.compile(&descend()).unwrap();
    assert_eq!(run(&forward, &ones), [3.0; 6]);
    let hyper = [0.1, 1.0, 1.0];
    let inputs = [
        ("gradient", Host::from(&ones[..])),
        ("hyper", Host::from(&hyper[..])),
    ];
    assert!(step.run(&inputs).unwrap().wait().unwrap().get("y").is_err());
    for y in run(&forward, &ones) {
        assert!((y - 2.9).abs() < 1e-6, "{y}");
    }
    session.set("w", &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]).unwrap();
    assert_eq!(run(&forward, &ones), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
}

/// Parameters, moments, accumulated gradients and states have the same bits as without any timing, then and later.
#[test]
fn timing_changes_nothing() {
    let gpu = gpu();
    if !gpu.capabilities().timestamps {
        return;
    }
    // Adds to the accumulated gradient and counts.
    let mut adding = Graph::new();
    let w = adding.parameter("w", &[2, 3], Init::Constant(0.0)).unwrap();
    let gradient = adding.input("gradient", &[2, 3], DType::F32).unwrap();
    let one = adding.constant(&[1], 1.0).unwrap();
    let op = Op::Accumulate { params: vec![w] };
    adding.apply(op, &[gradient, one]).unwrap();
    let count = adding.state("count", &[1], 0.0).unwrap();
    let next = adding.affine(count, 1.0, 1.0).unwrap();
    adding.assign(count, next).unwrap();
    // Takes the sum.
    let mut taking = Graph::new();
    let w = taking.parameter("w", &[2, 3], Init::Constant(0.0)).unwrap();
    let op = Op::TakeAccumulated { params: vec![w] };
    let taken = taking.apply(op, &[]).unwrap()[0];
    let copy = taking.affine(taken, 1.0, 0.0).unwrap();
    taking.output("taken", copy).unwrap();

    let after = |timed: bool| {
        let mut session = Session::new(&gpu, 0);
        let step = session.compile(&descend()).unwrap();
        let adding = session.compile(&adding).unwrap();
        let taking = session.compile(&taking).unwrap();
        let measure = |executable: &Executable| {
            if timed {
                let nanoseconds = executable.time().unwrap();
                assert!((1.0..1e10).contains(&nanoseconds), "{nanoseconds}");
                assert!(!executable.profile().unwrap().dispatches.is_empty());
            }
        };
        let hyper = [0.1, 1.0, 1.0];
        let mut seen = Vec::new();
        for round in 1..=2 * Executable::IN_FLIGHT {
            let gradient = [round as f32, -1.0, 2.0, 3.0, 0.5, 0.25];
            let gradient = ("gradient", Host::from(&gradient[..]));
            let inputs = [gradient, ("hyper", Host::from(&hyper[..]))];
            drop(step.run(&inputs).unwrap());
            measure(&step);
            drop(adding.run(&[gradient]).unwrap());
            measure(&adding);
            measure(&taking);
            seen.extend(session.get("w").unwrap());
            seen.extend(session.get("count").unwrap());
            seen.extend(session.moments("w").unwrap().unwrap().concat());
            if round % 2 == 0 {
                let taken = taking.run(&[]).unwrap().wait().unwrap();
                seen.extend(taken.get("taken").unwrap());
                measure(&taking);
            }
        }
        seen.iter().map(|x| x.to_bits()).collect::<Vec<u32>>()
    };
    assert_eq!(after(true), after(false));
}

/// Steps that are timed with others read the inputs of the last run, whichever of the buffers that runs take in turn holds them.
#[test]
fn steps_repeat_the_last_of_several_runs() {
    let gpu = gpu();
    if !gpu.capabilities().timestamps {
        return;
    }
    let hyper = [0.1, 1.0, 1.0];
    for runs in 1..=2 * Executable::IN_FLIGHT {
        let after = |timed: bool| {
            let mut session = Session::new(&gpu, 0);
            let step = session.compile(&descend()).unwrap();
            let run = |number: usize| {
                let gradient = [if number + 1 == runs { -3.0 } else { 1.0 }; 6];
                let inputs = [
                    ("gradient", Host::from(&gradient[..])),
                    ("hyper", Host::from(&hyper[..])),
                ];
                drop(step.run(&inputs).unwrap());
            };
            (0..runs).for_each(run);
            match timed {
                true => assert!(gpu.time(&[&step.sequence()]).unwrap() >= 0.0),
                false => run(runs - 1),
            }
            session.get("w").unwrap()
        };
        assert_eq!(after(true), after(false), "{runs}");
    }
}

/// Inputs are copied, or read where the host writes them; one of the results is an input itself.
#[test]
fn runs_under_way_keep_their_inputs() {
    for gpu in [gpu(), tiled_gpu(), baseline_gpu()] {
        let mut graph = Graph::new();
        let x = graph.input("x", &[3, 5], DType::F32).unwrap();
        let k = graph.input("k", &[1], DType::F32).unwrap();
        let before = graph.state("before", &[3, 5], 0.0).unwrap();
        let y = graph.mul_scalar(x, k).unwrap();
        let sum = graph.add(y, before).unwrap();
        let copy = graph.affine(x, 1.0, 0.0).unwrap();
        graph.assign(before, copy).unwrap();
        graph.output("sum", sum).unwrap();
        graph.output("x", x).unwrap();
        let mut session = Session::new(&gpu, 0);
        let executable = session.compile(&graph).unwrap();
        assert_eq!(
            executable.plan().inputs_in_place,
            gpu.capabilities().mappable_storage
        );
        let x_of = |i: usize| -> Vec<f32> { (0..15).map(|j| (100 * i + j) as f32).collect() };
        let mut pending = Vec::new();
        for i in 1..=8 {
            let (x, k) = (x_of(i), [i as f32]);
            let refused = [("x", Host::from(&x)), ("k", Host::from(&x))];
            assert!(executable.run(&refused).is_err());
            let inputs = [("x", Host::from(&x)), ("k", Host::from(&k[..]))];
            pending.push(executable.run(&inputs).unwrap());
        }
        for (i, pending) in (1..).zip(pending) {
            let outputs = pending.wait().unwrap();
            assert_eq!(outputs.get("x").unwrap(), x_of(i));
            let before = if i == 1 { vec![0.0; 15] } else { x_of(i - 1) };
            let expected: Vec<f32> = x_of(i)
                .iter()
                .zip(&before)
                .map(|(x, before)| x * i as f32 + before)
                .collect();
            assert_eq!(outputs.get("sum").unwrap(), expected);
        }
        assert_eq!(session.get("before").unwrap(), x_of(8));
    }
}

/// A device of the caller with so small limits that no buffer holds both inputs: each has its own.
#[test]
fn inputs_that_do_not_fit_into_one_buffer() {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let (device, queue) = pollster::block_on(async {
        let adapter = instance.request_adapter(&Default::default()).await.unwrap();
        let most = adapter.features() & wgpu::Features::MAPPABLE_PRIMARY_BUFFERS;
        let descriptor = wgpu::DeviceDescriptor {
            required_features: most,
            required_limits: wgpu::Limits {
                max_storage_buffer_binding_size: 4096,
                ..Default::default()
            },
            ..Default::default()
        };
        adapter.request_device(&descriptor).await.unwrap()
    });
    let gpu = Gpu::from_device(device, queue, &GpuOptions::from_env().unwrap()).unwrap();
    // The second graph's inputs fit, to the byte.
    for (rows, fits) in [(33, false), (32, true)] {
        let mut graph = Graph::new();
        let [x, y] = ["x", "y"].map(|name| graph.input(name, &[rows, 16], DType::F32).unwrap());
        let sum = graph.add(x, y).unwrap();
        graph.output("sum", sum).unwrap();
        let mut session = Session::new(&gpu, 0);
        let executable = session.compile(&graph).unwrap();
        let plan = executable.plan();
        let in_place = fits && gpu.capabilities().mappable_storage;
        assert_eq!(plan.inputs_in_place, in_place);
        let copies = if in_place { Executable::IN_FLIGHT } else { 1 };
        assert_eq!(plan.inputs, (copies * 2 * rows * 64) as u64);
        for i in 0..5 {
            let (x, y) = (vec![i as f32; rows * 16], vec![0.5; rows * 16]);
            let inputs = [("x", Host::from(&x)), ("y", Host::from(&y))];
            let outputs = executable.run(&inputs).unwrap().wait().unwrap();
            assert_eq!(outputs.get("sum").unwrap(), vec![i as f32 + 0.5; rows * 16]);
        }
    }
}

#[test]
fn a_name_has_one_shape_in_a_session() {
    let mut session = Session::new(&gpu(), 0);
    session.compile(&scale(Init::Constant(2.0))).unwrap();
    let mut other = Graph::new();
    let w = other.parameter("w", &[3, 2], Init::Constant(0.0)).unwrap();
    other.output("w", w).unwrap();
    let error = session.compile(&other).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::Graph(_)), "{text}");
    assert!(
        text.contains("\"w\"") && text.contains("[3, 2]") && text.contains("[2, 3]"),
        "{text}"
    );

    for (dims, fits) in [([2, 3], true), ([2, 4], false)] {
        let mut graph = Graph::new();
        let s = graph.state("s", &dims, 0.0).unwrap();
        graph.output("s", s).unwrap();
        assert_eq!(session.compile(&graph).is_ok(), fits);
    }
}

/// The same matrix, once with taps and once without: different things under one name.
#[test]
fn a_convolution_weight_is_no_plain_parameter() {
    let mut plain = Graph::new();
    let w = plain.parameter("w", &[2, 6], Init::Constant(0.0)).unwrap();
    plain.output("w", w).unwrap();
    let mut taps = Graph::new();
    let w = taps
        .conv_parameter("w", [2, 3, 2], Init::Constant(0.0))
        .unwrap();
    taps.output("w", w).unwrap();
    let mut session = Session::new(&gpu(), 0);
    session.compile(&plain).unwrap();
    assert!(matches!(session.compile(&taps), Err(Error::Graph(_))));
}

#[test]
fn convolution_weights_are_exchanged_in_host_order() {
    let [out, channels, kernel] = [3, 5, 4];
    let mut graph = Graph::new();
    let w = graph
        .conv_parameter("w", [out, channels, kernel], Init::Uniform(1.0))
        .unwrap();
    graph.output("stored", w).unwrap();
    let mut session = Session::new(&gpu(), 0);
    let executable = session.compile(&graph).unwrap();
    let host: Vec<f32> = (0..out * channels * kernel).map(|i| i as f32).collect();
    session.set("w", &host).unwrap();
    assert_eq!(session.get("w").unwrap(), host);
    let shapes: Vec<_> = session.parameters().collect();
    assert_eq!(shapes, [("w", vec![out, channels, kernel])]);
    let stored = executable.run(&[]).unwrap().wait().unwrap();
    let stored = stored.get("stored").unwrap();
    for o in 0..out {
        for c in 0..channels {
            for j in 0..kernel {
                let at_host = (o * channels + c) * kernel + j;
                let at_store = (o * kernel + j) * channels + c;
                assert_eq!(stored[at_store], host[at_host]);
            }
        }
    }
}

#[test]
fn parameters_and_states_can_be_read_and_replaced() {
    let mut graph = Graph::new();
    let p = graph.parameter("p", &[3, 33], Init::Constant(0.5)).unwrap();
    let s = graph.state("s", &[7], -1.0).unwrap();
    graph.output("p", p).unwrap();
    graph.output("s", s).unwrap();
    let mut session = Session::new(&gpu(), 0);
    let executable = session.compile(&graph).unwrap();
    assert_eq!(session.get("p").unwrap(), [0.5; 99]);
    assert_eq!(session.get("s").unwrap(), [-1.0; 7]);
    let new: Vec<f32> = (0..99).map(|i| i as f32).collect();
    session.set("p", &new).unwrap();
    session.set("s", &new[..7]).unwrap();
    assert_eq!(session.get("p").unwrap(), new);
    let outputs = executable.run(&[]).unwrap().wait().unwrap();
    assert_eq!(outputs.get("p").unwrap(), new);
    assert_eq!(outputs.get("s").unwrap(), new[..7]);
    assert!(outputs.padding_is_zero("p").unwrap());
    assert!(outputs.padding_is_zero("s").unwrap());

    let error = session.set("p", &new[1..]).unwrap_err();
    assert!(is_data(&error, "p", "needs 99"), "{error}");
    for bad in [f32::NAN, f32::INFINITY] {
        let error = session.set("s", &[0.0, 0.0, bad, 0.0, 0.0, 0.0, 0.0]);
        let error = error.unwrap_err();
        assert!(is_data(&error, "s", "element 2"), "{error}");
    }
    for error in [
        session.set("q", &new).unwrap_err(),
        session.get("q").unwrap_err(),
    ] {
        assert!(is_data(&error, "q", "no parameter or state"), "{error}");
    }
    assert_eq!(session.get("p").unwrap(), new);
}

#[test]
fn seeds_decide_and_order_does_not() {
    let start = |seed: u64, names: &[&str]| {
        let mut graph = Graph::new();
        for name in names {
            let init = Init::Uniform(0.25);
            let p = graph.parameter(name, &[5, 7], init).unwrap();
            graph.output(name, p).unwrap();
        }
        let mut session = Session::new(&gpu(), seed);
        session.compile(&graph).unwrap();
        session
    };
    let first = start(3, &["a", "b"]);
    let second = start(3, &["b", "other", "a"]);
    let third = start(4, &["a", "b"]);
    for name in ["a", "b"] {
        let data = first.get(name).unwrap();
        assert_eq!(data, second.get(name).unwrap());
        assert_ne!(data, third.get(name).unwrap());
        assert!(data.iter().all(|x| x.abs() <= 0.25));
        let spread = data.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        assert!(spread > 0.2, "{spread}");
    }
    assert_ne!(first.get("a").unwrap(), first.get("b").unwrap());
}

#[test]
fn equal_graphs_are_compiled_once() {
    // A device of its own: its counts are nobody else's.
    let gpu = Gpu::new(&GpuOptions::from_env().unwrap()).unwrap();
    let mut session = Session::new(&gpu, 0);
    let first = session.compile(&scale(Init::Constant(2.0))).unwrap();
    let kernels = gpu.report().pipelines;
    assert_eq!((kernels.hits, kernels.misses), (0, 1));
    let second = session.compile(&scale(Init::Constant(2.0))).unwrap();
    assert!(std::sync::Arc::ptr_eq(&first, &second));
    let stats = session.stats();
    assert_eq!((stats.hits, stats.misses), (1, 1));
    let third = session.compile(&scale(Init::Constant(3.0))).unwrap();
    assert!(!std::sync::Arc::ptr_eq(&first, &third));
    let stats = session.stats();
    assert_eq!((stats.hits, stats.misses), (1, 2));
    // Another session, the same kernel.
    let mut other = Session::new(&gpu, 0);
    other.compile(&scale(Init::Constant(2.0))).unwrap();
    let kernels = gpu.report().pipelines;
    assert_eq!((kernels.hits, kernels.misses), (2, 1));
}

#[test]
fn inputs_are_checked_by_name_type_and_number() {
    let mut graph = Graph::new();
    let x = graph.input("x", &[2, 3], DType::F16).unwrap();
    let w = graph.input("w", &[2, 3], DType::F32).unwrap();
    let ids = graph.index_input("ids", 4, 2).unwrap();
    let rows = graph.gather(w, ids, None).unwrap();
    let y = graph.sum_all(rows).unwrap();
    let x = graph.cast(x, DType::F32).unwrap();
    let z = graph.add(w, x).unwrap();
    graph.output("y", y).unwrap();
    graph.output("z", z).unwrap();
    let mut session = Session::new(&gpu(), 0);
    let executable = session.compile(&graph).unwrap();
    let floats = [1.0f32; 6];
    let halves = [f16::ONE; 6];
    let indices = [0, 1, 1, 0u32];
    let (x, w, ids) = (
        ("x", Host::from(&floats[..])),
        ("w", Host::from(&floats[..])),
        ("ids", Host::from(&indices[..])),
    );
    let good = executable.run(&[ids, w, ("x", Host::from(&halves[..]))]);
    let good = good.unwrap().wait().unwrap();
    assert_eq!(good.get("z").unwrap(), [2.0; 6]);
    assert_eq!(good.scalar("y").unwrap(), 12.0);
    for (inputs, name, part) in [
        (vec![x, w], "ids", "input \"ids\" is not given"),
        (vec![x, w, ids, w], "w", "is given 2 times"),
        (
            vec![x, w, ids, ("v", w.1)],
            "v",
            "unknown input \"v\"; inputs are: x [2, 3] f16, w [2, 3] f32, ids [4] u32",
        ),
        (
            vec![x, ("w", Host::from(&floats[1..])), ids],
            "w",
            "needs 6",
        ),
        (vec![x, ("w", ids.1), ids], "w", "needs 6 f32, got 4 u32"),
        (vec![x, ("w", Host::from(&halves[..])), ids], "w", "f32"),
        (
            vec![x, w, ("ids", Host::from(&floats[..4]))],
            "ids",
            "input \"ids\" [4]: needs 4 u32, got 4 f32",
        ),
        (
            vec![x, w, ("ids", Host::from(&[0, 1, 2, 0u32][..]))],
            "ids",
            "element 2 is 2",
        ),
    ] {
        let error = executable.run(&inputs).unwrap_err();
        assert!(is_data(&error, name, part), "{error}");
    }
    let error = good.get("nothing").unwrap_err();
    assert!(is_data(&error, "nothing", "no such output"), "{error}");
}

#[test]
fn what_comes_back_may_be_an_input_but_not_a_constant() {
    let mut graph = Graph::new();
    let x = graph.input("x", &[3, 5], DType::F16).unwrap();
    let flat = graph.reshape(x, &[1, 3, 5]).unwrap();
    graph.output("x", x).unwrap();
    graph.output("y", flat).unwrap();
    let mut session = Session::new(&gpu(), 0);
    let executable = session.compile(&graph).unwrap();
    assert_eq!(executable.plan().dispatches, 0);
    let data: Vec<f32> = (0..15).map(|i| i as f32).collect();
    assert_eq!(run(&executable, &data), data);
    let constant = graph.constant(&[1], 1.0).unwrap();
    graph.output("constant", constant).unwrap();
    let error = session.compile(&graph).unwrap_err();
    assert!(error.to_string().contains("is a constant"), "{error}");
}

/// Ten products, one after the other: two buffers are enough.
#[test]
fn memory_is_shared_in_turn() {
    for gpu in [gpu(), tiled_gpu()] {
        let mut graph = Graph::new();
        let x = graph.input("x", &[16, 16], DType::F32).unwrap();
        let mut y = x;
        for _ in 0..10 {
            y = graph.matmul(y, x, Trans::NN).unwrap();
            y = graph.unary(UnaryOp::Tanh, y).unwrap();
        }
        graph.output("y", y).unwrap();
        let executable = Session::new(&gpu, 0).compile(&graph).unwrap();
        let plan = executable.plan();
        assert_eq!((plan.dispatches, plan.values), (10, 10));
        assert_eq!(plan.slots, [1024, 1024]);
        assert_eq!(plan.lower_bound, 2048);
        let copies = if plan.inputs_in_place {
            Executable::IN_FLIGHT
        } else {
            1
        };
        assert_eq!(plan.inputs, 1024 * copies as u64);
        let text = executable.to_string();
        assert!(text.starts_with("10 dispatches; 10 intermediate values in 2 buffers"));
        assert_eq!(text.lines().count(), 11);
    }
}

#[test]
fn a_plan_is_never_below_its_bound() {
    let mut graph = Graph::new();
    let x = graph.input("x", &[24, 40], DType::F16).unwrap();
    let w = graph.parameter("w", &[33, 40], Init::Uniform(0.1)).unwrap();
    let gamma = graph
        .parameter("gamma", &[33], Init::Constant(1.0))
        .unwrap();
    let half = graph.cast(w, DType::F16).unwrap();
    let h = graph.matmul(x, half, Trans::NT).unwrap();
    let y = graph.layer_norm(h, gamma, gamma, 1e-5).unwrap();
    let y = graph.add(y, h).unwrap();
    let square = graph.unary(UnaryOp::Square, y).unwrap();
    let loss = graph.sum_all(square).unwrap();
    let gradients = graph.gradients(loss, &[w, gamma]).unwrap();
    graph.output("loss", loss).unwrap();
    for (name, gradient) in ["dw", "dgamma"].into_iter().zip(gradients) {
        graph.output(name, gradient).unwrap();
    }
    let executable = Session::new(&gpu(), 0).compile(&graph).unwrap();
    let plan = executable.plan();
    assert!(plan.intermediates() >= plan.lower_bound, "{plan}");
    assert!(plan.slots.len() < plan.values, "{plan}");
    assert_eq!(executable.sources().len(), plan.dispatches);
}

#[test]
fn a_run_without_results_still_runs() {
    let mut graph = Graph::new();
    let count = graph.state("count", &[1], 0.0).unwrap();
    let next = graph.affine(count, 1.0, 1.0).unwrap();
    graph.assign(count, next).unwrap();
    let mut session = Session::new(&gpu(), 0);
    let executable = session.compile(&graph).unwrap();
    for _ in 0..100 {
        drop(executable.run(&[]).unwrap());
    }
    assert_eq!(session.get("count").unwrap(), [100.0]);
    let mut pending = executable.run(&[]).unwrap();
    assert!(pending.try_take().unwrap().is_ok());
}

#[test]
fn results_can_be_awaited_polled_and_waited_for_in_any_order() {
    let mut session = Session::new(&gpu(), 0);
    let executable = session.compile(&scale(Init::Constant(2.0))).unwrap();
    let start = |x: f32| executable.run(&[("x", Host::from(&[x; 6][..]))]).unwrap();
    let (first, mut second, third) = (start(1.0), start(2.0), start(3.0));
    let third = third.wait().unwrap();
    assert_eq!(third.get("y").unwrap(), [7.0; 6]);
    let first = pollster::block_on(first).unwrap();
    assert_eq!(first.get("y").unwrap(), [3.0; 6]);
    let second = loop {
        if let Some(outputs) = second.try_take() {
            break outputs.unwrap();
        }
        std::thread::yield_now();
    };
    assert_eq!(second.get("y").unwrap(), [5.0; 6]);
}

#[test]
fn several_threads_run_one_executable() {
    let mut session = Session::new(&gpu(), 0);
    let executable = session.compile(&scale(Init::Constant(2.0))).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let executable = &executable;
            scope.spawn(move || {
                for i in 0..50 {
                    let x = (thread * 1000 + i) as f32;
                    let expected = [2.0 * x + 1.0; 6];
                    assert_eq!(run(executable, &[x; 6]), expected);
                }
            });
        }
        if gpu().capabilities().timestamps {
            scope.spawn(|| (0..50).for_each(|_| assert!(executable.time().unwrap() >= 0.0)));
        }
    });
}

#[test]
fn a_graph_of_a_second_session_has_parameters_of_its_own() {
    let (mut one, mut two) = (Session::new(&gpu(), 0), Session::new(&gpu(), 0));
    let graph = scale(Init::Constant(2.0));
    let (first, second) = (one.compile(&graph).unwrap(), two.compile(&graph).unwrap());
    one.set("w", &[5.0; 6]).unwrap();
    assert_eq!(run(&first, &[1.0; 6]), [6.0; 6]);
    assert_eq!(run(&second, &[1.0; 6]), [3.0; 6]);
}
