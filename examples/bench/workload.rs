//! A graph under construction, with the data it is fed and the work it stands for.

use energyflow::graph::{Graph, ValueId};
use energyflow::runtime::Host;
use energyflow::train::AdamW;
use energyflow::types::{Trans, UnaryOp, Window};
use energyflow::{DType, Error, Result};

/// What an input holds.
#[derive(Clone, Debug)]
pub enum Fill {
    /// Uniform in ±0.5, times `scale`, plus `offset`.
    Uniform { scale: f32, offset: f32 },
    /// Uniform indices less than this.
    Below(u32),
    /// Rows of `time` steps: ones, at least half a row of them, then zeros.
    Mask { time: usize },
    /// These numbers.
    Given(Vec<f32>),
}

struct Feed {
    name: String,
    len: usize,
    fill: Fill,
}

enum Data {
    Floats(Vec<f32>),
    Indices(Vec<u32>),
}

/// A case while it is built. Methods that declare an input or output also count its bytes.
#[derive(Default)]
pub struct Workload {
    pub graph: Graph,
    feeds: Vec<Feed>,
    /// Floating-point operations of its definition, a multiply-add counted as two; 0 where memory is all that matters.
    pub flops: f64,
    /// Bytes of its definition: every operand and result once; of a training step inputs and AdamW's 28 B a parameter.
    pub bytes: f64,
}

impl Workload {
    fn feed(&mut self, name: &str, dims: &[usize], dtype: DType, fill: Fill) -> Result<ValueId> {
        let len = dims.iter().product();
        self.bytes += (len * dtype.size()) as f64;
        self.feeds.push(Feed {
            name: name.to_owned(),
            len,
            fill: fill.clone(),
        });
        match fill {
            Fill::Below(below) => self.graph.index_input(name, len, below),
            _ => self.graph.input(name, dims, dtype),
        }
    }

    /// An input uniform in ±0.5.
    pub fn uniform(&mut self, name: &str, dims: &[usize], dtype: DType) -> Result<ValueId> {
        let (scale, offset) = (1.0, 0.0);
        self.feed(name, dims, dtype, Fill::Uniform { scale, offset })
    }

    /// An f32 input of these numbers.
    pub fn given(&mut self, name: &str, numbers: Vec<f32>) -> Result<ValueId> {
        self.feed(name, &[numbers.len()], DType::F32, Fill::Given(numbers))
    }

    /// Indices `[n]` less than `below`.
    pub fn indices(&mut self, name: &str, n: usize, below: usize) -> Result<ValueId> {
        self.feed(name, &[n], DType::U32, Fill::Below(below as u32))
    }

    /// A mask [batch·time] of texts of different lengths.
    pub fn mask(&mut self, name: &str, batch: usize, time: usize) -> Result<ValueId> {
        self.feed(name, &[batch * time], DType::F32, Fill::Mask { time })
    }

    /// A weight uniform in ±0.5/√fan_in, as an input, so that a forward pass in f16 does not cast it.
    pub fn weight(
        &mut self,
        name: &str,
        dims: &[usize],
        fan_in: usize,
        dtype: DType,
    ) -> Result<ValueId> {
        let (scale, offset) = (1.0 / (fan_in as f32).sqrt(), 0.0);
        self.feed(name, dims, dtype, Fill::Uniform { scale, offset })
    }

    /// Names a result.
    pub fn output(&mut self, name: &str, value: ValueId) -> Result<()> {
        let described = self.graph.value(value)?;
        self.bytes += (described.shape.len() * described.dtype.size()) as f64;
        self.graph.output(name, value)
    }

    /// LayerNorm with f32 gamma around 1 and beta around 0; also returns those.
    pub fn layer_norm(&mut self, name: &str, x: ValueId) -> Result<(ValueId, [ValueId; 2])> {
        let width = self.graph.value(x)?.shape.cols();
        let (scale, offset) = (1.0, 1.0);
        let gamma = format!("{name}.g");
        let gamma = self.feed(
            &gamma,
            &[width],
            DType::F32,
            Fill::Uniform { scale, offset },
        )?;
        let beta = self.uniform(&format!("{name}.b"), &[width], DType::F32)?;
        let y = self.graph.layer_norm(x, gamma, beta, 1e-5)?;
        Ok((y, [gamma, beta]))
    }

    /// GELU, tanh form.
    pub fn gelu(&mut self, x: ValueId) -> Result<ValueId> {
        self.graph.unary(UnaryOp::GeluTanh, x)
    }

    /// x [.., C]·Wᵀ + b → [rows, `outputs`] like x, b in f32; also returns W and b.
    pub fn linear(
        &mut self,
        name: &str,
        x: ValueId,
        outputs: usize,
    ) -> Result<(ValueId, [ValueId; 2])> {
        let value = self.graph.value(x)?;
        let (rows, inputs, dtype) = (value.shape.rows(), value.shape.cols(), value.dtype);
        let weight = self.weight(&format!("{name}.w"), &[outputs, inputs], inputs, dtype)?;
        let bias = self.weight(&format!("{name}.b"), &[outputs], inputs, DType::F32)?;
        let y = self.graph.matmul(x, weight, Trans::NT)?;
        self.flops += 2.0 * rows as f64 * inputs as f64 * outputs as f64;
        Ok((self.graph.add_bias(y, bias)?, [weight, bias]))
    }

