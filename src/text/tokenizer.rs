//! Text to token ids and back.

use std::collections::HashMap;

use crate::error::{Error, Result};

#[cfg(feature = "tokenizer")]
pub use word_piece::WordPiece;

/// Turns text into token ids and back.
pub trait Tokenizer: Send + Sync {
    /// Token ids of a text, with the tokens that start and end it. They are cut to the longest length allowed and not padded.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the text cannot be tokenised.
    fn encode(&self, text: &str) -> Result<Vec<u32>>;

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

fn usual_padding(tokenizer: &(impl Tokenizer + ?Sized)) -> Option<u32> {
    let mut tokens = ["[PAD]", "<pad>"].into_iter();
    tokens.find_map(|token| tokenizer.token_id(token))
}

/// A tokeniser that splits at white space and knows the words it was given. For tests and small experiments.
///
/// Ids: `[PAD]` 0, `[UNK]` 1, `[CLS]` 2, `[SEP]` 3, then the words in order. A text becomes `[CLS]` words `[SEP]`.
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
        let words = text
            .split_whitespace()
            .map(|word| self.ids.get(word).copied().unwrap_or(UNKNOWN))
            .take(self.max_length - 2);
        Ok(std::iter::once(START).chain(words).chain([END]).collect())
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
fn check_max_length(max_length: usize, added: usize) -> Result<()> {
    if max_length > added {
        return Ok(());
    }
    Err(Error::Config {
        field: "max_length",
        reason: format!("is {max_length}, but {added} tokens are added to every text"),
    })
}

#[cfg(feature = "tokenizer")]
mod word_piece {
    use std::path::Path;

    use tokenizers::{PostProcessor, TruncationParams};

    use super::{Error, Result, Tokenizer, check_max_length, usual_padding};
    use crate::file::InputFile;

    /// Upper bound on the size of a `tokenizer.json` in bytes; those of large vocabularies have some tens of megabytes.
    const LARGEST: u64 = 1 << 30;

    /// A tokeniser described by a `tokenizer.json`. Its padding is off, and its longest length is given by the caller.
    #[derive(Clone, Debug)]
    pub struct WordPiece {
        inner: tokenizers::Tokenizer,
        vocab_size: u32,
        /// As the file says, which may name another token than the usual ones.
        padding: Option<u32>,
    }

    impl WordPiece {
        /// Loads a `tokenizer.json`. Texts are cut to `max_length` tokens, those added at start and end included.
        ///
        /// # Errors
        /// [`Error::Io`], also for a directory or a special file; [`Error::Format`] for a file of more than 1 GiB; [`Error::Tokenizer`] if the file does not describe a tokeniser with a vocabulary;
        /// [`Error::Config`] if `max_length` leaves no room for a token beside the added ones.
        pub fn from_file(path: impl AsRef<Path>, max_length: usize) -> Result<Self> {
            let path = path.as_ref();
            let fail = |reason: String| Error::Tokenizer(format!("{}: {reason}", path.display()));
            let json = InputFile::open(path)?.read_all(LARGEST)?;
            let mut inner =
                tokenizers::Tokenizer::from_bytes(json).map_err(|error| fail(error.to_string()))?;
            // Checked here because `with_truncation` subtracts the two without looking.
            let added = inner
                .get_post_processor()
                .map_or(0, |processor| processor.added_tokens(false));
            check_max_length(max_length, added)?;
            let truncation = TruncationParams {
                max_length,
                ..TruncationParams::default()
            };
            let padding = inner.get_padding().map(|padding| padding.pad_id);
            inner.with_padding(None);
            inner
                .with_truncation(Some(truncation))
                .map_err(|error| fail(error.to_string()))?;
            // Not the number of entries: ids may have gaps, and this is the number of rows of an embedding.
            let vocab_size = inner
                .get_vocab(true)
                .into_values()
                .max()
                .and_then(|id| id.checked_add(1))
                .ok_or_else(|| fail("no vocabulary".into()))?;
            let padding = padding.filter(|&id| id < vocab_size);
            Ok(Self {
                inner,
                vocab_size,
                padding,
            })
        }
    }

    impl Tokenizer for WordPiece {
        fn encode(&self, text: &str) -> Result<Vec<u32>> {
            self.inner
                .encode_fast(text, true)
                .map(|encoding| encoding.get_ids().to_vec())
                .map_err(|error| Error::Tokenizer(error.to_string()))
        }

        fn decode(&self, ids: &[u32]) -> Result<String> {
            self.inner
                .decode(ids, true)
                .map_err(|error| Error::Tokenizer(error.to_string()))
        }

        fn vocab_size(&self) -> u32 {
            self.vocab_size
        }

        fn token_id(&self, token: &str) -> Option<u32> {
            self.inner.token_to_id(token)
        }

        fn padding_id(&self) -> Option<u32> {
            self.padding.or_else(|| usual_padding(self))
        }
    }
}
