//! Text to token ids and back.

use std::collections::HashMap;

use crate::error::{Error, Result};

/// Token ids of a text, and what did not fit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Tokens {
    /// Token ids, with the tokens that start and end a text.
    pub ids: Vec<u32>,
    /// Number of tokens that were cut off.
    pub cut_tokens: usize,
    /// Bytes at the end of the text that were not even tokenised, because enough tokens came before. Their tokens are not in
    /// [`Tokens::cut_tokens`].
    pub cut_bytes: usize,
}

impl Tokens {
    /// Of a text of which nothing was cut.
    #[must_use]
    pub fn whole(ids: Vec<u32>) -> Self {
        Self {
            ids,
            ..Self::default()
        }
    }

    /// Whether anything was cut.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        self.cut_tokens > 0 || self.cut_bytes > 0
    }
}

/// Turns text into token ids and back.
pub trait Tokenizer: Send + Sync {
    /// Token ids of a text, with the tokens that start and end it. They are cut to the longest length allowed and not padded.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the text cannot be tokenised.
    fn encode(&self, text: &str) -> Result<Vec<u32>>;

    /// As [`Tokenizer::encode`], and says what was cut. By default nothing is known of that.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    fn tokenize(&self, text: &str) -> Result<Tokens> {
        self.encode(text).map(Tokens::whole)
    }

    /// The text of token ids, without special tokens. Ids outside the vocabulary are left out.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if they do not make a text.
    fn decode(&self, ids: &[u32]) -> Result<String>;

    /// Exclusive upper bound of the ids.
    fn vocab_size(&self) -> u32;

    /// Id of a token, such as `[SEP]`, if the vocabulary has it.
    fn token_id(&self, token: &str) -> Option<u32>;

    /// Id that fills texts up to a common length, if the vocabulary has one. By default it is the id of `[PAD]` or `<pad>`.
    fn padding_id(&self) -> Option<u32> {
        usual_padding(self)
    }
}

pub(super) fn usual_padding(tokenizer: &(impl Tokenizer + ?Sized)) -> Option<u32> {
    let mut tokens = ["[PAD]", "<pad>"].into_iter();
    tokens.find_map(|token| tokenizer.token_id(token))
}

/// A tokeniser that splits at white space and knows the words it was given. For tests and small experiments.
///
/// Ids: `[PAD]` 0, `[UNK]` 1, `[CLS]` 2, `[SEP]` 3, then the words in order. A text becomes `[CLS]` words `[SEP]`. These four words are
/// unknown ones in a text.
#[derive(Clone, Debug)]
pub struct Whitespace {
    tokens: Vec<String>,
    ids: HashMap<String, u32>,
    max_length: usize,
}

const SPECIAL: [&str; 4] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"];
const UNKNOWN: u32 = 1;
const START: u32 = 2;
const END: u32 = 3;

impl Whitespace {
    /// A vocabulary of these words; repeated ones count once. Texts are cut to `max_length` tokens, `[CLS]` and `[SEP]` included.
    ///
    /// # Errors
    /// [`Error::Config`] if `max_length` is below 3, which leaves no word; [`Error::Tokenizer`] if a word is empty or
    /// has white space in it, or there are too many for 32 bits.
    pub fn new<W: Into<String>>(
        words: impl IntoIterator<Item = W>,
        max_length: usize,
    ) -> Result<Self> {
        check_max_length(max_length, 2)?;
        let mut whitespace = Self {
            tokens: Vec::new(),
            ids: HashMap::new(),
            max_length,
        };
        let special = SPECIAL.iter().map(|&token| token.to_owned());
        for word in special.chain(words.into_iter().map(Into::into)) {
            if word.is_empty() || word.contains(char::is_whitespace) {
                return Err(Error::Tokenizer(format!("{word:?} is not a word")));
            }
            if whitespace.ids.contains_key(&word) {
                continue;
            }
            let id = u32::try_from(whitespace.tokens.len())
                .ok()
                .filter(|&id| id < u32::MAX)
                .ok_or_else(|| Error::Tokenizer("more than 2^32 - 1 words".into()))?;
            whitespace.ids.insert(word.clone(), id);
            whitespace.tokens.push(word);
        }
        Ok(whitespace)
    }
}

impl Tokenizer for Whitespace {
    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.tokenize(text).map(|tokens| tokens.ids)
    }

    fn tokenize(&self, text: &str) -> Result<Tokens> {
        let mut words = text.split_whitespace();
        let known = |word| self.ids.get(word).copied();
        // A word that looks like a special token is a word.
        let id = |word| known(word).filter(|&id| id as usize >= SPECIAL.len());
        let kept = words.by_ref().take(self.max_length - 2);
        let ids = kept.map(|word| id(word).unwrap_or(UNKNOWN));
        let ids = std::iter::once(START).chain(ids).chain([END]).collect();
        Ok(Tokens {
            ids,
            cut_tokens: words.count(),
            cut_bytes: 0,
        })
    }

    fn decode(&self, ids: &[u32]) -> Result<String> {
        let words: Vec<&str> = ids
            .iter()
            .filter(|&&id| id as usize >= SPECIAL.len())
            .filter_map(|&id| self.tokens.get(id as usize).map(String::as_str))
            .collect();
        Ok(words.join(" "))
    }

    fn vocab_size(&self) -> u32 {
        // `new` keeps it within 32 bits.
        self.tokens.len() as u32
    }

    fn token_id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }
}

/// Room for at least one token beside those that are always added.
pub(super) fn check_max_length(max_length: usize, added: usize) -> Result<()> {
    if max_length > added {
        return Ok(());
    }
    Err(Error::Config {
        field: "max_length",
        reason: format!("is {max_length}, but {added} tokens are added to every text"),
    })
}
