//! Text token by token, compared with the decoder's graph on the whole text and with the definition of sampling.

mod common;

use std::sync::Arc;

use common::{baseline_gpu, gpu, packed_gpu, tiled_gpu};
use energyflow::graph::Graph;
use energyflow::nn::Gelu;
use energyflow::reference::{Sampling, Stream};
use energyflow::runtime::{Executable, Session};
use energyflow::text::{
    DecodeOptions, Decoder, DecoderOptions, Finish, Generation, Model, Precision, TextDecoder,
    TextDecoderOptions, Tokenizer, Whitespace, next_tokens,
};
use energyflow::train::{AdamW, Schedule, Weights};
use energyflow::types::DType;
use energyflow::{Error, Gpu};

/// Tokens of the texts that the graph takes: more than any ring holds.
const LENGTH: usize = 29;

fn options(kernel: usize, dilations: &[usize]) -> DecoderOptions {
    DecoderOptions::default()
        .vocabulary(37)
        .length(LENGTH)
        .width(10)
        .hidden(17)
        .kernel(kernel)
        .dilations(dilations.to_vec())
        .embedding(7)
        .table_bound(1.0)
}

fn tokenizer(vocabulary: usize) -> Arc<dyn Tokenizer> {
    let words = (4..vocabulary).map(|i| format!("w{i}"));
    Arc::new(Whitespace::new(words, 1000).unwrap())
}

fn noise(n: usize, seed: usize) -> Vec<f32> {
    let number = |i: usize| ((i * 37 + i * i * 11 + seed * 29) % 97) as f32 / 48.0 - 1.0;
    (0..n).map(number).collect()
}

/// The decoder's graph of one text, with random weights that are large enough to have something to say.
struct Whole {
    options: DecoderOptions,
    executable: Arc<Executable>,
    weights: Weights,
    _session: Session,
}

impl Whole {
    fn new(gpu: &Gpu, options: DecoderOptions, dtype: DType) -> Self {
        let mut graph = Graph::new();
        let decoder = Decoder::new(&mut graph, &options).unwrap();
        let ids = graph
            .index_input("ids", options.length, options.vocabulary as u32)
            .unwrap();
        let z = graph
            .input("z", &[1, options.embedding], DType::F32)
            .unwrap();
        let states = decoder.forward(&mut graph, ids, z, None, dtype).unwrap();
        let logits = decoder.logits(&mut graph, states).unwrap();
        graph.output("logits", logits).unwrap();
        let mut session = Session::new(gpu, 3);
        let executable = session.compile(&graph).unwrap();
        let names: Vec<(String, Vec<usize>)> = session
            .parameters()
            .map(|(name, shape)| (name.to_owned(), shape))
            .collect();
        for (i, (name, shape)) in names.iter().enumerate() {
            let n = shape.iter().product();
            let scale = match name.ends_with("norm.weight") {
                true => 1.0,
                false => 1.5 / (shape[1..].iter().product::<usize>() as f32).sqrt(),
            };
            let data: Vec<f32> = noise(n, i).iter().map(|x| x * scale).collect();
            session.set(name, &data).unwrap();
        }
        Self {
            weights: Weights::from_session(&session).unwrap(),
            options,
            executable,
            _session: session,
        }
    }

    fn decoder(&self, gpu: &Gpu, precision: Precision) -> TextDecoder {
        let model = Model::new(self.weights.clone()).decoder(Some(self.options.clone()));
        let options = TextDecoderOptions::default().precision(precision);
        let tokenizer = tokenizer(self.options.vocabulary);
        TextDecoder::with_tokenizer(gpu, &model, tokenizer, &options).unwrap()
    }

    /// Logits of every step of [CLS] and the tokens.
    fn logits(&self, z: &[f32], tokens: &[u32]) -> Vec<Vec<f64>> {
        let mut ids = vec![2];
        ids.extend(tokens);
        ids.resize(self.options.length, 0);
        let inputs = [("ids", (&ids).into()), ("z", z.into())];
        let outputs = self.executable.run(&inputs).unwrap().wait().unwrap();
        let logits = outputs.get("logits").unwrap();
        let rows = logits.chunks_exact(self.options.vocabulary);
        rows.map(|row| row.iter().map(|&x| f64::from(x)).collect())
            .collect()
    }

