//! Parameter groups, parameters without a gradient, and what an optimizer refuses.

mod common;

use common::{Case, Tolerance, gpu};
use energyflow::graph::{Graph, Init, Op, ValueId};
use energyflow::nn::{Linear, Tcn, TcnOptions};
use energyflow::runtime::{Executable, Host, Session};
use energyflow::train::{AdamW, LossScale, ParameterGroup, Schedule};
use energyflow::types::{DType, Rates};
use energyflow::{Error, Result};

fn optimizer() -> AdamW {
    AdamW::default()
        .schedule(Schedule::Constant { rate: 0.1 })
        .weight_decay(0.5)
}

/// A used parameter on either side of one that no loss reaches, and one behind a comparison, which has no derivative.
const NAMES: [&str; 4] = ["a", "unused", "compared", "b"];

/// The loss of [`NAMES`]: Σ x·a + Σ x·b + Σ (compared > x).
fn graph(used: &[&str], dtype: DType) -> (Graph, ValueId, Vec<ValueId>) {
    let mut graph = Graph::new();
    let parameters = NAMES.map(|name| graph.parameter(name, &[5], Init::Constant(1.0)).unwrap());
    let x = graph.input("x", &[5], DType::F32).unwrap();
    let x = graph.cast(x, dtype).unwrap();
    let mut loss = graph
        .binary(
            energyflow::types::BinaryOp::Greater,
            energyflow::types::Broadcast::Same,
            parameters[2],
            parameters[0],
        )
        .and_then(|compared| graph.sum_all(compared))
        .unwrap();
    for name in used {
        let parameter = graph.find(name).unwrap();
        let parameter = graph.cast(parameter, dtype).unwrap();
        let product = graph.mul(parameter, x).unwrap();
        let sum = graph.sum_all(product).unwrap();
        loss = graph.add(loss, sum).unwrap();
    }
    (graph, loss, parameters.to_vec())
}

fn run(executable: &Executable) {
    let x = [1.0, -1.0, 0.5, 2.0, 0.25];
    executable
        .run(&[("x", Host::F32(&x))])
        .unwrap()
        .wait()
        .unwrap();
}

/// Value and moments of every parameter.
fn state(session: &Session) -> Vec<(String, Vec<f32>, [Vec<f32>; 2])> {
    let names: Vec<String> = session.parameters().map(|(name, _)| name.into()).collect();
    let state = |name: String| {
        let moments = session.moments(&name).unwrap().unwrap();
        (name.clone(), session.get(&name).unwrap(), moments)
    };
    names.into_iter().map(state).collect()
}

/// Moments that a step without a gradient would shrink.
fn remember(session: &mut Session) {
    for name in NAMES {
        session.set_moments(name, [&[0.5; 5], &[0.25; 5]]).unwrap();
    }
}

fn check_reached(
    before: &Session,
    trained: &[&str],
    expected: Vec<(String, Vec<f32>, [Vec<f32>; 2])>,
) {
    for ((name, p, moments), (_, old, old_moments)) in state(before).into_iter().zip(expected) {
        let same = p == old && moments == old_moments;
        assert_eq!(
            same,
            !trained.contains(&&*name),
            "{name}: {p:?} {moments:?}"
        );
    }
}

#[test]
fn a_parameter_without_a_gradient_keeps_its_bits() {
    for dtype in [DType::F32, DType::F16] {
        let (mut graph, loss, parameters) = graph(&["a", "b"], dtype);
        optimizer().step(&mut graph, loss, &parameters).unwrap();
        let mut session = Session::new(&gpu(), 0);
        let executable = session.compile(&graph).unwrap();
        remember(&mut session);
        let before = state(&session);
        for _ in 0..2 {
            run(&executable);
        }
        check_reached(&session, &["a", "b"], before);
    }
}

#[test]
fn micro_batches_leave_parameters_without_a_gradient_alone() {
    // The second case: what one of two graphs reaches is updated.
    for (used, trained) in [
        (&[&["a"] as &[&str]] as &[&[&str]], &["a"] as &[&str]),
        (&[&["a"], &["b"]], &["a", "b"]),
    ] {
        let mut session = Session::new(&gpu(), 0);
        let graphs: Vec<Graph> = used
            .iter()
            .map(|used| {
                let (mut graph, loss, parameters) = graph(used, DType::F32);
                let weight = graph.constant(&[1], 1.0).unwrap();
                let result = optimizer().accumulate(&mut graph, loss, weight, &parameters, &[loss]);
                result.unwrap();
                graph
            })
            .collect();
        let all: Vec<&Graph> = graphs.iter().collect();
        let update = optimizer().update(&all).unwrap();
        // Also when the update is compiled first.
        let update = session.compile(&update).unwrap();
        let steps: Vec<_> = all
            .iter()
            .map(|graph| session.compile(graph).unwrap())
            .collect();
        remember(&mut session);
        let before = state(&session);
        for _ in 0..2 {
            steps.iter().for_each(|step| run(step));
            update.run(&[]).unwrap().wait().unwrap();
        }
        check_reached(&session, trained, before);
    }
}

