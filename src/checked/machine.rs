//! Runs the invocations of a workgroup in step: every statement for all that take part in it.

use std::collections::BTreeMap;
use std::rc::Rc;

use naga::{
    AddressSpace, Barrier, Block, BuiltIn, Expression, Function, GlobalVariable, Handle, Module,
    Statement,
};

use super::memory::{Access, Kind, Memory};
use super::table::{self, Table};
use super::values::Value;
use super::{Bound, Fault};

/// Which invocations take part.
pub(super) type Mask = Vec<bool>;

/// Where an expression points to, or what it is.
#[derive(Clone)]
pub(super) enum Slot {
    Value(Rc<Value>),
    Pointer(Pointer),
}

#[derive(Clone)]
pub(super) struct Pointer {
    pub root: Root,
    /// Of every invocation: bytes into shared memory, components into a local variable.
    pub at: Rc<Vec<u64>>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Root {
    Storage(usize),
    Workgroup(usize),
    Local(usize),
}

pub(super) struct Frame<'m> {
    pub function: &'m Function,
    pub table: Table,
    pub arguments: Vec<Slot>,
    pub values: Vec<Option<Slot>>,
    pub locals: Vec<Value>,
    result: Option<Value>,
}

/// Invocations that leave the body of a loop, and that go on with its next round.
struct Jumps {
    broken: Mask,
    continued: Mask,
}

pub(super) struct Machine<'m> {
    pub module: &'m Module,
    functions: Vec<Table>,
    entry: Table,
    homes: Vec<Option<Root>>,
    pub bound: &'m [Bound],
    pub storage: &'m mut [Memory],
    pub workgroup: Vec<Memory>,
    pub lanes: usize,
    /// Invocations of a subgroup.
    pub subgroup: usize,
    /// Of this dispatch, for storage.
    dispatch: u32,
    /// Counts barriers.
    epoch: u32,
    /// Counts barriers of storage.
    phase: u32,
    since: u32,
    group: [u32; 3],
    group_number: u32,
    faults: BTreeMap<(String, Kind), Fault>,
}

impl<'m> Machine<'m> {
    pub fn new(
        module: &'m Module,
        info: &naga::valid::ModuleInfo,
        bound: &'m [Bound],
        storage: &'m mut [Memory],
        subgroup: usize,
        dispatch: u32,
    ) -> Self {
        let entry = &module.entry_points[0];
        let functions = module.functions.iter();
        let functions = functions
            .map(|(handle, function)| table::table(module, function, &info[handle], subgroup));
        let mut workgroup = Vec::new();
        let homes = module.global_variables.iter().map(|(_, global)| {
            match (global.space, global.binding) {
                (AddressSpace::Storage { .. }, Some(binding)) => {
                    Some(Root::Storage(binding.binding as usize))
                }
                (AddressSpace::WorkGroup, _) => {
                    let size = module.types[global.ty].inner.size(module.to_ctx());
                    workgroup.push(Memory::poisoned(u64::from(size)));
                    Some(Root::Workgroup(workgroup.len() - 1))
                }
                _ => None,
            }
        });
        Self {
            homes: homes.collect(),
            functions: functions.collect(),
            entry: table::table(module, &entry.function, info.get_entry_point(0), subgroup),
            module,
            bound,
            storage,
            workgroup,
            lanes: entry.workgroup_size.iter().product::<u32>() as usize,
            subgroup,
            dispatch,
            epoch: 1,
            phase: 0,
            since: 1,
            group: [0; 3],
            group_number: 0,
            faults: BTreeMap::new(),
        }
    }

    pub fn faults(self) -> Vec<Fault> {
        self.faults.into_values().collect()
    }

    pub fn run(&mut self, group: [u32; 3]) {
        let entry = &self.module.entry_points[0];
        self.group = group;
        self.epoch += 1;
        self.since = self.epoch;
        let arguments = entry.function.arguments.iter().map(|argument| {
            let Some(naga::Binding::BuiltIn(builtin)) = argument.binding else {
                panic!("an argument is no builtin");
            };
            Slot::Value(Rc::new(self.builtin(builtin, entry.workgroup_size)))
        });
        let arguments = arguments.collect();
        let all = vec![true; self.lanes];
        self.call(&entry.function, Rc::clone(&self.entry), arguments, all);
        self.group_number += 1;
    }

