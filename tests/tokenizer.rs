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

    /// A tokeniser says which id fills texts up: by its padding, or by a token of a usual name, whatever id that has.
    #[test]
    fn the_padding_id_is_that_of_the_tokeniser() {
        let bundled = bundled("tokenizer.json");
        let json = std::fs::read_to_string(&bundled).unwrap();
        let folder = tempfile::TempDir::new().unwrap();
        let padding = |change: &dyn Fn(&mut serde_json::Value)| {
            let mut json: serde_json::Value = serde_json::from_str(&json).unwrap();
            change(&mut json);
            let path = folder.path().join("tokenizer.json");
            std::fs::write(&path, json.to_string()).unwrap();
            WordPiece::from_file(path, 64).unwrap().padding_id()
        };
        let rename = |json: &mut serde_json::Value, ids: [u64; 2]| {
            json["padding"] = serde_json::Value::Null;
            for token in json["added_tokens"].as_array_mut().unwrap() {
                if token["content"] == "[PAD]" {
                    token["id"] = ids[0].into();
                }
            }
            let vocab = json["model"]["vocab"].as_object_mut().unwrap();
            vocab.insert("[PAD]".into(), ids[0].into());
            vocab.insert("[unused2]".into(), ids[1].into());
        };
        let third = WordPiece::from_file(&bundled, 64)
            .unwrap()
            .decode(&[3])
            .unwrap();
        assert_eq!(third, "[unused2]");
        assert_eq!(padding(&|_| ()), Some(0));
        assert_eq!(padding(&|json| rename(json, [3, 0])), Some(3));
        let named = serde_json::json!({
            "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 5, "pad_type_id": 0, "pad_token": "[unused4]"
        });
        assert_eq!(padding(&|json| json["padding"] = named.clone()), Some(5));
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
    assert_eq!(tokenizer.padding_id(), Some(0));
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

#[test]
fn whitespace_says_what_it_cut_and_takes_control_tokens_for_words() {
    let tokenizer = Whitespace::new(["a", "b"], 5).unwrap();
    let tokens = tokenizer.tokenize("a b a a a").unwrap();
    assert_eq!(tokens.ids, [2, 4, 5, 4, 3]);
    assert_eq!(
        (tokens.cut_tokens, tokens.cut_bytes, tokens.is_cut()),
        (2, 0, true)
    );
    assert!(!tokenizer.tokenize("").unwrap().is_cut());
    assert_eq!(tokenizer.encode("a [PAD] [SEP]").unwrap(), [2, 4, 1, 1, 3]);
}
