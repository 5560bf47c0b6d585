//! From time steps to one vector per sample, against the reference and against plain loops.

mod common;

use common::{Case, F32, gpu, tolerance};
use energyflow::DType;
use energyflow::nn::{AttentionPooling, first_step, normalize};

/// Samples, time steps, channels.
const EXTENTS: [[usize; 3]; 4] = [[1, 1, 1], [2, 3, 33], [3, 17, 12], [2, 65, 64]];

#[test]
fn attention_pooling_and_its_gradients() {
    for dtype in [DType::F32, DType::F16] {
        for extents in EXTENTS {
            let [b, l, _] = extents;
            let mut case = Case::new(3, dtype);
            let x = case.input(&extents);
            let mask = case.mask(b * l);
            let pooling = AttentionPooling::new(&mut case.graph, "pool", extents[2]).unwrap();
            let y = pooling.forward(&mut case.graph, x, mask).unwrap();
            case.output("y", y);
            case.gradients(y, &[x, pooling.weight]);
            case.fill_parameters(1.0);
            case.check(tolerance(dtype));
        }
    }
}

/// The definition, in plain loops. Nothing of the second sample counts.
#[test]
fn attention_pooling_is_a_mean_with_softmax_weights_of_the_counted_steps() {
    let rows = [
        [1.0, 0.5],
        [-2.0, 3.0],
        [0.25, -1.0],
        [7.0, 8.0],
        [9.0, 1.0],
        [2.0, 2.0],
    ];
    let counted = [1.0, 0.0, 1.0, 0.0, 0.0, 0.0];
    let mut case = Case::new(0, DType::F32);
    let x = case.input_of(&[2, 3, 2], DType::F32, rows.concat());
    let mask = case.input_of(&[6], DType::F32, counted.to_vec());
    let pooling = AttentionPooling::new(&mut case.graph, "pool", 2).unwrap();
    let y = pooling.forward(&mut case.graph, x, mask).unwrap();
    case.output("y", y);
    case.output("weight", pooling.weight);
    case.fill_parameters(1.0);
    let (outputs, _) = case.run_on(&gpu());
    let weight = outputs.get("weight").unwrap();
    let score = |row: &[f32; 2]| (row[0] * weight[0] + row[1] * weight[1]).exp();
    let (first, third) = (score(&rows[0]), score(&rows[2]));
    let share = first / (first + third);
    let mean = |c: usize| share * rows[0][c] + (1.0 - share) * rows[2][c];
    let expected = [mean(0), mean(1), 0.0, 0.0];
    for (y, expected) in outputs.get("y").unwrap().into_iter().zip(expected) {
        assert!((y - expected).abs() < 1e-6, "{y} {expected}");
    }
}

#[test]
fn the_first_step_and_its_gradient() {
    for dtype in [DType::F32, DType::F16] {
        for [b, l, c] in EXTENTS {
            let mut case = Case::new(5, dtype);
            let data = case.uniform(b * l * c, -1.0, 1.0);
            let x = case.input_of(&[b, l, c], dtype, data.clone());
            let y = first_step(&mut case.graph, x).unwrap();
            case.output("y", y);
            case.gradients(y, &[x]);
            case.check(tolerance(dtype));
            let (outputs, _) = case.run_on(&gpu());
            let firsts = data.chunks(l * c).flat_map(|sample| &sample[..c]);
            for (y, x) in outputs.get("y").unwrap().iter().zip(firsts) {
                assert!((y - x).abs() < 1e-3, "{y} {x}");
            }
        }
    }
}

#[test]
fn rows_are_divided_by_their_norm() {
    let mut case = Case::new(7, DType::F32);
    let x = case.input(&[5, 33]);
    let y = normalize(&mut case.graph, x).unwrap();
    case.output("y", y);
    case.gradients(y, &[x]);
    case.check(F32);
    let (outputs, _) = case.run_on(&gpu());
    for row in outputs.get("y").unwrap().chunks(33) {
        let norm: f32 = row.iter().map(|x| x * x).sum();
        assert!((norm - 1.0).abs() < 1e-6, "{norm}");
    }

    // Zeros stay zeros, and so do norms far below the bound; a gradient of zeros is finite.
    let mut case = Case::new(8, DType::F32);
    let x = case.input_of(
        &[3, 2],
        DType::F32,
        vec![0.0, 0.0, 3e-13, 4e-13, 3e15, 4e15],
    );
    let y = normalize(&mut case.graph, x).unwrap();
    case.output("y", y);
    case.gradients(y, &[x]);
    let (outputs, _) = case.run_on(&gpu());
    let y = outputs.get("y").unwrap();
    for (y, expected) in y.iter().zip([0.0, 0.0, 0.3, 0.4, 0.6, 0.8]) {
        assert!((y - expected).abs() < 1e-5, "{y} {expected}");
    }
    assert!(
        outputs
            .get("gradient 0")
            .unwrap()
            .iter()
            .all(|x| x.is_finite())
    );

    let mut case = Case::new(9, DType::F16);
    let x = case.input(&[3, 2]);
    let text = normalize(&mut case.graph, x).unwrap_err().to_string();
    assert!(text.contains("must be f32"), "{text}");
}

#[test]
fn gradients_agree_with_differences() {
    let mut case = Case::new(10, DType::F32);
    let x = case.input(&[2, 3, 5]);
    let mask = case.mask(6);
    let pooling = AttentionPooling::new(&mut case.graph, "pool", 5).unwrap();
    let pooled = pooling.forward(&mut case.graph, x, mask).unwrap();
    let first = first_step(&mut case.graph, x).unwrap();
    let sum = case.graph.add(pooled, first).unwrap();
    let y = normalize(&mut case.graph, sum).unwrap();
    case.fill_parameters(1.0);
    case.check_finite_differences(y, &[x, pooling.weight], 1e-6);
}
