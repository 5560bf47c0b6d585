//! The options of an encoder's network and of its start.

use std::error::Error;
use std::path::PathBuf;
use std::time::Instant;

use clap::ValueEnum;
use energyflow::text::{
    Dataset, EncoderOptions, EncoderPooling, StartOptions, TeacherTable, Trainer, TrainerOptions,
};
use energyflow::train::ParameterGroup;

/// The table of the bundled data.
const BUNDLED: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/data/teacher_table.safetensors"
);

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Pooling {
    Mean,
    Attention,
}

/// Flatten it into the options of an example: `#[command(flatten)] network: Network`.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Network")]
pub struct Network {
    /// Width of the network
    #[arg(long, value_name = "D", default_value_t = 128)]
    width: usize,
    /// Width inside a block
    #[arg(long, value_name = "H", default_value_t = 128)]
    hidden: usize,
    /// Taps of the convolutions
    #[arg(long, value_name = "K", default_value_t = 3)]
    kernel: usize,
    /// Dilation of each block
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1")]
    dilations: Vec<usize>,
    /// No blocks: a token has the same vector in every text
    #[arg(long = "static", conflicts_with = "dilations")]
    is_static: bool,
    /// A token sees earlier tokens only, instead of those on both sides
    #[arg(long)]
    causal: bool,
    /// Blocks with gates
    #[arg(long)]
    gated: bool,
    /// How a text's vector is made of those of its tokens
    #[arg(long, value_enum, default_value = "attention")]
    pooling: Pooling,
    /// Width of an expanding head; 0: the head is a linear layer
    #[arg(long, value_name = "W", default_value_t = 1536)]
    expansion: usize,
    /// Share of the words that are dropped in training
    #[arg(long, value_name = "RATE", default_value_t = 0.0)]
    word_dropout: f32,
    /// Learning rate of the token table, as a share of that of the rest
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0)]
    table_rate: f32,
    /// Without a start from the teacher, the token table is uniform in ± this
    #[arg(long, value_name = "BOUND", default_value_t = 0.05)]
    table_bound: f32,
    /// The teacher's vectors of single tokens (.npy or safetensors), from which the token table and the head start; "none": random.
    /// Without it those of --teacher, otherwise data/teacher_table.safetensors
    #[arg(long, value_name = "FILE")]
    start: Option<PathBuf>,
    /// Standard deviation of the token table when it starts from the teacher: 0.2 for some thousand texts, 0.05 for 100 000
    #[arg(long, value_name = "DEVIATION", default_value_t = StartOptions::default().deviation)]
    start_deviation: f32,
    /// Factor on the initial weights of each block's last convolution when the encoder starts from the teacher
    #[arg(long, value_name = "FACTOR", default_value_t = StartOptions::default().block_scale)]
    start_blocks: f32,
    /// Regularisation of the head when the encoder starts from the teacher
    #[arg(long, value_name = "RIDGE", default_value_t = StartOptions::default().ridge)]
    start_ridge: f32,
}

impl Network {
    /// The network, without vocabulary, length, embedding, dropout and padding.
    pub fn options(&self) -> EncoderOptions {
        let dilations = match self.is_static {
            true => Vec::new(),
            false => self.dilations.clone(),
        };
        EncoderOptions::default()
            .width(self.width)
            .hidden(self.hidden)
            .kernel(self.kernel)
            .dilations(dilations)
            .centred(!self.causal)
            .gated(self.gated)
            .pooling(match self.pooling {
                Pooling::Mean => EncoderPooling::Mean,
                Pooling::Attention => EncoderPooling::Attention,
            })
            .expansion((self.expansion > 0).then_some(self.expansion))
            .word_dropout(self.word_dropout)
            .table_bound(self.table_bound)
    }

    /// The options of a training, with the learning rate of the table.
    pub fn rates(&self, mut options: TrainerOptions) -> TrainerOptions {
        if self.table_rate != 1.0 {
            let table = ParameterGroup::new("table").names(["embedding"]);
            options.optimizer = options.optimizer.group(table.lr_scale(self.table_rate));
        }
        options
    }

    /// Starts the encoder from a teacher, unless that is turned off. `own` gives the table of the teacher at hand, if there is one.
    pub fn start(
        &self,
        trainer: &mut Trainer,
        data: &Dataset,
        own: Option<&dyn Fn() -> Result<TeacherTable, Box<dyn Error>>>,
    ) -> Result<(), Box<dyn Error>> {
        let start = Instant::now();
        let (name, table) = match (&self.start, own) {
            (Some(path), _) if path.as_os_str() == "none" => return Ok(()),
            (Some(path), _) => (path.display().to_string(), TeacherTable::load(path)?),
            (None, Some(own)) => ("the teacher".to_owned(), own()?),
            (None, None) => (BUNDLED.to_owned(), TeacherTable::load(BUNDLED)?),
        };
        let options = StartOptions::default()
            .deviation(self.start_deviation)
            .block_scale(self.start_blocks)
            .ridge(self.start_ridge);
        trainer.start(&table, data, &options)?;
        println!(
            "start   from {name}, {} values per token, in {:.1} s",
            table.width(),
            start.elapsed().as_secs_f64()
        );
        Ok(())
    }
}
