// y (dy - sum(dy y)) of a row, or dy - exp(y) sum(dy) of the logarithm.
{# Inside: row is at most the last one, columns are clamped to used - 1 or below used, those finished below width. #}
{% if blocks == 1 %}
// An invocation holds its {{ held }} vec4s of y and dy in registers: they are read once.
{% endif %}
{% include "shared/group" %}
{% include "shared/reduce" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let lane = lid % {{ lanes }}u;
    let wanted = group_id(wid) * {{ size // lanes }}u + lid / {{ lanes }}u;
    let row = min(wanted, {{ rows - 1 }}u);
    var sum = vec4<f32>();
{% if blocks == 1 %}
{% for h in range(held) %}
    let col{{ h }} = lane + {{ h * lanes }}u;
    let at{{ h }} = min(col{{ h }}, {{ used - 1 }}u);
    let y{{ h }} = y_load(row * y_stride + at{{ h }});
    let d{{ h }} = dy_load(row * dy_stride + at{{ h }});
{% if (h + 1) * lanes > used %}
    sum += select(vec4<f32>(), tail(at{{ h }}, d{{ h }}{% if not log %} * y{{ h }}{% endif %}), col{{ h }} < {{ used }}u);
{% else %}
    sum += tail(at{{ h }}, d{{ h }}{% if not log %} * y{{ h }}{% endif %});
{% endif %}
{% endfor %}
{% else %}
    for (var begin = lane; begin < {{ used }}u; begin += {{ block * lanes }}u) {
        let stop = min(begin + {{ block * lanes }}u, {{ used }}u);
        var part = vec4<f32>();
        for (var col = begin; col < stop; col += {{ lanes }}u) {
            part += tail(col, dy_load(row * dy_stride + col){% if not log %} * y_load(row * y_stride + col){% endif %});
        }
        sum += part;
    }
{% endif %}
    let total = across(reduce(vec4<f32>(across(sum), 0.0, 0.0, 0.0), lid));
    if (wanted >= {{ rows }}u) {
        return;
    }
{% if blocks == 1 %}
{% for h in range(held) %}
    if (col{{ h }} < {{ width }}u) {
        finish(row, col{{ h }}, {% if log %}d{{ h }} - exp(y{{ h }}) * total{% else %}y{{ h }} * (d{{ h }} - total){% endif %});
    }
{% endfor %}
{% else %}
    for (var col = lane; col < {{ width }}u; col += {{ lanes }}u) {
        var dx = vec4<f32>();
        if (col < {{ used }}u) {
            let y = y_load(row * y_stride + col);
            let d = dy_load(row * dy_stride + col);
            dx = {% if log %}d - exp(y) * total{% else %}y * (d - total){% endif %};
        }
        finish(row, col, dx);
    }
{% endif %}
}
