//! Exact search for the nearest of many embeddings.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::embeddings::normalize;
use super::sample::data;
use super::text_encoder::TextEncoder;
use crate::error::{Error, Result};
use crate::gpu::{Alignment, Gpu, Layout, Tensor};
use crate::graph::Graph;
use crate::runtime::{Function, Recent, Selection};
use crate::setters::setters;
use crate::types::{DType, Trans};

/// How an [`Index`] keeps its embeddings.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct IndexOptions {
    /// Element type of the stored embeddings and queries: [`DType::F32`], or [`DType::F16`] for half the memory and cosines that are exact to
    /// about 1e-3. Sums are f32.
    pub dtype: DType,
    /// Upper bound on the rows of a chunk. An index has as many chunks as it needs; each is a matrix product of its own.
    pub chunk: usize,
}

impl Default for IndexOptions {
    /// f16, chunks of at most 131 072 rows.
    fn default() -> Self {
        Self {
            dtype: DType::F16,
            chunk: 1 << 17,
        }
    }
}

impl IndexOptions {
    setters! {
        dtype: DType,
        chunk: usize,
    }
}

/// An embedding that was found.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Hit {
    /// Number of the embedding in the index, in the order in which they were added.
    pub index: usize,
    /// Its cosine to the query.
    pub score: f32,
}

/// Embeddings on the device, and the exact nearest ones of any number of queries by cosine. Any thread may search.
///
/// Embeddings are divided by their norm when they are added. A zero vector stays zero and has cosine 0 with everything. Of embeddings with
/// equal cosines the one that was added first comes first.
///
/// Rows lie on the device in chunks, so that neither a binding's limit nor growing copies them. A text may be kept with each embedding, on the host.
///
/// ```
/// use energyflow::text::{Index, IndexOptions};
/// use energyflow::{Gpu, GpuOptions};
///
/// # fn main() -> energyflow::Result<()> {
/// let gpu = Gpu::new(&GpuOptions::default())?;
/// let mut index = Index::new(&gpu, 2, &IndexOptions::default())?;
/// index.add(&[1.0, 0.0, 0.0, 2.0, 1.0, 1.0], &["east", "north", "north-east"])?;
/// let hits = &index.search(&[0.1, 0.9], 2)?[0];
/// assert_eq!(index.text(hits[0].index), Some("north"));
/// assert_eq!(index.text(hits[1].index), Some("north-east"));
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Index {
    gpu: Gpu,
    pub(super) width: usize,
    pub(super) dtype: DType,
    /// Most rows of a chunk.
    most: usize,
    pub(super) chunks: Vec<Chunk>,
    /// One for each embedding, or none.
    pub(super) texts: Vec<String>,
    searches: Mutex<Recent<Key, Search>>,
}

/// Rows [capacity, E], of which the first ones are filled.
#[derive(Debug)]
pub(super) struct Chunk {
    pub rows: Tensor,
    pub len: usize,
    /// The same number for kernels.
    filled: Tensor,
}

/// Queries of a batch, rows of a chunk, results per query.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    queries: usize,
    rows: usize,
    k: usize,
}

/// What a search of one chunk runs, with memory for scores.
#[derive(Debug)]
struct Search {
    product: Function,
    scores: Tensor,
    selection: Selection,
}

/// Batch sizes of queries.
const BATCHES: [usize; 3] = [1, 8, 64];
/// Rows of the smallest chunk.
const SMALLEST: usize = 1024;
/// Compiled searches that are kept.
const SEARCHES: usize = 32;
/// Chunks of a submission, so that none takes long.
const TOGETHER: usize = 64;

impl Index {
    /// An empty index of embeddings of this width, E.
    ///
    /// # Errors
    /// [`Error::Config`] for a width of 0, chunks of 0 rows or a type that is no float; [`Error::Limit`] for rows that the adapter cannot bind.
    pub fn new(gpu: &Gpu, width: usize, options: &IndexOptions) -> Result<Self> {
        let fail = |field, reason: &str| {
            Err(Error::Config {
                field,
                reason: reason.into(),
            })
        };
        if width == 0 {
            return fail("width", "must be at least 1");
        }
        if options.chunk == 0 {
            return fail("chunk", "must be at least 1");
        }
        if options.dtype == DType::U32 {
            return fail("dtype", "must be f16 or f32");
        }
        let limits = &gpu.capabilities().limits;
        let limit = limits
            .max_storage_buffer_binding_size
            .min(limits.max_buffer_size);
        let row = Layout::new(1, width, options.dtype, Alignment::Bytes64)?.row_bytes() as u64;
        let largest = (limit / row).min(limit / (4 * BATCHES[2] as u64));
        if largest == 0 {
            return Err(Error::Limit {
                what: format!("an embedding of width {width}"),
                limit: "max_storage_buffer_binding_size",
                needed: row,
                available: limit,
            });
        }
        Ok(Self {
            gpu: gpu.clone(),
            width,
            dtype: options.dtype,
            most: options
                .chunk
                .min(usize::try_from(largest).unwrap_or(usize::MAX)),
            chunks: Vec::new(),
            texts: Vec::new(),
            searches: Mutex::new(Recent::new(SEARCHES)),
        })
    }

