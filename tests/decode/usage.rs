//! How decoding is used: threads, streams, ends of texts, and what is refused.

use std::sync::Arc;

use energyflow::Error;
use energyflow::graph::Graph;
use energyflow::runtime::Session;
use energyflow::text::{
    DecodeOptions, DecoderOptions, EncoderOptions, Finish, Model, Precision, TextDecoder,
    TextDecoderOptions, TextEncoder, Tokenizer,
};
use energyflow::train::{WeightType, Weights};
use energyflow::types::DType;

use super::common::gpu;
use super::{LENGTH, Whole, noise, options, small, tokenizer};

#[test]
fn threads_do_not_disturb_each_other() {
    let (_, decoder) = small();
    let options = DecodeOptions::default().temperature(1.0).max_len(24);
    let alone: Vec<_> = (0..4)
        .map(|i| decoder.decode(&noise(21, i), &options).unwrap())
        .collect();
    std::thread::scope(|scope| {
        for (i, alone) in alone.iter().enumerate() {
            let (decoder, options) = (decoder.clone(), &options);
            scope.spawn(move || {
                for _ in 0..3 {
                    assert_eq!(&decoder.decode(&noise(21, i), options).unwrap(), alone);
                }
            });
        }
    });
}

#[test]
fn tokens_stream_as_they_come() {
    let (_, decoder) = small();
    let z = noise(70 * 7, 2);
    let options = DecodeOptions::default()
        .max_len(40)
        .temperature(2.0)
        .seed(2);
    let all = decoder.decode(&z, &options).unwrap();
    let mut tokens = vec![Vec::new(); 70];
    let mut texts = vec![String::new(); 70];
    let mut finish = [None; 70];
    let mut pieces = 0;
    for piece in decoder.stream(&z, &options).unwrap() {
        let piece = piece.unwrap();
        assert_eq!(finish[piece.row], None);
        tokens[piece.row].extend(piece.tokens);
        texts[piece.row].push_str(&piece.text);
        finish[piece.row] = piece.finish;
        pieces += 1;
    }
    assert!(pieces > 100, "{pieces}");
    for (i, generation) in all.iter().enumerate() {
        assert_eq!(tokens[i], generation.tokens);
        assert_eq!(texts[i], generation.text);
        assert_eq!(finish[i], Some(generation.finish));
    }
    // Dropped in the middle, it does no harm.
    let mut stream = decoder.stream(&z, &options).unwrap();
    stream.next().unwrap().unwrap();
    drop(stream);
    assert_eq!(decoder.decode(&z, &options).unwrap(), all);
}

#[test]
fn texts_end_where_they_should() {
    let (_, decoder) = small();
    let z = noise(7 * 5, 3);
    let options = DecodeOptions::default().max_len(35).temperature(1.5);
    let whole = decoder.decode(&z, &options).unwrap();
    let longest = whole.iter().max_by_key(|x| x.tokens.len()).unwrap();
    assert!(longest.tokens.len() > 20);
    // Past the first submission.
    let (at, token) = (18, longest.tokens[18]);
    let stop = longest.tokens.iter().position(|&x| x == token).unwrap();
    assert!(stop <= at);
    let row = whole.iter().position(|x| x == longest).unwrap();
    let by_token = options.clone().stop(vec![token.into()]);
    let by_token = &decoder.decode(&z, &by_token).unwrap()[row];
    assert_eq!(by_token.tokens, longest.tokens[..stop]);
    assert_eq!(by_token.finish, Finish::Stop);
    // A bit per token in two words: each text ends at its first token that stops, and at no token with the same bit of the other word.
    let stops = [33, 34, 35, 36];
    let shorter = options.clone().stop(stops.map(Into::into).to_vec());
    let mut others = 0;
    for (shorter, whole) in decoder.decode(&z, &shorter).unwrap().iter().zip(&whole) {
        let end = whole.tokens.iter().position(|x| stops.contains(x));
        let expected = &whole.tokens[..end.unwrap_or(whole.tokens.len())];
        assert_eq!(shorter.tokens, expected);
        let last = expected.len().saturating_sub(1);
        others += expected[..last]
            .iter()
            .filter(|&&x| stops.contains(&(x + 32)))
            .count();
    }
    assert!(others > 0);
    // Two words, over which the text must be put together.
    let text = format!(
        "{} w{}",
        longest.text.split(' ').nth(4).unwrap(),
        longest.tokens[5]
    );
    let at = longest.text.find(&text).unwrap();
    let by_text = options.clone().stop(vec![text.as_str().into()]);
    let by_text = &decoder.decode(&z, &by_text).unwrap()[row];
    assert_eq!(by_text.text, longest.text[..at]);
    assert_eq!(by_text.finish, Finish::Stop);
    assert!(longest.tokens.starts_with(&by_text.tokens));
    let streamed: String = decoder
        .stream(&z, &options.clone().stop(vec![text.as_str().into()]))
        .unwrap()
        .map(Result::unwrap)
        .filter(|piece| piece.row == row)
        .map(|piece| piece.text)
        .collect();
    assert_eq!(streamed, by_text.text);
    for generation in decoder.decode(&z, &options.max_len(3)).unwrap() {
        assert!(generation.tokens.len() <= 3);
        assert_eq!(
            generation.finish == Finish::Length,
            generation.tokens.len() == 3
        );
    }
}

