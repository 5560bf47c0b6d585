// Per sample: y.t, |y|, |t|, sum (y - t)^2. An invocation reads {{ (used + lanes - 1) // lanes }} vec4s of each, whose sums it adds up in blocks of {{ block }}.
{% include "shared/group" %}
{% include "shared/nan" %}
{% include "shared/reduce" %}

fn norm(square: f32) -> f32 {
    return nan_of(max(sqrt(square), 1e-6), square);
}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let lane = lid % {{ lanes }}u;
    let wanted = group_id(wid) * {{ size // lanes }}u + lid / {{ lanes }}u;
    let row = min(wanted, {{ rows - 1 }}u);
    var sums = vec4<f32>();
{% macro add(to) %}
        let y = y_load(row * y_stride + col);
        let t = t_load(row * t_stride + col);
        let d = y - t;
        {{ to }} += vec4<f32>(dot(y, t), dot(y, y), dot(t, t), dot(d, d));
{% endmacro %}
{% if used > block * lanes %}
    for (var begin = lane; begin < {{ used }}u; begin += {{ block * lanes }}u) {
        let stop = min(begin + {{ block * lanes }}u, {{ used }}u);
        var part = vec4<f32>();
        for (var col = begin; col < stop; col += {{ lanes }}u) {
{{ add("part") }}
        }
        sums += part;
    }
{% else %}
    for (var col = lane; col < {{ used }}u; col += {{ lanes }}u) {
{{ add("sums") }}
    }
{% endif %}
    sums = reduce(sums, lid);
    if (wanted < {{ rows }}u && lane == 0u) {
        rows_store(row * rows_stride, vec4<f32>(sums.x, norm(sums.y), norm(sums.z), sums.w));
        for (var col = 1u; col < rows_stride; col++) {
            rows_store(row * rows_stride + col, vec4<f32>());
        }
    }
}
