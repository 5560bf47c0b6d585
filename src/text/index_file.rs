//! An index as a file.

use std::path::Path;

use half::f16;
use half::slice::HalfFloatSliceExt;
use safetensors::Dtype;

use super::index::{Index, IndexOptions};
use super::sample::data;
use crate::error::Result;
use crate::file::{AtomicFile, TensorFile, TensorOut, floats, write_tensors};
use crate::gpu::Gpu;
use crate::types::DType;

const FORMAT: &str = "index";
const VERSION: u32 = 1;

/// Bytes of embeddings that are read at a time.
const PIECE: usize = 64 << 20;

/// How far the norm of an embedding may be from 1; f16 rounds.
const NORM: f64 = 1e-2;

pub(super) fn save(index: &Index, path: &Path) -> Result<()> {
    let file = AtomicFile::create(path)?;
    let embeddings = index.embeddings()?;
    let (dtype, bytes): (_, Vec<u8>) = match index.dtype {
        DType::F16 => {
            let mut halves = vec![f16::ZERO; embeddings.len()];
            halves.convert_from_f32_slice(&embeddings);
            (Dtype::F16, bytemuck::cast_slice(&halves).to_vec())
        }
        _ => (Dtype::F32, bytemuck::cast_slice(&embeddings).to_vec()),
    };
    let mut tensors = vec![TensorOut {
        name: "embeddings".into(),
        dtype,
        shape: vec![index.len(), index.width],
        bytes: bytes.into(),
    }];
    if !index.texts.is_empty() {
        let lengths = index.texts.iter().map(|text| u32::try_from(text.len()));
        let lengths: Vec<u32> = lengths
            .collect::<Result<_, _>>()
            .map_err(|_| data("texts", "more than 2^32 - 1 bytes of text"))?;
        tensors.push(TensorOut {
            name: "text_lengths".into(),
            dtype: Dtype::U32,
            shape: vec![lengths.len()],
            bytes: bytemuck::cast_slice(&lengths).to_vec().into(),
        });
        let text = index.texts.concat().into_bytes();
        tensors.push(TensorOut {
            name: "text".into(),
            dtype: Dtype::U8,
            shape: vec![text.len()],
            bytes: text.into(),
        });
    }
    write_tensors(file, (FORMAT, VERSION), &[], tensors)
}

pub(super) fn load(gpu: &Gpu, path: &Path) -> Result<Index> {
    let file = TensorFile::open(path)?;
    let fail = |at: u64, reason: String| Err(file.file().fail(at, reason));
    if file.version(FORMAT, VERSION)?.is_none() {
        return fail(0, "no index of energyflow: Index::save writes one".into());
    }
    let Some(place) = file.tensors().get("embeddings") else {
        return fail(0, "there is no tensor \"embeddings\"".into());
    };
    let start = place.bytes.start;
    let dtype = match place.dtype {
        Dtype::F16 => DType::F16,
        Dtype::F32 => DType::F32,
        other => return fail(start, format!("embeddings are {other:?}, not F16 or F32")),
    };
    let &[n, width] = place.shape.as_slice() else {
        return fail(
            start,
            format!("embeddings have shape {:?}, not [n, E]", place.shape),
        );
    };
    if width == 0 {
        return fail(start, "embeddings have width 0".into());
    }
    let mut index = Index::new(gpu, width, &IndexOptions::default().dtype(dtype))?;
    let row = width * dtype.size();
    let rows = (PIECE / row).max(1);
    for first in (0..n).step_by(rows) {
        let at = start + (first * row) as u64;
        let length = (rows.min(n - first) * row) as u64;
        let bytes = file.file().read_vec(at, length, "embeddings")?;
        let values: Vec<f32> = match dtype {
            DType::F16 => {
                let words = bytes.as_chunks().0.iter();
                words
                    .map(|word| f16::from_le_bytes(*word).to_f32())
                    .collect()
            }
            _ => floats(&bytes).collect(),
        };
        if let Some(i) = values.iter().position(|x| !x.is_finite()) {
            let at = at + (i * dtype.size()) as u64;
            return fail(
                at,
                format!("embedding {} has {}", first + i / width, values[i]),
            );
        }
        for (i, row) in values.chunks_exact(width).enumerate() {
            let square: f64 = row.iter().map(|&x| f64::from(x).powi(2)).sum();
            if square != 0.0 && (square.sqrt() - 1.0).abs() > NORM {
                let reason = format!(
                    "embedding {} has norm {:.4}, not 0 or 1: an index holds embeddings divided by their norm",
                    first + i,
                    square.sqrt()
                );
                return fail(at + (i * width * dtype.size()) as u64, reason);
            }
        }
        index.append(&values)?;
    }
    index.texts = texts(&file, n)?;
    Ok(index)
}

/// One text for each embedding, or none.
fn texts(file: &TensorFile, n: usize) -> Result<Vec<String>> {
    let fail = |at: u64, reason: String| Err(file.file().fail(at, reason));
    let (text, lengths) = match ["text", "text_lengths"].map(|name| file.tensors().get(name)) {
        [Some(text), Some(lengths)] => (text, lengths),
        [None, None] => return Ok(Vec::new()),
        _ => return fail(0, "text and text_lengths must be there together".into()),
    };
    let start = text.bytes.start;
    if text.dtype != Dtype::U8 || lengths.dtype != Dtype::U32 || lengths.shape != [n] {
        return fail(
            lengths.bytes.start,
            format!("text must be U8, and text_lengths U32 [{n}]"),
        );
    }
    let bytes = file.read("text", text)?;
    let lengths = file.read("text_lengths", lengths)?;
    let mut texts = Vec::with_capacity(n);
    let mut at = 0;
    for length in lengths.as_chunks().0 {
        let end = at + u32::from_le_bytes(*length) as usize;
        let Some(part) = bytes.get(at..end) else {
            return fail(
                start + at as u64,
                format!("text {} ends beyond all texts", texts.len()),
            );
        };
        match std::str::from_utf8(part) {
            Ok(text) => texts.push(text.to_owned()),
            Err(_) => {
                return fail(
                    start + at as u64,
                    format!("text {} is not valid UTF-8", texts.len()),
                );
            }
        }
        at = end;
    }
    match at == bytes.len() {
        true => Ok(texts),
        false => fail(start + at as u64, "bytes follow the last text".into()),
    }
}
