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

/// Answers the questions of `ask`; without any, those on stdin, one per line, until it ends.
pub fn converse(ask: &[String], answer: impl Fn(&str) -> Outcome) -> Outcome {
    for question in ask {
        println!("{question}");
        answer(question)?;
    }
    if !ask.is_empty() {
        return Ok(());
    }
    let terminal = io::stdin().is_terminal();
    let mut questions = io::stdin().lock().lines();
    loop {
        if terminal {
            print!("? ");
            io::stdout().flush()?;
        }
        match questions.next().transpose()? {
            Some(question) => answer(&question)?,
            None => return Ok(()),
        }
    }
}