    /// Causal dilated convolution with bias: x [B, L, C] → [B, L, `outputs`]; also returns weight and bias.
    pub fn conv(
        &mut self,
        name: &str,
        x: ValueId,
        [outputs, kernel, dilation]: [usize; 3],
    ) -> Result<(ValueId, [ValueId; 2])> {
        let value = self.graph.value(x)?;
        let (dtype, shape) = (value.dtype, &value.shape);
        let &[batch, time, channels] = shape.dims() else {
            return Err(Error::Config {
                field: "x",
                reason: format!("must be [B, L, C], not {shape}"),
            });
        };
        if kernel == 1 {
            let (y, parameters) = self.linear(name, x, outputs)?;
            let y = self.graph.reshape(y, &[batch, time, outputs])?;
            return Ok((y, parameters));
        }
        let inputs = kernel * channels;
        let weight = self.weight(&format!("{name}.w"), &[outputs, inputs], inputs, dtype)?;
        let bias = self.weight(&format!("{name}.b"), &[outputs], inputs, DType::F32)?;
        let window = Window::causal(time, kernel, dilation)?;
        let y = self.graph.conv1d(x, weight, window)?;
        self.flops += 2.0 * (batch * time) as f64 * (inputs * outputs) as f64;
        Ok((self.graph.add_bias(y, bias)?, [weight, bias]))
    }

    /// y = x + Conv1x1(GELU(Conv(LN(x)))), times the mask; also returns the parameters. The graph is that of `nn::TcnBlock`,
    /// whose parameters are f32.
    pub fn tcn_block(
        &mut self,
        name: &str,
        x: ValueId,
        [hidden, kernel, dilation]: [usize; 3],
        mask: Option<ValueId>,
    ) -> Result<(ValueId, Vec<ValueId>)> {
        let width = self.graph.value(x)?.shape.cols();
        let (h, norm) = self.layer_norm(&format!("{name}ln"), x)?;
        let (h, conv1) = self.conv(&format!("{name}c1"), h, [hidden, kernel, dilation])?;
        let h = self.gelu(h)?;
        let (h, conv2) = self.conv(&format!("{name}c2"), h, [width, 1, 1])?;
        let mut y = self.graph.add(h, x)?;
        if let Some(mask) = mask {
            y = self.graph.mul_rows(y, mask)?;
        }
        Ok((y, [norm, conv1, conv2].concat()))
    }

    /// Trains all parameters of the graph.
    pub fn train(&mut self, loss: ValueId, optimizer: &AdamW) -> Result<()> {
        let parameters: Vec<ValueId> = self.graph.parameters().map(|(id, _)| id).collect();
        let elements: usize = self.graph.parameters().map(|(_, v)| v.shape.len()).sum();
        self.bytes += 28.0 * elements as f64;
        self.output("loss", loss)?;
        optimizer.step(&mut self.graph, loss, &parameters)
    }

    /// Data for every input, a function of the names and the number of the set; handed to `run`.
    pub fn feed_to<T>(
        &self,
        case: &str,
        set: usize,
        run: impl FnOnce(&[(&str, Host<'_>)]) -> T,
    ) -> T {
        let data: Vec<Data> = self
            .feeds
            .iter()
            .map(|feed| feed.data(&format!("{case}/{}/{set}", feed.name)))
            .collect();
        let inputs: Vec<(&str, Host<'_>)> = self
            .feeds
            .iter()
            .zip(&data)
            .map(|(feed, data)| {
                let host = match data {
                    Data::Floats(data) => Host::F32(data),
                    Data::Indices(data) => Host::U32(data),
                };
                (feed.name.as_str(), host)
            })
            .collect();
        run(&inputs)
    }
}

impl Feed {
    fn data(&self, seed: &str) -> Data {
        let stream = fnv1a(seed);
        let numbers = (0..self.len as u64).map(|i| mix(stream, i));
        match &self.fill {
            Fill::Uniform { scale, offset } => Data::Floats(
                numbers
                    .map(|bits| ((bits >> 40) as f32 / 16_777_216.0 - 0.5) * scale + offset)
                    .collect(),
            ),
            Fill::Below(below) => Data::Indices(
                numbers
                    .map(|bits| ((bits >> 33) % u64::from(*below)) as u32)
                    .collect(),
            ),
            Fill::Mask { time } => {
                let half = *time as u64 / 2;
                let rows = numbers.take(self.len / time);
                let lengths = rows.map(|bits| (bits >> 33) % (half + 1) + half);
                Data::Floats(
                    lengths
                        .flat_map(|length| {
                            (0..*time as u64).map(move |t| f32::from(u8::from(t < length)))
                        })
                        .collect(),
                )
            }
            Fill::Given(numbers) => Data::Floats(numbers.clone()),
        }
    }
}

/// FNV-1a, 64 bit.
fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// Number `i` of a stream: SplitMix64, which can be entered anywhere.
fn mix(stream: u64, i: u64) -> u64 {
    let x = (i + 1)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(stream);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
