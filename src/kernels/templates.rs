//! The WGSL templates, compiled into the crate.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use minijinja::{Environment, UndefinedBehavior, Value};

use crate::error::{Error, Result};

macro_rules! templates {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../wgsl/", $name, ".wgsl")))),*]
    };
}

const TEMPLATES: &[(&str, &str)] = templates![
    "adamw",
    "attention",
    "attention_cooperative",
    "attention_grad_cooperative",
    "attention_grad_key",
    "attention_grad_query",
    "col2im",
    "column_sums",
    "corrections",
    "cross_entropy",
    "cross_entropy_count",
    "cross_entropy_grad",
    "cross_entropy_total",
    "cross_entropy_value_grad",
    "decode_parts",
    "decode_sample",
    "decode_taps",
    "elementwise",
    "gather",
    "gather_grad",
    "gather_links",
    "gather_links_sorted",
    "gather_merge",
    "gather_segments",
    "gather_sort",
    "gemm_cooperative",
    "gemm_direct",
    "gemm_skinny",
    "gemm_tiled",
    "group_sums",
    "im2col",
    "kd_loss",
    "kd_loss_grad",
    "kd_loss_total",
    "layer_norm",
    "layer_norm_grad",
    "mask_counts",
    "masked_mean_grad",
    "norm_partial",
    "reshape",
    "row_max",
    "row_sums",
    "shared/attention",
    "shared/better",
    "shared/cell",
    "shared/group",
    "shared/moments",
    "shared/nan",
    "shared/over_all",
    "shared/pcg4d",
    "shared/reduce",
    "shared/shares",
    "shared/scores",
    "shared/softmax",
    "shared/tile",
    "shared/window",
    "softmax",
    "softmax_grad",
    "split_sums",
    "stack",
    "sum_parts",
    "top_k",
    "top_k_direct",
    "total",
];

static ENVIRONMENT: LazyLock<Result<Environment<'static>, String>> = LazyLock::new(|| {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    for (name, text) in TEMPLATES {
        environment
            .add_template(name, text)
            .map_err(|error| format!("template {name}: {error:#}"))?;
    }
    Ok(environment)
});

pub(super) fn render(
    name: &str,
    header: &str,
    numbers: &BTreeMap<&'static str, Value>,
) -> Result<String> {
    let fail = |reason: String| Error::Validation {
        what: format!("kernel template {name}"),
        reason,
    };
    let environment = ENVIRONMENT.as_ref().map_err(|text| fail(text.clone()))?;
    let template = environment
        .get_template(name)
        .map_err(|error| fail(format!("{error:#}")))?;
    let body = template
        .render(numbers)
        .map_err(|error| fail(format!("{error:#}")))?;
    // Statements of the template language leave empty lines behind.
    let lines = body.lines().filter(|line| !line.trim().is_empty());
    Ok(lines.fold(header.to_owned(), |text, line| text + line + "\n"))
}

/// Names of all kernels, for tests that check that none is left out.
#[cfg(test)]
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    let names = TEMPLATES.iter().map(|(name, _)| *name);
    names.filter(|name| !name.starts_with("shared/"))
}
