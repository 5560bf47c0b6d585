//! f16 copies of parameters: never out of date, whoever writes the parameters.

mod common;

use std::sync::Arc;

use common::{Case, Tolerance, baseline_gpu, gpu, packed_gpu, tiled_gpu, tolerance};
use energyflow::graph::{Graph, Init, Op, ValueId};
use energyflow::runtime::Host;
use energyflow::types::{DType, Rates, Trans, UnaryOp};
use energyflow::{Executable, Gpu, Session};

/// Name and extents. The last has rows of another stride in f16 than in f32, so that it has no shadow.
const PARAMETERS: [(&str, &[usize]); 6] = [
    ("matrix", &[33, 64]),
    ("narrow", &[7, 31]),
    ("vector", &[37]),
    ("scalar", &[1]),
    ("taps", &[2, 3, 96]),
    ("cast", &[5, 13]),
];
const SHADOWED: usize = PARAMETERS.len() - 1;

fn declare(graph: &mut Graph) -> Vec<ValueId> {
    PARAMETERS
        .iter()
        .map(|(name, dims)| graph.parameter(name, dims, Init::Uniform(2.0)).unwrap())
        .collect()
}

/// Every parameter in f16: as the session keeps it, and rounded in this very run.
fn reader() -> Graph {
    let mut graph = Graph::new();
    for (i, p) in declare(&mut graph).into_iter().enumerate() {
        let kept = graph.cast(p, DType::F16).unwrap();
        graph.output(&format!("kept {i}"), kept).unwrap();
        let copy = graph.affine(p, 1.0, 0.0).unwrap();
        let rounded = graph.cast(copy, DType::F16).unwrap();
        graph.output(&format!("rounded {i}"), rounded).unwrap();
    }
    graph
}

/// One step of AdamW with given gradients; `casts` makes it read the shadows first.
fn step(casts: bool) -> Graph {
    let mut graph = Graph::new();
    let parameters = declare(&mut graph);
    let mut operands = Vec::new();
    for (i, (_, dims)) in PARAMETERS.iter().enumerate() {
        let gradient = graph.input(&format!("g{i}"), dims, DType::F32).unwrap();
        operands.push(gradient);
        if casts {
            let half = graph.cast(parameters[i], DType::F16).unwrap();
            let back = graph.cast(half, DType::F32).unwrap();
            let sum = graph.sum_all(back).unwrap();
            graph.output(&format!("sum {i}"), sum).unwrap();
        }
    }
    operands.push(graph.input("hyper", &[3], DType::F32).unwrap());
    let op = Op::AdamW {
        rates: vec![Rates::decay(0.1); parameters.len()],
        params: parameters,
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-6,
    };
    graph.apply(op, &operands).unwrap();
    graph
}

fn train(executable: &Executable, apply: f32) {
    let gradients: Vec<(String, Vec<f32>)> = PARAMETERS
        .iter()
        .enumerate()
        .map(|(i, (_, dims))| {
            let n: usize = dims.iter().product();
            let data = (0..n).map(|j| ((j * 7 + i) % 11) as f32 - 4.5).collect();
            (format!("g{i}"), data)
        })
        .collect();
    let hyper = [0.03, 1.0, apply];
    let mut inputs: Vec<(&str, Host<'_>)> = vec![("hyper", Host::from(&hyper[..]))];
    inputs.extend(
        gradients
            .iter()
            .map(|(name, data)| (name.as_str(), Host::from(data))),
    );
    drop(executable.run(&inputs).unwrap().wait().unwrap());
}

/// All elements of all parameters in f16, after a look that they are the rounded parameters bit for bit.
fn halves(reader: &Executable) -> Vec<f32> {
    let outputs = reader.run(&[]).unwrap().wait().unwrap();
    let mut all = Vec::new();
    for (i, (name, _)) in PARAMETERS.iter().enumerate() {
        let kept = outputs.get(&format!("kept {i}")).unwrap();
        let rounded = outputs.get(&format!("rounded {i}")).unwrap();
        let same = kept
            .iter()
            .zip(&rounded)
            .all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same, "{name}: {kept:?} {rounded:?}");
        assert!(outputs.padding_is_zero(&format!("kept {i}")).unwrap());
        all.extend(kept);
    }
    all
}

fn gpus() -> [Gpu; 4] {
    [gpu(), tiled_gpu(), packed_gpu(), baseline_gpu()]
}

fn start(gpu: &Gpu) -> (Session, Arc<Executable>) {
    let mut session = Session::new(gpu, 1);
    let reader = session.compile(&reader()).unwrap();
    (session, reader)
}