    /// An index of texts and their embeddings.
    ///
    /// # Errors
    /// As [`Index::new`] and [`Index::add_texts`].
    pub fn from_texts(
        encoder: &TextEncoder,
        texts: &[impl AsRef<str> + Sync],
        options: &IndexOptions,
    ) -> Result<Self> {
        let mut index = Self::new(encoder.gpu(), encoder.width(), options)?;
        index.add_texts(encoder, texts)?;
        Ok(index)
    }

    /// Number of embeddings.
    #[must_use]
    pub fn len(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.len).sum()
    }

    /// Whether there are no embeddings.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Width of an embedding, E.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    /// Element type of the stored embeddings.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The text of an embedding, if it was added with one.
    #[must_use]
    pub fn text(&self, index: usize) -> Option<&str> {
        self.texts.get(index).map(String::as_str)
    }

    /// Adds embeddings [n, E] at the end, with a text each or without any.
    ///
    /// # Errors
    /// [`Error::Data`] for values that are no whole rows, another number of texts, texts for some embeddings of the index only, NaN or
    /// infinity; [`Error::OutOfMemory`], [`Error::DeviceLost`]. The index is then as it was.
    pub fn add(&mut self, embeddings: &[f32], texts: &[impl AsRef<str>]) -> Result<()> {
        let mut rows = embeddings.to_vec();
        let n = self.check("embeddings", &rows)?;
        if !texts.is_empty() && texts.len() != n {
            let reason = format!("{} texts for {n} embeddings", texts.len());
            return Err(data("texts", reason));
        }
        let known = self.len();
        if n > 0 && known > 0 && self.texts.is_empty() != texts.is_empty() {
            let reason = match texts.is_empty() {
                true => "the embeddings of this index have texts, and these have none",
                false => "the embeddings of this index have no texts, and these have",
            };
            return Err(data("texts", reason));
        }
        normalize(&mut rows, self.width);
        self.append(&rows)?;
        let texts = texts.iter().map(|text| text.as_ref().to_owned());
        self.texts.extend(texts);
        Ok(())
    }

    /// Encodes texts and adds them.
    ///
    /// # Errors
    /// As [`TextEncoder::encode`] and [`Index::add`].
    pub fn add_texts(
        &mut self,
        encoder: &TextEncoder,
        texts: &[impl AsRef<str> + Sync],
    ) -> Result<()> {
        let embeddings = encoder.encode(texts)?;
        if embeddings.width() != self.width {
            return Err(data("embeddings", self.other_width(embeddings.width())));
        }
        self.add(embeddings.as_slice(), texts)
    }

    /// For each query of `queries` [q, E] the `k` embeddings with the highest cosines, best first; all of them if there are fewer than `k`.
    ///
    /// # Errors
    /// [`Error::Data`] for values that are no whole rows, NaN or infinity; [`Error::Config`] for a `k` above 4096 in an index that has more
    /// embeddings; [`Error::OutOfMemory`], [`Error::DeviceLost`].
    pub fn search(&self, queries: &[f32], k: usize) -> Result<Vec<Vec<Hit>>> {
        let n = self.check("queries", queries)?;
        let k = k.min(self.len());
        if k == 0 {
            return Ok(vec![Vec::new(); n]);
        }
        if k > Selection::MOST {
            return Err(Error::Config {
                field: "k",
                reason: format!("is {k}, but at most {} are found", Selection::MOST),
            });
        }
        let mut unit = queries.to_vec();
        normalize(&mut unit, self.width);
        let mut hits = Vec::with_capacity(n);
        let mut rest = unit.as_slice();
        while !rest.is_empty() {
            let waiting = rest.len() / self.width;
            let batch = BATCHES.into_iter().find(|&batch| batch >= waiting);
            let batch = batch.unwrap_or(BATCHES[2]);
            let (now, later) = rest.split_at(waiting.min(batch) * self.width);
            hits.extend(self.search_batch(now, batch, k)?);
            rest = later;
        }
        Ok(hits)
    }

    /// The nearest of texts: [`TextEncoder::encode`], then [`Index::search`].
    ///
    /// # Errors
    /// As these.
    pub fn search_texts(
        &self,
        encoder: &TextEncoder,
        texts: &[impl AsRef<str> + Sync],
        k: usize,
    ) -> Result<Vec<Vec<Hit>>> {
        let queries = encoder.encode(texts)?;
        if queries.width() != self.width {
            return Err(data("queries", self.other_width(queries.width())));
        }
        self.search(queries.as_slice(), k)
    }

    /// All embeddings [n, E], divided by their norm, as they are stored.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::DeviceLost`]
    pub fn embeddings(&self) -> Result<Vec<f32>> {
        let mut all = Vec::with_capacity(self.len() * self.width);
        for chunk in &self.chunks {
            let rows: Vec<f32> = chunk.rows.download(&self.gpu)?.wait()?;
            all.extend_from_slice(&rows[..chunk.len * self.width]);
        }
        Ok(all)
    }

    /// Writes the index as a safetensors file, whole or not at all: `embeddings` [n, E] and, if there are texts, `text` with `text_lengths`, as
    /// in a data set.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Data`] for a text of 4 GiB or more; [`Error::OutOfMemory`], [`Error::DeviceLost`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        super::index_file::save(self, path.as_ref())
    }

    /// Reads a file that [`Index::save`] wrote; the element type is that of the file.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] for a malformed file, one of another kind or a newer version, NaN or infinity; as [`Index::new`].
    pub fn load(gpu: &Gpu, path: impl AsRef<Path>) -> Result<Self> {
        super::index_file::load(gpu, path.as_ref())
    }

    fn other_width(&self, width: usize) -> String {
        format!(
            "have width {width}, but those of the index {}; it was made with another model",
            self.width
        )
    }

    /// Number of rows, which are finite.
    fn check(&self, name: &str, rows: &[f32]) -> Result<usize> {
        if !rows.len().is_multiple_of(self.width) {
            let reason = format!("{} values in rows of {}", rows.len(), self.width);
            return Err(data(name, reason));
        }
        match rows.iter().position(|x| !x.is_finite()) {
            Some(i) => {
                let (row, col) = (i / self.width, i % self.width);
                Err(data(
                    name,
                    format!("row {row}, column {col} is {}", rows[i]),
                ))
            }
            None => Ok(rows.len() / self.width),
        }
    }

    /// Adds rows that are normalised already. What is already there changes only when everything is on its way to the device.
    pub(super) fn append(&mut self, rows: &[f32]) -> Result<()> {
        let mut rest = rows;
        // Rows that go to the last chunk, which is filled up first.
        let mut last = 0;
        if let Some(chunk) = self.chunks.last() {
            let room = chunk.rows.layout().rows() - chunk.len;
            let (now, later) = rest.split_at(rest.len().min(room * self.width));
            chunk.rows.upload_rows(&self.gpu, chunk.len, now)?;
            last = now.len() / self.width;
            rest = later;
        }
        let mut new = Vec::new();
        let mut total = self.len() + last;
        while !rest.is_empty() {
            let waiting = rest.len() / self.width;
            let capacity = waiting.max(total).max(SMALLEST).next_power_of_two();
            let capacity = capacity.min(self.most);
            let rows = Layout::new(capacity, self.width, self.dtype, Alignment::Bytes64)?;
            let (now, later) = rest.split_at(rest.len().min(capacity * self.width));
            let chunk = Chunk {
                rows: Tensor::zeroed(&self.gpu, rows)?,
                len: now.len() / self.width,
                filled: Tensor::zeroed(&self.gpu, Selection::filled()?)?,
            };
            chunk.rows.upload_rows(&self.gpu, 0, now)?;
            chunk.filled.upload(&self.gpu, &[chunk.len as u32])?;
            total += chunk.len;
            new.push(chunk);
            rest = later;
        }
        if let Some(chunk) = self.chunks.last_mut()
            && last > 0
        {
            chunk
                .filled
                .upload(&self.gpu, &[(chunk.len + last) as u32])?;
            chunk.len += last;
        }
        self.chunks.append(&mut new);
        Ok(())
    }

    /// Of at most `batch` queries, normalised.
    fn search_batch(&self, queries: &[f32], batch: usize, k: usize) -> Result<Vec<Vec<Hit>>> {
        let n = queries.len() / self.width;
        let mut padded = queries.to_vec();
        padded.resize(batch * self.width, 0.0);
        // So that different k share what is compiled.
        let compiled_k = k.next_power_of_two();
        let layout = Layout::new(batch, self.width, self.dtype, Alignment::Bytes64)?;
        let tensor = Tensor::uninit(&self.gpu, layout)?;
        let mut found: Vec<Vec<Hit>> = vec![Vec::new(); n];
        let mut first = 0;
        for chunks in self.chunks.chunks(TOGETHER) {
            let mut recorder = self.gpu.recorder("search");
            recorder.upload(&tensor, &padded)?;
            let mut results = Vec::with_capacity(2 * chunks.len());
            let mut held = Vec::with_capacity(chunks.len());
            let mut layouts = None;
            for chunk in chunks {
                let key = Key {
                    queries: batch,
                    rows: chunk.rows.layout().rows(),
                    k: compiled_k,
                };
                let search = self.prepared(key)?;
                let inputs = [("queries", &tensor), ("rows", &chunk.rows)];
                let outputs = [("scores", &search.scores)];
                search.product.record(&mut recorder, &inputs, &outputs)?;
                let to = search.selection.layouts();
                let slices = to.map(|layout| {
                    let buffer = self.gpu.buffer(layout.size_bytes(), "best")?;
                    buffer.slice(0, layout.size_bytes())
                });
                let [scores, columns] = slices;
                let (scores, columns) = (scores?, columns?);
                let filled = chunk.filled.slice();
                let selection = &search.selection;
                selection.record(&mut recorder, &search.scores, filled, [&scores, &columns])?;
                results.extend([scores, columns]);
                layouts = Some(to);
                held.push(search);
            }
            let Some([scores, columns]) = layouts else {
                break;
            };
            // The device may still be busy with another search, so that memory of this one lives until it is done.
            let read = recorder.read_back(&results, move |pieces| {
                let pairs = pieces.chunks_exact(2).map(|pair| {
                    let scores: Vec<f32> = scores.unpack(pair[0])?;
                    let columns: Vec<u32> = columns.unpack(pair[1])?;
                    Ok((scores, columns))
                });
                pairs.collect::<Result<Vec<_>>>()
            })?;
            for (chunk, (scores, columns)) in chunks.iter().zip(read.wait()?) {
                for (query, found) in found.iter_mut().enumerate() {
                    let best = query * compiled_k..(query + 1) * compiled_k;
                    let best = scores[best.clone()].iter().zip(&columns[best]);
                    let filled = best.filter(|&(_, &column)| (column as usize) < chunk.len);
                    found.extend(filled.map(|(&score, &column)| Hit {
                        index: first + column as usize,
                        score,
                    }));
                }
                first += chunk.len;
            }
            drop(held);
        }
        for found in &mut found {
            // Adding zero turns −0 into +0, so that the two are equal.
            let key = |hit: &Hit| hit.score + 0.0;
            found.sort_unstable_by(|a, b| key(b).total_cmp(&key(a)).then(a.index.cmp(&b.index)));
            found.truncate(k);
        }
        Ok(found)
    }

    fn prepared(&self, key: Key) -> Result<Arc<Search>> {
        let lock = || self.searches.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(search) = lock().find(&key) {
            return Ok(search);
        }
        let mut graph = Graph::new();
        let queries = graph.input("queries", &[key.queries, self.width], self.dtype)?;
        let rows = graph.input("rows", &[key.rows, self.width], self.dtype)?;
        let scores = graph.matmul_as(queries, rows, Trans::NT, DType::F32)?;
        graph.output("scores", scores)?;
        let layout = Layout::new(key.queries, key.rows, DType::F32, Alignment::Bytes64)?;
        let search = Arc::new(Search {
            product: Function::new(&self.gpu, &graph)?,
            scores: Tensor::uninit(&self.gpu, layout)?,
            selection: Selection::new(&self.gpu, layout, key.k)?,
        });
        let mut searches = lock();
        searches.insert(key, Arc::clone(&search));
        searches.evict();
        Ok(search)
    }
}
