//! Faults that are put into Metal's text of recorded dispatches. The runtime must notice each, or the list below says why it cannot.

use std::collections::BTreeMap;
use std::sync::Mutex;

use super::stand_in::metal::{LANGUAGE, Metal, Mode};
use super::stand_in::record::Case;
use super::stand_in::translate;
use super::{cases, each, some};

/// Dispatches per template.
const DISPATCHES: usize = 6;
/// Indices that are shifted per dispatch.
const SHIFTS: usize = 24;

/// What runs, for every mutant of a case.
fn mutants(text: &str) -> Vec<(String, String)> {
    let mut all = Vec::new();
    for call in ["threadgroup_barrier(", "simdgroup_barrier("] {
        for (at, _) in text.match_indices(&format!("metal::{call}")) {
            let end = text[at..].find(';').map_or(text.len(), |end| at + end + 1);
            let mutant = format!("{}{}", &text[..at], &text[end..]);
            all.push((format!("without {}", line(text, at)), mutant));
        }
    }
    let places = indices(text);
    let step = places.len().div_ceil(SHIFTS).max(1);
    for &(open, close) in places.iter().step_by(step) {
        let mutant = format!(
            "{}(({}) + 1){}",
            &text[..=open],
            &text[open + 1..close],
            &text[close..]
        );
        all.push((format!("shifted {}", line(text, open)), mutant));
    }
    all
}

/// The line of a position, with its number and the line before it.
fn line(text: &str, at: usize) -> String {
    let number = text[..at].matches('\n').count();
    let lines: Vec<&str> = text
        .lines()
        .skip(number.saturating_sub(1))
        .take(2)
        .map(str::trim)
        .collect();
    format!("{number}: {}", lines.join(" | "))
}

/// Brackets of indices that the entry point and its functions compute: not those of declarations, attributes and components of vectors.
fn indices(text: &str) -> Vec<(usize, usize)> {
    let bytes = text.as_bytes();
    let mut places = Vec::new();
    for (open, _) in text.match_indices('[') {
        let before = bytes[..open].last().copied().unwrap_or(b' ');
        if !(before.is_ascii_alphanumeric() || before == b'_' || before == b')') {
            continue;
        }
        let mut depth = 0;
        let close = text[open..].bytes().position(|byte| {
            match byte {
                b'[' => depth += 1,
                b']' => depth -= 1,
                _ => {}
            }
            depth == 0
        });
        let Some(close) = close.map(|close| open + close) else {
            continue;
        };
        let inside = &text[open + 1..close];
        let constant = inside
            .bytes()
            .all(|byte| byte.is_ascii_digit() || byte == b'u');
        if inside.is_empty() || inside.starts_with('[') || constant {
            continue;
        }
        places.push((open, close));
    }
    places
}

/// Why no run can notice a mutant of a line, by a part of the line and the template: all of them were looked at.
const EQUIVALENT: [(&str, &str, &str); 0] = [];

#[test]
#[ignore = "takes minutes and needs recorded dispatches"]
fn every_mutant_is_noticed() {
    let metal = Metal::new(Mode::Plain, 4, 3);
    let small = |case: &Case| case.before.iter().map(Vec::len).sum::<usize>() < 1 << 18;
    let cases: Vec<Case> = some(cases().into_iter().filter(small).collect(), DISPATCHES);
    // By template: mutants, and those that survive.
    let counts = Mutex::new(BTreeMap::<String, [usize; 4]>::new());
    let survivors = Mutex::new(Vec::new());
    let failures = each(&cases, |case| {
        let parsed = translate::parse(&case.wgsl)?;
        let made = translate::metal(&parsed, LANGUAGE)?;
        let run = |text: &str| {
            let mut memory = case.before.clone();
            metal.run_text(
                text,
                &made.glue,
                &parsed.bindings,
                case.workgroups,
                &mut memory,
            )?;
            Ok::<_, String>(memory == case.after)
        };
        if run(&made.text) != Ok(true) {
            return Err("does not compute what was recorded".to_owned());
        }
        for (what, mutant) in mutants(&made.text) {
            let barrier = what.starts_with("without");
            let survives = run(&mutant) == Ok(true);
            let mut counts = counts.lock().unwrap();
            let count = counts.entry(case.template().to_owned()).or_default();
            let at = if barrier { 0 } else { 2 };
            count[at] += 1;
            if survives {
                count[at + 1] += 1;
                let known = EQUIVALENT
                    .iter()
                    .any(|(template, text, _)| *template == case.template() && what.contains(text));
                if !known {
                    let short: String = case.key.chars().take(160).collect();
                    survivors
                        .lock()
                        .unwrap()
                        .push(format!("{short}\n    {what}"));
                }
            }
        }
        Ok(())
    });
    println!("template: barriers dropped, of which unnoticed; indices shifted, of which unnoticed");
    for (template, [barriers, kept, shifts, same]) in counts.into_inner().unwrap() {
        println!("{template}: {barriers}, {kept}; {shifts}, {same}");
    }
    let survivors = survivors.into_inner().unwrap();
    println!("{} dispatches, {} survivors", cases.len(), survivors.len());
    for survivor in &survivors {
        println!("{survivor}");
    }
    assert!(failures.is_empty(), "{failures:?}");
    assert!(
        survivors.is_empty(),
        "{} mutants were not noticed",
        survivors.len()
    );
}
