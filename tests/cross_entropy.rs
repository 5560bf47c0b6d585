//! Cross entropy together with its gradient: one kernel reads the logits once.

mod common;

use common::{Case, Tolerance, baseline_gpu, gpu, packed_gpu, tiled_gpu, tolerance};
use energyflow::Gpu;
use energyflow::graph::ValueId;
use energyflow::types::{DType, Trans};

/// Sums with cancellation.
fn bound(dtype: DType) -> Tolerance {
    let Tolerance { relative, .. } = tolerance(dtype);
    Tolerance {
        normalised: relative,
        relative: 2.0 * relative,
    }
}

/// Which targets do not count.
#[derive(Clone, Copy, Debug)]
enum Ignored {
    None,
    /// One class.
    Some,
    All,
    /// All of one id that is no class.
    Outside,
}

struct Entropy {
    case: Case,
    logits: ValueId,
    loss: ValueId,
}

/// Outputs loss and count; the first target is the last class.
fn entropy(
    dtype: DType,
    [n, v]: [usize; 2],
    [low, high]: [f32; 2],
    (ignored, smoothing): (Ignored, f32),
) -> Entropy {
    let mut case = Case::new((n + v) as u64, dtype);
    let logits = case.input_in(&[n, v], low, high);
    let spread: Vec<u32> = (0..n).map(|i| ((v - 1 + 7 * i) % v) as u32).collect();
    let class = v as u32 / 2;
    let (ids, below, ignore) = match ignored {
        Ignored::None => (spread, v as u32, None),
        Ignored::Some => (spread, v as u32, Some(class)),
        Ignored::All => (vec![class; n], v as u32, Some(class)),
        Ignored::Outside => (vec![v as u32; n], v as u32 + 1, Some(v as u32)),
    };
    let targets = case.ids_of(ids, below);
    let g = &mut case.graph;
    let ce = g.cross_entropy(logits, targets, ignore, smoothing).unwrap();
    case.output("loss", ce.loss);
    case.output("count", ce.count);
    Entropy {
        case,
        logits,
        loss: ce.loss,
    }
}

impl Entropy {
    fn gradient(&mut self) -> ValueId {
        let graph = &mut self.case.graph;
        graph.gradients(self.loss, &[self.logits]).unwrap()[0]
    }

    fn with_gradient(mut self) -> Case {
        let gradient = self.gradient();
        self.case.output("gradient", gradient);
        self.case
    }
}

/// Names of the kernels that a case runs.
fn kernels(case: &Case, gpu: &Gpu) -> Vec<String> {
    let executable = case.start(gpu).executable;
    let names = executable
        .sources()
        .map(|(key, _)| key.split(' ').next().unwrap().to_owned());
    names.collect()
}

fn is_paired(case: &Case) -> bool {
    let names = kernels(case, &gpu());
    let paired = names.iter().any(|name| name == "cross_entropy_value_grad");
    let apart = names.iter().any(|name| name == "cross_entropy_grad");
    assert!(paired != apart, "{names:?}");
    paired
}

#[test]
fn awkward_shapes() {
    let ignored = [Ignored::None, Ignored::Some, Ignored::All, Ignored::Outside];
    for dtype in [DType::F32, DType::F16] {
        for (i, v) in [1, 3, 4, 5, 31, 127, 129, 1000].into_iter().enumerate() {
            for (j, n) in [1, 7, 64, 65].into_iter().enumerate() {
                if (i + j) % 2 == 1 {
                    continue;
                }
                let options = (ignored[(i + j / 2) % 4], [0.1, 0.0][i % 2]);
                let case = entropy(dtype, [n, v], [-4.0, 4.0], options).with_gradient();
                assert!(is_paired(&case));
                case.check(bound(dtype));
            }
        }
    }
}

