//! What other platforms do with the kernels: Metal's text executed on the CPU, with sanitizers and with mutations, SPIR-V validated, HLSL
//! compiled, WGSL accepted by a browser.
//!
//! The tests that are ignored take recorded dispatches, one of each kernel, from the folder `ENERGYFLOW_CASES`. `scripts/check metal` and
//! `scripts/check platforms` record them by running the other test programs, and run these tests. `ENERGYFLOW_CASES_PER_TEMPLATE` takes
//! fewer.

#[path = "platforms/browser.rs"]
mod browser;
#[path = "platforms/mutants.rs"]
mod mutants;
#[path = "platforms/runtime.rs"]
mod runtime;
mod stand_in;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use stand_in::metal::{Metal, Mode, seed};
use stand_in::record::Case;
use stand_in::{dxc, translate};

/// The recorded dispatches.
fn cases() -> Vec<Case> {
    let folder = std::env::var_os("ENERGYFLOW_CASES").map(PathBuf::from);
    let folder = folder.unwrap_or_else(|| stand_in::metal::compiler::folder().join("cases"));
    let cases = Case::all(&folder);
    assert!(!cases.is_empty(), "{}: no cases", folder.display());
    match std::env::var("ENERGYFLOW_CASES_PER_TEMPLATE") {
        Ok(most) => some(cases, most.parse().expect("a number")),
        Err(_) => cases,
    }
}

/// Some of every template, among them the first and the last.
fn some(cases: Vec<Case>, most: usize) -> Vec<Case> {
    let mut by_template: BTreeMap<String, Vec<Case>> = BTreeMap::new();
    for case in cases {
        let template = case.template().to_owned();
        by_template.entry(template).or_default().push(case);
    }
    let mut chosen = Vec::new();
    for mut of_one in by_template.into_values() {
        let all = of_one.len();
        let keep = |i: usize| {
            all <= most || i * (most - 1) / (all - 1) != (i + 1) * (most - 1) / (all - 1)
        };
        let mut i = 0;
        of_one.retain(|_| {
            i += 1;
            i == all || keep(i - 1)
        });
        chosen.extend(of_one);
    }
    chosen
}

/// Does this with every case, on all cores, and returns the failures.
fn each(cases: &[Case], check: impl Fn(&Case) -> Result<(), String> + Sync) -> Vec<String> {
    let next = AtomicUsize::new(0);
    let failures = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..stand_in::metal::compiler::cores() {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(reason) = check(case) {
                        failures
                            .lock()
                            .unwrap()
                            .push(format!("{}\n{reason}", case.key));
                    }
                }
            });
        }
    });
    failures.into_inner().unwrap()
}

fn report(what: &str, count: usize, failures: &[String]) {
    println!("{what}: {} of {count} passed", count - failures.len());
    let first: Vec<&str> = failures.iter().take(5).map(String::as_str).collect();
    assert!(failures.is_empty(), "{what}:\n{}", first.join("\n\n"));
}

/// Runs the cases again, compiled with a sanitizer. They leave the same bytes as without.
fn sanitize(mode: Mode, cases: &[Case]) {
    let seed = seed();
    println!("seed {seed}");
    let (metal, plain) = (Metal::new(mode, 3, seed), Metal::new(Mode::Plain, 1, seed));
    for case in cases {
        metal.prepare(&case.wgsl).unwrap();
        plain.prepare(&case.wgsl).unwrap();
    }
    let failures = each(cases, |case| {
        let run = |metal: &Metal| {
            let mut memory = case.before.clone();
            metal.run(&case.wgsl, case.workgroups, &mut memory)?;
            Ok::<_, String>(memory)
        };
        let without = run(&plain)?;
        agrees(case, &without)?;
        match run(&metal)? == without {
            true => Ok(()),
            false => Err("leaves other bytes than without the sanitizer".to_owned()),
        }
    });
    report(&format!("{mode:?}"), cases.len(), &failures);
}

/// Whether this is what was recorded, but for rounding: the dispatch may be one of an adapter, whose exp has other last digits.
fn agrees(case: &Case, memory: &[Vec<u8>]) -> Result<(), String> {
    for (i, (got, wanted)) in memory.iter().zip(&case.after).enumerate() {
        let error = far(got, wanted, &case.dtypes()[i]);
        if error > 2e-3 {
            return Err(format!("binding {i} is not as recorded: {error:.1e}"));
        }
    }
    Ok(())
}

#[test]
#[ignore = "takes minutes and needs recorded dispatches"]
fn address_and_undefined_behaviour() {
    sanitize(Mode::Address, &cases());
}

#[test]
#[ignore = "takes minutes and needs recorded dispatches"]
fn memory() {
    sanitize(Mode::Memory, &cases());
}

#[test]
#[ignore = "takes minutes and needs recorded dispatches"]
fn thread() {
    sanitize(Mode::Thread, &some(cases(), 8));
}

/// Every kernel compiles for all platforms with wgpu's options; HLSL has no matrix units.
#[test]
#[ignore = "needs recorded dispatches and the DirectX shader compiler"]
fn direct3d() {
    let cases = cases();
    let with: Vec<Case> = cases
        .into_iter()
        .filter(|case| !case.wgsl.contains("wgpu_cooperative_matrix"))
        .collect();
    let failures = each(&with, |case| dxc::dxil(&case.wgsl).map(drop));
    report("DXIL", with.len(), &failures);
    let failures = each(&with, |case| {
        let words = dxc::spirv(&case.wgsl)?;
        validate(&words, "vulkan1.1")
    });
    report("SPIR-V of HLSL", with.len(), &failures);
}

