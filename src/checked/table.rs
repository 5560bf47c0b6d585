//! What is known of a function's expressions before it runs.

use std::rc::Rc;

use naga::valid::FunctionInfo;
use naga::{ArraySize, Expression, Function, Handle, Module, Type, TypeInner};

use super::values::Scalar;

/// A component of a value and where it lies in memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Field {
    pub scalar: Scalar,
    pub offset: u32,
}

/// How a pointer is indexed.
#[derive(Clone, Debug)]
pub(super) struct Inside {
    /// By index: components and bytes from the start; of arrays those of one element, times the index.
    pub starts: Vec<(u32, u32)>,
    pub is_array: bool,
    /// Elements, unless only the buffer's size tells.
    pub length: Option<u32>,
}

/// Elements of the longest array that a kernel loads whole: `workgroupUniformLoad` of sums.
const MOST_WHOLE: u32 = 64;

/// Type of an expression.
#[derive(Clone, Debug, Default)]
pub(super) struct Shape {
    /// Components, of a pointer those that it points to; none of long arrays, which are never loaded whole.
    pub fields: Rc<[Field]>,
    /// Of a composite or a pointer to one.
    pub inside: Option<Rc<Inside>>,
    /// Bytes of what a pointer points to; 0 for others.
    pub pointee: u32,
    /// Whether a pointer points to an atomic.
    pub atomic: bool,
}

impl Shape {
    /// Of what is calculated with.
    pub fn scalar(&self) -> Scalar {
        self.fields[0].scalar
    }
}

/// Shapes of all expressions of a function, by index.
pub(super) type Table = Rc<[Shape]>;

pub(super) fn table(
    module: &Module,
    function: &Function,
    info: &FunctionInfo,
    lanes: usize,
) -> Table {
    let shape = |(handle, _): (Handle<Expression>, _)| {
        shape(module, info[handle].ty.inner_with(&module.types), lanes)
    };
    function.expressions.iter().map(shape).collect()
}

/// `lanes`: of a subgroup, among which the elements of a matrix are dealt out.
pub(super) fn shape(module: &Module, inner: &TypeInner, lanes: usize) -> Shape {
    match *inner {
        TypeInner::Pointer { base, .. } => {
            let base = &module.types[base].inner;
            let whole = match base {
                TypeInner::Array {
                    size: ArraySize::Constant(n),
                    ..
                } if n.get() > MOST_WHOLE => Vec::new(),
                base => fields(module, base, lanes),
            };
            Shape {
                fields: whole.into(),
                inside: inside(module, base, lanes),
                pointee: base.size(module.to_ctx()),
                atomic: matches!(base, TypeInner::Atomic(_)),
            }
        }
        TypeInner::ValuePointer { size, scalar, .. } => {
            let width = u32::from(scalar.width);
            let inner = match size {
                Some(size) => TypeInner::Vector { size, scalar },
                None => TypeInner::Scalar(scalar),
            };
            Shape {
                pointee: width * size.map_or(1, |size| size as u32),
                ..shape(module, &inner, lanes)
            }
        }
        ref inner => Shape {
            fields: fields(module, inner, lanes).into(),
            inside: inside(module, inner, lanes),
            ..Shape::default()
        },
    }
}

fn inside(module: &Module, inner: &TypeInner, lanes: usize) -> Option<Rc<Inside>> {
    let count = |ty: Handle<Type>| fields(module, &module.types[ty].inner, lanes).len() as u32;
    Some(Rc::new(match *inner {
        TypeInner::Vector { size, scalar } => Inside {
            starts: (0..size as u32)
                .map(|i| (i, i * u32::from(scalar.width)))
                .collect(),
            is_array: false,
            length: Some(size as u32),
        },
        TypeInner::Array { base, size, stride } => Inside {
            starts: vec![(count(base), stride)],
            is_array: true,
            length: match size {
                ArraySize::Constant(n) => Some(n.get()),
                _ => None,
            },
        },
        TypeInner::Struct { ref members, .. } => {
            let mut before = 0;
            let starts = members.iter().map(|member| {
                let start = (before, member.offset);
                before += count(member.ty);
                start
            });
            let starts: Vec<_> = starts.collect();
            Inside {
                length: Some(starts.len() as u32),
                starts,
                is_array: false,
            }
        }
        _ => return None,
    }))
}

/// Components of a value of this type; none of an array of unknown length.
pub(super) fn fields(module: &Module, inner: &TypeInner, lanes: usize) -> Vec<Field> {
    match *inner {
        TypeInner::Scalar(scalar) | TypeInner::Atomic(scalar) => vec![Field {
            scalar: Scalar::new(scalar),
            offset: 0,
        }],
        TypeInner::Vector { size, scalar } => (0..size as u32)
            .map(|i| Field {
                scalar: Scalar::new(scalar),
                offset: i * u32::from(scalar.width),
            })
            .collect(),
        TypeInner::CooperativeMatrix { rows, scalar, .. } => {
            let each = (rows as usize).pow(2) / lanes;
            let field = Field {
                scalar: Scalar::new(scalar),
                offset: 0,
            };
            vec![field; each]
        }
        TypeInner::Struct { ref members, .. } => members
            .iter()
            .flat_map(|member| {
                let inner = &module.types[member.ty].inner;
                fields(module, inner, lanes).into_iter().map(|field| Field {
                    offset: member.offset + field.offset,
                    ..field
                })
            })
            .collect(),
        TypeInner::Array {
            base,
            size: ArraySize::Constant(n),
            stride,
        } => {
            let each = fields(module, &module.types[base].inner, lanes);
            (0..n.get())
                .flat_map(|i| {
                    each.iter().map(move |field| Field {
                        offset: i * stride + field.offset,
                        ..*field
                    })
                })
                .collect()
        }
        _ => Vec::new(),
    }
}
