//! That the runtime finds each kind of fault, and nothing else.

use super::stand_in::metal::{LANGUAGE, Metal, Mode};
use super::stand_in::translate;

fn kernel(body: &str) -> String {
    format!(
        "@group(0) @binding(0) var<storage, read> x: array<u32>;
@group(0) @binding(1) var<storage, read_write> y: array<u32>;
var<workgroup> tile: array<u32, 64>;
@compute @workgroup_size(64)
fn main(@builtin(local_invocation_index) i: u32, @builtin(workgroup_id) wid: vec3<u32>) {{
{body}
}}"
    )
}

/// Runs a workgroup of so many invocations, with f32 and matrices. naga refuses lanes that part, so `x[wid.x]` becomes `x[i]` behind it.
fn run_matrices(metal: &Metal, size: u32, body: &str) -> Result<(), String> {
    let text = kernel(body).replace("array<u32", "array<f32");
    let text = text.replace("size(64)", &format!("size({size})"));
    let text = format!("enable wgpu_cooperative_matrix;\nalias M = coop_mat8x8<f32, C>;\n{text}");
    let parsed = translate::parse(&text)?;
    let made = translate::metal(&parsed, LANGUAGE)?;
    let text = made.text.replace("x[wid.x]", "x[i]");
    let x: Vec<u8> = (0..128u32).flat_map(u32::to_le_bytes).collect();
    let mut memory = [x.clone(), vec![7; x.len()]];
    metal.run_text(&text, &made.glue, &parsed.bindings, [1; 3], &mut memory)
}

/// What a kernel leaves in y, of two workgroups of 64 invocations. x is 0, 1, 2, …
fn run(metal: &Metal, body: &str) -> Result<Vec<u32>, String> {
    run_groups(metal, &kernel(body), 2)
}

fn run_groups(metal: &Metal, text: &str, groups: u32) -> Result<Vec<u32>, String> {
    let x: Vec<u8> = (0..128u32).flat_map(u32::to_le_bytes).collect();
    let mut memory = [x.clone(), vec![7; x.len()]];
    metal.run(text, [groups, 1, 1], &mut memory)?;
    let words = memory[1].chunks_exact(4);
    let words = words.map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    Ok(words.collect())
}

#[test]
fn kernels_compute() {
    let metal = Metal::new(Mode::Plain, 4, 5);
    let reverse = "    let at = wid.x * 64u;
    tile[i] = x[at + i];
    workgroupBarrier();
    y[at + i] = tile[63u - i];";
    let got = run(&metal, reverse).unwrap();
    let wanted: Vec<u32> = (0..128).map(|i| i / 64 * 64 + 63 - i % 64).collect();
    assert_eq!(got, wanted);
    // What a kernel does not write stays.
    let got = run(&metal, "    if (i < 3u) { y[wid.x * 64u + i] = 1u; }").unwrap();
    assert_eq!(got[..4], [1, 1, 1, 0x0707_0707]);
}

#[test]
fn faults_are_found() {
    let metal = Metal::new(Mode::Plain, 4, 5);
    for (body, reason) in [
        // A barrier is missing: before the read, and before the tile is written again.
        (
            "    tile[i] = x[i];\n    y[wid.x * 64u + i] = tile[63u - i];",
            "another byte",
        ),
        (
            "    tile[i] = x[i]; workgroupBarrier(); let a = tile[63u - i]; tile[i] = 2u * i; workgroupBarrier(); y[wid.x * 64u + i] = a + tile[63u - i];",
            "another byte",
        ),
        // Workgroup memory that nobody wrote.
        ("    y[wid.x * 64u + i] = tile[i];", "another byte"),
        // Workgroups of which the last one wins.
        ("    y[i] = wid.x;", "another byte"),
        (
            "    if (x[i] < 32u) { workgroupBarrier(); }\n    y[wid.x * 64u + i] = 1u;",
            "not all invocations",
        ),
        (
            "    if (x[i] < 32u) { workgroupBarrier(); y[i] = 1u; } else { workgroupBarrier(); y[i] = 2u; }",
            "different barriers",
        ),
    ] {
        let found = run(&metal, body);
        assert!(
            found.as_ref().is_err_and(|found| found.contains(reason)),
            "{found:?}\n{body}"
        );
    }
}