#[test]
fn a_vocabulary() {
    for dtype in [DType::F32, DType::F16] {
        let options = (Ignored::Some, 0.1);
        let case = entropy(dtype, [3, 30_522], [-4.0, 4.0], options).with_gradient();
        // Devices of the baseline have 256 invocations: with f32 the row does not fit into registers and is read twice.
        for gpu in [packed_gpu(), tiled_gpu(), baseline_gpu()] {
            let capabilities = gpu.capabilities();
            let invocations = capabilities.limits.max_compute_invocations_per_workgroup;
            let steps = match (dtype, invocations < 512) {
                // One invocation takes the row alone.
                _ if capabilities.barrier_free => "lanes=1 ",
                (DType::F32, true) => "steps=0 ",
                (DType::F32, false) | (_, true) => "steps=15 ",
                (_, false) => "steps=8 ",
            };
            let executable = case.start(&gpu).executable;
            let mut keys = executable.sources().map(|(key, _)| key);
            assert!(keys.any(|key| key.contains(steps)), "{executable}");
            case.check_on(&gpu, bound(dtype));
        }
    }
}

/// Logits that are computed and that nobody else wants make room for their gradient, in f32.
#[test]
fn the_gradient_takes_the_place_of_the_logits() {
    for [n, v] in [[1, 2], [7, 5], [17, 129], [65, 1027], [3, 30_522]] {
        for kept in [false, true] {
            let mut case = Case::new((n + v) as u64, DType::F32);
            let x = case.input_in(&[n, 3], -2.0, 2.0);
            let w = case.input_in(&[v, 3], -2.0, 2.0);
            let targets = case.ids(n, v as u32);
            let g = &mut case.graph;
            let logits = g.matmul(x, w, Trans::NT).unwrap();
            let ce = g.cross_entropy(logits, targets, None, 0.1).unwrap();
            case.output("loss", ce.loss);
            if kept {
                case.output("logits", logits);
            }
            case.gradients(ce.loss, &[x, w]);
            for gpu in [gpu(), tiled_gpu(), baseline_gpu()] {
                let executable = case.start(&gpu).executable;
                let mut keys = executable.sources().map(|(key, _)| key);
                let over = keys.any(|key| key.contains(" over=True "));
                assert_eq!(over, !kept, "{executable}");
                if v == 1027 {
                    let both = 2 * 4 * (n * v) as u64;
                    assert_eq!(executable.plan().lower_bound >= both, kept);
                }
                case.check_on(&gpu, bound(DType::F32));
            }
        }
    }
}

/// As many blocks of 16 bytes as invocations, one less, one more; more rows than a workgroup takes without barriers.
#[test]
fn rows_around_the_blocks() {
    for (dtype, each) in [(DType::F32, 4), (DType::F16, 8)] {
        for v in [32 * each - 1, 32 * each, 32 * each + 1, 264 * each + 3] {
            let options = (Ignored::None, 0.0);
            let case = entropy(dtype, [17, v], [-1.0, 1.0], options).with_gradient();
            case.check(bound(dtype));
        }
        // So many rows that an invocation takes more blocks.
        let options = (Ignored::Some, 0.0);
        let case = entropy(dtype, [600, 130 * each], [-1.0, 1.0], options).with_gradient();
        case.check_on(&tiled_gpu(), bound(dtype));
    }
}

#[test]
fn large_logits() {
    for dtype in [DType::F32, DType::F16] {
        for smoothing in [0.0, 0.1] {
            let options = (Ignored::Some, smoothing);
            let case = entropy(dtype, [13, 1001], [-1e4, 1e4], options).with_gradient();
            assert!(is_paired(&case));
            case.check(bound(dtype));
        }
    }
}

#[test]
fn an_ignored_row_has_no_gradient_whatever_it_holds() {
    let mut case = Case::new(1, DType::F32);
    let mut data = case.uniform(33, -1.0, 1.0);
    data[2] = f32::INFINITY;
    data[12] = f32::NAN;
    let logits = case.input_of(&[3, 11], DType::F32, data);
    let targets = case.ids_of(vec![4, 4, 3], 11);
    let g = &mut case.graph;
    let ce = g.cross_entropy(logits, targets, Some(4), 0.1).unwrap();
    let gradient = g.gradients(ce.loss, &[logits]).unwrap()[0];
    case.output("loss", ce.loss);
    case.output("gradient", gradient);
    assert!(is_paired(&case));
    for gpu in [gpu(), tiled_gpu()] {
        let (outputs, _) = case.run_on(&gpu);
        assert!(outputs.scalar("loss").unwrap().is_finite());
        let gradient = outputs.get("gradient").unwrap();
        assert!(gradient[..22].iter().all(|&g| g == 0.0), "{gradient:?}");
        assert!(gradient[22..].iter().all(|&g| g != 0.0), "{gradient:?}");
    }
}

