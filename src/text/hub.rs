//! Models from the Hugging Face hub.

use std::fs::File;
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::setters::setters;

/// The largest file, which is fetched last: where it is, the others are, too.
const WEIGHTS: &str = "model.safetensors";

/// Files of a model that [`TransformerModel`](super::TransformerModel) reads, by name without folder.
const WANTED: [&str; 8] = [
    "modules.json",
    "config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
];

/// Attempts to fetch a file that turns out to be damaged.
const ATTEMPTS: usize = 2;

/// Where models come from and where they are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HubOptions {
    /// Address of the hub, without a slash at the end. `None`: as the variable `HF_ENDPOINT` says, or `https://huggingface.co`.
    pub endpoint: Option<String>,
    /// Folder of fetched models, which other libraries share. `None`: the folder `hub` in what the variable `HF_HOME` says, or in
    /// `~/.cache/huggingface`.
    pub cache: Option<PathBuf>,
    /// Branch, tag or commit.
    pub revision: String,
    /// How often an interrupted download goes on by itself.
    pub retries: usize,
    /// Whether progress is drawn on the terminal.
    pub progress: bool,
}

impl Default for HubOptions {
    /// What the variables say, the branch `main`, three retries, no progress.
    fn default() -> Self {
        Self {
            endpoint: None,
            cache: None,
            revision: "main".into(),
            retries: 3,
            progress: false,
        }
    }
}

impl HubOptions {
    setters! {
        endpoint: Option<String>,
        cache: Option<PathBuf>,
        revision: String,
        retries: usize,
        progress: bool,
    }
}

/// The folder of a model such as `sentence-transformers/all-MiniLM-L6-v2`, fetched if it is not in the cache already.
///
/// A download that was interrupted goes on where it ended, also in a later call. The weights are compared with the SHA-256 that the hub
/// states for them, each time: a damaged file is removed and fetched once more. A model that is in the cache needs no network.
/// Pass the folder to [`SentenceTransformer::load`](super::SentenceTransformer::load).
///
/// # Errors
/// [`Error::Config`] for a name that cannot be one; [`Error::Download`] if the hub cannot be reached, has no such model, or sends something
/// damaged; [`Error::Io`] from the cache.
pub fn fetch(model: &str) -> Result<PathBuf> {
    fetch_with(model, &HubOptions::default())
}

/// As [`fetch`], with options.
///
/// # Errors
/// As [`fetch`].
pub fn fetch_with(model: &str, options: &HubOptions) -> Result<PathBuf> {
    check_name(model)?;
    let cache = match &options.cache {
        Some(folder) => Cache::new(folder.clone()),
        None => Cache::from_env(),
    };
    let repo = || Repo::with_revision(model.to_owned(), RepoType::Model, options.revision.clone());
    if let Some(path) = cache.repo(repo()).get(WEIGHTS) {
        if is_intact(&path)? {
            return folder_of(&path);
        }
        discard(&path)?;
    }
    let mut builder = ApiBuilder::from_env()
        .with_cache_dir(cache.path().clone())
        .with_retries(options.retries)
        .with_progress(options.progress);
    if let Some(endpoint) = &options.endpoint {
        builder = builder.with_endpoint(endpoint.clone());
    }
    let api = call(model, || builder.build())?;
    let remote = api.repo(repo());
    let info = call(model, || remote.info())?;
    let mut files: Vec<String> = info
        .siblings
        .into_iter()
        .map(|file| file.rfilename)
        .collect();
    files.retain(|file| is_wanted(file));
    if !files.iter().any(|file| file == WEIGHTS) {
        return Err(download(model, format!("the hub has no {WEIGHTS} for it")));
    }
    files.sort_by_key(|file| (file == WEIGHTS, file.clone()));
    let mut folder = None;
    for file in &files {
        let path = fetch_file(&api, &remote, &cache, repo(), file)?;
        // All files of a commit lie in one folder.
        let levels = file.matches('/').count() + 1;
        let above = path.ancestors().nth(levels).map(Path::to_owned);
        match (&folder, above) {
            (Some(known), Some(above)) if *known != above => {
                let reason = "the model changed while it was fetched; try again".to_owned();
                return Err(download(model, reason));
            }
            (_, above) => folder = above,
        }
    }
    folder.ok_or_else(|| download(model, "the cache has no folder for it".into()))
}

