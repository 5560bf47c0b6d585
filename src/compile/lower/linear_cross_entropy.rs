//! A linear layer and its cross entropy, some rows at a time: the logits of a chunk are computed, used up, and overwritten by those
//! of the next. Gradients of the parameters add up over the chunks, in their order.

use super::matmul::ProductPlaces;
use super::{At, Lowering};
use crate::compile::Place;
use crate::error::Result;
use crate::gpu::Layout;
use crate::graph::{LinearCrossEntropy, Node, ValueId};
use crate::kernels::gemm::Gemm;
use crate::kernels::loss::{Count, CrossEntropyKernel};
use crate::kernels::{self, Instruction, Operand, Program};
use crate::types::{BinaryOp, Broadcast, DType, Shape, Trans};

/// Chunks have a multiple of so many rows: a vector with an element a row can be bound at the beginning of any of them.
const ROWS: usize = 64;

/// What the chunks share.
struct Layer {
    entropy: CrossEntropyKernel,
    x: At,
    weight: At,
    bias: Option<At>,
    targets: At,
    rows: At,
    /// Logits and their gradient, as many rows as a chunk has; the same place where nobody wants both.
    logits: At,
    dlogits: At,
    /// The loss is wanted, not only its gradient.
    value: bool,
    gradient: Option<Gradient>,
}

/// The gradients that are wanted, and what they take.
struct Gradient {
    count: Count,
    count_place: Option<Place>,
    dloss: At,
    dx: Option<At>,
    dweight: Option<At>,
    dbias: Option<At>,
    /// Column sums of a chunk behind the first.
    part: Option<At>,
}

