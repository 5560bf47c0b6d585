//! Fused operations as plain functions on tensors, for callers without a graph: LayerNorm, linear layers, and both with GELU before the
//! product.
//!
//! A function is compiled once for its key: shapes, element type, whether there is a bias, epsilon. Weights are operands of every call.
//! Layers of one shape therefore share code only, and a changed weight is seen by the next call.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};
use crate::gpu::{Gpu, Recorder, Tensor};
use crate::graph::{Graph, ValueId};
use crate::runtime::{Function, Recent};
use crate::types::{DType, Trans, UnaryOp};

/// What is done to x before the product, if there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Front {
    Nothing,
    Gelu,
    /// LayerNorm, then GELU; the bits of epsilon.
    LayerNormGelu(u32),
}

/// Everything that a compiled function depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Key {
    LayerNorm {
        rows: usize,
        cols: usize,
        eps: u32,
        dtype: DType,
    },
    Gemm {
        rows: usize,
        inner: usize,
        out: usize,
        bias: bool,
        front: Front,
        dtype: DType,
    },
}

/// γ, β and ε of a LayerNorm. Ba, Kiros & Hinton, arXiv:1607.06450.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    /// Factors `[D]`, f32.
    pub gamma: &'a Tensor,
    /// Summands `[D]`, f32.
    pub beta: &'a Tensor,
    /// Added to the variance, positive.
    pub eps: f32,
}

/// A product with a stored weight.
#[derive(Clone, Copy, Debug)]
pub struct Weight<'a> {
    /// W [Out, In] in the element type of x, as PyTorch stores it.
    pub weight: &'a Tensor,
    /// b `[Out]`, f32.
    pub bias: Option<&'a Tensor>,
}

/// Counts of a [`Direct`]'s cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DirectStats {
    /// Calls whose key was known.
    pub hits: u64,
    /// Keys compiled.
    pub misses: u64,
}

/// The compiled functions of one device. Any thread may use it.
///
/// A call records: kernels read the operands and write the result where the caller has them, and nothing runs before the recorder is
/// submitted. A result may lie in the buffer of an operand, or be an operand itself; it is then computed elsewhere and copied.
///
/// Tensors have the layout that [`Layout::of`](crate::gpu::Layout::of) gives their shape: matrices rows of 64 bytes or a
/// multiple, vectors of 16.
///
/// ```
/// use energyflow::direct::{Direct, Weight};
/// use energyflow::gpu::{Layout, Tensor};
/// use energyflow::types::{DType, Shape};
/// use energyflow::{Gpu, GpuOptions};
///
/// # fn main() -> energyflow::Result<()> {
/// let gpu = Gpu::new(&GpuOptions::default())?;
/// let tensor = |dims: &[usize]| Tensor::zeroed(&gpu, Layout::of(&Shape::new(dims)?, DType::F32)?);
/// let (x, w, y) = (tensor(&[4, 8])?, tensor(&[5, 8])?, tensor(&[4, 5])?);
/// x.upload(&gpu, &[1.0; 32])?;
/// w.upload(&gpu, &[0.5; 40])?;
///
/// let direct = Direct::new(&gpu);
/// let mut recorder = gpu.recorder("products");
/// direct.gelu_gemm(&mut recorder, &x, Weight { weight: &w, bias: None }, &y)?;
/// recorder.submit()?;
/// let y: Vec<f32> = y.download(&gpu)?.wait()?;
/// assert!((y[0] - 8.0 * 0.5 * 0.841_192).abs() < 1e-5);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Direct {
    gpu: Gpu,
    functions: Mutex<Recent<Key, Function>>,
    hits: AtomicU64,
    misses: AtomicU64,
}

impl Direct {
    /// Number of compiled functions that are kept. When there are more, the one used longest ago is dropped.
    pub const MAX_FUNCTIONS: usize = 256;

    /// Without any function yet.
    #[must_use]
    pub fn new(gpu: &Gpu) -> Self {
        Self {
            gpu: gpu.clone(),
            functions: Mutex::new(Recent::new(Self::MAX_FUNCTIONS)),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
        }
    }

    /// Hits and misses so far.
    #[must_use]
    pub fn stats(&self) -> DirectStats {
        DirectStats {
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
        }
    }

    /// y = LN(x)·γ + β over the columns of x [N, D], f32 or f16; y like x.
    ///
    /// # Errors
    /// [`Error::Layout`] for tensors that do not fit each other, [`Error::Config`] unless epsilon is positive; what
    /// [`Session::compile`](crate::Session::compile) and [`Recorder::dispatch`] return.
    pub fn layer_norm(
        &self,
        recorder: &mut Recorder,
        x: &Tensor,
        norm: Norm<'_>,
        y: &Tensor,
    ) -> Result<()> {
        let layout = x.layout();
        let key = Key::LayerNorm {
            rows: layout.rows(),
            cols: layout.cols(),
            eps: positive(norm.eps)?,
            dtype: layout.dtype(),
        };
        let inputs = [("x", x), ("gamma", norm.gamma), ("beta", norm.beta)];
        self.function(key)?.record(recorder, &inputs, &[("y", y)])
    }

