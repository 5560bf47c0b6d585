//! Running an executable: inputs in, one submission, results out later. After the first run nothing here allocates.

use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use super::bound::Input;
use super::pace::Pace;
use crate::error::{Error, Result};
use crate::gpu::{Download, Element, IN_FLIGHT, Layout, Transfer};
use crate::runtime::executable::Executable;
use crate::types::DType;

/// Data for an input, dense and row-major.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Host<'a> {
    /// For f32 inputs, and for f16 inputs (rounded to nearest even).
    F32(&'a [f32]),
    /// For f16 inputs.
    F16(&'a [half::f16]),
    /// For index inputs.
    U32(&'a [u32]),
}

impl<'a> From<&'a [f32]> for Host<'a> {
    fn from(data: &'a [f32]) -> Self {
        Self::F32(data)
    }
}

impl<'a> From<&'a Vec<f32>> for Host<'a> {
    fn from(data: &'a Vec<f32>) -> Self {
        Self::F32(data)
    }
}

impl<'a> From<&'a [half::f16]> for Host<'a> {
    fn from(data: &'a [half::f16]) -> Self {
        Self::F16(data)
    }
}

impl<'a> From<&'a [u32]> for Host<'a> {
    fn from(data: &'a [u32]) -> Self {
        Self::U32(data)
    }
}

impl<'a> From<&'a Vec<u32>> for Host<'a> {
    fn from(data: &'a Vec<u32>) -> Self {
        Self::U32(data)
    }
}

impl Host<'_> {
    /// Number of elements.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::F32(data) => data.len(),
            Self::F16(data) => data.len(),
            Self::U32(data) => data.len(),
        }
    }

    /// Element type of the data.
    fn dtype(&self) -> DType {
        match self {
            Self::F32(_) => DType::F32,
            Self::F16(_) => DType::F16,
            Self::U32(_) => DType::U32,
        }
    }

    /// These elements alone, which must exist.
    pub(crate) fn part(self, range: Range<usize>) -> Self {
        match self {
            Self::F32(data) => Self::F32(&data[range]),
            Self::F16(data) => Self::F16(&data[range]),
            Self::U32(data) => Self::U32(&data[range]),
        }
    }
}

/// An output: its name, its layout, and its bytes among those that come back.
#[derive(Debug)]
pub(crate) struct Named {
    pub name: String,
    pub layout: Layout,
    pub range: Range<u64>,
}

impl Executable {
    /// Upper bound on the number of runs under way. One more waits until the oldest is done, even if the caller has taken no results.
    /// This bounds the device's queue and the staging memory of inputs.
    pub const IN_FLIGHT: usize = IN_FLIGHT;