#[test]
fn a_cast_of_a_parameter_is_no_dispatch() {
    let (_, reader) = start(&gpu());
    // The rounded copies, and the one cast that there is no shadow for.
    assert_eq!(reader.plan().dispatches, PARAMETERS.len() + 1);
    let mut graph = Graph::new();
    for &p in &declare(&mut graph)[..SHADOWED] {
        let half = graph.cast(p, DType::F16).unwrap();
        graph.output(&format!("{p:?}"), half).unwrap();
    }
    let executable = Session::new(&gpu(), 0).compile(&graph).unwrap();
    assert_eq!(executable.plan().dispatches, 0);
    assert_eq!(executable.plan().values, 0);
}

#[test]
fn shadows_follow_the_start_and_what_the_host_sets() {
    for gpu in gpus() {
        let (mut session, reader) = start(&gpu);
        let first = halves(&reader);
        assert!(first.iter().any(|&x| x != 0.0));
        assert_eq!(halves(&reader), first);
        assert_eq!(session.stats().shadow_refreshes, 1, "only the first run");
        for (name, dims) in PARAMETERS {
            let n: usize = dims.iter().product();
            let data: Vec<f32> = (0..n).map(|i| 1.0 / (i as f32 + 3.0)).collect();
            session.set(name, &data).unwrap();
        }
        let second = halves(&reader);
        assert_ne!(first, second);
        assert_eq!(session.stats().shadow_refreshes, 2, "once for all");
    }
}

#[test]
fn a_step_writes_them_too() {
    for gpu in gpus() {
        let (mut session, reader) = start(&gpu);
        let step = session.compile(&step(true)).unwrap();
        let mut last = halves(&reader);
        for _ in 0..3 {
            train(&step, 1.0);
            let next = halves(&reader);
            assert!(last.iter().zip(&next).all(|(a, b)| a != b));
            last = next;
        }
        train(&step, 0.0);
        assert_eq!(halves(&reader), last, "a skipped step changes nothing");
        assert_eq!(session.stats().shadow_refreshes, 1);
    }
}

#[test]
fn a_step_that_does_not_know_them_outdates_them() {
    for knows_first in [false, true] {
        let mut session = Session::new(&gpu(), 1);
        if knows_first {
            session.compile(&reader()).unwrap();
        }
        let plain = session.compile(&step(false)).unwrap();
        let mixed = session.compile(&step(true)).unwrap();
        let reader = session.compile(&reader()).unwrap();
        let mut last = halves(&reader);
        for (i, step) in [&plain, &plain, &mixed, &plain, &mixed].iter().enumerate() {
            train(step, 1.0);
            let next = halves(&reader);
            assert!(last.iter().zip(&next).all(|(a, b)| a != b), "step {i}");
            last = next;
        }
        // The first run, and after each of the three plain steps.
        assert_eq!(session.stats().shadow_refreshes, 4);
        // The refresh of the mixed step itself: the sums that it returns are those of the new parameters.
        train(&plain, 1.0);
        train(&mixed, 0.0);
        assert_eq!(session.stats().shadow_refreshes, 5);
        halves(&reader);
        assert_eq!(session.stats().shadow_refreshes, 5);
    }
}

/// Parameters and their f16 copies keep their bits and stay of one state, whether the copies were current before or not.
#[test]
fn timing_changes_no_shadow() {
    let gpu = gpu();
    if !gpu.capabilities().timestamps {
        return;
    }
    let (mut session, reader) = start(&gpu);
    let plain = session.compile(&step(false)).unwrap();
    let mixed = session.compile(&step(true)).unwrap();
    train(&plain, 1.0);
    train(&mixed, 1.0);
    let last = halves(&reader);
    for step in [&plain, &mixed] {
        step.time().unwrap();
        assert_eq!(halves(&reader), last);
        step.profile().unwrap();
        assert_eq!(halves(&reader), last);
    }
    // Outdated when the timing begins.
    for step in [&plain, &mixed] {
        train(&plain, 1.0);
        step.time().unwrap();
        let next = halves(&reader);
        assert_ne!(next, last);
        step.profile().unwrap();
        assert_eq!(halves(&reader), next);
        train(step, 1.0);
        assert_ne!(halves(&reader), next);
    }
}

/// Whatever the interleaving, a run sees one state of a parameter in both types.
#[test]
fn runs_from_several_threads() {
    let (mut session, reader) = start(&gpu());
    let plain = session.compile(&step(false)).unwrap();
    let mixed = session.compile(&step(true)).unwrap();
    std::thread::scope(|scope| {
        for step in [&plain, &mixed] {
            scope.spawn(|| (0..20).for_each(|_| train(step, 1.0)));
        }
        // Takes the inputs and the shadows as a run does, in the same order, or neither would ever end.
        if gpu().capabilities().timestamps {
            scope.spawn(|| (0..20).for_each(|_| assert!(mixed.time().unwrap() >= 0.0)));
        }
        for _ in 0..20 {
            halves(&reader);
        }
    });
    halves(&reader);
}

