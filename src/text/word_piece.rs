//! Tokenizers that a `tokenizer.json` describes.

use std::borrow::Cow;
use std::path::Path;

use tokenizers::{
    ModelWrapper, NormalizerWrapper, PostProcessor, PreTokenizerWrapper, Tokenizer as Inner,
};

use super::tokenizer::{Tokenizer, Tokens, check_max_length, usual_padding};
use crate::error::{Error, Result};
use crate::file::InputFile;

/// Upper bound on the size of a `tokenizer.json` in bytes; those of large vocabularies have some tens of megabytes.
const LARGEST: u64 = 1 << 30;

/// A text is first tokenised up to about so many bytes for each token that is wanted; most tokens have fewer than 6.
const BYTES_PER_TOKEN: usize = 16;

/// Tokens before the end of a part of a text that are not relied on: where the text was cut inside an added token of several words, the
/// last tokens may be others.
const MARGIN: usize = 32;

/// Texts of more bytes are searched for words that are too long for the vocabulary.
const LONG: usize = 4096;

/// A tokeniser described by a `tokenizer.json`. Its padding is off, and its longest length is given by the caller.
///
/// Control tokens in a text, such as `[SEP]`, are text like any other, so that a text cannot pretend to end. See
/// [`WordPiece::control_tokens`].
///
/// A long text is tokenised only as far as needed, if the tokeniser is known to split texts at white space, as those of BERT and byte-level
/// ones do. The token ids are the same as of the whole text.
#[derive(Clone, Debug)]
pub struct WordPiece {
    inner: Inner,
    vocab_size: u32,
    /// As the file says, which may name another token than the usual ones.
    padding: Option<u32>,
    /// What starts and ends every text.
    frame: [Vec<u32>; 2],
    /// Tokens of a text, without its frame.
    room: usize,
    splits: Splits,
    /// Characters of a word of which longer words are one unknown token, where letters and digits of ASCII always are characters of a word.
    longest_word: Option<usize>,
}

/// Where a text may be cut without changing the tokens before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Splits {
    Nowhere,
    /// Before white space.
    Spaces,
    /// Before white space, punctuation and Chinese characters.
    Bert,
}

impl WordPiece {
    /// Loads a `tokenizer.json`. Texts are cut to `max_length` tokens, those added at start and end included.
    ///
    /// # Errors
    /// [`Error::Io`], also for a directory or a special file; [`Error::Format`] for a file of more than 1 GiB; [`Error::Tokenizer`] if the file does not describe a tokeniser with a vocabulary;
    /// [`Error::Config`] if `max_length` leaves no room for a token beside the added ones.
    pub fn from_file(path: impl AsRef<Path>, max_length: usize) -> Result<Self> {
        let path = path.as_ref();
        let json = InputFile::open(path)?.read_all(LARGEST)?;
        Self::from_bytes(json, max_length).map_err(|error| match error {
            Error::Tokenizer(reason) => Error::Tokenizer(format!("{}: {reason}", path.display())),
            other => other,
        })
    }

    /// As [`WordPiece::from_file`], from the content of a `tokenizer.json`.
    ///
    /// # Errors
    /// As [`WordPiece::from_file`].
    pub fn from_bytes(json: impl AsRef<[u8]>, max_length: usize) -> Result<Self> {
        let mut inner = Inner::from_bytes(json).map_err(fail)?;
        let added = inner
            .get_post_processor()
            .map_or(0, |processor| processor.added_tokens(false));
        check_max_length(max_length, added)?;
        let padding = inner.get_padding().map(|padding| padding.pad_id);
        inner.with_padding(None);
        inner.with_truncation(None).map_err(fail)?;
        inner.set_encode_special_tokens(true);
        // Not the number of entries: ids may have gaps, and this is the number of rows of an embedding.
        let vocab_size = inner
            .get_vocab(true)
            .into_values()
            .max()
            .and_then(|id| id.checked_add(1))
            .ok_or_else(|| fail("no vocabulary"))?;
        let frame = frame(&inner)?;
        Ok(Self {
            vocab_size,
            padding: padding.filter(|&id| id < vocab_size),
            room: max_length.saturating_sub(frame[0].len() + frame[1].len()),
            frame,
            splits: splits(&inner),
            longest_word: longest_word(&inner),
            inner,
        })
    }