#[test]
fn a_kernel_that_loops_for_ever_is_ended() {
    let metal = Metal::new(Mode::Plain, 4, 5).within(1);
    let body = "    loop { y[wid.x * 64u + i] += x[i]; if (x[0] == 1u) { break; } }";
    let found = run(&metal, body);
    let ended = |found: &String| found.contains("the kernel ended its process");
    assert!(found.as_ref().is_err_and(ended), "{found:?}");
    // The next dispatch has a process of its own.
    let body = "    y[wid.x * 64u + i] = x[wid.x * 64u + i];";
    assert_eq!(run(&metal, body), Ok((0..128).collect()));
}

/// Each order has faults that only it finds. Fewer orders than the first one that finds a fault find nothing.
#[test]
fn every_order_finds_its_faults() {
    // Who comes second among three: the same one in order and reversed.
    let second = |n: &str, who: &str| {
        format!("let n = {n}; {n} = n + 1u; if (n == 0x07070708u) {{ y[1] = {who}; }}")
    };
    let among_groups = format!("    if (i == 0u) {{ {} }}", second("y[0]", "wid.x"));
    let among_invocations = format!(
        "    if (i == 0u) {{ tile[0] = 0x07070707u; }} workgroupBarrier(); if (i < 3u) {{ {} }}",
        second("tile[0]", "i")
    );
    for (body, groups, orders) in [
        // Of workgroups and of invocations the last one wins.
        ("    y[i] = wid.x;", 2, 2),
        (
            "    tile[i / 32u] = i; workgroupBarrier(); y[i] = tile[i / 32u];",
            1,
            2,
        ),
        (&*among_groups, 3, 8),
        (&*among_invocations, 1, 8),
    ] {
        let run = |orders| run_groups(&Metal::new(Mode::Plain, orders, 5), &kernel(body), groups);
        assert!(run([1, 2][usize::from(orders > 2)]).is_ok(), "{body}");
        let found = run(orders);
        assert!(
            found
                .as_ref()
                .is_err_and(|found| found.contains("another byte")),
            "{found:?}\n{body}"
        );
    }
}

#[test]
fn faults_of_simdgroups_are_found() {
    let metal = Metal::new(Mode::Plain, 4, 5);
    let copy = "    var c = coopLoad<M>(&x[0], 8u); coopStore(c, &y[0], 8u);";
    run_matrices(&metal, 32, copy).unwrap();
    for (size, body, reason) in [
        (
            32,
            "    if (bitcast<u32>(x[wid.x]) >= 16u) { let c = coopLoad<M>(&x[0], 8u); coopStore(c, &y[0], 8u); }",
            "not all lanes",
        ),
        (
            32,
            "    let c = coopLoad<M>(&x[i], 8u); coopStore(c, &y[0], 8u);",
            "different arguments",
        ),
        (
            32,
            "    let c = coopLoad<M>(&x[0], 8u + i / 16u); coopStore(c, &y[0], 8u);",
            "different arguments",
        ),
        (
            32,
            "    var c = M(); if (bitcast<u32>(x[wid.x]) < 16u) { c = coopLoad<M>(&x[0], 8u); } else { coopStore(c, &y[0], 8u); } coopStore(c, &y[0], 8u);",
            "different functions",
        ),
        (
            16,
            "    let a = coopLoad<coop_mat8x8<f32, A>>(&x[0], 8u); let b = coopLoad<coop_mat8x8<f32, B>>(&x[0], 8u);
    let c = coopMultiplyAdd(a, b, M()); coopStore(c, &y[0], 8u);",
            "incomplete simdgroup",
        ),
        // One SIMD-group reads what the other writes. In step, it would come late enough.
        (
            64,
            "    var c = coopLoad<M>(&x[0], 8u);
    if (bitcast<u32>(x[wid.x]) < 32u) { coopStore(c, &tile[0], 8u); } else {
        coopStore(c, &y[64], 8u); coopStore(c, &y[64], 8u); coopStore(c, &y[64], 8u); coopStore(c, &y[64], 8u);
        y[i - 32u] = tile[i - 32u];
    }",
            "another byte",
        ),
    ] {
        let found = run_matrices(&metal, size, body);
        assert!(
            found.as_ref().is_err_and(|found| found.contains(reason)),
            "{found:?}\n{body}"
        );
    }
}

