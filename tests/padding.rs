//! The mask says what counts, whatever id stands there: padding on the right, on the left and between.

mod common;

use common::{gpu, tiled_gpu};
use energyflow::Error;
use energyflow::graph::{Graph, Source};
use energyflow::runtime::{Executable, Host, Session};
use energyflow::text::{
    Batches, Dataset, Decoder, DecoderOptions, Efb1Writer, Encoder, EncoderOptions, Trainer,
    TrainerOptions, next_tokens,
};
use energyflow::train::{AdamW, Schedule};
use energyflow::types::DType;
use tempfile::TempDir;

const LENGTH: usize = 6;
const VOCABULARY: usize = 12;
const WIDTH: usize = 8;
/// Right, left, both, a hole; 1 where a token counts.
const MASK: [f32; 4 * LENGTH] = [
    1., 1., 1., 1., 0., 0., //
    0., 0., 1., 1., 1., 1., //
    0., 1., 1., 1., 1., 0., //
    1., 1., 0., 1., 1., 1., //
];

fn encoder() -> EncoderOptions {
    EncoderOptions::default()
        .vocabulary(VOCABULARY)
        .length(LENGTH)
        .width(WIDTH)
        .hidden(12)
        .kernel(3)
        .dilations(vec![1, 2])
        .embedding(5)
        .table_bound(1.0)
}

fn decoder() -> DecoderOptions {
    DecoderOptions::default()
        .vocabulary(VOCABULARY)
        .length(LENGTH)
        .width(WIDTH)
        .hidden(12)
        .kernel(3)
        .dilations(vec![1, 2])
        .embedding(5)
        .table_bound(1.0)
}

/// Tokens 0 to 6 in turn where the mask is 1, so that each has a next token somewhere; `masked` where it is 0.
fn ids(masked: u32) -> Vec<u32> {
    let mut tokens = (0..7).cycle();
    MASK.iter()
        .map(|&mask| match mask > 0.0 {
            true => tokens.next().unwrap(),
            false => masked,
        })
        .collect()
}

fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i as f32 * 0.7).sin()).collect()
}

/// The gradients of all parameters as outputs, and the loss.
fn differentiate(graph: &mut Graph, loss: energyflow::graph::ValueId) {
    let parameters: Vec<_> = graph.parameters().map(|(id, _)| id).collect();
    let names: Vec<String> = graph.parameters().map(|(_, v)| v.name.clone()).collect();
    let gradients = graph.gradients(loss, &parameters).unwrap();
    for (name, gradient) in names.iter().zip(gradients) {
        graph.output(name, gradient).unwrap();
    }
    graph.output("loss", loss).unwrap();
}

fn encoder_graph(dtype: DType, padding: Option<u32>) -> Graph {
    let mut graph = Graph::new();
    let encoder = Encoder::new(&mut graph, &encoder().padding(padding)).unwrap();
    let n = MASK.len();
    let ids = graph.index_input("ids", n, VOCABULARY as u32).unwrap();
    let mask = graph.input("mask", &[n], DType::F32).unwrap();
    let target = graph.input("z", &[4, 5], DType::F32).unwrap();
    let z = encoder.forward(&mut graph, ids, mask, dtype).unwrap();
    let loss = graph.kd_loss(z, target, 1.0, 1.0).unwrap().loss;
    differentiate(&mut graph, loss);
    graph
}

fn decoder_graph(dtype: DType, padding: Option<u32>) -> Graph {
    let mut graph = Graph::new();
    let options = decoder().padding(padding);
    let decoder = Decoder::new(&mut graph, &options).unwrap();
    let n = MASK.len();
    let ids = graph.index_input("ids", n, VOCABULARY as u32).unwrap();
    let mask = graph.input("mask", &[n], DType::F32).unwrap();
    let z = graph.input("z", &[4, 5], DType::F32).unwrap();
    let targets = graph
        .index_input("targets", n, options.ignored_target() + 1)
        .unwrap();
    let states = decoder
        .forward(&mut graph, ids, z, Some(mask), dtype)
        .unwrap();
    let loss = decoder.loss(&mut graph, states, targets, 0.1).unwrap();
    differentiate(&mut graph, loss.loss);
    graph
}

type Build = fn(DType, Option<u32>) -> Graph;
const ENCODER_TABLE: &str = "embedding.weight";
const DECODER_TABLE: &str = "decoder.embedding.weight";

/// Every output.
fn outputs(executable: &Executable, graph: &Graph, ids: &[u32]) -> Vec<(String, Vec<f32>)> {
    let z = numbers(20);
    let mut targets = vec![0; ids.len()];
    next_tokens(ids, &MASK, LENGTH, VOCABULARY as u32, &mut targets).unwrap();
    let inputs = [
        ("ids", Host::from(ids)),
        ("mask", Host::F32(&MASK)),
        ("z", Host::from(&z)),
        ("targets", Host::from(&targets)),
    ];
    let used = |name: &str| {
        let id = graph.find(name);
        id.is_some_and(|id| matches!(graph.value(id).unwrap().source, Source::Input { .. }))
    };
    let inputs: Vec<_> = inputs.into_iter().filter(|(name, _)| used(name)).collect();
    let results = executable.run(&inputs).unwrap().wait().unwrap();
    let names = graph.outputs().iter().map(|(name, _)| name.clone());
    names
        .map(|name| (name.clone(), results.get(&name).unwrap()))
        .collect()
}

