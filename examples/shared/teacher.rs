//! A teacher, and what it is asked.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::ValueEnum;
use energyflow::Gpu;
use energyflow::text::{
    CacheState, EmbeddingType, Precision, SentenceTransformer, TeacherCache, TeacherTable,
    TextEncoderOptions, TextFile, TransformerModel,
};
use indicatif::{ProgressBar, ProgressStyle};

use super::hub::folder;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Element type of the teacher's activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Storage {
    F32,
    F16,
}

/// A teacher that is loaded.
pub struct Teacher<'a> {
    gpu: &'a Gpu,
    pub model: TransformerModel,
    precision: Storage,
    /// Its name in the names of files.
    pub name: String,
    /// What its embeddings depend on.
    source: String,
}

impl<'a> Teacher<'a> {
    /// Loads a teacher by its folder or its name on the hub.
    pub fn load(gpu: &'a Gpu, teacher: &str, precision: Storage) -> Outcome<Self> {
        let folder = &folder(teacher)?;
        let model = TransformerModel::load(folder)?;
        let name = teacher.trim_end_matches(['/', '\\']);
        let name = Path::new(name).file_name();
        let name = name.map_or("teacher".into(), |name| name.to_string_lossy());
        let source = model.fingerprint();
        Ok(Self {
            gpu,
            model,
            precision,
            name: name.into_owned(),
            source: format!("{source} {precision:?}"),
        })
    }

    fn start(&self, normalize: Option<bool>) -> energyflow::Result<SentenceTransformer> {
        let options = TextEncoderOptions::default()
            .normalize(normalize)
            .precision(match self.precision {
                Storage::F32 => Precision::F32,
                Storage::F16 => Precision::Mixed,
            });
        SentenceTransformer::new(self.gpu, self.model.clone(), &options)
    }

    /// Embeds the texts, unless that was done before. Returns the file of the embeddings.
    pub fn embed(&self, texts: &TextFile, cache: Option<&Path>) -> Outcome<PathBuf> {
        let path = match cache {
            Some(path) => path.to_owned(),
            None => {
                let mut path = texts.path().to_owned().into_os_string();
                path.push(format!(".{}.safetensors", self.name));
                PathBuf::from(path)
            }
        };
        let named = cache.is_some();
        let cache = TeacherCache::new(&path, texts, &self.source);
        let shown = path.display();
        let why = match cache.state()? {
            CacheState::Whole => {
                println!("teacher embeddings are there: {shown}");
                return Ok(path);
            }
            CacheState::Missing => None,
            CacheState::OtherTexts => Some("the texts have changed".to_owned()),
            CacheState::OtherTeacher => Some("the teacher or its precision has changed".to_owned()),
            // It may be anything, the texts for example.
            CacheState::Damaged(reason) if named => {
                return Err(format!(
                    "--cache: {reason}. It is not replaced: delete it, or choose another file"
                )
                .into());
            }
            CacheState::Damaged(reason) => Some(reason),
            other => Some(format!("{other:?}")),
        };
        if let Some(why) = why {
            println!("teacher {shown} is made again: {why}");
        }
        let start = Instant::now();
        let teacher = self.start(None)?;
        let bar = progress(texts.lines() as u64, "lines")?;
        let encode = |lines: &[String]| teacher.encode(lines);
        let show = |done: usize| bar.set_position(done as u64);
        let written = cache.write(texts, teacher.width(), EmbeddingType::F16, encode, show);
        bar.finish_and_clear();
        let cut = written?;
        let seconds = start.elapsed().as_secs_f64();
        println!(
            "teacher embedded {} texts in {seconds:.1} s, {:.0} texts/s: {shown}",
            texts.texts(),
            texts.texts() as f64 / seconds
        );
        if cut > 0 {
            println!(
                "teacher {cut} texts have more than {} tokens, of which it saw the first ones only",
                self.model.options.length
            );
        }
        Ok(path)
    }

    /// The teacher's vectors of the first tokens of its vocabulary, from a file beside the `embeddings` if they were made before.
    pub fn table(&self, embeddings: &Path, vocabulary: u32) -> Outcome<TeacherTable> {
        let source = self.source.replace(' ', "-");
        let path = embeddings.with_extension(format!("{source}.table.safetensors"));
        if path.exists() {
            match TeacherTable::load(&path) {
                Ok(table) if table.vocabulary() == vocabulary as usize => {
                    return Ok(table);
                }
                Ok(_) => println!(
                    "start   {} is of another size: it is made again",
                    path.display()
                ),
                Err(error) => println!("start   it is made again: {error}"),
            }
        }
        let teacher = self.start(Some(false))?;
        let special = |names: [&str; 2]| {
            let mut ids = names
                .iter()
                .filter_map(|name| teacher.tokenizer().token_id(name));
            ids.next()
                .ok_or_else(|| format!("the teacher's tokenizer has no token {}", names[0]))
        };
        let ends = [special(["[CLS]", "<s>"])?, special(["[SEP]", "</s>"])?];
        println!(
            "start   the teacher embeds the {vocabulary} tokens of its vocabulary, once; they are kept in {}",
            path.display()
        );
        let bar = progress(u64::from(vocabulary), "tokens")?;
        let encode = |texts: &[[u32; 3]]| {
            let mut values = Vec::new();
            for part in texts.chunks(PART) {
                values.extend(teacher.encode_ids(part)?.into_vec());
                bar.inc(part.len() as u64);
            }
            Ok(values)
        };
        let table = TeacherTable::encode(vocabulary, ends, encode);
        bar.finish_and_clear();
        let table = table?;
        table.save(&path, EmbeddingType::F16)?;
        Ok(table)
    }
}

/// Tokens that are embedded between two moves of the bar.
const PART: usize = 4096;

/// A bar on the terminal.
fn progress(length: u64, what: &str) -> Outcome<ProgressBar> {
    let template =
        format!("{{elapsed_precise}} [{{bar:32}}] {{pos}}/{{len}} {what} embedded, {{eta}} left");
    let bar = ProgressBar::new(length);
    bar.set_style(ProgressStyle::with_template(&template)?);
    Ok(bar)
}
