//! Extents and counts that no machine can hold: errors, never a panic, and nothing wraps around.

mod common;

use common::gpu;
use energyflow::graph::{Graph, Init, Op, ValueId};
use energyflow::nn::{Conv1d, LayerNorm, Linear};
use energyflow::reference::Array;
use energyflow::text::{DecoderOptions, EncoderOptions, Trainer, TrainerOptions};
use energyflow::types::{BinaryOp, Broadcast, DType, Padding, Trans, Window};
use energyflow::{Error, Session};

fn input(graph: &mut Graph, dims: &[usize]) -> ValueId {
    let name = format!("x{}", graph.values().len());
    graph.input(&name, dims, DType::F32).unwrap()
}

/// Arithmetic on extents of the largest numbers, in operations whose numbers the caller chooses.
#[test]
fn numbers_beyond_the_address_space() {
    let huge = usize::MAX / 2 + 2;
    let mut graph = Graph::new();
    let x = input(&mut graph, &[4, 3]);
    let z = input(&mut graph, &[2, 3]);
    let one = input(&mut graph, &[1]);
    let columns = input(&mut graph, &[1, 1 << 20]);
    let rows = input(&mut graph, &[1 << 20, 1]);
    let g = &mut graph;
    let ids = g.index_input("ids", 4, 3).unwrap();
    let add = |period| Op::Binary(BinaryOp::Add, Broadcast::Groups { period });
    let window = Window::new(4, 1 << 31, 0, 1, Padding::Causal);
    assert!(matches!(window, Err(Error::Config { .. })));
    let window = Window::causal(4, 1 << 30, 1).unwrap();
    for error in [
        // (2⁶³ + 1)·2 wraps to 2.
        g.apply(add(huge), &[x, z]).unwrap_err(),
        g.apply(Op::MaskedMeanGrad { time: huge }, &[z, one])
            .unwrap_err(),
        g.apply(Op::SumGroups { period: huge }, &[x]).unwrap_err(),
        g.apply(
            Op::GatherGrad {
                rows: huge,
                padding: None,
            },
            &[ids, x],
        )
        .unwrap_err(),
        g.apply(Op::Im2col(window), &[x]).unwrap_err(),
        g.matmul(rows, columns, Trans::NN).unwrap_err(),
        Linear::new(g, "linear", huge, 2, true).unwrap_err(),
        Conv1d::new(g, "conv", huge, 2, huge, true).unwrap_err(),
        LayerNorm::new(g, "norm", 0, 1e-5).unwrap_err(),
        Array::new(&[huge, 2, 4], Vec::new()).unwrap_err(),
    ] {
        assert!(matches!(error, Error::Shape { .. }), "{error}");
    }
    for init in [
        Init::Uniform(f32::INFINITY),
        Init::Constant(f32::NAN),
        Init::Uniform(-1.0),
    ] {
        let error = g.parameter("p", &[2], init).unwrap_err();
        assert!(
            matches!(error, Error::Config { field: "init", .. }),
            "{error}"
        );
    }
}

/// The widest ranges that f32 holds: twice the bound is more than the largest number.
#[test]
fn the_widest_initial_values() {
    let mut graph = Graph::new();
    for (name, bound) in [("a", f32::MAX), ("b", 1.8e38), ("c", 1.7e38), ("d", 1e-45)] {
        let p = graph
            .parameter(name, &[9, 7], Init::Uniform(bound))
            .unwrap();
        graph.output(name, p).unwrap();
    }
    let mut session = Session::new(&gpu(), 0);
    session.compile(&graph).unwrap();
    for (name, bound) in [("a", f32::MAX), ("b", 1.8e38), ("c", 1.7e38), ("d", 1e-45)] {
        let data = session.get(name).unwrap();
        assert!(data.iter().all(|x| x.abs() <= bound), "{name}: {data:?}");
        let spread = data.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        assert!(spread > 0.8 * bound || bound < 1e-40, "{name}: {spread}");
    }
}

#[test]
fn trainings_of_sizes_that_do_not_fit() {
    let gpu = gpu();
    for batch in [usize::MAX, 1 << 60, 1 << 40] {
        let options = TrainerOptions::default().batch(batch);
        let error = Trainer::distill(&gpu, &EncoderOptions::default(), &options).unwrap_err();
        assert!(
            matches!(error, Error::Config { .. } | Error::Shape { .. }),
            "{error}"
        );
        let options = TrainerOptions::default().batch(batch);
        let error = Trainer::decode(&gpu, &DecoderOptions::default(), &options).unwrap_err();
        assert!(
            matches!(error, Error::Config { .. } | Error::Shape { .. }),
            "{error}"
        );
    }
    for change in [
        |o: &mut EncoderOptions| o.length = usize::MAX,
        |o: &mut EncoderOptions| o.width = 1 << 63,
        |o: &mut EncoderOptions| o.hidden = usize::MAX,
        |o: &mut EncoderOptions| o.kernel = usize::MAX,
        |o: &mut EncoderOptions| o.embedding = 1 << 62,
        |o: &mut EncoderOptions| o.vocabulary = 1 << 61,
        |o: &mut EncoderOptions| o.dilations = vec![usize::MAX],
    ] {
        let mut encoder = EncoderOptions::default();
        change(&mut encoder);
        let error = Trainer::distill(&gpu, &encoder, &TrainerOptions::default()).unwrap_err();
        assert!(
            matches!(error, Error::Config { .. } | Error::Shape { .. }),
            "{error}"
        );
    }
}
