//! What to say where there is no model.

use std::error::Error;
use std::io::ErrorKind;
use std::path::Path;

/// The error of loading a model folder. If there is no model, it says where one is, or how to train one with the example `training`.
pub fn explain(folder: &Path, training: &str, error: energyflow::Error) -> Box<dyn Error> {
    let missing = matches!(&error, energyflow::Error::Io { source, .. }
        if matches!(source.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory));
    if !missing || folder.join("config.json").exists() {
        return error.into();
    }
    let inside = folder.join("model");
    let shown = folder.display();
    match inside.join("config.json").exists() {
        true => format!("{shown}: no model here; did you mean {}?", inside.display()),
        false => format!(
            "{shown}: no model here; train one first: cargo run --release --example {training}"
        ),
    }
    .into()
}