    /// Whether control tokens in a text, such as `[SEP]`, become the tokens of that name. Off by default: then they are text.
    #[must_use]
    pub fn control_tokens(mut self, control_tokens: bool) -> Self {
        self.inner.set_encode_special_tokens(!control_tokens);
        self
    }

    fn ids(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, false).map_err(fail)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The tokens of a text that are known to be right, at least `room` if there are so many, and the bytes that were looked at.
    fn begin(&self, text: &str) -> Result<(Vec<u32>, usize)> {
        let mut most = BYTES_PER_TOKEN * (self.room + MARGIN);
        loop {
            let end = self.cut(text, most);
            let ids = self.ids(&self.without_long_words(&text[..end]))?;
            if end == text.len() || ids.len() >= self.room + MARGIN {
                return Ok((ids, end));
            }
            most = end.max(most).saturating_mul(4);
        }
    }

    /// Where to cut a text so that about `most` bytes are left; its length if there is no such place behind them.
    fn cut(&self, text: &str, most: usize) -> usize {
        if self.splits == Splits::Nowhere || text.len() <= most {
            return text.len();
        }
        let is_split = |c: char| match c {
            ' ' | '\n' | '\r' | '\t' => true,
            _ => self.splits == Splits::Bert && (c.is_ascii_punctuation() || is_chinese(c)),
        };
        let mut middle = most;
        while !text.is_char_boundary(middle) {
            middle -= 1;
        }
        let before = text[..middle].char_indices().rev();
        let mut before = before.take_while(|&(i, _)| i > most / 2);
        match before.find(|&(_, c)| is_split(c)) {
            Some((end, _)) => end,
            None => {
                let mut after = text[middle..].char_indices();
                let found = after.find(|&(i, c)| middle + i > 0 && is_split(c));
                found.map_or(text.len(), |(i, _)| middle + i)
            }
        }
    }

    /// The same text for this tokeniser, in which very long words are shorter, if it has any.
    fn without_long_words<'t>(&self, text: &'t str) -> Cow<'t, str> {
        let Some(longest) = self.longest_word.filter(|_| text.len() > LONG) else {
            return Cow::Borrowed(text);
        };
        let mut short = String::new();
        let mut copied = 0;
        let mut start = 0;
        let bytes = text.as_bytes();
        while start < bytes.len() {
            let run = bytes[start..].iter();
            let run = run.take_while(|byte| byte.is_ascii_alphanumeric()).count();
            // Both ends are long enough for an unknown word, whatever follows them.
            if run > 2 * (longest + 1) {
                short.push_str(&text[copied..start + longest + 1]);
                copied = start + run - (longest + 1);
            }
            start += run + 1;
        }
        match copied {
            0 => Cow::Borrowed(text),
            _ => Cow::Owned(short + &text[copied..]),
        }
    }
}

impl Tokenizer for WordPiece {
    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.tokenize(text).map(|tokens| tokens.ids)
    }

    fn tokenize(&self, text: &str) -> Result<Tokens> {
        let (content, end) = self.begin(text)?;
        let kept = content.len().min(self.room);
        let [start, stop] = &self.frame;
        Ok(Tokens {
            ids: [start, &content[..kept], stop].concat(),
            cut_tokens: content.len() - kept,
            cut_bytes: text.len() - end,
        })
    }

    fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(fail)
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

fn fail(error: impl ToString) -> Error {
    Error::Tokenizer(error.to_string())
}

