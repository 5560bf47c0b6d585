//! Layers: their names in errors and profiles.

use std::sync::Arc;

use super::{Graph, ValueId};
use crate::error::Result;

/// Between the names of nested layers.
const SEPARATOR: char = '/';

/// Restores the enclosing layer, also when the closure panics.
struct Inside<'a> {
    graph: &'a mut Graph,
    outer: Option<Arc<str>>,
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.graph.scope = self.outer.take();
    }
}

impl Graph {
    /// Runs `build` inside of the layer `name`: nodes that it adds carry the name, and so does an error that it returns.
    ///
    /// Layers may be nested. The path of `blocks.0` inside of `encoder` is `encoder/blocks.0`. A layer whose name continues that
    /// of the enclosing layer after a dot replaces it: `blocks.0.norm` inside of `encoder/blocks.0` is `encoder/blocks.0.norm`.
    /// The layers of [`nn`](crate::nn) do this by themselves.
    ///
    /// # Errors
    /// What `build` returns, with the path of the layer.
    pub fn scoped<T>(
        &mut self,
        name: &str,
        build: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        let path = self.path_of(name);
        self.scope_as(Some(Arc::from(path.as_str())), build)
            .map_err(|error| error.in_layer(&path))
    }

    /// As [`Graph::scoped`], in a layer with the name of `parameter` up to the last dot.
    pub(crate) fn scoped_like<T>(
        &mut self,
        parameter: ValueId,
        build: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        let name = &self.value(parameter)?.name;
        let name = name.rsplit_once('.').map_or("", |(layer, _)| layer);
        match name {
            "" => build(self),
            name => {
                let name = name.to_owned();
                self.scoped(&name, build)
            }
        }
    }

    /// Runs `build` with `scope` as the path of the layer.
    pub(super) fn scope_as<T>(
        &mut self,
        scope: Option<Arc<str>>,
        build: impl FnOnce(&mut Self) -> T,
    ) -> T {
        let outer = std::mem::replace(&mut self.scope, scope);
        let inside = Inside { graph: self, outer };
        build(inside.graph)
    }

    fn path_of(&self, name: &str) -> String {
        let Some(outer) = self.scope.as_deref() else {
            return name.to_owned();
        };
        let (before, last) = match outer.rsplit_once(SEPARATOR) {
            Some((before, last)) => (Some(before), last),
            None => (None, outer),
        };
        let continues = name == last
            || name
                .strip_prefix(last)
                .is_some_and(|rest| rest.starts_with('.'));
        match (continues, before) {
            (true, None) => name.to_owned(),
            (true, Some(before)) => format!("{before}{SEPARATOR}{name}"),
            (false, _) => format!("{outer}{SEPARATOR}{name}"),
        }
    }

    /// Runs `declare`, whose parameters then are known to be declared by the layer `kind` of this name.
    pub(crate) fn declaring<T>(
        &mut self,
        kind: &str,
        name: &str,
        declare: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        let outer = self.declaring.take();
        self.declaring = Some(Arc::from(format!("{kind} {name:?}")));
        let result = declare(self);
        self.declaring = outer;
        result
    }
}
