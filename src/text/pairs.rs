//! Pairs of texts for fine-tuning: JSON lines, or a table of tab-separated values.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Map, Value};

use super::dataset::Dataset;
use super::split::{Split, ValidationSize, split_key};
use super::store::StoreWriter;
use super::text_lines::TextLines;
use super::tokenizer::Tokenizer;
use super::trainer::{Contrastive, PairLoss};
use crate::error::{Error, Result};
use crate::setters::setters;

/// Bytes of tokens up to which pairs are held in memory, instead of in a temporary file.
const HELD: u64 = 1 << 28;

/// How a file of pairs is read.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct PairOptions {
    /// Number of tokens per text, L; longer texts are cut.
    pub length: usize,
    /// Scores are divided by this, so that they are in [−1, 1].
    pub largest_score: f32,
}

impl PairOptions {
    /// Texts of so many tokens, scores as they are.
    #[must_use]
    pub fn new(length: usize) -> Self {
        Self {
            length,
            largest_score: 1.0,
        }
    }

    setters! {
        length: usize,
        largest_score: f32,
    }
}

/// Pairs of texts in a file, tokenised.
///
/// All lines are of one kind: an anchor and its positive; the same with a negative, a text that is near and yet wrong; or two texts and
/// the score that their cosine is to have. The file is one of two formats:
///
/// | format | a line is |
/// |---|---|
/// | JSON lines | `{"anchor": "…", "positive": "…"}`, perhaps with `"negative"`; or `{"a": "…", "b": "…", "score": 0.5}` |
/// | tab-separated values | two texts, perhaps with a negative or a score in a third column; with or without a first line of names |
///
/// | what | names |
/// |---|---|
/// | first text | `anchor`, `query`, `question`, `sentence1`, `text1`, `a` |
/// | second text | `positive`, `answer`, `sentence2`, `text2`, `b` |
/// | third text | `negative`, `hard_negative`, `sentence3`, `text3` |
/// | score | `score`, `similarity`, `similarity_score`, `label` |
///
/// Other fields and columns are not read; [`Pairs::ignored`] names them. Texts in a table have no quotation marks around them.
///
/// [`Pairs::dataset`] has one sample per pair. Its tokens are the k texts, one after the other, each filled up to L tokens, and its target is
/// the score; without scores it is 1. [`Batches`](super::Batches) of k·L tokens are what a
/// [`Trainer`](super::Trainer) with a [`PairLoss`] learns from.
#[derive(Clone, Debug)]
pub struct Pairs {
    dataset: Dataset,
    /// Of first and second text.
    keys: Vec<[u64; 2]>,
    kind: Kind,
    tokens: usize,
    blank: usize,
    cut: usize,
    ignored: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Pair,
    Triplet,
    Scored,
}

/// What a field is. The order is that of the columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    First,
    Second,
    Third,
    Score,
}

const NAMES: [(Role, &[&str]); 4] = [
    (
        Role::First,
        &["anchor", "query", "question", "sentence1", "text1", "a"],
    ),
    (
        Role::Second,
        &["positive", "answer", "sentence2", "text2", "b"],
    ),
    (
        Role::Third,
        &["negative", "hard_negative", "sentence3", "text3"],
    ),
    (
        Role::Score,
        &["score", "similarity", "similarity_score", "label"],
    ),
];

fn role(name: &str) -> Option<Role> {
    let mut roles = NAMES.iter();
    let found = roles.find(|(_, names)| names.contains(&name));
    found.map(|(role, _)| *role)
}

/// A line.
#[derive(Default)]
struct Fields {
    texts: [Option<String>; 3],
    score: Option<f64>,
}

impl Fields {
    fn put(&mut self, role: Role, name: &str, text: &str) -> Result<(), String> {
        let twice = || format!("{name:?} is a second name for what is there already");
        if role == Role::Score {
            let score = text.trim().parse();
            let score = score.map_err(|_| format!("the score {text:?} is no number"))?;
            return match self.score.replace(score) {
                None => Ok(()),
                Some(_) => Err(twice()),
            };
        }
        if text.trim().is_empty() {
            return Err(format!("{name:?} is blank"));
        }
        match self.texts[role as usize].replace(text.to_owned()) {
            None => Ok(()),
            Some(_) => Err(twice()),
        }
    }