/// The tokens that are put before and after every text.
fn frame(inner: &Inner) -> Result<[Vec<u32>; 2]> {
    let ids = |framed| {
        let encoding = inner.encode_fast("a", framed).map_err(fail)?;
        Ok::<_, Error>(encoding.get_ids().to_vec())
    };
    let (bare, framed) = (ids(false)?, ids(true)?);
    let at = match bare.is_empty() {
        true => Some(0),
        false => framed.windows(bare.len()).position(|part| part == bare),
    };
    match at {
        Some(at) => Ok([framed[..at].to_vec(), framed[at + bare.len()..].to_vec()]),
        None => Err(fail(
            "its post-processor changes the tokens of a text, not only what is before and after them",
        )),
    }
}

fn splits(inner: &Inner) -> Splits {
    use PreTokenizerWrapper as Pre;
    fn keeps(normalizer: &NormalizerWrapper) -> bool {
        use NormalizerWrapper as Norm;
        match normalizer {
            Norm::BertNormalizer(_)
            | Norm::StripNormalizer(_)
            | Norm::StripAccents(_)
            | Norm::NFC(_)
            | Norm::NFD(_)
            | Norm::NFKC(_)
            | Norm::NFKD(_)
            | Norm::Lowercase(_)
            | Norm::Prepend(_) => true,
            Norm::Sequence(all) => all.as_ref().iter().all(keeps),
            // What these make of white space depends on their rules.
            _ => false,
        }
    }
    if !inner.get_normalizer().is_none_or(keeps) {
        return Splits::Nowhere;
    }
    match inner.get_pre_tokenizer() {
        Some(Pre::BertPreTokenizer(_)) => match inner.get_normalizer() {
            Some(NormalizerWrapper::BertNormalizer(bert)) if bert.handle_chinese_chars => {
                Splits::Bert
            }
            _ => Splits::Spaces,
        },
        Some(Pre::Whitespace(_) | Pre::WhitespaceSplit(_)) => Splits::Spaces,
        Some(Pre::ByteLevel(bytes)) if bytes.use_regex => Splits::Spaces,
        _ => Splits::Nowhere,
    }
}

fn longest_word(inner: &Inner) -> Option<usize> {
    let ModelWrapper::WordPiece(model) = inner.get_model() else {
        return None;
    };
    let bert = matches!(
        inner.get_normalizer(),
        Some(NormalizerWrapper::BertNormalizer(_))
    ) && matches!(
        inner.get_pre_tokenizer(),
        Some(PreTokenizerWrapper::BertPreTokenizer(_))
    );
    // An added token of letters alone could be inside a word.
    let mut added = inner.get_added_tokens_decoder().into_values();
    let apart = added.all(|token| !token.content.chars().all(|c| c.is_ascii_alphanumeric()));
    (bert && apart).then_some(model.max_input_chars_per_word)
}

