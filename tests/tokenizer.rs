//! Tokenisers: the bundled one makes the ids that the bundled data holds.

use energyflow::Error;
use energyflow::text::{Tokenizer, Whitespace};

#[cfg(feature = "tokenizer")]
mod word_piece {
    use std::path::{Path, PathBuf};

    use energyflow::Error;
    use energyflow::text::{Dataset, Tokenizer, WordPiece};

    fn bundled(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("data")
            .join(name)
    }

    #[test]
    fn encodes_the_validation_texts_to_their_ids() {
        let tokenizer = WordPiece::from_file(bundled("tokenizer.json"), 64).unwrap();
        assert_eq!(tokenizer.vocab_size(), 30522);
        let dataset = Dataset::open(bundled("wordnet_val.safetensors")).unwrap();
        for sample in dataset.iter() {
            let sample = sample.unwrap();
            let text = sample.text().unwrap();
            assert_eq!(tokenizer.encode(text).unwrap(), sample.ids(), "{text}");
        }
    }

    #[test]
    fn cuts_and_keeps_the_end() {
        let text = "large shoulder pads are in";
        let long = WordPiece::from_file(bundled("tokenizer.json"), 64).unwrap();
        let short = WordPiece::from_file(bundled("tokenizer.json"), 4).unwrap();
        let ids = [101, 2312, 3244, 19586, 2024, 1999, 102];
        assert_eq!(long.encode(text).unwrap(), ids);
        assert_eq!(short.encode(text).unwrap(), [101, 2312, 3244, 102]);
        assert_eq!(long.encode("").unwrap(), [101, 102], "no padding");
        assert_eq!(long.decode(&ids).unwrap(), text);
        assert_eq!(long.token_id("[SEP]"), Some(102));
        assert_eq!(long.token_id("no such token"), None);
    }

    #[test]
    fn bad_files_and_lengths_are_errors() {
        let load = |path: PathBuf, length| WordPiece::from_file(path, length).map(drop);
        let json = bundled("tokenizer.json");
        for length in 0..3 {
            assert!(matches!(
                load(json.clone(), length),
                Err(Error::Config {
                    field: "max_length",
                    ..
                })
            ));
        }
        assert!(load(json, 3).is_ok());
        assert!(matches!(
            load(bundled("missing"), 64),
            Err(Error::Io { .. })
        ));
        assert!(matches!(
            load(bundled("README.md"), 64),
            Err(Error::Tokenizer(_))
        ));
    }
}

#[test]
fn whitespace_knows_its_words() {
    let tokenizer = Whitespace::new(["the", "cat", "the", "sat"], 6).unwrap();
    assert_eq!(tokenizer.vocab_size(), 7);
    assert_eq!(tokenizer.token_id("[PAD]"), Some(0));
    let ids = tokenizer.encode("the  dog\tsat").unwrap();
    assert_eq!(ids, [2, 4, 1, 6, 3]);
    assert_eq!(tokenizer.decode(&ids).unwrap(), "the sat");
    assert_eq!(tokenizer.decode(&[4, 900, 5, 0]).unwrap(), "the cat");
    let cut = tokenizer.encode("cat cat cat cat cat").unwrap();
    assert_eq!(cut, [2, 5, 5, 5, 5, 3]);
    assert_eq!(tokenizer.encode("").unwrap(), [2, 3]);
}

#[test]
fn whitespace_refuses_what_is_no_word() {
    assert!(matches!(
        Whitespace::new(["a b"], 6),
        Err(Error::Tokenizer(_))
    ));
    assert!(matches!(Whitespace::new([""], 6), Err(Error::Tokenizer(_))));
    assert!(matches!(
        Whitespace::new(["a"], 2),
        Err(Error::Config {
            field: "max_length",
            ..
        })
    ));
}