impl Lowering<'_> {
    /// The loss, node `value`, its gradient, node `gradient`, or both in one go over the chunks.
    pub(crate) fn linear_cross_entropy(
        &mut self,
        layer: LinearCrossEntropy,
        value: Option<&Node>,
        gradient: Option<&Node>,
    ) -> Result<()> {
        let LinearCrossEntropy {
            ignore, smoothing, ..
        } = layer;
        let entropy = CrossEntropyKernel { ignore, smoothing };
        let Some((inputs, bias)) = value
            .map(|node| (&node.inputs, 3))
            .or(gradient.map(|node| (&node.inputs, 6)))
        else {
            return Ok(());
        };
        let [x, weight, targets] = [
            self.at(inputs[0])?,
            self.at(inputs[1])?,
            self.at(inputs[2])?,
        ];
        let bias = inputs.get(bias).map(|&id| self.at(id)).transpose()?;
        let rows = match (value, gradient) {
            (Some(node), _) => self.at(node.outputs[2])?,
            (None, _) => self.at(inputs[3])?,
        };
        let vocabulary = weight.0.rows();
        let each = self.rows_of_a_chunk(layer, vocabulary, x.0.rows())?;
        let chunk = Layout::of(&Shape::matrix(each, vocabulary), layer.logits)?;
        let logits = (chunk, self.scratch(chunk));
        let several = each < x.0.rows();
        let gradient = match gradient {
            Some(node) => Some(self.gradient(entropy, value, node, several)?),
            None => None,
        };
        let over = program(chunk, Vec::new(), &[]);
        let dlogits = match &gradient {
            // Value and gradient at once leave nobody who wants the logits.
            Some(_) if value.is_some() && CrossEntropyKernel::fits_over(chunk, &over) => logits,
            _ => (chunk, self.scratch(chunk)),
        };
        if let (Some(node), true) = (value, several) {
            // A chunk does not know where the padding of all rows is.
            self.fill(rows.0, 0.0, Place::Value(node.outputs[2]))?;
        }
        let layer = Layer {
            entropy,
            x,
            weight,
            bias,
            targets,
            rows,
            logits,
            dlogits,
            value: value.is_some(),
            gradient,
        };
        for first in (0..x.0.rows()).step_by(each) {
            self.chunk(&layer, first, each.min(x.0.rows() - first))?;
        }
        match value {
            Some(node) => self.cross_entropy_total(entropy, node, inputs[2], vocabulary),
            None => Ok(()),
        }
    }

    fn gradient(
        &mut self,
        entropy: CrossEntropyKernel,
        value: Option<&Node>,
        node: &Node,
        several: bool,
    ) -> Result<Gradient> {
        let (count, count_place) = match value {
            Some(_) => self.count(entropy, node.inputs[2])?,
            None => {
                let (layout, place) = self.at(node.inputs[4])?;
                (Count::Value(layout), Some(place))
            }
        };
        let mut results = [None; 3];
        for (result, &id) in results.iter_mut().zip(&node.outputs) {
            if self.is_output(id) || !self.fused.readers(id).is_empty() {
                *result = Some((self.layout(id)?, Place::Value(id)));
            }
        }
        let [dx, dweight, dbias] = results;
        let part = match dbias {
            Some((layout, _)) if several => Some((layout, self.scratch(layout))),
            _ => None,
        };
        Ok(Gradient {
            count,
            count_place,
            dloss: self.at(node.inputs[5])?,
            dx,
            dweight,
            dbias,
            part,
        })
    }

    /// As many as the layer's bytes and the adapter's bindings allow, and about the same number in every chunk.
    fn rows_of_a_chunk(
        &self,
        layer: LinearCrossEntropy,
        vocabulary: usize,
        rows: usize,
    ) -> Result<usize> {
        let row = Layout::of(&Shape::matrix(1, vocabulary), layer.logits)?.size_bytes();
        let most = layer.chunk_bytes.min(self.max_binding) / row;
        let most = usize::try_from(most).unwrap_or(usize::MAX);
        if most >= rows {
            return Ok(rows);
        }
        let most = (most / ROWS * ROWS).max(ROWS);
        let chunks = rows.div_ceil(most);
        Ok(rows.div_ceil(chunks).next_multiple_of(ROWS).min(rows))
    }

    fn chunk(&mut self, layer: &Layer, first: usize, rows: usize) -> Result<()> {
        let x = rows_from(layer.x, first, rows)?;
        let head = |at: At| {
            Ok((
                Layout::of(&Shape::matrix(rows, at.0.cols()), at.0.dtype())?,
                at.1,
            ))
        };
        let (logits, dlogits) = (head(layer.logits)?, head(layer.dlogits)?);
        let bias = layer.bias.map(|(layout, place)| {
            let broadcast = Broadcast::Cols;
            (Operand { layout, broadcast }, place)
        });
        let add = [
            Instruction::Load(0),
            Instruction::Binary(BinaryOp::Add, 0, 1),
        ];
        let program = match bias {
            Some((operand, _)) => program(logits.0, vec![operand], &add),
            None => program(logits.0, Vec::new(), &[]),
        };
        let loads = bias.map(|(_, place)| place).into_iter().collect();
        self.product([x, layer.weight], Trans::NT, &program, loads, logits.1)?;
        self.chunk_loss(layer, first, [logits, dlogits])?;
        let Some(gradient) = &layer.gradient else {
            return Ok(());
        };
        if let Some(dx) = gradient.dx {
            let dx = rows_from(dx, first, rows)?;
            let program = self::program(dx.0, Vec::new(), &[]);
            self.product(
                [dlogits, layer.weight],
                Trans::NN,
                &program,
                Vec::new(),
                dx.1,
            )?;
        }
        if let Some(dweight) = gradient.dweight {
            let add = [
                Instruction::Present(0),
                Instruction::Binary(BinaryOp::Add, 0, 1),
            ];
            let rest = if first == 0 { &add[..0] } else { &add };
            let program = self::program(dweight.0, Vec::new(), rest);
            self.product([dlogits, x], Trans::TN, &program, Vec::new(), dweight.1)?;
        }
        match (gradient.dbias, gradient.part) {
            (Some(dbias), Some(part)) if first > 0 => {
                self.sum_rows(dlogits.0, dlogits.1, part)?;
                self.add_to(dbias, part)?;
                Ok(())
            }
            (Some(dbias), _) => self.sum_rows(dlogits.0, dlogits.1, dbias),
            (None, _) => Ok(()),
        }
    }

    /// The loss of each row of a chunk, the gradient for its logits, or both.
    fn chunk_loss(
        &mut self,
        layer: &Layer,
        first: usize,
        [logits, dlogits]: [At; 2],
    ) -> Result<()> {
        let Layer { entropy, .. } = *layer;
        let (chunk, rows) = (logits.0, layer.rows.0);
        let targets = Self::vector(chunk.rows(), DType::U32)?;
        let offset = 4 * first as u64;
        let targets_place = part(layer.targets.1, offset, targets.size_bytes());
        // Both rows of it, each from this place on.
        let rows_place = part(layer.rows.1, offset, rows.size_bytes() - offset);
        let own = vec![logits.1, targets_place];
        let Some(gradient) = &layer.gradient else {
            let kernel = entropy.rows(chunk, targets, rows, self.target);
            self.step(kernel, [own, vec![rows_place]].concat())?;
            return Ok(());
        };
        let program = program(dlogits.0, Vec::new(), &[]);
        let (dloss, dloss_place) = gradient.dloss;
        let counted = gradient.count_place.into_iter().collect();
        let (kernel, places) = match (layer.value, gradient.count) {
            (false, Count::Value(count)) => (
                entropy.grad([chunk, targets, rows, count, dloss], program),
                [own, vec![rows_place], counted, vec![dloss_place, dlogits.1]],
            ),
            (_, count) => {
                let over = logits.1 == dlogits.1;
                let layouts = [chunk, targets, rows, dloss];
                let stores = match over {
                    true => vec![rows_place],
                    false => vec![rows_place, dlogits.1],
                };
                (
                    entropy.value_grad(layouts, count, program, over, self.target),
                    [own, counted, vec![dloss_place], stores],
                )
            }
        };
        self.step(kernel, places.concat())?;
        Ok(())
    }

    fn product(
        &mut self,
        [a, b]: [At; 2],
        trans: Trans,
        program: &Program,
        loads: Vec<Place>,
        store: Place,
    ) -> Result<()> {
        let gemm = Gemm::new(a.0, b.0, trans, program.width(), self.target);
        let ab = [a.1, b.1];
        let stores = vec![store];
        self.matmul(gemm, program, &ProductPlaces { ab, loads, stores })
    }

    /// sum += x
    fn add_to(&mut self, sum: At, x: At) -> Result<()> {
        let program = Program {
            rows: sum.0.rows(),
            cols: sum.0.cols(),
            operands: vec![Operand {
                layout: x.0,
                broadcast: Broadcast::Same,
            }],
            instructions: vec![
                Instruction::Present(0),
                Instruction::Load(0),
                Instruction::Binary(BinaryOp::Add, 0, 1),
            ],
            results: vec![(2, sum.0)],
        };
        let kernel = kernels::elementwise::elementwise(program, self.target);
        self.step(kernel, vec![x.1, sum.1])
    }

    fn at(&mut self, id: ValueId) -> Result<At> {
        Ok((self.layout(id)?, self.place(id)?))
    }
}

/// A kernel's sum, then these instructions, whose last is stored.
fn program(result: Layout, operands: Vec<Operand>, rest: &[Instruction]) -> Program {
    Program {
        rows: result.rows(),
        cols: result.cols(),
        operands,
        instructions: [&[Instruction::Sum], rest].concat(),
        results: vec![(rest.len(), result)],
    }
}

fn rows_from((layout, place): At, first: usize, rows: usize) -> Result<At> {
    let part_layout = Layout::of(&Shape::matrix(rows, layout.cols()), layout.dtype())?;
    let offset = (first * layout.row_bytes()) as u64;
    Ok((part_layout, part(place, offset, part_layout.size_bytes())))
}

/// Bytes of a value. Scratch holds a constant, which is the same everywhere.
fn part(place: Place, offset: u64, bytes: u64) -> Place {
    match place {
        Place::Value(value) => Place::Part {
            value,
            offset,
            bytes,
        },
        place => place,
    }
}
