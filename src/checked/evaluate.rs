//! Expressions.

use std::rc::Rc;

use naga::{CooperativeData, Expression, Handle, Literal};

use super::machine::{Frame, Machine, Mask, Pointer, Root, Slot};
use super::table;
use super::values::{self, Scalar, Value};

impl<'m> Machine<'m> {
    pub(super) fn value(
        &mut self,
        frame: &mut Frame<'m>,
        handle: Handle<Expression>,
        mask: &Mask,
    ) -> Rc<Value> {
        match self.slot(frame, handle, mask) {
            Slot::Value(value) => value,
            Slot::Pointer(_) => panic!("a pointer is no value"),
        }
    }

    /// What was emitted, or what needs not be.
    pub(super) fn slot(
        &mut self,
        frame: &mut Frame<'m>,
        handle: Handle<Expression>,
        mask: &Mask,
    ) -> Slot {
        if let Some(slot) = &frame.values[handle.index()] {
            return slot.clone();
        }
        let slot = self.evaluate(frame, handle, mask);
        frame.values[handle.index()] = Some(slot.clone());
        slot
    }

    pub(super) fn evaluate(
        &mut self,
        frame: &mut Frame<'m>,
        handle: Handle<Expression>,
        mask: &Mask,
    ) -> Slot {
        let lanes = self.lanes;
        let function = frame.function;
        let shape = frame.table[handle.index()].clone();
        let value = match function.expressions[handle] {
            Expression::Literal(literal) => Value::splat(lanes, 1, bits(literal)),
            Expression::Constant(constant) => self.constant(self.module.constants[constant].init),
            Expression::ZeroValue(_) => Value::zero(lanes, shape.fields.len()),
            Expression::Compose { ref components, .. } => {
                let parts = components.iter().map(|&part| self.value(frame, part, mask));
                let parts: Vec<_> = parts.collect();
                Value::join(lanes, parts.iter().map(|part| part.bits.as_slice()))
            }
            Expression::Splat { size, value } => {
                let value = self.value(frame, value, mask);
                Value::join(lanes, (0..size as u32).map(|_| value.component(0)))
            }
            Expression::Swizzle {
                size,
                vector,
                pattern,
            } => {
                let vector = self.value(frame, vector, mask);
                let chosen = pattern[..size as usize].iter();
                Value::join(lanes, chosen.map(|&c| vector.component(c as usize)))
            }
            Expression::FunctionArgument(number) => {
                return frame.arguments[number as usize].clone();
            }
            Expression::GlobalVariable(global) => {
                return Slot::Pointer(Pointer {
                    root: self.home(global),
                    at: Rc::new(vec![0; lanes]),
                });
            }
            Expression::LocalVariable(local) => {
                return Slot::Pointer(Pointer {
                    root: Root::Local(local.index()),
                    at: Rc::new(vec![0; lanes]),
                });
            }
            Expression::Access { base, index } => {
                let index = self.value(frame, index, mask);
                return self.inside(frame, base, &index.bits, mask);
            }
            Expression::AccessIndex { base, index } => {
                return self.inside(frame, base, &vec![index; lanes], mask);
            }
            Expression::Load { pointer } => self.load(frame, pointer, mask),
            Expression::Unary { op, expr } => {
                let scalar = frame.table[expr.index()].scalar();
                values::unary(op, scalar, &self.value(frame, expr, mask))
            }
            Expression::Binary { op, left, right } => {
                let scalar = frame.table[left.index()].scalar();
                let left = self.value(frame, left, mask);
                let right = self.value(frame, right, mask);
                values::binary(op, scalar, &left, &right)
            }
            Expression::Select {
                condition,
                accept,
                reject,
            } => {
                let condition = self.value(frame, condition, mask);
                let accept = self.value(frame, accept, mask);
                let reject = self.value(frame, reject, mask);
                values::select(&condition, &accept, &reject)
            }
            Expression::Relational { fun, argument } => {
                values::relational(fun, &self.value(frame, argument, mask))
            }
            Expression::Math {
                fun,
                arg,
                arg1,
                arg2,
                ..
            } => {
                let scalar = frame.table[arg.index()].scalar();
                let handles = [Some(arg), arg1, arg2].into_iter().flatten();
                let given: Vec<_> = handles.map(|arg| self.value(frame, arg, mask)).collect();
                let given: Vec<&Value> = given.iter().map(|value| &**value).collect();
                values::math(fun, scalar, &given)
            }
            Expression::As { expr, convert, .. } => {
                let from = frame.table[expr.index()].scalar();
                let value = self.value(frame, expr, mask);
                values::cast(from, shape.scalar(), convert.is_none(), &value)
            }
            Expression::CooperativeLoad { ref data, .. } => {
                self.matrix_load(frame, data, shape.scalar(), shape.fields.len(), mask)
            }
            Expression::CooperativeMultiplyAdd { a, b, c } => {
                let [a, b, c] = [a, b, c].map(|matrix| self.value(frame, matrix, mask));
                self.multiply_add(&a, &b, &c)
            }
            ref other => panic!("no kernel uses {other:?}"),
        };
        Slot::Value(Rc::new(value))
    }