/// A matrix product that needs each element at its place.
#[test]
fn matrices_are_multiplied() {
    let metal = Metal::new(Mode::Plain, 4, 5);
    for (dtype, enable) in [("f32", ""), ("f16", "enable f16;\n")] {
        let text = format!(
            "enable wgpu_cooperative_matrix;
{enable}@group(0) @binding(0) var<storage, read> x: array<{dtype}>;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;
@compute @workgroup_size(32)
fn main(@builtin(local_invocation_index) i: u32) {{
        let a = coopLoadT<coop_mat8x8<{dtype}, A>>(&x[0], 9u);
        let b = coopLoad<coop_mat8x8<{dtype}, B>>(&x[0], 9u);
        var c = coop_mat8x8<f32, C>();
        c = coopMultiplyAdd(a, b, c);
        c = coopMultiplyAdd(a, b, c);
        coopStoreT(c, &y[0], 10u);
}}"
        );
        // Rows of 9, and sums that f16 does not hold.
        let x: Vec<f32> = (0..72).map(|i| (i * i % 61) as f32).collect();
        let bytes: Vec<u8> = match dtype {
            "f32" => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
            _ => x
                .iter()
                .flat_map(|&x| half::f16::from_f32(x).to_le_bytes())
                .collect(),
        };
        let mut memory = [bytes, vec![0xff; 4 * 80]];
        metal.run(&text, [1; 3], &mut memory).unwrap();
        for (e, bytes) in memory[1].chunks_exact(4).enumerate() {
            let got = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            // B is read by columns, so it is A transposed.
            let row = |r: usize| &x[9 * r..9 * r + 8];
            if e % 10 > 7 {
                assert!(got.is_nan(), "between two rows");
                continue;
            }
            let products = row(e / 10).iter().zip(row(e % 10)).map(|(a, b)| a * b);
            assert_eq!(got, 2.0 * products.sum::<f32>(), "{dtype} {e}");
        }
    }
}

/// Of each sanitizer one fault that it is for.
#[test]
#[ignore = "compiles the runtime for each sanitizer"]
fn sanitizers_find_faults() {
    for (mode, body, reason) in [
        (
            Mode::Address,
            "    y[wid.x * 64u + i] = x[wid.x * 64u + i + 1u];",
            "heap-buffer-overflow",
        ),
        (
            Mode::Address,
            "    y[wid.x * 64u + i] = x[i] / (x[i] - x[i]);",
            "division by zero",
        ),
        (
            Mode::Memory,
            "    y[wid.x * 64u + i] = tile[i];",
            "uninitialised",
        ),
        (
            Mode::Thread,
            "    if (i == 3u) { tile[5] = 1u; } if (i == 4u) { tile[5] = 1u; }\n    y[wid.x * 64u + i] = 1u;",
            "data race",
        ),
        (Mode::Thread, "    y[5] = 1u;", "data race"),
    ] {
        let metal = Metal::new(mode, 3, 5);
        let sound = "    let at = wid.x * 64u;
    tile[i] = x[at + i];
    workgroupBarrier();
    y[at + i] = tile[63u - i];";
        run(&metal, sound).unwrap();
        let found = run(&metal, body);
        assert!(
            found.as_ref().is_err_and(|found| found.contains(reason)),
            "{mode:?} {found:?}\n{body}"
        );
    }
}