/// As in PyTorch: the gradient of a table is zero where no id looked.
#[test]
fn rows_that_no_id_looked_up_decay() {
    let mut graph = Graph::new();
    let table = graph
        .parameter("table", &[3, 2], Init::Constant(1.0))
        .unwrap();
    let ids = graph.index_input("ids", 2, 3).unwrap();
    let rows = graph.gather(table, ids, None).unwrap();
    let loss = graph.sum_all(rows).unwrap();
    optimizer().step(&mut graph, loss, &[table]).unwrap();
    let mut session = Session::new(&gpu(), 0);
    let step = session.compile(&graph).unwrap();
    step.run(&[("ids", Host::U32(&[0, 2]))])
        .unwrap()
        .wait()
        .unwrap();
    let after = session.get("table").unwrap();
    assert_eq!(after[2..4], [0.95; 2]);
    assert!(after[0] < 0.9 && after[4] < 0.9, "{after:?}");
}

/// Weights and biases in turn, as in every network.
fn network() -> (Graph, ValueId, Vec<ValueId>) {
    let mut graph = Graph::new();
    let mut x = graph.input("x", &[2, 6, 8], DType::F32).unwrap();
    let options = TcnOptions::new(8, 12, &[1; 4]).kernel(2);
    x = Tcn::new(&mut graph, "blocks", &options)
        .and_then(|tcn| tcn.forward(&mut graph, x, None))
        .unwrap();
    let head = Linear::new(&mut graph, "head", 8, 3, true).unwrap();
    let y = head.forward(&mut graph, x).unwrap();
    let square = graph.mul(y, y).unwrap();
    let loss = graph.sum_all(square).unwrap();
    let parameters = graph.parameters().map(|(id, _)| id).collect();
    (graph, loss, parameters)
}

#[test]
fn groups_take_no_more_dispatches() {
    let dispatches = |optimizer: AdamW| {
        let (mut graph, loss, parameters) = network();
        optimizer.step(&mut graph, loss, &parameters).unwrap();
        Session::new(&gpu(), 0).plan(&graph).unwrap().dispatches
    };
    let plain = dispatches(optimizer());
    let layers = (0..4).map(|i| {
        let group = ParameterGroup::new(format!("layer {i}"));
        group
            .names([format!("blocks.{i}")])
            .lr_scale(0.5 + i as f32)
    });
    let by_layer = layers.fold(optimizer(), AdamW::group);
    assert_eq!(
        dispatches(optimizer().no_decay_for_biases_and_norms()),
        plain
    );
    assert_eq!(dispatches(by_layer), plain);
}

/// More stretches of equal rates than one dispatch takes; the gradients of some parameters do not lie beside the others.
#[test]
fn many_stretches_of_rates() {
    let bound = Tolerance {
        normalised: 1e-5,
        relative: 1e-4,
    };
    for every in [1, 2] {
        let mut case = Case::new(21, DType::F32);
        let sizes = (0..75).map(|i| 7 + i % 2 * 130);
        let parameters: Vec<ValueId> = sizes.map(|n| case.parameter(&[n])).collect();
        let gradients: Vec<ValueId> = (0..75)
            .map(|i| {
                let gradient = case.input(&[7 + i % 2 * 130]);
                match i % 5 {
                    1 => gradient,
                    _ => case.graph.affine(gradient, 0.5, 0.0).unwrap(),
                }
            })
            .collect();
        let hyper = case.input_of(&[3], DType::F32, vec![0.01, 0.5, 1.0]);
        let rates = |i: usize| Rates {
            lr_scale: [1.0, 0.25, 3.0][i / every % 3],
            weight_decay: [0.1, 0.0][i / every % 2],
        };
        let op = Op::AdamW {
            rates: (0..75).map(rates).collect(),
            params: parameters,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
        };
        let norm = case.graph.global_norm(&gradients).unwrap();
        case.output("norm", norm);
        case.graph
            .apply(op, &[gradients, vec![hyper]].concat())
            .unwrap();
        let mut running = case.start(&gpu());
        for _ in 0..2 {
            running.step(&case, bound);
        }
        running.compare_variables(&case, bound);
    }
    // All gradients beside each other: two dispatches for 75 stretches more than one for 1.
    let dispatches = |alternate: bool| {
        let mut graph = Graph::new();
        let mut total = graph.constant(&[1], 0.0).unwrap();
        let mut group = ParameterGroup::new("every other").lr_scale(0.5);
        for i in 0..75 {
            let name = format!("p{i}");
            let p = graph.parameter(&name, &[4], Init::Constant(1.0)).unwrap();
            let square = graph.mul(p, p).unwrap();
            let sum = graph.sum_all(square).unwrap();
            total = graph.add(total, sum).unwrap();
            if i % 2 == 0 {
                group = group.names([name]);
            }
        }
        let optimizer = match alternate {
            true => optimizer().group(group),
            false => optimizer(),
        };
        let parameters: Vec<ValueId> = graph.parameters().map(|(id, _)| id).collect();
        optimizer.step(&mut graph, total, &parameters).unwrap();
        Session::new(&gpu(), 0).plan(&graph).unwrap().dispatches
    };
    assert_eq!(dispatches(true), dispatches(false) + 2);
}