#[test]
fn what_follows_the_gradient_goes_along() {
    for dtype in [DType::F32, DType::F16] {
        for v in [8, 37, 1000] {
            // One result of either type.
            for result in [DType::F32, DType::F16] {
                let mut e = entropy(dtype, [9, v], [-2.0, 2.0], (Ignored::Some, 0.0));
                let other = e.case.input(&[9, v]);
                let mask = e.case.mask(9);
                let gradient = e.gradient();
                let g = &mut e.case.graph;
                let y = g.affine(gradient, -3.0, 0.5).unwrap();
                let y = g.add(y, other).unwrap();
                let y = g.mul_rows(y, mask).unwrap();
                let y = g.cast(y, result).unwrap();
                e.case.output("y", y);
                let names = kernels(&e.case, &gpu());
                // The seed, the count, everything, the total.
                assert_eq!(names.len(), 4, "{names:?}");
                e.case.check(bound(DType::F16));
            }
            // Several results of both types.
            let mut e = entropy(dtype, [9, v], [-2.0, 2.0], (Ignored::None, 0.1));
            let gradient = e.gradient();
            let g = &mut e.case.graph;
            let square = g.mul(gradient, gradient).unwrap();
            let wide = g.cast(square, DType::F32).unwrap();
            let half = g.cast(square, DType::F16).unwrap();
            for (name, value) in [("gradient", gradient), ("wide", wide), ("half", half)] {
                e.case.output(name, value);
            }
            let names = kernels(&e.case, &gpu());
            assert_eq!(names.len(), 3, "{names:?}");
            e.case.check(bound(DType::F16));
        }
    }
}

/// The rows of vectors are aligned to 16 bytes only.
#[test]
fn a_vector_of_logits() {
    for dtype in [DType::F32, DType::F16] {
        for v in [1, 4, 9, 12] {
            for result in [DType::F32, DType::F16] {
                let mut case = Case::new(v as u64, dtype);
                let logits = case.input(&[v]);
                let targets = case.ids(1, v as u32);
                let g = &mut case.graph;
                let ce = g.cross_entropy(logits, targets, None, 0.1).unwrap();
                let gradient = g.gradients(ce.loss, &[logits]).unwrap()[0];
                let gradient = g.cast(gradient, result).unwrap();
                case.output("loss", ce.loss);
                case.output("gradient", gradient);
                assert!(is_paired(&case));
                case.check(bound(DType::F16));
            }
        }
    }
}

/// A value of the logits' extents that reads the loss is not part of the kernel that computes it.
#[test]
fn the_loss_of_a_single_logit() {
    let mut e = entropy(DType::F32, [1, 1], [-1.0, 1.0], (Ignored::None, 0.0));
    let gradient = e.gradient();
    let g = &mut e.case.graph;
    let both = g.reshape(e.loss, &[1]).unwrap();
    let both = g.affine(both, 2.0, 1.0).unwrap();
    e.case.output("both", both);
    e.case.output("gradient", gradient);
    e.case.check(bound(DType::F32));
}

#[test]
fn alone_or_together_the_same() {
    for dtype in [DType::F32, DType::F16] {
        let case = |apart: bool| {
            let mut e = entropy(dtype, [65, 129], [-4.0, 4.0], (Ignored::Some, 0.1));
            let g = &mut e.case.graph;
            // Three, but it takes the loss to know it.
            let scale = if apart { 0.0 } else { 1.0 };
            let three = g.constant(&[1], 3.0).unwrap();
            let from = if apart { e.loss } else { three };
            let offset = if apart { 3.0 } else { 0.0 };
            let seed = g.affine(from, scale, offset).unwrap();
            let gradient = g.gradients_from(e.loss, seed, &[e.logits]).unwrap()[0];
            e.case.output("gradient", gradient);
            assert_eq!(is_paired(&e.case), !apart);
            e.case
        };
        let (together, apart) = (case(false), case(true));
        together.check(bound(dtype));
        apart.check(bound(dtype));
        for gpu in [gpu(), tiled_gpu()] {
            let (a, b) = (together.run_on(&gpu).0, apart.run_on(&gpu).0);
            assert_eq!(a.get("count").unwrap(), b.get("count").unwrap());
            let (a, b) = (a.get("gradient").unwrap(), b.get("gradient").unwrap());
            let far = bound(dtype).relative as f32;
            assert!(
                a.iter()
                    .zip(b)
                    .all(|(a, b)| (a - b).abs() <= far * b.abs() + 1e-7)
            );
        }
    }
}