#[test]
fn masked_ids_change_nothing_and_get_no_gradient() {
    for (gpu, dtype, build, table) in [
        (gpu(), DType::F32, encoder_graph as Build, ENCODER_TABLE),
        (gpu(), DType::F32, decoder_graph, DECODER_TABLE),
        (tiled_gpu(), DType::F16, encoder_graph, ENCODER_TABLE),
    ] {
        let graph = build(dtype, None);
        let executable = Session::new(&gpu, 3).compile(&graph).unwrap();
        let expected = outputs(&executable, &graph, &ids(11));
        let gradient = &expected.iter().find(|(name, _)| name == table).unwrap().1;
        for (id, row) in gradient.chunks(WIDTH).enumerate() {
            // 0 is a token like the others; 7 to 11 stand nowhere or where the mask is 0.
            let trained = row.iter().any(|&x| x != 0.0);
            assert_eq!(trained, id < 7, "{table} {id} {dtype}: {row:?}");
        }
        for masked in [0, 4, 10] {
            let other = outputs(&executable, &graph, &ids(masked));
            assert_eq!(
                other, expected,
                "{table} {dtype}, masked positions hold {masked}"
            );
        }
    }
}

/// As PyTorch's `padding_idx`, for those who want it: whatever the mask says.
#[test]
fn the_row_of_the_padding_is_never_trained() {
    for (build, table) in [
        (encoder_graph as Build, ENCODER_TABLE),
        (decoder_graph, DECODER_TABLE),
    ] {
        let graph = build(DType::F32, Some(4));
        let executable = Session::new(&gpu(), 3).compile(&graph).unwrap();
        let results = outputs(&executable, &graph, &ids(4));
        let gradient = &results.iter().find(|(name, _)| name == table).unwrap().1;
        let rows = gradient.chunks(WIDTH).enumerate();
        let trained: Vec<usize> = rows
            .filter(|(_, row)| row.iter().any(|&x| x != 0.0))
            .map(|(id, _)| id)
            .collect();
        assert_eq!(trained, [0, 1, 2, 3, 5, 6]);
    }
}

#[test]
fn a_padding_outside_the_vocabulary_is_refused() {
    let graph = &mut Graph::new();
    let padding = Some(VOCABULARY as u32);
    let results = [
        Encoder::new(graph, &encoder().padding(padding)).map(drop),
        Decoder::new(graph, &decoder().padding(padding)).map(drop),
    ];
    for result in results {
        assert!(
            matches!(&result, Err(Error::Config { field: "padding", reason }) if reason.contains("12")),
            "{result:?}"
        );
    }
}

/// Older files say nothing of a padding.
#[test]
fn sizes_without_a_padding_are_read() {
    let text = serde_json::to_string(&encoder()).unwrap();
    let older = text.replace(",\"padding\":null", "");
    assert_ne!(older, text);
    assert_eq!(
        serde_json::from_str::<EncoderOptions>(&older).unwrap(),
        encoder()
    );
}

/// Texts in which 0 is the most common token.
fn dataset(folder: &TempDir) -> Dataset {
    let path = folder.path().join("zeros.efb");
    let mut writer = Efb1Writer::create(&path, 5).unwrap();
    for i in 0..8 {
        let ids = [0, 0, 1 + i, 0];
        writer
            .push(
                &ids[..3 + i as usize % 2],
                &vec![1; 3 + i as usize % 2],
                &numbers(5),
            )
            .unwrap();
    }
    writer.finish().unwrap();
    Dataset::open(path).unwrap()
}

#[test]
fn trainers_train_token_0() {
    let folder = TempDir::new().unwrap();
    let dataset = dataset(&folder);
    let optimizer = AdamW::default()
        .schedule(Schedule::Constant { rate: 0.01 })
        .weight_decay(0.0);
    for micro_batches in [1, 2] {
        let mut batches = Batches::training(dataset.clone(), 8, LENGTH, 1).unwrap();
        let options = TrainerOptions::default()
            .batch(8)
            .micro_batches(micro_batches)
            .optimizer(optimizer.clone());
        let distiller = Trainer::distill(&gpu(), &encoder(), &options).unwrap();
        let before = distiller.session().get("embedding.weight").unwrap();
        distiller
            .step(batches.next_batch().unwrap().unwrap(), 0)
            .unwrap();
        let after = distiller.session().get("embedding.weight").unwrap();
        let rows = before.chunks(WIDTH).zip(after.chunks(WIDTH)).enumerate();
        for (id, (before, after)) in rows {
            assert_eq!(before != after, id < 9, "{id}");
        }

        let options = TrainerOptions::default()
            .batch(8)
            .micro_batches(micro_batches)
            .optimizer(optimizer.clone());
        let trainer = Trainer::decode(&gpu(), &decoder(), &options).unwrap();
        batches.start_epoch(0);
        let metrics = trainer
            .step(batches.next_batch().unwrap().unwrap(), 0)
            .unwrap();
        // Two next tokens in each text of three tokens, three in each of four.
        assert_eq!(metrics.tokens, 20.0);
        assert_eq!(
            trainer.evaluate(&dataset).unwrap().decoder.unwrap().tokens,
            20
        );
    }
}