/// Whether a file is part of a model; at most one folder deep, so that nothing is written anywhere else.
fn is_wanted(file: &str) -> bool {
    match file.split_once('/') {
        None => file == WEIGHTS || WANTED.contains(&file),
        // Pooling, and so on.
        Some((folder, "config.json")) => {
            let (number, name) = folder.split_once('_').unwrap_or_default();
            !number.is_empty()
                && number.bytes().all(|byte| byte.is_ascii_digit())
                && name.bytes().all(|byte| byte.is_ascii_alphanumeric())
        }
        Some(_) => false,
    }
}

/// `owner/name` or `name`.
fn check_name(model: &str) -> Result<()> {
    let part = |part: &str| {
        let known = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        !part.is_empty() && !part.starts_with('.') && part.chars().all(known)
    };
    let parts: Vec<&str> = model.split('/').collect();
    if parts.len() <= 2 && parts.into_iter().all(part) {
        return Ok(());
    }
    Err(Error::Config {
        field: "model",
        reason: format!(
            "is {model:?}, which is no name on the hub, such as sentence-transformers/all-MiniLM-L6-v2"
        ),
    })
}

/// The path of a file in the cache, which holds what the hub says.
fn fetch_file(
    api: &Api,
    remote: &ApiRepo,
    cache: &Cache,
    repo: Repo,
    file: &str,
) -> Result<PathBuf> {
    let url = remote.url(file);
    let mut last = None;
    for _ in 0..ATTEMPTS {
        match call(&url, || remote.get(file)) {
            Ok(path) if is_intact(&path)? => return Ok(path),
            Ok(path) => {
                log::warn!("{url}: the file is damaged and is fetched again");
                discard(&path)?;
                let reason = "what was received has another SHA-256 than the hub states";
                last = Some(download(&url, reason.into()));
            }
            Err(error) => {
                // A beginning that is as long as the whole cannot be continued.
                if let Ok(metadata) = call(&url, || api.metadata(&url)) {
                    let mut part = cache.repo(repo.clone()).blob_path(metadata.etag());
                    part.set_extension("part");
                    let long = std::fs::metadata(&part)
                        .is_ok_and(|part| part.len() >= metadata.size() as u64);
                    if long {
                        remove(&part)?;
                        last = Some(error);
                        continue;
                    }
                }
                return Err(error);
            }
        }
    }
    Err(last.unwrap_or_else(|| download(&url, "there was no attempt".into())))
}

/// Whether the content is what its name in the cache says. Large files are named by their SHA-256, others are not compared.
fn is_intact(path: &Path) -> Result<bool> {
    let fail = |error| Error::io(path, error);
    let blob = std::fs::canonicalize(path).map_err(fail)?;
    let name = blob
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    if name.len() != 64 || !name.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Ok(true);
    }
    let mut file = File::open(&blob).map_err(fail)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(fail)? {
            0 => break,
            read => hash.update(&buffer[..read]),
        }
    }
    let digest = hash.finalize();
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(hex == name.to_ascii_lowercase())
}

/// Removes a damaged file, and the link to it.
fn discard(path: &Path) -> Result<()> {
    let blob = std::fs::canonicalize(path).map_err(|error| Error::io(path, error))?;
    remove(path)?;
    match blob == path {
        true => Ok(()),
        false => remove(&blob),
    }
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path, error)),
        _ => Ok(()),
    }
}

fn folder_of(path: &Path) -> Result<PathBuf> {
    let missing = || std::io::Error::from(std::io::ErrorKind::NotFound);
    let folder = path.parent().map(Path::to_owned);
    folder.ok_or_else(|| Error::io(path, missing()))
}

/// The crate panics at some answers of a server that break the protocol.
fn call<T>(what: &str, call: impl FnOnce() -> std::result::Result<T, ApiError>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(download(what, error.to_string())),
        Err(_) => Err(download(what, "the server's answer is malformed".into())),
    }
}

fn download(what: &str, reason: String) -> Error {
    let what = what.to_owned();
    Error::Download { what, reason }
}