    fn builtin(&self, builtin: BuiltIn, [x, y, _]: [u32; 3]) -> Value {
        let lanes = self.lanes as u32;
        let each = |f: &dyn Fn(u32) -> u32| (0..lanes).map(f).collect::<Vec<u32>>();
        let local = [
            each(&|l| l % x),
            each(&|l| l / x % y),
            each(&|l| l / (x * y)),
        ];
        let size = self.module.entry_points[0].workgroup_size;
        let subgroup = self.subgroup as u32;
        let parts = match builtin {
            BuiltIn::LocalInvocationIndex => vec![each(&|l| l)],
            BuiltIn::LocalInvocationId => local.to_vec(),
            BuiltIn::WorkGroupId => self.group.map(|n| each(&|_| n)).to_vec(),
            BuiltIn::GlobalInvocationId => (0..3)
                .map(|i| each(&|l| self.group[i] * size[i] + local[i][l as usize]))
                .collect(),
            BuiltIn::SubgroupId => vec![each(&|l| l / subgroup)],
            BuiltIn::SubgroupInvocationId => vec![each(&|l| l % subgroup)],
            BuiltIn::SubgroupSize => vec![each(&|_| subgroup)],
            other => panic!("no kernel uses {other:?}"),
        };
        Value::join(self.lanes, parts.iter().map(Vec::as_slice))
    }

    fn call(
        &mut self,
        function: &'m Function,
        table: Table,
        arguments: Vec<Slot>,
        mut mask: Mask,
    ) -> Option<Value> {
        let mut frame = Frame {
            values: vec![None; function.expressions.len()],
            locals: Vec::new(),
            function,
            table,
            arguments,
            result: None,
        };
        for (_, variable) in function.local_variables.iter() {
            let inner = &self.module.types[variable.ty].inner;
            let fields = table::fields(self.module, inner, self.subgroup).len();
            let start = match variable.init {
                Some(init) => (*self.value(&mut frame, init, &mask)).clone(),
                None => Value::zero(self.lanes, fields),
            };
            frame.locals.push(start);
        }
        let mut jumps = Jumps {
            broken: Vec::new(),
            continued: Vec::new(),
        };
        self.block(&mut frame, &function.body, &mut mask, &mut jumps);
        frame.result
    }