    /// A constant expression of the module.
    fn constant(&self, handle: Handle<Expression>) -> Value {
        let lanes = self.lanes;
        match self.module.global_expressions[handle] {
            Expression::Literal(literal) => Value::splat(lanes, 1, bits(literal)),
            Expression::Constant(constant) => self.constant(self.module.constants[constant].init),
            Expression::ZeroValue(ty) => {
                let inner = &self.module.types[ty].inner;
                let fields = table::fields(self.module, inner, self.subgroup);
                Value::zero(lanes, fields.len())
            }
            Expression::Compose { ref components, .. } => {
                let parts: Vec<Value> = components.iter().map(|&c| self.constant(c)).collect();
                Value::join(lanes, parts.iter().map(|part| part.bits.as_slice()))
            }
            Expression::Splat { size, value } => {
                let value = self.constant(value);
                Value::join(lanes, (0..size as u32).map(|_| value.component(0)))
            }
            ref other => panic!("{other:?} in a constant"),
        }
    }

    /// An element of a composite, or a pointer to it. What a pointer reaches outside its memory is reported when it is used.
    fn inside(
        &mut self,
        frame: &mut Frame<'m>,
        base: Handle<Expression>,
        index: &[u32],
        mask: &Mask,
    ) -> Slot {
        let slot = self.slot(frame, base, mask);
        let inside = frame.table[base.index()].inside.clone();
        let inside = inside.expect("only composites are indexed");
        let outside = |index: u32| match (inside.is_array, inside.length) {
            (false, Some(length)) => index >= length,
            _ => false,
        };
        let bad = (0..self.lanes).find(|&lane| mask[lane] && outside(index[lane]));
        assert!(bad.is_none(), "an index outside a vector");
        match slot {
            Slot::Pointer(Pointer { root, at }) => {
                let step = |index: u32| -> u64 {
                    let (first, times) = match inside.is_array {
                        true => (inside.starts[0], u64::from(index)),
                        false => (
                            inside.starts[(index as usize).min(inside.starts.len() - 1)],
                            1,
                        ),
                    };
                    let unit = match root {
                        Root::Local(_) => first.0,
                        _ => first.1,
                    };
                    u64::from(unit) * times
                };
                let at = at.iter().zip(index).map(|(&at, &i)| at + step(i));
                Slot::Pointer(Pointer {
                    root,
                    at: Rc::new(at.collect()),
                })
            }
            Slot::Value(value) => {
                let starts = &inside.starts;
                let first = index[0] as usize;
                if inside.is_array {
                    let each = starts[0].0 as usize;
                    let same = index.iter().all(|&i| i as usize == first);
                    assert!(same, "arrays that vary are kept in memory");
                    let parts = (first * each..(first + 1) * each).map(|c| value.component(c));
                    return Slot::Value(Rc::new(Value::join(self.lanes, parts)));
                }
                if index.iter().all(|&i| i as usize == first) && first < starts.len() {
                    let from = starts[first].0 as usize;
                    let to = starts
                        .get(first + 1)
                        .map_or(value.components(), |next| next.0 as usize);
                    let parts = (from..to).map(|c| value.component(c));
                    return Slot::Value(Rc::new(Value::join(self.lanes, parts)));
                }
                // A component of a vector, another one for every invocation.
                let lane = |(lane, &i): (usize, &u32)| {
                    value.component((i as usize).min(starts.len() - 1))[lane]
                };
                Slot::Value(Rc::new(Value {
                    lanes: self.lanes,
                    bits: index.iter().enumerate().map(lane).collect(),
                }))
            }
        }
    }

    pub(super) fn load(
        &mut self,
        frame: &mut Frame<'m>,
        pointer: Handle<Expression>,
        mask: &Mask,
    ) -> Value {
        let Slot::Pointer(from) = self.slot(frame, pointer, mask) else {
            panic!("a load from a value");
        };
        let lanes = self.lanes;
        let fields = Rc::clone(&frame.table[pointer.index()].fields);
        assert!(!fields.is_empty(), "long arrays are never loaded whole");
        if let Root::Local(local) = from.root {
            let local = &frame.locals[local];
            let first = from.at[0] as usize;
            if from.at.iter().all(|&at| at as usize == first) {
                let bits = local.bits[first * lanes..(first + fields.len()) * lanes].to_vec();
                return Value { lanes, bits };
            }
            let mut value = Value::zero(lanes, fields.len());
            for c in 0..fields.len() {
                for lane in 0..lanes {
                    let place = (from.at[lane] as usize + c).min(local.components() - 1);
                    value.bits[c * lanes + lane] = local.component(place)[lane];
                }
            }
            return value;
        }
        let mut value = Value::zero(lanes, fields.len());
        for (c, field) in fields.iter().enumerate() {
            for lane in (0..lanes).filter(|&lane| mask[lane]) {
                let place = from.at[lane] + u64::from(field.offset);
                let bits = self.read(from.root, place, field.scalar.size(), lane as u32);
                value.bits[c * lanes + lane] = field.scalar.decode(bits);
            }
        }
        value
    }

