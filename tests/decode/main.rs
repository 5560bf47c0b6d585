//! Text token by token, compared with the decoder's graph on the whole text and with the definition of sampling.

#[path = "../common/mod.rs"]
mod common;
mod draws;
mod usage;

use std::sync::Arc;

use common::{baseline_gpu, gpu, packed_gpu, tiled_gpu};
use energyflow::Gpu;
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