    fn block(
        &mut self,
        frame: &mut Frame<'m>,
        block: &'m Block,
        mask: &mut Mask,
        jumps: &mut Jumps,
    ) {
        for statement in block.iter() {
            if !mask.contains(&true) {
                return;
            }
            match statement {
                Statement::Emit(range) => {
                    for handle in range.clone() {
                        let slot = self.evaluate(frame, handle, mask);
                        frame.values[handle.index()] = Some(slot);
                    }
                }
                Statement::Block(block) => self.block(frame, block, mask, jumps),
                Statement::If {
                    condition,
                    accept,
                    reject,
                } => {
                    let condition = self.value(frame, *condition, mask);
                    let part = |wanted: bool| -> Mask {
                        let both = mask.iter().zip(&condition.bits);
                        both.map(|(&m, &c)| m && (c != 0) == wanted).collect()
                    };
                    let (mut yes, mut no) = (part(true), part(false));
                    self.block(frame, accept, &mut yes, jumps);
                    self.block(frame, reject, &mut no, jumps);
                    *mask = yes.iter().zip(&no).map(|(&a, &b)| a || b).collect();
                }
                Statement::Loop {
                    body,
                    continuing,
                    break_if,
                } => self.repeat(frame, (body, continuing, *break_if), mask),
                Statement::Break => {
                    mark(&mut jumps.broken, mask);
                    mask.fill(false);
                }
                Statement::Continue => {
                    mark(&mut jumps.continued, mask);
                    mask.fill(false);
                }
                Statement::Return { value } => {
                    if let Some(value) = value {
                        let value = self.value(frame, *value, mask);
                        let lanes = self.lanes;
                        let result = frame
                            .result
                            .get_or_insert_with(|| Value::zero(lanes, value.components()));
                        blend(result, 0, &value, mask);
                    }
                    mask.fill(false);
                }
                Statement::ControlBarrier(kind) => self.barrier(*kind, mask),
                Statement::Store { pointer, value } => {
                    let value = self.value(frame, *value, mask);
                    self.store(frame, *pointer, &value, mask);
                }
                Statement::Call {
                    function,
                    arguments,
                    result,
                } => {
                    let slots = arguments
                        .iter()
                        .map(|&handle| self.slot(frame, handle, mask));
                    let slots = slots.collect();
                    let table = Rc::clone(&self.functions[function.index()]);
                    let callee = &self.module.functions[*function];
                    let value = self.call(callee, table, slots, mask.clone());
                    if let (Some(result), Some(value)) = (result, value) {
                        frame.values[result.index()] = Some(Slot::Value(Rc::new(value)));
                    }
                }
                Statement::CooperativeStore { target, data } => {
                    let value = self.value(frame, *target, mask);
                    let scalar = frame.table[target.index()].scalar();
                    self.matrix_store(frame, data, &value, scalar, mask);
                }
                Statement::WorkGroupUniformLoad { pointer, result } => {
                    self.barrier(Barrier::WORK_GROUP, mask);
                    let value = self.load(frame, *pointer, mask);
                    self.barrier(Barrier::WORK_GROUP, mask);
                    frame.values[result.index()] = Some(Slot::Value(Rc::new(value)));
                }
                other => panic!("no kernel uses {other:?}"),
            }
        }
    }

    fn repeat(
        &mut self,
        frame: &mut Frame<'m>,
        (body, continuing, break_if): (&'m Block, &'m Block, Option<Handle<Expression>>),
        mask: &mut Mask,
    ) {
        /// More than any loop of a tested kernel makes.
        const MOST: usize = 1 << 22;
        let mut done = vec![false; self.lanes];
        for round in 0.. {
            assert!(round < MOST, "a loop does not end");
            let mut jumps = Jumps {
                broken: vec![false; self.lanes],
                continued: vec![false; self.lanes],
            };
            self.block(frame, body, mask, &mut jumps);
            mark(mask, &jumps.continued);
            mark(&mut done, &jumps.broken);
            self.block(frame, continuing, mask, &mut jumps);
            if let Some(condition) = break_if {
                let condition = self.value(frame, condition, mask);
                for ((lane, done), &leaves) in mask.iter_mut().zip(&mut done).zip(&condition.bits) {
                    if *lane && leaves != 0 {
                        *lane = false;
                        *done = true;
                    }
                }
            }
            if !mask.contains(&true) {
                break;
            }
        }
        *mask = done;
    }

    /// A barrier of subgroups says nothing of workgroup memory where SPIR-V is made of it.
    fn barrier(&mut self, kind: Barrier, mask: &Mask) {
        assert!(
            !mask.contains(&false),
            "a barrier that only some invocations reach"
        );
        if kind.contains(Barrier::WORK_GROUP) {
            self.epoch += 1;
        }
        if kind.contains(Barrier::STORAGE) {
            self.phase += 1;
        }
    }