#[test]
fn a_position_may_be_far_beyond_the_length_of_training() {
    let (_, decoder) = small();
    let z = noise(7, 4);
    let end = DecodeOptions::default().repetition_penalty(1.0);
    // One that does not end.
    let options = (0..50).map(|seed| end.clone().temperature(0.7).seed(seed).max_len(300));
    let longest = options
        .map(|options| decoder.decode(&z, &options).unwrap().remove(0))
        .max_by_key(|x| x.tokens.len())
        .unwrap();
    assert!(
        longest.tokens.len() > 2 * LENGTH,
        "{}",
        longest.tokens.len()
    );
    assert!(longest.log_prob.is_finite());
}

#[test]
fn what_is_out_of_range_is_refused() {
    let (whole, decoder) = small();
    let z = noise(14, 1);
    let o = DecodeOptions::default;
    let bad = [
        o().max_len(0),
        o().max_len(1 << 33),
        o().temperature(-1.0),
        o().temperature(f32::NAN),
        o().temperature(f32::INFINITY),
        o().top_k(Some(0)),
        o().top_p(0.0),
        o().top_p(1.5),
        o().top_p(f32::NAN),
        o().repetition_penalty(0.0),
        o().repetition_penalty(f32::NAN),
        o().stop(vec![37.into()]),
        o().stop(vec!["".into()]),
    ];
    for options in bad {
        let error = decoder.decode(&z, &options).unwrap_err();
        assert!(
            matches!(error, Error::Config { .. }),
            "{options:?}: {error}"
        );
        assert!(decoder.stream(&z, &options).is_err());
    }
    for z in [&z[..6], &[f32::NAN; 7], &[f32::INFINITY; 7]] {
        let error = decoder.decode(z, &o()).unwrap_err();
        assert!(matches!(error, Error::Data { .. }), "{error}");
    }
    assert_eq!(decoder.decode(&[], &o()).unwrap(), []);
    assert_eq!(decoder.stream(&[], &o()).unwrap().count(), 0);
    let half = whole.decoder(&gpu(), Precision::Mixed);
    let error = half.decode(&[1e5; 7], &o()).unwrap_err().to_string();
    assert!(error.contains("does not fit f16"), "{error}");
    // Extremes of what is allowed.
    let extreme = [
        o().temperature(1e-38),
        o().temperature(f32::MIN_POSITIVE),
        o().temperature(3e38).top_p(1e-30),
        o().temperature(1.0).top_k(Some(usize::MAX)),
        o().temperature(1.0).repetition_penalty(1e-38),
        o().repetition_penalty(3e38),
    ];
    for options in extreme {
        for generation in decoder.decode(&z, &options.max_len(20)).unwrap() {
            assert!(generation.log_prob.is_finite());
        }
    }
    // Cold draws are the most likely tokens.
    let cold = decoder.decode(&z, &o().temperature(1e-38)).unwrap();
    assert_eq!(cold, decoder.decode(&z, &o()).unwrap());
}

#[test]
fn a_teacher_gives_the_embeddings() {
    let (_, decoder) = small();
    let teacher = |texts: &[&str]| -> energyflow::Result<Vec<f32>> {
        Ok(texts.iter().flat_map(|text| noise(7, text.len())).collect())
    };
    let options = DecodeOptions::default();
    let texts = ["a", "bcd"];
    let got = decoder
        .decode_from_teacher(&texts, teacher, &options)
        .unwrap();
    let z = [noise(7, 1), noise(7, 3)].concat();
    assert_eq!(got, decoder.decode(&z, &options).unwrap());
    let error = decoder.decode_from_teacher(&texts, |_| Ok(vec![0.0; 7]), &options);
    assert!(matches!(error, Err(Error::Data { .. })));
}

/// Activations that overflow f16 are an error, not a token.
#[test]
fn logits_that_are_no_numbers_are_an_error() {
    let mut whole = Whole::new(&gpu(), options(1, &[1]), DType::F32);
    let (shape, data) = whole.weights.get("decoder.blocks.0.conv2.weight").unwrap();
    let data = vec![6e4; data.len()];
    let (name, _) = ("decoder.blocks.0.conv2.weight", shape);
    whole._session.set(name, &data).unwrap();
    whole.weights = Weights::from_session(&whole._session).unwrap();
    let decoder = whole.decoder(&gpu(), Precision::Mixed);
    let error = decoder
        .decode(&noise(14, 1), &DecodeOptions::default())
        .unwrap_err();
    assert!(matches!(error, Error::Data { .. }), "{error}");
    assert!(error.to_string().contains("decode in f32"), "{error}");
}

