//! More workgroups than a dimension of a grid has: grids are folded.

mod common;

use common::{gpu, tiled_gpu};
use energyflow::types::{Trans, UnaryOp};
use energyflow::{DType, Gpu, Graph, Host, Result, Session};

/// Small integers, whose products and sums are exact.
fn integers(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i % 251) as f32 - 125.0).collect()
}

fn run(gpu: &Gpu, graph: &Graph, inputs: &[(&str, &[f32])]) -> Result<Vec<f32>> {
    let executable = Session::new(gpu, 0).compile(graph)?;
    executable.poison()?;
    let inputs: Vec<_> = inputs
        .iter()
        .map(|(name, data)| (*name, Host::F32(data)))
        .collect();
    Ok(executable.run(&inputs)?.wait()?.get("y")?.to_vec())
}

fn assert_same(got: &[f32], expected: impl ExactSizeIterator<Item = f32>) {
    assert_eq!(got.len(), expected.len());
    for (i, (&got, expected)) in got.iter().zip(expected).enumerate() {
        assert_eq!(got, expected, "element {i}");
    }
}

/// 262 144 workgroups without barriers.
#[test]
fn a_product_of_one_row_and_many_columns() -> Result<()> {
    let n = 1 << 24;
    let mut graph = Graph::new();
    let a = graph.input("a", &[1, 1], DType::F32)?;
    let b = graph.input("b", &[1, n], DType::F32)?;
    let y = graph.matmul(a, b, Trans::NN)?;
    graph.output("y", y)?;
    let data = integers(n);
    for gpu in [gpu(), tiled_gpu()] {
        let y = run(&gpu, &graph, &[("a", &[3.0]), ("b", &data)])?;
        assert_same(&y, data.iter().map(|x| 3.0 * x));
    }
    Ok(())
}

/// More products than layers of a grid.
#[test]
fn a_batch_of_many_products() -> Result<()> {
    let batch = 70_001;
    let mut graph = Graph::new();
    let a = graph.input("a", &[batch, 1, 2], DType::F32)?;
    let b = graph.input("b", &[batch, 2, 1], DType::F32)?;
    let y = graph.batch_matmul(a, b, Trans::NN)?;
    graph.output("y", y)?;
    let data = integers(2 * batch);
    for gpu in [gpu(), tiled_gpu()] {
        let y = run(&gpu, &graph, &[("a", &data), ("b", &data)])?;
        let pairs = data.chunks_exact(2).map(|x| x[0] * x[0] + x[1] * x[1]);
        assert_same(&y, pairs);
    }
    Ok(())
}

#[test]
fn elements_and_sums_of_columns() -> Result<()> {
    let n = 17_000_003;
    let data = integers(n);
    let mut graph = Graph::new();
    let x = graph.input("x", &[n], DType::F32)?;
    let y = graph.unary(UnaryOp::Square, x)?;
    graph.output("y", y)?;
    let y = run(&gpu(), &graph, &[("x", &data)])?;
    assert_same(&y, data.iter().map(|x| x * x));

    let mut graph = Graph::new();
    let x = graph.input("x", &[1, n], DType::F32)?;
    let y = graph.sum_rows(x)?;
    graph.output("y", y)?;
    let y = run(&gpu(), &graph, &[("x", &data)])?;
    assert_same(&y, data.iter().copied());
    Ok(())
}