    /// Each token of a text must be the one of the largest score, or differ from it by less than rounding; the sum of the logarithms
    /// of their probabilities must be right. Returns how many had another token so near.
    fn check(
        &self,
        generation: &Generation,
        z: &[f32],
        row: u64,
        options: &DecodeOptions,
        tolerance: f64,
    ) -> usize {
        let mut tokens = generation.tokens.clone();
        if generation.finish == Finish::Stop {
            tokens.push(3);
        } else {
            assert_eq!(tokens.len(), options.max_len);
        }
        let all = self.logits(z, &tokens);
        let sampling = Sampling {
            temperature: f64::from(options.temperature),
            top_k: options.top_k.unwrap_or(usize::MAX),
            top_p: f64::from(options.top_p),
            repetition_penalty: f64::from(options.repetition_penalty),
        };
        let stream = Stream::new(options.seed, options.first_stream + row);
        let (mut log_prob, mut near) = (0.0, 0);
        for (i, &token) in tokens.iter().enumerate() {
            let mut seen = vec![2];
            seen.extend(&tokens[..i]);
            let scores = sampling.scores(&all[i], &seen, stream, i as u32);
            let best = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let ours = scores[token as usize];
            assert!(ours >= best - tolerance, "{i}: {ours} {best} of {token}");
            near += usize::from(scores.iter().filter(|&&x| x >= best - tolerance).count() > 1);
            let sum: f64 = all[i].iter().map(|x| x.exp()).sum();
            log_prob += all[i][token as usize] - sum.ln();
        }
        let error = (generation.log_prob - log_prob).abs();
        assert!(
            error < tolerance * tokens.len() as f64,
            "{} {log_prob}",
            generation.log_prob
        );
        near
    }
}

fn dtype(precision: Precision) -> DType {
    match precision {
        Precision::F32 => DType::F32,
        Precision::Mixed => DType::F16,
    }
}

/// The same tokens as the graph of the whole text, greedy and drawn, on every kind of adapter.
fn compare(gpu: &Gpu, precision: Precision, options: DecoderOptions, n: usize) {
    let whole = Whole::new(gpu, options.clone(), dtype(precision));
    let decoder = whole.decoder(gpu, precision);
    let tolerance = match precision {
        Precision::F32 => 1e-4,
        Precision::Mixed => 3e-2,
    };
    let z = noise(n * options.embedding, 5);
    let greedy = DecodeOptions::default().max_len(LENGTH - 1);
    let penalised = greedy.clone().repetition_penalty(1.3);
    let drawn = penalised.clone().temperature(1.1).seed(9).first_stream(4);
    let few = drawn.clone().top_k(Some(9)).top_p(0.8);
    let mut lengths = 0;
    for options in [greedy, penalised, drawn, few] {
        let generations = decoder.decode(&z, &options).unwrap();
        assert_eq!(generations.len(), n);
        let mut near = 0;
        for (i, (generation, z)) in generations.iter().zip(z.chunks(7)).enumerate() {
            near += whole.check(generation, z, i as u64, &options, tolerance);
            lengths += generation.tokens.len();
        }
        // Or the test would say nothing.
        if precision == Precision::F32 {
            assert!(near * 20 <= n * LENGTH, "{near}");
        }
    }
    assert!(lengths > n * LENGTH);
}

#[test]
fn tokens_are_those_of_the_whole_text() {
    compare(&gpu(), Precision::F32, options(3, &[1, 3]), 3);
}

#[test]
fn tokens_are_those_of_the_whole_text_with_barriers() {
    let options = options(5, &[2, 1]).gelu(Gelu::Erf).width(8);
    compare(&tiled_gpu(), Precision::F32, options, 5);
}

