//! The texts of a batch on the host: tokens as they come back, and where a text ends.

use super::network::{Doing, States};
use super::options::{DecodeOptions, Finish, Generation, Piece, Stop};
use crate::error::{Error, Result};
use crate::text::Tokenizer;

/// A text in the making.
#[derive(Clone, Debug, Default)]
struct Row {
    tokens: Vec<u32>,
    log_prob: f64,
    finish: Option<Finish>,
    /// The text, once it has ended.
    text: Option<String>,
    /// Tokens and bytes of text that pieces have.
    told: usize,
    told_bytes: usize,
    /// Whether the last piece is out.
    done: bool,
}

/// The texts of a batch.
#[derive(Debug)]
pub(super) struct Rows {
    rows: Vec<Row>,
    /// Place of the first one among all embeddings.
    first: usize,
    max_len: usize,
    stop_tokens: Vec<u32>,
    stop_texts: Vec<String>,
}

impl Rows {
    /// `stop_tokens`: those of the options and the end token.
    pub fn new(first: usize, count: usize, options: &DecodeOptions, stop_tokens: Vec<u32>) -> Self {
        let texts = options.stop.iter().filter_map(|stop| match stop {
            Stop::Text(text) => Some(text.clone()),
            Stop::Token(_) => None,
        });
        Self {
            rows: vec![Row::default(); count],
            first,
            max_len: options.max_len,
            stop_tokens,
            stop_texts: texts.collect(),
        }
    }

    pub fn stop_tokens(&self) -> &[u32] {
        &self.stop_tokens
    }

    pub fn all_ended(&self) -> bool {
        self.rows.iter().all(|row| row.finish.is_some())
    }

    /// Takes the tokens of `steps` steps.
    ///
    /// Fails with [`Error::Data`] when logits of a text that runs were not finite.
    pub fn absorb(
        &mut self,
        steps: usize,
        states: &States,
        tokenizer: &dyn Tokenizer,
    ) -> Result<()> {
        for (number, row) in self.rows.iter_mut().enumerate() {
            if row.finish.is_some() {
                continue;
            }
            let state = states.row(number);
            for i in 0..steps {
                let (token, log_prob) = state.token(i);
                // What a failed row writes is no token.
                if state.doing() == Doing::Failed && log_prob == 0.0 {
                    break;
                }
                row.log_prob += f64::from(log_prob);
                if self.stop_tokens.contains(&token) {
                    row.end(Finish::Stop, None, tokenizer)?;
                    break;
                }
                row.tokens.push(token);
                if let Some(text) = cut(&row.tokens, &self.stop_texts, tokenizer)? {
                    row.end(Finish::Stop, Some(text), tokenizer)?;
                    break;
                }
                if row.tokens.len() == self.max_len {
                    row.end(Finish::Length, None, tokenizer)?;
                    break;
                }
            }
            if row.finish.is_none() && state.doing() == Doing::Failed {
                return Err(Error::Data {
                    name: "z".into(),
                    reason: format!(
                        "text {}: logits after {} tokens are NaN or infinite; with f16 weights, values may be too large: decode in f32",
                        self.first + number,
                        row.tokens.len()
                    ),
                });
            }
        }
        Ok(())
    }

    /// What is new since the last call.
    pub fn pieces(&mut self, tokenizer: &dyn Tokenizer) -> Result<Vec<Piece>> {
        let mut pieces = Vec::new();
        for (number, row) in self.rows.iter_mut().enumerate() {
            if row.done || (row.tokens.len() == row.told && row.finish.is_none()) {
                continue;
            }
            let text = match &row.text {
                Some(text) => text.clone(),
                None => {
                    let mut text = tokenizer.decode(&row.tokens)?;
                    // The last word may go on, and a stop text may have begun.
                    text.truncate(text.rfind(char::is_whitespace).unwrap_or(0));
                    let begun = self.stop_texts.iter().filter_map(|stop| {
                        let begins = |at: &usize| stop.starts_with(&text[*at..]);
                        text.char_indices().map(|(at, _)| at).find(begins)
                    });
                    text.truncate(begun.min().unwrap_or(text.len()));
                    text
                }
            };
            // What a tokenizer changes that is out already stays as it was.
            let new = text.get(row.told_bytes..).unwrap_or_default();
            row.told_bytes += new.len();
            pieces.push(Piece {
                row: self.first + number,
                tokens: row.tokens[row.told..].to_vec(),
                text: new.to_owned(),
                finish: row.finish,
            });
            row.told = row.tokens.len();
            row.done = row.finish.is_some();
        }
        Ok(pieces)
    }

    /// All texts, which have ended.
    pub fn finish(self) -> impl Iterator<Item = Generation> {
        self.rows.into_iter().map(|row| Generation {
            tokens: row.tokens,
            text: row.text.unwrap_or_default(),
            finish: row.finish.unwrap_or(Finish::Length),
            log_prob: row.log_prob,
        })
    }
}

impl Row {
    /// `text`: unless it is that of the tokens.
    fn end(&mut self, why: Finish, text: Option<String>, tokenizer: &dyn Tokenizer) -> Result<()> {
        self.text = Some(match text {
            Some(text) => text,
            None => tokenizer.decode(&self.tokens)?,
        });
        self.finish = Some(why);
        Ok(())
    }
}

/// The text of the tokens before the first stop text, if it has one.
fn cut(tokens: &[u32], stops: &[String], tokenizer: &dyn Tokenizer) -> Result<Option<String>> {
    if stops.is_empty() {
        return Ok(None);
    }
    let mut text = tokenizer.decode(tokens)?;
    let first = stops.iter().filter_map(|stop| text.find(stop)).min();
    Ok(first.map(|at| {
        text.truncate(at);
        text
    }))
}