    fn kind(&self) -> Result<Kind, String> {
        match (&self.texts, self.score) {
            ([Some(_), Some(_), None], None) => Ok(Kind::Pair),
            ([Some(_), Some(_), Some(_)], None) => Ok(Kind::Triplet),
            ([Some(_), Some(_), None], Some(_)) => Ok(Kind::Scored),
            ([Some(_), Some(_), Some(_)], Some(_)) => {
                Err("both a score and a negative: a pair has one of them or none".into())
            }
            ([first, ..], _) => {
                let (which, role) = match first {
                    None => ("first", Role::First),
                    Some(_) => ("second", Role::Second),
                };
                let names = NAMES[role as usize].1.join(", ");
                Err(format!("the {which} text is missing, one of {names}"))
            }
        }
    }
}

/// How lines become fields.
enum Format {
    Json,
    /// A name and, if it is read, a role for each column.
    Table(Vec<(String, Option<Role>)>),
}

impl Format {
    /// Of a file with this first line, and whether the line is a pair itself.
    fn new(line: &str) -> Result<(Self, bool), String> {
        if line.trim_start().starts_with('{') {
            return Ok((Self::Json, true));
        }
        let columns: Vec<&str> = line.split('\t').collect();
        let named = columns.iter().map(|name| {
            let name = name.trim().to_lowercase();
            let role = role(&name);
            (name, role)
        });
        let named: Vec<(String, Option<Role>)> = named.collect();
        let has = |wanted| named.iter().any(|(_, role)| *role == Some(wanted));
        if has(Role::First) && has(Role::Second) {
            return Ok((Self::Table(named), false));
        }
        let third = match *columns {
            [_, _] => None,
            [_, _, third] if third.trim().parse::<f64>().is_ok() => Some(Role::Score),
            [_, _, _] => Some(Role::Third),
            _ => {
                return Err(format!(
                    "{} columns: without a first line of names a table has two texts, and perhaps a negative or a score, separated by tabs; the other format is JSON lines",
                    columns.len()
                ));
            }
        };
        let roles = [Some(Role::First), Some(Role::Second), third];
        let columns = roles.into_iter().flatten();
        let name = |role: Role| NAMES[role as usize].1[0].to_owned();
        let columns = columns.map(|role| (name(role), Some(role))).collect();
        Ok((Self::Table(columns), true))
    }

    /// The fields of a line. An error has the column of a JSON object that cannot be read.
    fn fields(&self, line: &str, ignored: &mut BTreeSet<String>) -> Result<Fields, (u64, String)> {
        let mut fields = Fields::default();
        let at_start = |reason| (0, reason);
        match self {
            Self::Json => {
                let object: Map<String, Value> = serde_json::from_str(line).map_err(|error| {
                    let reason = error.to_string();
                    let reason = reason.split(" at line ").next().unwrap_or_default();
                    (error.column().saturating_sub(1) as u64, reason.to_owned())
                })?;
                for (name, value) in &object {
                    let Some(role) = role(name) else {
                        ignored.insert(name.clone());
                        continue;
                    };
                    let put = match (value, role) {
                        (Value::Number(number), Role::Score) => {
                            fields.put(role, name, &number.to_string())
                        }
                        (_, Role::Score) => Err(format!("{name:?} is no number")),
                        (Value::String(text), _) => fields.put(role, name, text),
                        _ => Err(format!("{name:?} is no string")),
                    };
                    put.map_err(at_start)?;
                }
            }
            Self::Table(columns) => {
                let values: Vec<&str> = line.split('\t').collect();
                if values.len() != columns.len() {
                    let reason = format!(
                        "{} columns, but the first line has {}",
                        values.len(),
                        columns.len()
                    );
                    return Err((0, reason));
                }
                for ((name, role), value) in columns.iter().zip(values) {
                    match role {
                        Some(role) => fields.put(*role, name, value).map_err(at_start)?,
                        None => _ = ignored.insert(name.clone()),
                    }
                }
            }
        }
        Ok(fields)
    }
}

