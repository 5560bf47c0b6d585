//! Faults that are put into Metal's text of recorded dispatches. The runtime must notice each, or the list below says why it cannot.

use std::collections::BTreeMap;
use std::sync::Mutex;

use super::stand_in::metal::{LANGUAGE, Metal, Mode};
use super::stand_in::record::Case;
use super::stand_in::translate;
use super::{agrees, cases, each, some};

/// Dispatches per template in the first round. In the second, all others try what was not noticed yet.
const DISPATCHES: usize = 8;
/// Indices that are shifted per dispatch in the first round; in the second, all.
const SHIFTS: usize = 8;
/// Mutants of a site per dispatch in the second round.
const MOST: usize = 12;
/// A mutant that takes longer loops for ever. Small dispatches take less than a second.
const SECONDS: u64 = 20;

/// What runs, for every mutant of a case: all of them, or those of some indices.
fn mutants(text: &str, shifts: usize) -> Vec<(String, String)> {
    let mut all = Vec::new();
    for call in ["threadgroup_barrier(", "simdgroup_barrier("] {
        for (at, _) in text.match_indices(&format!("metal::{call}")) {
            let end = text[at..].find(';').map_or(text.len(), |end| at + end + 1);
            let mutant = format!("{}{}", &text[..at], &text[end..]);
            all.push((format!("without {}", line(text, at)), mutant));
        }
    }
    let mut places = indices(text);
    places.retain(|&(open, _)| is_called(text, open));
    let step = places.len().div_ceil(shifts).max(1);
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

/// Whether the function around a position is called: each binding has functions to load and store that a kernel may not need.
fn is_called(text: &str, at: usize) -> bool {
    let mut lines = text[..at].lines().rev();
    let header = lines.find(|line| line.ends_with('(') && !line.starts_with(char::is_whitespace));
    let name = header.and_then(|line| line.trim_end_matches('(').rsplit(' ').next());
    name.is_none_or(|name| {
        let call = format!("{name}(");
        // Not the end of another name.
        let begins = |(at, _): &(usize, &str)| {
            let before = text[..*at].bytes().next_back();
            !before.is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        };
        name == "main_" || text.match_indices(&call).filter(begins).count() > 1
    })
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

/// Why no run can notice a mutant: beginning of the template's name, kind and a part of the site, and the reason.
const EQUIVALENT: [(&str, &str, &str, &str); 11] = [
    (
        "",
        "without",
        "uint lane = lid_# % #u; | metal::threadgroup_barrier",
        "`reduce` first waits for readers of its scratch memory, which are there only where a kernel calls it twice",
    ),
    (
        "total",
        "shifted",
        "scratch.inner[lid_# + #u]",
        "the sums that are recorded have few parts, and the other invocations hold zeros; norm_partial has the same lines",
    ),
    (
        "cross_entropy_count",
        "shifted",
        "scratch.inner[lid_# + #u]",
        "few invocations hold a count, the others zeros; norm_partial has the same lines",
    ),
    (
        "cross_entropy_count",
        "shifted",
        "targets[i]",
        "a count stays the same where all targets move by one and the first one counts; the sanitizer sees the read behind the end",
    ),
    (
        "attention_cooperative",
        "without",
        "inverses.inner[own] = inverse;",
        "sums go where matrices of the same SIMD-group were read, whose functions wait for its lanes; a device may need the barrier",
    ),
    (
        "attention_cooperative",
        "without",
        "NagaCooperativeLoad(&s_tile",
        "sums go where matrices of the same SIMD-group were read, whose functions wait for its lanes; a device may need the barrier",
    ),
    (
        "attention_cooperative",
        "without",
        "sum = (_e# + _e#) + (_e# + _e#);",
        "probabilities go to matrices of their own SIMD-group, whose functions wait for its lanes; a device may need the barrier",
    ),
    (
        "attention_cooperative",
        "without",
        "atomic_load_explicit(&grew",
        "the second barrier of workgroupUniformLoad; the flag is cleared behind a later one, and probabilities are as above",
    ),
    (
        "decode_sample",
        "shifted",
        "options[#u + word_#]",
        "which tokens stop: whether a recorded dispatch draws one is chance; `decode::usage::texts_end_where_they_should` notices it",
    ),
    (
        "decode_sample",
        "without",
        "unnamed = folded;",
        "the second barrier of workgroupUniformLoad; who writes there next waits before",
    ),
    (
        "decode_sample",
        "without",
        "mem_flags::mem_device",
        "all reads come before barriers of the reduction; this one orders storage, which the runtime keeps in order",
    ),
];

/// A line without its numbers, which differ from kernel to kernel.
fn site(what: &str) -> String {
    let mut text = String::new();
    for c in what.chars() {
        match c.is_ascii_digit() {
            true if text.ends_with('#') => {}
            true => text.push('#'),
            false => text.push(c),
        }
    }
    text
}

/// A site is a line of a template. Each has to be noticed in one of the dispatches at least: in others its memory may hold nothing but zeros.
#[test]
#[ignore = "takes minutes and needs recorded dispatches"]
fn every_mutant_is_noticed() {
    let metal = Metal::new(Mode::Plain, 4, 3).within(SECONDS).apart();
    let small = |case: &Case| case.before.iter().map(Vec::len).sum::<usize>() < 1 << 18;
    let asked = std::env::var("ENERGYFLOW_MUTANTS").unwrap_or_default();
    let wanted = |case: &Case| small(case) && case.template().starts_with(&asked);
    let mut rest: Vec<Case> = cases().into_iter().filter(wanted).collect();
    assert!(!rest.is_empty(), "no template begins with {asked}");
    let first = some(rest.clone(), DISPATCHES);
    rest.retain(|case| first.iter().all(|other| other.wgsl != case.wgsl));
    // By template and site: mutants, and how many of them were noticed.
    let sites = Mutex::new(BTreeMap::<(String, String), [usize; 2]>::new());
    let key = |case: &Case, what: &str| (case.template().to_owned(), site(what));
    let check = |case: &Case, round: usize| {
        let parsed = translate::parse(&case.wgsl)?;
        let made = translate::metal(&parsed, LANGUAGE)?;
        let (glue, bindings) = (&made.glue, &parsed.bindings);
        let run = |text: &str| {
            let mut memory = case.before.clone();
            metal.run_text(text, glue, bindings, case.workgroups, &mut memory)?;
            Ok::<_, String>(memory)
        };
        let mut mutants = mutants(&made.text, [SHIFTS, usize::MAX][round]);
        if round > 0 {
            let sites = sites.lock().unwrap();
            let mut taken = BTreeMap::<String, usize>::new();
            mutants.retain(|(what, _)| {
                let count = taken.entry(site(what)).or_default();
                *count += 1;
                *count <= MOST && matches!(sites.get(&key(case, what)), Some([_, 0]))
            });
            if mutants.is_empty() {
                return Ok(());
            }
        }
        let sound = run(&made.text)?;
        agrees(case, &sound)?;
        for (_, mutant) in &mutants {
            metal.prepare_text(mutant, glue, bindings);
        }
        for (what, mutant) in mutants {
            metal.compiled_text(&mutant, glue, bindings)?;
            let noticed = run(&mutant).as_ref() != Ok(&sound);
            let mut sites = sites.lock().unwrap();
            let count = sites.entry(key(case, &what)).or_default();
            count[0] += 1;
            count[1] += usize::from(noticed);
        }
        Ok(())
    };
    let mut failures = each(&first, |case| check(case, 0));
    // The dispatches of the first round may have skipped the index that shows.
    let all = [first, rest].concat();
    failures.extend(each(&all, |case| check(case, 1)));
    let sites = sites.into_inner().unwrap();
    // By template: sites, and those of which no mutant was noticed, of barriers and of indices.
    let mut counts = BTreeMap::<&str, [usize; 4]>::new();
    let mut unexplained = Vec::new();
    for ((template, site), [_, noticed]) in &sites {
        let count = counts.entry(template).or_default();
        let at = if site.starts_with("without") { 0 } else { 2 };
        count[at] += 1;
        if *noticed > 0 {
            continue;
        }
        count[at + 1] += 1;
        let reason = EQUIVALENT.iter().find(|(of, kind, part, _)| {
            template.starts_with(of) && site.starts_with(kind) && site.contains(part)
        });
        match reason {
            Some((.., reason)) => println!("{template}: {site}: {reason}"),
            None => unexplained.push(format!("{template}: {site}")),
        }
    }
    println!("template: barriers dropped, unnoticed; indices shifted, unnoticed");
    for (template, [barriers, kept, shifts, same]) in counts {
        println!("{template}: {barriers}, {kept}; {shifts}, {same}");
    }
    let mutants: usize = sites.values().map(|[all, _]| all).sum();
    println!("{} dispatches, {mutants} mutants", all.len());
    assert!(failures.is_empty(), "{failures:?}");
    assert!(unexplained.is_empty(), "{}", unexplained.join("\n"));
}