    /// Writes the inputs, submits all dispatches and returns without waiting for them. It waits only while
    /// [`Executable::IN_FLIGHT`] runs are under way. An input that neither an output nor an update depends on may be left out.
    ///
    /// A run is one submission, or several where it would take longer than
    /// [`Session::max_submission`](super::Session::max_submission).
    ///
    /// The first run makes staging memory for results, and for inputs unless kernels read them where they are written
    /// ([`Plan::inputs_in_place`](super::Plan::inputs_in_place)). After that a run and taking its results allocate nothing, on the device or
    /// here, as long as the caller keeps at most as many results; for others it takes another staging buffer.
    ///
    /// # Errors
    /// [`Error::Data`] for a missing, unknown, wrongly sized or out-of-range input; [`Error::OutOfMemory`],
    /// [`Error::DeviceLost`].
    pub fn run(&self, inputs: &[(&str, Host<'_>)]) -> Result<Pending> {
        self.check(inputs)?;
        self.profile_once();
        let turn = self.bundle.turn()?;
        for (number, input) in self.inputs.iter().enumerate() {
            for (_, data) in inputs.iter().filter(|(name, _)| *name == input.name) {
                match data {
                    Host::F32(data) => turn.write(number, data),
                    Host::F16(data) => turn.write(number, data),
                    Host::U32(data) => turn.write(number, data),
                }?;
            }
        }
        let dispatches = self.shadows.refreshes().chain(&self.dispatches);
        let cut = self.pace.cut(dispatches);
        let cut = cut.map(|(dispatch, cut)| (&dispatch.work, cut));
        let start = Instant::now();
        let transfer = turn.submit(cut, |sent| self.shadows.note(sent))?;
        Ok(Pending {
            transfer,
            outputs: Arc::clone(&self.results),
            start,
            pace: Arc::clone(&self.pace),
        })
    }

    fn check(&self, inputs: &[(&str, Host<'_>)]) -> Result<()> {
        let fail = |name: &str, reason: String| {
            Err(Error::Data {
                name: name.to_owned(),
                reason,
            })
        };
        for (name, data) in inputs {
            let Some(input) = self.input(name) else {
                let known: Vec<String> = self.inputs.iter().map(Input::to_string).collect();
                let known = match known.is_empty() {
                    true => "the graph has none".to_owned(),
                    false => format!("inputs are: {}", known.join(", ")),
                };
                return fail(name, format!("unknown input {name:?}; {known}"));
            };
            let layout = input.tensor.layout();
            let shape = &input.shape;
            let (len, given) = (data.len(), data.dtype());
            let dtype = layout.dtype();
            let fits = given == dtype || (given, dtype) == (DType::F32, DType::F16);
            if !fits || len != layout.len() {
                let needs = match dtype {
                    DType::F16 => "f16 or f32",
                    DType::F32 => "f32",
                    DType::U32 => "u32",
                };
                return fail(
                    name,
                    format!(
                        "input {name:?} {shape}: needs {} {needs}, got {len} {given}",
                        layout.len(),
                    ),
                );
            }
            if let (Host::U32(data), Some(below)) = (data, input.below)
                && let Some(i) = data.iter().position(|&id| id >= below)
            {
                return fail(
                    name,
                    format!(
                        "input {name:?} {shape}: element {i} is {}, the bound is {below}",
                        data[i]
                    ),
                );
            }
        }
        for input in &self.inputs {
            let name = &input.name;
            match inputs.iter().filter(|(given, _)| given == name).count() {
                1 => {}
                0 if !input.is_read => {}
                0 => return fail(name, format!("input {name:?} is not given: {input}")),
                n => return fail(name, format!("input {name:?} is given {n} times")),
            }
        }
        Ok(())
    }
}

/// The results of a run that may still be under way.
#[derive(Debug)]
#[must_use = "results arrive when waited for"]
pub struct Pending {
    /// Nothing where the graph has no outputs.
    transfer: Option<Transfer>,
    outputs: Arc<[Named]>,
    /// When the run was submitted.
    start: Instant,
    pace: Arc<Pace>,
}

impl Pending {
    /// Blocks until the run is done.
    ///
    /// # Errors
    /// [`Error::DeviceLost`]
    pub fn wait(mut self) -> Result<Outputs> {
        match &mut self.transfer {
            Some(transfer) => transfer.wait().map(|()| self.outputs()),
            None => Ok(Outputs::default()),
        }
    }

    /// The results if the run is done. Does not block. After a `Some` there is nothing left to take.
    pub fn try_take(&mut self) -> Option<Result<Outputs>> {
        match &mut self.transfer {
            Some(transfer) => {
                let arrived = transfer.try_take()?;
                Some(arrived.map(|()| self.outputs()))
            }
            None => Some(Ok(Outputs::default())),
        }
    }

    /// Of a run that is done.
    fn outputs(&self) -> Outputs {
        self.pace.note(self.start.elapsed());
        let download = self.transfer.as_ref().map(Transfer::download);
        Outputs(download.map(|download| (Arc::clone(download), Arc::clone(&self.outputs))))
    }
}

impl Future for Pending {
    type Output = Result<Outputs>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.transfer {
            Some(transfer) => {
                let arrived = transfer.poll(context);
                arrived.map(|arrived| arrived.map(|()| self.outputs()))
            }
            None => Poll::Ready(Ok(Outputs::default())),
        }
    }
}

/// Named results of a run. They lie in host-visible memory, which a later run uses again once this value and its clones are dropped.
/// A result is converted when it is asked for.
#[derive(Clone, Default)]
pub struct Outputs(Option<(Arc<Download>, Arc<[Named]>)>);

impl Outputs {
    fn read<T>(&self, name: &str, read: impl FnOnce(&Layout, &[u8]) -> Result<T>) -> Result<T> {
        let found = self.0.as_ref().and_then(|(download, all)| {
            let output = all.iter().find(|output| output.name == name)?;
            Some((download, output))
        });
        let Some((download, output)) = found else {
            let all = self.0.iter().flat_map(|(_, all)| all.iter());
            let names: Vec<&str> = all.map(|output| output.name.as_str()).collect();
            return Err(Error::Data {
                name: name.to_owned(),
                reason: format!("no such output {name:?}; outputs are: {}", names.join(", ")),
            });
        };
        download.read(output.range.clone(), |bytes| read(&output.layout, bytes))
    }

    /// Whether there is an output of this name.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        let mut all = self.0.iter().flat_map(|(_, all)| all.iter());
        all.any(|output| output.name == name)
    }

    /// The elements of an output, dense and row-major; f16 outputs are widened.
    ///
    /// # Errors
    /// [`Error::Data`] for an unknown name.
    pub fn get(&self, name: &str) -> Result<Vec<f32>> {
        self.read(name, |layout, bytes| layout.unpack(bytes))
    }

    /// As [`Outputs::get`], into memory of the caller: nothing is allocated. f16 outputs may be taken as `f32` or as
    /// [`f16`](half::f16).
    ///
    /// # Errors
    /// As [`Outputs::get`]; [`Error::Layout`] unless `data` has as many elements as the output, of a type that it converts to.
    pub fn get_into<T: Element>(&self, name: &str, data: &mut [T]) -> Result<()> {
        self.read(name, |layout, bytes| layout.unpack_into(bytes, data))
    }

    /// The first element of an output: a loss, a norm. Reads no other.
    ///
    /// # Errors
    /// As [`Outputs::get`].
    pub fn scalar(&self, name: &str) -> Result<f32> {
        self.read(name, |layout, bytes| layout.unpack_first(bytes))
    }

    /// Whether all padding of an output is zero, as the layout promises.
    ///
    /// # Errors
    /// As [`Outputs::get`].
    pub fn padding_is_zero(&self, name: &str) -> Result<bool> {
        self.read(name, |layout, bytes| {
            let size = layout.dtype().size();
            // The last byte has the sign: -0 is zero, too.
            let sign = match layout.dtype() {
                DType::F32 | DType::F16 => 0x80,
                DType::U32 => 0,
            };
            let zero = |element: &[u8]| {
                let (last, others) = element.split_last().unwrap_or((&0, &[]));
                *last & !sign == 0 && others.iter().all(|&byte| byte == 0)
            };
            let mut rows = bytes.chunks_exact(layout.row_bytes());
            Ok(rows.all(|row| row[layout.cols() * size..].chunks_exact(size).all(zero)))
        })
    }
}

impl fmt::Debug for Outputs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = self.0.iter().flat_map(|(_, all)| all.iter());
        let names = all.map(|output| (&output.name, &output.layout));
        f.debug_map().entries(names).finish()
    }
}
