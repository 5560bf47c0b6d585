// Rows of a product are steps of samples: tap `tap` of row r reads row `source_row(origin(r), tap)` of the operand, and zeros where that
// is NOWHERE. Steps before the start of a sample wrap around and so are behind its end, too.
const NOWHERE: u32 = 0xffffffffu;

fn origin(row: u32) -> vec2<u32> {
    return vec2<u32>(row / {{ rows_each }}u * {{ source_each }}u, row % {{ rows_each }}u * {{ times }}u + {{ offset }}u);
}

fn source_row(start: vec2<u32>, tap: u32) -> u32 {
{% if divide > 1 %}
    let place = start.y + tap * {{ apart }}u;
    let step = place / {{ divide }}u;
    return select(NOWHERE, start.x + step, place % {{ divide }}u == 0u && step < {{ source_each }}u);
{% else %}
    let step = start.y + tap * {{ apart }}u;
    return select(NOWHERE, start.x + step, step < {{ source_each }}u);
{% endif %}
}
