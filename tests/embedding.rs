//! Rows of a table by id, and the table's gradient.

mod common;

use common::{Case, F32, SIZES, baseline_gpu, gpu, tiled_gpu, tolerance};
use energyflow::graph::{Graph, Init};
use energyflow::runtime::Host;
use energyflow::types::DType;
use energyflow::{Error, Session};

#[test]
fn rows_and_gradients_at_many_sizes() {
    for dtype in [DType::F32, DType::F16] {
        for (i, &cols) in SIZES.iter().enumerate() {
            let rows = SIZES[(i + 5) % SIZES.len()];
            let n = SIZES[(i + 8) % SIZES.len()];
            let mut case = Case::new(i as u64, dtype);
            let table = case.parameter(&[rows, cols]);
            let ids = case.ids(n, rows as u32);
            let copy = case.graph.cast(table, dtype).unwrap();
            let padding = (i % 2 == 0).then_some(rows as u32 / 2);
            let y = case.graph.gather(copy, ids, padding).unwrap();
            case.output("y", y);
            case.gradients(y, &[table]);
            case.check(tolerance(dtype));
        }
    }
}

#[test]
fn a_table_in_half_precision() {
    let mut case = Case::new(1, DType::F16);
    let (table, ids) = (case.input(&[9, 33]), case.ids(20, 9));
    let y = case.graph.gather(table, ids, Some(4)).unwrap();
    case.output("y", y);
    case.gradients(y, &[table]);
    case.check(tolerance(DType::F16));
}

#[test]
fn repeated_ids_add_up_and_padding_gets_nothing() {
    let ids = vec![2, 0, 2, 2, 3, 0, 3, 2];
    let mut case = Case::new(2, DType::F32);
    let table = case.parameter(&[5, 3]);
    let ids = case.ids_of(ids, 5);
    let y = case.graph.gather(table, ids, Some(3)).unwrap();
    let loss = case.graph.sum_all(y).unwrap();
    let gradient = case.graph.gradients(loss, &[table]).unwrap()[0];
    case.output("gradient", gradient);
    case.check(F32);
    let counts = [2.0, 0.0, 4.0, 0.0, 0.0];
    let expected: Vec<f32> = counts.into_iter().flat_map(|n| [n; 3]).collect();
    for gpu in [gpu(), tiled_gpu(), baseline_gpu()] {
        assert_eq!(case.run_on(&gpu).0.get("gradient").unwrap(), expected);
    }
}

#[test]
fn a_table_of_one_row_and_one_id() {
    for (rows, n) in [(1, 70), (70, 1), (1, 1)] {
        let mut case = Case::new(3, DType::F32);
        let (table, ids) = (case.parameter(&[rows, 10]), case.ids(n, rows as u32));
        let y = case.graph.gather(table, ids, None).unwrap();
        case.output("y", y);
        case.gradients(y, &[table]);
        case.check(F32);
    }
}

/// Around the runs of 1024 places that are sorted together; few ids, many, and one that occurs everywhere.
#[test]
fn more_ids_than_are_sorted_at_once() {
    for (n, rows) in [
        (1023, 7),
        (1024, 2000),
        (1025, 3),
        (2049, 1500),
        (5000, 11),
        (4099, 1),
    ] {
        let mut case = Case::new(n as u64, DType::F32);
        let (table, ids) = (case.parameter(&[rows, 5]), case.ids(n, rows as u32));
        let y = case.graph.gather(table, ids, Some(1)).unwrap();
        case.output("y", y);
        case.gradients(y, &[table]);
        case.check(F32);
    }
}

#[test]
fn only_padding() {
    let mut case = Case::new(4, DType::F32);
    let (table, ids) = (case.parameter(&[6, 7]), case.ids_of(vec![5; 9], 6));
    let y = case.graph.gather(table, ids, Some(5)).unwrap();
    case.output("y", y);
    case.gradients(y, &[table]);
    case.check(F32);
}

#[test]
fn one_table_looked_up_twice() {
    let mut case = Case::new(5, DType::F32);
    let table = case.parameter(&[11, 13]);
    let (first, second) = (case.ids(17, 11), case.ids(17, 11));
    let a = case.graph.gather(table, first, Some(0)).unwrap();
    let b = case.graph.gather(table, second, None).unwrap();
    let y = case.graph.mul(a, b).unwrap();
    case.output("y", y);
    case.gradients(y, &[table]);
    case.check(F32);
}

#[test]
fn gradients_agree_with_finite_differences() {
    let mut case = Case::new(6, DType::F32);
    let (table, ids) = (case.parameter(&[4, 3]), case.ids(7, 4));
    let y = case.graph.gather(table, ids, None).unwrap();
    case.check_finite_differences(y, &[table], 1e-7);
}

#[test]
fn an_id_out_of_range_is_an_error_before_anything_runs() {
    let mut graph = Graph::new();
    let table = graph
        .parameter("table", &[4, 2], Init::Constant(1.0))
        .unwrap();
    let ids = graph.index_input("ids", 3, 4).unwrap();
    let y = graph.gather(table, ids, None).unwrap();
    graph.output("y", y).unwrap();
    let runs = graph.state("runs", &[1], 0.0).unwrap();
    let next = graph.affine(runs, 1.0, 1.0).unwrap();
    graph.assign(runs, next).unwrap();
    let mut session = Session::new(&gpu(), 0);
    let executable = session.compile(&graph).unwrap();
    let run = |ids: &[u32]| executable.run(&[("ids", Host::from(ids))]);
    run(&[0, 3, 1]).unwrap().wait().unwrap();
    for ids in [[0, 4, 1], [u32::MAX, 0, 0]] {
        match run(&ids) {
            Err(Error::Data { name, reason }) => {
                assert_eq!(name, "ids");
                assert!(reason.contains("bound is 4"), "{reason}");
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(session.get("runs").unwrap(), [1.0]);
}

#[test]
fn ids_that_could_exceed_the_table_are_refused() {
    let mut graph = Graph::new();
    let table = graph
        .parameter("table", &[4, 2], Init::Constant(1.0))
        .unwrap();
    let ids = graph.index_input("ids", 3, 5).unwrap();
    let error = graph.gather(table, ids, Some(4)).unwrap_err();
    assert!(matches!(error, Error::Shape { op: "gather", .. }));
    assert!(error.to_string().contains("beyond 4 rows"), "{error}");
}
