//! That the runtime finds each kind of fault, and nothing else.

use super::stand_in::metal::{Metal, Mode};

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

/// What a kernel leaves in y, of two workgroups of 64 invocations. x is 0, 1, 2, …
fn run(metal: &Metal, body: &str) -> Result<Vec<u32>, String> {
    let x: Vec<u8> = (0..128u32).flat_map(u32::to_le_bytes).collect();
    let mut memory = [x.clone(), vec![7; x.len()]];
    metal.run(&kernel(body), [2, 1, 1], &mut memory)?;
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
        let a = coopLoadT<coop_mat8x8<{dtype}, A>>(&x[0], 8u);
        let b = coopLoad<coop_mat8x8<{dtype}, B>>(&x[0], 8u);
        var c = coop_mat8x8<f32, C>();
        c = coopMultiplyAdd(a, b, c);
        coopStoreT(c, &y[0], 8u);
}}"
        );
        let x: Vec<f32> = (0..64).map(|i| (i * i % 11) as f32).collect();
        let bytes: Vec<u8> = match dtype {
            "f32" => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
            _ => x
                .iter()
                .flat_map(|&x| half::f16::from_f32(x).to_le_bytes())
                .collect(),
        };
        let mut memory = [bytes, vec![0xff; 256]];
        metal.run(&text, [1; 3], &mut memory).unwrap();
        for (e, bytes) in memory[1].chunks_exact(4).enumerate() {
            let got = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            // B is read by columns, so it is A transposed.
            let row = |r: usize| &x[8 * r..8 * r + 8];
            let wanted: f32 = row(e / 8).iter().zip(row(e % 8)).map(|(a, b)| a * b).sum();
            assert_eq!(got, wanted, "{dtype} {e}");
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
