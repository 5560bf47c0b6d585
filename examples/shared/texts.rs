//! Training data from a text file and a teacher.

use std::error::Error;
use std::path::PathBuf;

use energyflow::Gpu;
use energyflow::text::{Batches, TeacherTable, TextFile, Tokenizer, WordPiece};

use super::opened::Opened;
use super::options::Training;
use super::teacher::{Storage, Teacher};
use super::validation::{Validation, limit_batch};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// A text file instead of data that are made already.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "From a text file to a model")]
pub struct Texts {
    /// Train on this file: one text per line, UTF-8. The teacher embeds it first; the embeddings are kept beside it
    #[arg(
        long,
        value_name = "FILE",
        requires = "teacher",
        conflicts_with_all = ["train", "validation", "tokenizer", "samples"]
    )]
    texts: Option<PathBuf>,
    /// The teacher: a folder of sentence-transformers (BERT family, with model.safetensors), or with --features hub the name of a model
    /// on the Hugging Face hub, such as sentence-transformers/all-MiniLM-L6-v2
    #[arg(long, value_name = "DIR", requires = "texts")]
    teacher: Option<String>,
    /// Storage of the teacher's activations; sums are f32
    #[arg(long, value_enum, default_value = "f32", requires = "texts")]
    teacher_precision: Storage,
    /// Keep the teacher's embeddings in this file instead of FILE.TEACHER.safetensors
    #[arg(long, value_name = "FILE", requires = "texts")]
    cache: Option<PathBuf>,
    #[command(flatten)]
    validation: Validation,
}

/// A text file that was embedded and split.
pub struct FromTexts<'a> {
    pub data: Opened,
    pub texts: TextFile,
    /// The file of the teacher's embeddings.
    embeddings: PathBuf,
    teacher: Teacher<'a>,
}

impl FromTexts<'_> {
    /// The teacher's vectors of the tokens of the student, whose vocabulary is that of the tokenizer. The teacher's own may be padded.
    pub fn table(&self) -> Outcome<TeacherTable> {
        let vocabulary = self.data.tokenizer.vocab_size();
        self.teacher.table(&self.embeddings, vocabulary)
    }
}

impl Texts {
    /// Embeds and splits the file, if there is one. Texts have `length` tokens in the training.
    pub fn open<'a>(
        &self,
        gpu: &'a Gpu,
        length: usize,
        training: &mut Training,
    ) -> Outcome<Option<FromTexts<'a>>> {
        let (Some(path), Some(teacher)) = (&self.texts, &self.teacher) else {
            return Ok(None);
        };
        let texts = TextFile::open(path)?;
        // Before the teacher works for nothing.
        let split = texts.split(self.validation.of(texts.texts()))?;
        let teacher = Teacher::load(gpu, teacher, self.teacher_precision)?;
        let Some(json) = &teacher.model.tokenizer else {
            return Err(format!("the teacher {} has no tokenizer.json", teacher.name).into());
        };
        let tokenizer = WordPiece::from_bytes(json, length)?;
        let embeddings = teacher.embed(&texts, self.cache.as_deref())?;
        let all = texts.dataset(&embeddings, &tokenizer)?;
        let train = all.select(&split.training)?;
        let validation = all.select(&split.validation)?;
        println!(
            "data    {} texts to train, {} to validate; {} different ones, {} blank lines left out",
            train.len(),
            validation.len(),
            split.distinct,
            texts.lines() - texts.texts()
        );
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let description = format!(
            "{} texts of `{name}`, embedded by `{}`.",
            train.len(),
            teacher.name
        );
        limit_batch(training, train.len());
        let batches = Batches::training(train, training.batch, length, training.seed)?
            .padding(tokenizer.padding_id().unwrap_or(0));
        let data = Opened {
            batches,
            validation,
            tokenizer_json: json.clone(),
            tokenizer: std::sync::Arc::new(tokenizer),
            description,
        };
        Ok(Some(FromTexts {
            data,
            texts,
            embeddings,
            teacher,
        }))
    }
}
