//! Questions that are given, or asked on stdin.

use std::io::{self, BufRead, IsTerminal, Write};

use super::program::Outcome;

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