    /// A local variable's components, or memory.
    fn store(
        &mut self,
        frame: &mut Frame<'m>,
        pointer: Handle<Expression>,
        value: &Value,
        mask: &Mask,
    ) {
        let Slot::Pointer(to) = self.slot(frame, pointer, mask) else {
            panic!("a store to a value");
        };
        if let Root::Local(local) = to.root {
            let local = &mut frame.locals[local];
            for lane in (0..self.lanes).filter(|&lane| mask[lane]) {
                for c in 0..value.components() {
                    let place = to.at[lane] as usize + c;
                    local.bits[place * self.lanes + lane] = value.component(c)[lane];
                }
            }
            return;
        }
        let shape = &frame.table[pointer.index()];
        let (fields, atomic) = (Rc::clone(&shape.fields), shape.atomic);
        for lane in (0..self.lanes).filter(|&lane| mask[lane]) {
            let who = match atomic {
                true => self.atomically(),
                false => lane as u32,
            };
            for (c, field) in fields.iter().enumerate() {
                let bits = field.scalar.encode(value.component(c)[lane]);
                let place = to.at[lane] + u64::from(field.offset);
                self.write(to.root, place, field.scalar.size(), bits, who);
            }
        }
    }

    fn access(&self, root: Root, lane: u32) -> Access {
        match root {
            Root::Storage(_) => Access {
                who: self.group_number * 2048 + lane + 1,
                epoch: self.dispatch,
                group: self.group_number,
                phase: self.phase,
                since: 0,
            },
            _ => Access {
                who: lane + 1,
                epoch: self.epoch,
                group: 0,
                phase: 0,
                since: self.since,
            },
        }
    }

    /// The memory, the place in it, and bytes of the binding.
    fn locate(&mut self, root: Root, at: u64) -> (&mut Memory, u64, u64) {
        match root {
            Root::Storage(binding) => {
                let bound = &self.bound[binding];
                let memory = &mut self.storage[bound.memory];
                (memory, bound.offset + at, bound.len)
            }
            Root::Workgroup(number) => {
                let memory = &mut self.workgroup[number];
                let len = memory.len();
                (memory, at, len)
            }
            Root::Local(_) => unreachable!("locals are no memory"),
        }
    }

    pub fn read(&mut self, root: Root, at: u64, size: u32, lane: u32) -> u32 {
        let access = self.access(root, lane);
        let (memory, place, len) = self.locate(root, at);
        if at + u64::from(size) > len {
            self.report(root, Kind::ReadOutside, at, lane);
            return 0;
        }
        let (bits, fault) = memory.load(place, size, access);
        if let Some(kind) = fault {
            self.report(root, kind, at, lane);
        }
        bits
    }

    pub fn write(&mut self, root: Root, at: u64, size: u32, bits: u32, lane: u32) {
        let access = self.access(root, lane);
        let (memory, place, len) = self.locate(root, at);
        if at + u64::from(size) > len {
            self.report(root, Kind::WriteOutside, at, lane);
            return;
        }
        if let Some(kind) = memory.store(place, size, bits, access) {
            self.report(root, kind, at, lane);
        }
    }

    pub fn report(&mut self, root: Root, kind: Kind, at: u64, lane: u32) {
        let (_, _, len) = self.locate(root, 0);
        let mut globals = self.module.global_variables.iter();
        let own =
            |(handle, _): &(Handle<GlobalVariable>, _)| self.homes[handle.index()] == Some(root);
        let name = globals
            .find(own)
            .and_then(|(_, global)| global.name.clone());
        let variable = name.unwrap_or_default();
        let group = self.group;
        let fault = self
            .faults
            .entry((variable.clone(), kind))
            .or_insert(Fault {
                variable,
                kind,
                at,
                len,
                group,
                lane,
                times: 0,
            });
        fault.times += 1;
        // The furthest, of places outside.
        if at > fault.at {
            (fault.at, fault.group, fault.lane) = (at, group, lane);
        }
    }

    pub fn home(&self, global: Handle<GlobalVariable>) -> Root {
        self.homes[global.index()].expect("kernels use storage and workgroup memory only")
    }
}

fn mark(set: &mut Mask, more: &Mask) {
    for (lane, &more) in set.iter_mut().zip(more) {
        *lane |= more;
    }
}

/// Overwrites components from `first` on, of those who take part.
fn blend(to: &mut Value, first: usize, from: &Value, mask: &Mask) {
    for c in 0..from.components() {
        for lane in (0..from.lanes).filter(|&lane| mask[lane]) {
            to.bits[(first + c) * from.lanes + lane] = from.component(c)[lane];
        }
    }
}
