//! Models that are named instead of lying in a folder.

use std::error::Error;
use std::path::{Path, PathBuf};

/// The folder of a model: the folder that is named, or that of a model of the Hugging Face hub such as `sentence-transformers/all-MiniLM-L6-v2`, which is fetched.
pub fn folder(model: &str) -> Result<PathBuf, Box<dyn Error>> {
    let folder = Path::new(model);
    let of_hub = model.matches('/').count() == 1 && !model.starts_with(['.', '/']);
    if folder.exists() || !of_hub {
        return Ok(folder.to_owned());
    }
    #[cfg(feature = "hub")]
    {
        use energyflow::text::hub::{HubOptions, fetch_with};
        let fetched = fetch_with(model, &HubOptions::default().progress(true));
        fetched.map_err(|error| {
            format!("{model}: no such folder, and as a model of the hub: {error}").into()
        })
    }
    #[cfg(not(feature = "hub"))]
    Err(format!(
        "{model}: no such folder; if it is a model of the Hugging Face hub, run the example with --features hub"
    )
    .into())
}
