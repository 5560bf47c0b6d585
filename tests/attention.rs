//! Attention of several heads: result, gradients, masks, awkward lengths and numbers.

mod common;

use common::{Case, F16, F32, Tolerance, baseline_gpu, gpu, packed_gpu, tiled_gpu};
use energyflow::graph::{AttentionOptions, Graph, Op, ValueId};
use energyflow::types::DType;
use energyflow::{Error, Host, Session};

/// y and the gradient pass through f16 on their way to the gradients.
const HALF: Tolerance = Tolerance {
    normalised: 2e-3,
    relative: 1e-2,
};

fn bound(dtype: DType) -> Tolerance {
    match dtype {
        DType::F16 => HALF,
        _ => F32,
    }
}

#[derive(Clone, Copy, Debug)]
enum Mask {
    None,
    Zero,
    One,
    Random,
}

fn mask(case: &mut Case, kind: Mask, batch: usize, keys: usize) -> Option<ValueId> {
    let data: Vec<f32> = match kind {
        Mask::None => return None,
        Mask::Zero => vec![0.0; batch * keys],
        Mask::One => (0..batch * keys)
            .map(|n| f32::from(n % keys == (n / keys * 7 + 2) % keys))
            .collect(),
        Mask::Random => return Some(case.mask(batch * keys)),
    };
    Some(case.input_of(&[batch * keys], DType::F32, data))
}

/// Self-attention [batch, time, 3·heads·d] with result, statistics and gradient.
fn packed(
    dtype: DType,
    [batch, time, heads, d]: [usize; 4],
    kind: Mask,
    options: AttentionOptions,
) -> Case {
    let mut case = Case::new((batch + 3 * time + heads + d) as u64, dtype);
    let qkv = case.input_in(&[batch, time, 3 * heads * d], -2.0, 2.0);
    let operands: Vec<ValueId> = [qkv]
        .into_iter()
        .chain(mask(&mut case, kind, batch, time))
        .collect();
    let out = case.graph.apply(Op::Attention(options), &operands).unwrap();
    case.output("y", out[0]);
    case.output("statistics", out[1]);
    case.gradients(out[0], &[qkv]);
    case
}

fn cross(
    dtype: DType,
    [batch, queries, keys, heads, d]: [usize; 5],
    kind: Mask,
    options: AttentionOptions,
) -> Case {
    let mut case = Case::new((batch + 3 * queries + keys + heads + d) as u64, dtype);
    let q = case.input_in(&[batch, queries, heads * d], -2.0, 2.0);
    let kv = case.input_in(&[batch, keys, 2 * heads * d], -2.0, 2.0);
    let mask = mask(&mut case, kind, batch, keys);
    let y = case.graph.cross_attention(q, kv, mask, options).unwrap();
    case.output("y", y);
    case.gradients(y, &[q, kv]);
    case
}

fn check(case: &Case, dtype: DType) {
    case.check(bound(dtype));
}

/// Shapes are many and shaders take long to compile, so element types take turns.
fn turn(i: usize) -> DType {
    [DType::F32, DType::F16][i % 2]
}

#[test]
fn every_width_of_a_head() {
    let widths = [
        (16, 3),
        (24, 1),
        (32, 12),
        (64, 3),
        (80, 1),
        (128, 1),
        (256, 1),
        (4, 5),
    ];
    for (i, (d, heads)) in widths.into_iter().enumerate() {
        let kind = [Mask::None, Mask::Random][i % 2];
        let options = AttentionOptions::new(heads).causal(i % 3 == 1);
        check(&packed(turn(i), [2, 21, heads, d], kind, options), turn(i));
    }
}

/// One, primes, and around the tiles.
#[test]
fn every_length() {
    for (i, time) in [1, 7, 31, 64, 65, 129].into_iter().enumerate() {
        let kind = [Mask::Random, Mask::None, Mask::One][i % 3];
        let options = AttentionOptions::new(3).causal(i % 2 == 1);
        check(&packed(turn(i), [2, time, 3, 16], kind, options), turn(i));
    }
}

#[test]
fn masks_of_nothing_and_of_one_key() {
    for (i, kind) in [Mask::Zero, Mask::One].into_iter().enumerate() {
        for causal in [false, true] {
            let options = AttentionOptions::new(2).causal(causal).scale(Some(0.3));
            let dtype = turn(i + usize::from(causal));
            check(&packed(dtype, [3, 35, 2, 8], kind, options), dtype);
        }
    }
}

