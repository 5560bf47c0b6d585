// Numbers and their indices by row and column. Columns that do not exist, or are not filled, are worse than all others; their indices are
// those of no other.
{% if first %}
fn value_at(row: u32, col: u32) -> f32 {
    let value = x_at(row * x_stride + min(col, {{ cols - 1 }}u));
    return select(-3.4e38, value, col < min({{ cols }}u, filled_at(0u)));
}

fn index_at(row: u32, col: u32) -> u32 {
    return col;
}
{% else %}
fn value_at(row: u32, col: u32) -> f32 {
    let value = x_at(row * x_stride + min(col, {{ cols - 1 }}u));
    return select(-3.4e38, value, col < {{ cols }}u);
}

fn index_at(row: u32, col: u32) -> u32 {
    let index = earlier_at(row * earlier_stride + min(col, {{ cols - 1 }}u));
    return select(0x80000000u + col, index, col < {{ cols }}u);
}
{% endif %}

fn is_better(a: f32, a_index: u32, b: f32, b_index: u32) -> bool {
    return a > b || (a == b && a_index < b_index);
}