#[test]
fn a_second_step_says_what_to_do() {
    let (mut graph, loss, parameters) = network();
    let other = graph.affine(loss, 2.0, 0.0).unwrap();
    let weight = graph.constant(&[1], 1.0).unwrap();
    optimizer()
        .step(&mut graph, loss, &parameters[..2])
        .unwrap();
    let before = graph.clone();
    for result in [
        optimizer().step(&mut graph, other, &parameters[2..]),
        optimizer().accumulate(&mut graph, other, weight, &parameters[2..], &[]),
    ] {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("groups into one step"), "{error}");
    }
    assert_eq!(graph, before, "a refused step leaves the graph as it was");

    let (mut graph, loss, parameters) = network();
    let weight = graph.constant(&[1], 1.0).unwrap();
    let mut accumulate = || optimizer().accumulate(&mut graph, loss, weight, &parameters, &[]);
    accumulate().unwrap();
    let error = accumulate().unwrap_err().to_string();
    assert!(error.contains("accumulate once"), "{error}");

    // That the name of an output is taken is found last.
    let (mut graph, loss, parameters) = network();
    graph.output("skipped", loss).unwrap();
    let before = graph.clone();
    assert!(optimizer().step(&mut graph, loss, &parameters).is_err());
    assert_eq!(graph, before);
}

#[test]
fn groups_that_fit_nothing_are_refused() {
    let group = ParameterGroup::new;
    for (group, part) in [
        (group("no selectors"), "selects nothing"),
        (group("typo").names(["block.0"]), "\"block.0\""),
        (group("typo").suffix("biass"), "\"biass\""),
        (group("half a word").suffix("eight"), "\"eight\""),
        (group("NaN").vectors().lr_scale(f32::NAN), ">= 0"),
        (group("negative").vectors().weight_decay(-0.1), ">= 0"),
    ] {
        let (mut graph, loss, parameters) = network();
        let result = optimizer().group(group).step(&mut graph, loss, &parameters);
        let Err(Error::Config { field, reason }) = result else {
            panic!("{result:?}");
        };
        assert_eq!(field, "groups");
        assert!(reason.contains(part), "{reason}");
    }
    // A group of a frozen layer selects something, too.
    let (mut graph, loss, parameters) = network();
    let frozen = optimizer().group(group("first").names(["blocks.0"]));
    frozen.step(&mut graph, loss, &parameters[6..]).unwrap();
}

#[test]
fn a_loss_of_no_parameter_is_refused() {
    let (mut graph, loss, parameters) = graph(&["a"], DType::F32);
    let unused = [parameters[1], parameters[2]];
    let result = optimizer().step(&mut graph, loss, &unused);
    let error = result.unwrap_err().to_string();
    assert!(error.contains("depends on none"), "{error}");
}

#[test]
fn updates_that_do_not_fit_their_accumulation_are_refused() -> Result<()> {
    let scaled = optimizer().loss_scale(Some(LossScale::default()));
    let accumulation = |optimizer: &AdamW, metrics: usize| -> Result<Graph> {
        let (mut graph, loss, parameters) = network();
        let weight = graph.constant(&[1], 1.0)?;
        optimizer.accumulate(&mut graph, loss, weight, &parameters, &vec![loss; metrics])?;
        Ok(graph)
    };
    let plain = accumulation(&optimizer(), 1)?;
    let two_metrics = accumulation(&optimizer(), 2)?;
    let mut other_shape = Graph::new();
    let p = other_shape.parameter("head.bias", &[4], Init::Constant(0.0))?;
    let loss = other_shape.sum_all(p)?;
    optimizer().accumulate(&mut other_shape, loss, loss, &[p], &[loss])?;
    let nothing = network().0;
    for (optimizer, graphs, part) in [
        (&scaled, vec![&plain], "loss_scale"),
        (
            &optimizer(),
            vec![&plain, &two_metrics],
            "numbers of metrics",
        ),
        (&optimizer(), vec![&plain, &other_shape], "\"head.bias\""),
        (
            &optimizer(),
            vec![&plain, &nothing],
            "accumulates no gradients",
        ),
        (&optimizer(), vec![], "no parameter"),
    ] {
        let error = optimizer.update(&graphs).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    Ok(())
}