#[test]
fn a_model_that_does_not_fit_is_refused() {
    let (whole, _) = small();
    let with = |model: &Model, tokenizer: Arc<dyn Tokenizer>, options: &TextDecoderOptions| {
        TextDecoder::with_tokenizer(&gpu(), model, tokenizer, options).unwrap_err()
    };
    let defaults = TextDecoderOptions::default();
    let model = Model::new(whole.weights.clone());
    let error = with(&model, tokenizer(37), &defaults);
    assert!(matches!(error, Error::Config { .. }), "{error}");
    let model = model.decoder(Some(whole.options.clone().hidden(18)));
    let error = with(&model, tokenizer(37), &defaults).to_string();
    assert!(error.contains("decoder.blocks.0.conv1.weight"), "{error}");
    let model = model.decoder(Some(whole.options.clone()));
    for batches in [vec![], vec![0, 4]] {
        let error = with(
            &model,
            tokenizer(37),
            &TextDecoderOptions::default().batches(batches),
        );
        assert!(matches!(error, Error::Config { .. }), "{error}");
    }
    struct Mute;
    impl Tokenizer for Mute {
        fn encode(&self, _: &str) -> energyflow::Result<Vec<u32>> {
            Ok(Vec::new())
        }
        fn decode(&self, _: &[u32]) -> energyflow::Result<String> {
            Ok(String::new())
        }
        fn vocab_size(&self) -> u32 {
            37
        }
        fn token_id(&self, _: &str) -> Option<u32> {
            None
        }
    }
    let error = with(&model, Arc::new(Mute), &defaults);
    assert!(matches!(error, Error::Tokenizer(_)), "{error}");
}

/// A folder with a vocabulary of 30 522, and an encoder whose last block is the decoder's.
#[test]
#[cfg(feature = "tokenizer")]
fn a_model_folder_is_decoded() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    save_model(&path);
    for precision in [Precision::F32, Precision::Mixed] {
        let setup = TextDecoderOptions::default().precision(precision);
        let decoder = TextDecoder::load_with(&gpu(), &path, &setup).unwrap();
        decoder.warm_up(2, &DecodeOptions::default()).unwrap();
        let encoder = TextEncoder::load(&gpu(), &path).unwrap();
        let z = encoder.encode(&["a man plays guitar", "the end"]).unwrap();
        let greedy = DecodeOptions::default().max_len(5);
        let drawn = greedy.clone().temperature(1.0).top_k(Some(50)).top_p(0.9);
        for options in [greedy, drawn] {
            let all = decoder.decode(z.as_slice(), &options).unwrap();
            assert_eq!(all.len(), 2);
            assert!(all.iter().all(|x| x.tokens.len() <= 5));
            assert!(all.iter().any(|x| !x.text.is_empty()), "{all:?}");
        }
    }
}

/// Not trained.
#[cfg(feature = "tokenizer")]
fn save_model(path: &std::path::Path) {
    let encoder = EncoderOptions::default()
        .width(8)
        .hidden(12)
        .dilations(vec![1, 2])
        .embedding(6)
        .length(16);
    let decoder = DecoderOptions::default()
        .width(8)
        .hidden(12)
        .dilations(vec![4, 2])
        .embedding(6)
        .length(16);
    let tokenizer = std::fs::read("data/tokenizer.json").unwrap();
    let mut model = Model::default()
        .encoder(Some(encoder))
        .decoder(Some(decoder))
        .shared_last_block(true)
        .tokenizer(Some(tokenizer));
    let mut graph = Graph::new();
    let layers = model.build_encoder(&mut graph).unwrap();
    let ids = graph.index_input("ids", 16, 30_522).unwrap();
    let mask = graph.input("mask", &[16], DType::F32).unwrap();
    let z = layers.forward(&mut graph, ids, mask, DType::F32).unwrap();
    let layers = model.build_decoder(&mut graph, Some(&layers)).unwrap();
    let states = layers
        .forward(&mut graph, ids, z, None, DType::F32)
        .unwrap();
    let logits = layers.logits(&mut graph, states).unwrap();
    graph.output("logits", logits).unwrap();
    let mut session = Session::new(&gpu(), 1);
    session.compile(&graph).unwrap();
    model.weights = Weights::from_session(&session).unwrap();
    model.save(path, WeightType::F32).unwrap();
}

fn is_thread_safe<T: Send + Sync>(_: &T) {}
fn is_send<T: Send>(value: T) -> T {
    value
}

#[test]
fn types_cross_threads() {
    let (_, decoder) = small();
    is_thread_safe(&decoder);
    let options = DecodeOptions::default().max_len(2);
    let z = noise(7, 1);
    let stream = is_send(decoder.stream(&z, &options).unwrap());
    assert!(stream.count() > 0);
    let all = pollster::block_on(is_send(decoder.decode_async(&z, &options))).unwrap();
    assert_eq!(all.len(), 1);
}