    /// y = x·Wᵀ + b: x [N, In], y [N, Out] like x.
    ///
    /// # Errors
    /// As [`Direct::layer_norm`].
    pub fn linear(
        &self,
        recorder: &mut Recorder,
        x: &Tensor,
        weight: Weight<'_>,
        y: &Tensor,
    ) -> Result<()> {
        self.gemm(recorder, x, Front::Nothing, None, weight, y)
    }

    /// y = GELU(x)·Wᵀ + b, GELU in its tanh form: x [N, In], y [N, Out] like x.
    ///
    /// # Errors
    /// As [`Direct::layer_norm`].
    pub fn gelu_gemm(
        &self,
        recorder: &mut Recorder,
        x: &Tensor,
        weight: Weight<'_>,
        y: &Tensor,
    ) -> Result<()> {
        self.gemm(recorder, x, Front::Gelu, None, weight, y)
    }

    /// y = GELU(LN(x)·γ + β)·Wᵀ + b, GELU in its tanh form: x [N, D], y [N, Out] like x.
    ///
    /// # Errors
    /// As [`Direct::layer_norm`].
    pub fn ln_gelu_gemm(
        &self,
        recorder: &mut Recorder,
        x: &Tensor,
        norm: Norm<'_>,
        weight: Weight<'_>,
        y: &Tensor,
    ) -> Result<()> {
        let front = Front::LayerNormGelu(positive(norm.eps)?);
        self.gemm(recorder, x, front, Some(norm), weight, y)
    }

    fn gemm(
        &self,
        recorder: &mut Recorder,
        x: &Tensor,
        front: Front,
        norm: Option<Norm<'_>>,
        Weight { weight, bias }: Weight<'_>,
        y: &Tensor,
    ) -> Result<()> {
        let layout = x.layout();
        let key = Key::Gemm {
            rows: layout.rows(),
            inner: layout.cols(),
            out: weight.layout().rows(),
            bias: bias.is_some(),
            front,
            dtype: layout.dtype(),
        };
        let mut inputs = vec![("x", x), ("weight", weight)];
        inputs.extend(bias.map(|bias| ("bias", bias)));
        if let Some(norm) = norm {
            inputs.extend([("gamma", norm.gamma), ("beta", norm.beta)]);
        }
        self.function(key)?.record(recorder, &inputs, &[("y", y)])
    }

    fn function(&self, key: Key) -> Result<Arc<Function>> {
        let known = |functions: &mut Recent<Key, Function>| {
            let function = functions.find(&key)?;
            self.hits.fetch_add(1, Ordering::Relaxed);
            Some(function)
        };
        if let Some(function) = known(&mut self.functions()) {
            return Ok(function);
        }
        // So that it is compiled once, without a lock that a callback of the caller could find taken by its own thread.
        let _gate = self.gpu.gate();
        if let Some(function) = known(&mut self.functions()) {
            return Ok(function);
        }
        let function = Arc::new(Function::new(&self.gpu, &graph(key)?)?);
        self.misses.fetch_add(1, Ordering::Relaxed);
        let mut functions = self.functions();
        functions.insert(key, Arc::clone(&function));
        functions.evict();
        drop(functions);
        Ok(function)
    }

    fn functions(&self) -> MutexGuard<'_, Recent<Key, Function>> {
        self.functions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn positive(eps: f32) -> Result<u32> {
    match eps > 0.0 {
        true => Ok(eps.to_bits()),
        false => Err(Error::Config {
            field: "eps",
            reason: format!("must be positive, not {eps}"),
        }),
    }
}

fn graph(key: Key) -> Result<Graph> {
    let mut graph = Graph::new();
    let y = match key {
        Key::LayerNorm {
            rows,
            cols,
            eps,
            dtype,
        } => {
            let x = graph.input("x", &[rows, cols], dtype)?;
            layer_norm(&mut graph, x, cols, eps)?
        }
        Key::Gemm {
            rows,
            inner,
            out,
            bias,
            front,
            dtype,
        } => {
            let x = graph.input("x", &[rows, inner], dtype)?;
            let x = match front {
                Front::Nothing => x,
                Front::Gelu => graph.unary(UnaryOp::GeluTanh, x)?,
                Front::LayerNormGelu(eps) => {
                    let x = layer_norm(&mut graph, x, inner, eps)?;
                    graph.unary(UnaryOp::GeluTanh, x)?
                }
            };
            let weight = graph.input("weight", &[out, inner], dtype)?;
            let y = graph.matmul(x, weight, Trans::NT)?;
            match bias {
                false => y,
                true => {
                    let bias = graph.input("bias", &[out], DType::F32)?;
                    graph.add_bias(y, bias)?
                }
            }
        }
    };
    graph.output("y", y)?;
    Ok(graph)
}

fn layer_norm(graph: &mut Graph, x: ValueId, cols: usize, eps: u32) -> Result<ValueId> {
    let gamma = graph.input("gamma", &[cols], DType::F32)?;
    let beta = graph.input("beta", &[cols], DType::F32)?;
    graph.layer_norm(x, gamma, beta, f32::from_bits(eps))
}