/// Ideographs that BERT's normaliser puts spaces around: some of them, which is enough to find places to cut.
fn is_chinese(c: char) -> bool {
    ('\u{4E00}'..='\u{9FFF}').contains(&c)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bundled(max_length: usize) -> WordPiece {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/data/tokenizer.json");
        WordPiece::from_file(path, max_length).unwrap()
    }

    /// What the whole text gives, by the crate `tokenizers` alone.
    fn whole(tokenizer: &WordPiece, text: &str) -> Vec<u32> {
        let encoding = tokenizer.inner.encode_fast(text, false).unwrap();
        let ids = encoding.get_ids();
        let kept = &ids[..ids.len().min(tokenizer.room)];
        [&tokenizer.frame[0], kept, &tokenizer.frame[1]].concat()
    }

    /// Pieces that texts are made of: words, long words, accents, what normalisation removes or turns into spaces, control tokens.
    const PIECES: [&str; 28] = [
        "word",
        "Großes",
        " ",
        "  ",
        "\n",
        "\t",
        ".",
        ",",
        "!?",
        "é",
        "e\u{301}",
        "\u{301}",
        "\u{200d}",
        "\u{c}",
        "\u{85}",
        "\u{a0}",
        "\u{3000}",
        "漢字",
        "\u{20000}",
        "かな",
        "👩\u{200d}💻",
        "[SEP]",
        "[PAD",
        "]",
        "##ing",
        "\0",
        "İ",
        "supercalifragilistic",
    ];

    fn text() -> impl Strategy<Value = String> {
        let piece = (0..PIECES.len(), 1usize..4).prop_map(|(i, n)| PIECES[i].repeat(n));
        let long = (1usize..3000).prop_map(|n| "x1".repeat(n));
        let piece = prop_oneof![40 => piece, 1 => long];
        prop::collection::vec(piece, 0..1500).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn a_part_of_a_text_gives_the_tokens_of_the_whole(text in text(), control in any::<bool>()) {
            for room in [1, 14] {
                let tokenizer = bundled(room + 2).control_tokens(control);
                let tokens = tokenizer.tokenize(&text).unwrap();
                prop_assert_eq!(&tokens.ids, &whole(&tokenizer, &text));
                let all = tokenizer.inner.encode_fast(text.as_str(), false).unwrap().len();
                prop_assert!(tokens.cut_bytes > 0 || tokens.cut_tokens == all.saturating_sub(room));
                prop_assert!(tokens.cut_bytes == 0 || all > room);
            }
        }
    }

    #[test]
    fn two_megabytes_take_no_time() {
        let tokenizer = bundled(16);
        for piece in ["a word ", "word", "漢字", "¡", "a.b", "\u{301}a ", "x "] {
            let text = piece.repeat(2_000_000 / piece.len());
            let start = std::time::Instant::now();
            let tokens = tokenizer.tokenize(&text).unwrap();
            let seconds = start.elapsed().as_secs_f64();
            // The bound is generous: other tests run beside, and whole texts take ten seconds.
            let cut = match piece {
                // A single word without any letter of ASCII has to be read whole.
                "¡" => continue,
                "word" => tokens.cut_bytes == 0 && tokens.ids.len() == 3,
                _ => tokens.cut_bytes > 1_900_000 && tokens.ids.len() == 16,
            };
            assert!(
                cut && seconds < 1.0,
                "{piece:?}: {seconds} s, {} bytes",
                tokens.cut_bytes
            );
        }
    }

    /// A byte-level tokenizer with merges, as GPT-2's.
    fn byte_level(max_length: usize) -> WordPiece {
        let mut vocab = serde_json::Map::new();
        let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        let mut alphabet: Vec<char> = alphabet.into_iter().collect();
        alphabet.sort_unstable();
        let tokens = alphabet.iter().map(char::to_string);
        let merged = ["wo", "wor", "Ġw", "ĠĠ", "er"].map(str::to_owned);
        for (id, token) in tokens.chain(merged).enumerate() {
            vocab.insert(token, id.into());
        }
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
            "post_processor": null, "decoder": null,
            "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab,
                "merges": ["w o", "wo r", "Ġ w", "Ġ Ġ", "e r"] }
        });
        WordPiece::from_bytes(json.to_string(), max_length).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn byte_level_texts_are_cut_alike(text in text()) {
            let tokenizer = byte_level(7);
            prop_assert_eq!(tokenizer.splits, Splits::Spaces);
            prop_assert_eq!(&tokenizer.tokenize(&text).unwrap().ids, &whole(&tokenizer, &text));
        }
    }

    #[test]
    fn control_tokens_are_text_unless_asked_for() {
        let tokenizer = bundled(32);
        let ids = tokenizer.encode("a [PAD] b [SEP]").unwrap();
        let inside = &ids[1..ids.len() - 1];
        assert!(
            inside
                .iter()
                .all(|id| ![0, 100, 101, 102, 103].contains(id)),
            "{ids:?}"
        );
        assert_eq!(tokenizer.decode(&ids).unwrap(), "a [ pad ] b [ sep ]");
        let tokenizer = tokenizer.control_tokens(true);
        assert_eq!(
            tokenizer.encode("a [PAD] b [SEP]").unwrap(),
            [101, 1037, 0, 1038, 102, 102]
        );
    }
}
