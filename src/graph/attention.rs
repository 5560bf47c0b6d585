//! Attention and softmax: their options, their rules for shapes, and how they are written down.

use super::infer::Operands;
use super::{Graph, Op, ValueId};
use crate::error::Result;
use crate::setters::setters;
use crate::types::{DType, Shape};

/// Options of [`Graph::attention`] and [`Graph::cross_attention`].
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct AttentionOptions {
    /// Number of heads. Each has d = W / heads columns of queries, keys and values. d is a multiple of 4 and at most 256.
    pub heads: usize,
    /// Query i sees only keys j ≤ i.
    pub causal: bool,
    /// Factor on the scores. `None` is 1/√d.
    pub scale: Option<f32>,
}

impl AttentionOptions {
    /// Largest number of columns per head.
    pub const MOST_COLUMNS: usize = 256;

    /// So many heads, where every query sees all keys that the mask leaves, with the factor 1/√d.
    #[must_use]
    pub fn new(heads: usize) -> Self {
        Self {
            heads,
            causal: false,
            scale: None,
        }
    }

    setters! {
        heads: usize,
        causal: bool,
        scale: Option<f32>,
    }

    /// The factor on the scores of heads of `d` columns.
    pub(crate) fn factor(&self, d: usize) -> f32 {
        self.scale.unwrap_or_else(|| (d as f32).sqrt().recip())
    }

    fn check(&self, o: &Operands<'_>, width: usize) -> Result<()> {
        let d = match self.heads {
            0 => 0,
            heads => width / heads,
        };
        let most = Self::MOST_COLUMNS;
        if d == 0 || d * self.heads != width || !d.is_multiple_of(4) || d > most {
            return o.fail(format!(
                "{width} columns in {} heads: each head needs the same number of columns, a multiple of 4 and at most {most}",
                self.heads
            ));
        }
        o.require(
            self.scale.is_none_or(f32::is_finite),
            "the scale must be finite",
        )
    }

    /// The mask, operand `i` if there is one, and that there is nothing else.
    fn check_mask(o: &Operands<'_>, i: usize, keys: usize) -> Result<()> {
        match o.shapes.len() == i + 1 {
            true => o.is(i, &Shape::vector(keys), "the mask"),
            false => o.count(i),
        }
    }

    fn statistics(&self, o: &Operands<'_>, [batch, queries]: [usize; 2]) -> Result<Shape> {
        o.result(&[2, batch.saturating_mul(self.heads).saturating_mul(queries)])
    }

    /// Results of [`Op::Attention`], or of its gradient.
    pub(super) fn infer_packed(
        &self,
        o: &Operands<'_>,
        gradient: bool,
    ) -> Result<Vec<(Shape, DType)>> {
        let others = if gradient { 4 } else { 1 };
        let Some(&qkv) = o.shapes.first() else {
            return o.count(others).map(|()| Vec::new());
        };
        let &[batch, time, columns] = qkv.dims() else {
            return o.fail("queries, keys and values must be [B, L, 3·W]");
        };
        o.require(columns.is_multiple_of(3), "there must be 3·W columns")?;
        let width = columns / 3;
        self.check(o, width)?;
        Self::check_mask(o, others, batch * time)?;
        let y = o.result(&[batch, time, width])?;
        let statistics = self.statistics(o, [batch, time])?;
        if gradient {
            o.is(1, &y, "the result")?;
            o.is(2, &statistics, "the statistics")?;
            o.is(3, &y, "dy")?;
            return Ok(vec![(qkv.clone(), o.dtypes[0])]);
        }
        Ok(vec![(y, o.dtypes[0]), (statistics, DType::F32)])
    }

    /// Results of [`Op::CrossAttention`], or of its gradient.
    pub(super) fn infer_cross(
        &self,
        o: &Operands<'_>,
        gradient: bool,
    ) -> Result<Vec<(Shape, DType)>> {
        let others = if gradient { 5 } else { 2 };
        let &[q, kv, ..] = o.shapes.as_slice() else {
            return o.count(others).map(|()| Vec::new());
        };
        let (&[batch, queries, width], &[samples, keys, columns]) = (q.dims(), kv.dims()) else {
            return o.fail("queries must be [B, Lq, W], keys and values [B, Lk, 2·W]");
        };
        o.require(
            batch == samples && columns == 2 * width,
            "queries must be [B, Lq, W], keys and values [B, Lk, 2·W]",
        )?;
        o.require(
            o.dtypes[0] == o.dtypes[1],
            "queries, keys and values must have one element type: cast one of them (Graph::cast)",
        )?;
        self.check(o, width)?;
        Self::check_mask(o, others, batch * keys)?;
        let statistics = self.statistics(o, [batch, queries])?;
        if gradient {
            o.is(2, q, "the result")?;
            o.is(3, &statistics, "the statistics")?;
            o.is(4, q, "dy")?;
            return Ok(vec![(q.clone(), o.dtypes[0]), (kv.clone(), o.dtypes[1])]);
        }
        Ok(vec![(q.clone(), o.dtypes[0]), (statistics, DType::F32)])
    }
}

impl Graph {
    /// Self-attention of several heads: softmax(scale·q·kᵀ)·v of each head. Vaswani et al., arXiv:1706.03762.
    ///
    /// `qkv` [B, L, 3·W] has the queries in its first W columns, then the keys, then the values, so that one product computes them. Head h
    /// has columns h·d to h·d + d − 1 of each, with d = W / heads. The result is [B, L, W] like `qkv`.
    ///
    /// `mask` `[B·L]` is 1 for a key that counts and 0 for one that is never attended to. A query that sees no key gets zeros. What a masked
    /// key and its value hold does not matter, NaN included; see [`Op::Attention`]. The L × L scores are never materialised.
    ///
    /// # Errors
    /// As [`Graph::apply`].
    pub fn attention(
        &mut self,
        qkv: ValueId,
        mask: Option<ValueId>,
        options: AttentionOptions,
    ) -> Result<ValueId> {
        let operands: Vec<ValueId> = [qkv].into_iter().chain(mask).collect();
        Ok(self.apply(Op::Attention(options), &operands)?[0])
    }

    /// As [`Graph::attention`], where queries q [B, Lq, W] attend to the keys and values of another sequence, kv [B, Lk, 2·W]: keys in the
    /// first W columns, values in the others. `mask` is `[B·Lk]`. The result is [B, Lq, W] like `q`.
    ///
    /// # Errors
    /// As [`Graph::apply`].
    pub fn cross_attention(
        &mut self,
        q: ValueId,
        kv: ValueId,
        mask: Option<ValueId>,
        options: AttentionOptions,
    ) -> Result<ValueId> {
        let operands: Vec<ValueId> = [q, kv].into_iter().chain(mask).collect();
        Ok(self.apply(Op::CrossAttention(options), &operands)?[0])
    }

    /// exp(x) / Σ exp(x) over the last extent, like x. A row with NaN, with +∞ or with nothing but −∞ is NaN.
    ///
    /// # Errors
    /// As [`Graph::apply`].
    pub fn softmax(&mut self, x: ValueId) -> Result<ValueId> {
        Ok(self.apply(Op::Softmax { log: false }, &[x])?[0])
    }

    /// x − ln Σ exp(x) over the last extent, like x: the logarithm of [`Graph::softmax`], without its underflow.
    ///
    /// # Errors
    /// As [`Graph::apply`].
    pub fn log_softmax(&mut self, x: ValueId) -> Result<ValueId> {
        Ok(self.apply(Op::Softmax { log: true }, &[x])?[0])
    }
}