/// Validates SPIR-V with `spirv-val`, or the command `$SPIRV_VAL`.
fn validate(words: &[u32], environment: &str) -> Result<(), String> {
    let program = std::env::var("SPIRV_VAL").unwrap_or_else(|_| "spirv-val".to_owned());
    let mut words_of_it = program.split_whitespace();
    let mut child = Command::new(words_of_it.next().unwrap_or_default())
        .args(words_of_it)
        .args(["--target-env", environment, "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("{program}: {error} (package spirv-tools)"))?;
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let mut stdin = child.stdin.take().ok_or("no pipe")?;
    stdin.write_all(&bytes).map_err(|error| error.to_string())?;
    drop(stdin);
    let output = child
        .wait_with_output()
        .map_err(|error| error.to_string())?;
    match output.status.success() {
        true => Ok(()),
        false => {
            let text = [output.stdout, output.stderr].concat();
            Err(String::from_utf8_lossy(&text).into_owned())
        }
    }
}

/// For the environments of Vulkan 1.1 and 1.3, as wgpu chooses by the device. Findings that are naga's are in docs/portability.md; each is
/// recognised by its text.
#[test]
#[ignore = "needs recorded dispatches and spirv-val"]
fn spirv() {
    let known: &[(&str, &str)] = &[
        (
            "VUID-StandaloneSpirv-None-10684",
            "ArrayStride on an array in workgroup memory",
        ),
        (
            "Invalid capability operand: 6022",
            "this spirv-val knows no matrix units",
        ),
        (
            "Invalid storage class",
            "this spirv-val knows no matrix units",
        ),
        ("CooperativeMatrix", "this spirv-val knows no matrix units"),
    ];
    let cases = cases();
    let found = Mutex::new(BTreeMap::<&str, usize>::new());
    let failures = each(&cases, |case| {
        let parsed = translate::parse(&case.wgsl)?;
        for (version, environment) in [((1, 3), "vulkan1.1"), ((1, 6), "vulkan1.3")] {
            let words = translate::vulkan(&parsed, version)?;
            if let Err(reason) = validate(&words, environment) {
                let finding = known.iter().find(|(text, _)| reason.contains(text));
                let (_, finding) = finding.ok_or(reason)?;
                *found.lock().unwrap().entry(finding).or_default() += 1;
            }
        }
        Ok(())
    });
    println!("known findings: {:?}", found.into_inner().unwrap());
    report("SPIR-V", 2 * cases.len(), &failures);
}

/// As Metal compiles by default, clang may assume that there is no NaN and that sums can be reordered. What changes is told, not judged: only
/// a Mac shows what its compiler does.
#[test]
#[ignore = "takes minutes and needs recorded dispatches"]
fn fast_math() {
    let metal = Metal::new(Mode::Fast, 1, 2);
    let cases = cases();
    for case in &cases {
        metal.prepare(&case.wgsl).unwrap();
    }
    let changed = Mutex::new(BTreeMap::<String, (usize, f64)>::new());
    let failures = each(&cases, |case| {
        let mut memory = case.before.clone();
        metal.run(&case.wgsl, case.workgroups, &mut memory)?;
        for ((got, wanted), dtype) in memory.iter().zip(&case.after).zip(case.dtypes()) {
            let error = far(got, wanted, &dtype);
            if error > 1e-3 {
                let mut changed = changed.lock().unwrap();
                let of_one = changed.entry(case.template().to_owned()).or_default();
                *of_one = (of_one.0 + 1, of_one.1.max(error));
            }
        }
        Ok(())
    });
    for (template, (times, worst)) in changed.into_inner().unwrap() {
        println!("{template}: {times} kernels differ, at most {worst:.1e}");
    }
    report("fast math", cases.len(), &failures);
}

/// Largest |a − b| / (|b| + rms of b); infinite where one of two is not a number.
fn far(got: &[u8], wanted: &[u8], dtype: &str) -> f64 {
    let numbers = |bytes: &[u8]| -> Vec<f64> {
        match dtype {
            "f16" => bytes
                .chunks_exact(2)
                .map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f64())
                .collect(),
            "f32" => bytes
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]).into())
                .collect(),
            _ => bytes
                .chunks_exact(4)
                .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]).into())
                .collect(),
        }
    };
    let (got, wanted) = (numbers(got), numbers(wanted));
    let finite: Vec<f64> = wanted.iter().copied().filter(|x| x.is_finite()).collect();
    let rms = (finite.iter().map(|x| x * x).sum::<f64>() / finite.len().max(1) as f64).sqrt();
    let pairs = got.iter().zip(&wanted);
    let each = pairs.map(|(a, b)| match (a == b, a.is_nan() && b.is_nan()) {
        (true, _) | (_, true) => 0.0,
        _ if (a - b).is_finite() => (a - b).abs() / (b.abs() + rms),
        _ => f64::INFINITY,
    });
    each.fold(0.0, f64::max)
}
