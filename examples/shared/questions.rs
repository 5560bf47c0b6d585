//! Questions that are given, or asked on stdin.

use std::io::{self, BufRead, IsTerminal, Write};

use super::program::Outcome;

/// Characters of a text that are shown.
const SHOWN: usize = 500;

/// A text for the terminal: its beginning, if it is very long, without control characters.
pub fn shown(text: &str) -> String {
    let mut chars = text.chars();
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    let mut shown: String = chars.by_ref().take(SHOWN).map(plain).collect();
    if chars.next().is_some() {
        shown.push('…');
    }
    shown
}

/// Answers the questions of `ask`; without any, those on stdin, one per line, until it ends. Blank lines are not asked.
///
/// `answer` writes to stdout. Questions that nobody types are printed before their answers.
pub fn converse(ask: &[String], answer: impl Fn(&str, &mut dyn Write) -> Outcome) -> Outcome {
    let mut out = io::stdout();
    for question in ask {
        writeln!(out, "{question}")?;
        answer(question, &mut out)?;
    }
    if !ask.is_empty() {
        return Ok(());
    }
    let terminal = io::stdin().is_terminal();
    if terminal {
        eprintln!("a question per line; Ctrl-D (Windows: Ctrl-Z, Enter) ends");
    }
    let mut questions = io::stdin().lock().lines();
    loop {
        if terminal {
            write!(out, "? ")?;
            out.flush()?;
        }
        let Some(question) = questions.next().transpose()? else {
            return Ok(());
        };
        if question.trim().is_empty() {
            continue;
        }
        if !terminal {
            writeln!(out, "{question}")?;
        }
        answer(&question, &mut out)?;
    }
}