impl Pairs {
    /// Reads and tokenises a file. `tokenizer` should cut texts to the same length as the options.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] with the number of the line for one that is no pair, is of another kind than the first, has a blank text
    /// or a score outside [−1, 1], and for a file without pairs; [`Error::Config`] for options out of range; [`Error::Tokenizer`].
    pub fn open(
        path: impl AsRef<Path>,
        tokenizer: &dyn Tokenizer,
        options: &PairOptions,
    ) -> Result<Self> {
        let path = path.as_ref();
        let fail = |field, reason: &str| {
            Err(Error::Config {
                field,
                reason: reason.into(),
            })
        };
        if options.length == 0 {
            return fail("length", "must be at least 1");
        }
        if !(options.largest_score.is_finite() && options.largest_score > 0.0) {
            return fail("largest_score", "must be positive");
        }
        let mut lines = TextLines::open(path)?;
        let mut format = None;
        let mut kind = None;
        let mut store = StoreWriter::new(1, HELD, None);
        let (mut keys, mut ignored) = (Vec::new(), BTreeSet::new());
        let (mut blank, mut cut) = (0, 0);
        let padding = tokenizer.padding_id().unwrap_or(0);
        let (mut ids, mut mask) = (Vec::new(), Vec::new());
        while let Some(line) = lines.read()? {
            if line.trim().is_empty() {
                blank += 1;
                continue;
            }
            let format = match &format {
                Some(format) => format,
                None => {
                    let (new, is_pair) =
                        Format::new(&line).map_err(|reason| lines.fail(0, reason))?;
                    let new = &*format.insert(new);
                    if !is_pair {
                        continue;
                    }
                    new
                }
            };
            let fields = format
                .fields(&line, &mut ignored)
                .map_err(|(column, reason)| lines.fail(column, reason))?;
            let own = fields.kind().map_err(|reason| lines.fail(0, reason))?;
            let of_all = *kind.get_or_insert(own);
            if own != of_all {
                let reason = format!("{}, but the first line {}", own.has(), of_all.has());
                return Err(lines.fail(0, reason));
            }
            let score = fields.score.unwrap_or(f64::from(options.largest_score));
            let score = (score / f64::from(options.largest_score)) as f32;
            if !(-1.0..=1.0).contains(&score) {
                let reason = format!(
                    "the score {} is not in [-{}, {}]; PairOptions::largest_score says how large they are",
                    fields.score.unwrap_or_default(),
                    options.largest_score,
                    options.largest_score
                );
                return Err(lines.fail(0, reason));
            }
            ids.clear();
            mask.clear();
            for text in fields.texts.iter().flatten() {
                let tokens = tokenizer
                    .tokenize(text)
                    .map_err(|error| lines.fail(0, error))?;
                let kept = tokens.ids.len().min(options.length);
                cut += usize::from(tokens.is_cut() || kept < tokens.ids.len());
                let end = ids.len() + options.length;
                ids.extend_from_slice(&tokens.ids[..kept]);
                ids.resize(end, padding);
                mask.resize(end - options.length + kept, 1);
                mask.resize(end, 0);
            }
            store
                .push(&ids, &mask, &[score], None)
                .map_err(|error| match error {
                    Error::Data { reason, .. } => lines.fail(0, reason),
                    other => other,
                })?;
            let [first, second, _] = &fields.texts;
            keys.push([first, second].map(|text| split_key(text.as_deref().unwrap_or_default())));
        }
        let Some(kind) = kind else {
            let reason = "the file has no pairs; a line is a JSON object, or two texts with a tab between them";
            return Err(lines.fail(0, reason));
        };
        Ok(Self {
            dataset: Dataset::of_store(path, store.finish(path)?),
            keys,
            kind,
            tokens: options.length * kind.texts(),
            blank,
            cut,
            ignored: ignored.into_iter().collect(),
        })
    }

    /// One sample per pair.
    #[must_use]
    pub fn dataset(&self) -> &Dataset {
        &self.dataset
    }

    /// Number of tokens of a sample, k·L.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Whether a pair has a negative.
    #[must_use]
    pub fn has_negatives(&self) -> bool {
        self.kind == Kind::Triplet
    }

    /// Whether a pair has a score.
    #[must_use]
    pub fn has_scores(&self) -> bool {
        self.kind == Kind::Scored
    }

    /// The loss that suits the pairs: [`PairLoss::Cosine`] if they have scores, otherwise [`PairLoss::Contrastive`].
    #[must_use]
    pub fn loss(&self) -> PairLoss {
        match self.kind {
            Kind::Scored => PairLoss::Cosine,
            kind => PairLoss::Contrastive(Contrastive::default().negatives(kind == Kind::Triplet)),
        }
    }

    /// Number of blank lines, which were left out.
    #[must_use]
    pub fn blank_lines(&self) -> usize {
        self.blank
    }

    /// Number of texts that have more than L tokens, and were cut.
    #[must_use]
    pub fn cut(&self) -> usize {
        self.cut
    }

