//! That each kind of fault is found, and nothing else.

use super::*;

mod decode;
mod graphs;
mod grids;
mod links;
mod network;
mod top_k;

/// What running one workgroup of `wgsl` on x, 8 u32, and y, 8 u32, finds.
fn faults(wgsl: &str, subgroup: usize) -> Vec<(String, Kind)> {
    let (mut memories, bound) = two();
    let faults = run_text(wgsl, subgroup, &bound, &mut memories, 1, &[[0; 3]]);
    let each = faults.into_iter().map(|fault| (fault.variable, fault.kind));
    each.collect()
}

fn two() -> ([Memory; 2], [Bound; 2]) {
    let memory = |first: u32| {
        let numbers = (0..8).flat_map(|i| (first + i).to_le_bytes());
        Memory::of(numbers.collect())
    };
    let bound = |memory| Bound {
        memory,
        offset: 0,
        len: 32,
    };
    ([memory(0), memory(100)], [bound(0), bound(1)])
}

fn kernel(body: &str) -> String {
    format!(
        "@group(0) @binding(0) var<storage, read> x: array<u32>;
@group(0) @binding(1) var<storage, read_write> y: array<u32>;
var<workgroup> tile: array<u32, 8>;
@compute @workgroup_size(8)
fn main(@builtin(local_invocation_index) i: u32, @builtin(workgroup_id) wid: vec3<u32>) {{
{body}
}}"
    )
}

#[test]
fn a_sound_kernel_computes() {
    let text = kernel(
        "    tile[i] = x[i] * 2u;
    workgroupBarrier();
    var sum = 0u;
    for (var k = 0u; k <= i; k++) { if (k == 5u) { continue; } sum += tile[k]; }
    y[7u - i] = sum;",
    );
    let (mut memories, bound) = two();
    let faults = run_text(&text, 1, &bound, &mut memories, 1, &[[0; 3]]);
    assert!(faults.is_empty(), "{faults:?}");
    let numbers = memories[1].bytes().chunks_exact(4);
    let numbers: Vec<u8> = numbers.map(|bytes| bytes[0]).collect();
    assert_eq!(numbers, [46, 32, 20, 20, 12, 6, 2, 0]);
}

#[test]
fn each_fault_is_found() {
    let cases = [
        ("    y[i] = x[i + 1u];", "x", Kind::ReadOutside),
        // What is masked afterwards was read all the same.
        (
            "    y[i] = select(0u, x[i + 1u], i < 7u);",
            "x",
            Kind::ReadOutside,
        ),
        ("    y[i + 1u] = x[i];", "y", Kind::WriteOutside),
        ("    y[i] = tile[i];", "tile", Kind::Uninitialised),
        ("    tile[i] = 0u; y[i] = tile[i ^ 1u];", "tile", Kind::Race),
        (
            "    tile[i] = 0u; subgroupBarrier(); y[i] = tile[i ^ 1u];",
            "tile",
            Kind::Race,
        ),
        ("    tile[0] = i;", "tile", Kind::Race),
        ("    y[i / 2u] = i;", "y", Kind::Race),
        ("    y[i] = y[i ^ 1u];", "y", Kind::Race),
    ];
    for (body, variable, kind) in cases {
        let found = faults(&kernel(body), 8);
        assert_eq!(found, [(variable.to_owned(), kind)], "{body}");
    }
}

#[test]
fn accesses_that_a_condition_prevents_are_none() {
    let text = kernel("    if (i < 7u) { y[i] = x[i + 1u]; }");
    assert_eq!(faults(&text, 1), []);
    let text = kernel("    if (i == 7u) { return; }\n    y[i] = x[i + 1u];");
    assert_eq!(faults(&text, 1), []);
}

/// Of one workgroup, and only behind the barrier.
#[test]
fn a_storage_barrier_orders_storage() {
    let text = kernel(
        "    let x = y[0]; let z = y[i]; storageBarrier(); if (i == 0u) { y[1] = x + z; y[0] = x; }",
    );
    assert_eq!(faults(&text, 1), []);
    let text = kernel("    storageBarrier(); let x = y[0]; if (i == 0u) { y[0] = x; }");
    assert_eq!(faults(&text, 1), [("y".to_owned(), Kind::Race)]);
    let text = kernel("    let x = y[0]; storageBarrier(); if (i == 0u) { y[0] = x; }");
    let (mut memories, bound) = two();
    let found = run_text(&text, 1, &bound, &mut memories, 1, &[[0; 3], [1, 0, 0]]);
    assert_eq!(found[0].kind, Kind::Race);
}

#[test]
#[should_panic(expected = "a barrier that only some invocations reach")]
fn barriers_in_a_branch_are_refused() {
    faults(&kernel("    if (x[i] < 4u) { workgroupBarrier(); }"), 1);
}

#[test]
fn matrices_are_multiplied_and_their_memory_is_checked() {
    let text = |first: u32| {
        format!(
            "enable wgpu_cooperative_matrix;
@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;
@compute @workgroup_size(8)
fn main(@builtin(local_invocation_index) i: u32) {{
    let a = coopLoadT<coop_mat8x8<f32, A>>(&x[{first}], 8u);
    let b = coopLoad<coop_mat8x8<f32, B>>(&x[0], 8u);
    var c = coop_mat8x8<f32, C>();
    c = coopMultiplyAdd(a, b, c);
    coopStoreT(c, &y[0], 8u);
}}"
        )
    };
    let x: Vec<f32> = (0..64).map(|i| (i * i % 11) as f32).collect();
    let bytes = x.iter().flat_map(|x| x.to_le_bytes()).collect();
    let bound = [0, 1].map(|memory| Bound {
        memory,
        offset: 0,
        len: 256,
    });
    let mut memories = [Memory::of(bytes), Memory::poisoned(256)];
    let found = run_text(&text(0), 8, &bound, &mut memories, 1, &[[0; 3]]);
    assert!(found.is_empty(), "{found:?}");
    let y = memories[1].bytes().chunks_exact(4);
    for (e, bytes) in y.enumerate() {
        let y = f32::from_le_bytes([0, 1, 2, 3].map(|i| bytes[i]));
        // B is read by columns, so it is A transposed.
        let row = |r: usize| &x[8 * r..8 * r + 8];
        let wanted: f32 = row(e / 8).iter().zip(row(e % 8)).map(|(a, b)| a * b).sum();
        assert_eq!(y, wanted, "{e}");
    }
    let found = run_text(&text(1), 8, &bound, &mut memories, 2, &[[0; 3]]);
    let found: Vec<_> = found
        .iter()
        .map(|f| (f.variable.as_str(), f.kind))
        .collect();
    assert_eq!(found, [("x", Kind::ReadOutside)]);
}
