//! What lowering makes: steps, the places they bind, and the arenas of parameters that run parallel to each other.

use std::collections::HashMap;
use std::sync::Arc;

use crate::error::Result;
use crate::gpu::OFFSET_ALIGNMENT;
use crate::graph::ValueId;
use crate::kernels::Kernel;

/// What a binding of a dispatch refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Place {
    /// A value of the graph.
    Value(ValueId),
    /// A stretch of a value's bytes: some of its rows.
    Part {
        value: ValueId,
        offset: u64,
        bytes: u64,
    },
    /// Intermediate storage of one operation, by number.
    Scratch(usize),
    /// A span of an arena.
    Span(Arena, Span),
}

/// Which of the parallel arenas.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Arena {
    Parameters,
    Gradients,
    /// Gradients added up over runs.
    Accumulated,
    FirstMoments,
    SecondMoments,
    /// f16 copies of the parameters, at half their offsets.
    Shadows,
    /// Bias corrections: two f32 per page of the other arenas, the same on all pages of a parameter.
    Corrections,
}

/// Bytes of a page. Every parameter begins at a new one.
pub(crate) const PAGE: u64 = 512;

/// Bytes of the two bias corrections of a page.
pub(crate) const CORRECTION: u64 = 8;

/// A stretch of an arena: one parameter, or several that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Span {
    /// Which block of parameters. A session keeps its parameters in blocks, each of which is one buffer per arena.
    pub block: usize,
    pub offset: u64,
    pub bytes: u64,
}

impl Span {
    /// Where the span begins in an arena.
    pub fn offset_in(&self, arena: Arena) -> u64 {
        match arena {
            Arena::Shadows => self.offset / 2,
            Arena::Corrections => self.offset / PAGE * CORRECTION,
            _ => self.offset,
        }
    }

    /// The corrections of this span: a span from which they can be bound, the first page there that is one of this span, and the
    /// number of pages.
    pub fn corrections(&self) -> (Self, usize, usize) {
        let aligned = PAGE / CORRECTION * OFFSET_ALIGNMENT;
        let offset = self.offset / aligned * aligned;
        let first = (self.offset - offset) / PAGE;
        let whole = Self {
            block: self.block,
            offset,
            bytes: self.offset - offset + self.bytes.next_multiple_of(PAGE),
        };
        let pages = self.bytes.div_ceil(PAGE);
        (whole, first as usize, pages as usize)
    }
}

/// One dispatch. `places` are in binding order.
#[derive(Clone, Debug)]
pub(crate) struct Step {
    pub kernel: Kernel,
    pub places: Vec<Place>,
    /// The layer that it is for, if it is for one.
    pub layer: Option<Arc<str>>,
}

/// Everything an executable is made from.
#[derive(Debug)]
pub(crate) struct Lowered {
    pub steps: Vec<Step>,
    /// Gradients that live in an arena, with their parameter.
    pub pinned: HashMap<ValueId, (Arena, ValueId)>,
    /// Values that lie in the shadow arena, with their parameter.
    pub shadows: HashMap<ValueId, ValueId>,
    /// (value, state) to copy when the run ends.
    pub assigns: Vec<(ValueId, ValueId)>,
    /// Reshapes, and values that took the place of others, resolved: by value, the value that holds its elements.
    pub roots: Vec<ValueId>,
}

impl Lowered {
    /// Whether a computed value lies in an arena, so that its memory is not planned.
    pub fn is_in_arena(&self, id: ValueId) -> bool {
        self.pinned.contains_key(&id) || self.shadows.contains_key(&id)
    }
}

/// Chooses among variants of a kernel by measuring them.
pub(crate) trait Tuner {
    /// The index of the variant to use for the work that `key` describes. `names` tell the variants apart; the first is the built-in
    /// default. `build` makes the steps of a variant.
    fn choose(
        &self,
        key: &str,
        names: &[String],
        build: &dyn Fn(usize) -> Result<Vec<Step>>,
    ) -> Result<usize>;
}

/// Where parameters lie in the arenas.
pub(crate) trait Arenas {
    /// The span of one parameter.
    fn span(&self, parameter: ValueId) -> Result<Span>;
}
