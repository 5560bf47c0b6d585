//! How text is decoded, and what comes of it.

use crate::error::{Error, Result};
use crate::setters::setters;

/// What ends a text beside the tokenizer's end token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// This token. It is not part of the result.
    Token(u32),
    /// This text, which must not be empty. The result is cut before it.
    Text(String),
}

impl From<u32> for Stop {
    fn from(token: u32) -> Self {
        Self::Token(token)
    }
}

impl From<&str> for Stop {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Stop {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

/// How the next token is chosen, and when a text ends.
///
/// The logits of the tokens that a text already has, its start token included, are first made worse by the repetition penalty. With
/// temperature 0 the next token is then the one of the largest logit, of equal ones the first. Otherwise they are divided by the
/// temperature, all but the `top_k` largest are left out, then all but the smallest set of the most likely tokens whose probability
/// is `top_p`, and the token is drawn from the rest. Tokens as likely as the last one of a set belong to it, too.
///
/// A draw depends on the seed, the number of the text and the position, and on nothing else: not on the other texts, nor on how many
/// there are.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct DecodeOptions {
    /// Upper bound on the number of tokens per text, at least 1. It may be larger than the length that the decoder was trained with.
    pub max_len: usize,
    /// 0 for the most likely token; otherwise what logits are divided by before a token is drawn.
    pub temperature: f32,
    /// Draws from so many of the most likely tokens, at least 1. `None`: from all.
    pub top_k: Option<usize>,
    /// Draws from the most likely tokens of this probability, in (0, 1]. Probabilities are counted in units of 2⁻³¹.
    pub top_p: f32,
    /// Divides positive logits of tokens that the text already has, and multiplies negative ones; 1 changes nothing. Keskar et al.,
    /// arXiv:1909.05858.
    pub repetition_penalty: f32,
    /// Where random numbers start. Equal seeds give equal texts on the same adapter.
    pub seed: u64,
    /// The number of the first text, for random numbers; those after it count on. Texts 64.. of a call are those of another call that
    /// starts at 64.
    pub first_stream: u64,
    /// What ends a text beside the tokenizer's end token.
    pub stop: Vec<Stop>,
}

impl Default for DecodeOptions {
    /// The most likely tokens, at most 128 of them.
    fn default() -> Self {
        Self {
            max_len: 128,
            temperature: 0.0,
            top_k: None,
            top_p: 1.0,
            repetition_penalty: 1.0,
            seed: 0,
            first_stream: 0,
            stop: Vec::new(),
        }
    }
}

impl DecodeOptions {
    setters! {
        max_len: usize,
        temperature: f32,
        top_k: Option<usize>,
        top_p: f32,
        repetition_penalty: f32,
        seed: u64,
        first_stream: u64,
        stop: Vec<Stop>,
    }

    /// Whether tokens are drawn.
    #[must_use]
    pub fn samples(&self) -> bool {
        self.temperature > 0.0
    }

    pub(super) fn check(&self, vocabulary: usize) -> Result<()> {
        let fail = |field, reason: String| Err(Error::Config { field, reason });
        if self.max_len == 0 || u32::try_from(self.max_len).is_err() {
            let reason = format!("must be in 1..2^32, not {}", self.max_len);
            return fail("max_len", reason);
        }
        if !self.temperature.is_finite() || self.temperature < 0.0 {
            let reason = format!("must be 0 or positive, not {}", self.temperature);
            return fail("temperature", reason);
        }
        if self.top_k == Some(0) {
            return fail("top_k", "must be at least 1".into());
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            let reason = format!("must be in (0, 1], not {}", self.top_p);
            return fail("top_p", reason);
        }
        let penalty = self.repetition_penalty;
        if !penalty.is_finite() || penalty <= 0.0 {
            let reason = format!("must be positive, not {penalty}");
            return fail("repetition_penalty", reason);
        }
        for stop in &self.stop {
            match stop {
                Stop::Token(token) if *token as usize >= vocabulary => {
                    let reason = format!(
                        "has token {token}, but the ids of the vocabulary are below {vocabulary}"
                    );
                    return fail("stop", reason);
                }
                Stop::Text(text) if text.is_empty() => {
                    return fail(
                        "stop",
                        "has an empty text, which every text contains".into(),
                    );
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Finish {
    /// The end token, or something of [`DecodeOptions::stop`], came.
    Stop,
    /// It has [`DecodeOptions::max_len`] tokens.
    Length,
}

/// A decoded text.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Generation {
    /// Its tokens, without start token, end token and stop tokens. Where a stop text ended it, the last token completes that text.
    pub tokens: Vec<u32>,
    /// The text of the tokens, cut before a stop text.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
    /// Sum of the natural logarithms of the probabilities that the decoder gives the tokens and, if there is one, the token that ended
    /// the text: those of its logits as they are, without penalty, temperature, top k and top p.
    pub log_prob: f64,
}

/// What is new of a text, see [`TextDecoder::stream`](super::TextDecoder::stream).
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Piece {
    /// The text's place among the embeddings.
    pub row: usize,
    /// New tokens.
    pub tokens: Vec<u32>,
    /// New text. The end of a text that the next token may still change is held back until it comes.
    pub text: String,
    /// Why the text ended, in its last piece.
    pub finish: Option<Finish>,
}
