// Rows of a product are steps of samples: tap `tap` of row r reads row `source(origin(r), tap)` of the operand, and zeros where that is
// not inside its sample. Steps before the start of a sample wrap around and so are behind its end, too.
struct Source {
    // 0 where outside, so that loading it does no harm.
    row: u32,
    inside: bool,
}

fn origin(row: u32) -> vec2<u32> {
    return vec2<u32>(row / {{ rows_each }}u * {{ source_each }}u, row % {{ rows_each }}u * {{ times }}u + {{ offset }}u);
}

fn source(start: vec2<u32>, tap: u32) -> Source {
{% if divide > 1 %}
    let place = start.y + tap * {{ apart }}u;
    let step = place / {{ divide }}u;
    let inside = place % {{ divide }}u == 0u && step < {{ source_each }}u;
{% else %}
    let step = start.y + tap * {{ apart }}u;
    let inside = step < {{ source_each }}u;
{% endif %}
    return Source(select(0u, start.x + step, inside), inside);
}