    /// Where the elements of a subgroup's matrix lie. Element e of it belongs to invocation e mod `subgroup`.
    fn matrix(
        &mut self,
        frame: &mut Frame<'m>,
        data: &CooperativeData,
        scalar: Scalar,
        components: usize,
        mask: &Mask,
    ) -> (Root, Vec<Vec<u64>>) {
        assert!(!mask.contains(&false), "a matrix needs whole subgroups");
        let Slot::Pointer(pointer) = self.slot(frame, data.pointer, mask) else {
            panic!("a matrix lies in memory");
        };
        let stride = self.value(frame, data.stride, mask);
        let unit = u64::from(frame.table[data.pointer.index()].pointee);
        let size = (components * self.subgroup).isqrt();
        let places = (0..self.lanes / self.subgroup).map(|subgroup| {
            let first = subgroup * self.subgroup;
            let own = first..first + self.subgroup;
            let (at, apart) = (pointer.at[first], stride.bits[first]);
            let mut own = own.into_iter();
            let same = |lane: usize| pointer.at[lane] == at && stride.bits[lane] == apart;
            assert!(own.all(same), "a subgroup has one matrix");
            let element = |e: usize| {
                let (line, place) = match data.row_major {
                    true => (e / size, e % size),
                    false => (e % size, e / size),
                };
                at + line as u64 * u64::from(apart) * unit + place as u64 * u64::from(scalar.size())
            };
            (0..size * size).map(element).collect()
        });
        (pointer.root, places.collect())
    }

    /// The number by which a subgroup is known where it accesses memory together: which invocation does what is not told.
    fn together(&self, subgroup: usize) -> u32 {
        (self.lanes + subgroup) as u32
    }

    /// The number by which all invocations are known where they access an atomic: such accesses do not conflict with each other.
    pub(super) fn atomically(&self) -> u32 {
        2 * self.lanes as u32
    }

    fn matrix_load(
        &mut self,
        frame: &mut Frame<'m>,
        data: &CooperativeData,
        scalar: Scalar,
        components: usize,
        mask: &Mask,
    ) -> Value {
        let (root, places) = self.matrix(frame, data, scalar, components, mask);
        let mut value = Value::zero(self.lanes, components);
        for (subgroup, elements) in places.iter().enumerate() {
            let who = self.together(subgroup);
            for (e, &at) in elements.iter().enumerate() {
                let bits = scalar.decode(self.read(root, at, scalar.size(), who));
                let lane = subgroup * self.subgroup + e % self.subgroup;
                value.bits[e / self.subgroup * self.lanes + lane] = bits;
            }
        }
        value
    }

    pub(super) fn matrix_store(
        &mut self,
        frame: &mut Frame<'m>,
        data: &CooperativeData,
        value: &Value,
        scalar: Scalar,
        mask: &Mask,
    ) {
        let (root, places) = self.matrix(frame, data, scalar, value.components(), mask);
        for (subgroup, elements) in places.iter().enumerate() {
            let who = self.together(subgroup);
            for (e, &at) in elements.iter().enumerate() {
                let lane = subgroup * self.subgroup + e % self.subgroup;
                let bits = scalar.encode(value.component(e / self.subgroup)[lane]);
                self.write(root, at, scalar.size(), bits, who);
            }
        }
    }

    /// a·b + c, with f32 sums.
    fn multiply_add(&self, a: &Value, b: &Value, c: &Value) -> Value {
        let (lanes, own) = (self.lanes, self.subgroup);
        let size = (c.components() * own).isqrt();
        let mut sum = c.clone();
        for first in (0..lanes).step_by(own) {
            let get = |m: &Value| -> Vec<f32> {
                (0..size * size)
                    .map(|e| f32::from_bits(m.component(e / own)[first + e % own]))
                    .collect()
            };
            let (a, b) = (get(a), get(b));
            for (row, a) in a.chunks_exact(size).enumerate() {
                for col in 0..size {
                    let e = row * size + col;
                    let place = e / own * lanes + first + e % own;
                    let mut x = f32::from_bits(sum.bits[place]);
                    for (k, a) in a.iter().enumerate() {
                        x += a * b[k * size + col];
                    }
                    sum.bits[place] = x.to_bits();
                }
            }
        }
        sum
    }
}

fn bits(literal: Literal) -> u32 {
    match literal {
        Literal::F32(x) => x.to_bits(),
        Literal::F16(x) => x.to_f32().to_bits(),
        Literal::U32(x) => x,
        Literal::I32(x) => x as u32,
        Literal::Bool(x) => u32::from(x),
        other => panic!("no kernel uses {other:?}"),
    }
}
