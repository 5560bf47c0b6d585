//! A decoder's weights on the device, in the form that decoding reads.

use crate::error::{Error, Result};
use crate::gpu::{Alignment, Gpu, Layout, Tensor};
use crate::graph::{Graph, ValueId};
use crate::kernels::decode::Taps;
use crate::nn::Gelu;
use crate::text::{Decoder, DecoderOptions};
use crate::train::Weights;
use crate::types::{DType, UnaryOp};

/// x·Wᵀ + b.
#[derive(Debug)]
pub(super) struct Product {
    /// [Out, In]
    pub weight: Tensor,
    /// `[Out]`, f32
    pub bias: Tensor,
}

#[derive(Debug)]
pub(super) struct Block {
    pub gamma: Tensor,
    pub beta: Tensor,
    pub taps: Taps,
    /// [H, k·D'], tap by tap, D' being D rounded up to a multiple of 4.
    pub conv1: Product,
    /// [D, H]
    pub conv2: Product,
}

#[derive(Debug)]
pub(super) struct DeviceWeights {
    /// Of matrices and activations.
    pub dtype: DType,
    pub width: usize,
    pub hidden: usize,
    pub vocabulary: usize,
    /// Width of z.
    pub embedding: usize,
    pub gelu: UnaryOp,
    /// [V, D]
    pub table: Tensor,
    /// [D, E]
    pub condition: Product,
    pub blocks: Vec<Block>,
    /// [V, D]
    pub head: Product,
}

/// Columns of a tap: whole `vec4`s.
pub(super) fn tap_width(width: usize) -> usize {
    width.next_multiple_of(4)
}

pub(super) fn matrix(rows: usize, cols: usize, dtype: DType) -> Result<Layout> {
    Layout::new(rows, cols, dtype, Alignment::Bytes64)
}

pub(super) fn vector(n: usize, dtype: DType) -> Result<Layout> {
    Layout::new(1, n, dtype, Alignment::Bytes16)
}

/// Takes parameters of a graph from weights to the device.
struct Source<'a> {
    gpu: &'a Gpu,
    graph: &'a Graph,
    weights: &'a Weights,
    dtype: DType,
}

impl DeviceWeights {
    /// The weights of `decoder`, which `graph` declares.
    ///
    /// Fails with [`Error::Data`] for a parameter that is missing, has another shape, or does not fit the type.
    pub fn new(
        gpu: &Gpu,
        options: &DecoderOptions,
        (graph, decoder): (&Graph, &Decoder),
        weights: &Weights,
        dtype: DType,
    ) -> Result<Self> {
        let source = Source {
            gpu,
            graph,
            weights,
            dtype,
        };
        let (width, hidden) = (options.width, options.hidden);
        let mut blocks = Vec::with_capacity(decoder.tcn.blocks.len());
        for block in &decoder.tcn.blocks {
            let (_, data) = source.find(block.conv1.weight)?;
            let rows = by_tap(data, [hidden, width, block.conv1.kernel]);
            let cols = block.conv1.kernel * tap_width(width);
            blocks.push(Block {
                gamma: source.vector(Some(block.norm.weight), width)?,
                beta: source.vector(Some(block.norm.bias), width)?,
                taps: Taps {
                    taps: block.conv1.kernel,
                    dilation: block.conv1.dilation,
                    eps: block.norm.eps,
                },
                conv1: Product {
                    weight: source.tensor(block.conv1.weight, &rows, [hidden, cols])?,
                    bias: source.vector(block.conv1.bias, hidden)?,
                },
                conv2: source.product(block.conv2.weight, block.conv2.bias, [width, hidden])?,
            });
        }
        let (condition, head) = (decoder.condition, decoder.head);
        let vocabulary = options.vocabulary;
        Ok(Self {
            dtype,
            width,
            hidden,
            vocabulary,
            embedding: options.embedding,
            gelu: match options.gelu {
                Gelu::Tanh => UnaryOp::GeluTanh,
                Gelu::Erf => UnaryOp::GeluErf,
            },
            table: source.matrix(decoder.embedding.weight, [vocabulary, width])?,
            condition: source.product(
                condition.weight,
                condition.bias,
                [width, options.embedding],
            )?,
            blocks,
            head: source.product(head.weight, head.bias, [vocabulary, width])?,
        })
    }

    /// Bytes of the weights that a token reads: those of the blocks and the head.
    pub fn bytes_per_token(&self) -> u64 {
        let product = |product: &Product| {
            let both = [&product.weight, &product.bias];
            both.map(|tensor| tensor.layout().size_bytes())
                .iter()
                .sum::<u64>()
        };
        let blocks = self.blocks.iter();
        let blocks = blocks.map(|block| product(&block.conv1) + product(&block.conv2));
        blocks.sum::<u64>() + product(&self.head)
    }
}

impl<'a> Source<'a> {
    /// Name and elements of a parameter.
    fn find(&self, id: ValueId) -> Result<(&'a str, &'a [f32])> {
        let value = self.graph.value(id)?;
        let (name, shape) = (value.name.as_str(), value.host_shape());
        let reason = match self.weights.get(name) {
            Some((found, data)) if found == shape => return Ok((name, data)),
            Some((found, _)) => format!("has shape {found:?}, but the decoder needs {shape:?}"),
            None => "is missing from the weights".to_owned(),
        };
        Err(Error::Data {
            name: name.to_owned(),
            reason,
        })
    }

    fn matrix(&self, id: ValueId, extents: [usize; 2]) -> Result<Tensor> {
        let (_, data) = self.find(id)?;
        self.tensor(id, data, extents)
    }

    fn tensor(&self, id: ValueId, data: &[f32], [rows, cols]: [usize; 2]) -> Result<Tensor> {
        let largest = match self.dtype {
            DType::F16 => half::f16::MAX.to_f32(),
            _ => f32::MAX,
        };
        let fits = |x: &f32| x.abs() <= largest;
        if let Some(x) = data.iter().find(|x| !fits(x)) {
            return Err(Error::Data {
                name: self.find(id)?.0.to_owned(),
                reason: format!("has the element {x}, which does not fit {}", self.dtype),
            });
        }
        let tensor = Tensor::uninit(self.gpu, matrix(rows, cols, self.dtype)?)?;
        tensor.upload(self.gpu, data)?;
        Ok(tensor)
    }

    /// f32; zeros where there is no such parameter.
    fn vector(&self, id: Option<ValueId>, n: usize) -> Result<Tensor> {
        let tensor = Tensor::zeroed(self.gpu, vector(n, DType::F32)?)?;
        if let Some(id) = id {
            tensor.upload(self.gpu, self.find(id)?.1)?;
        }
        Ok(tensor)
    }

    fn product(
        &self,
        weight: ValueId,
        bias: Option<ValueId>,
        extents: [usize; 2],
    ) -> Result<Product> {
        Ok(Product {
            weight: self.matrix(weight, extents)?,
            bias: self.vector(bias, extents[0])?,
        })
    }
}

/// From [H, D, k], PyTorch's order, to [H, k·D'].
fn by_tap(data: &[f32], [hidden, width, taps]: [usize; 3]) -> Vec<f32> {
    let each = tap_width(width);
    let mut rows = vec![0.0; hidden * taps * each];
    for (h, row) in rows.chunks_exact_mut(taps * each).enumerate() {
        for (tap, cells) in row.chunks_exact_mut(each).enumerate() {
            for (d, cell) in cells[..width].iter_mut().enumerate() {
                *cell = data[(h * width + d) * taps + tap];
            }
        }
    }
    rows
}