/// A block has one shadow; parameters that a later graph brings lie in another block.
#[test]
fn parameters_of_two_blocks() {
    let mut session = Session::new(&gpu(), 1);
    let mut first = Graph::new();
    let p = first
        .parameter("taps", PARAMETERS[4].1, Init::Constant(0.5))
        .unwrap();
    first.output("p", p).unwrap();
    session.compile(&first).unwrap();
    let reader = session.compile(&reader()).unwrap();
    let mixed = session.compile(&step(true)).unwrap();
    let last = halves(&reader);
    assert_eq!(session.stats().shadow_refreshes, 2);
    train(&mixed, 1.0);
    assert_ne!(halves(&reader), last);
    session.set("taps", &[0.25; 576]).unwrap();
    halves(&reader);
    assert_eq!(session.stats().shadow_refreshes, 3);
}

/// Two layers with weights of the same shape, and the same weight in two layers.
#[test]
fn layers_do_not_mix() {
    for dtype in [DType::F32, DType::F16] {
        let mut case = Case::new(1, dtype);
        let x = case.input(&[17, 64]);
        let weights = [case.parameter(&[64, 64]), case.parameter(&[64, 64])];
        let bias = case.parameter(&[64]);
        let mut h = x;
        for w in [weights[0], weights[1], weights[0]] {
            let g = &mut case.graph;
            let w = g.cast(w, dtype).unwrap();
            let b = g.cast(bias, dtype).unwrap();
            h = g.matmul(h, w, Trans::NT).unwrap();
            h = g.affine(h, 0.25, 0.0).unwrap();
            h = g.add_bias(h, b).unwrap();
        }
        case.output("h", h);
        assert_eq!(case.dispatches(), 3);
        // Of three roundings behind each other.
        let Tolerance { relative, .. } = tolerance(dtype);
        case.check(Tolerance {
            normalised: relative,
            relative: 4.0 * relative,
        });
    }
}

/// An f16 step takes no dispatch more than an f32 step.
#[test]
fn dispatches_of_an_f16_step() {
    let dispatches = [DType::F32, DType::F16].map(|dtype| {
        let mut case = Case::new(2, dtype);
        let x = case.input(&[17, 32]);
        let parameters = [
            case.parameter(&[96, 32]),
            case.parameter(&[96]),
            case.parameter(&[32, 96]),
            case.parameter(&[32]),
        ];
        let g = &mut case.graph;
        let p = parameters.map(|p| g.cast(p, dtype).unwrap());
        let h = g.matmul(x, p[0], Trans::NT).unwrap();
        let h = g.add_bias(h, p[1]).unwrap();
        let h = g.unary(UnaryOp::GeluTanh, h).unwrap();
        let y = g.matmul(h, p[2], Trans::NT).unwrap();
        let y = g.add_bias(y, p[3]).unwrap();
        let y = g.cast(y, DType::F32).unwrap();
        let loss = case.random_loss(y);
        let mut operands = case.graph.gradients(loss, &parameters).unwrap();
        operands.push(case.input_of(&[3], DType::F32, vec![0.01, 1.0, 1.0]));
        let op = Op::AdamW {
            rates: vec![Rates::decay(0.0); parameters.len()],
            params: parameters.to_vec(),
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
        };
        case.graph.apply(op, &operands).unwrap();
        case.output("loss", loss);
        case.dispatches()
    });
    assert_eq!(dispatches[0], dispatches[1]);
}

/// The copy that is read behind the update is the one made before it.
#[test]
fn copies_that_outlive_the_update_are_casts() {
    let mut case = Case::new(3, DType::F32);
    let parameters = [case.parameter(&[9, 32]), case.parameter(&[9, 32])];
    let gradient = case.input(&[9, 32]);
    let hyper = case.input_of(&[3], DType::F32, vec![0.1, 1.0, 1.0]);
    let g = &mut case.graph;
    let [late, output] = parameters.map(|p| g.cast(p, DType::F16).unwrap());
    let flat = g.reshape(late, &[1, 9, 32]).unwrap();
    g.output("before the update", output).unwrap();
    let op = Op::AdamW {
        rates: vec![Rates::decay(0.0); parameters.len()],
        params: parameters.to_vec(),
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
    };
    g.apply(op, &[gradient, gradient, hyper]).unwrap();
    let doubled = g.affine(flat, 2.0, 0.0).unwrap();
    g.output("doubled", doubled).unwrap();
    for gpu in gpus() {
        let mut running = case.start(&gpu);
        for _ in 0..3 {
            running.step(&case, tolerance(DType::F16));
        }
        running.compare_variables(&case, tolerance(DType::F16));
    }
}