    /// Names of fields or columns that were not read.
    #[must_use]
    pub fn ignored(&self) -> &[String] {
        &self.ignored
    }

    /// Splits the pairs into those for training and those for validation, by their first texts: pairs of equal first texts are on one side,
    /// see [`Split`]. A pair that is one of the validation with its texts exchanged is on neither. Otherwise the second text of a pair may
    /// occur on both sides, as an answer to several questions does.
    ///
    /// # Errors
    /// As [`Split::new`], naming the file.
    pub fn split(&self, size: ValidationSize) -> Result<(Dataset, Dataset)> {
        let firsts = self.keys.iter().map(|[first, _]| Some(*first));
        let split = Split::new(firsts, size).map_err(|error| match error {
            Error::Data { name, reason } => Error::Data {
                name,
                reason: format!("{}: {reason}", self.dataset.path().display()),
            },
            other => other,
        })?;
        let exchanged: BTreeSet<[u64; 2]> = split
            .validation
            .iter()
            .map(|&number| {
                let [first, second] = self.keys[number];
                [second, first]
            })
            .collect();
        let training = split.training.into_iter();
        let training = training.filter(|&number| !exchanged.contains(&self.keys[number]));
        Ok((
            self.dataset.select(&training.collect::<Vec<_>>())?,
            self.dataset.select(&split.validation)?,
        ))
    }
}

impl Kind {
    fn texts(self) -> usize {
        match self {
            Self::Triplet => 3,
            _ => 2,
        }
    }

    fn has(self) -> &'static str {
        match self {
            Self::Pair => "has two texts and nothing else",
            Self::Triplet => "has a negative",
            Self::Scored => "has a score",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::Whitespace;

    fn read(content: &str) -> Result<Pairs> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pairs");
        std::fs::write(&path, content).unwrap();
        let tokenizer = Whitespace::new(["one", "two", "three"], 4).unwrap();
        Pairs::open(&path, &tokenizer, &PairOptions::new(4).largest_score(5.0))
    }

    fn samples(pairs: &Pairs) -> Vec<(Vec<u32>, Vec<u8>, f32)> {
        let samples = pairs.dataset().iter().map(Result::unwrap);
        samples
            .map(|sample| {
                (
                    sample.ids().to_vec(),
                    sample.mask().to_vec(),
                    sample.target()[0],
                )
            })
            .collect()
    }

    #[test]
    fn json_lines_and_tables_say_the_same() {
        let pair = |first: [u32; 4], second: [u32; 4], score| {
            let ids = [first, second].concat();
            let mask = ids.iter().map(|&id| u8::from(id != 0)).collect();
            (ids, mask, score)
        };
        let (one, two, cut) = ([2, 4, 3, 0], [2, 5, 3, 0], [2, 4, 5, 3]);
        let contents = [
            (
                "{\"anchor\": \"one\", \"positive\": \"two\"}\n\n{\"sentence2\": \"one two three\", \"query\": \"two\", \"id\": 7}",
                1,
            ),
            ("one\ttwo\r\ntwo\tone two three\r\n", 0),
            (
                "\u{feff}id\tQuestion\tAnswer\n1\tone\ttwo\n \t \n2\ttwo\tone two three",
                1,
            ),
        ];
        for (content, blank) in contents {
            let pairs = read(content).unwrap();
            let expected = [pair(one, two, 1.0), pair(two, cut, 1.0)];
            assert_eq!(samples(&pairs), expected, "{content}");
            assert_eq!((pairs.blank_lines(), pairs.cut()), (blank, 1), "{content}");
            assert_eq!(pairs.ignored().concat(), if blank == 1 { "id" } else { "" });
            assert_eq!(pairs.loss(), PairLoss::Contrastive(Contrastive::default()));
            assert_eq!(pairs.tokens(), 8);
        }
        for content in [
            "{\"a\": \"one\", \"b\": \"two\", \"score\": 2.5}\n{\"sentence1\": \"two\", \"sentence2\": \"one\", \"label\": -5}",
            "one\ttwo\t2.5\ntwo\tone\t-5",
        ] {
            let pairs = read(content).unwrap();
            assert_eq!(samples(&pairs), [pair(one, two, 0.5), pair(two, one, -1.0)]);
            assert!(pairs.has_scores() && pairs.loss() == PairLoss::Cosine);
        }
        for content in [
            "{\"anchor\": \"one\", \"positive\": \"two\", \"negative\": \"one\"}",
            "one\ttwo\tone",
        ] {
            let pairs = read(content).unwrap();
            assert_eq!(samples(&pairs)[0].0, [one, two, one].concat());
            assert!(pairs.has_negatives() && pairs.loss().texts() == 3);
            assert_eq!(pairs.tokens(), 12);
        }
    }

