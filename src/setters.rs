//! Builder methods of options: one per public field, of the field's name.

/// Defines `fn field(self, value) -> Self` for each field. Options are `#[non_exhaustive]`, so that they can grow; other crates
/// start from the defaults and set what they need.
macro_rules! setters {
    ($($field:ident: $type:ty),+ $(,)?) => {
        $(
            #[doc = concat!("Sets the field `", stringify!($field), "`.")]
            #[must_use]
            pub fn $field(mut self, $field: $type) -> Self {
                self.$field = $field;
                self
            }
        )+
    };
}

pub(crate) use setters;