#[test]
fn one_of_both_takes_no_more_than_it_needs() {
    let case = entropy(DType::F32, [7, 9], [-1.0, 1.0], (Ignored::None, 0.0)).case;
    let names = kernels(&case, &gpu());
    assert_eq!(names, ["cross_entropy", "cross_entropy_total"]);

    let mut case = Case::new(3, DType::F32);
    let (logits, targets) = (case.input(&[7, 9]), case.ids(7, 9));
    let g = &mut case.graph;
    let ce = g.cross_entropy(logits, targets, None, 0.0).unwrap();
    let gradient = g.gradients(ce.loss, &[logits]).unwrap()[0];
    case.output("gradient", gradient);
    let names = kernels(&case, &gpu());
    assert_eq!(names, ["elementwise", "cross_entropy_value_grad"]);
    case.check(bound(DType::F32));
}

/// What the gradient starts from is computed after the loss, though not from it: it moves before it.
#[test]
fn a_joint_loss() {
    for dtype in [DType::F32, DType::F16] {
        let mut e = entropy(dtype, [7, 33], [-2.0, 2.0], (Ignored::Some, 0.0));
        let (y, t) = (e.case.input(&[4, 9]), e.case.input(&[4, 9]));
        let scale = e.case.input_of(&[1], DType::F32, vec![64.0]);
        let g = &mut e.case.graph;
        let kd = g.kd_loss(y, t, 1.0, 1.0).unwrap();
        let part = g.affine(e.loss, 0.3, 0.0).unwrap();
        let product = g.mul(part, kd.cosine).unwrap();
        let loss = g.add(product, kd.loss).unwrap();
        let wanted = [e.logits, y];
        let gradients = g.gradients_from(loss, scale, &wanted).unwrap();
        e.case.output("joint", loss);
        e.case.output("for logits", gradients[0]);
        e.case.output("for y", gradients[1]);
        assert!(is_paired(&e.case));
        e.case.check(bound(dtype));
    }
}

/// Of two losses that scale each other's gradients only one can be computed together with its own.
#[test]
fn losses_that_need_each_other() {
    let mut case = Case::new(4, DType::F32);
    let logits = [case.input(&[7, 33]), case.input(&[5, 12])];
    let targets = [case.ids(7, 33), case.ids(5, 12)];
    let g = &mut case.graph;
    let [a, b] = [0, 1].map(|i| {
        let ce = g.cross_entropy(logits[i], targets[i], Some(3), 0.1);
        ce.unwrap().loss
    });
    let loss = g.mul(a, b).unwrap();
    let gradients = g.gradients(loss, &logits).unwrap();
    case.output("loss", loss);
    case.output("a", gradients[0]);
    case.output("b", gradients[1]);
    let names = kernels(&case, &gpu());
    let count = |wanted: &str| names.iter().filter(|name| *name == wanted).count();
    assert_eq!(count("cross_entropy_value_grad"), 1, "{names:?}");
    assert_eq!(count("cross_entropy_grad"), 1, "{names:?}");
    case.check(bound(DType::F32));
}

/// Two gradients of one loss: the second uses the sums of the first.
#[test]
fn two_gradients_of_one_loss() {
    let mut e = entropy(DType::F32, [7, 33], [-2.0, 2.0], (Ignored::Some, 0.1));
    let first = e.gradient();
    let g = &mut e.case.graph;
    let squared = g.mul(e.loss, e.loss).unwrap();
    let second = g.gradients(squared, &[e.logits]).unwrap()[0];
    e.case.output("first", first);
    e.case.output("second", second);
    let names = kernels(&e.case, &gpu());
    for wanted in ["cross_entropy_value_grad", "cross_entropy_grad"] {
        assert!(names.iter().any(|name| name == wanted), "{names:?}");
    }
    e.case.check(bound(DType::F32));
}