    #[test]
    fn mistakes_name_the_line() {
        let good = "{\"anchor\": \"one\", \"positive\": \"two\"}\n";
        let cases = [
            (
                "{\"anchor\": \"one\"}".to_owned(),
                "line 1: the second text is missing, one of positive",
            ),
            (
                format!("{good}{{\"positive\": \"one\"}}"),
                "line 2: the first text is missing",
            ),
            (
                format!("{good}\n{{\"anchor\": \"one\", \"positive\": \" \"}}"),
                "line 3: \"positive\" is blank",
            ),
            (
                format!("{good}{{\"anchor\": 1, \"positive\": \"x\"}}"),
                "line 2: \"anchor\" is no string",
            ),
            (
                format!("{good}{{\"anchor\": \"x\", \"query\": \"x\", \"b\": \"x\"}}"),
                "second name",
            ),
            (
                format!("{good}{{\"a\": \"x\", \"b\": \"x\", \"score\": 1}}"),
                "line 2: has a score, but the first line has two texts",
            ),
            (format!("{good}{{\"anchor\""), "line 2: EOF"),
            (format!("{good}one\ttwo"), "line 2: expected value"),
            (
                "{\"a\": \"x\", \"b\": \"x\", \"score\": \"1\"}".into(),
                "\"score\" is no number",
            ),
            (
                "{\"a\": \"x\", \"b\": \"x\", \"score\": 5.5}".into(),
                "5.5 is not in [-5, 5]",
            ),
            (
                "{\"a\": \"x\", \"b\": \"x\", \"score\": 1, \"negative\": \"y\"}".into(),
                "both a score and a negative",
            ),
            ("just a text".into(), "line 1: 1 columns"),
            (
                "a\tb\tscore\nx\ty\tz".into(),
                "line 2: the score \"z\" is no number",
            ),
            (
                "x\ty\n\nx\ty\tz".into(),
                "line 3: 3 columns, but the first line has 2",
            ),
            ("a\tb\n".into(), "no pairs"),
            ("\n \n".into(), "no pairs"),
            (String::new(), "no pairs"),
        ];
        for (content, word) in cases {
            let error = read(&content).unwrap_err().to_string();
            assert!(error.contains(word), "{content}: {error}");
        }
    }

    #[test]
    fn equal_first_texts_stay_together() {
        let lines = (0..60).map(|i| format!("one {}\ttwo {i}\n", i % 20));
        let pairs = read(&lines.collect::<String>()).unwrap();
        let (training, validation) = pairs.split(ValidationSize::Count(7)).unwrap();
        assert_eq!((training.len(), validation.len()), (51, 9));
        // An error names the file.
        let error = read("one\ttwo\none\tthree").unwrap();
        let error = error.split(ValidationSize::Count(1)).unwrap_err();
        assert!(error.to_string().contains("pairs: 1 different"), "{error}");
    }

    #[test]
    fn no_pair_of_the_validation_is_trained_on_the_other_way_round() {
        let words = |i: usize| ["one", "two", "three"][i % 3].repeat(1 + i / 3);
        let tokenizer = Whitespace::new((0..60).map(words), 4).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pairs");
        let lines = (0..30).map(|i| {
            let (a, b) = (words(i), words(i + 30));
            format!("{a}\t{b}\t0.5\n {b} \t{a}\t0.5\n")
        });
        std::fs::write(&path, lines.collect::<String>()).unwrap();
        let pairs = Pairs::open(&path, &tokenizer, &PairOptions::new(4)).unwrap();
        let (training, validation) = pairs.split(ValidationSize::Count(20)).unwrap();
        assert_eq!(validation.len(), 20);
        // Those that are left out are the others of validation pairs whose other one is not there, too.
        let kept = |dataset: &Dataset| -> BTreeSet<Vec<u32>> {
            dataset
                .iter()
                .map(|sample| sample.unwrap().ids().to_vec())
                .collect()
        };
        let (training, validation) = (kept(&training), kept(&validation));
        assert!(training.len() < 40 && training.len() >= 20);
        for ids in &validation {
            let exchanged = [&ids[4..], &ids[..4]].concat();
            assert!(!training.contains(&exchanged), "{ids:?}");
        }
    }
}
