// Adds up parts, in a fixed order: what products with a split K and sums over runs of rows leave behind, of several results in one dispatch.
// An invocation takes a vec4 of one result; each result begins with a workgroup. Eight parts a step.
{# Inside: Of a segment i - begin < all width. Its source has parts rows for each of its first `rows` rows behind `first`, read for col < used;
   its result of `all` rows begins at `offset` vec4s into a buffer that lowering made to hold it. #}
{% include "shared/group" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let i = group_id(wid) * {{ size }}u + lid;
{% for source, first, parts, used, result, offset, stride, rows, width, all, begin in segments %}
    if (i >= {{ begin }}u && i < {{ begin + all * width }}u) {
        let row = (i - {{ begin }}u) / {{ width }}u;
        let col = (i - {{ begin }}u) % {{ width }}u;
        var sum = vec4<f32>();
{% if used < width and rows < all %}
        if (col < {{ used }}u && row < {{ rows }}u) {
{% elif used < width %}
        if (col < {{ used }}u) {
{% elif rows < all %}
        if (row < {{ rows }}u) {
{% endif %}
        var at = ({{ first }}u + row) * s{{ source }}_stride + col;
{% set together = [parts, 8]|min %}
{% if parts >= 16 %}
        for (var round = 0u; round < {{ parts // 8 }}u; round++) {
{% endif %}
{% for n in range(together) %}
            let v{{ n }} = s{{ source }}_load(at + {{ n * rows }}u * s{{ source }}_stride);
{% endfor %}
{% if parts >= 16 %}
            sum += ((v0 + v1) + (v2 + v3)) + ((v4 + v5) + (v6 + v7));
{% else %}
{% for n in range(together) %}
            sum += v{{ n }};
{% endfor %}
{% endif %}
            at += {{ together * rows }}u * s{{ source }}_stride;
{% if parts >= 16 %}
        }
{% endif %}
{% set rest = parts % 8 if parts >= 16 else parts - together %}
{% for n in range(rest) %}
        sum += s{{ source }}_load(at + {{ n * rows }}u * s{{ source }}_stride);
{% endfor %}
{% if used < width or rows < all %}
        }
{% endif %}
        q{{ result }}_store({{ offset }}u + row * {{ stride }}u + col, sum);
    }
{% endfor %}
}