#[test]
fn two_sequences() {
    for (i, (dims, kind)) in [
        ([2, 5, 70, 3, 16], Mask::Random),
        ([1, 66, 1, 1, 64], Mask::None),
        // One key alone has no gradient for the query.
        ([3, 33, 17, 2, 12], Mask::One),
    ]
    .into_iter()
    .enumerate()
    {
        let options = AttentionOptions::new(dims[3]).causal(i == 2);
        check(&cross(turn(i + 1), dims, kind, options), turn(i + 1));
    }
}

#[test]
fn gradients_agree_with_finite_differences() {
    for causal in [false, true] {
        let options = AttentionOptions::new(2).causal(causal);
        let mut case = Case::new(3, DType::F32);
        let qkv = case.input(&[2, 5, 24]);
        let data = vec![1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        let mask = case.input_of(&[10], DType::F32, data);
        let y = case.graph.attention(qkv, Some(mask), options).unwrap();
        case.check_finite_differences(y, &[qkv], 1e-6);

        let mut case = Case::new(4, DType::F32);
        let q = case.input(&[2, 3, 8]);
        let kv = case.input(&[2, 4, 16]);
        let y = case.graph.cross_attention(q, kv, None, options).unwrap();
        case.check_finite_differences(y, &[q, kv], 1e-6);
    }
}

/// One key takes all of the probability, and the exponentials of the others would overflow.
#[test]
fn scores_of_ten_thousand() {
    for dtype in [DType::F32, DType::F16] {
        let mut case = Case::new(9, dtype);
        let (time, d) = (37, 16);
        let mut data = case.uniform(time * 3 * d, -1.0, 1.0);
        for (t, row) in data.chunks_mut(3 * d).enumerate() {
            // Scores are a·b with a = ±100 and integers b of at most 100: exact in every type.
            row[..2 * d].fill(0.0);
            row[0] = if t % 2 == 0 { 100.0 } else { -100.0 };
            row[d] = ((t * 11) % time) as f32 * 5.0 - 90.0;
        }
        let qkv = case.input_of(&[1, time, 3 * d], dtype, data);
        let options = AttentionOptions::new(1).scale(Some(1.0));
        let y = case.graph.attention(qkv, None, options).unwrap();
        case.output("y", y);
        case.gradients(y, &[qkv]);
        check(&case, dtype);
    }
}

struct Ran {
    y: Vec<f32>,
    gradient: Vec<f32>,
}

fn run(gpu: &energyflow::Gpu, dtype: DType, dims: [usize; 4], data: &[f32], mask: &[f32]) -> Ran {
    let [batch, time, heads, d] = dims;
    let mut graph = Graph::new();
    let qkv = graph
        .input("qkv", &[batch, time, 3 * heads * d], dtype)
        .unwrap();
    let counts = graph.input("mask", &[batch * time], DType::F32).unwrap();
    let options = AttentionOptions::new(heads);
    let y = graph.attention(qkv, Some(counts), options).unwrap();
    let y = graph.cast(y, DType::F32).unwrap();
    let loss = graph.sum_all(y).unwrap();
    let gradient = graph.gradients(loss, &[qkv]).unwrap()[0];
    graph.output("y", y).unwrap();
    graph.output("gradient", gradient).unwrap();
    let mut session = Session::new(gpu, 0);
    let executable = session.compile(&graph).unwrap();
    executable.poison().unwrap();
    let inputs = [("qkv", Host::from(data)), ("mask", Host::from(mask))];
    let outputs = executable.run(&inputs).unwrap().wait().unwrap();
    Ran {
        y: outputs.get("y").unwrap(),
        gradient: outputs.get("gradient").unwrap(),
    }
}

/// NaN and infinity in masked keys and values reach neither a result nor a gradient; in a key that counts NaN shows.
#[test]
fn masked_keys_do_not_leak() {
    let (time, d) = (19, 8);
    let mut case = Case::new(1, DType::F32);
    let data = case.uniform(2 * time * 3 * d, -1.0, 1.0);
    let mut mask = vec![1.0; 2 * time];
    for t in [0, 3, 18] {
        mask[t] = 0.0;
    }
    let mut broken = data.clone();
    for (t, row) in broken.chunks_mut(3 * d).enumerate() {
        if mask[t] == 0.0 {
            row[d..2 * d].fill(f32::NAN);
            row[2 * d..].fill(f32::INFINITY);
        }
    }
    for gpu in [gpu(), tiled_gpu(), baseline_gpu(), packed_gpu()] {
        for dtype in [DType::F32, DType::F16] {
            let clean = run(&gpu, dtype, [2, time, 1, d], &data, &mask);
            let same = run(&gpu, dtype, [2, time, 1, d], &broken, &mask);
            assert!(clean.y.iter().all(|y| y.is_finite()));
            assert_eq!(clean.y, same.y);
            // dq of masked keys' own rows and all of dk, dv: unaffected, and 0 for masked keys.
            assert_eq!(clean.gradient, same.gradient);
            for t in [0, 3, 18] {
                let row = &same.gradient[t * 3 * d..(t + 1) * 3 * d];
                assert!(row[d..].iter().all(|g| *g == 0.0), "{row:?}");
            }
            let mut nan = data.clone();
            nan[3 * d + d] = f32::NAN;
            let shown = run(&gpu, dtype, [2, time, 1, d], &nan, &mask);
            assert!(shown.y[..time * d].iter().all(|y| y.is_nan()));
            assert!(shown.y[time * d..].iter().all(|y| y.is_finite()));
        }
    }
}

/// A score of -infinity is a key that is not seen; +infinity has no softmax.
#[test]
fn infinite_scores() {
    let (time, d) = (5, 4);
    let mut data = vec![0.0; time * 3 * d];
    for (t, row) in data.chunks_mut(3 * d).enumerate() {
        row[0] = 1.0;
        row[2 * d] = t as f32;
    }
    data[3 * d + d] = f32::NEG_INFINITY;
    let mask = vec![1.0; time];
    for gpu in [gpu(), tiled_gpu()] {
        let ran = run(&gpu, DType::F32, [1, time, 1, d], &data, &mask);
        // Mean of 0, 2, 3, 4.
        for row in ran.y.chunks(d) {
            assert!((row[0] - 2.25).abs() < 1e-6, "{row:?}");
        }
        let mut data = data.clone();
        data[3 * d + d] = f32::INFINITY;
        let ran = run(&gpu, DType::F32, [1, time, 1, d], &data, &mask);
        assert!(ran.y.chunks(d).all(|row| row[0].is_nan()), "{:?}", ran.y);
    }
}

/// What a bias adds, and what dropout does afterwards, is no kernel of its own.
#[test]
fn results_go_through_a_program() {
    let mut case = Case::new(2, DType::F16);
    let qkv = case.input(&[2, 9, 3 * 12]);
    let residual = case.input(&[2, 9, 12]);
    let y = case
        .graph
        .attention(qkv, None, AttentionOptions::new(1))
        .unwrap();
    let y = case.graph.add(y, residual).unwrap();
    case.output("y", y);
    assert_eq!(case.dispatches(), 1);
    case.check(F16);
}

#[test]
fn operands_that_do_not_fit() {
    let mut graph = Graph::new();
    let qkv = graph.input("qkv", &[2, 5, 36], DType::F32).unwrap();
    let kv = graph.input("kv", &[2, 7, 24], DType::F16).unwrap();
    let q = graph.input("q", &[2, 5, 12], DType::F32).unwrap();
    let mask = graph.input("mask", &[7], DType::F32).unwrap();
    let with = AttentionOptions::new;
    let mut texts = Vec::new();
    for result in [
        graph.attention(qkv, None, with(0)),
        graph.attention(qkv, None, with(5)),
        graph.attention(qkv, None, with(2)),
        graph.attention(kv, None, with(5)),
        graph.attention(qkv, Some(mask), with(1)),
        graph.attention(qkv, None, with(1).scale(Some(f32::NAN))),
        graph.cross_attention(q, kv, None, with(1)),
        graph.cross_attention(q, qkv, None, with(1)),
    ] {
        match result {
            Err(Error::Shape { reason, .. }) => texts.push(reason),
            other => panic!("{other:?}"),
        }
    }
    assert!(texts[1].contains("12 columns in 5 heads"), "{texts:?}");
    assert!(texts[4].contains("the mask"), "{texts:?}");
    let options = with(1);
    let mask = graph.parameter("p", &[10], energyflow::graph::Init::Constant(1.0));
    let mask = mask.unwrap();
    let y = graph.attention(qkv, Some(mask), options).unwrap();
    let loss = graph.sum_all(y).unwrap();
    let error = graph.gradients(loss, &[mask]).unwrap_err();
    assert!(error.to_string().contains("no gradient for its mask"));
}