#[test]
fn tokens_are_those_of_the_whole_text_in_f16() {
    compare(&gpu(), Precision::Mixed, options(1, &[1]), 1);
    compare(&packed_gpu(), Precision::Mixed, options(3, &[2]), 2);
    compare(&baseline_gpu(), Precision::Mixed, options(2, &[3, 1]), 4);
}

/// One block, one text, f32: for what does not depend on the network.
fn small() -> (Whole, TextDecoder) {
    let whole = Whole::new(&gpu(), options(3, &[1]), DType::F32);
    let decoder = whole.decoder(&gpu(), Precision::F32);
    (whole, decoder)
}

#[test]
fn many_texts_are_as_many_single_ones() {
    let (_, decoder) = small();
    let n = 70;
    let z = noise(n * 7, 11);
    let drawn = DecodeOptions::default()
        .max_len(20)
        .temperature(1.2)
        .top_k(Some(12))
        .seed(5);
    for options in [DecodeOptions::default().max_len(20), drawn] {
        let all = decoder.decode(&z, &options).unwrap();
        assert_eq!(all.len(), n);
        for (i, z) in z.chunks(7).enumerate().step_by(9) {
            let alone = options.clone().first_stream(i as u64);
            let alone = decoder.decode(z, &alone).unwrap();
            assert_eq!(alone[0].tokens, all[i].tokens, "{i}");
            assert_eq!(alone[0].finish, all[i].finish);
        }
        let async_ = pollster::block_on(decoder.decode_async(&z, &options)).unwrap();
        assert_eq!(async_, all);
    }
}

/// Texts of equal embeddings differ, another seed gives others, and the same one the same.
#[test]
fn seeds_and_streams() {
    let (_, decoder) = small();
    let z = noise(7, 1).repeat(3);
    let options = DecodeOptions::default().temperature(1.5).max_len(20);
    let first = decoder.decode(&z, &options).unwrap();
    assert_ne!(first[0].tokens, first[1].tokens);
    assert_eq!(first, decoder.decode(&z, &options).unwrap());
    let other = decoder.decode(&z, &options.clone().seed(1)).unwrap();
    assert_ne!(first[0].tokens, other[0].tokens);
    let shifted = decoder.decode(&z, &options.first_stream(1)).unwrap();
    assert_eq!(shifted[..2], first[1..]);
}

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
    let mut finish = vec![None; 70];
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

/// Draws are distributed as the definition says.
#[test]
fn draws_follow_the_distribution() {
    let (whole, decoder) = small();
    let n = 4096;
    let z = noise(7, 6);
    let logits = whole.logits(&z, &[])[0].clone();
    let all = z.repeat(n);
    let plain = DecodeOptions::default().max_len(1).temperature(0.9).seed(8);
    let cases = [
        plain.clone(),
        plain.clone().top_k(Some(5)),
        plain.clone().temperature(2.0).top_p(0.7),
    ];
    for options in cases {
        let sampling = Sampling {
            temperature: f64::from(options.temperature),
            top_k: options.top_k.unwrap_or(usize::MAX),
            top_p: f64::from(options.top_p),
            repetition_penalty: 1.0,
        };
        let mut scores: Vec<f64> = logits.iter().map(|x| x / sampling.temperature).collect();
        sampling.keep(&mut scores);
        let mass: f64 = scores.iter().map(|x| x.exp()).sum();
        let mut counts = vec![0_usize; scores.len()];
        for generation in decoder.decode(&all, &options).unwrap() {
            // The end token is no part of a text.
            counts[generation.tokens.first().copied().unwrap_or(3) as usize] += 1;
        }
        let (mut chi, mut classes) = (0.0, 0);
        let (mut rest, mut rest_count) = (0.0, 0.0);
        for (score, &count) in scores.iter().zip(&counts) {
            let expected = n as f64 * score.exp() / mass;
            assert!(expected > 0.0 || count == 0);
            match expected >= 5.0 {
                true => {
                    chi += (count as f64 - expected).powi(2) / expected;
                    classes += 1;
                }
                false => {
                    rest += expected;
                    rest_count += count as f64;
                }
            }
        }
        if rest > 1.0 {
            chi += (rest_count - rest).powi(2) / rest;
            classes += 1;
        }
        // Five standard deviations.
        let freedom = f64::from(classes - 1);
        assert!(classes > 3, "{classes}");
        assert!(
            chi < freedom + 5.0 * (2.0 * freedom).sqrt(),
            "{chi} {classes}"
        );
    }
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

/// Trained on a few texts, the decoder says them.
#[test]
fn a_trained_decoder_says_what_it_was_trained_on() {
    let texts = [
        "a cat sat on the mat",
        "the dog ran",
        "on a mat the dog sat",
        "cat and dog",
        "the mat",
    ];
    let words = texts.iter().flat_map(|text| text.split(' '));
    let tokenizer: Arc<dyn Tokenizer> = Arc::new(Whitespace::new(words, 10).unwrap());
    let (length, embedding, n) = (10, 6, texts.len());
    let options = DecoderOptions::default()
        .vocabulary(tokenizer.vocab_size() as usize)
        .length(length)
        .width(16)
        .hidden(24)
        .kernel(3)
        .dilations(vec![1, 2])
        .embedding(embedding)
        .table_bound(0.5);
    let (mut ids, mut mask) = (Vec::new(), Vec::new());
    for text in texts {
        let mut tokens = tokenizer.encode(text).unwrap();
        mask.extend((0..length).map(|i| if i < tokens.len() { 1.0 } else { 0.0 }));
        tokens.resize(length, 0);
        ids.extend(tokens);
    }
    let mut targets = vec![0; ids.len()];
    next_tokens(&ids, &mask, length, options.ignored_target(), &mut targets).unwrap();
    let z = noise(n * embedding, 2);

    let mut graph = Graph::new();
    let decoder = Decoder::new(&mut graph, &options).unwrap();
    let parameters: Vec<_> = graph.parameters().map(|(id, _)| id).collect();
    let vocabulary = options.vocabulary as u32;
    let inputs = [
        graph.index_input("ids", ids.len(), vocabulary).unwrap(),
        graph.input("z", &[n, embedding], DType::F32).unwrap(),
        graph
            .index_input("targets", ids.len(), vocabulary + 1)
            .unwrap(),
    ];
    let states = decoder
        .forward(&mut graph, inputs[0], inputs[1], None, DType::F32)
        .unwrap();
    let loss = decoder.loss(&mut graph, states, inputs[2], 0.0).unwrap();
    graph.output("loss", loss.loss).unwrap();
    AdamW::default()
        .schedule(Schedule::Constant { rate: 1e-2 })
        .step(&mut graph, loss.loss, &parameters)
        .unwrap();
    let mut session = Session::new(&gpu(), 1);
    let executable = session.compile(&graph).unwrap();
    let feed = [
        ("ids", (&ids).into()),
        ("z", (&z).into()),
        ("targets", (&targets).into()),
    ];
    let mut loss = f32::INFINITY;
    for _ in 0..300 {
        let outputs = executable.run(&feed).unwrap().wait().unwrap();
        loss = outputs.scalar("loss").unwrap();
    }
    assert!(loss < 0.1, "{loss}");

    let model = Model::new(Weights::from_session(&session).unwrap()).decoder(Some(options));
    for precision in [Precision::F32, Precision::Mixed] {
        let options = TextDecoderOptions::default().precision(precision);
        let tokenizer = Arc::clone(&tokenizer);
        let decoder = TextDecoder::with_tokenizer(&gpu(), &model, tokenizer, &options).unwrap();
        let generations = decoder.decode(&z, &DecodeOptions::default()).unwrap();
        for (generation, text) in generations.iter().zip(texts) {
            assert_eq!(generation.text, text);
            assert_eq!(generation.finish, Finish::Stop);
        }
    }
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
